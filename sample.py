"""
Generate text with a model that train.py has trained, measure how well it predicts a given text, or export it.

    $ python sample.py --prompt "hello"                  # the prompt and the model's continuation, token by token
    $ python sample.py --prompt @story.txt --top_p=0.9   # the prompt is the file's text; "-" is standard input
    $ python sample.py --num_samples=16 --seed=7         # sixteen texts as one batch, printed when all are done
    $ python sample.py --score=@story.txt                # no generation: bits per token and byte, perplexity
    $ python sample.py --export=llama                    # a folder that Hugging Face's tools open as a Llama

Needs a run folder of train.py and nothing else. Uses the weights with the lowest validation loss (best.pt), else the
last ones (ckpt.pt). Text goes to standard output, notes to standard error. The same seed gives the same text on the
same machine.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load ends the script without a traceback

import codecs
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from bpe import configure, one_line_errors, require, write_together
from model import Linear, softmax
from train import choose_device, load_run

out_dir = "out"        # run folder that train.py wrote
prompt = ""            # text to continue; "-": standard input, "@file": a file's text; empty: start a new document
num_samples = 1        # texts to generate, all as one batch
max_new_tokens = 256   # tokens per text, unless the document ends first
temperature = 0.8      # divides the logits: below 1 safer, above 1 wilder; 0: always the likeliest token
top_k = 50             # choose among this many likeliest tokens; 0: among all
top_p = 0.95           # choose among the fewest likeliest tokens whose probabilities reach this sum; 1: among all
seed = 0               # of the random choices
score = ""             # text to score instead of generating, given like the prompt
export = ""            # folder to make in Hugging Face's layout, instead of generating
device = ""            # cpu, cuda or mps; empty: the fastest at hand


# ----------------------------------------------------------------------------------------------------- choosing a token

def candidates(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The next token's probabilities and the ids that they belong to, two tensors (..., n); logits (..., V).

    The n = top_k largest logits stay (all, if 0) and are divided by temperature. Of these, the smallest set whose
    probabilities reach top_p stays (nucleus sampling, Holtzman et al. 2019, eq. 2); the others get 0, and the sum
    becomes 1 again. Temperature 0 keeps the likeliest token alone.
    """
    if temperature < 1e-30:   # 0, or so small that float32 cannot divide by it
        temperature, top_k = 1.0, 1
    logits, ids = logits.topk(min(top_k or math.inf, logits.size(-1)))   # in falling order
    probabilities = softmax(logits / temperature, -1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities   # the sum over all likelier tokens
        probabilities = probabilities * (before < max(top_p, 1e-30))   # float32 would round less than that to 0
    return probabilities / probabilities.sum(-1, keepdim=True), ids


# ----------------------------------------------------------------------------------------------------------- generating

class StreamedLinear(nn.Module):
    """x @ weight.T, made for the newest token of each sample, when reading the weights takes most of the time;
    x (B, T, in_features) -> (B, T, out_features).

    torch computes the product of a matrix and one vector on one core, at a third of the memory's bandwidth. Here the
    matrix is stored transposed and cut along its inputs, and the products of the blocks are added up. So all cores
    read, and each reads long rows. (A cut along the outputs takes a tenth more time a token.)
    """

    def __init__(self, weight):
        super().__init__()
        blocks = math.gcd(weight.size(1), 2 * torch.get_num_threads())   # equal blocks, at most two a core
        # (blocks, in_features / blocks, out_features)
        self.weight = weight.T.contiguous().unflatten(0, (blocks, -1))

    def forward(self, x):
        if x.size(1) > 1:   # a prompt has vectors enough for all cores, and would need too much memory in blocks
            return x @ self.weight.flatten(0, 1)
        pieces = x.reshape(-1, *self.weight.shape[:2]).transpose(0, 1)   # (blocks, B, in_features / blocks)
        return torch.bmm(pieces, self.weight).sum(0)[:, None]


def streamed(module):
    """A copy of a module in which each Linear is a StreamedLinear, with weights of its own.
    All other weights are shared with the original, which stays as it was.
    """
    if isinstance(module, Linear):
        return StreamedLinear(module.weight)
    twin = copy.copy(module)
    # nn.Module keeps its submodules in this dict
    twin._modules = {name: streamed(child) for name, child in module._modules.items()}
    return twin


@torch.inference_mode()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, end_id=None, num_samples=1):
    """Yield the ids that continue prompt_ids, one at a time:
    an int, or a list of num_samples ints where that is more than 1.

    Ends after max_new_tokens, or when every sample has reached end_id, and does not yield that last step. A sample
    that ends before the others yields end_id from there on. For temperature, top_k and top_p see candidates. An empty
    prompt starts from end_id; a prompt longer than the context is cut to its end. When the context is full, the older
    half is dropped and the rest read again: the cached keys and values depend on the dropped tokens, so they cannot
    stay, and dropping one token at a time would read all again for each token.
    Random choices come from torch's global generator.
    Raises ValueError, when the first id is asked for, if a value is out of range. Handout, section 6.
    """
    require(min(max_new_tokens, num_samples) >= 1,
            f"max_new_tokens is {max_new_tokens} and num_samples {num_samples}, but each must be at least 1")
    require(0 <= temperature < math.inf,
            f"temperature is {temperature}, but must be 0 (always the likeliest token) or more, and finite")
    require(top_k >= 0, f"top_k is {top_k}, but must be 0 (all tokens) or more")
    require(0 < top_p <= 1, f"top_p is {top_p}, but must be above 0 and at most 1 (all tokens)")
    window = [*prompt_ids][-model.context_length:] or [end_id]   # what the model sees; end_id may be None
    require(window != [None], "an empty prompt starts a new document, but there is no special token to start it from: "
                              "give a prompt")
    weight = model.token_embeddings.weight   # (V, D)
    require(0 <= min(window) <= max(window) < len(weight),
            f"the prompt has token ids from {min(window)} to {max(window)}, "
            f"but the model's go from 0 to {len(weight) - 1}")
    if weight.is_cpu:
        model = streamed(model)
    window = torch.tensor(window, device=weight.device).expand(num_samples, -1)   # (num_samples, T)
    new, cache = window, model.new_cache()
    ended = weight.new_zeros(num_samples, dtype=torch.bool)
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
            cache = model.new_cache()


