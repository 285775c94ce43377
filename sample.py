"""
Generate text with a model that train.py has trained, or measure how well the model predicts a given text.

    $ python sample.py --prompt "hello"                  # the prompt and the model's continuation, token by token
    $ python sample.py --prompt @story.txt --top_p=0.9   # the prompt is the file's text; "-" is standard input
    $ python sample.py --num_samples=16 --seed=7         # sixteen texts as one batch, printed when all are done
    $ python sample.py --score=@story.txt                # no generation: bits per token and byte, perplexity

Needs a run folder of train.py (ckpt.pt, vocab.json and merges.txt) and nothing else. Text goes to standard output,
notes to standard error. The same seed gives the same text on the same machine.
"""
import codecs
import copy
import math
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends the script without a traceback

import torch
from torch import nn

from bpe import Tokenizer, configure, one_line_errors, require
from model import Linear, TransformerLM, softmax
from train import read_checkpoint

out_dir = "out"        # run folder that train.py wrote
prompt = ""            # text to continue; "-": standard input, "@file": a file's text; empty: start a new document
num_samples = 1        # texts to generate, all as one batch
max_new_tokens = 256   # tokens per text, unless <|endoftext|> comes first
temperature = 0.8      # divides the logits: below 1 safer, above 1 wilder; 0: always the likeliest token
top_k = 50             # choose among this many likeliest tokens; 0: among all
top_p = 0.95           # choose among the fewest likeliest tokens whose probabilities reach this sum; 1: among all
seed = 0               # of the random choices
score = ""             # text to score instead of generating, given like the prompt
device = ""            # cpu, cuda or mps; empty: the fastest at hand


# ----------------------------------------------------------------------------------------------------- choosing a token

def check_sampling(max_new_tokens, temperature, top_k, top_p, num_samples):
    """Raise UsageError, which is a ValueError, for a value out of range."""
    require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    require(0 <= temperature < math.inf,
            f"temperature is {temperature}, but must be 0 (always the likeliest token) or more, and finite")
    require(top_k >= 0, f"top_k is {top_k}, but must be 0 (all tokens) or more")
    require(0 < top_p <= 1, f"top_p is {top_p}, but must be above 0 and at most 1 (all tokens)")
    require(num_samples >= 1, f"num_samples is {num_samples}, but must be at least 1")


def candidates(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The next token's probabilities and the ids that they belong to, two tensors (..., n); logits (..., V).

    Kept are the top_k largest logits (all, if 0), divided by temperature; of these the smallest set whose
    probabilities reach top_p (nucleus sampling, Holtzman et al. 2019, eq. 2) shares the whole, and the others have 0.
    Temperature 0 keeps the likeliest alone.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)   # in falling order, many times faster than sorting the whole vocabulary
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    else:
        ids = torch.arange(logits.size(-1), device=logits.device).expand(logits.shape)
    # float64, so that the sums meet top_p where they should; MPS has none
    wide = logits if logits.device.type == "mps" else logits.double()
    # The maximum goes before the division: a tiny temperature would make inf - inf of it.
    probabilities = softmax((wide - wide.amax(-1, keepdim=True)) / temperature, -1)
    if top_p < 1:
        likelier = probabilities.cumsum(-1).roll(1, -1)   # the sum over all tokens before this one
        likelier[..., 0] = 0                              # none for the first, which always stays
        probabilities = probabilities * (likelier < top_p)
    return probabilities / probabilities.sum(-1, keepdim=True), ids


# ----------------------------------------------------------------------------------------------------------- generation

