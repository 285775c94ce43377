"""
Train a Transformer language model on the tokens that bpe.py wrote: on CPU, CUDA or Apple's MPS, in one process or many.

    $ python train.py --lr=3e-4 --post_norm=True                 # every constant below is a flag
    $ python train.py --resume=True                              # continue the run in out_dir, with its own constants
    $ python train.py --init_from=out --data_dir=data/mine --out_dir=out/mine    # fine-tune another run's weights
    $ python train.py --compare=out/a,out/b                      # draw the losses of several runs, train nothing
    $ torchrun --nproc_per_node=8 train.py --max_minutes=90      # on eight GPUs, for 90 minutes

    step 1,000 of 1,000: loss 3.237, validation 3.738, lr 3.0e-05, norm 0.68, 2,896 tokens/s, 0:00:00 left

Needs data_dir with vocab.json, merges.txt, train.bin and val.bin. Writes into out_dir: ckpt.pt (where the run stands),
best.pt (the weights with the lowest validation loss so far), log.csv (a row per logged step), curves.svg (the losses
over steps and over seconds), config.json (the constants) and a copy of the tokenizer. sample.py needs this folder only.
Checkpoints are written before the first step, at every evaluation, at the end, and when Ctrl-C, SIGTERM, SIGHUP, a
closed pipe or a log.csv that cannot be written ends the training early. On a full disk, the older one stays.
"The handout" is the first assignment of Stanford's CS336.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load ends the script without a traceback

import os
import time
STARTED = time.perf_counter()  # before torch is imported: those seconds count towards --max_minutes
# The threads of GNU's OpenMP, which torch uses on Linux, spin while they wait for each other, and so take the cores
# from a second run: two runs on two cores then train, together, 50 % of the tokens of one run alone. With threads that
# sleep after 10,000 turns of their loop they train 83 %. (After 1,000 turns 100 %, but one run alone is 10 % slower.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# If one of several processes fails, each of the others would print 16 lines about the lost connection.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
import csv
import glob
import html
import inspect
import json
import math
import sys
import timeit
import warnings
import zipfile
import zlib
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bpe import (InputError, Tokenizer, configure, keep_freed_memory, one_line_errors, only_run_in, replacing,
                 require, write_together)
from model import TransformerLM

# files
data_dir = "data"       # folder that bpe.py wrote
out_dir = "out"         # run folder; a run that it holds is first moved to out.1, or the next free number
resume = False          # continue the run in out_dir with its own constants, or start one where there is none
init_from = ""          # run folder to take the weights and the shape from; the data must have its tokenizer
compare = ""            # run folders or patterns, separated by commas: draw out_dir/compare.svg, and train nothing
# the model's shape
context_length = 256    # tokens that the model sees at once
num_layers = 4          # Transformer blocks
d_model = 256           # width of the residual stream
num_heads = 8           # attention heads; they must divide d_model
d_ff = 0                # width of the feed-forward networks; 0: about 8/3 d_model, or 4 d_model with --swiglu=False
rope_theta = 10000.0    # base of the rotary wavelengths
# ablations
post_norm = False       # normalise after each residual sum, as in 2017, instead of before each sublayer
rms_norm = True         # False: no normalisation at all
rope = True             # False: no positions at all (NoPE)
swiglu = True           # False: ungated feed-forward networks w2(silu(w1 x))
tie_embeddings = False  # one matrix for the token embeddings and the output head
# learning
residual_gain = 1.0     # factor of each block's initial output matrices; below 1, a block starts close to the identity
optimizer = "adamw"     # adamw, or muon: orthogonalised momentum for the matrices inside the blocks, AdamW for the rest
lr = 3e-3               # AdamW's peak learning rate
embedding_scale = 1.0   # token embeddings have this multiple of lr, unless they are tied; 30 works well with Muon
muon_lr = 0.02          # Muon's peak learning rate; its rate is always muon_lr / lr times AdamW's
min_lr = 3e-5           # where lr ends
warmup_steps = 50       # steps of linear warm-up; in a run of fewer than twice as many steps, a tenth of its steps
beta1 = 0.9             # AdamW's memory of the mean gradient
beta2 = 0.99            # AdamW's memory of the mean squared gradient; 0.95 forgets too fast for batches this small
eps = 1e-8              # added to AdamW's denominator
weight_decay = 0.1      # of the matrices; RMSNorm's gains and token embeddings that are not tied do not decay
grad_clip = 1.0         # largest norm of the whole gradient; 0: never clip
# budget
batch_size = 8          # sequences per optimiser step, over all processes
grad_accum = 1          # parts that each process cuts its share of the batch into: the same step in less memory
steps = 1000            # optimiser steps; the learning rate reaches min_lr at the last
max_minutes = 0.0       # above 0: minutes of the whole run, start-up, evaluations and resumptions included; no `steps`
eval_interval = 250     # steps between evaluations; each ends with a checkpoint
eval_batches = 16       # batches of batch_size sequences per evaluation: always the same, spread evenly over val.bin
log_interval = 20       # steps between rows of log.csv; their losses are means over the steps since the row before
seed = 0                # decides the initial weights and every batch
# machine
device = ""             # cpu, cuda, cuda:1 or mps; empty: the fastest at hand
dtype = ""              # of matrix products: float32 (TF32 on CUDA) or bfloat16; empty: the faster one
compile = True          # fuse the model with torch.compile: less time per step, after some seconds of compilation
shard = False           # with torchrun: spread weights and optimiser state over the processes, for large models

SHAPE = [*inspect.signature(TransformerLM).parameters][1:]   # the constants from context_length to tie_embeddings
# What a resumed run may change. With another budget, the learning rate follows the new schedule.
MAY_CHANGE = ("data_dir", "out_dir", "resume", "grad_accum", "steps", "max_minutes", "eval_interval", "log_interval",
              "device", "dtype", "compile", "shard")
RESULTS = {"ckpt.pt", "best.pt", "log.csv", "config.json", "curves.svg", "vocab.json", "merges.txt"}
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # set by torchrun


# ----------------------------------------------------------------------------------------------------------------- data

def load_tokens(path, vocab_size, context_length):
    """The token ids of a .bin file as a read-only array on disk (numpy memmap), and their CRC-32.

    The ids are uint16, or uint32 for a vocabulary of more than 65,536 tokens. Raises InputError (a ValueError) if the
    file ends inside a token, is too short for one context and the token after it, or holds an id beyond the vocabulary.
    """
    kind = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
    size = os.path.getsize(path)
    if size % kind.itemsize or size <= context_length * kind.itemsize:
        raise InputError(f"{path} is too short, cut, or made for another vocabulary: its {size} bytes must be a whole "
                         f"number of {kind.itemsize}-byte tokens, {context_length + 1} or more")
    tokens, crc = np.memmap(path, kind, "r"), 0
    for part in np.array_split(tokens, size // 2 ** 23 + 1):   # the file may exceed the memory, and is read once
        crc = zlib.crc32(part, crc)
        if part.max() >= vocab_size:
            raise InputError(f"{path} holds the token {part.max()}, but the vocabulary ends at {vocab_size - 1}: "
                             "encode the text with this vocabulary")
    return tokens, crc


def windows(dataset, starts, context_length, device):
    """The contexts that begin at `starts` (B), an array, and, as targets, the same shifted by one:
    two tensors (B, T) of int64 on `device`.
    """
    contexts = np.lib.stride_tricks.sliding_window_view(dataset, context_length + 1)   # from every place, as a view
    tokens = torch.as_tensor(contexts[starts], dtype=torch.int64)   # (B, T + 1)
    if "cuda" in str(device):
        tokens = tokens.pin_memory()   # such a copy runs while the GPU computes
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def get_batch(dataset, batch_size, context_length, device, generator=None, part=...):
    """Draw batch_size contexts at random places of a 1-D array of token ids;
    return inputs and targets, each (B, T), int64, on `device`.

    generator: a torch.Generator on the CPU, so that equal seeds give equal batches. part: the rows of the batch to
    read (all). Raises ValueError if the dataset is too short. Handout, section 5.1.
    """
    require(len(dataset) > context_length,
            f"{len(dataset)} tokens are too few for one context of {context_length} and the next token")
    starts = torch.randint(len(dataset) - context_length, [batch_size], generator=generator)
    return windows(dataset, starts[part].numpy(), context_length, device)


def generator_of_step(seed, step):
    """The random generator of one step's batch. What a step sees depends on (seed, step) alone,
    so a resumed run needs no random state.
    """
    return torch.Generator().manual_seed(np.random.SeedSequence([seed, step]).generate_state(1).item())


# ------------------------------------------------------------------------------------------------ schedule and clipping

def get_lr_cosine_schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters):
    """The learning rate of step `it`: linear from 0 to the maximum, then half a cosine to the minimum,
    then the minimum. Handout, section 4.4.
    """
    if it < warmup_iters:
        return max_learning_rate * it / warmup_iters
    if it >= cosine_cycle_iters:
        return min_learning_rate
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (max_learning_rate - min_learning_rate)


@torch.no_grad()
def gradient_clipping(parameters, max_l2_norm, eps=1e-6):
    """Scale all gradients together, in place, so that their joint L2 norm is at most max_l2_norm;
    return the norm before (scalar tensor). Handout, section 4.5.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    # no `if`: a GPU would have to stop for the answer
    torch._foreach_mul_(grads, (max_l2_norm / (norm + eps)).clamp(max=1))
    return norm


