"""
The Transformer language model, every building block written from raw tensor operations; run as a script, it prints
the resource accounting.

    $ python model.py                                 # the handout's questions, answered for GPT-2 small to XL
    $ python model.py --d_model=768 --num_layers=12   # the account of another model: the constants below, with flags

Parameters, bytes, every matrix product of a forward pass with its FLOPs, AdamW's memory, and days of training.
Units are powers of ten: 1 GB = 1e9 bytes, 1 TFLOP = 1e12 floating-point operations; a multiply-add is 2 of them.
"""
import re
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads ends the script without a traceback

import torch
from torch import nn

from bpe import configure, one_line_errors, require

# the model to account for, as soon as any flag is given; without one, GPT-2's sizes
vocab_size = 10000          # tokens in the vocabulary
context_length = 256        # tokens that the model sees at once
num_layers = 4              # Transformer blocks
d_model = 512               # width of the residual stream
num_heads = 16              # attention heads; they must divide d_model
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
# Shapes: B batch, T sequence, D d_model, H heads, d_k = D / H, V vocabulary; ... any leading dimensions.

def at_least_float32(x):
    """x in float32, or in float64 where it is that already:
    a sum of many terms, kept in bfloat16, would lose the small ones.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def truncated_normal(*shape, std, device=None, dtype=None):
    """A parameter drawn from N(0, std^2), cut at 3 standard deviations."""
    weight = torch.empty(shape, device=device, dtype=dtype)
    if not weight.is_meta:   # a tensor with a shape but no memory: there is nothing to draw
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
    return nn.Parameter(weight)


class Linear(nn.Module):
    """y = W x, without bias; x (..., in_features) -> (..., out_features).

    weight (out, in) starts as N(0, 2 / (in + out)), Glorot's variance.
    """

    def __init__(self, in_features, out_features, device=None, dtype=None):
        super().__init__()
        std = (2 / (in_features + out_features)) ** 0.5
        self.weight = truncated_normal(out_features, in_features, std=std, device=device, dtype=dtype)

    def forward(self, x):
        return x @ self.weight.T


class Embedding(nn.Module):
    """One row of `weight` (num_embeddings, embedding_dim) per token id; ids (...) -> (..., embedding_dim)."""

    def __init__(self, num_embeddings, embedding_dim, device=None, dtype=None):
        super().__init__()
        self.weight = truncated_normal(num_embeddings, embedding_dim, std=1, device=device, dtype=dtype)

    def forward(self, token_ids):
        # weight[token_ids] is the same, but the sum of its gradient runs on one core:
        # 8 ms of a training step at the handout's shape, against 1.
        return self.weight.index_select(0, token_ids.flatten()).view(*token_ids.shape, self.weight.size(1))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32; (..., d_model) -> same
    (Zhang and Sennrich 2019, eq. 4).
    """

    def __init__(self, d_model, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x):
        wide = at_least_float32(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def silu(x):
    """x * sigmoid(x), elementwise: a smooth ReLU (Elfwing et al. 2017)."""
    return x * torch.sigmoid(x)


class SwiGLU(nn.Module):
    """The gated feed-forward network w2(silu(w1 x) * w3 x); (..., d_model) -> same (Shazeer 2020, eq. 6)."""

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.w1, self.w2, self.w3 = Linear(d_model, d_ff), Linear(d_ff, d_model), Linear(d_model, d_ff)

    def forward(self, x):
        return self.w2(silu(self.w1(x)) * self.w3(x))


class SiLUFeedForward(nn.Module):
    """The ungated feed-forward network w2(silu(w1 x)), SwiGLU's ablation; (..., d_model) -> same."""

    def __init__(self, d_model, d_ff):
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff), Linear(d_ff, d_model)

    def forward(self, x):
        return self.w2(silu(self.w1(x)))


