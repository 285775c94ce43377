"""
The Transformer language model, with every building block written from raw tensor operations. As a script, it prints
what such a model costs.

    $ python model.py                                 # answers the handout's questions about GPT-2
    $ python model.py --d_model=768 --num_layers=12   # the same for another model: the constants below, with flags

It prints parameters, bytes, every matrix product of a forward pass with its FLOPs, AdamW's memory, and days of
training. Units are powers of ten: 1 GB is 1e9 bytes, 1 TFLOP is 1e12 floating-point operations. A multiply-add counts
as 2 operations. "The handout" is the first assignment of Stanford's CS336.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load ends the script without a traceback

import sys
from collections import Counter

import torch
from torch import nn

from bpe import configure, one_line_errors, require

# the model to account for; with no flag at all, the script shows GPT-2's sizes instead
vocab_size = 10000          # tokens in the vocabulary
context_length = 256        # tokens that the model sees at once
num_layers = 4              # Transformer blocks
d_model = 512               # width of the residual stream
num_heads = 16              # attention heads; must divide d_model
d_ff = 0                    # width of the feed-forward networks; 0: about 8/3 d_model, or 4 d_model with --swiglu=False
swiglu = True               # False: ungated feed-forward networks w2(silu(w1 x))
tie_embeddings = False      # one matrix for the token embeddings and the output head
# the training to account for
batch_size = 1024           # sequences per optimiser step
steps = 400000              # optimiser steps
memory_gb = 80.0            # the device's memory, GB
peak_tflops = 19.5          # the device's peak, TFLOP/s: an A100 in float32
mfu = 0.5                   # model FLOPs utilisation, the share of the peak that training reaches


# ------------------------------------------------------------------------------------------------------ building blocks
# In shapes, B is the batch size, T the length of the sequence, V the size of the vocabulary, N = num_layers,
# D = d_model, H = num_heads, d_k = D / H, F = d_ff; ... stands for any leading dimensions.

def truncated_normal(shape, std, device, dtype):
    """A parameter drawn from N(0, std^2), cut at 3 standard deviations."""
    weight = torch.empty(shape, device=device, dtype=dtype)
    return nn.Parameter(nn.init.trunc_normal_(weight, 0, std, -3 * std, 3 * std))


class Linear(nn.Module):
    """y = W x, without bias; x (..., in_features) -> (..., out_features).

    weight (out, in) starts as N(0, 2 / (in + out)), Glorot's variance, cut at 3 standard deviations.
    """

    def __init__(self, in_features, out_features, device=None, dtype=None):
        super().__init__()
        variance = 2 / (in_features + out_features)
        self.weight = truncated_normal((out_features, in_features), variance ** 0.5, device, dtype)

    def forward(self, x):
        return x @ self.weight.T


class Embedding(nn.Module):
    """weight[token_ids]: one row of weight (num_embeddings, embedding_dim) per id;
    token_ids (...) -> (..., embedding_dim). weight starts as N(0, 1), cut at 3.
    """

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__()
        self.weight = truncated_normal((num_embeddings, embedding_dim), 1, device, dtype)

    def forward(self, token_ids):
        # The rows weight[token_ids]. But on several cores, the gradient of indexing adds up numbers in an order that
        # changes from run to run, so a resumed run would not be exact; and it takes two to four times as long.
        return self.weight.index_select(0, token_ids.flatten()).view(*token_ids.shape, -1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32; (..., d_model) -> same
    (Zhang and Sennrich 2019, eq. 4).
    """

    def __init__(self, d_model, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x):
        wide = x.float()   # in bfloat16, a sum of many terms would lose the small ones
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def silu(x):
    """x * sigmoid(x), elementwise: a smooth ReLU (Elfwing et al. 2017)."""
    return x * torch.sigmoid(x)


class SwiGLU(nn.Module):
    """The gated feed-forward network w2(silu(w1 x) * w3 x); (..., d_model) -> same (Shazeer 2020, eq. 6).

    With gated=False, its ablation without the gate: w2(silu(w1 x)).
    """

    def __init__(self, d_model, d_ff, gated=True):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff), Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff) if gated else None

    def forward(self, x):
        gate = self.w3(x) if self.w3 else 1
        return self.w2(silu(self.w1(x)) * gate)