# ----------------------------------------------------------------------------------------------------------- optimisers

class Rule(torch.optim.Optimizer):
    """What SGD, AdamW and Muon share: a step calls update(p, g, state, ...) for every parameter p with a gradient g.

    `state` (dict) is what the rule remembers of p. The other arguments are t, the number of the step, from 1, and the
    options of p's group, such as lr. Each rule names those that it uses; `more` takes the rest.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["t"] = group.get("t", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], **group)


class SGD(Rule):
    """Stochastic gradient descent with the handout's decay: in step t, p <- p - lr / sqrt(t) * gradient.
    Raises ValueError for a negative lr. Handout, section 4.2 (where t begins at 0).
    """

    def __init__(self, params, lr):
        require(lr >= 0, f"the learning rate {lr} is negative")
        super().__init__(params, dict(lr=lr))

    def update(self, p, g, state, lr, t, **more):
        p.sub_(lr / math.sqrt(t) * g)


class AdamW(Rule):
    """Adam with decoupled weight decay, as torch.optim.AdamW computes it, in the notation of Kingma and Ba (2015).

    m and v are running means of the gradient g and of g^2; dividing by 1 - beta^t undoes their start at zero: m', v'.
    The decay is lr * lambda, as in torch; in Loshchilov and Hutter (2019, algorithm 2) lr does not scale lambda.
    Raises ValueError for values out of range.
    """

    # True: update calls one kernel of torch, which reads and writes every number once. False, as in a test: the four
    # lines at update's end. At the handout's shape, on two cores, the kernel takes 10 ms of 700 a step, the lines 66.
    fused = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        require(min(lr, eps, weight_decay) >= 0 and 0 <= min(betas) <= max(betas) < 1,
                f"lr {lr}, eps {eps} and weight_decay {weight_decay} must be at least 0, the betas {betas} in [0, 1)")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def add_param_group(self, group):
        """m and v begin at 0 (Muon's matrices have no v), and are there at once: so the first checkpoint of a run is as
        large as its last.
        """
        super().add_param_group(group)
        for p in group["params"]:
            self.state[p] = {name: torch.zeros_like(p) for name in ("m" if "momentum" in group else "mv")}

    def update(self, p, g, state, lr, weight_decay, betas, eps, t, **more):
        m, v, (beta1, beta2) = state["m"], state["v"], betas
        if self.fused:
            return torch._fused_adamw_(
                [p], [g], [m], [v], [], [p.new_full((), t, dtype=torch.float32)], lr=lr, beta1=beta1, beta2=beta2,
                weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)
        p.mul_(1 - lr * weight_decay)                    # p <- p - lr lambda p
        m.lerp_(g, 1 - beta1)                            # m <- beta1 m + (1 - beta1) g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)    # v <- beta2 v + (1 - beta2) g^2
        # p <- p - lr m' / (sqrt(v') + eps)
        p.sub_(lr * (m / (1 - beta1 ** t)) / ((v / (1 - beta2 ** t)).sqrt() + eps))


# Muon moves a matrix along its momentum M = U S V^T with every singular value set to 1, that is, along U V^T. Every
# direction on which the gradients agree then gets a step of the same length, where otherwise a few large ones drown the
# rest (Jordan et al. 2024). A singular value decomposition would be slow. Instead, polynomials a s + b s^3 + c s^5 of
# the whole matrix, which take nothing but products, drive every singular value s towards 1. Below is the (a, b, c) of
# each. The first polynomial is fitted to 1 on [0.004, 1]. It takes these s to an interval around 1 whose ends differ by
# a factor of 62 instead of 250. The next one is fitted on that interval, and so on; each interval is widened by 5 %
# against rounding (Amsel et al. 2025, "The Polar Express"). These four do what one polynomial did in five rounds
# (Jordan et al. 2024), in four fifths of the time.
NEWTON_SCHULZ = ((7.9513, -21.2749, 14.2974), (3.8279, -2.5946, 0.4476),
                 (3.3334, -2.2903, 0.4215), (2.4554, -1.7019, 0.3763))


def orthogonalise(matrices, dtype=torch.float32):
    """The nearest semi-orthogonal matrices, roughly: U S V^T (..., n, m) -> U V^T,
    where singular values above 0.004 of the Frobenius norm end between 0.7 and 1.3. dtype: of the products.
    """
    if matrices.size(-2) > matrices.size(-1):
        return orthogonalise(matrices.mT, dtype).mT   # the wide form has the smaller Gram matrix
    x = (matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


# With --shard=True parameters, gradients and moments are torch's DTensors, of which each process holds a part.
# They are recognised by their methods, so that other runs need not import them.

def whole(tensor):
    """A sharded tensor put together from all processes, all of which must call this; any other value as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Muon(AdamW):
    """AdamW, except that groups with a `momentum` move their matrices along the orthogonalised momentum. The step of a
    matrix that is taller than wide is longer, by the root of height / width (Jordan et al. 2024).
    """

    dtype = torch.float32   # of the products in orthogonalise

    def update(self, p, g, state, lr, weight_decay, momentum=0, **more):
        if not momentum:
            return super().update(p, g, state, lr, weight_decay, **more)
        m = state["m"].lerp_(g, 1 - momentum)
        # Nesterov's form, which looks one step ahead: momentum * m + (1 - momentum) * g rather than m
        move = orthogonalise(whole(g.lerp(m, momentum)), self.dtype)
        p.mul_(1 - lr * weight_decay)
        p.add_(move, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)


def parameter_groups(model):
    """The parameters for AdamW or Muon: the blocks' matrices, the head, the gains, and the embeddings.

    In every step, main sets the rate of a group to the schedule's times its `scale` (1 if it has none).
    """
    muon = dict(momentum=0.95, scale=muon_lr / lr) if optimizer == "muon" else {}
    return [dict(params=[p for p in model.layers.parameters() if p.dim() == 2], **muon),
            dict(params=[model.lm_head.weight]),
            dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0),
            dict(params=[] if tie_embeddings else [model.token_embeddings.weight], weight_decay=0.0,
                 scale=embedding_scale)]