class RotaryPositionalEmbedding(nn.Module):
    """Turn each pair (x[2k], x[2k+1]) by the angle position * theta^(-2k / d_k):
    of the positions, only their distance then enters q . k.

    x (..., T, d_k) and token_positions (..., T) -> (..., T, d_k); Su et al. 2021, eq. 15 and 34.
    Raises ValueError for an odd d_k.
    """

    def __init__(self, theta, d_k, max_seq_len):
        super().__init__()
        if d_k % 2:
            raise ValueError(f"RoPE turns pairs: d_model / num_heads is {d_k}, but must be even")
        frequencies = theta ** -(torch.arange(0, d_k, 2).double() / d_k)                          # (d_k / 2)
        angles = torch.arange(max_seq_len).double()[:, None] * frequencies.repeat_interleave(2)   # (max_seq_len, d_k)
        # (a, b) -> (-b, a) in every pair
        quarter_turn = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * (d_k // 2))
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self.register_buffer("quarter_turn", quarter_turn, persistent=False)

    def forward(self, x, token_positions):
        cos, sin = self.cos[token_positions], self.sin[token_positions]   # (..., T, d_k)
        # A point (a, b) turned by an angle is cos * (a, b) + sin * (-b, a). The product with quarter_turn adds no
        # rounding, for each sum has one term, and runs on whole vectors; taking the pairs apart (x[..., 0::2] and
        # x[..., 1::2]) made compiled attention a tenth slower on a CPU.
        return (x * cos + x @ self.quarter_turn.to(x.dtype) * sin).to(x.dtype)


def softmax(x, dim):
    """exp(x) / sum(exp(x)) along `dim`; the maximum is subtracted first, so that no exponential overflows."""
    x = at_least_float32(x)
    # The maximum cancels, so its gradient is zero: detaching it is exact
    # (in bfloat16, torch 2.13 compiles that gradient into NaN on the CPU).
    exponentials = torch.exp(x - x.amax(dim, keepdim=True).detach())
    return exponentials / exponentials.sum(dim, keepdim=True)


def scaled_dot_product_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d_k)) v: each query's mean of the values, weighted by its likeness to the keys
    (Vaswani et al. 2017, eq. 1).

    q (..., T_q, d_k), k (..., T_k, d_k), v (..., T_k, d_v) -> (..., T_q, d_v). mask: boolean (..., T_q, T_k),
    True where a query may look; every query must see at least one key.
    """
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5   # (..., T_q, T_k)
    if mask is not None:
        # The sum compiles into faster loops than scores.masked_fill(~mask, float("-inf")):
        # attention takes a fifth less time on a CPU.
        scores = scores + torch.where(mask, 0.0, float("-inf"))
    return softmax(scores, -1).to(v.dtype) @ v


def causal_attention(q, k, v, blocks=4):
    """Attention in which query i sees the keys 0 to i, and none of its future; q, k, v (..., T, d_k) -> (..., T, d_k).

    The obvious version is one scaled_dot_product_attention under a triangular mask. Here each block of queries meets
    only the keys up to its own end: 5/8 of the scores, in pieces that fit the cache, take under half the time at
    T = 256 on a CPU.
    """
    size = (q.size(-2) + blocks - 1) // blocks   # queries in a block, rounded up
    queries, keys, values = (x.split(size, dim=-2) for x in (q, k, v))
    outputs = []
    for i, block in enumerate(queries):   # (..., T_block, d_k)
        # The gradient of slices k[..., :end, :] would compile into slower loops than these.
        seen_keys = torch.cat(keys[:i + 1], dim=-2)       # (..., T_seen, d_k)
        seen_values = torch.cat(values[:i + 1], dim=-2)
        # The block's first query stands at position i * size,
        # where the triangle's diagonal therefore begins: (T_block, T_seen).
        mask = torch.ones(block.size(-2), seen_keys.size(-2), dtype=torch.bool, device=q.device).tril(i * size)
        outputs.append(scaled_dot_product_attention(block, seen_keys, seen_values, mask))
    return torch.cat(outputs, dim=-2)


class KVCache:
    """The keys and values that one layer has computed so far, (B, H, T, d_k):
    a new token costs one position, not the whole context again.
    """

    def __init__(self, batch_size, num_heads, context_length, d_k, device=None, dtype=None):
        self.keys, self.values = (torch.empty(batch_size, num_heads, context_length, d_k, device=device, dtype=dtype)
                                  for _ in range(2))
        self.length = 0

    def append(self, k, v):
        """Add the newest positions, each (B, H, T_new, d_k); return all keys and values."""
        old, self.length = self.length, self.length + k.size(-2)
        self.keys[:, :, old:self.length], self.values[:, :, old:self.length] = k, v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]


def head_width(d_model, num_heads):
    """d_k, the width of one attention head. Raises ValueError if the heads do not divide d_model."""
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"d_model {d_model} cannot be split into {num_heads} heads: "
                         f"choose a num_heads that divides it")
    return d_model // num_heads


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention in num_heads subspaces of width d_k = d_model / num_heads; x (..., T, d_model) -> same
    (Vaswani et al. 2017, 3.2.2).

    rope: the shared RotaryPositionalEmbedding for queries and keys, or None.
    Raises ValueError if the heads do not divide d_model.
    """

    def __init__(self, d_model, num_heads, rope=None):
        super().__init__()
        self.num_heads, self.d_k, self.rope = num_heads, head_width(d_model, num_heads), rope
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (Linear(d_model, d_model) for _ in range(4))

    def forward(self, x, token_positions=None, cache=None):
        """token_positions: (T) or (..., T), counted from the cache's end by default.
        cache: the KVCache of this layer, which x's positions join.
        """
        past, T = cache.length if cache else 0, x.size(-2)
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, self.d_k))   # (..., T, D) -> (..., T, H, d_k)
                   .transpose(-3, -2)                                  # -> (..., H, T, d_k)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is not None:
            if token_positions is None:
                token_positions = torch.arange(past, past + T, device=x.device)
            token_positions = token_positions[..., None, :]   # the same for every head
            q, k = self.rope(q, token_positions), self.rope(k, token_positions)
        if cache:
            # a single new query sees every key
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) if T > 1 else None
            heads = scaled_dot_product_attention(q, *cache.append(k, v), mask)
        else:
            heads = causal_attention(q, k, v)   # (..., H, T, d_k)
        return self.output_proj(heads.transpose(-3, -2).flatten(-2))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); (..., T, d_model) -> same.

    With post_norm, norm(x + f(x)) instead; without rms_norm, no norm.
    """

    def __init__(self, d_model, num_heads, d_ff, rope=None, post_norm=False, rms_norm=True, swiglu=True):
        super().__init__()
        self.post_norm = post_norm
        self.ln1, self.ln2 = (RMSNorm(d_model) if rms_norm else nn.Sequential()   # an empty one gives back its input
                              for _ in range(2))
        self.attn = MultiHeadSelfAttention(d_model, num_heads, rope)
        self.ffn = (SwiGLU if swiglu else SiLUFeedForward)(d_model, d_ff)

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
    logits = at_least_float32(logits)
    # neither overflow at large logits nor log(0) at small ones
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    # The target's logit is picked by a comparison that fuses with the sums;
    # shifted.gather would spend a tenth of a training step on its gradient.
    is_target = torch.arange(logits.size(-1), device=logits.device) == targets[..., None]   # (..., V)
    of_target = torch.where(is_target, shifted, 0).sum(-1)                                  # (...)
    return (shifted.exp().sum(-1).log() - of_target).mean()


def default_d_ff(d_model, swiglu=True):
    """The usual width of the feed-forward network:
    with a gate the multiple of 64 nearest to 8/3 d_model, without one 4 d_model.
    """
    return max(1, round(8 / 3 * d_model / 64)) * 64 if swiglu else 4 * d_model


class TransformerLM(nn.Module):
    """A decoder-only Transformer: token ids (B, T) -> logits of the next token (B, T, V).

    d_ff 0 or None is default_d_ff. The ablations: post_norm, rms_norm=False, rope=False (no positions at all),
    swiglu=False (ungated), tie_embeddings (one matrix for both ends).
    Raises ValueError for a shape that does not fit together and for more tokens than context_length.
    """

    def __init__(self, vocab_size, context_length, num_layers, d_model, num_heads, d_ff=None, rope_theta=10000.0,
                 post_norm=False, rms_norm=True, rope=True, swiglu=True, tie_embeddings=False):
        super().__init__()
        shape = dict(vocab_size=vocab_size, context_length=context_length, num_layers=num_layers,
                     d_model=d_model, num_heads=num_heads)
        for name, size in shape.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, but must be at least 1")
        self.context_length = context_length
        rotary = RotaryPositionalEmbedding(rope_theta, head_width(d_model, num_heads), context_length) if rope else None
        self.token_embeddings = Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(TransformerBlock(d_model, num_heads, d_ff or default_d_ff(d_model, swiglu), rotary,
                                                     post_norm, rms_norm, swiglu)
                                    for _ in range(num_layers))
        self.ln_final = RMSNorm(d_model) if rms_norm else nn.Sequential()
        self.lm_head = Linear(d_model, vocab_size)
        if tie_embeddings:
            # with the head's small deviation: an N(0, 1) head would start with huge logits
            self.token_embeddings.weight = self.lm_head.weight

    def new_cache(self, batch_size=1):
        """An empty KVCache for each layer, to be passed to forward."""
        weight, attn = self.token_embeddings.weight, self.layers[0].attn
        return [KVCache(batch_size, attn.num_heads, self.context_length, attn.d_k, weight.device, weight.dtype)
                for _ in self.layers]

    def hidden_states(self, token_ids, cache=None):
        """The residual stream after the last block, (B, T, D)."""
        length = token_ids.size(-1) + (cache[0].length if cache else 0)
        if length > self.context_length:
            raise ValueError(f"{length} tokens do not fit into the context of {self.context_length}")
        x = self.token_embeddings(token_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache=cache[i] if cache else None)
        return x

    def forward(self, token_ids, cache=None):
        """Logits (B, T, V).

        With a cache (from new_cache), token_ids follow the ones it has seen,
        and only the last position's logits (B, 1, V) return.
        """
        x = self.hidden_states(token_ids, cache)
        return self.lm_head(self.ln_final(x if cache is None else x[:, -1:]))

    def head_loss(self, x, targets):
        """Mean cross-entropy of the logits that follow from hidden states x (B, T, D):
        a function of its own, so that torch.compile can fuse it alone.
        """
        return cross_entropy(self.lm_head(self.ln_final(x)), targets)

    def loss(self, token_ids, targets):
        """Mean cross-entropy (nats a token, scalar) of predicting `targets` from `token_ids`, both (B, T)."""
        return self.head_loss(self.hidden_states(token_ids), targets)

    def compile_parts(self):
        """From their next call on, run each block, and the head with its loss, as code that torch.compile has fused.

        All blocks share one compilation, so four of them take 31 s rather than the 50 s of torch.compile(model.loss),
        and run as fast.
        """
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.head_loss = torch.compile(self.head_loss, dynamic=False)


# -------------------------------------------------------------------------------------------------- resource accounting
# Counted on models of the "meta" device, whose tensors have shapes but no memory.
# Handout, sections 3.6 (FLOPs) and 4.3 (AdamW).

# The first mark that occurs in a parameter's name tells the part: "_proj" stands before "attn", in which q_proj lies.
COMPONENTS = {"token embeddings": "token_embeddings", "projections": "_proj", "attention core": "attn",
              "FFN": "ffn", "RMSNorm": "ln", "LM head": "lm_head"}
GPT2 = {"small": (12, 768, 12), "medium": (24, 1024, 16),   # layers, d_model, heads
        "large": (36, 1280, 20), "XL": (48, 1600, 25)}
GB, GFLOP, TFLOP, DAY = 1e9, 1e9, 1e12, 24 * 60 * 60


def meta_model(*shape, **switches):
    """A TransformerLM without memory or values, to count on.

    It goes without RoPE, which has neither parameters nor matrix products,
    and whose arithmetic on this device would load more of torch for a second.
    """
    with torch.device("meta"):
        return TransformerLM(*shape, rope=False, **switches)


def gpt2(size, context_length=1024, **switches):
    """A GPT-2 of one of the four sizes, in the handout's form: vocabulary 50,257, d_ff = 4 d_model, RMSNorm."""
    num_layers, d_model, num_heads = GPT2[size]
    return meta_model(50257, context_length, num_layers, d_model, num_heads, 4 * d_model, **switches)