class RotaryPositionalEmbedding(nn.Module):
    """Turn each pair (a, b) = (x[2i], x[2i+1]) by the angle position * theta^(-2i / d_k), to
    (a cos - b sin, b cos + a sin). Of the two positions, only their distance then counts in the score q . k.

    x (..., T, d_k) and token_positions (..., T) -> (..., T, d_k); Su et al. 2021, eq. 15 and 34.
    Raises ValueError for an odd d_k.
    """

    def __init__(self, theta, d_k, max_seq_len):
        super().__init__()
        require(d_k % 2 == 0, f"RoPE turns pairs, so d_model / num_heads must be even, but it is {d_k}")
        # float64, because a float32 angle at position 16,384 would be off by 0.001 radians
        frequencies = theta ** -(torch.arange(0, d_k, 2).double() / d_k)     # (d_k / 2)
        angles = torch.outer(torch.arange(max_seq_len), frequencies)         # (max_seq_len, d_k / 2)
        self.register_buffer("cos_and_sin", torch.stack((angles.cos(), angles.sin())).float(), persistent=False)

    def forward(self, x, token_positions):
        cos, sin = self.cos_and_sin[:, token_positions]   # (..., T, d_k / 2)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)        # (..., T, d_k / 2)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def softmax(x, dim):
    """exp(x) / sum(exp(x)) along `dim`, in float32.

    Subtracting the maximum first keeps every exponential at most 1. The result is the same, because the maximum
    cancels. Its gradient cancels too, so detaching it is exact. (torch 2.13 compiles that gradient into NaN in bfloat16
    on the CPU.)
    """
    x = x.float()
    exponentials = (x - x.amax(dim, keepdim=True).detach()).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


def scaled_dot_product_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d_k)) v: for each query, the mean of the values, weighted by how well their keys match
    (Vaswani et al. 2017, eq. 1).

    q (..., T_q, d_k), k (..., T_k, d_k), v (..., T_k, d_v) -> (..., T_q, d_v). mask: boolean (..., T_q, T_k),
    True where a query may look; every query must see at least one key.
    """
    scores = q @ k.mT / q.size(-1) ** 0.5   # (..., T_q, T_k)
    if mask is not None:
        # The same as scores.masked_fill(~mask, -inf) of finite scores, but the sum compiles into faster loops:
        # attention takes a fifth less time on a CPU.
        scores = scores + torch.where(mask, 0.0, float("-inf"))
    return softmax(scores, -1).to(v.dtype) @ v


def causal_attention(q, k, v):
    """Attention in which no position sees a later one; q (..., T_q, d_k), k and v (..., T_k, d_k) -> (..., T_q, d_k).

    The queries stand at the last T_q of the T_k positions.
    """
    T_q, T_k = q.size(-2), k.size(-2)
    # the last T_q rows of a lower triangle; a single query sees every key
    mask = q.new_ones(T_q, T_k, dtype=torch.bool).tril(T_k - T_q) if T_q > 1 else None
    return scaled_dot_product_attention(q, k, v, mask)


def causal_attention_in_blocks(q, k, v):
    """causal_attention(q, k, v) for q, k, v of one length, (..., T, d_k), in less time.

    Each of four blocks of queries meets only the keys up to its own end. That is some 5/8 of the scores, in pieces
    small enough for a CPU's cache: under half the time at T = 256.
    """
    queries, keys, values = (x.chunk(4, -2) for x in (q, k, v))
    # Blocks are joined, because the gradient of slices k[..., :end, :] would compile into slower loops.
    return torch.cat([causal_attention(block, torch.cat(keys[:i], -2), torch.cat(values[:i], -2))
                      for i, block in enumerate(queries, 1)], -2)


class KVCache:
    """The keys and values of one layer so far. With them, a new token needs only its own projections and one row of
    scores, not those of the whole context. The memory for context_length positions is allocated at the first append.
    """

    def __init__(self, context_length):
        self.context_length, self.length = context_length, 0

    def append(self, k, v):
        """Add the newest positions, each (B, H, T_new, d_k); return all keys and values so far, (2, B, H, T, d_k)."""
        new = torch.stack((k, v))
        if not self.length:
            self.memory = new.new_empty(*new.shape[:-2], self.context_length, new.size(-1))
        end = self.length + k.size(-2)
        self.memory[..., self.length:end, :] = new
        self.length = end
        return self.memory[..., :end, :]


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention in num_heads subspaces of width d_k = d_model / num_heads; x (..., T, d_model) -> same
    (Vaswani et al. 2017, 3.2.2).

    rope: the shared RotaryPositionalEmbedding for queries and keys, or None.
    """

    def __init__(self, d_model, num_heads, rope=None):
        super().__init__()
        self.num_heads, self.rope = num_heads, rope
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (Linear(d_model, d_model) for _ in range(4))

    def forward(self, x, token_positions=None, cache=None):
        """token_positions (T) or (..., T): by default they go on from the cache's end.
        cache: the KVCache of this layer, to which the positions of x are added.
        """
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)   # (..., T, D) -> (..., H, T, d_k)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope:
            if token_positions is None:
                token_positions = torch.arange(x.size(-2), device=x.device) + (cache.length if cache else 0)
            q, k = self.rope(torch.stack((q, k)), token_positions[..., None, :])   # the same for every head
        # With a cache there may be more keys than queries, and blocks would not fit together.
        heads = causal_attention(q, *cache.append(k, v)) if cache else causal_attention_in_blocks(q, k, v)
        return self.output_proj(heads.transpose(-3, -2).flatten(-2))   # (..., H, T, d_k) -> (..., T, D)


