"""LoRA's product y = x W^T + scale dropout(x) A^T B^T, forward and backward, in plain PyTorch.

    forward                                        saved for backward: x, P, seeds, and the
        P_i = dropout_i(x) A_i^T       [T, r]      parameters W, A, B
        y   = x W^T                    [T, N]
        y[:, start:end] += scale P_i B_i^T         the span of adapter i, which has its own mask

    backward
        dP_i = scale dy[:, start:end] B_i          dB_i = scale dy[:, start:end]^T P_i
        dx   = dy W + sum of mask_i * (dP_i A_i)   dA_i = dP_i^T dropout_i(x)

W is frozen: its gradient, as large as W, is never computed. The masks are not saved but drawn again
from the seeds. llama/lora_operators.py computes the same with Triton kernels; choose_kernel, at the
end, measures which way is fastest.
"""
import math

import torch
import torch.distributed as dist

from llama.products import product


# ----------------------------------------------------------------------------- dropout
def keep_mask(seed, like, drop, again=False):
    """Boolean mask of like's shape, False with probability drop / 2^32, from a seed, int32 [2].

    Each element hashes its index, by Wellons' lowbias32 (github.com/skeeto/hash-prospector) with
    the second half of the seed mixed in after its first shift. Plain integer operators, so that
    torch.compile draws a mask where it is used, without storing it, and every device draws the
    same. `again`, in backward, computes the same mask differently: otherwise the compiler would
    recognize the forward's expression and keep all masks until then."""
    # index of each element
    first = int(again)
    h = torch.arange(first, first + like.numel(), dtype=torch.int32, device=like.device)
    h = h.view(like.shape)
    if again:
        h.sub_(1)
    h.mul_(-0x61C88647).add_(seed[0])
    # h ^= h >> n: torch's shift keeps the sign, "and" with the other bits makes it a logical one
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))
    h.add_(seed[1]).mul_(0x21F0AAAD)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))
    h.mul_(0x735A2D97)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))
    return h >= drop - 2 ** 31


# ----------------------------------------------------------------------------- the product
@torch.library.custom_op("lora::matmul_add", mutates_args=())
def matmul_add(x: torch.Tensor, W: torch.Tensor, P: torch.Tensor, B: torch.Tensor,
               starts: list[int], ends: list[int], scale: float, compiled: bool) -> torch.Tensor:
    """x W^T, plus scale P_i B_i^T on the columns of each span.

    P holds the P_i side by side, B the B_i one under the other. An operator of its own because
    torch.compile would turn the additions in place into copies."""
    y = product(x, W, compiled)
    rank = B.shape[1]
    lengths = [end - start for start, end in zip(starts, ends)]
    for start, end, P_i, B_i in zip(starts, ends, P.split(rank, 1), B.split(lengths)):
        y[:, start:end].addmm_(P_i, B_i.T, alpha=scale)
    return y


@matmul_add.register_fake
def _(x, W, P, B, starts, ends, scale, compiled):
    return x.new_empty((x.shape[0], W.shape[0]))


class LoRAMatmul(torch.autograd.Function):
    """y = x W^T, plus on the columns of each span: scale * dropout(x) A_i^T B_i^T.

    x [T, K]; W [N, K] frozen; A [n r, K], B [rows of all spans, r]; spans ((start, end), ...)
    columns of y in the order of A and B; dropout: its probability, with a mask of its own for each
    span, as in PEFT, from seeds int32 [spans, 2]."""

    @staticmethod
    def forward(ctx, x, W, A, B, spans, scale, dropout, seeds):
        rank = B.shape[1]
        drop = round(dropout * 2 ** 32)
        scale = scale / (1 - drop / 2 ** 32)
        a = A.to(x.dtype)
        if drop:
            # each adapter sees an x of its own
            parts = []
            for seed, a_i in zip(seeds, a.split(rank)):
                parts.append((x * keep_mask(seed, x, drop)) @ a_i.T)
            P = torch.cat(parts, 1)
        else:
            P = x @ a.T
        starts = [start for start, _ in spans]
        ends = [end for _, end in spans]
        compiled = torch.compiler.is_compiling()
        y = matmul_add(x, W, P, B.to(x.dtype), starts, ends, scale, compiled)
        ctx.save_for_backward(x, W, A, B, P, seeds)
        ctx.spans = spans
        ctx.scale = scale
        ctx.drop = drop
        return y

    @staticmethod
    def backward(ctx, dy):
        x, W, A, B, P, seeds = ctx.saved_tensors
        a, b = adapter_parts(A, B, ctx.spans, x.dtype)
        # each adapter's rank gradients and B
        dP = []
        dB = []
        for (start, end), b_i, P_i in zip(ctx.spans, b, P.split(B.shape[1], 1)):
            dy_i = dy[:, start:end]
            dP.append((dy_i @ b_i).mul_(ctx.scale))
            dB.append(dy_i.T @ P_i)
        dB = torch.cat(dB).to(B.dtype).mul_(ctx.scale)
        # the frozen weight's part of dx, then A and its part of dx
        dx = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, W.T, torch.compiler.is_compiling())
        if ctx.drop:
            keep = [keep_mask(seed, x, ctx.drop, again=True) for seed in seeds]
            dA = torch.cat([dP_i.T @ (x * keep_i) for dP_i, keep_i in zip(dP, keep)])
            if dx is not None:
                for dP_i, a_i, keep_i in zip(dP, a, keep):
                    dx += (dP_i @ a_i).mul_(keep_i)
        else:
            # one x for all adapters, so one product each for dA and dx
            stacked = torch.cat(dP, 1)
            dA = stacked.T @ x
            if dx is not None:
                dx.addmm_(stacked, A.to(x.dtype))
        return dx, None, dA.to(A.dtype), dB, None, None, None, None