# ---------------------------------------------------------------------------------------------------------- checkpoints

def gathered(value):
    """Nested dicts with their sharded tensors made whole, in the main memory of rank 0 only."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if hasattr(value, "full_tensor"):
        value = whole(value)
        return value.cpu() if RANK == 0 else None
    return value


def write_checkpoint(saved, out):
    """torch.save a dict to a path or binary file. A path gets its new content only when all of it is on the disk.

    With torchrun every process must call this; rank 0 writes.
    """
    saved = gathered(saved)
    if RANK > 0:
        return
    if hasattr(out, "write"):
        return torch.save(saved, out)
    try:
        with replacing(out) as (temporary,), open(temporary, "wb") as file:
            torch.save(saved, file)
    except (OSError, RuntimeError) as error:   # torch hides the operating system's reason behind one of its own
        raise OSError(f"{out} was not written, and what stood there before still stands: "
                      f"{error if isinstance(error, OSError) else error.__context__ or error}") from None


def save_checkpoint(model, optimizer, iteration, out, **more):
    """Write the state of model and optimizer, the iteration, and whatever else is named, to `out`:
    a path or a binary file object.
    """
    write_checkpoint(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iteration=iteration, **more), out)


def read_checkpoint(src, *names):
    """What write_checkpoint wrote to a path or binary file object, as a dict of tensors and plain values on the CPU.

    Raises InputError (a ValueError) if the file is damaged or foreign, or lacks `model` or one of these names. No code
    from the file is run.
    """
    try:
        # It is a zip file, but torch does not look at its check sums.
        require(not zipfile.ZipFile(src).testzip(), "a check sum is wrong")
        if hasattr(src, "seek"):
            src.seek(0)
        saved = torch.load(src, map_location="cpu", weights_only=True)
        for name in "model", *names:
            require(name in saved, f"it lacks {name}")
    except (OSError, MemoryError):
        raise
    except Exception as error:   # torch, pickle and zipfile have many ways to say that a file is foreign
        raise InputError(f"{src} is damaged, or is not the checkpoint that is wanted ({str(error)[:99]})") from None
    return saved


def load_checkpoint(src, model, optimizer):
    """Restore model and optimizer from a path, a binary file object, or read_checkpoint's dict,
    and return the iteration.

    Raises InputError (a ValueError) for a damaged or foreign file and RuntimeError for a model of another shape.
    """
    saved = src if isinstance(src, dict) else read_checkpoint(src, "optimizer", "iteration")
    model.load_state_dict(saved["model"])
    # Our optimizers have their m and v from the start. What was saved goes into these, also where they are sharded.
    for ours, state in zip(optimizer.state.values(), saved["optimizer"]["state"].values()):
        for name, tensor in state.items():
            state[name] = ours[name].copy_(tensor)
    optimizer.load_state_dict(saved["optimizer"])
    return saved["iteration"]


def load_run(folder):
    """Load best.pt of a run folder, or ckpt.pt if there is none. Returns the model (on the CPU), its tokenizer, and
    its constants (dict).

    Raises InputError (a ValueError) if its files are damaged or do not belong together.
    """
    path = f"{folder}/best.pt"
    if not os.path.exists(path):
        path = f"{folder}/ckpt.pt"
    saved, tokenizer = read_checkpoint(path), Tokenizer.from_folder(folder)
    try:
        model = TransformerLM(len(tokenizer.vocab), **{name: saved["config"][name] for name in SHAPE})
        model.load_state_dict(saved["model"])
    except Exception as error:   # a missing constant, a value of another type, a tensor of another shape
        raise InputError(f"{path} has no model of its own settings and of the vocabulary beside it: {error}") from None
    return model, tokenizer, saved["config"]


# ------------------------------------------------------------------------------------------------------- many processes

def average(tensors):
    """Replace each tensor by its mean over the processes; all of them travel at once."""
    if PROCESSES > 1:
        for message in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            message.wait()
        torch._foreach_div_(tensors, PROCESSES)


def agreed(number):
    """A number's mean over the processes, so that all of them decide alike."""
    number = torch.tensor(number, dtype=torch.float64)
    average([number])
    return number.item()