class TransformerBlock(nn.Module):
    """x + f(norm(x)) with attention as f, then with the feed-forward network; (..., T, d_model) -> same.

    With post_norm, norm(x + f(x)) instead; without rms_norm, no norm.
    """

    def __init__(self, d_model, num_heads, d_ff, rope=None, post_norm=False, rms_norm=True, swiglu=True):
        super().__init__()
        self.post_norm = post_norm
        self.ln1, self.ln2 = (RMSNorm(d_model) if rms_norm else nn.Sequential()   # an empty one returns its input
                              for _ in range(2))
        self.attn = MultiHeadSelfAttention(d_model, num_heads, rope)
        self.ffn = SwiGLU(d_model, d_ff, swiglu)

    def forward(self, x, cache=None):
        if self.post_norm:
            x = self.ln1(x + self.attn(x, cache=cache))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), cache=cache)
        return x + self.ffn(self.ln2(x))


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] = log(sum(exp(logits))) - logits[target], in nats:
    logits (..., V), targets (...) -> scalar.
    """
    logits = logits.float()
    # The same as logits.gather(-1, targets[..., None]) for targets below V, but this comparison fuses with the sums,
    # while the gradient of gather takes a tenth of a training step.
    is_target = torch.arange(logits.size(-1), device=logits.device) == targets[..., None]   # (..., V)
    return (logits.logsumexp(-1) - torch.where(is_target, logits, 0).sum(-1)).mean()        # (...) -> scalar


def full_shape(V, T, N, D, H, F, gated):
    """The shape (V, T, N, D, H, F, gated) of a model, where T is its context_length, and F = 0 becomes the usual width.

    The usual width of a feed-forward network is 4 D without a gate. With one, it is the multiple of 64 nearest to
    8/3 D, so that its three matrices hold as much as the two without a gate.
    Raises UsageError, which is a ValueError, for a shape that no model can have.
    """
    F = F or (max(1, round(8 / 3 * D / 64)) * 64 if gated else 4 * D)
    require(min(V, T, N, D, H, F) > 0, f"vocab_size={V}, context_length={T}, num_layers={N}, d_model={D}, "
            f"num_heads={H}, d_ff={F}: each must be above 0")
    require(D % H == 0, f"d_model={D} cannot be split into num_heads={H}: choose a num_heads that divides it")
    return V, T, N, D, H, F, gated


class TransformerLM(nn.Module):
    """A decoder-only Transformer: token ids (B, T) -> logits of the next token (B, T, V).

    d_ff 0 means the usual width: see full_shape. The ablations: post_norm, rms_norm=False, rope=False (no positions at
    all), swiglu=False (no gate), tie_embeddings (one matrix for both ends).
    Raises ValueError for a shape that does not fit together and for more tokens than context_length.
    """

    def __init__(self, vocab_size, context_length, num_layers, d_model, num_heads, d_ff=0, rope_theta=10000.0,
                 post_norm=False, rms_norm=True, rope=True, swiglu=True, tie_embeddings=False):
        super().__init__()
        *_, d_ff, _ = full_shape(vocab_size, context_length, num_layers, d_model, num_heads, d_ff, swiglu)
        self.context_length = context_length
        rotary = RotaryPositionalEmbedding(rope_theta, d_model // num_heads, context_length) if rope else None
        self.token_embeddings = Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(TransformerBlock(d_model, num_heads, d_ff, rotary, post_norm, rms_norm, swiglu)
                                    for _ in range(num_layers))
        self.ln_final = RMSNorm(d_model) if rms_norm else nn.Sequential()
        self.lm_head = Linear(d_model, vocab_size)
        if tie_embeddings:
            # with the head's small deviation: a head drawn from N(0, 1) would start with huge logits
            self.token_embeddings.weight = self.lm_head.weight
        self.cross_entropy = cross_entropy   # compile_parts puts a compiled one here

    def new_cache(self):
        """An empty KVCache for each layer, to be passed to forward."""
        return [KVCache(self.context_length) for _ in self.layers]

    def forward(self, token_ids, cache=None):
        """Logits (B, T, V). With a cache (from new_cache), token_ids follow the ones that it has seen,
        and only the last position's logits (B, 1, V) return.
        """
        length = token_ids.size(-1) + (cache[0].length if cache else 0)
        require(length <= self.context_length,
                f"{length} tokens do not fit into the context of {self.context_length}")
        x = self.token_embeddings(token_ids)   # (B, T, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache and cache[i])   # None without a cache
        if cache:
            x = x[:, -1:]
        return self.lm_head(self.ln_final(x))

    def loss(self, token_ids, targets):
        """Mean cross-entropy (nats a token, scalar) of predicting `targets` from `token_ids`, both (B, T)."""
        return self.cross_entropy(self(token_ids), targets)

    def compile_parts(self):
        """Let torch.compile fuse each block, the last norm, the head and the cross-entropy, at their first call.

        All blocks share one compilation: four blocks take 31 s, where torch.compile(model.loss) takes 50 s
        and gives the same speed. Compiling the head lets torch round its sizes up for a GPU, whose fast products need
        multiples of 8: GPT-2 small, with a vocabulary of 50,257, trains 1.5 times as fast.
        """
        for part in (*self.layers, self.ln_final, self.lm_head):
            part.compile(dynamic=False)
        self.cross_entropy = torch.compile(cross_entropy, dynamic=False)


# -------------------------------------------------------------------------------------------------- resource accounting
# Handout, sections 3.6 (FLOPs) and 4.3 (AdamW), for a shape (V, T, N, D, H, F, gated): see full_shape.

GPT2 = [("small", 1024, 12, 768, 12), ("medium", 1024, 24, 1024, 16), ("large", 1024, 36, 1280, 20),
        ("XL", 1024, 48, 1600, 25), ("XL", 16384, 48, 1600, 25)]   # name, T, N, D, H; the last two differ in T alone
XL = 50257, 1024, 48, 1600, 25, 6400   # V, T, N, D, H, F = 4 D


def parameters(V, T, N, D, H, F, gated, tied=False):
    """The number of parameters by part, a Counter; tied embeddings count once, as token embeddings."""
    return Counter({"token embeddings": V * D, "projections": N * 4 * D * D, "FFN": N * (2 + gated) * D * F,
                    "RMSNorm": (2 * N + 1) * D, "LM head": 0 if tied else V * D})


def matrix_products(V, T, N, D, H, F, gated):
    """Yield every matrix product of a forward pass over one full context, as (part, name, times, m, k, n):
    `times` products (m, k) x (k, n).
    """
    for name in "q", "k", "v", "output":
        yield "projections", f"layers.*.attn.{name}_proj", N, T, D, D
    yield "attention core", "layers.*.attn q k^T", N * H, T, D // H, T
    yield "attention core", "layers.*.attn weights v", N * H, T, T, D // H
    yield "FFN", "layers.*.ffn.w1", N, T, D, F
    yield "FFN", "layers.*.ffn.w2", N, T, F, D
    if gated:
        yield "FFN", "layers.*.ffn.w3", N, T, D, F
    yield "LM head", "lm_head", 1, T, D, V


def forward_flops(*shape):
    """The FLOPs of a forward pass over one full context by part, a Counter: a product (m, k) x (k, n) has m n sums,
    each of k multiplications and k additions. All the rest is under 1 % in GPT-2 with its context of 1,024.

    Attention counts in full, T x T, as is usual for MFU, though causal_attention_in_blocks leaves some of it out.
    """
    flops = Counter()
    for part, _, times, m, k, n in matrix_products(*shape):
        flops[part] += 2 * times * m * k * n
    return flops


def print_model(shape, tied=False):
    """Print the parameters by part and the matrix products of a forward pass."""
    counts = parameters(*shape, tied)
    total = counts.total()
    print(f"{'parameters':<26}{'number':>15}{'share':>10}{'float32':>13}")
    for name, count in counts.items():
        if count:
            print(f"  {name:<24}{count:>15,}{count / total:>10.1%}{4 * count / 1e9:>10.3g} GB")
    print(f"  {'total':<24}{total:>15,}{1:>10.1%}{4 * total / 1e9:>10.3g} GB")

    total = forward_flops(*shape).total()
    print(f"\n{f'products of a forward pass over {shape[1]:,} tokens':<48}"
          f"{'(m, k) x (k, n)':>28}{'GFLOPs':>12}{'share':>9}")
    for _, name, times, m, k, n in matrix_products(*shape):
        product, flops = f"{times:,} of ({m}, {k}) x ({k}, {n})", 2 * times * m * k * n
        print(f"  {name:<28}{product:>46}{flops / 1e9:>12,.2f}{flops / total:>9.1%}")
    print(f"  {'total':<74}{total / 1e9:>12,.2f}{1:>9.1%}\n")


def print_family():
    """Print how parameters, FLOPs and the parts' shares of these change with size, context and gate, for GPT-2."""
    print("                             parameters                        projec-  attention             LM\n"
          "GPT-2 with d_ff = 4 d_model      untied           tied  TFLOPs   tions       core    FFN    head")
    total = 0
    for gated in True, False:
        for size, T, N, D, H in GPT2:
            shape = 50257, T, N, D, H, 4 * D, gated
            untied = parameters(*shape).total()
            flops = forward_flops(*shape)
            shorter, total = total, flops.total()
            projections, core, ffn, head = flops.values()
            print(f"  {size:<7}{'gated' if gated else 'ungated':<8}{T:>6,}{untied:>16,}{untied - 50257 * D:>15,}"
                  f"{total / 1e12:>8.4g}{projections / total:>8.1%}{core / total:>11.1%}{ffn / total:>7.1%}"
                  f"{head / total:>8.1%}")
        print(f"{'sixteen times the context:':>56}{total / shorter:>6.1f} x")
    print()


