"""
Train a Transformer language model on the tokens that bpe.py wrote, on CPU, CUDA or Apple's MPS, alone or in many
processes.

    $ python train.py --lr=3e-4 --post_norm=True                  # every constant below is a flag
    $ python train.py --lr=3e-4 --post_norm=True --resume=True    # the same again: go on from out_dir's checkpoint
    $ python train.py --compare=out/a,out/b                       # draw the losses of several runs, train nothing
    $ torchrun --nproc_per_node=8 train.py --max_minutes=90       # on eight GPUs, for 90 minutes

    step 1,000 of 1,000: loss 3.046, validation 3.972, lr 3.0e-05, norm 0.67, 11,497 tokens/s, 0:00 left

Needs data_dir with vocab.json, merges.txt, train.bin and val.bin. Writes into out_dir: ckpt.pt (weights and optimiser
state), log.csv (one row per logged step), curves.svg (the losses over steps and over seconds), config.json (the
constants), and the tokenizer, so that sample.py needs that folder only. Checkpoints are made at every evaluation, at
the end, and on Ctrl-C or SIGTERM.
"""
import os
import time
STARTED = time.perf_counter()  # ahead of torch, whose import takes seconds of what --max_minutes grants
import csv
import ctypes
import html
import itertools
import json
import math
import shutil
import signal
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends the script without a traceback

import numpy as np
import torch
import torch.distributed as dist

from bpe import Tokenizer, configure, one_line_errors, only_run_in, replacing, require
from model import TransformerLM, default_d_ff, training_flops

# files
data_dir = "data"       # folder that bpe.py wrote
out_dir = "out"         # run folder; one that holds a run is moved aside first, to out.1 or the next free number
resume = False          # continue the run in out_dir, whose flags must be given again; or start one where there is none
compare = ""            # run folders, separated by commas: draw out_dir/curves.svg, print a table, and train nothing
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
residual_gain = 1.0     # times the initial output matrices of each block: below 1, it begins close to the identity
optimizer = "adamw"     # adamw, or muon: orthogonalised momentum for the matrices inside the blocks, AdamW for the rest
lr = 3e-3               # AdamW's peak learning rate
embedding_scale = 1.0   # times lr for token embeddings, whose rows are seen rarely; Muon likes 30; tied ones take lr
muon_lr = 0.02          # Muon's peak learning rate; it warms up and falls in step with lr
min_lr = 3e-5           # where lr ends
warmup_steps = 50       # steps of linear warm-up from 0 to lr
beta1 = 0.9             # AdamW's memory of the mean gradient
beta2 = 0.99            # AdamW's memory of the mean squared gradient; 0.95 forgets too fast for batches this small
eps = 1e-8              # added to AdamW's denominator
weight_decay = 0.1      # of the matrices; RMSNorm's gains and token embeddings that are not tied do not decay
grad_clip = 1.0         # largest norm of the whole gradient; 0: never clip
# budget
batch_size = 8          # sequences per optimiser step, over all processes
grad_accum = 1          # parts that each process cuts its share of the batch into: the same step in less memory
steps = 1000            # optimiser steps; the learning rate reaches min_lr at the last
max_minutes = 0.0       # above 0: train for this many minutes of wall-clock time, all included, instead of for `steps`
eval_interval = 250     # steps between evaluations; each ends with a checkpoint
eval_batches = 16       # batches per evaluation, always the same ones, spread evenly over val.bin
log_interval = 20       # steps between rows of log.csv; their losses are means over the steps since the row before
seed = 0                # decides the initial weights and every batch
# machine
device = ""             # cpu, cuda or mps; empty: the fastest at hand
dtype = ""              # float32 (TF32 products on CUDA), or bfloat16 products; empty: bfloat16 where hardware has it
fused = True            # AdamW by torch's one kernel, a third of the time of its formula on a CPU; False: the formula
compile = True          # fuse the model with torch.compile: less time per step, after some seconds of compilation
shard = False           # with torchrun: spread weights and optimiser state over the processes, for large models

RESULTS = ("ckpt.pt", "log.csv", "config.json", "curves.svg", "vocab.json", "merges.txt")
COLUMNS = ("step", "tokens", "seconds", "lr", "train_loss", "val_loss", "grad_norm", "tokens_per_second")
# What a resumed run may change, because the run stays the same but for rounding, its place, or what it reports.
MAY_CHANGE = {"data_dir", "out_dir", "resume", "compare", "grad_accum", "eval_interval", "log_interval",
              "device", "dtype", "fused", "compile", "shard"}