def shard_model(model, kind):
    """Spread the parameters over the processes, block by block, on devices of this kind ("cpu", "cuda"):
    a block is whole only while it computes (Zhao et al. 2023, FSDP).
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    # left to itself, FSDP takes a GPU even with --device=cpu
    mesh = dist.init_device_mesh(kind, (PROCESSES,))
    for module in *model.layers, model:
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "loss")  # the loop calls model.loss, where FSDP expects model(...)


def sharding():
    """The context of a sharded run: in it, an operation may take sharded tensors together with whole ones, which must
    be equal in all processes.
    """
    if not shard:
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication
    return implicit_replication()


def in_one_voice(run):
    """Call run(). Of several processes, let rank 0 print, and only one tell its error. A process that fails waits
    before it tells its error, the longer the higher its rank. So one tells it first, and torchrun ends the others.
    """
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        run()
    except (Exception, KeyboardInterrupt):
        if PROCESSES > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)   # by which torchrun ends it
            time.sleep(0.5 + RANK)
        raise


# ------------------------------------------------------------------------------------------------------ log and picture

def write_log(log):
    """Write log.csv anew, whole or not at all. log: its rows, dicts from columns to numbers; None: an empty cell."""
    with replacing(f"{out_dir}/log.csv") as (temporary,), open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, log[0], lineterminator="\n")   # on every platform
        table.writeheader()
        table.writerows(log)


def read_run(folder):
    """A run's log.csv, an array with named columns in which an empty val_loss is 0, and its constants, a dict.
    Raises InputError (a ValueError) where a column is missing or a number is not finite.
    """
    warnings.simplefilter("ignore")   # numpy would add lines of its own about an empty file
    try:
        log = np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True, ndmin=1, filling_values={"val_loss": 0})
        log = log[["step", "tokens", "seconds", "train_loss", "val_loss"]]
        if not np.isfinite(np.mean(log.tolist())):   # nor is the mean of no rows
            raise ValueError("no rows of finite numbers")
        return log, dict(json.loads(Path(folder, "config.json").read_bytes()))
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/log.csv or {folder}/config.json was not written by train.py: {error}") from None


def curves(logs):
    """Yield the lines of an SVG picture of losses over steps and over seconds. logs: {name of a run: its rows}."""
    rows = [row for log in logs.values() for row in log]
    losses = [row[kind] for row in rows for kind in ("train_loss", "val_loss") if row[kind]]
    # up to the nine tenths of all losses: the steep fall of the first steps would flatten the rest
    low, high = min(losses) - 0.05, np.quantile(losses, 0.9) + 0.05
    yield ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1050 450" font-family="sans-serif" font-size="12">'
           '<style>path {stroke: #ddd}</style><rect width="100%" height="100%" fill="white"/>'
           '<text x="70" y="30" font-size="16">Loss in nats a token: training (thin) and validation (thick)</text>')
    for left, axis, label in (70, "step", "optimiser steps"), (590, "seconds", "wall-clock seconds"):
        end = max(row[axis] for row in rows)
        yield f'<g transform="translate({left} 60)"><text x="220" y="374" text-anchor="middle">{label}</text>'
        for i in range(6):   # five fields, each way
            yield (f'<path d="M{88 * i} 0v330M0 {66 * i}h440"/>'
                   f'<text x="{88 * i}" y="350" text-anchor="middle">{end * i / 5:,.4g}</text>'
                   f'<text x="-8" y="{66 * i + 4}" text-anchor="end">{high + (low - high) * i / 5:.2f}</text>')
        yield '<svg width="440" height="330">'   # clips what lies outside
        for i, (name, log) in enumerate(logs.items()):
            colour = f"hsl({(137.5 * i + 210) % 360:.0f}, 70%, 42%)"   # a golden angle apart, so neighbours differ much
            yield f'<text x="430" y="{18 * i + 20}" text-anchor="end" fill="{colour}">{html.escape(name)}</text>'
            for kind, style in ("train_loss", 'opacity="0.45"'), ("val_loss", 'stroke-width="2"'):
                points = " ".join(f"{440 * row[axis] / end:.1f},{330 * (high - row[kind]) / (high - low):.1f}"
                                  for row in log if row[kind])
                yield f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'
        yield "</svg></g>"
    yield "</svg>\n"


def draw_curves(logs, name):
    """Write the picture of these logs into a file of this name in out_dir."""
    # "replace", because the name of a folder may hold bytes that are no text
    write_together(out_dir, {name: "\n".join(curves(logs)).encode(errors="replace")})


def best_row(log):
    """The row with the lowest validation loss; None before the first evaluation."""
    return min((row for row in log if row["val_loss"]), key=lambda row: row["val_loss"], default=None)


def summary(log, bytes_per_token):
    """What a run has reached, as one line. Bits per byte compare runs with different tokenizers."""
    best = best_row(log)
    if best is None:
        return "no evaluation yet"
    last = [row for row in log if row["val_loss"]][-1]
    loss, lowest, step = last["val_loss"], best["val_loss"], best["step"]
    bit = math.log(2) * bytes_per_token   # one bit per byte, in nats a token
    better = bool(lowest < loss)
    return (f"{last['tokens']:,.0f} tokens in {timedelta(seconds=min(int(last['seconds']), 10 ** 12))}: "
            f"validation loss {loss:.4f}{f' (best {lowest:.4f} at step {step:,.0f})' * better}, "
            f"perplexity {math.exp(min(loss, 700)):.1f}, "
            f"{loss / bit:.4f} bits per byte{f' (best {lowest / bit:.4f})' * better}")


def compare_runs():
    """Draw the runs that --compare names into out_dir/compare.svg, and print what each has reached, after the constants
    in which it differs from another, except those that a resumed run may change.
    """
    logs, configs = {}, {}
    for pattern in compare.split(","):
        found = sorted(glob.glob(f"{pattern}/log.csv"))
        require(found, f"--compare={compare}: {pattern!r} is no run folder, and no pattern that matches one")
        for folder in map(os.path.dirname, found):
            logs[folder], configs[folder] = read_run(folder)
    for folder, config in configs.items():
        bytes_per_token = config.pop("val_bytes_per_token", math.nan)
        differing = [f"--{name}={value}" for name, value in config.items() if name not in MAY_CHANGE
                     and any(other.get(name) != value for other in configs.values())]
        print(folder, *differing, summary(logs[folder], bytes_per_token), sep="  ")
    draw_curves(logs, "compare.svg")
    print(f"{out_dir}/compare.svg shows the curves")


# ---------------------------------------------------------------------------------------------------------------- a run

def adopt(known, names, source, free=MAY_CHANGE):
    """Take over these constants of a run. A flag of the command line may repeat one, and may change those in `free`.
    Raises UsageError for a flag that contradicts the run.
    """
    sys.argv[1:1] = [f"--{name}={known[name]}" for name in names]
    config = configure(globals())   # of a flag given twice the last one counts
    for name in names:
        require(name in free or config[name] == known[name],
                f"{source}: {name} is {known[name]!r} there and {config[name]!r} here; "
                "leave the flag out, or name another folder")
    return config


def adopt_runs(config):
    """Take over the constants of the run to resume, or of --init_from's.

    Returns our constants; the checkpoint to resume, or None; and the run of --init_from, as load_run gives it, or None
    where its weights are not wanted.
    """
    saved = parent = None
    if resume and os.path.exists(f"{out_dir}/ckpt.pt"):
        saved = read_checkpoint(f"{out_dir}/ckpt.pt", "config", "optimizer", "iteration", "data", "log", "seconds",
                                "warmup")
        known = saved["config"]
        with suppress(OSError, TypeError, ValueError):   # or the config in the checkpoint, if there is no config.json
            known |= json.loads(Path(out_dir, "config.json").read_bytes())
        # not out_dir: the folder may have another name by now
        config = adopt(known, known.keys() & config.keys() - {"out_dir"}, f"--resume=True: {out_dir}")
        if (steps, max_minutes) != (known["steps"], known["max_minutes"]):
            print("the budget is another than before, so the learning rate follows a new schedule")
    elif init_from:
        parent = load_run(init_from)
        config = adopt(parent[2], SHAPE, f"--init_from={init_from}", ["context_length"])   # no weight depends on it
    return config, saved, parent


def check_flags(config):
    """Raise UsageError for a flag whose value makes no sense. What the model and the optimiser cannot take, such as
    a num_heads that does not divide d_model, they refuse themselves.
    """
    may_be_0 = ("d_ff", "residual_gain", "embedding_scale", "muon_lr", "min_lr", "warmup_steps", "beta1", "beta2",
                "weight_decay", "grad_clip", "max_minutes", "seed")
    for name, value in config.items():
        if type(value) in (int, float):
            require(value > 0 or value == 0 and name in may_be_0,
                    f"--{name}={value}: must be {'at least' if name in may_be_0 else 'above'} 0")
    require(optimizer in ("adamw", "muon"), f"--optimizer={optimizer}: choose adamw or muon")
    require(dtype in ("", "float32", "bfloat16"), f"--dtype={dtype}: choose float32 or bfloat16")
    require(min_lr <= lr, f"--min_lr={min_lr} is above --lr={lr}, but the rate falls from lr to min_lr")
    require(data_dir and out_dir and Path(data_dir).resolve() != Path(out_dir).resolve(),
            f"--out_dir={out_dir}, --data_dir={data_dir}: name two folders, for a run needs one of its own")
    require(batch_size % (PROCESSES * grad_accum) == 0,
            f"--batch_size={batch_size} sequences cannot be split evenly over "
            f"{PROCESSES} processes times --grad_accum={grad_accum} parts")
    require(not shard or PROCESSES > 1,
            "--shard=True spreads one model over several processes: start them with torchrun")


def choose_device(name):
    """The torch.device of this name ("": the fastest at hand); for "cuda" with torchrun, this process's own.
    Raises UsageError for one that this machine or this torch lacks.
    """
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        number = torch.zeros(1, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        number.item()   # a device such as "meta" has a name, but no numbers
        return number.device
    except Exception:   # torch has many ways to say that it lacks a device
        require(False,
                f"--device={name}: this machine, or this torch, has no such device; choose cpu, cuda, cuda:1 or mps")


def choose_precision(chip):
    """The data type of the matrix products on a device: the one that --dtype names, or else the faster one."""
    if dtype:
        return getattr(torch, dtype)
    if chip.type == "cpu":
        # Both are timed: in bfloat16, one CPU took half the time of float32 for a product, and another one twice.
        return min(torch.bfloat16, torch.float32, key=lambda precision: agreed(min(timeit.repeat(
            "x @ x", f"import torch; x = torch.ones(512, 512, dtype={precision})", number=1))))
    # False without CUDA, as on MPS
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def load_data(saved, parent):
    """The tokenizer in data_dir; the tokens for training and for validation; their check sums, by which a resumed run
    knows them again; the mean bytes of a validation token.

    Raises UsageError for data of another tokenizer than the parent's, or not those of the checkpoint.
    """
    if not os.path.exists(f"{data_dir}/vocab.json"):
        raise FileNotFoundError(
            f"{data_dir} has no vocab.json: bpe.py has not run there, or not to its end; run it first")
    tokenizer = Tokenizer.from_folder(data_dir)
    tables = tokenizer.file_contents()
    require(not parent or parent[1].file_contents() == tables,
            f"--data_dir={data_dir} has another tokenizer than --init_from={init_from}: encode the text with "
            f"python bpe.py --tokenizer_dir={init_from} --data_dir={data_dir} --data=TEXT")
    vocab_size = len(tokenizer.vocab)
    train_tokens, train_crc = load_tokens(f"{data_dir}/train.bin", vocab_size, context_length)
    val_tokens, val_crc = load_tokens(f"{data_dir}/val.bin", vocab_size, context_length)
    require(eval_batches * batch_size <= len(val_tokens), f"--eval_batches={eval_batches} of {batch_size} sequences "
            f"are more places than the {len(val_tokens):,} tokens of {data_dir}/val.bin have")
    check_sums = [train_crc, val_crc, zlib.crc32(b"".join(tables))]
    require(not saved or saved["data"] == check_sums, f"--resume=True: {data_dir} has other tokens, or another "
            f"tokenizer, than the data that {out_dir} was trained on; name its data, or another --out_dir")
    lengths = [len(tokenizer.vocab[number]) for number in range(vocab_size)]   # in bytes
    return tokenizer, train_tokens, val_tokens, check_sums, float(np.take(lengths, val_tokens).mean())


def build(vocab_size, chip, precision, parent):
    """The model on its device, with new weights or the parent's, and its optimiser (`rule`)."""
    torch.manual_seed(seed)
    model = TransformerLM(vocab_size, **{name: globals()[name] for name in SHAPE})
    for layer in model.layers:
        layer.attn.output_proj.weight.data *= residual_gain
        layer.ffn.w2.weight.data *= residual_gain
    if parent:
        model.load_state_dict(parent[0].state_dict())
    if shard:
        shard_model(model, chip.type)
    model.to(chip)
    if precision == torch.bfloat16:   # from here on, the loss comes with its matrix products in bfloat16
        model.loss = torch.autocast(chip.type, precision)(model.loss)
    rule = Muon(parameter_groups(model), lr, (beta1, beta2), eps, weight_decay)   # AdamW, if no group has a momentum
    rule.dtype = precision
    return model, rule


