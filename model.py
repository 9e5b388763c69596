"""Llama in plain PyTorch: definition, Hugging Face weights in and out, chunked loss, generation.

    model = Llama.from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    logits, _ = model(tokens)                      # [B, T] -> [B, T, V]
    _, loss = model(tokens, targets)               # scalar; the [B, T, V] logits never exist
    new_ids = model.generate([[1, 15043]], 64)     # new_ids[0][0] is a list of ids

Projections that read the same input are one matrix here (q, k, v; gate, up), so that the input is
read once; they are split again only in files. Every dtype is written out, there is no autocast: each
projection casts its weight to the dtype of its input, so fp32 master weights compute in bf16 when
the model's `compute_dtype` says so. Norms, rotary angles and the loss are computed in fp32 at least.
"""
import contextlib
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama.attention import KVCache, causal_attention, document_attention, document_positions
from runtime import read_object

IGNORE = -100  # a target with this value is not predicted

# our matrix -> the published projections it holds, in row order
GROUPS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",),
          "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# by selective activation checkpointing
KEPT_PRODUCTS = {"aten.mm.default", "aten.addmm.default", "lora.matmul_add.default", "lora.matmul.default"}
PROJECTIONS = tuple(name for group in GROUPS.values() for name in group)


@dataclass
class LlamaConfig:
    """Shape of a Llama, under the names of its config.json."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # None, or the llama3 form: factor, low/high_freq_factor, original_max_...
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2  # Llama-3 chat models list several

    @classmethod
    def from_json(cls, folder):
        """Read FOLDER/config.json as transformers 4 or 5 write it.

        Raises FileNotFoundError without the file, ValueError for anything this model does not compute."""
        path = Path(folder) / "config.json"
        hf = read_object(path, "a model folder holds config.json and *.safetensors")
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", hf.get("rope_theta", 10000.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        for what, found, allowed in (("model_type", hf.get("model_type"), ("llama",)),
                                     ("hidden_act", hf.get("hidden_act", "silu"), ("silu",)),
                                     ("attention_bias", hf.get("attention_bias", False), (False,)),
                                     ("mlp_bias", hf.get("mlp_bias", False), (False,)),
                                     ("rope_type", kind, ("default", "llama3"))):
            if found not in allowed:
                raise ValueError(f"{path}: {what} is {found!r}; this model computes only {allowed[0]!r}")
        if kind == "llama3" and (absent := {"factor", "low_freq_factor", "high_freq_factor",
                                            "original_max_position_embeddings"} - rope.keys()):
            raise ValueError(f"{path}: rope_type llama3 without {', '.join(sorted(absent))}")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if key not in hf]
        if missing:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        known = {k: hf[k] for k in cls.__dataclass_fields__ if k in hf and hf[k] is not None}
        known.setdefault("num_key_value_heads", hf["num_attention_heads"])
        known.setdefault("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
        known.update(rope_theta=float(theta), rope_scaling=rope if kind == "llama3" else None)
        return cls(**known)

    def to_json(self, dtype):
        """The dict that transformers reads as LlamaConfig."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, "torch_dtype": str(dtype).removeprefix("torch."),
                **self.__dict__}

    @property
    def projection_shapes(self):
        """Published projection -> (rows, columns) of its weight."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * h, self.num_key_value_heads * h
        return {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q),
                "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}


# ----------------------------------------------------------------------------- elementwise pieces
# Written as autograd functions: eager PyTorch would keep several full-size fp32 intermediates of
# each for backward; these keep their input. torch.compile traces through them and fuses them.

def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(torch.autograd.Function):
    """y = w * (x / rms(x)); x [..., D], w [D]. The normalised x is rounded to x's dtype before w."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(at_least_fp32(x), x.shape[-1:], eps=eps).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x32, dy32 = at_least_fp32(x), at_least_fp32(dy)
        rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + ctx.eps)
        xhat = x32 * rstd
        dw = (dy32 * xhat).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dxhat = dy32 * weight
        dx = rstd * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))
        return dx.to(x.dtype), dw, None


