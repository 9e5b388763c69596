"""The pieces of Llama with a backward pass written by hand: norm, rotation, activation, loss.

Eager PyTorch would save several full-size fp32 intermediates of each for the backward pass. These
functions save their input and recompute the rest; torch.compile traces and fuses them.

    rotary     pair i of a head is (x[i], x[i + hd/2]), turned by angle = position * frequency[i]
                   x  = [ a0 a1 .. | b0 b1 .. ]
                   y  = [ a cos - b sin | b cos + a sin ]

    loss       h [n, D] --a chunk of rows--> logits [chunk, V] --> softmax - one_hot, in their place
                                                                       |--> dh of the chunk
                                                                       |--> dw, summed over chunks
"""
import contextlib
import math

import torch
import torch.nn.functional as F

from llama.products import product


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Piece(torch.autograd.Function):
    """A function with its value in `value` and its derivative in `backward`."""

    @classmethod
    def of(cls, *inputs):
        """The value; where no gradient is wanted without autograd, which takes 20 us a call."""
        if torch.is_grad_enabled():
            return cls.apply(*inputs)
        return cls.value(*inputs)


class RMSNorm(Piece):
    """y = weight * (x / rms(x)); x [..., D], weight [D]."""

    @staticmethod
    def value(x, weight, eps):
        normed = F.rms_norm(at_least_fp32(x), x.shape[-1:], eps=eps)
        # rounded as in transformers, before the weight
        return normed.to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return RMSNorm.value(x, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x32 = at_least_fp32(x)
        dy32 = at_least_fp32(dy)
        # x / rms(x) again
        mean_square = x32.square().mean(-1, keepdim=True)
        rstd = torch.rsqrt(mean_square + ctx.eps)
        xhat = x32 * rstd
        # a frozen weight needs no gradient
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy32 * xhat).flatten(0, -2).sum(0).to(weight.dtype)
        # the part of the gradient along xhat is lost in the norm
        dxhat = dy32 * weight
        along = (dxhat * xhat).mean(-1, keepdim=True)
        dx = rstd * (dxhat - xhat * along)
        return dx.to(x.dtype), dw, None