# Dense bfloat16 FLOP/s. The first name found in the card's counts, so a variant stands before its family.
PEAK_FLOPS = {"B200": 2250e12, "H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


# ----------------------------------------------------------------------------------------------------------------- data

def load_tokens(path, vocab_size, context_length):
    """The token ids of a .bin file as a read-only array on disk (numpy memmap),
    uint16, or uint32 for more than 65,536 entries.

    Raises ValueError if the file is cut, holds an id beyond the vocabulary, or is too short for one context and the
    token after it.
    """
    kind = np.dtype("<u2" if vocab_size <= 2 ** 16 else "<u4")
    size = os.path.getsize(path)
    if size % kind.itemsize:
        raise ValueError(f"{path} is cut or of another kind: "
                         f"{size} bytes are no whole number of {kind.itemsize}-byte tokens")
    if size // kind.itemsize <= context_length:
        raise ValueError(f"{path} holds {size // kind.itemsize} tokens, "
                         f"fewer than one context and the next token ({context_length + 1})")
    tokens = np.memmap(path, kind, "r")
    # in parts: the file may exceed the memory
    top = max(int(tokens[i:i + 2 ** 22].max()) for i in range(0, len(tokens), 2 ** 22))
    if top >= vocab_size:
        raise ValueError(f"{path} holds the token {top}, but the vocabulary ends at {vocab_size - 1}: "
                         f"encode it with this vocabulary")
    return tokens


def windows(dataset, starts, context_length, device):
    """The contexts that begin at `starts` (B) and, as targets, the same shifted by one:
    two tensors (B, T) of int64 on `device`.
    """
    tokens = dataset[np.asarray(starts)[:, None] + np.arange(context_length + 1)].astype(np.int64)   # (B, T + 1)
    tokens = torch.from_numpy(tokens)
    if torch.device(device).type == "cuda":
        # from pinned memory, the copy runs while the GPU computes
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    else:
        tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def get_batch(dataset, batch_size, context_length, device, generator=None, part=slice(None)):
    """Draw batch_size contexts at random places of a 1-D array of token ids;
    return inputs and targets, each (B, T), int64, on `device`.

    generator: a torch.Generator on the CPU, so that equal seeds give equal batches. part: the rows of the batch to
    read (all). Handout, section 5.1.
    """
    if len(dataset) <= context_length:
        raise ValueError(f"{len(dataset)} tokens are too few for one context of {context_length} and the next token")
    starts = torch.randint(len(dataset) - context_length, (batch_size,), generator=generator)
    return windows(dataset, starts[part], context_length, device)


def generator_of_step(seed, step):
    """The random generator of one step's batch: what a step sees depends on (seed, step) alone,
    so resuming needs no random state.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


# ------------------------------------------------------------------------------------------------------- many processes
# With --shard=True parameters and gradients are torch's DTensors. They are told by their methods, so that other runs
# need not import them.

def local(tensor):
    """This process's part of a tensor that --shard=True spread over the processes; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """A sharded tensor put together from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread(tensor, like):
    """A whole tensor, sharded as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    # each cuts its part from its own copy
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def average_gradients(parameters):
    """Replace each gradient by its mean over the processes; all of them travel as one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])