# -------------------------------------------------------------------------------------------------------------- scoring

@torch.inference_mode()
def surprise(model, ids):
    """Yield -log p(token | those before it), in nats, for ids[1:], some of them at a time (list); ids: two or more.

    Each token sees what it would see if generate had begun at ids[0]: the window moves on by half a context.
    """
    context, half = model.context_length, (model.context_length + 1) // 2
    for start in range(0, max(1, len(ids) - 1 - context + half), half):
        window = torch.tensor(ids[start:start + context + 1], device=model.token_embeddings.weight.device)
        logits = model(window[None, :-1])[0]                                     # (T, V)
        nats = logits.logsumexp(-1) - logits.gather(-1, window[1:, None])[:, 0]  # (T)
        yield nats[context - half if start else 0:].tolist()                     # the window before had the others


def score_text(model, tokenizer, text, end_id):
    """How well the model predicts a text, as one line. Bits per byte compare models whatever their tokenizers."""
    # the first token of a document follows the end of another
    ids = ([] if end_id is None else [end_id]) + tokenizer.encode(text)
    require(len(ids) > 1, "--score: the text is too short: no token in it follows another")
    size, losses = sum(len(tokenizer.vocab[number]) for number in ids[1:]), []
    for more in surprise(model, ids):
        losses += more
        if sys.stderr.isatty():
            print(f"\r{len(losses) / len(ids):4.0%} scored", end="\r", file=sys.stderr, flush=True)
    nats, all_bits = sum(losses) / len(losses), sum(losses) / math.log(2)
    return (f"{nats:.4f} nats per token, {nats / math.log(2):.4f} bits per token, {all_bits / size:.4f} bits per byte, "
            f"perplexity {math.exp(min(nats, 700)):.2f} ({len(losses):,} tokens, {size:,} bytes)")


# ------------------------------------------------------------------------------------------------------------ exporting

# what Hugging Face's Llama calls our parameters
LLAMA = {"token_embeddings": "model.embed_tokens", "layers.": "model.layers.", "ln_final": "model.norm",
         "ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn.": "self_attn.", "output_proj": "o_proj",
         "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj"}