class Rotary(torch.autograd.Function):
    """Rotate the pairs (x[i], x[i + hd/2]) by the angle of each position; x [B, T, heads, hd], cos and sin of `tables`."""

    @staticmethod
    def tables(angles):
        """angles [..., hd/2] -> cos and sin [..., hd]: of both halves, signed as the rotation needs them."""
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    @staticmethod
    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.addcmul(x * cos, torch.cat((b, a), -1), sin).to(x.dtype)

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotary.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return Rotary.rotate(dy, cos, -sin), None, None


class SwiGLU(torch.autograd.Function):
    """h = silu(gate) * up, for gate and up side by side in gu [..., 2F]; keeps gu, not silu(gate) nor h."""

    @staticmethod
    def forward(ctx, gu):
        ctx.save_for_backward(gu)
        gate, up = gu.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors[0].chunk(2, -1)
        gate32, dh32 = at_least_fp32(gate), at_least_fp32(dh)
        s = torch.sigmoid(gate32)
        silu = gate32 * s
        dgate = dh32 * up * (s + silu * (1 - s))
        return torch.cat((dgate.to(gate.dtype), (dh32 * silu).to(gate.dtype)), -1)


def rotary_frequencies(config, dtype=torch.float32):
    """Angle per position of each pair, [hd/2], with Llama-3's stretching of the slow ones."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(dtype) / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    if not (s := config.rope_scaling):
        return freq
    # transformers modeling_rope_utils (llama3): waves longer than the old context / low are slowed by
    # `factor`, those shorter than the old context / high are kept, in between is a linear blend.
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freq / s["factor"] + keep * freq


# ----------------------------------------------------------------------------- the network
class Projection(nn.Module):
    """Matrices that read the same input, stacked: parts {"q_proj": rows, ...}, x [..., K] -> [..., N]."""
    packed = None  # see Llama.packed_weights

    def __init__(self, in_features, parts):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))

    def forward(self, x):
        return linear(x, self.weight, self.packed)


def linear(x, weight, packed=None):
    """x weight^T for x [..., K]; by `packed`, the weight in oneDNN's own order, if that is given."""
    if packed is not None:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return F.linear(x, weight.to(x.dtype))