def largest(*numbers):
    """Each number's maximum over the processes, so that all of them decide alike."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def mean_over_processes(tensor):
    """The mean of a tensor over all processes."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def shard_model(model, place):
    """Spread the parameters of each block over the processes:
    a block is whole only while it computes (Zhao et al. 2023, FSDP).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    # left to itself, FSDP takes a GPU even under --device=cpu
    mesh = init_device_mesh(place.type, (dist.get_world_size(),))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "loss")  # the loop calls model.loss, where FSDP expects model(...)


# --------------------------------------------------------------------------------------------------------- optimisation

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
    return the norm before (scalar tensor).
    """
    given = [p.grad for p in parameters if p.grad is not None]
    grads = [local(grad) for grad in given]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if hasattr(given[0], "to_local"):  # sharded: the squares of all processes' parts add up
        norm = norm.square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    # no `if`: a GPU would have to stop for the answer
    torch._foreach_mul_(grads, (max_l2_norm / (norm + eps)).clamp(max=1))
    return norm


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with the handout's decay: in step t (from 0), p <- p - lr / sqrt(t + 1) * gradient.
    Handout, section 4.2.
    """

    def __init__(self, params, lr):
        if lr < 0:
            raise ValueError(f"the learning rate {lr} is negative")
        super().__init__(params, dict(lr=lr, t=0))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            torch._foreach_add_(params, [p.grad for p in params], alpha=-group["lr"] / math.sqrt(group["t"] + 1))
            group["t"] += 1
        return loss


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as torch.optim.AdamW computes it
    (Loshchilov and Hutter 2019, algorithm 2; Kingma and Ba 2015).

    p <- (1 - lr * weight_decay) p - lr * m' / (sqrt(v') + eps), where m and v are running means of g and g^2 with the
    memories `betas`, and m' = m / (1 - beta1^t), v' = v / (1 - beta2^t) undo their start at zero. Raises ValueError
    for values out of range.
    fused: all of it in torch's one kernel, which reads and writes every number once instead of seven times.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=False):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must be at least 0, "
                             f"the betas {betas} in [0, 1)")
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, t=0))
        self.fused = fused

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["t"] += 1
            self.update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def update(self, group, params):
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))
        p, g, m, v = zip(*[[local(tensor) for tensor in (p, p.grad, self.state[p]["m"], self.state[p]["v"])]
                           for p in params])
        lr, (beta1, beta2), eps, weight_decay, t = (group[name] for name in ("lr", "betas", "eps", "weight_decay", "t"))
        if self.fused:
            t = [torch.full((), float(t), device=p[0].device)] * len(p)
            return torch._fused_adamw_(p, g, m, v, [], t, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                                       weight_decay=weight_decay, amsgrad=False, maximize=False)
        unbias1, unbias2 = 1 - beta1 ** t, math.sqrt(1 - beta2 ** t)
        torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        denominator = torch._foreach_sqrt(v)
        # both sides of the fraction times unbias2: v' needs no pass of its own
        torch._foreach_add_(denominator, eps * unbias2)
        torch._foreach_addcdiv_(p, m, denominator, -lr * unbias2 / unbias1)


# orthogonalise, next, drives the singular values s of a matrix towards 1 by odd polynomials a s + b s^3 + c s^5; these
# are their (a, b, c). The first is the nearest to 1 on [0.004, 1], and each next one on what the one before makes of
# that interval, widened by 5 % against rounding (Amsel et al. 2025, "The Polar Express"). These four bring about what
# five equal ones did (Jordan et al. 2024), in four fifths of the time.
NEWTON_SCHULZ = ((7.9513, -21.2749, 14.2974), (3.8279, -2.5946, 0.4476),
                 (3.3334, -2.2903, 0.4215), (2.4554, -1.7019, 0.3763))


def orthogonalise(matrices, dtype=torch.float32):
    """The nearest semi-orthogonal matrices, roughly: U S V^T (..., n, m) -> U V^T,
    with singular values above 0.004 |S| between 0.7 and 1.3.

    Newton-Schulz steps: each turns every singular value s into a s + b s^3 + c s^5 by products (in `dtype`) alone.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices   # the wide form, for the smaller Gram matrix
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(AdamW):
    """AdamW, except that groups with a `momentum` move their matrices along the orthogonalised momentum
    (Jordan et al. 2024).

    Every direction that the gradients agree on gets a step of the same length, where otherwise a few large ones drown
    the rest.
    dtype: of the products in orthogonalise.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=False,
                 dtype=torch.float32):
        super().__init__(params, lr, betas, eps, weight_decay, fused)
        self.dtype = dtype

    def update(self, group, params):
        if not group.get("momentum"):
            return super().update(group, params)
        alike = {}
        for p in params:
            if not self.state[p]:
                self.state[p]["m"] = torch.zeros_like(p)
            momentum = self.state[p]["m"].lerp_(p.grad, 1 - group["momentum"])
            # Nesterov: looks one step ahead
            alike.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, group["momentum"])))
        for (rows, columns), pairs in alike.items():  # matrices of one shape go through the products together
            moves = orthogonalise(torch.stack([whole(move) for _, move in pairs]), self.dtype)
            for (p, _), move in zip(pairs, moves):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(spread(move, p), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def parameter_groups(model):
    """The parameters for AdamW or Muon: the blocks' matrices, the head, the gains, and the embeddings.
    `scale` multiplies the schedule's lr.
    """
    inside = [p for p in model.layers.parameters() if p.dim() == 2]
    embeddings, head = model.token_embeddings.weight, model.lm_head.weight
    gains = [p for p in model.parameters() if p.dim() == 1]
    muon = dict(momentum=0.95, scale=muon_lr / lr) if optimizer == "muon" else dict(scale=1.0)
    groups = [dict(params=inside, **muon), dict(params=[head], scale=1.0),
              dict(params=gains, scale=1.0, weight_decay=0.0)]
    return groups if embeddings is head else [
        *groups, dict(params=[embeddings], scale=embedding_scale, weight_decay=0.0)]


# ---------------------------------------------------------------------------------------------------------- checkpoints

CRC_OF_WHOLE = 0x2144DF1C   # what CRC-32 gives for any bytes with their own CRC-32 behind them, as a checkpoint has it


def gathered(value):
    """Nested dicts and lists with their sharded tensors made whole, in the main memory of rank 0 only;
    all processes must call this together.
    """
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return value


class CheckSummed:
    """A binary file as torch.save sees it, and the CRC-32 of what was written."""

    def __init__(self, file):
        self.file, self.crc, self.flush = file, 0, file.flush

    def write(self, data):
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)


def write_checkpoint(saved, file):
    """torch.save into a binary file, and the CRC-32 of all its bytes behind it:
    torch's own reader does not look whether they are sound.
    """
    summed = CheckSummed(file)
    torch.save(saved, summed)
    file.write(summed.crc.to_bytes(4, "little"))


def save_checkpoint(model, optimizer, iteration, out, **more):
    """Write the state of model and optimizer, the iteration, and whatever else is named, to `out`:
    a path or a binary file object.

    A path gets its new content only when all of it is on the disk. With torchrun every process must call this;
    the first one writes.
    """
    saved = gathered(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iteration=iteration, **more))
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    if hasattr(out, "write"):
        write_checkpoint(saved, out)
        return
    try:
        with replacing(out) as temporary, open(temporary, "wb") as file:
            write_checkpoint(saved, file)
    except (OSError, RuntimeError) as error:  # torch hides the operating system's reason behind one of its own
        reason = getattr(error.__context__, "strerror", None) or getattr(error, "strerror", None) or error
        raise OSError(f"{out} was not written, and what stood there before still stands: {reason}") from None


def read_checkpoint(src):
    """What train.py's save_checkpoint wrote to a path or binary file object,
    as a dict of tensors and plain values on the CPU.

    Raises ValueError unless the file is whole, to the last bit. No code from the file is run.
    """
    by_path = isinstance(src, (str, os.PathLike))
    with open(src, "rb") if by_path else nullcontext(src) as file:
        begin, total = file.tell(), 0
        while part := file.read(1 << 20):
            total = zlib.crc32(part, total)
        file.seek(begin)
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True) if total == CRC_OF_WHOLE else {}
        except MemoryError:
            raise
        except Exception:  # torch and pickle have many ways to say that a file is foreign
            saved = {}
    if not (isinstance(saved, dict) and {"model", "optimizer", "iteration"} <= saved.keys()):
        raise ValueError(f"{src if by_path else getattr(src, 'name', 'the checkpoint')} is damaged, "
                         f"or is no checkpoint of train.py")
    return saved


def load_checkpoint(src, model, optimizer):
    """Restore model and optimizer from a path, a binary file object, or read_checkpoint's dict,
    and return the iteration.

    Raises ValueError for a damaged or foreign file and RuntimeError for a model of another shape.
    """
    saved = src if isinstance(src, dict) else read_checkpoint(src)
    parameters, ordered = model.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    model.load_state_dict({name: spread(tensor, parameters.get(name)) for name, tensor in saved["model"].items()})
    states = {i: {name: spread(tensor, ordered[i]) for name, tensor in state.items()}
              for i, state in saved["optimizer"]["state"].items()}
    optimizer.load_state_dict({**saved["optimizer"], "state": states})
    return saved["iteration"]


# ------------------------------------------------------------------------------------------------------ log and picture

def write_log(path, rows):
    """Write a log.csv that holds these rows, each a dict of strings."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_log(path):
    """The rows of a log.csv as dicts of strings; a last row that was cut off is left out."""
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is no log of train.py: its first line should be {','.join(COLUMNS)}")
        rows = [row for row in table if row["tokens_per_second"]]
    for number, row in enumerate(rows, 2):
        try:
            [float(row[name] or (name == "val_loss")) for name in COLUMNS]
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: "
                             f"{','.join(map(str, row.values()))!r} is no row of numbers") from None
    return rows