def component(name):
    """The part of the model to which a parameter or product belongs, by its name in the state_dict."""
    return next(part for part, mark in COMPONENTS.items() if mark in name)


def parameters(model):
    """The number of parameters of each component, a dict; tied embeddings count once, as token embeddings."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component(name)] += parameter.numel()
    return counts


def matrix_products(model):
    """Every matrix product of a forward pass over one full context:
    {name: (times, m, k, n)}, that is, `times` products (m, k) x (k, n).

    Read off the model's modules: a Linear is one product, attention is two for each head.
    The layers are added up, as layers.*.
    """
    T, products = model.context_length, {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            d_out, d_in = module.weight.shape
            found = {name: (1, T, d_in, d_out)}
        elif isinstance(module, MultiHeadSelfAttention):
            heads, d_k = module.num_heads, module.d_k
            found = {name + " q k^T": (heads, T, d_k, T), name + " weights v": (heads, T, T, d_k)}
        else:
            continue
        for key, (times, *shape) in found.items():
            key = re.sub(r"\.\d+\.", ".*.", key)
            products[key] = (products.get(key, (0,))[0] + times, *shape)
    return dict(sorted(products.items(), key=lambda item: [*COMPONENTS].index(component(item[0]))))


def flops(times, m, k, n):
    """Floating-point operations of `times` products (m, k) x (k, n):
    each of the m n sums takes k multiplications and k additions.
    """
    return 2 * times * m * k * n


def forward_flops(model):
    """The FLOPs of each component in a forward pass over one full context, a dict.

    Only matrix products count; the rest is under 1 % in GPT-2.
    """
    counts = {}
    for name, product in matrix_products(model).items():
        counts[component(name)] = counts.get(component(name), 0) + flops(*product)
    return counts


def training_flops(model):
    """FLOPs of the forward and backward pass for one token of a full context:
    the backward pass has two products for each of the forward's.

    Attention counts in full, T x T, as MFU is usually reported, though causal_attention leaves some of it out.
    """
    return 3 * sum(forward_flops(model).values()) / model.context_length


def activations(model):
    """How many numbers AdamW training keeps for the backward pass of one sequence, by the handout's list.

    These are the results of every matrix product, softmax, SiLU, gate and RMSNorm, and of the cross-entropy.
    """
    results = {name: times * m * n for name, (times, m, k, n) in matrix_products(model).items()}
    followed = sum(size for name, size in results.items()
                   if name.endswith(("q k^T", "w1", "w3", "lm_head")))   # by a softmax, SiLU, gate, cross-entropy
    norms = sum(isinstance(module, RMSNorm) for module in model.modules())
    return sum(results.values()) + followed + norms * model.context_length * model.token_embeddings.weight.size(1)


def adamw_memory(model, batch_size):
    """The bytes of training in float32 with AdamW, by what they hold, a dict.

    Attention that keeps no T x T scores needs less than this.
    """
    P = sum(parameters(model).values())
    return {"weights": 4 * P, "gradients": 4 * P, "moments": 2 * 4 * P,
            "activations": 4 * batch_size * activations(model)}


def largest_batch(model, memory):
    """How many sequences fit into `memory` bytes; 0 or less: none."""
    return int((memory - sum(adamw_memory(model, 0).values())) // adamw_memory(model, 1)["activations"])


def training_days(model, steps, batch_size, flops_per_second):
    """Days of training for `steps` steps of batch_size full contexts,
    on a device that does so many useful FLOPs a second.
    """
    return steps * batch_size * model.context_length * training_flops(model) / flops_per_second / DAY


def print_model(model):
    """Print a model's parameters by component and the matrix products of its forward pass."""
    counts = parameters(model)
    total = sum(counts.values())
    print(f"{'parameters':<26}{'number':>15}{'share':>10}{'float32':>13}")
    for name, count in counts.items():
        if count:
            print(f"  {name:<24}{count:>15,}{count / total:>10.1%}{4 * count / GB:>10.3g} GB")
    print(f"  {'total':<24}{total:>15,}{1:>10.1%}{4 * total / GB:>10.3g} GB\n")

    products = matrix_products(model)
    total = sum(flops(*product) for product in products.values())
    print(f"{f'products of a forward pass over {model.context_length:,} tokens':<48}"
          f"{'(m, k) x (k, n)':>28}{'GFLOPs':>12}{'share':>9}")
    for name, (times, m, k, n) in products.items():
        shape = f"{times:,} of ({m}, {k}) x ({k}, {n})"
        print(f"  {name:<28}{shape:>46}{flops(times, m, k, n) / GFLOP:>12,.2f}{flops(times, m, k, n) / total:>9.1%}")
    print(f"  {'total':<74}{total / GFLOP:>12,.2f}{1:>9.1%}")