def projection(config, group):
    shapes = config.projection_shapes
    return Projection(shapes[GROUPS[group][0]][1], {name: shapes[name][0] for name in GROUPS[group]})


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eps, self.weight = config.rms_norm_eps, nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x):
        return RMSNorm.apply(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.dropout = 0.0  # of probabilities, in training
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj, self.o_proj = projection(config, "qkv_proj"), projection(config, "o_proj")

    def forward(self, x, cos, sin, docs, cache):
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 2)
        q, k = Rotary.apply(qk, cos, sin).split((self.heads, self.kv_heads), 2)
        if cache is not None and cache.decoding:
            out = cache.attend(self.layer, q, k, v)
        else:
            if cache is not None:
                cache.prefill(self.layer, k, v)
            dropout = self.dropout if self.training else 0.0
            out = causal_attention(q, k, v, dropout) if docs is None else document_attention(q, k, v, docs, dropout)
        return self.o_proj(out.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj, self.down_proj = projection(config, "gate_up_proj"), projection(config, "down_proj")

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm, self.self_attn = Norm(config), Attention(config, layer)
        self.post_attention_layernorm, self.mlp = Norm(config), MLP(config)

    def forward(self, x, cos, sin, docs=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, docs, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross-entropy(h @ weight.T, targets): h [n, D], weight [V, D], targets [n] -> scalar.

    Gradients are made in the forward pass, a chunk of rows at a time, and the logits of a chunk are
    overwritten by their gradient: nothing of size [n, V] exists. The weight's gradient is summed in
    fp32 over the chunks, and not computed at all when the head is frozen."""
    chunk_bytes = 2 ** 27  # of the logits of one GEMM, and of their softmax in fp32
    piece_bytes = 2 ** 23  # of one softmax on a CPU: what its cache holds

    @staticmethod
    def forward(ctx, h, weight, targets):
        want_dh, want_dw, _ = ctx.needs_input_grad
        w, vocab = weight.to(h.dtype), weight.shape[0]
        dh = torch.empty_like(h) if want_dh else None
        dw = torch.zeros_like(weight, dtype=torch.promote_types(h.dtype, torch.float32)) if want_dw else None
        total = torch.zeros((), device=h.device, dtype=torch.promote_types(h.dtype, torch.float32))
        rows = max(1, ChunkedCrossEntropy.chunk_bytes // (vocab * h.itemsize))
        size = ChunkedCrossEntropy.piece_bytes if h.device.type == "cpu" else ChunkedCrossEntropy.chunk_bytes
        piece = max(1, size // (vocab * total.itemsize))
        for start in range(0, h.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = h[chunk] @ w.T
            for z, t in zip(logits.split(piece), targets[chunk].split(piece)):
                logp = torch.log_softmax(z, -1, dtype=total.dtype)
                total -= logp.gather(1, t[:, None]).sum()
                if want_dh or want_dw:
                    dz = logp.exp_()
                    dz[torch.arange(len(t), device=t.device), t] -= 1
                    z.copy_(dz)
            if want_dh:
                torch.mm(logits, w, out=dh[chunk])
            if want_dw:
                dw += logits.T @ h[chunk]
        ctx.grads = dh, dw.to(weight.dtype) if want_dw else None
        return total

    @staticmethod
    def backward(ctx, dloss):
        dh, dw = ctx.grads
        ctx.grads = None  # a second backward through the loss is not possible: say so by failing
        return (None if dh is None else dh.mul_(dloss)), (None if dw is None else dw.mul_(dloss)), None


def sample_ids(logits, temperature, top_p, uniform):
    """One id a row: logits [B, V], uniform [B] fp64 in [0, 1) -> [B]; greedy at temperature 0.

    Inverse CDF over the smallest set of likeliest tokens whose share reaches top_p."""
    if temperature == 0:
        return logits.max(-1).indices  # argmax takes twice as long for bf16 on a CPU
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p >= 1:
        return inverse_cdf(probs, 1.0, uniform)
    # sorting a whole vocabulary is slow and hardly ever needed; which rows need it does not depend on the others
    vocab, rows = probs.shape[1], torch.arange(len(probs), device=probs.device)
    ids = torch.empty_like(rows)
    for count in (256, 8192, vocab):
        p, order = (probs if len(rows) == len(probs) else probs[rows]).topk(min(count, vocab), -1)
        enough = (p.double().sum(-1) >= top_p) | (count >= vocab)
        drawn = inverse_cdf(p[enough], top_p, uniform[rows[enough]])
        ids[rows[enough]] = order[enough].gather(1, drawn[:, None])[:, 0]
        rows = rows[~enough]
        if not len(rows):
            break
    return ids


def inverse_cdf(probs, top_p, uniform):
    """Column of probs [B, n] where the running share of the first columns that reach top_p passes uniform [B]."""
    share = probs.double().cumsum(-1)
    last = (share < top_p).sum(-1, keepdim=True).clamp(max=probs.shape[1] - 1) if top_p < 1 else probs.shape[1] - 1
    kept = share.gather(1, last) if top_p < 1 else share[:, -1:]
    return (share <= uniform[:, None] * kept).sum(-1).clamp(max=probs.shape[1] - 1)


def local_part(p):
    """(tensor, first row) that this rank holds of a parameter: all of it, or under FSDP a chunk of rows."""
    if not hasattr(p, "to_local"):
        return p, 0
    shards = p.device_mesh.ndim - 1
    chunk = -(-len(p) // p.device_mesh.size(shards))
    return p.to_local(), min(len(p), chunk * p.device_mesh.get_local_rank(shards))


@torch.no_grad()
def fill(p, full):
    """Set a parameter to the tensor `full`, of which each rank takes what it holds."""
    mine, first = local_part(p)
    mine.copy_(full[first:first + len(mine)])


def full_tensor(p):
    """The whole of a parameter or gradient, detached; under FSDP it is gathered, which all ranks must take part in."""
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def keep_products(ctx, operator, *args, **kwargs):
    """Policy of selective activation checkpointing: big products are kept for backward, all else is done again."""
    return CheckpointPolicy.MUST_SAVE if str(operator) in KEPT_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class Llama(nn.Module):
    """The network; see the head of this file for use. `compute_dtype` is the dtype of activations."""
    packed = None  # the head's, see packed_weights

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype = self.embed_tokens.weight.dtype
        self.activation_checkpointing = "none"  # block: keep only the input of each | selective: and its big products

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def init_weights(self, seed=0):
        """Fresh weights for pretraining: N(0, initializer_range), norms 1, outputs of blocks scaled as GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            full = torch.ones(p.shape, dtype=p.dtype)  # drawn whole on the CPU: the same for any device and sharding
            if p.dim() > 1:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                full.normal_(0, std / math.sqrt(2 * len(self.layers)) if deep else std, generator=generator)
            fill(p, full)
        return self

    def hidden(self, tokens, docs=None, cache=None, start=None):
        """Last hidden states [B, T, D], before the final norm. `start` [B]: position of each row's first token."""
        B, T = tokens.shape
        if cache is None and T > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {T} tokens is longer than the model's "
                             f"max_position_embeddings={self.config.max_position_embeddings}")
        if docs is not None:
            positions = document_positions(docs, B * T).view(B, T)
            torch._dynamo.maybe_mark_dynamic(docs, 0)  # or every new number of documents would compile again
        else:
            positions = torch.arange(T, device=tokens.device)[None] + (0 if start is None else start[:, None])
        angle_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        freq = rotary_frequencies(self.config, angle_dtype).to(tokens.device)
        angles = (positions[..., None].to(angle_dtype) * freq)[:, :, None]  # [B or 1, T, 1, hd/2]
        cos, sin = Rotary.tables(angles)
        x = F.embedding(tokens, self.embed_tokens.weight).to(self.compute_dtype)
        redo = dict(use_reentrant=False)
        if self.activation_checkpointing == "selective":
            redo["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
        for block in self.layers:
            if self.activation_checkpointing != "none" and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, docs, **redo)
            else:
                x = block(x, cos, sin, docs, cache)
        return x

    def head(self, x):
        return linear(self.norm(x), self.head_weight, self.packed)

    def forward(self, tokens, targets=None, docs=None, reduction="mean"):
        """(logits [B, T, V], None), or with targets (None, loss).

        tokens [B, T] int64. targets [B, T]: the id that follows each token, IGNORE where not predicted.
        docs [n + 1] int64: borders of documents in the flattened B*T tokens, 0 first and B*T last, a
        border at each row's start; documents then do not see each other and count positions from 0.
        reduction: 'mean' over predicted tokens, or 'sum' (0 when there are none)."""
        x = self.hidden(tokens, docs)
        if targets is None:
            return self.head(x), None
        predicted = (targets.flatten() != IGNORE).nonzero().squeeze(1)
        h = self.norm(x.flatten(0, 1)[predicted])
        loss = ChunkedCrossEntropy.apply(h, self.head_weight, targets.flatten()[predicted])
        return None, loss / len(predicted) if reduction == "mean" else loss

    @contextlib.contextmanager
    def packed_weights(self):
        """Inside, products in bf16 on a CPU read the weights in the order that oneDNN computes in, which few rows gain most by.

        This copy takes the memory of the weights once more. It is dropped at the end, as the weights may change then."""
        able = (self.device.type == "cpu" and self.compute_dtype == torch.bfloat16 and
                torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
        weights = {m: m.weight for m in self.modules() if type(m) is Projection} | {self: self.head_weight} if able else {}
        try:
            for module, weight in weights.items():
                module.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16))
            yield
        finally:
            for module in weights:
                module.packed = None

    def generate(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None, seed=0, batch_size=64):
        """n continuations of each prompt: list (prompts) of lists (n) of lists of new ids; see generate_tokens."""
        out = [None] * len(prompts)
        for prompt, rows in self.generate_each(prompts, max_new_tokens, temperature, top_p, n, stop, seed, batch_size):
            out[prompt] = rows
        return out

    def generate_each(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None, seed=0, batch_size=64):
        """Yield (index of a prompt, its n lists of new ids) as soon as the last of the n is complete; see generate_tokens."""
        rows = [[[] for _ in range(n)] for _ in prompts]
        running = [n] * len(prompts)
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(prompts)
        for prompt, sample, token, ended in self.generate_tokens(prompts, max_new_tokens, temperature, top_p, n, stop, seed,
                                                                 batch_size):
            rows[prompt][sample].append(token)
            running[prompt] -= ended
            if not running[prompt]:
                yield prompt, rows[prompt]
        for prompt, most in enumerate(max_new_tokens):
            if most == 0:  # nothing was asked of it, so that no token has come
                yield prompt, rows[prompt]

    @torch.inference_mode()
    def generate_tokens(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None, seed=0, batch_size=64):
        """Yield (prompt, sample, new id, whether the row ends with it) for n continuations of each prompt, as they come.

        temperature 0 is greedy; top_p keeps the likeliest tokens up to that share. `stop` is a
        collection of ids, or a function of a row's new ids that says whether it ends there; the id
        that ends a row is part of it. Up to batch_size rows run at once and a finished row gives its
        place to the next in the queue. A prompt is read once for all its samples. max_new_tokens and
        seed are one number, or one a prompt. Random numbers belong to (seed, prompt, sample, position),
        so that a row's text does not depend on its neighbours; a prompt with a seed of its own draws
        what it would draw alone.
        Raises ValueError for an empty prompt, ids out of vocabulary, or no room for max_new_tokens."""
        most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        keys = [(seed, p) for p in range(len(prompts))] if isinstance(seed, int) else [(own, 0) for own in seed]
        if not len(prompts) == len(most) == len(keys):
            raise ValueError(f"{len(prompts)} prompts, but {len(most)} max_new_tokens and {len(keys)} seeds")
        for i, prompt in enumerate(prompts):
            if not prompt or not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(f"prompt {i} has " + (f"an id outside the vocabulary of {self.config.vocab_size:,}"
                                                       if prompt else "no tokens"))
        longest = max((len(prompt) + new for prompt, new in zip(prompts, most)), default=0)
        if longest > self.config.max_position_embeddings:
            raise ValueError(f"longest prompt + max_new_tokens = {longest}, more than the model's "
                             f"max_position_embeddings={self.config.max_position_embeddings}")
        done = stop if callable(stop) else lambda ids, stop=frozenset(stop or ()): ids[-1] in stop
        queue = [(p, s) for p in range(len(prompts)) for s in range(n) if most[p]][::-1]
        rows, noise, new = [], [], []  # of each row of the cache: (prompt, sample), its random numbers, its new ids
        read = {}  # prompt -> (its keys, values and last logits): prompts that were read and have samples to start
        cache = KVCache(self.config, min(batch_size, len(queue)), longest, self.device, self.compute_dtype)
        logits = torch.empty(0, self.config.vocab_size, device=self.device, dtype=self.compute_dtype)
        few = max(most, default=0) > 1 and len(cache.lengths) <= 32  # more rows gain 15%, which the memory is not worth
        with self.packed_weights() if few else contextlib.nullcontext():
            while rows or queue:
                admitted = [queue.pop() for _ in range(min(batch_size - len(rows), len(queue)))]
                read = {p: read[p] for p in read if p in {p for p, _ in admitted + queue[-1:]}}
                self._read_prompts(prompts, sorted({p for p, _ in admitted} - read.keys()), read)
                for p, s in admitted:
                    cache.put(len(rows), *read[p][:2])
                    rows.append((p, s))
                    new.append([])
                    own, number = keys[p]
                    noise.append(np.random.Generator(np.random.Philox(key=[own, number << 32 | s])).random(most[p]))
                logits = torch.cat([logits] + [read[p][2] for p, _ in admitted]) if admitted else logits
                uniform = torch.tensor([u[len(ids)] for u, ids in zip(noise, new)], device=self.device)
                ids = sample_ids(logits, temperature, top_p, uniform).tolist()
                ended = []
                for (p, s), row, token in zip(rows, new, ids):
                    row.append(token)
                    ended.append(len(row) == most[p] or bool(done(row)))
                    yield p, s, token, ended[-1]
                for r in reversed(range(len(rows))):
                    if ended[r]:
                        last = len(rows) - 1
                        if r < last:  # the last row moves into the free place
                            cache.put(r, *cache.row(last))
                        for of_rows in (rows, noise, new, ids):
                            of_rows[r] = of_rows[last]
                            of_rows.pop()
                logits = self._next_logits(cache, ids) if rows else logits[:0]

    def _next_logits(self, cache, ids):
        """Logits after one more token in each of the cache's first rows."""
        cache.open_step(len(ids))
        tokens = torch.tensor(ids, device=self.device)[:, None]
        logits = self.head(self.hidden(tokens, cache=cache, start=cache.write_at))[:, 0]
        cache.close_step()
        return logits

    def _read_prompts(self, prompts, which, read, max_tokens=2048):
        """Run prompts through the model, one behind the other without padding; `read`: see generate."""
        while which:
            total = np.cumsum([len(prompts[p]) for p in which])
            batch, which = which[:(count := max(1, (total <= max_tokens).sum()))], which[count:]
            borders = [0, *total[:count].tolist()]
            tokens = torch.tensor([[token for p in batch for token in prompts[p]]], device=self.device)
            cache = KVCache(self.config, 1, borders[-1], self.device, self.compute_dtype)
            hidden = self.hidden(tokens, torch.tensor(borders, device=self.device), cache)
            logits = self.head(hidden[0, torch.tensor(borders[1:], device=self.device) - 1][None])[0]
            for i, (p, start, end) in enumerate(zip(batch, borders, borders[1:])):
                read[p] = cache.k[:, 0, :, start:end], cache.v[:, 0, :, start:end], logits[i:i + 1]

    # ------------------------------------------------------------------------- files
    def file_tensors(self):
        """Our parameter name -> [(published tensor name, rows)], the rows stacked in that order."""
        table = {}
        for name, p in self.named_parameters():
            if not name.endswith(".weight"):  # an adapter's
                continue
            group = name.split(".")[-2]
            module = name.rsplit(".", 2)[0]
            prefix = "" if name.startswith("lm_head") else "model."
            if group in GROUPS:
                shapes = self.config.projection_shapes
                table[name] = [(f"{prefix}{module}.{part}.weight", shapes[part][0]) for part in GROUPS[group]]
            else:
                table[name] = [(prefix + name, p.shape[0])]
        return table

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a published folder (config.json, *.safetensors); errors as in load_weights and from_json."""
        with torch.device("meta"):
            model = cls(LlamaConfig.from_json(folder)).to(dtype)
        model.compute_dtype = dtype
        return model.to_empty(device=device).load_weights(folder)

    def load_weights(self, folder):
        """Fill the weights in place, tensor by tensor from mapped files; under FSDP each rank reads its rows only.

        Every tensor is used exactly once: missing, unexpected or misshaped names raise ValueError with
        the list; a folder without safetensors raises FileNotFoundError."""
        shapes, where = open_weights(folder)
        table = self.file_tensors()
        if self.config.tie_word_embeddings and "lm_head.weight" in shapes:
            # the tied matrix is stored under the head's name, alone or twice
            if "model.embed_tokens.weight" not in shapes:
                table["embed_tokens.weight"] = [("lm_head.weight", self.config.vocab_size)]
            elif not torch.equal(*(where[k].get_tensor(k) for k in ("lm_head.weight", "model.embed_tokens.weight"))):
                raise ValueError(f"{folder}: config.json ties lm_head to embed_tokens, but their tensors differ")
            else:
                del shapes["lm_head.weight"]
        parameters = dict(self.named_parameters())
        expected = {hf: (rows, *parameters[name].shape[1:]) for name, parts in table.items() for hf, rows in parts}
        if problems := compare_names(expected, shapes):
            raise ValueError(f"{folder}: weights do not fit config.json: {problems}")
        with torch.no_grad():
            for name, parts in table.items():
                mine, first = local_part(parameters[name])
                row = -first  # where the next piece begins in what this rank holds
                for hf, rows in parts:
                    begin, end = max(row, 0), min(row + rows, len(mine))
                    if begin < end:  # read no more of the file than that
                        mine[begin:end].copy_(where[hf].get_slice(hf)[begin - row:end - row])
                    row += rows
        return self

    def save_pretrained(self, folder, dtype=None, shard_bytes=5 * 10 ** 9, get=full_tensor):
        """Write a folder that from_pretrained and transformers read; dtype None keeps the parameters'.

        get(parameter) is the tensor to write, by default the parameter as it is now."""
        folder = Path(folder)
        writes = not dist.is_initialized() or dist.get_rank() == 0  # under FSDP all ranks gather, one writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
                old.unlink(missing_ok=True)  # shards or an index of an earlier model would be read with the new one
        parameters, shards, size = dict(self.named_parameters()), [[]], 0
        for name, parts in self.file_tensors().items():
            p, first = parameters[name], 0
            for hf, rows in parts:
                nbytes = p.numel() // len(p) * rows * (dtype or p.dtype).itemsize
                if size + nbytes > shard_bytes and shards[-1]:
                    shards.append([])
                    size = 0
                size += nbytes
                shards[-1].append((hf, p, first, rows))
                first += rows
        index, total, gathered = {}, 0, {}  # gathered: the whole of the parameter in hand
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for hf, p, first, rows in shard:
                if p not in gathered:
                    gathered = {p: get(p)}
                if writes:  # copies, because safetensors refuses slices of one storage
                    tensors[hf] = gathered[p][first:first + rows].to("cpu", dtype or p.dtype, copy=True)
            if writes:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(tensors, file))
            total += sum(t.nbytes for t in tensors.values())
        if not writes:
            return
        if len(shards) > 1:
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
            (folder / "model.safetensors.index.json").write_text(text)
        dtype = dtype or self.embed_tokens.weight.dtype
        (folder / "config.json").write_text(json.dumps(self.config.to_json(dtype), indent=2))


def open_weights(folder, name="model.safetensors"):
    """Shapes {name: shape} and open files {name: file} of all tensors in a folder, nothing read yet.

    Raises FileNotFoundError without weights or shard, ValueError for files that are not safetensors."""
    folder, index = Path(folder), Path(folder) / f"{name}.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index}: cut short, or not an index with a weight_map ({e!r})") from None
    elif (folder / name).is_file():
        files = [name]
    else:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        tool = ("peft, AutoPeftModelForCausalLM" if name.startswith("adapter") else "transformers, AutoModelForCausalLM")
        hint = (f"; {pickled[0]} is a pickle and is not read: convert it with {tool}"
                f".from_pretrained(folder).save_pretrained(folder)") if pickled else ""
        raise FileNotFoundError(f"{folder}: neither {name} nor {index.name}{hint}")
    shapes, where = {}, {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing, though {index.name} names it")
        try:
            opened = safe_open(folder / file, framework="pt")
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{folder / file}: truncated or not a safetensors file ({e})") from None
        for name in opened.keys():
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store this table; it is computed here
                continue
            if name in shapes:
                raise ValueError(f"{folder / file}: holds {name}, which another shard holds too")
            shapes[name], where[name] = tuple(opened.get_slice(name).get_shape()), opened
    return shapes, where


def compare_names(expected, found):
    """One line on how found {name: shape} differs from expected, '' when it does not."""
    some = lambda names: ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    wrong = [f"{k} {list(found[k])} for {list(expected[k])}" for k in expected.keys() & found.keys()
             if tuple(expected[k]) != tuple(found[k])]
    return "; ".join(f"{what} {some(names)}" for what, names in
                     (("missing", missing), ("unexpected", extra), ("misshaped", wrong)) if names)