def print_training(shape, tied=False):
    """Print what training takes: AdamW's memory, the FLOPs of a step, and days."""
    V, T, N, D, H, F, gated = shape
    P = parameters(*shape, tied).total()
    # The numbers that the forward pass of one sequence keeps for the backward pass, by the handout's list. In a block,
    # for each token: 8 D for two norms, q, k, v, weighted values, output projection and w2; 4 F for w1, SiLU, w3 and
    # the gated product; 2 H T for scores and softmax. Then the last norm, the logits, and the cross-entropy.
    activations = T * (N * (8 * D + (2 + 2 * gated) * F + 2 * H * T) + D + 2 * V)
    largest_batch = (memory_gb * 1e9 - 16 * P) // (4 * activations)   # negative if not even the state fits
    step = 3 * forward_flops(*shape).total() * batch_size   # the backward pass has two products for each one
    speed = peak_tflops * 1e12 * mfu   # FLOP/s
    print(f"AdamW in float32, a batch of B sequences; {'gated' if gated else 'ungated'}, "
          f"{'tied' if tied else 'untied'}, N = {N} layers, D = {D:,}, F = {F:,},\n"
          f"H = {H} heads, T = {T:,} tokens, vocabulary V = {V:,}\n"
          f"  parameters   P = {'' if tied else '2 '}V D + N (4 D^2 + {2 + gated} D F + 2 D) + D = {P:,}\n"
          f"  state        16 P bytes: weights 4, gradients 4, two moments 8     {16 * P / 1e9:>15,.2f} GB\n"
          f"  activations  4 B (N (T (8 D + {2 + 2 * gated} F) + 2 H T^2) + T D + 2 T V) bytes   "
          f"{4 * activations / 1e9:>12,.2f} GB for B = 1\n"
          f"  largest batch in {memory_gb:g} GB: {max(0, largest_batch):,.0f}\n"
          f"  a step of {batch_size:,} sequences, backward twice the forward: {step / 1e12:,.2f} TFLOPs; "
          f"AdamW's own 14 P: {14 * P / 1e12:.3f}\n"
          f"  {steps:,} steps at {speed / 1e12:.4g} TFLOP/s: {steps * step / speed / 86400:,.0f} days")


def main():
    configure(globals())
    require(min(batch_size, steps, memory_gb, peak_tflops, peak_tflops * mfu) > 0,   # so mfu is, too
            f"--batch_size={batch_size}, --steps={steps}, --memory_gb={memory_gb}, --peak_tflops={peak_tflops}, "
            f"--mfu={mfu}: each must be above 0")
    if len(sys.argv) == 1:
        print("GPT-2 XL with a gated feed-forward network\n")
        print_model((*XL, True))
        print_family()
        return print_training((*XL, False))   # section 4.3 leaves out the gate
    shape = full_shape(vocab_size, context_length, num_layers, d_model, num_heads, d_ff, swiglu)
    print_model(shape, tie_embeddings)
    print_training(shape, tie_embeddings)


if __name__ == "__main__":
    with one_line_errors():
        main()
