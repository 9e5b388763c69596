"""LoRA's products as fused Triton kernels: what lora.LoRAMatmul computes, with fewer passes over memory.

    P_i = dropout_i(x) A_i^T                       down_kernel: one read of x for all adapters of a group
    y = x W^T + scale P B^T                        gemm_kernel: P B^T starts the fp32 accumulator of x W^T
    Q_i = scale dy_i B_i,  dB_i = scale dy_i^T P_i   reduce_kernel: one read of dy (ranks over 32: plain products)
    dA_i = Q_i^T dropout_i(x)                      reduce_kernel: one read of x for all adapters of a group
    dx = dy W + sum of mask_i * (Q_i A_i)          gemm_kernel

Kept for backward: x, P and the seeds. A dropout mask is a hash of the element's index (lora.keep_mask, bit for bit)
and is drawn where it is used. Sums over rows are split in two stages, without atomics: a run repeats to the last bit.

The rank is padded to R, a multiple of its chunk (16, 32 or 64), with zeros; the B_i stand in a block-diagonal [N, G R],
so that a tile may straddle q, k and v, and rows without an adapter are zeros. A tile skips the ranks it has no part in.
"""
import functools
from typing import Optional

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton import Config, cdiv

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy
FUSED_RANK = 32    # up to here one kernel makes Q and dB; above, products of this width are at home in cuBLAS
ROWS, COLUMNS = 64, 128  # of a tile of down_kernel; of reduce_kernel


