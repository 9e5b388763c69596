"""Llama in plain PyTorch: the model definition. Weight files, generation and the hand-written
backward passes are in llama/.

    tokens [B, T] -> embed_tokens -> x [B, T, D] -> blocks -> norm -> head -> logits [B, T, V]

    a block:  x -+-> norm -> qkv_proj -> rotary -> attention -> o_proj -> + -+->  x of the next one
                 +------------------------------------------------------->+
              and the same with   norm -> gate_up_proj -> SwiGLU -> down_proj

    qkv_proj [q + k + v rows, D] is q_proj, k_proj and v_proj in one matrix, so that x is read once

    model = Llama.from_pretrained(folder, dtype=torch.bfloat16, device="cuda")
    logits, _ = model(tokens)                      # [B, T] -> [B, T, V]
    _, loss = model(tokens, targets)               # scalar; the [B, T, V] logits never exist
    new_ids = model.generate([[1, 15043]], 64)     # new_ids[0][0] is a list of ids

Dtypes are explicit, there is no autocast: each projection casts its weight to the dtype of its
input, so fp32 master weights compute in bf16 if that is the model's `compute_dtype`. Norms, rotary
angles and the loss are computed in at least fp32.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llama.attention import causal_attention, document_attention, document_positions
from llama.functions import (ChunkedCrossEntropy, RMSNorm, Rotary, SwiGLU, computed_again,
                             rotary_frequencies)
from llama.generate import generate, generate_each, generate_tokens
from llama.folder import read_config
from llama.products import linear
from llama.weights import GROUPS, fill, load_weights, save_pretrained

IGNORE = -100  # targets with this value do not count in the loss


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
    rope_scaling: dict = None  # None, or the llama3 form: factor, low_freq_factor ...
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2  # Llama-3 chat models list several

    @classmethod
    def from_json(cls, folder):
        """Read FOLDER/config.json; raises as llama.folder.read_config does."""
        return cls(**read_config(folder, cls.__dataclass_fields__))

    @property
    def projection_shapes(self):
        """Published projection -> (rows, columns) of its weight."""
        hidden = self.hidden_size
        inner = self.intermediate_size
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        return {"q_proj": (q, hidden),
                "k_proj": (kv, hidden),
                "v_proj": (kv, hidden),
                "o_proj": (hidden, q),
                "gate_proj": (inner, hidden),
                "up_proj": (inner, hidden),
                "down_proj": (hidden, inner)}


# ----------------------------------------------------------------------------- modules
class Projection(nn.Module):
    """Matrices with the same input, stacked, so that it is read once: x [..., K] -> [..., N].

    parts: {"q_proj": rows, ...} in row order."""
    packed = None  # see packed_weights in llama/generate.py

    def __init__(self, in_features, parts):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))

    def forward(self, x):
        return linear(x, self.weight, self.packed)


def projection(config, group):
    """The Projection of one of GROUPS."""
    names = GROUPS[group]
    shapes = config.projection_shapes
    columns = shapes[names[0]][1]
    return Projection(columns, {name: shapes[name][0] for name in names})


class Norm(nn.Module):
    """x / rms(x) times a weight, over the last dimension."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x):
        return RMSNorm.of(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention with rotary positions: x [B, T, D] -> [B, T, D]."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.dropout = 0.0  # of probabilities, in training
        self.qkv_proj = projection(config, "qkv_proj")
        self.o_proj = projection(config, "o_proj")
        self.document_attention = document_attention  # compile_blocks leaves it uncompiled

    def forward(self, x, cos, sin, docs, cache):
        B, T, _ = x.shape
        # heads of q, k, v side by side; q and k are rotated together
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 2)
        q, k = Rotary.of(qk, cos, sin).split((self.heads, self.kv_heads), 2)
        if torch.is_grad_enabled():
            # saved for backward: a view would keep the unrotated q and k alive as well
            v = v.contiguous()
        dropout = self.dropout if self.training else 0.0
        # one new token per row against the cache, or whole sequences
        decoding = cache is not None and cache.decoding
        if cache is not None and not decoding:
            cache.prefill(self.layer, k, v)
        if decoding:
            out = cache.attend(self.layer, q, k, v)
        elif docs is None:
            out = causal_attention(q, k, v, dropout)
        else:
            out = self.document_attention(q, k, v, docs, dropout)
        return self.o_proj(out.reshape(B, T, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): x [B, T, D] -> [B, T, D]."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = projection(config, "gate_up_proj")
        self.down_proj = projection(config, "down_proj")

    def forward(self, x, lean=False):
        gate_up = self.gate_up_proj(x)
        h = SwiGLU.of(gate_up)
        with computed_again(lean, h, SwiGLU.of, gate_up):
            return self.down_proj(h)


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream x [B, T, D].

    lean: do not save the outputs of the norms and the activation for the backward pass; recompute
    them there."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, docs=None, cache=None, lean=False):
        h = self.input_layernorm(x)
        with computed_again(lean, h, self.input_layernorm, x):
            x = x + self.self_attn(h, cos, sin, docs, cache)
        h = self.post_attention_layernorm(x)
        with computed_again(lean, h, self.post_attention_layernorm, x):
            return x + self.mlp(h, lean)


# ----------------------------------------------------------------------------- the network
class Embedding(nn.Embedding):
    """nn.Embedding that does not initialize a weight on the meta device.

    For that PyTorch would import its compiler, which takes longer than all the rest of it."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Llama(nn.Module):
    """The network; the top of this file shows its use. compute_dtype: the dtype of activations.

    activation_checkpointing: 'none', or 'block': save only each block's input for backward."""
    packed = None  # the head's, see packed_weights in llama/generate.py

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = Norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype = self.embed_tokens.weight.dtype
        self.activation_checkpointing = "none"
        self.compiled = False

    @property
    def head_weight(self):
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def init_weights(self, seed=0):
        """Random init: N(0, initializer_range), norms 1, block outputs scaled as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            # drawn whole on the CPU, so that values do not depend on device and sharding
            full = torch.ones(p.shape, dtype=p.dtype)
            if p.dim() > 1:
                std = self.config.initializer_range
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * len(self.layers))
                full.normal_(0, std, generator=generator)
            fill(p, full)
        return self

    def compile_blocks(self):
        """torch.compile each block, except attention that depends on the number of documents."""
        # not a decorator: importing the compiler takes as long as importing torch
        uncompiled = torch.compiler.disable(document_attention)
        for block in self.layers:
            block.self_attn.document_attention = uncompiled
            block.compile()
        self.compiled = True

    def rotary_tables(self, B, T, docs, start, device):
        """cos and sin [B or 1, T, 1, hd] of each token's position, within its document if any."""
        if docs is not None:
            positions = document_positions(docs, B * T).view(B, T)
        else:
            positions = torch.arange(T, device=device)[None]
            if start is not None:
                positions = positions + start[:, None]
        # angles in fp32 at least: bf16 cannot represent every integer beyond 256
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        freq = rotary_frequencies(self.config, dtype).to(device)
        angles = positions[..., None].to(dtype) * freq
        return Rotary.tables(angles[:, :, None])

    def hidden(self, tokens, docs=None, cache=None, start=None):
        """Last hidden states [B, T, D], before the final norm.

        start [B]: the position of each row's first token, 0 if it is not given."""
        B, T = tokens.shape
        if cache is None and T > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {T} tokens is longer than the model's "
                             f"max_position_embeddings={self.config.max_position_embeddings}")

        # what all blocks share
        cos, sin = self.rotary_tables(B, T, docs, start, tokens.device)
        if docs is not None and self.compiled:
            # otherwise every new number of documents would trigger a recompile
            torch._dynamo.maybe_mark_dynamic(docs, 0)

        x = F.embedding(tokens, self.embed_tokens.weight).to(self.compute_dtype)
        # activation checkpointing and the compiler decide for themselves what to save
        lean = torch.is_grad_enabled() and not self.compiled
        for block in self.layers:
            if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
                x = block(x, cos, sin, docs, cache, lean)
            else:
                x = checkpoint(block, x, cos, sin, docs, use_reentrant=False)
        return x

    def head(self, x):
        """Logits [..., V] of last hidden states [..., D]."""
        return linear(self.norm(x), self.head_weight, self.packed)

    def forward(self, tokens, targets=None, docs=None, reduction="mean"):
        """(logits [B, T, V], None), or with targets (None, loss).

        tokens [B, T] int64. targets [B, T]: the id that follows each token, IGNORE where there is
        none to predict. docs [n + 1] int64: document boundaries in the flattened B*T tokens, from 0
        to B*T, with one at each row's start; documents then do not attend to each other and their
        positions start at 0.
        reduction: 'mean' over predicted tokens, or 'sum' (0 when there are none)."""
        x = self.hidden(tokens, docs)
        if targets is None:
            return self.head(x), None
        # only positions with a target go through the head
        targets = targets.flatten()
        predicted = (targets != IGNORE).nonzero().squeeze(1)
        h = self.norm(x.flatten(0, 1)[predicted])
        loss = ChunkedCrossEntropy.apply(h, self.head_weight, targets[predicted], self.compiled)
        if reduction == "mean":
            loss = loss / len(predicted)
        return None, loss

    # ------------------------------------------------------------- files: llama/weights.py
    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a Hugging Face model folder; raises as load_weights and from_json do."""
        # on meta first, so that memory is allocated once, on the device
        config = LlamaConfig.from_json(folder)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.compute_dtype = dtype
        load_weights(model, folder, device)
        return model

    load_weights = load_weights        # (folder), in place
    save_pretrained = save_pretrained  # (folder, dtype=None), for transformers as well

    # ------------------------------------------------------------- generation: llama/generate.py
    # (prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None, seed=0, batch_size=64)
    generate = generate                # list (prompts) of lists (n) of lists of new ids
    generate_each = generate_each      # yields (index of a prompt, its n lists) when complete
    generate_tokens = generate_tokens  # yields (prompt, sample, new id, whether the row ends)