def print_family():
    """Print how parameters, FLOPs and their shares change with size, context, gate and tied embeddings, for GPT-2."""
    print("                             parameters                        projec-  attention             LM\n"
          "GPT-2 with d_ff = 4 d_model      untied           tied  TFLOPs   tions       core    FFN    head")
    for swiglu in (True, False):
        totals = {}
        for size, context in [(size, 1024) for size in GPT2] + [("XL", 16384)]:
            untied, tied = (gpt2(size, context, swiglu=swiglu, tie_embeddings=tie) for tie in (False, True))
            spent = forward_flops(untied)
            total = totals[size, context] = sum(spent.values())
            shares = [spent[part] / total for part in ("projections", "attention core", "FFN", "LM head")]
            print(f"  {size:<7}{'gated' if swiglu else 'ungated':<8}{context:>6,}"
                  f"{sum(parameters(untied).values()):>16,}{sum(parameters(tied).values()):>15,}{total / TFLOP:>8.4g}"
                  + "{:>8.1%}{:>11.1%}{:>7.1%}{:>8.1%}".format(*shares))
        print(f"{'sixteen times the context:':>56}{totals['XL', 16384] / totals['XL', 1024]:>6.1f} x")


def print_training(model, batch_size, steps, memory, flops_per_second):
    """Print what training a model takes: AdamW's memory, the FLOPs of a step, and days."""
    layers, gated = len(model.layers), isinstance(model.layers[0].ffn, SwiGLU)
    tied = model.lm_head.weight is model.token_embeddings.weight
    (V, D), F = model.token_embeddings.weight.shape, model.layers[0].ffn.w1.weight.size(0)
    total, state = sum(parameters(model).values()), sum(adamw_memory(model, 0).values())
    each = adamw_memory(model, 1)["activations"]
    step = training_flops(model) * model.context_length * batch_size
    print(f"AdamW in float32, a batch of B sequences; {'gated' if gated else 'ungated'}, "
          f"{'tied' if tied else 'untied'}, N = {layers} layers, D = {D:,}, F = {F:,},")
    print(f"H = {model.layers[0].attn.num_heads} heads, T = {model.context_length:,} tokens, vocabulary V = {V:,}")
    print(f"  parameters   P = {'' if tied else '2 '}V D + N (4 D^2 + {3 if gated else 2} D F + 2 D) + D = {total:,}")
    print(f"  state        16 P bytes: weights 4, gradients 4, two moments 8     {state / GB:>15,.2f} GB")
    print(f"  activations  4 B (N (T (8 D + {4 if gated else 2} F) + 2 H T^2) + T D + 2 T V) bytes   "
          f"{each / GB:>12,.2f} GB for B = 1")
    print(f"  largest batch in {memory / GB:g} GB: {max(0, largest_batch(model, memory)):,}")
    print(f"  a step of {batch_size:,} sequences, backward twice the forward: {step / TFLOP:,.2f} TFLOPs; "
          f"AdamW's own 14 P: {14 * total / TFLOP:.3f}")
    print(f"  {steps:,} steps at {flops_per_second / TFLOP:.4g} TFLOP/s: "
          f"{training_days(model, steps, batch_size, flops_per_second):,.0f} days")


def main():
    configure(globals())
    for name in ("batch_size", "steps", "memory_gb", "peak_tflops", "mfu"):
        require(globals()[name] > 0, f"--{name}={globals()[name]}: must be above 0")
    training = batch_size, steps, memory_gb * GB, peak_tflops * TFLOP * mfu
    if len(sys.argv) > 1:
        model = meta_model(vocab_size, context_length, num_layers, d_model, num_heads, d_ff,
                           swiglu=swiglu, tie_embeddings=tie_embeddings)
        print_model(model)
        print()
        print_training(model, *training)
    else:
        print("GPT-2 XL with a gated feed-forward network\n")
        print_model(gpt2("XL"))
        print()
        print_family()
        print()
        print_training(gpt2("XL", swiglu=False), *training)


if __name__ == "__main__":
    with one_line_errors():
        main()