class StreamedLinear(nn.Module):
    """A Linear for few vectors at a time, where the time goes into reading the weights;
    x (..., in_features) -> (..., out_features).

    The product of a matrix and one vector runs on one core (in the BLAS that torch brings), at a third of the memory's
    speed. Cut into blocks of outputs, each stored transposed, it is several products side by side: all cores read,
    two of them at 85 % of that speed.
    """

    def __init__(self, weight):
        super().__init__()
        # of equal size, up to two a core; a V such as 50,257 stays one block
        blocks = math.gcd(weight.size(0), 2 * torch.get_num_threads())
        self.weight = (weight.detach().unflatten(0, (blocks, -1))
                       .transpose(1, 2).contiguous())   # (blocks, in_features, out_features / blocks)

    def forward(self, x):
        y = torch.bmm(x.reshape(1, -1, x.size(-1)).expand(self.weight.size(0), -1, -1),
                      self.weight)   # (blocks, vectors, out_features / blocks)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def streamed(model):
    """A copy of the model with a StreamedLinear, which holds weights of its own, for each Linear;
    all other weights are shared.
    """
    leaves = [module for module in model.modules() if not [*module.children()]]
    # deepcopy takes from its second argument what stands there under an object's id, and copies the rest.
    return copy.deepcopy(model, {id(leaf): StreamedLinear(leaf.weight) if isinstance(leaf, Linear) else leaf
                                 for leaf in leaves})