class Rotary(Piece):
    """Turn the pairs (x[i], x[i + hd/2]) of x [B, T, heads, hd]; cos and sin come from `tables`."""

    @staticmethod
    def tables(angles):
        """Angles [..., hd/2] -> cos and sin [..., hd] of both halves, with a rotation's signs."""
        cos = angles.cos()
        sin = angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    @staticmethod
    def value(x, cos, sin):
        first, second = x.chunk(2, -1)
        swapped = torch.cat((second, first), -1)
        return torch.addcmul(x * cos, swapped, sin).to(x.dtype)

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotary.value(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        # the inverse rotation
        cos, sin = ctx.saved_tensors
        return Rotary.value(dy, cos, -sin), None, None


def rotary_frequencies(config, dtype=torch.float32):
    """Angle per position of each pair, [hd/2]; Llama-3 slows the slow ones for a longer context.

    As transformers' modeling_rope_utils (llama3): waves longer than the old context /
    low_freq_factor are slowed by `factor`, those shorter than the old context / high_freq_factor
    are kept, between them is a linear blend."""
    even = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(dtype)
    freq = 1.0 / config.rope_theta ** (even / config.head_dim)
    scaling = config.rope_scaling
    if not scaling:
        return freq
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    # turns of a pair within the old context
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * freq / scaling["factor"] + keep * freq


def computed_again(lean, made, function, source):
    """A context, if `lean`, in which an operator that saves `made` for its backward pass does not:
    function(source) is recomputed there. For what is cheap to recompute from saved tensors."""
    if not lean:
        return contextlib.nullcontext()
    source = source.detach()
    address = made.data_ptr()
    numbers = made.numel()

    def pack(tensor):
        is_it = tensor.data_ptr() == address and tensor.numel() == numbers
        if is_it and tensor.is_contiguous():  # not a transpose
            return tensor.shape
        return tensor

    def unpack(packed):
        if isinstance(packed, torch.Size):
            with torch.no_grad():
                return function(source).view(packed)
        return packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class SwiGLU(Piece):
    """silu(gate) * up, for gate and up side by side in gu [..., 2F]; keeps gu alone."""

    @staticmethod
    def value(gu):
        gate, up = gu.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def forward(ctx, gu):
        ctx.save_for_backward(gu)
        return SwiGLU.value(gu)

    @staticmethod
    def backward(ctx, dh):
        gu, = ctx.saved_tensors
        gate, up = gu.chunk(2, -1)
        gate32 = at_least_fp32(gate)
        dh32 = at_least_fp32(dh)
        # silu(x) = x sigmoid(x), silu'(x) = sigmoid(x) + silu(x) (1 - sigmoid(x))
        sigmoid = torch.sigmoid(gate32)
        silu = gate32 * sigmoid
        dgate = dh32 * up * (sigmoid + silu * (1 - sigmoid))
        dup = dh32 * silu
        return torch.cat((dgate.to(gate.dtype), dup.to(gate.dtype)), -1)


def add_product(total, a, b, dtype):
    """total + a @ b, summed in dtype, in place; a @ b alone where total is None."""
    if a.dtype == dtype:
        return a @ b if total is None else torch.addmm(total, a, b, out=total)
    if a.is_cuda:
        # rounded to dtype, not to that of a and b
        product = torch.mm(a, b, out_dtype=dtype)
        return product if total is None else total.add_(product)
    # a CPU converts: piece by piece, so that nothing else of the total's size is made
    first = total is None
    if first:
        total = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
    for rows, part in zip(total.split(2048), a.split(2048)):
        if first:
            rows.copy_(part @ b)
        else:
            rows.add_(part @ b)
    return total


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross-entropy(h @ weight.T, targets), a scalar.

    h [n, D], weight [V, D], targets [n]; compiled: whether the model is, see llama/products.py.
    Gradients are made in the forward pass, a chunk of rows at a time, and the logits of a chunk are
    overwritten by their gradient: nothing of size [n, V] exists. The weight's gradient is summed in
    fp32 over the chunks, and not computed at all when the head is frozen."""
    chunk_bytes = 2 ** 27  # of the logits of one GEMM, and of their softmax in fp32
    piece_bytes = 2 ** 23  # of one softmax on a CPU: what its cache holds

    @staticmethod
    def forward(ctx, h, weight, targets, compiled=False):
        want_dh, want_dw, *_ = ctx.needs_input_grad
        vocab = weight.shape[0]
        w = weight.to(h.dtype)
        sum_dtype = torch.promote_types(h.dtype, torch.float32)
        loss = torch.zeros((), device=h.device, dtype=sum_dtype)
        dh = torch.empty_like(h) if want_dh else None
        dw = None

        # rows of one GEMM, and of one softmax
        chunk_bytes = ChunkedCrossEntropy.chunk_bytes
        piece_bytes = ChunkedCrossEntropy.piece_bytes if h.device.type == "cpu" else chunk_bytes
        rows = max(1, chunk_bytes // (vocab * h.itemsize))
        piece = max(1, piece_bytes // (vocab * loss.itemsize))

        for start in range(0, h.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = product(h[chunk], w, compiled)
            for z, target in zip(logits.split(piece), targets[chunk].split(piece)):
                logp = torch.log_softmax(z, -1, dtype=sum_dtype)
                loss -= logp.gather(1, target[:, None]).sum()
                if want_dh or want_dw:
                    # the gradient of the logits takes their place
                    dz = logp.exp_()
                    dz[torch.arange(len(target), device=target.device), target] -= 1
                    z.copy_(dz)
            if want_dh:
                torch.mm(logits, w, out=dh[chunk])
            if want_dw:
                dw = add_product(dw, logits.T, h[chunk], sum_dtype)
        if want_dw:
            dw = torch.zeros_like(weight) if dw is None else dw.to(weight.dtype)
        ctx.grads = dh, dw
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dh, dw = ctx.grads
        ctx.grads = None  # they are scaled in place: a second backward pass must fail
        if dh is not None:
            dh.mul_(dloss)
        if dw is not None:
            dw.mul_(dloss)
        return dh, dw, None, None
