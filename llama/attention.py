"""Attention: causal, inside documents, and one token at a time against a cache of keys and values.

Shapes: q [B, T, H, hd], k and v [B, T, KV, hd], where H / KV query heads share a key head.
"""
import math

import torch
import torch.nn.functional as F

BLOCK = 128      # queries that BlockAttention takes at once
LONGEST = 2048   # sequences up to which it keeps its probabilities


class BlockAttention(torch.autograd.Function):
    """Causal attention in bf16 on a CPU, by plain matrix products over blocks of queries and the keys before them.

    PyTorch's fused kernel takes 1.5 to 4 times as long there. Scores are rounded to bf16, as in transformers' eager
    attention, softmax is fp32, and the probabilities are kept: H T / 2 numbers a token. q [B, H, T, hd], k, v [B, KV, T, hd]."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, hd = q.shape
        groups = B * k.shape[1]
        q, k, v = q.reshape(groups, -1, T, hd), k.reshape(groups, T, hd), v.reshape(groups, T, hd)
        out, kept = torch.empty(q.shape, dtype=q.dtype), []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            rows = q[:, :, start:end].reshape(groups, -1, hd) * hd ** -0.5
            scores = torch.bmm(rows, k[:, :end].mT).view(groups, -1, end - start, end)
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores[..., start:].masked_fill_(future, -math.inf)
            probs = torch.softmax(scores, -1).flatten(1, 2)
            out[:, :, start:end] = torch.bmm(probs, v[:, :end]).view(groups, -1, end - start, hd)
            kept.append(probs)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(B, H, T, hd)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *kept = ctx.saved_tensors
        groups, _, T, hd = q.shape
        shape = dout.shape[0], groups // dout.shape[0], T, hd  # of dk and dv
        dout_shape, dout = dout.shape, dout.reshape(q.shape)
        inner = (dout * out).sum(-1, keepdim=True, dtype=torch.float32).to(q.dtype)
        dq, dk, dv = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)
        for start, probs in zip(range(0, T, BLOCK), kept):
            end = min(start + BLOCK, T)
            block = lambda x: x[:, :, start:end].flatten(1, 2)
            dscores = torch.bmm(block(dout), v[:, :end].mT).sub_(block(inner)).mul_(probs)
            dq[:, :, start:end] = (torch.bmm(dscores, k[:, :end]) * hd ** -0.5).view(groups, -1, end - start, hd)
            dk[:, :end] += torch.bmm(dscores.mT, block(q) * hd ** -0.5)
            dv[:, :end] += torch.bmm(probs.mT, block(dout))
        return dq.view(dout_shape), dk.to(k.dtype).view(shape), dv.to(v.dtype).view(shape)


def attend_causally(q, k, v, dropout=0.0):
    """Causal attention of q [B, H, T, hd] to k and v [B, KV, T, hd], by the kernel that is fastest for it; `dropout` is
    the share of probabilities set to zero."""
    if (not dropout and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= LONGEST
            and (torch.is_grad_enabled() or q.shape[2] >= BLOCK)):
        return BlockAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True)


def document_positions(docs, n):
    """Position of each of n flattened tokens in its own document; docs [n_docs + 1] are the borders."""
    return torch.arange(n, device=docs.device) - docs[:-1].repeat_interleave(docs.diff(), output_size=n)


@torch.compiler.disable  # the number of documents changes from batch to batch
def document_attention(q, k, v, docs, dropout=0.0):
    """Causal attention inside each document; docs are their borders in the flattened B * T tokens."""
    shape, scale_heads = q.shape, q.shape[2] // k.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if not dropout and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # it knows no dropout
        from torch.nn.attention.varlen import varlen_attn
        k, v = (x.repeat_interleave(scale_heads, 1) for x in (k, v))
        cu, longest = docs.int(), shape[1]  # no document is longer than a row, and asking would sync
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0)).view(shape)
    lengths = docs.diff().tolist()
    parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)))
    out = [attend_causally(a[None], b[None], c[None], dropout)[0] for a, b, c in parts]
    return torch.cat(out, 1).transpose(0, 1).reshape(shape)


def causal_attention(q, k, v, dropout=0.0):
    """Causal attention along T."""
    return attend_causally(*(x.transpose(1, 2) for x in (q, k, v)), dropout).transpose(1, 2)


class KVCache:
    """Keys and values [layers, rows, KV, length, hd] of running sequences, and how long each one is."""

    def __init__(self, config, rows, length, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = [0] * rows
        self.decoding = False  # until open_step: whole prompts are stored, then one token a row

    def row(self, row):
        """Keys and values of one sequence, [layers, KV, its length, hd] each."""
        return (x[:, row, :, :self.lengths[row]] for x in (self.k, self.v))

    def put(self, row, k, v):
        """Let `row` continue what k and v [layers, KV, n, hd] hold."""
        n = self.lengths[row] = k.shape[2]
        self.k[:, row, :, :n], self.v[:, row, :, :n] = k, v

    def open_step(self, rows):
        """Before a decoding step of the first `rows` rows: where each one writes and what it may see."""
        device, self.decoding, (_, _, heads, length, _) = self.k.device, True, self.k.shape
        self.write_at = torch.tensor(self.lengths[:rows], device=device)
        longest = max(self.lengths[:rows]) + 1
        sequences = torch.arange(rows * heads, device=device)  # of one key head each
        self.slots = sequences * length + self.write_at.repeat_interleave(heads)
        self.places = [x.flatten(1, 3).unbind() for x in (self.k, self.v)]           # a layer's [rows * KV * length, hd]
        self.held = [x[:, :rows, :, :longest].flatten(1, 2).unbind() for x in (self.k, self.v)]  # [rows * KV, longest, hd]
        seen = torch.arange(longest, device=device) <= self.write_at[:, None]
        self.bias = torch.zeros(seen.shape, device=device, dtype=self.k.dtype)
        self.bias = self.bias.masked_fill_(~seen, -math.inf).repeat_interleave(heads, 0)[:, None]

    def close_step(self):
        for row in range(len(self.write_at)):
            self.lengths[row] += 1

    def prefill(self, layer, k, v):
        """Store whole prompts: k and v [rows, T, KV, hd]."""
        self.k[layer, :, :, :k.shape[1]] = k.transpose(1, 2)
        self.v[layer, :, :, :v.shape[1]] = v.transpose(1, 2)

    def attend(self, layer, q, k, v):
        """Store one token of each row and attend to all before it; q [rows, 1, H, hd] -> same shape."""
        for places, new in zip(self.places, (k, v)):
            places[layer].index_copy_(0, self.slots, new.flatten(0, 2))
        k, v = (held[layer] for held in self.held)
        # query heads that share a key head stand where a longer sequence's queries would stand
        grouped = q.reshape(k.shape[0], -1, q.shape[-1])
        if q.device.type != "cpu":  # the fused kernels want four dimensions
            return F.scaled_dot_product_attention(grouped[None], k[None], v[None], attn_mask=self.bias[None]).view(q.shape)
        # plain products take half of the fused kernel's time for one query, and half again with the keys on the left
        scores = torch.baddbmm(self.bias.mT, k, grouped.mT, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.mT.softmax(-1), v).view(q.shape)