@torch.inference_mode()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, end_id=None, num_samples=1):
    """Yield the ids that continue prompt_ids, one at a time:
    an int, or a list of num_samples ints where that is more than 1.

    Ends after max_new_tokens, or before that at end_id, which is not yielded; of several samples, one that has ended
    goes on as end_id until all have. temperature, top_k and top_p: see candidates. An empty prompt starts from end_id;
    of one longer than the context, the end counts. When the context is full, the older half is dropped and the rest
    read anew: dropping one token at a time would read all anew for each.
    Random choices come from torch's global generator.
    Raises ValueError, when the first id is asked for, if a value is out of range. Handout, section 6.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, num_samples)
    window = [*prompt_ids][-model.context_length:] or [end_id]   # what the model sees
    if window == [None]:
        raise ValueError("an empty prompt starts from the end-of-text token: give its end_id, or a prompt")
    vocab_size, place = model.token_embeddings.weight.size(0), model.token_embeddings.weight.device
    if not 0 <= min(window) <= max(window) < vocab_size:
        raise ValueError(f"the prompt has token ids from {min(window)} to {max(window)}, "
                         f"but the model's go from 0 to {vocab_size - 1}")
    if place.type == "cpu":
        model = streamed(model)
    window = torch.tensor(window, device=place).expand(num_samples, -1)   # (num_samples, T)
    new, cache = window, model.new_cache(num_samples)
    ended = torch.zeros(num_samples, dtype=torch.bool, device=place)
    for _ in range(max_new_tokens):
        probabilities, ids = candidates(model(new, cache)[:, -1], temperature, top_k, top_p)
        new = ids.gather(-1, torch.multinomial(probabilities, 1))         # (num_samples, 1)
        if end_id is not None:
            ended |= new[:, 0] == end_id
            if ended.all():
                return
            new[ended] = end_id
        yield new.item() if num_samples == 1 else new[:, 0].tolist()
        window = torch.cat((window, new), 1)
        if window.size(1) > model.context_length:
            new = window = window[:, (model.context_length + 1) // 2:]
            cache = model.new_cache(num_samples)


# -------------------------------------------------------------------------------------------------------------- scoring

@torch.inference_mode()
def surprise(model, ids):
    """Yield -log p(token | those before it), in nats, for each of ids[1:]; ids: two or more.

    What came before is seen as generate sees it.
    """
    context, place = model.context_length, model.token_embeddings.weight.device
    half = (context + 1) // 2
    for start in range(0, max(1, len(ids) - 1 - context + half), half):
        window = torch.tensor(ids[start:start + context + 1], device=place)
        logits = model(window[None, :-1])[0].float()                             # (T, V)
        nats = logits.logsumexp(-1) - logits.gather(-1, window[1:, None])[:, 0]  # (T)
        yield from nats[context - half if start else 0:].tolist()                # the window before has had the others


def score_text(model, tokenizer, text, end_id):
    """How well the model predicts a text, as one line. Bits per byte compare models whatever their tokenizers."""
    # the first token of a document follows the end of another
    ids = ([] if end_id is None else [end_id]) + tokenizer.encode(text)
    require(len(ids) > 1, "--score: the text is too short, no token in it follows another")
    total, shown = 0.0, time.monotonic()
    for done, loss in enumerate(surprise(model, ids), 1):
        total += loss
        if sys.stderr.isatty() and time.monotonic() > shown + 1:
            shown = time.monotonic()
            print(f"\r{done / (len(ids) - 1):4.0%} scored", end="\r", file=sys.stderr, flush=True)
    tokens, size = len(ids) - 1, sum(len(tokenizer.vocab[number]) for number in ids[1:])
    nats = total / tokens
    perplexity = math.exp(nats) if nats < 700 else math.inf
    return (f"{nats:.4f} nats per token, {nats / math.log(2):.4f} bits per token, "
            f"{total / math.log(2) / size:.4f} bits per byte, "
            f"perplexity {perplexity:.2f} ({tokens:,} tokens, {size:,} bytes)")


# ---------------------------------------------------------------------------------------------------------- the program

def load_run(folder, device):
    """The model and the tokenizer of a run folder.

    Raises ValueError if its files are damaged or do not belong together.
    """
    tokenizer, saved = Tokenizer.from_folder(folder), read_checkpoint(Path(folder) / "ckpt.pt")
    try:
        config, vocab_size = saved["config"], saved["model"]["token_embeddings.weight"].size(0)
        settings = ("context_length", "num_layers", "d_model", "num_heads", "d_ff", "rope_theta",
                    "post_norm", "rms_norm", "rope", "swiglu", "tie_embeddings")
        model = TransformerLM(vocab_size, **{name: config[name] for name in settings})
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder}/ckpt.pt holds no model that belongs to its settings: {error}") from None
    if vocab_size != len(tokenizer.vocab):
        raise ValueError(f"{folder}: vocab.json has {len(tokenizer.vocab)} tokens, "
                         f"but the model in ckpt.pt has {vocab_size}")
    return model.to(device), tokenizer


def read_text(given):
    """The text that a flag names: standard input for "-", a file's for "@file", else the flag's own.

    What is not UTF-8 becomes U+FFFD.
    """
    if given == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    return Path(given[1:]).read_bytes().decode(errors="replace") if given.startswith("@") else given


def print_streamed(tokens, tokenizer):
    """Print token ids as text while they come, and return their number.

    A character whose bytes are not all there yet waits for the rest.
    """
    decoder, count = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for count, number in enumerate(tokens, 1):
        print(decoder.decode(tokenizer.vocab[number]), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return count


def main():
    configure(globals())
    check_sampling(max_new_tokens, temperature, top_k, top_p, num_samples)
    require(device.split(":")[0] in ("", "cpu", "cuda", "mps"),
            f"--device={device}: choose cpu, cuda or mps, or leave it empty")
    place = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    model, tokenizer = load_run(out_dir, place)
    end_id = tokenizer.special_tokens.get("<|endoftext|>")
    if score:
        return print(score_text(model, tokenizer, read_text(score), end_id))

    text = read_text(prompt)
    prompt_ids = tokenizer.encode(text)
    if len(prompt_ids) > model.context_length:
        print(f"note: the prompt has {len(prompt_ids):,} tokens; the model sees the last {model.context_length:,}",
              file=sys.stderr)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    tokens = generate(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, end_id, num_samples)
    if num_samples == 1:
        print(text, end="", flush=True)
        count = print_streamed(tokens, tokenizer)
    else:
        samples = [[number for number in sample if number != end_id] for sample in zip(*tokens)] or [[]] * num_samples
        count = sum(map(len, samples))
        for i, sample in enumerate(samples, 1):
            print(f"--- sample {i} of {num_samples}\n{text}{tokenizer.decode(sample)}")
    seconds = time.perf_counter() - begin
    print(f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main()