def prepare_folder(config, tokenizer, log, resumed):
    """Lay down the files of a run that begins or is resumed in out_dir. An older run is first moved into out_dir.1, or
    the next free number.
    """
    here, number = os.path.realpath(out_dir), 1
    old = RESULTS.intersection(os.listdir(here))
    if old and not resumed:
        while os.path.exists(f"{here}.{number}"):
            number += 1
        for name in old:
            os.renames(f"{here}/{name}", f"{here}.{number}/{name}")   # makes the folder, too
        print(f"{out_dir} held a run: it is in {os.path.basename(here)}.{number} now")
    elif best_row(log) and old < RESULTS:
        print(f"{out_dir} lacks {', '.join(sorted(RESULTS - old))}: "
              f"what ckpt.pt and {data_dir} hold of it is written anew")
    if log:
        write_log(log)   # as it was at the checkpoint: what came after it comes again
    write_together(here, {"config.json": json.dumps(config, indent=1).encode()})
    tokenizer.save(here)


def compile_model(model, inputs, targets):
    """Fuse the model with torch.compile for batches of this shape; or leave it, with a line of warning, where this
    machine cannot compile.
    """
    print("compiling, up to a minute the first time (--compile=False goes without) ... ", end="", flush=True)
    begin = time.perf_counter()
    # until catch_signals, Ctrl-C ends the script at once: the compiler may swallow Python's KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        model.compile_parts()
        model.loss(inputs, targets).backward()
        print(f"{time.perf_counter() - begin:.0f} s")
    except Exception as error:  # no C++ compiler, no Triton, no place for the cache: each has an exception of its own
        torch.compiler.set_stance("force_eager")
        print(f"failed, so steps take longer: {' '.join(str(error).split())[:200]}")
    model.zero_grad()