def read_config(path):
    """The constants of a run, a dict. Raises ValueError if the file holds something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no config.json of train.py: {error}") from None


def round_ticks(low, high, count=6):
    """About `count` round numbers from low to high: the multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / count))
    unit = min((power * factor for factor in (1, 2, 5, 10)), key=lambda unit: abs(unit - (high - low) / count))
    return [i * unit for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def draw_curves(logs, path):
    """Draw losses over steps and over seconds into an SVG file. logs: {name of the run: rows of its log.csv}."""
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e",
               "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
    losses = [[float(row[kind]) for kind in ("val_loss", "train_loss") for row in rows[len(rows) // 10:] if row[kind]]
              for rows in logs.values()]
    # From the best loss up to the worst after a tenth of the run: the plunge of the first steps would flatten the rest.
    # And never beyond a blind guess, which is where a run begins: one that diverges leaves through the top.
    low, high = min(map(min, losses)), max(map(max, losses))
    guess = max(float(rows[0]["train_loss"]) for rows in logs.values())
    high = min(high, guess) if guess > low else high   # unless no run ever came back below it
    low, high = low - 0.03 * (high - low) - 0.01, high + 0.03 * (high - low) + 0.01
    width, height, top = 440, 330, 70 + 18 * math.ceil(len(logs) / 4)
    svg = []

    def text(x, y, words, anchor="middle", more=""):
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(words)}</text>')

    for left, axis in ((70, "step"), (590, "seconds")):
        end = max(float(rows[-1][axis]) for rows in logs.values()) or 1.0
        across = lambda value: left + width * float(value) / end
        down = lambda value: top + height * (high - min(max(float(value), low - 9), high + 9)) / (high - low)
        for tick in round_ticks(0, end):
            svg.append(f'<path d="M{across(tick):.1f} {top}v{height}" class="grid"/>')
            text(across(tick), top + height + 20, f"{tick:,.10g}")
        for tick in round_ticks(low, high):
            svg.append(f'<path d="M{left} {down(tick):.1f}h{width}" class="grid"/>')
            text(left - 8, down(tick) + 4, f"{tick:.10g}", "end")
        text(left + width / 2, top + height + 44, {"step": "optimiser steps", "seconds": "wall-clock seconds"}[axis])
        text(left - 48, top + height / 2, "loss (nats a token)",
             more=f'transform="rotate(-90 {left - 48} {top + height / 2})"')
        # cuts what lies outside
        svg.append(f'<svg x="{left}" y="{top}" width="{width}" height="{height}" '
                   f'viewBox="{left} {top} {width} {height}">')
        for rows, colour in zip(logs.values(), colours * len(logs)):
            thinned = rows[::math.ceil(len(rows) / 500)]  # a point every pixel: more would only make the file large
            validated = [row for row in rows if row["val_loss"]]
            for some, kind, style in ((thinned, "train_loss", 'stroke-width="1" opacity="0.45"'),
                                      (validated, "val_loss", 'stroke-width="2"')):
                points = " ".join(f"{across(row[axis]):.1f},{down(row[kind]):.1f}" for row in some)
                svg.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
            svg += [f'<circle cx="{across(row[axis]):.1f}" cy="{down(row["val_loss"]):.1f}" r="3" fill="{colour}"/>'
                    for row in validated]
        svg.append(f'</svg><rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#888"/>')
    text(70, 30, "Loss in training (thin) and on validation text (thick, with dots)", "start", 'font-size="16"')
    for i, (name, colour) in enumerate(zip(logs, colours * len(logs))):
        x, y = 70 + 240 * (i % 4), 58 + 18 * (i // 4)
        svg.append(f'<path d="M{x} {y - 4}h24" stroke="{colour}" stroke-width="3"/>')
        text(x + 30, y, name if len(name) < 30 else "..." + name[-27:], "start")
    with replacing(path) as temporary:
        temporary.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1050 {top + height + 60}" '
                             'font-family="sans-serif" font-size="12"><style>.grid{stroke:#ddd}</style>'
                             '<rect width="100%" height="100%" fill="white"/>' + "\n".join(svg) + "</svg>\n",
                             encoding="utf-8")


def perplexity(loss):
    """exp(loss): among how many equally likely tokens the model would be as unsure."""
    return math.exp(min(loss, 700))


def compare_runs(folders):
    """Draw the runs in these folders into out_dir/curves.svg
    and print their last losses beside the constants in which they differ.
    """
    require(folders, f"--compare={compare}: names no folder")
    logs = {str(folder): read_log(folder / "log.csv") for folder in folders}
    configs = [read_config(folder / "config.json") for folder in folders]
    for name, rows in logs.items():
        require(rows, f"--compare: {name}/log.csv has no rows yet")
    names = [name for name in configs[0]
             if name not in MAY_CHANGE and len({str(config.get(name)) for config in configs}) > 1]
    table = [["run", *names, "step", "tokens", "seconds", "train loss", "val loss", "perplexity"]]
    for (run, rows), config in zip(logs.items(), configs):
        last = rows[-1]
        validation = next((float(row["val_loss"]) for row in reversed(rows) if row["val_loss"]), math.nan)
        table.append([run, *(str(config.get(name)) for name in names),
                      last["step"], f"{int(last['tokens']):,}", f"{float(last['seconds']):.0f}",
                      f"{float(last['train_loss']):.4f}", f"{validation:.4f}", f"{perplexity(validation):.2f}"])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    draw_curves(logs, Path(out_dir) / "curves.svg")
    print(f"{Path(out_dir) / 'curves.svg'} shows the curves")


# ---------------------------------------------------------------------------------------------------------------- a run

def check_flags(processes):
    """Raise UsageError for a flag whose value makes no sense."""
    for name in ("context_length", "num_layers", "d_model", "num_heads", "batch_size", "grad_accum", "steps",
                 "eval_interval", "eval_batches", "log_interval"):
        require(globals()[name] >= 1, f"--{name}={globals()[name]}: must be at least 1")
    for name in ("d_ff", "embedding_scale", "residual_gain", "muon_lr", "min_lr", "warmup_steps", "eps",
                 "weight_decay", "grad_clip", "max_minutes", "seed"):
        require(globals()[name] >= 0, f"--{name}={globals()[name]}: must not be negative")
    for name in ("rope_theta", "lr"):
        require(globals()[name] > 0, f"--{name}={globals()[name]}: must be above 0")
    for name in ("beta1", "beta2"):
        require(0 <= globals()[name] < 1, f"--{name}={globals()[name]}: must be at least 0 and below 1")
    for name, choices in dict(optimizer=("adamw", "muon"), device=("", "cpu", "cuda", "mps"),
                              dtype=("", "float32", "bfloat16")).items():
        require(globals()[name] in choices,
                f"--{name}={globals()[name]}: choose {' or '.join(choice or 'nothing' for choice in choices)}")
    for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        require(device != name or module.is_available(),
                f"--device={name}: this machine has none that this torch can use")
    require(data_dir and out_dir, "--data_dir or --out_dir is empty: name a folder")
    require(Path(data_dir).resolve() != Path(out_dir).resolve(),
            f"--out_dir={out_dir} is --data_dir too: a run wants a folder of its own")
    require(d_model % num_heads == 0, f"--num_heads={num_heads} does not divide --d_model={d_model}")
    require(min_lr <= lr, f"--min_lr={min_lr} is above --lr={lr}, but the rate falls from lr to min_lr")
    require(batch_size % (processes * grad_accum) == 0,
            f"--batch_size={batch_size} sequences cannot be split evenly over "
            f"{processes} processes times --grad_accum={grad_accum} parts")
    require(not shard or processes > 1,
            "--shard=True spreads one model over several processes: start them with torchrun")


def choose_device(local_rank):
    """Choose the device of this process and make it the current one;
    return it, and the data type of the matrix products on it.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = name == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return (torch.device(f"cuda:{local_rank}" if name == "cuda" else name),
            getattr(torch, dtype or ("bfloat16" if fast else "float32")))


def check_memory(vocab_size, share, place):
    """Raise UsageError for a model, or a share of the batch,
    that this device could not hold even if everything went well.
    """
    if place.type == "cuda":
        memory = torch.cuda.get_device_properties(place).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    # At least: 16 bytes a parameter for weights, gradients and AdamW's two moments;
    # the logits and each block's projections in bfloat16.
    state = 16 * d_model * (vocab_size + num_layers * (4 * d_model + 2 * (d_ff or default_d_ff(d_model, swiglu))))
    batch = 2 * share * context_length * (vocab_size + 8 * num_layers * d_model)
    for names, need in ("--d_model, --num_layers and --d_ff", state), ("--batch_size (divided by --grad_accum)", batch):
        require(need < memory or shard,
                f"{names} would take {need / 1e9:,.0f} GB at least, "
                f"and there are {memory / 1e9:,.0f}: make them smaller")


def load_data():
    """The tokens for training and for validation, the size of the vocabulary,
    and the check sums by which a resumed run knows its data.
    """
    files = {name: Path(data_dir) / name for name in ("vocab.json", "merges.txt", "train.bin", "val.bin")}
    vocab_size = len(Tokenizer.from_files(files["vocab.json"], files["merges.txt"]).vocab)
    tokens = [load_tokens(files[name], vocab_size, context_length) for name in ("train.bin", "val.bin")]
    check_sums = {name: zlib.crc32(files[name].read_bytes()) for name in ("vocab.json", "merges.txt")}
    check_sums |= {name: zlib.crc32(array) for name, array in zip(("train.bin", "val.bin"), tokens)}
    return *tokens, vocab_size, check_sums


def differences(there, here):
    """In which constants another run differs from this one, beyond what a resumed run may change: a list of phrases.
    Both are dicts.
    """
    return [f"{name} is {there.get(name)!r} there and {value!r} here"
            for name, value in here.items() if name not in MAY_CHANGE and there.get(name) != value]


def check_same_run(saved, config, check_sums):
    """Raise UsageError, naming what differs, unless the checkpoint's run had these constants
    and data with these check sums.
    """
    differing = differences(saved["config"], config)
    differing += [f"{Path(data_dir) / name} is another file"
                  for name in check_sums if saved["data"].get(name) != check_sums[name]]
    require(not differing,
            f"--resume=True: {out_dir} holds another run: {', '.join(differing)}; "
            f"give its flags (config.json has them), or another --out_dir")


def prepare_folder(config, done):
    """Cut the log of a run resumed at step `done` back to there;
    or (done 0) move an older run aside and lay down the files of a new one.
    """
    out, log = Path(out_dir), Path(out_dir) / "log.csv"
    if done:
        write_log(log, [row for row in read_log(log) if int(row["step"]) <= done])
        return
    old = [out / name for name in RESULTS if (out / name).exists()]
    same = resume and (out / "config.json").exists() and not differences(read_config(out / "config.json"), config)
    if old and not same:   # the same run may begin anew where it was killed before its first checkpoint
        here = out.resolve()
        aside = next(path for path in (here.with_name(f"{here.name}.{i}") for i in itertools.count(1))
                     if not path.exists())
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"{out} held a run: it is in {aside.name} now")
    write_log(log, [])
    for name in ("vocab.json", "merges.txt"):
        with replacing(out / name) as temporary:
            shutil.copyfile(Path(data_dir) / name, temporary)
    with replacing(out / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def compile_model(model, loss_of, inputs, targets):
    """Fuse the model with torch.compile for batches of this shape;
    or leave it, with a line of warning, where this machine cannot compile.
    """
    print("compiling, up to a minute the first time (--compile=False goes without) ... ", end="", flush=True)
    begin = time.perf_counter()
    # Ctrl-C ends the script at once: the compiler may swallow Python's KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        model.compile_parts()
        loss_of(inputs, targets).backward()
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    except torch.OutOfMemoryError:
        raise   # steps that are not compiled would need even more
    except Exception as error:  # no C++ compiler, no Triton, no place for the cache: each has an exception of its own
        torch.compiler.set_stance("force_eager")
        print("failed", flush=True)
        print(f"warning: cannot compile here, so steps take longer: {' '.join(str(error).split())[:200]}",
              file=sys.stderr)
    model.zero_grad()


def keep_freed_memory():
    """Let glibc keep large blocks that are freed, instead of taking new pages from the system at every step:
    5 % of a step on a CPU.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)    # M_MMAP_MAX: large blocks come from the heap
        libc.mallopt(-1, -1)   # M_TRIM_THRESHOLD: whose end is never given back
    except (AttributeError, OSError, TypeError):
        pass   # another C library, with habits of its own


def optimise(model, rule, loss_of, batches):
    """One step of the optimiser `rule` along the mean gradient of some (inputs, targets);
    return their mean loss and the gradient's norm, (2,).
    """
    losses = []
    for inputs, targets in batches:
        loss = loss_of(inputs, targets) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    if dist.is_initialized() and not shard:  # sharded gradients are averaged on their way back
        average_gradients(model.parameters())
    norm = gradient_clipping(model.parameters(), grad_clip or math.inf)
    rule.step()
    rule.zero_grad()
    return torch.stack([sum(losses), norm])


def evaluate(loss_of, tokens, parts, place):
    """The mean loss over eval_batches batches that lie evenly spread over the tokens: always the same ones."""
    starts = np.linspace(0, len(tokens) - context_length - 1, eval_batches * batch_size).astype(np.int64)
    # The gradient stays on, though nobody asks for it:
    # under no_grad torch.compile would compile the model a second time.
    losses = [loss_of(*windows(tokens, row[part], context_length, place)).detach()
              for row in starts.reshape(eval_batches, batch_size) for part in parts]
    return mean_over_processes(torch.stack(losses).mean()).item()


def gpu_peak(place):
    """FLOP/s of this GPU in dense bfloat16 products, against which MFU is counted whatever the data type;
    0 where that is not known.
    """
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else ""
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), 0)


