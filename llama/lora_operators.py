"""LoRA's product by Triton kernels (lora_kernels.py), as operators that torch.compile knows.

    lora::matmul            x, W, A, B, seeds -> operands -> down (P) -> gemm -> y, P
    lora::matmul_backward   dy, saved tensors -> q_and_db -> gradient_of_a -> gemm -> dx, dA, dB

Saved for backward: x, P and the seeds. Sums over many rows or columns are split in two stages,
without atomics, so that a run repeats to the last bit:

    T rows  [ span | span | span ]  ->  a partial sum of each span, by its own programs  ->  .sum(0)

G adapters of a group; r their rank; R the rank padded with zeros; a [G R, K]; b [N, G R]:

    b =  q rows [ B_q  .    .  ]        in x's dtype; columns r to R of each block are zeros
         k rows [ .    B_k  .  ]
         v rows [ .    .    B_v]
"""
import functools
from typing import Optional

import torch
import torch.nn.functional as F
import triton
from triton import cdiv

from llama.lora_kernels import INTERPRETED, down_kernel, gemm_kernel, reduce_kernel

FUSED_RANK = 32  # up to here one kernel makes Q and dB; cuBLAS is as good at wider products
ROWS = 64        # of a tile of down_kernel
COLUMNS = 128    # of a tile of reduce_kernel


# ----------------------------------------------------------------------------- the device
@functools.cache
def multiprocessors(device):
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_tma(device):
    """Whether the device has a tensor memory accelerator; the interpreter computes as if."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def check(dtype, device):
    """Raises ValueError where the kernels cannot run."""
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"lora_kernel=triton: the kernels need a GPU, found device={device}; "
                         f"try --lora_kernel=auto")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"lora_kernel=triton: the kernels need compute capability 8.0 or newer, "
                         f"found {torch.cuda.get_device_name(device)}; try --lora_kernel=torch")
    name = str(dtype).removeprefix("torch.")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"lora_kernel=triton: no kernels for {name}; try --lora_kernel=torch")
    if INTERPRETED and dtype == torch.bfloat16:
        raise ValueError(f"lora_kernel=triton: no kernels for {name} in Triton's interpreter; "
                         f"try --lora_kernel=torch")


# ----------------------------------------------------------------------------- shapes
def split(length, programs, device, step):
    """(parts, span): a sum of `length` cut so that `programs` a part fill the GPU.

    span is a multiple of step."""
    wanted = cdiv(multiprocessors(device), programs)
    most = length // (2 * step)  # parts of two steps
    parts = max(1, min(wanted, most))
    steps = cdiv(cdiv(length, parts), step)
    span = steps * step
    return cdiv(length, span), span


def padded_rank(rank):
    """(R, chunk): the rank with its zeros, and how much of it one product takes."""
    chunk = 64
    if rank <= 32:
        chunk = 32
    if rank <= 16:
        chunk = 16
    return cdiv(rank, chunk) * chunk, chunk


def piece_of(chunk, dtype):
    """How much of a chunk of the rank one product takes in this dtype."""
    return min(chunk, 32) if dtype == torch.float32 else chunk


def bucket(T):
    """Row counts that share a tuned config."""
    return triton.next_power_of_2(T)


def rows_first(t):
    """t, with columns side by side in memory."""
    return t if t.stride(1) == 1 else t.contiguous()


def operands(A, B, spans, N, dtype):
    """A as [G R, K] and B as block-diagonal [N, G R], padded with zeros, in dtype."""
    G = len(spans)
    rank = B.shape[1]
    R, _ = padded_rank(rank)
    # zeros under each A_i
    a = A.to(dtype)
    if R != rank:
        a = F.pad(a.view(G, rank, -1), (0, 0, 0, R - rank)).view(G * R, -1)
    # each B_i in the rows of its span and the columns of its ranks
    b = torch.zeros(N, G * R, device=B.device, dtype=dtype)
    row = 0
    for i, (start, end) in enumerate(spans):
        rows = end - start
        b[start:end, i * R:i * R + rank] = B[row:row + rows]
        row += rows
    return a, b


def mask_arguments(seeds, drop, x):
    """What the kernels' `keep` needs: seeds on x's device, limit, whether to drop."""
    # any pointer will do when nothing is dropped
    pointer = seeds.to(x.device, non_blocking=True) if drop else x
    return pointer, drop - 2 ** 31, drop > 0


# ----------------------------------------------------------------------------- calling the kernels
def down(x, a, G, seeds, drop):
    """P [T, G R] of x [T, K] and a [G R, K]."""
    T, K = x.shape
    J = len(a)
    R = J // G
    if not drop and R > FUSED_RANK:
        return x @ a.T
    seeds, limit, drops = mask_arguments(seeds, drop, x)
    # tiles of ROWS x chunk; the sum over K in parts if there are few
    _, chunk = padded_rank(R)
    chunk = piece_of(chunk, x.dtype)
    tiles = cdiv(T, ROWS)
    parts, span = split(K, tiles * (R // chunk), x.device, 128)
    dtype = x.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, T, J, device=x.device, dtype=dtype)
    down_kernel[tiles, R // chunk, parts](
        x, a, out, seeds, T, K, x.stride(0), span, limit, bucket(T),
        G=G, R=R, DROP=drops, BM=ROWS, BN=chunk)
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


@functools.lru_cache(maxsize=None)
def strip_table(spans, device, half=True):
    """(table for reduce_kernel, number of strips of each adapter, their width).

    Wide where registers allow it, as each strip has a Q of its own."""
    width = 2 * COLUMNS if has_tma(device) and half else COLUMNS
    table = []
    counts = []
    row = 0
    for i, (start, end) in enumerate(spans):
        for first in range(start, end, width):
            table.append((first, min(first + width, end), i, row + first - start))
        counts.append(cdiv(end - start, width))
        row += end - start
    return torch.tensor(table, dtype=torch.int32).to(device), counts, width


def q_and_db(dy, P, b, spans, scale):
    """Q [T, G R] in dy's dtype, dB [rows of all spans, R] in fp32 (large ranks: rounded before)."""
    T, J = P.shape
    R = J // len(spans)
    # wide products, one after the other
    if R > FUSED_RANK:
        Q = torch.empty_like(P)
        dB = []
        for i, (start, end) in enumerate(spans):
            ranks = slice(i * R, i * R + R)
            torch.mm(dy[:, start:end], b[start:end, ranks], out=Q[:, ranks])
            dB.append(dy[:, start:end].T @ P[:, ranks])
        return Q.mul_(scale), torch.cat(dB).float().mul_(scale)
    # both from one read of dy, strip by strip
    table, counts, width = strip_table(spans, dy.device, dy.dtype != torch.float32)
    rows = sum(end - start for start, end in spans)
    parts, span = split(T, len(table), dy.device, 64)
    out = torch.empty(parts, rows, R, device=dy.device, dtype=torch.float32)
    left = torch.empty(len(table), T, R, device=dy.device, dtype=torch.float32)
    reduce_kernel[len(table), 1, parts](
        dy, P, b, out, left, P, table, T, rows, J, dy.stride(0), span, 0, scale, bucket(T),
        G=1, R=R, DROP=False, LEFT=True, BN=width, BR=R)
    # an adapter's Q is the sum over its strips
    Q = torch.stack([strips.sum(0) for strips in left.split(counts)], 1)
    Q = Q.flatten(1).to(dy.dtype)
    return Q, out.sum(0) if parts > 1 else out[0]