def evaluate(model, tokens, parts, chip):
    """The mean loss over eval_batches batches that lie evenly spread over the tokens: always the same ones."""
    starts = np.linspace(0, len(tokens) - context_length - 1, eval_batches * batch_size, dtype=int)
    # The gradient stays on, though nobody asks for it:
    # under no_grad torch.compile would compile the model a second time.
    losses = [model.loss(*windows(tokens, batch[part], context_length, chip)).detach()
              for batch in np.split(starts, eval_batches) for part in parts]
    return agreed(torch.stack(losses).mean().item())


def shorter_warmup(total):
    """warmup_steps; for a run of fewer than twice as many steps in all, a tenth of them."""
    if total >= 2 * warmup_steps:
        return warmup_steps
    print(f"{total:,.0f} steps are few for --warmup_steps={warmup_steps}: warming up over {int(total / 10)} instead")
    return int(total / 10)


def catch_signals():
    """A list that receives a SystemExit at a Ctrl-C, SIGTERM or SIGHUP, for the loop to stop after its step.
    A process that waits for another one notes it only after the wait. The same signal once more ends it at once.
    """
    caught = []

    def note(number, frame):
        caught.append(SystemExit(128 + number))
        signal.signal(number, signal.SIG_DFL)

    for number in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM):   # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:   # nohup ignores SIGHUP
            signal.signal(number, note)
    return caught