def duration(seconds):
    """Minutes and seconds, as in 2:05."""
    minutes, seconds = divmod(max(0, int(seconds)), 60)
    return f"{minutes}:{seconds:02}"


def catch_signals():
    """A list that receives the first Ctrl-C or SIGTERM, for the loop to stop after its step;
    a second one ends the process at once.
    """
    caught = []

    def handle_both(handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def note(number, frame):
        caught.append(number)
        handle_both(signal.SIG_DFL)   # which ends it even while it waits for another process

    handle_both(note)
    return caught


def check_divergence(step, rate, loss, norm, val_loss, vocab_size):
    """Raise RuntimeError if the run diverged: a figure is not finite,
    or the loss is ten times that of a blind guess, log(vocab_size).
    """
    if not math.isfinite(loss + norm + (val_loss or 0)) or loss > 10 * math.log(vocab_size):
        checkpoint = Path(out_dir) / "ckpt.pt"
        raise RuntimeError(f"the run diverged by step {step:,}: "
                           f"training loss {loss:.4g}, gradient norm {norm:.4g}, lr {rate:.3g}"
                           + f"; {checkpoint} keeps the last good weights" * checkpoint.exists())


def report(step, left, seconds, rate, loss, norm, val_loss, pace, mfu_of_one):
    """Add a row to log.csv and print it as a line. val_loss: None between evaluations; left: seconds to the end.

    pace: seconds a step; mfu_of_one: MFU at 1 token/s.
    """
    tokens, speed = step * batch_size * context_length, batch_size * context_length / pace
    with open(Path(out_dir) / "log.csv", "a", encoding="utf-8") as file:
        file.write(f"{step},{tokens},{seconds:.2f},{rate:.6g},{loss:.6f},"
                   f"{'' if val_loss is None else f'{val_loss:.6f}'},{norm:.6f},{speed:.1f}\n")
    print(f"step {step:,} of {'about ' if max_minutes else ''}{step + left / pace:,.0f}: "
          f"loss {loss:.3f}{'' if val_loss is None else f', validation {val_loss:.3f}'}, "
          f"lr {rate:.1e}, norm {norm:.2f}, "
          f"{speed:,.0f} tokens/s{f' ({speed * mfu_of_one:.0%} MFU)' if mfu_of_one else ''}, "
          f"{duration(left)} left", flush=True)


def build(vocab_size, place, kind):
    """The model and its optimiser, as the constants want them, on a device."""
    torch.manual_seed(seed)
    model = TransformerLM(vocab_size, context_length, num_layers, d_model, num_heads, d_ff, rope_theta,
                          post_norm, rms_norm, rope, swiglu, tie_embeddings)
    with torch.no_grad():
        for layer in model.layers:
            layer.attn.output_proj.weight.mul_(residual_gain)
            layer.ffn.w2.weight.mul_(residual_gain)
    if shard:
        shard_model(model, place)
    model.to(place)
    hyper = parameter_groups(model), lr, (beta1, beta2), eps, weight_decay, fused
    return model, Muon(*hyper, kind) if optimizer == "muon" else AdamW(*hyper)


class Run:
    """A model in training, with all that a checkpoint must bring back
    for a resumed run to go on as if it had never stopped.
    """

    def __init__(self, config, train_tokens, val_tokens, vocab_size, check_sums, rank, processes):
        self.config, self.train_tokens, self.val_tokens, self.check_sums = config, train_tokens, val_tokens, check_sums
        self.place, self.kind = choose_device(int(os.environ.get("LOCAL_RANK", 0)))
        require(processes == 1 or self.place.type != "mps",
                "several processes cannot talk to each other on MPS: add --device=cpu, or go without torchrun")
        if processes > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.place.type == "cuda" else "gloo")
        self.share = batch_size // processes // grad_accum   # sequences that go through the model at once
        parts = range(rank * grad_accum, (rank + 1) * grad_accum)
        self.parts = [slice(i * self.share, (i + 1) * self.share) for i in parts]   # this process's rows of each batch
        check_memory(vocab_size, self.share, self.place)
        self.model, self.rule = build(vocab_size, self.place, self.kind)
        print(f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {len(train_tokens):,} training tokens; "
              f"{f'{processes} processes on ' * (processes > 1)}{self.place.type}, "
              f"{str(self.kind).removeprefix('torch.')}")
        self.checkpoint = Path(out_dir) / "ckpt.pt"
        # Steps and seconds so far;
        # loss and gradient norm, summed up over the `count` steps since the last row of the log.
        self.step, self.earlier, self.sums, self.count = 0, 0.0, torch.zeros(2, device=self.place), 0
        if resume and self.checkpoint.exists():
            self.restore()

    def restore(self):
        """Go back to where the checkpoint stands. Raises UsageError if it is of another run."""
        saved = read_checkpoint(self.checkpoint)
        require({"config", "data", "seconds", "sums", "count"} <= saved.keys(),
                f"--resume=True: {self.checkpoint} holds weights, but no run to continue")
        check_same_run(saved, self.config, self.check_sums)
        self.step, self.earlier = load_checkpoint(saved, self.model, self.rule), saved["seconds"]
        self.sums, self.count = saved["sums"].to(self.place), saved["count"]
        print(f"{self.checkpoint} stands at step {self.step:,}")

    def save(self):
        save_checkpoint(self.model, self.rule, self.step, self.checkpoint, config=self.config, data=self.check_sums,
                        seconds=self.clock(), sums=mean_over_processes(self.sums), count=self.count)

    def clock(self):
        """Seconds that the run has taken, those before a resumption included."""
        return self.earlier + time.perf_counter() - STARTED

    def loss_of(self, inputs, targets):
        """The model's loss on a part of a batch, with the matrix products in the chosen data type."""
        with torch.autocast(self.place.type, self.kind, enabled=self.kind != torch.float32):
            return self.model.loss(inputs, targets)

    def advance(self, rate):
        """Take one step at this learning rate."""
        self.step += 1
        for group in self.rule.param_groups:
            group["lr"] = rate * group["scale"]
        # Each part draws the starts of the whole batch again, from the same seed, and reads its own rows.
        batches = [get_batch(self.train_tokens, batch_size, context_length, self.place,
                             generator_of_step(seed, self.step), part)
                   for part in self.parts]
        self.sums += optimise(self.model, self.rule, self.loss_of, batches)
        self.count += 1

    def validate(self):
        """The loss on the validation tokens."""
        return evaluate(self.loss_of, self.val_tokens, self.parts, self.place)


