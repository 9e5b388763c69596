"""Attention over whole sequences: causal, or causal inside each document of a packed batch.

                          keys                    two documents of 3 and 2 tokens in one row,
                       0  1  2 | 3  4             their borders docs = [0, 3, 5]
            queries 0  x       |
                    1  x  x    |                  x: the query attends to this key
                    2  x  x  x |
                    -----------+-----             positions inside documents: 0 1 2 0 1
                    3          | x
                    4          | x  x

Shapes: q [B, T, H, hd], k and v [B, T, KV, hd], where H / KV query heads share a key head.
One token at a time against the keys of earlier ones: llama/kv_cache.py.
"""
import math

import torch
import torch.nn.functional as F

BLOCK = 128  # queries that BlockAttention takes at once
# sequences up to which it keeps its probabilities
LONGEST = {torch.bfloat16: 2048, torch.float32: 512}


class BlockAttention(torch.autograd.Function):
    """Causal attention on a CPU, by matrix products over blocks of queries and their keys.

    PyTorch's fused kernel takes 1.5 to 4 times as long in bf16, up to 1.6 times in fp32 compiled.
    In bf16 scores are rounded, as in transformers' eager attention, and softmax is fp32. The
    probabilities are kept: H T / 2 numbers a token. q [B, H, T, hd], k, v [B, KV, T, hd]."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, hd = q.shape
        # a group is a key head and the query heads that share it
        groups = B * k.shape[1]
        q = q.reshape(groups, -1, T, hd)
        k = k.reshape(groups, T, hd)
        v = v.reshape(groups, T, hd)
        out = torch.empty(q.shape, dtype=q.dtype)
        kept = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            size = end - start
            # scores of the block's queries to all keys up to its end
            rows = q[:, :, start:end].reshape(groups, -1, hd) * hd ** -0.5
            scores = torch.bmm(rows, k[:, :end].mT)
            scores = scores.view(groups, -1, size, end)
            # none to keys that come after a query
            future = torch.ones(size, size, dtype=torch.bool).triu_(1)
            scores[..., start:].masked_fill_(future, -math.inf)
            probs = torch.softmax(scores, -1).flatten(1, 2)
            mixed = torch.bmm(probs, v[:, :end])
            out[:, :, start:end] = mixed.view(groups, -1, size, hd)
            kept.append(probs)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out.view(B, H, T, hd)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *kept = ctx.saved_tensors
        groups, _, T, hd = q.shape
        B = dout.shape[0]
        shape_q = dout.shape
        shape_kv = (B, groups // B, T, hd)
        dout = dout.reshape(q.shape)
        # softmax: dscores = probs * (dprobs - sum of probs * dprobs), and that sum is dout . out
        inner = (dout * out).sum(-1, keepdim=True, dtype=torch.float32).to(q.dtype)
        dq = torch.empty_like(q)
        dk = torch.zeros(k.shape)
        dv = torch.zeros(v.shape)
        for start, probs in zip(range(0, T, BLOCK), kept):
            end = min(start + BLOCK, T)
            # the block's queries, all heads of a group one under the other
            q_rows = q[:, :, start:end].flatten(1, 2)
            dout_rows = dout[:, :, start:end].flatten(1, 2)
            inner_rows = inner[:, :, start:end].flatten(1, 2)
            dscores = torch.bmm(dout_rows, v[:, :end].mT)
            dscores.sub_(inner_rows).mul_(probs)
            dq_rows = torch.bmm(dscores, k[:, :end]) * hd ** -0.5
            dq[:, :, start:end] = dq_rows.view(groups, -1, end - start, hd)
            dk[:, :end] += torch.bmm(dscores.mT, q_rows * hd ** -0.5)
            dv[:, :end] += torch.bmm(probs.mT, dout_rows)
        dk = dk.to(k.dtype).view(shape_kv)
        dv = dv.to(v.dtype).view(shape_kv)
        return dq.view(shape_q), dk, dv


def in_blocks(T, dtype, device_type, compiled):
    """Whether training on T tokens without dropout takes BlockAttention.

    In fp32 only where it is compiled, which attention inside documents is not: uncompiled
    training stays as it is to the last bit."""
    if device_type != "cpu" or dtype not in LONGEST:
        return False
    return T <= LONGEST[dtype] and (compiled or dtype == torch.bfloat16)


def attend_causally(q, k, v, dropout=0.0):
    """Causal attention of q [B, H, T, hd] to k and v [B, KV, T, hd], by the fastest kernel for it.

    dropout: share of the probabilities that is set to zero."""
    T = q.shape[2]
    compiled = torch.compiler.is_compiling()
    if not dropout and in_blocks(T, q.dtype, q.device.type, compiled):
        # prompts: only in bf16, if they are long
        training = torch.is_grad_enabled()
        if training or q.dtype == torch.bfloat16 and T >= BLOCK:
            return BlockAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout,
                                          is_causal=True, enable_gqa=True)


def causal_attention(q, k, v, dropout=0.0):
    """Causal attention along T."""
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    return attend_causally(q, k, v, dropout).transpose(1, 2)


def document_positions(docs, n):
    """Position of each of n flattened tokens in its document; docs [n_docs + 1] are the borders."""
    starts = docs[:-1].repeat_interleave(docs.diff(), output_size=n)
    return torch.arange(n, device=docs.device) - starts


def document_attention(q, k, v, docs, dropout=0.0):
    """Causal attention inside each document; docs are their borders in the flattened tokens."""
    shape = q.shape
    shared = q.shape[2] // k.shape[2]  # query heads of a key head
    q = q.flatten(0, 1)
    k = k.flatten(0, 1)
    v = v.flatten(0, 1)

    # one kernel for all documents; it has no dropout
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not dropout:
        from torch.nn.attention.varlen import varlen_attn
        k = k.repeat_interleave(shared, 1)
        v = v.repeat_interleave(shared, 1)
        borders = docs.int()
        # no document is longer than a row, and asking for the longest would sync
        longest = shape[1]
        out = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0))
        return out.view(shape)

    # one document after the other
    lengths = docs.diff().tolist()
    q_parts = q.transpose(0, 1).split(lengths, 1)
    k_parts = k.transpose(0, 1).split(lengths, 1)
    v_parts = v.transpose(0, 1).split(lengths, 1)
    outs = []
    for q_doc, k_doc, v_doc in zip(q_parts, k_parts, v_parts):
        out = attend_causally(q_doc[None], k_doc[None], v_doc[None], dropout)
        outs.append(out[0])
    out = torch.cat(outs, 1)
    return out.transpose(0, 1).reshape(shape)