def check_divergence(row, vocab_size):
    """Raise FloatingPointError if the run diverged: a figure is not finite,
    or the loss is ten times that of a blind guess, log(vocab_size).
    """
    loss = row["train_loss"]
    if not math.isfinite(loss + row["grad_norm"] + (row["val_loss"] or 0)) or loss > 10 * math.log(vocab_size):
        raise FloatingPointError(f"the run diverged by step {row['step']:,}: training loss {loss:.4g}, "
                                 f"gradient norm {row['grad_norm']:.4g}, lr {row['lr']:.3g}; "
                                 f"{out_dir}/ckpt.pt holds the last checkpoint")


def report(log, left, total):
    """Write log.csv and print its last row. left: seconds to the end. total: the number of the last step."""
    write_log(log)
    row = log[-1]
    validation = f", validation {row['val_loss']:.3f}" if row["val_loss"] else ""
    print(f"step {row['step']:,} of {'about ' * bool(max_minutes)}{total:,.0f}: "
          f"loss {row['train_loss']:.3f}{validation}, lr {row['lr']:.1e}, norm {row['grad_norm']:.2f}, "
          f"{row['tokens_per_second']:,.0f} tokens/s, {timedelta(seconds=min(int(left), 10 ** 12))} left", flush=True)


def main():
    config = configure(globals())
    if compare:
        return compare_runs()
    config, saved, parent = adopt_runs(config)
    check_flags(config)
    chip = choose_device(device)
    require(PROCESSES == 1 or chip.type != "mps" and ":" not in device,
            f"--device={device or chip.type}: each process needs a device of its own, so name cpu or cuda")
    tokenizer, train_tokens, val_tokens, check_sums, config["val_bytes_per_token"] = load_data(saved, parent)
    keep_freed_memory()   # saves 5 % of a step on a CPU
    if chip.type == "cuda":
        torch.cuda.set_device(chip)
        torch.set_float32_matmul_precision("high")   # TF32
    if PROCESSES > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chip.type == "cuda" else "gloo")

    precision = choose_precision(chip)
    vocab_size = len(tokenizer.vocab)
    model, rule = build(vocab_size, chip, precision, parent)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} training tokens; "
          f"{f'{PROCESSES} processes on ' * (PROCESSES > 1)}{chip.type}, {str(precision).removeprefix('torch.')}")

    with only_run_in(out_dir) if RANK == 0 else nullcontext(), sharding():
        # the run: a new one, or where the checkpoint stands
        # log: the rows of log.csv; earlier: seconds before this start
        step, log, earlier, warmup = 0, [], 0.0, warmup_steps
        if saved:
            step, log = load_checkpoint(saved, model, rule), saved["log"]
            earlier, warmup = saved["seconds"], saved["warmup"]
            print(f"{out_dir}/ckpt.pt stands at step {step:,}")
        if RANK == 0:
            prepare_folder(config, tokenizer, log, saved)
        saved = parent = None   # their weights take memory
        # this process's sequences of each batch, by number: a row for each part that goes through the model at once
        parts = np.arange(batch_size).reshape(PROCESSES, grad_accum, -1)[RANK]   # (grad_accum, sequences)

        def clock():
            """Seconds that the run has taken, those before it was resumed included."""
            return earlier + time.perf_counter() - STARTED

        def horizon_at(seconds):
            """The last step. With --max_minutes, an estimate that is the same in all processes: `step` steps took
            `seconds`, start-up included, so `budget` (set below) is enough for step * budget / seconds. Before the
            first step it is infinite. So the learning rate falls with the clock.
            """
            return max(step, (step or math.inf) * budget / agreed(seconds)) if max_minutes else steps

        def save():
            """Write ckpt.pt and curves.svg; first best.pt, if the last row has the lowest validation loss."""
            if best_row(log) in log[-1:]:
                write_checkpoint(dict(model=model.state_dict(), config=config), f"{out_dir}/best.pt")
            save_checkpoint(model, rule, step, f"{out_dir}/ckpt.pt", config=config, data=check_sums, log=log,
                            seconds=clock(), warmup=warmup)
            if log and RANK == 0:
                draw_curves({out_dir: log}, "curves.svg")

        save()
        if compile and (max_minutes or step < steps):
            compile_model(model, *windows(train_tokens, 0 * parts[0], context_length, chip))
        # An evaluation, whose result is not used, and a second checkpoint show how long they will take at the end, and
        # that there is room for them.
        begin = clock()
        evaluate(model, val_tokens, parts, chip)
        save()
        # Keep time for two of each, and a quarter more: an evaluation may be due just before the time is up, and the
        # last one follows it. Python takes a second to end.
        budget = 60 * max_minutes - agreed(2.5 * (clock() - begin) + 1.5)
        if not max_minutes:
            warmup = shorter_warmup(steps)
        horizon = horizon_at(clock())

        # since the last row of the log: the sums of the losses and of the gradient norms, on the device
        sums, row_step, row_end = torch.zeros(2, device=chip), step, clock()
        caught = catch_signals()
        while step < horizon:
            # one step
            begin, step = clock(), step + 1
            rate = get_lr_cosine_schedule(step, lr, min_lr, warmup, horizon)
            for group in rule.param_groups:
                group["lr"] = rate * group.get("scale", 1)
            for part in parts:   # each draws the places of the whole batch, from the same seed, and reads its own rows
                inputs, targets = get_batch(train_tokens, batch_size, context_length, chip,
                                            generator_of_step(seed, step), part)
                loss = model.loss(inputs, targets) / grad_accum
                loss.backward()
                sums[0] += loss.detach()
            if not shard:   # FSDP averages sharded gradients itself, in backward
                average([p.grad for p in model.parameters()])
            sums[1] += whole(gradient_clipping(model.parameters(), grad_clip or math.inf))
            rule.step()
            rule.zero_grad()

            horizon = horizon_at(2 * clock() - begin)   # now, and the time of this step once more
            stop = agreed(len(caught))   # above 0 if any process has caught a signal or an error
            evaluating = step >= horizon or step % eval_interval == 0
            estimating = max_minutes and step == 5
            if not (evaluating or estimating or stop or step % log_interval == 0 or not log):
                continue

            # log: reading the sums waits for the device, which other steps do not
            average([sums])
            row_steps = step - row_step
            train_loss, norm = (sums / row_steps).tolist()
            sums.zero_()
            seconds = clock()
            pace = (seconds - row_end) / row_steps   # seconds a step
            left = max(0, budget - seconds) if max_minutes else pace * (steps - step)
            total = step + left / pace
            if estimating:   # the first step has a row of its own, so this pace is without start-up: it tells `total`
                warmup = shorter_warmup(agreed(total))
            val_loss = evaluate(model, val_tokens, parts, chip) if evaluating else None
            log.append(dict(step=step, tokens=step * batch_size * context_length, seconds=seconds, lr=rate,
                            train_loss=train_loss, val_loss=val_loss, grad_norm=norm,
                            tokens_per_second=batch_size * context_length / pace))
            check_divergence(log[-1], vocab_size)
            if RANK == 0:
                try:
                    report(log, left, total)
                except OSError as error:   # a closed pipe or a full disk stops the run as a signal does
                    caught.append(error)

            # save
            if evaluating or stop:
                save()
            row_step, row_end = step, clock()   # evaluations count into the time, but not into the speed
            if stop:
                break

        if step < horizon:
            print(f"stopped at step {step:,}; --resume=True goes on from there")
        else:
            print(summary(log, config["val_bytes_per_token"]) + f"; the run's files are in {out_dir}")
    if PROCESSES > 1:
        dist.barrier()   # nobody leaves while another still talks
        dist.destroy_process_group()
    if caught:
        raise caught[0]


if __name__ == "__main__":
    with one_line_errors():
        in_one_voice(main)
    if PROCESSES > 1:
        os._exit(0)   # gloo's threads have been seen to abort a process that shuts the interpreter down