def adapter_parts(A, B, spans, dtype):
    """The A_i [r, K] and B_i [rows_i, r] of each span, in the dtype of the matmul."""
    lengths = [end - start for start, end in spans]
    return A.to(dtype).split(B.shape[1]), B.to(dtype).split(lengths)


def lora_matmul(kernel, x, W, A, B, spans, scale, dropout, seeds):
    """LoRAMatmul's value by kernel 'torch', or by those of llama/lora_operators.py.

    There the low-rank term is 'fused' into the product with W, or 'added' to it."""
    if kernel == "torch":
        return LoRAMatmul.apply(x, W, A, B, spans, scale, dropout, seeds)
    drop = round(dropout * 2 ** 32)
    starts = [start for start, _ in spans]
    ends = [end for _, end in spans]
    y, _ = torch.ops.lora.matmul(x, W, A, B, seeds if drop else None, starts, ends,
                                 scale / (1 - drop / 2 ** 32), drop, kernel == "fused")
    return y


# ----------------------------------------------------------------------------- which kernel
def milliseconds(run, repeats=10):
    """Median time of run() on the GPU, after three rounds to warm up."""
    times = []
    for _ in range(3 + repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def time_kernel(kernel, shape, spans, rank, dropout, rows, dtype, device, compiled):
    """Milliseconds of forward and backward of one projection group, with random operands."""
    N, K = shape
    x = torch.randn(rows, K, device=device, dtype=dtype, requires_grad=True)
    W = torch.randn(N, K, device=device, dtype=dtype)
    dy = torch.randn(rows, N, device=device, dtype=dtype)
    rows_of_B = sum(end - start for start, end in spans)
    A = torch.randn(len(spans) * rank, K, device=device, requires_grad=True)
    B = torch.randn(rows_of_B, rank, device=device, requires_grad=True)
    seeds = torch.zeros(len(spans), 2, dtype=torch.int32)
    # groups and kernels are variants of one function to the compiler, which gives up after eight
    torch.compiler.reset()
    matmul = torch.compile(lora_matmul, dynamic=False) if compiled else lora_matmul

    def run():
        y = matmul(kernel, x, W, A, B, spans, 2.0, dropout, seeds)
        return torch.autograd.grad(y, (x, A, B), dy)

    return milliseconds(run)


def choose_kernel(model, kernel, rows, dtype, device, compiled=False):
    """Set what a model's adapters compute with, for `rows` tokens at once; returns lines to print.

    'torch'; 'triton': the kernels of llama/lora_operators.py, 'fused' or 'added' as measured;
    'auto': the fastest of the three. Raises ValueError when the kernels are asked for and cannot
    run."""
    if kernel == "torch" or kernel == "auto" and device.type == "cpu":
        return []
    try:
        from llama import lora_operators
        lora_operators.check(dtype, device)
    except (ImportError, ValueError) as e:
        if kernel == "auto":
            return [f"lora_kernel: torch ({e})"]
        if isinstance(e, ImportError):
            raise ValueError(f"lora_kernel=triton: Triton is not installed ({e})") from None
        raise

    # one measurement for all groups of a shape, not one a block
    modules_of = {}
    for module in model.modules():
        if hasattr(module, "lora_A"):
            key = tuple(module.weight.shape), module.spans, module.rank, module.dropout
            modules_of.setdefault(key, []).append(module)
    names = ("fused", "added") if kernel == "triton" else ("torch", "fused", "added")
    times = {}
    for key in modules_of:
        times[key] = {}
        if device.type != "cuda":
            times[key]["fused"] = math.nan  # Triton's interpreter has no times
            continue
        for name in names:
            times[key][name] = time_kernel(name, *key, rows, dtype, device, compiled)
    if dist.is_initialized():  # rank 0's, so that all ranks do the same
        box = [times]
        dist.broadcast_object_list(box)
        times = box[0]

    # the fastest for each group
    lines = []
    for key, modules in modules_of.items():
        found = times[key]
        fastest = min(found, key=found.get)
        for module in modules:
            module.kernel = fastest
        (N, K), spans, rank, _ = key
        measured = ", ".join(f"{name} {ms:.3f}" for name, ms in found.items())
        lines.append(f"lora_kernel: {N} x {K}, {len(spans)} adapters of rank {rank}: {fastest}; "
                     f"ms of forward and backward: {measured}")
    return lines