# ----------------------------------------------------------------------------- pieces
@triton.jit
def keep(tile, rows, cols, K, seeds, i, limit, DROP: tl.constexpr):
    """The tile at rows x cols of a matrix with K columns, with what adapter i drops set to 0: lora.keep_mask."""
    if DROP:
        first = tl.load(seeds + 2 * i).to(tl.uint32, bitcast=True)
        second = tl.load(seeds + 2 * i + 1).to(tl.uint32, bitcast=True)
        of_row = rows.to(tl.uint32) * K * 0x9E3779B9 + first
        h = of_row[:, None] + (cols.to(tl.uint32) * 0x9E3779B9)[None, :]
        h = ((h ^ (h >> 16)) + second) * 0x21F0AAAD
        h = (h ^ (h >> 15)) * 0x735A2D97
        h = h ^ (h >> 15)
        tile = tl.where(h.to(tl.int32, bitcast=True) >= limit, tile, 0.0)
    return tile


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32; fp32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def block(source, row, col, rows, cols, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Tile [HEIGHT, WIDTH] at (row, col) of a matrix [rows, cols], zeros outside; source is a descriptor or a pointer."""
    if TMA:
        tile = source.load([row, col])
    else:
        r, c = row + tl.arange(0, HEIGHT), col + tl.arange(0, WIDTH)
        tile = tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :],
                       mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
    return tile


@triton.jit
def store(out, acc, rows, cols, row_limit, col_limit, row_stride, col_stride):
    """acc to out, inside the limits."""
    tl.store(out + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride,
             acc.to(out.dtype.element_ty), mask=(rows < row_limit)[:, None] & (cols < col_limit)[None, :])


def tuned(configs, key, choose, **how):
    """Choose a kernel's config by measurement, once for each key and kept in Triton's cache on disk, of those that
    choose(configs, named arguments, **others) leaves."""
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=key, cache_results=True,
                           prune_configs_by=dict(early_config_prune=choose), **how)


def is_half(named):
    """Is the x of a call in half precision?"""
    return named["x"].dtype != torch.float32


# ----------------------------------------------------------------------------- kernels
# what spills registers on one of the chips is left out; fp32 has no tensor cores here, so its operands take registers
DOWN = [Config(dict(BK=64), num_warps=8, num_stages=4), Config(dict(BK=32), num_warps=4, num_stages=4),
        Config(dict(BK=32), num_warps=4, num_stages=2)]
DOWN_FP32 = [Config(dict(BK=16), num_warps=8, num_stages=3)]


@tuned([*DOWN, *DOWN_FP32], ["bucket", "K", "G", "R", "DROP"],
       lambda configs, named, **_: DOWN if is_half(named) else DOWN_FP32)
@triton.jit
def down_kernel(x, a, out, seeds, T, K, sx, span, limit, bucket, G: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [parts, T, G R]: dropout_i(x) A_i^T side by side, over `span` columns of x [T, K] a part; a is [G R, K].

    A program makes BM rows and BN ranks of every adapter, from one tile of x."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    part, start = tl.program_id(2), tl.program_id(2) * span
    acc0 = tl.zeros([BM, BN], tl.float32)
    acc1 = tl.zeros([BM, BN], tl.float32)
    acc2 = tl.zeros([BM, BN], tl.float32)
    for k0 in range(start, min(start + span, K), BK):
        k = k0 + tl.arange(0, BK)
        tile = tl.load(x + rows.to(tl.int64)[:, None] * sx + k[None, :], mask=(rows < T)[:, None] & (k < K)[None, :], other=0.0)
        at = a + j[None, :] * K + k[:, None]
        inside = (k < K)[:, None]
        acc0 = dot(keep(tile, rows, k, K, seeds, 0, limit, DROP), tl.load(at, mask=inside, other=0.0), acc0)
        if G > 1:
            acc1 = dot(keep(tile, rows, k, K, seeds, 1, limit, DROP), tl.load(at + R * K, mask=inside, other=0.0), acc1)
        if G > 2:
            acc2 = dot(keep(tile, rows, k, K, seeds, 2, limit, DROP), tl.load(at + 2 * R * K, mask=inside, other=0.0), acc2)
    out += part.to(tl.int64) * T * (G * R)
    store(out, acc0, rows, j, T, R, G * R, 1)
    if G > 1:
        store(out + R, acc1, rows, j, T, R, G * R, 1)
    if G > 2:
        store(out + 2 * R, acc2, rows, j, T, R, G * R, 1)


RIGHT = [Config(dict(BT=32), num_warps=8, num_stages=4), Config(dict(BT=32), num_warps=8, num_stages=2)]
RIGHT_FP32 = [Config(dict(BT=16), num_warps=8, num_stages=3)]
BOTH = [Config(dict(BT=64), num_warps=8, num_stages=3), Config(dict(BT=64), num_warps=4, num_stages=3)]
BOTH_FP32 = [Config(dict(BT=32), num_warps=8, num_stages=2), Config(dict(BT=16), num_warps=8, num_stages=2)]


@tuned([*RIGHT, *RIGHT_FP32, *BOTH, *BOTH_FP32], ["bucket", "K", "J", "G", "DROP", "LEFT", "BN"],
       lambda configs, named, LEFT, **_: (BOTH if LEFT else RIGHT) if is_half(named) else (BOTH_FP32 if LEFT else RIGHT_FP32))
@triton.jit
def reduce_kernel(x, u, v, out, left, seeds, strips, T, K, J, sx, span, limit, scale, bucket, G: tl.constexpr, R: tl.constexpr,
                  DROP: tl.constexpr, LEFT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    """Sums over rows t of x [T, ..], `span` rows a part, for a strip of BN columns of x and BR ranks; u is [T, J].

    LEFT False: out [parts, J, K] = u_i^T dropout_i(x), for G adapters from one tile of x.
    LEFT True: strips of x that belong to one adapter each, as a table [.., 4] of first column, end, adapter, row of out:
    out [parts, K, R] = scale x_i^T u_i, and of every strip left [strips, T, R] = its part of scale x_i v_i; v is [.., J]."""
    strip, part = tl.program_id(0), tl.program_id(2)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    if LEFT:
        first, end = tl.load(strips + 4 * strip), tl.load(strips + 4 * strip + 1)
        column, row = tl.load(strips + 4 * strip + 2) * R + j, tl.load(strips + 4 * strip + 3)
    else:
        first, end, column, row = strip * BN, K, j, 0
    c = first + tl.arange(0, BN)
    if LEFT:
        v_strip = tl.load(v + c[:, None] * J + column[None, :], mask=(c < end)[:, None], other=0.0)
    acc0 = tl.zeros([BR, BN], tl.float32)
    acc1 = tl.zeros([BR, BN], tl.float32)
    acc2 = tl.zeros([BR, BN], tl.float32)
    for t0 in range(part * span, min(part * span + span, T), BT):
        t = t0 + tl.arange(0, BT)
        tile = tl.load(x + t.to(tl.int64)[:, None] * sx + c[None, :], mask=(t < T)[:, None] & (c < end)[None, :], other=0.0)
        at = u + t[None, :] * J + column[:, None]
        inside = (t < T)[None, :]
        acc0 = dot(tl.load(at, mask=inside, other=0.0), keep(tile, t, c, K, seeds, 0, limit, DROP), acc0)
        if G > 1:
            acc1 = dot(tl.load(at + R, mask=inside, other=0.0), keep(tile, t, c, K, seeds, 1, limit, DROP), acc1)
        if G > 2:
            acc2 = dot(tl.load(at + 2 * R, mask=inside, other=0.0), keep(tile, t, c, K, seeds, 2, limit, DROP), acc2)
        if LEFT:
            q = dot(tile, v_strip, tl.zeros([BT, BR], tl.float32))
            store(left + strip.to(tl.int64) * T * R, q * scale, t, j, T, R, R, 1)
    if LEFT:
        store(out + (part * K + row) * R, acc0 * scale, j, tl.arange(0, BN), R, end - first, 1, R)
    else:
        out += part.to(tl.int64) * J * K
        store(out, acc0, j, c, R, K, K, 1)
        if G > 1:
            store(out + R * K, acc1, j, c, R, K, K, 1)
        if G > 2:
            store(out + 2 * R * K, acc2, j, c, R, K, K, 1)


def tile_config(BM, BN, BK, TMA, warps, stages):
    return Config(dict(BM=BM, BN=BN, BK=BK, TMA=TMA), num_warps=warps, num_stages=stages)


ADDED = [tile_config(64, 64, 64, False, 4, 2), tile_config(64, 128, 64, False, 8, 2), tile_config(128, 128, 64, False, 8, 2)]
PLAIN = [tile_config(128, 128, 32, False, 8, 4), tile_config(64, 128, 64, False, 8, 3)]
PERSISTENT = [tile_config(128, 128, 64, True, 8, 3), tile_config(128, 128, 64, True, 4, 3), tile_config(128, 256, 64, True, 8, 4)]
FP32 = [Config(dict(BM=64, BN=32, BK=16, TMA=False), num_warps=8, num_stages=3, maxnreg=224)]


def applicable(G, DROP, ADD, HALF, TMA_FITS):
    """The configs of gemm_kernel that fit a call."""
    if not HALF:
        return FP32
    if ADD:
        return ADDED
    # registers of a thread, beside pointers, for accumulators; with masks each adapter's term has one beside the sum
    room = lambda c: (128 if c.kwargs["TMA"] else 64) // (1 + (DROP and G > 1))
    return [c for c in (PERSISTENT if TMA_FITS else PLAIN) if c.kwargs["BM"] * c.kwargs["BN"] <= room(c) * 32 * c.num_warps]


@tuned([*ADDED, *PLAIN, *PERSISTENT, *FP32], ["bucket", "N", "K", "G", "R", "BACK", "DROP", "ADD", "HALF", "TMA_FITS"],
       lambda configs, named, G, DROP, ADD, HALF, TMA_FITS, **_: applicable(G, DROP, ADD, HALF, TMA_FITS),
       restore_value=["out"])
@triton.jit
def gemm_kernel(x, w, u, v, out, seeds, M, N, K, sx, limit, scale, bucket, G: tl.constexpr, R: tl.constexpr,
                S0: tl.constexpr, E0: tl.constexpr, S1: tl.constexpr, E1: tl.constexpr, S2: tl.constexpr, E2: tl.constexpr,
                BACK: tl.constexpr, DROP: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr, TMA_FITS: tl.constexpr,
                BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """out [M, N] = x [M, K] times W, plus the low-rank term, in one fp32 accumulator; u is [M, G R].

    Forward: w [N, K], v [N, G R], out = x w^T + scale u v^T; adapter i acts on columns Si to Ei, the rest of v is zero.
    BACK: w [K, N], v [G R, N], out = x w + sum of mask_i * (u_i v_i), without masks if not DROP.
    ADD: out already holds the product with W. TMA: tiles move by descriptors; there the grid is what fits on the GPU at
    once, one program a multiprocessor or two, each taking tile after tile."""
    J: tl.constexpr = G * R
    if TMA:
        xs, us = tl.make_tensor_descriptor(x, [M, K], [sx, 1], [BM, BK]), tl.make_tensor_descriptor(u, [M, J], [J, 1], [BM, BR])
        if BACK:
            ws = tl.make_tensor_descriptor(w, [K, N], [N, 1], [BK, BN])
            vs = tl.make_tensor_descriptor(v, [J, N], [N, 1], [BR, BN])
        else:
            ws = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BN, BK])
            vs = tl.make_tensor_descriptor(v, [N, J], [J, 1], [BN, BR])
    else:
        xs, us, ws, vs = x, u, w, v
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for number in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        band = number // (8 * tiles_n)  # eight rows of tiles at a time share the cache
        height = min(tiles_m - band * 8, 8)
        m0 = (band * 8 + number % (8 * tiles_n) % height) * BM
        n0 = number % (8 * tiles_n) // height * BN
        m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        if BACK and DROP:
            for i in range(G):
                term = tl.zeros([BM, BN], tl.float32)
                for j in range(i * R, i * R + R, BR):
                    term = dot(block(us, m0, j, M, J, J, BM, BR, TMA), block(vs, j, n0, J, N, N, BR, BN, TMA), term)
                acc += keep(term, m, n, N, seeds, i, limit, True)
        elif BACK:
            for j in range(0, J, BR):
                acc = dot(block(us, m0, j, M, J, J, BM, BR, TMA), block(vs, j, n0, J, N, N, BR, BN, TMA), acc)
        else:
            hit0, hit1, hit2 = (n0 < E0) & (n0 + BN > S0), (n0 < E1) & (n0 + BN > S1), (n0 < E2) & (n0 + BN > S2)
            low = tl.where(hit0, 0, tl.where(hit1, R, tl.where(hit2, 2 * R, J)))  # the ranks that act on these columns
            high = tl.where(hit2, 3 * R, tl.where(hit1, 2 * R, tl.where(hit0, R, 0)))
            for j in range(low, high, BR):
                acc = dot(block(us, m0, j, M, J, J, BM, BR, TMA), block(vs, n0, j, N, J, J, BN, BR, TMA).T, acc)
            acc *= scale
        if ADD:
            acc += block(out, m0, n0, M, N, N, BM, BN, False).to(tl.float32)
        elif BACK:
            for k in range(0, K, BK):
                acc = dot(block(xs, m0, k, M, K, sx, BM, BK, TMA), block(ws, k, n0, K, N, N, BK, BN, TMA), acc)
        else:
            for k in range(0, K, BK):
                acc = dot(block(xs, m0, k, M, K, sx, BM, BK, TMA), block(ws, n0, k, N, K, K, BN, BK, TMA).T, acc)
        store(out, acc, m, n, M, N, N, 1)


# ----------------------------------------------------------------------------- calling them
@functools.cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def has_tma(device):
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def split(length, programs, device, step):
    """(parts, span): a sum of `length` cut so that `programs` a part fill the GPU; spans are multiples of `step`."""
    parts = max(1, min(-(-multiprocessors(device) // programs), length // (2 * step)))
    span = cdiv(cdiv(length, parts), step) * step
    return cdiv(length, span), span


def padded_rank(rank):
    """(R, chunk): the rank with its zeros, and how much of it one product takes."""
    chunk = 16 if rank <= 16 else 32 if rank <= 32 else 64
    return cdiv(rank, chunk) * chunk, chunk


def piece_of(chunk, dtype):
    """How much of a chunk of the rank one product takes in this dtype."""
    return min(chunk, 32) if dtype == torch.float32 else chunk


def operands(A, B, spans, N, dtype):
    """A as [G R, K] and B as block-diagonal [N, G R], padded with zeros, in dtype."""
    G, r = len(spans), B.shape[1]
    R, _ = padded_rank(r)
    a = A.to(dtype) if R == r else F.pad(A.to(dtype).view(G, r, -1), (0, 0, 0, R - r)).view(G * R, -1)
    b, row = torch.zeros(N, G * R, device=B.device, dtype=dtype), 0
    for i, (start, end) in enumerate(spans):
        b[start:end, i * R:i * R + r] = B[row:row + end - start]
        row += end - start
    return a, b


def masks(seeds, drop, x):
    """What keep wants to know: seeds on x's device (any pointer when nothing is dropped), the limit, whether to drop."""
    return (seeds.to(x.device, non_blocking=True) if drop else x), drop - 2 ** 31, drop > 0


def bucket(T):
    """Row counts that share a tuned config."""
    return triton.next_power_of_2(T)


def down(x, a, G, seeds, drop):
    """P [T, G R]."""
    (T, K), J = x.shape, a.shape[0]
    R = J // G
    chunk = piece_of(padded_rank(R)[1], x.dtype)
    if not drop and R > FUSED_RANK:
        return x @ a.T
    seeds, limit, drops = masks(seeds, drop, x)
    parts, span = split(K, cdiv(T, ROWS) * (R // chunk), x.device, 128)
    out = torch.empty(parts, T, J, device=x.device, dtype=x.dtype if parts == 1 else torch.float32)
    down_kernel[(cdiv(T, ROWS), R // chunk, parts)](x, a, out, seeds, T, K, x.stride(0), span, limit, bucket(T), G=G, R=R,
                                                    DROP=drops, BM=ROWS, BN=chunk)
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


@functools.lru_cache(maxsize=None)
def strip_table(spans, device, half=True):
    """(table for reduce_kernel, strips of each adapter, their width: wide where registers allow it, as each has its own Q)."""
    width = 2 * COLUMNS if has_tma(device) and half else COLUMNS
    table, counts, row = [], [], 0
    for i, (start, end) in enumerate(spans):
        table += [(c, min(c + width, end), i, row + c - start) for c in range(start, end, width)]
        counts.append(cdiv(end - start, width))
        row += end - start
    return torch.tensor(table, dtype=torch.int32).to(device), counts, width


def q_and_db(dy, P, b, spans, scale):
    """Q [T, G R] in dy's dtype, dB [rows of all spans, R] in fp32 (or rounded to dy's dtype on the way)."""
    T, J, G = len(dy), P.shape[1], len(spans)
    R, rows = J // G, sum(end - start for start, end in spans)
    if R > FUSED_RANK:
        Q = torch.empty_like(P)
        for i, (start, end) in enumerate(spans):
            ranks = slice(i * R, i * R + R)
            torch.mm(dy[:, start:end], b[start:end, ranks], out=Q[:, ranks])
        dB = [dy[:, start:end].T @ P[:, i * R:i * R + R] for i, (start, end) in enumerate(spans)]
        return Q.mul_(scale), torch.cat(dB).float().mul_(scale)
    table, counts, width = strip_table(spans, dy.device, dy.dtype != torch.float32)
    parts, span = split(T, len(table), dy.device, 64)
    out = torch.empty(parts, rows, R, device=dy.device, dtype=torch.float32)
    left = torch.empty(len(table), T, R, device=dy.device, dtype=torch.float32)
    reduce_kernel[(len(table), 1, parts)](dy, P, b, out, left, P, table, T, rows, J, dy.stride(0), span, 0, scale, bucket(T),
                                          G=1, R=R, DROP=False, LEFT=True, BN=width, BR=R)
    Q = torch.stack([part.sum(0) for part in left.split(counts)], 1).flatten(1).to(dy.dtype)
    return Q, out.sum(0) if parts > 1 else out[0]


def gradient_of_a(x, Q, G, seeds, drop):
    """dA [G R, K] in fp32 (or rounded to x's dtype on the way)."""
    (T, K), J = x.shape, Q.shape[1]
    R = J // G
    chunk = piece_of(padded_rank(R)[1], x.dtype)
    if not drop and R > FUSED_RANK:
        return Q.T @ x
    seeds, limit, drops = masks(seeds, drop, x)
    parts, span = split(T, cdiv(K, COLUMNS) * (R // chunk), x.device, 64)
    out = torch.empty(parts, J, K, device=x.device, dtype=torch.float32)
    reduce_kernel[(cdiv(K, COLUMNS), R // chunk, parts)](
        x, Q, Q, out, out, seeds, out, T, K, J, x.stride(0), span, limit, 1.0, bucket(T), G=G, R=R, DROP=drops, LEFT=False,
        BN=COLUMNS, BR=chunk)
    return out.sum(0) if parts > 1 else out[0]


def gemm(x, W, u, v, spans, scale, seeds, drop, back, fused):
    """y (or dx, if back): the product with W and the low-rank term, in one kernel, or the term added to a plain product."""
    M, G, N = len(x), len(spans), W.shape[1 if back else 0]
    out = torch.empty(M, N, device=x.device, dtype=x.dtype) if fused else x @ (W if back else W.T)
    seeds, limit, drops = masks(seeds, drop, x)
    R, chunk = padded_rank(u.shape[1] // G)
    half = x.dtype != torch.float32
    fits = fused and half and M >= 128 and has_tma(x.device) and all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in (x, W, u, v))
    if fits and x.is_cuda:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
    (S0, E0), (S1, E1), (S2, E2) = (*spans, (0, 0), (0, 0))[:3]

    def grid(meta):
        tiles = cdiv(M, meta["BM"]) * cdiv(N, meta["BN"])
        resident = multiprocessors(x.device) * (2 if meta["BN"] < 256 else 1)
        return (min(resident, tiles) if meta["TMA"] else tiles,)

    gemm_kernel[grid](x, W, u, v, out, seeds, M, N, x.shape[1], x.stride(0), limit, scale, bucket(M), G=G, R=R, S0=S0, E0=E0,
                      S1=S1, E1=E1, S2=S2, E2=E2, BACK=back, DROP=drops, ADD=not fused, HALF=half, TMA_FITS=fits,
                      BR=piece_of(chunk, x.dtype))
    return out


def check(dtype, device):
    """Raises ValueError where the kernels cannot run."""
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"lora_kernel=triton: the kernels need a GPU, found device={device}; try --lora_kernel=auto")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"lora_kernel=triton: the kernels need compute capability 8.0 or newer, "
                         f"found {torch.cuda.get_device_name(device)}; try --lora_kernel=torch")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32) or INTERPRETED and dtype == torch.bfloat16:
        raise ValueError(f"lora_kernel=triton: no kernels for {str(dtype)[6:]}" + " in Triton's interpreter" * INTERPRETED +
                         "; try --lora_kernel=torch")


# ----------------------------------------------------------------------------- operators
def rows_first(t):
    """t, with columns side by side in memory."""
    return t if t.stride(1) == 1 else t.contiguous()


@torch.library.custom_op("lora::matmul", mutates_args=())
def matmul(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, seeds: Optional[torch.Tensor],
           starts: list[int], ends: list[int], scale: float, drop: int, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, N], P [T, G R]): as lora.LoRAMatmul with spans (starts, ends); drop / 2^32 is the dropout probability, whose
    1 / (1 - p) is in scale; fused: the low-rank term inside the product with W, or added to it in a second pass."""
    check(x.dtype, x.device)
    x, W, spans = rows_first(x), W.contiguous(), tuple(zip(starts, ends))
    if not len(x):
        return x.new_empty(0, len(W)), x.new_empty(0, len(spans) * padded_rank(B.shape[1])[0])
    a, b = operands(A, B, spans, len(W), x.dtype)
    P = down(x, a, len(spans), seeds, drop)
    return gemm(x, W, P, b, spans, scale, None, 0, False, fused), P


@matmul.register_fake
def _(x, W, A, B, seeds, starts, ends, scale, drop, fused):
    return x.new_empty(x.shape[0], W.shape[0]), x.new_empty(x.shape[0], len(starts) * padded_rank(B.shape[1])[0])


@torch.library.custom_op("lora::matmul_backward", mutates_args=())
def matmul_backward(dy: torch.Tensor, x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, P: torch.Tensor,
                    seeds: Optional[torch.Tensor], starts: list[int], ends: list[int], scale: float, drop: int,
                    fused: bool, x_needs_it: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, or something empty; dA; dB), the last two in the dtype of A and B."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if x_needs_it else x.new_empty(0)
    if not len(x):
        return dx, torch.zeros_like(A), torch.zeros_like(B)
    dy, x, W, spans, r = rows_first(dy), rows_first(x), W.contiguous(), tuple(zip(starts, ends)), B.shape[1]
    a, b = operands(A, B, spans, len(W), x.dtype)
    Q, dB = q_and_db(dy, P, b, spans, scale)
    dA = gradient_of_a(x, Q, len(spans), seeds, drop)
    if x_needs_it:
        dx = gemm(dy, W, Q, a, spans, 1.0, seeds, drop, True, fused)
    dA = dA.view(len(spans), -1, dA.shape[1])[:, :r].reshape(A.shape)
    return dx, dA.to(A.dtype), dB[:, :r].to(B.dtype).contiguous()


@matmul_backward.register_fake
def _(dy, x, W, A, B, P, seeds, starts, ends, scale, drop, fused, x_needs_it):
    return x.new_empty(x.shape) if x_needs_it else x.new_empty(0), torch.empty_like(A), torch.empty_like(B)


def keep_inputs(ctx, inputs, output):
    *tensors, starts, ends, scale, drop, fused = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.rest = starts, ends, scale, drop, fused
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, dy, _):
    x, W, A, B, seeds, P = ctx.saved_tensors
    dx, dA, dB = matmul_backward(dy, x, W, A, B, P, seeds, *ctx.rest, ctx.needs_input_grad[0])
    return dx if ctx.needs_input_grad[0] else None, None, dA, dB, None, None, None, None, None, None


matmul.register_autograd(differentiate, setup_context=keep_inputs)