def llama_weights(model, num_heads):
    """The model's parameters in the safetensors format (bytes), in float32, as Hugging Face's Llama has them.

    The format: the length of the header (8 bytes, little-endian), the header in JSON with each tensor's type, shape and
    place, and the tensors' bytes one after the other.
    """
    header, arrays, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, weight in model.named_parameters():   # tied embeddings come once, as token_embeddings
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Our RoPE turns the pairs (2i, 2i + 1), Llama's the pairs (i, i + d_k / 2): of each head's d_k rows,
            # the even ones go first, then the odd ones. The scores q . k stay the same.
            weight = weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        for ours, theirs in LLAMA.items():
            name = name.replace(ours, theirs)
        start, end = end, end + 4 * weight.numel()
        header[name] = {"dtype": "F32", "shape": [*weight.shape], "data_offsets": [start, end]}
        arrays.append(weight.detach().numpy().astype("<f4").tobytes())
    text = json.dumps(header)
    text += " " * (-len(text) % 8)   # so that the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text.encode(), *arrays])


def llama_settings(model, tokenizer, config):
    """The settings that transformers needs beside the weights and the vocabulary: of the model, and of the tokenizer.
    """
    specials = tokenizer.special_tokens
    end = min(specials, key=specials.get, default=None)   # ends a document
    llama = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", dtype="float32", vocab_size=len(tokenizer.vocab),
        max_position_embeddings=config["context_length"], num_hidden_layers=config["num_layers"],
        hidden_size=config["d_model"], intermediate_size=len(model.layers[0].ffn.w1.weight),
        num_attention_heads=config["num_heads"], rope_theta=config["rope_theta"], rms_norm_eps=model.ln_final.eps,
        tie_word_embeddings=config["tie_embeddings"], bos_token_id=specials.get(end), eos_token_id=specials.get(end))
    # The three tokens must be null if there are none, or transformers adds its own <|endoftext|> beyond the vocabulary.
    gpt2 = dict(
        tokenizer_class="GPT2Tokenizer", add_prefix_space=False, bos_token=end, eos_token=end, unk_token=end,
        added_tokens_decoder={number: {"content": token, "special": True} for token, number in specials.items()})
    return llama, gpt2


def export_run(model, tokenizer, config, folder):
    """Write a run as a folder that transformers opens with AutoModelForCausalLM and AutoTokenizer: as a Llama, which
    has the same architecture. config.json is put in place last, so a part of an export is never taken for a model.

    Raises UsageError for a model that is no Llama, and for a folder that holds something already.
    """
    for name, wanted in dict(post_norm=False, rms_norm=True, rope=True, swiglu=True).items():
        require(config[name] == wanted, f"--export: this run has {name}={config[name]}, which a Llama cannot have")
    os.makedirs(folder, exist_ok=True)
    require(not os.listdir(folder), f"--export={folder}: is not empty; name a new folder")
    settings = [json.dumps(words, indent=1).encode() for words in llama_settings(model, tokenizer, config)]
    names = "config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "model.safetensors"
    contents = *settings, *tokenizer.file_contents(), llama_weights(model, config["num_heads"])
    write_together(folder, dict(zip(names, contents)))


# ---------------------------------------------------------------------------------------------------------- the program

def read_text(given):
    """The text that a flag names: standard input for "-", a file's for "@file", else the flag's own.

    In the first two, what is not UTF-8 becomes U+FFFD.
    """
    if given == "-":
        return sys.stdin.buffer.read().decode(errors="replace")
    return Path(given[1:]).read_bytes().decode(errors="replace") if given.startswith("@") else given


def print_streamed(tokens, tokenizer, text=""):
    """Print `text`, then token ids as text while they come, and return their number.

    The bytes of a character that is not complete yet are held back until the rest has come.
    """
    decoder, count = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for count, number in enumerate(tokens, 1):
        print(text + decoder.decode(tokenizer.vocab[number]), end="", flush=True)
        text = ""   # it goes out with the first token, and not at all if generate refuses its arguments
    print(text + decoder.decode(b"", final=True))
    return count


def main():
    configure(globals())
    model, tokenizer, config = load_run(out_dir)
    if export:
        export_run(model, tokenizer, config, export)
        return print(f"{export}: a Llama of Hugging Face's transformers, with its tokenizer")
    model.to(choose_device(device))
    end_id = min(tokenizer.special_tokens.values(), default=None)   # ends a document
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
        count = print_streamed(tokens, tokenizer, text)
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