def gradient_of_a(x, Q, G, seeds, drop):
    """dA [G R, K] in fp32 (large ranks without dropout: rounded to x's dtype before)."""
    T, K = x.shape
    J = Q.shape[1]
    R = J // G
    if not drop and R > FUSED_RANK:
        return Q.T @ x
    seeds, limit, drops = mask_arguments(seeds, drop, x)
    # tiles of chunk x COLUMNS; the sum over T in parts if there are few
    _, chunk = padded_rank(R)
    chunk = piece_of(chunk, x.dtype)
    strips = cdiv(K, COLUMNS)
    parts, span = split(T, strips * (R // chunk), x.device, 64)
    out = torch.empty(parts, J, K, device=x.device, dtype=torch.float32)
    reduce_kernel[strips, R // chunk, parts](
        x, Q, Q, out, out, seeds, out, T, K, J, x.stride(0), span, limit, 1.0, bucket(T),
        G=G, R=R, DROP=drops, LEFT=False, BN=COLUMNS, BR=chunk)
    return out.sum(0) if parts > 1 else out[0]


def gemm(x, W, u, v, spans, scale, seeds, drop, back, fused):
    """y (or dx, if back): the product with W and the low-rank term.

    fused: in one kernel; else a kernel adds the term to a plain product."""
    M, K = x.shape
    N = W.shape[1] if back else W.shape[0]
    G = len(spans)
    if fused:
        out = torch.empty(M, N, device=x.device, dtype=x.dtype)
    else:
        out = x @ W if back else x @ W.T
    seeds, limit, drops = mask_arguments(seeds, drop, x)
    R, chunk = padded_rank(u.shape[1] // G)

    # descriptors need half precision, a full tile of rows, and rows that begin at 16 bytes
    half = x.dtype != torch.float32
    aligned = all(is_aligned(t) for t in (x, W, u, v))
    fits = fused and half and M >= 128 and has_tma(x.device) and aligned
    if fits and x.is_cuda:
        triton.set_allocator(allocate_on(x.device))

    def grid(meta):
        # a program a tile, or as many as fit on the GPU at once
        tiles = cdiv(M, meta["BM"]) * cdiv(N, meta["BN"])
        if not meta["TMA"]:
            return (tiles,)
        programs = 2 if meta["BN"] < 256 else 1  # on a multiprocessor at once
        return (min(multiprocessors(x.device) * programs, tiles),)

    (S0, E0), (S1, E1), (S2, E2) = (*spans, (0, 0), (0, 0))[:3]
    gemm_kernel[grid](
        x, W, u, v, out, seeds, M, N, K, x.stride(0), limit, scale, bucket(M),
        G=G, R=R, S0=S0, E0=E0, S1=S1, E1=E1, S2=S2, E2=E2, BACK=back, DROP=drops,
        ADD=not fused, HALF=half, TMA_FITS=fits, BR=piece_of(chunk, x.dtype))
    return out


def is_aligned(t):
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0


def allocate_on(device):
    """Where Triton puts the descriptors that a kernel makes."""
    def allocate(size, alignment, stream):
        return torch.empty(size, dtype=torch.int8, device=device)
    return allocate


# ----------------------------------------------------------------------------- operators
@torch.library.custom_op("lora::matmul", mutates_args=())
def matmul(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
           seeds: Optional[torch.Tensor], starts: list[int], ends: list[int], scale: float,
           drop: int, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, N], P [T, G R]): as lora_matmul.LoRAMatmul with spans (starts, ends).

    drop / 2^32 is the dropout probability p, whose 1 / (1 - p) is in scale. fused: the low-rank
    term inside the product with W, or added to it in a second pass."""
    check(x.dtype, x.device)
    # the kernels read rows with their columns side by side
    x = rows_first(x)
    W = W.contiguous()
    spans = tuple(zip(starts, ends))
    if not len(x):
        R, _ = padded_rank(B.shape[1])
        return x.new_empty(0, len(W)), x.new_empty(0, len(spans) * R)
    a, b = operands(A, B, spans, len(W), x.dtype)
    P = down(x, a, len(spans), seeds, drop)
    y = gemm(x, W, P, b, spans, scale, None, 0, False, fused)
    return y, P


@matmul.register_fake
def _(x, W, A, B, seeds, starts, ends, scale, drop, fused):
    R, _ = padded_rank(B.shape[1])
    return x.new_empty(x.shape[0], W.shape[0]), x.new_empty(x.shape[0], len(starts) * R)


@torch.library.custom_op("lora::matmul_backward", mutates_args=())
def matmul_backward(dy: torch.Tensor, x: torch.Tensor, W: torch.Tensor, A: torch.Tensor,
                    B: torch.Tensor, P: torch.Tensor, seeds: Optional[torch.Tensor],
                    starts: list[int], ends: list[int], scale: float, drop: int, fused: bool,
                    x_needs_it: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, or something empty; dA; dB), the last two in the dtype of A and B."""
    dx = x.new_empty(0)
    if x_needs_it:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    # no rows, no gradients
    if not len(x):
        return dx, torch.zeros_like(A), torch.zeros_like(B)
    dy = rows_first(dy)
    x = rows_first(x)
    W = W.contiguous()
    spans = tuple(zip(starts, ends))
    G = len(spans)
    rank = B.shape[1]
    # Q serves dA and dx
    a, b = operands(A, B, spans, len(W), x.dtype)
    Q, dB = q_and_db(dy, P, b, spans, scale)
    dA = gradient_of_a(x, Q, G, seeds, drop)
    if x_needs_it:
        dx = gemm(dy, W, Q, a, spans, 1.0, seeds, drop, True, fused)
    # the padded rank's zeros are no gradients
    dA = dA.view(G, -1, dA.shape[1])[:, :rank].reshape(A.shape)
    dB = dB[:, :rank]
    return dx, dA.to(A.dtype), dB.to(B.dtype).contiguous()


@matmul_backward.register_fake
def _(dy, x, W, A, B, P, seeds, starts, ends, scale, drop, fused, x_needs_it):
    dx = x.new_empty(x.shape) if x_needs_it else x.new_empty(0)
    return dx, torch.empty_like(A), torch.empty_like(B)


def keep_inputs(ctx, inputs, output):
    """Save for backward: tensors of the call, and P."""
    x, W, A, B, seeds, *rest = inputs
    _, P = output
    ctx.save_for_backward(x, W, A, B, seeds, P)
    ctx.rest = rest  # starts, ends, scale, drop, fused
    ctx.mark_non_differentiable(P)


def differentiate(ctx, dy, _):
    x, W, A, B, seeds, P = ctx.saved_tensors
    x_needs_it = ctx.needs_input_grad[0]
    dx, dA, dB = matmul_backward(dy, x, W, A, B, P, seeds, *ctx.rest, x_needs_it)
    if not x_needs_it:
        dx = None
    return dx, None, dA, dB, None, None, None, None, None, None


matmul.register_autograd(differentiate, setup_context=keep_inputs)