def train(config, train_tokens, val_tokens, vocab_size, check_sums, rank, processes):
    """One run in out_dir, from step 0 or from its checkpoint to the end; return the exit status.
    Only the process of rank 0 writes.
    """
    keep_freed_memory()
    run = Run(config, train_tokens, val_tokens, vocab_size, check_sums, rank, processes)
    log, picture, peak = Path(out_dir) / "log.csv", Path(out_dir) / "curves.svg", gpu_peak(run.place) * processes
    # model FLOPs utilisation at one token a second, where it is known
    mfu_of_one = training_flops(run.model) / peak if peak else 0.0
    if rank == 0:
        prepare_folder(config, run.step)
    if compile:
        compile_model(run.model, run.loss_of, *windows(train_tokens, [0] * run.share, context_length, run.place))

    budget, horizon = 60 * max_minutes, steps   # seconds; the step at which the run ends
    if max_minutes:   # the end is rehearsed, to know how much of the time it takes; and Python takes a second to leave
        begin = run.clock()
        run.validate()
        run.save()
        budget -= largest(1.5 * (run.clock() - begin) + 1.5)[0]
        # one clock for all: their rates must be equal
        horizon = run.step * budget / largest(run.clock())[0] if run.step else math.inf
    if run.step >= horizon:
        print(f"{out_dir} has used up its {max_minutes:g} minutes already" if max_minutes
              else f"{out_dir} holds all of its {run.step:,} steps already")
        return 0

    caught, row_step, row_end, last, stop = catch_signals(), run.step, run.clock(), False, 0
    while not (last or stop):
        begin = run.clock()
        rate = get_lr_cosine_schedule(run.step + 1, lr, min_lr, warmup_steps, horizon)
        run.advance(rate)
        # when one more step would end; the signal that any process got
        next_end, stop = largest(2 * run.clock() - begin, *(caught or [0]))
        if max_minutes:   # the share of the steps that is done is that of the time: the rate falls with the clock
            horizon = max(run.step, run.step * budget / next_end)
        last = run.step >= horizon
        evaluating = last or run.step % eval_interval == 0
        due = evaluating or run.step % log_interval == 0 or run.step == 1
        if due or stop:
            # waits for the device, which other steps do not
            loss, norm = (mean_over_processes(run.sums) / run.count).tolist()
            seconds = run.clock()
            val_loss = run.validate() if evaluating else None
            check_divergence(run.step, rate, loss, norm, val_loss, vocab_size)
        if due:
            if rank == 0:
                pace = (seconds - row_end) / (run.step - row_step)
                left = (0 if last else budget - seconds) if max_minutes else pace * (steps - run.step)
                report(run.step, left, seconds, rate, loss, norm, val_loss, pace, mfu_of_one)
            run.sums.zero_()
            run.count = 0
        if evaluating or stop:
            run.save()
            if rank == 0:
                draw_curves({out_dir: read_log(log)}, picture)
        if due:
            row_step, row_end = run.step, run.clock()   # evaluations do not count into the speed
    if not last:
        print(f"stopped at step {run.step:,}; --resume=True goes on from there")
        return 128 + int(stop)
    print(f"{run.step * batch_size * context_length:,} tokens in {duration(run.clock())}: "
          f"validation loss {val_loss:.4f}, perplexity {perplexity(val_loss):.1f}; {picture} shows the way")
    return 0


def main():
    config = configure(globals())
    if compare:
        return compare_runs([Path(folder) for folder in compare.split(",") if folder])
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # set by torchrun
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    check_flags(processes)
    loaded = load_data()
    with only_run_in(out_dir) if rank == 0 else nullcontext():
        status = train(config, *loaded, rank, processes)
    if processes > 1:
        dist.barrier()   # nobody leaves while another still talks
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)   # gloo's threads have been seen to abort a process that shuts the interpreter down
    if status:
        sys.exit(status)


if __name__ == "__main__":
    with one_line_errors():
        main()
