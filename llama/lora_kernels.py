"""LoRA's products as Triton kernels, with fewer passes over memory; lora_operators.py calls them.

    down_kernel     P_i = dropout_i(x) A_i^T            one read of x for all adapters of a group
    gemm_kernel     y = x W^T + scale P B^T             P B^T starts the accumulator of x W^T
    reduce_kernel   Q_i = scale dy_i B_i,
                    dB_i = scale dy_i^T P_i             one read of dy
    reduce_kernel   dA_i = Q_i^T dropout_i(x)           one read of x for all adapters of a group
    gemm_kernel     dx = dy W + sum of mask_i * (Q_i A_i)

A program of gemm_kernel makes one tile of the result, in one accumulator:

               K                  G R                       N
          +---------+          +------+             +---+------+---+
       BM |  x ---> |   and    | P -> |     -->     |   | tile |   | M
          +---------+          +------+             +---+------+---+
           times W^T,           times B^T,                 BN
           BK at a time         BR ranks at a time

The rank is padded to R, a multiple of its chunk (16, 32 or 64), with zeros; the B_i stand in a
block-diagonal [N, G R], so that a tile may straddle q, k and v, and rows without an adapter are
zeros. A tile skips the ranks it has no part in. A dropout mask is a hash of the element's index
(lora_matmul.keep_mask, bit for bit) and is drawn where it is used.
"""
import torch
import triton
import triton.language as tl
from triton import Config

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy


# ----------------------------------------------------------------------------- pieces
@triton.jit
def keep(tile, rows, cols, K, seeds, i, limit, DROP: tl.constexpr):
    """The tile at rows x cols of a matrix with K columns, what adapter i drops set to 0."""
    if DROP:
        first = tl.load(seeds + 2 * i).to(tl.uint32, bitcast=True)
        second = tl.load(seeds + 2 * i + 1).to(tl.uint32, bitcast=True)
        # hash of seed and index = row * K + column
        of_row = rows.to(tl.uint32) * K * 0x9E3779B9 + first
        of_col = cols.to(tl.uint32) * 0x9E3779B9
        h = of_row[:, None] + of_col[None, :]
        # as in lora_matmul.keep_mask, whose int32 has the same bits
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
def load(source, rows, cols, row_limit, col_limit, stride):
    """The tile at rows x cols of a matrix, zeros outside the limits."""
    inside = (rows < row_limit)[:, None] & (cols < col_limit)[None, :]
    at = source + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store(out, acc, rows, cols, row_limit, col_limit, row_stride, col_stride):
    """acc to out, inside the limits."""
    inside = (rows < row_limit)[:, None] & (cols < col_limit)[None, :]
    at = out + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_each(out, step, acc0, acc1, acc2, rows, cols, row_limit, col_limit, stride,
               G: tl.constexpr):
    """The sums of G adapters to out, `step` entries apart."""
    store(out, acc0, rows, cols, row_limit, col_limit, stride, 1)
    if G > 1:
        store(out + step, acc1, rows, cols, row_limit, col_limit, stride, 1)
    if G > 2:
        store(out + 2 * step, acc2, rows, cols, row_limit, col_limit, stride, 1)


@triton.jit
def block(source, row, col, rows, cols, stride,
          HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Tile [HEIGHT, WIDTH] at (row, col) of a matrix [rows, cols], zeros outside.

    source: a descriptor with TMA, else a pointer."""
    if TMA:
        tile = source.load([row, col])
    else:
        at_rows = row + tl.arange(0, HEIGHT)
        at_cols = col + tl.arange(0, WIDTH)
        tile = load(source, at_rows, at_cols, rows, cols, stride)
    return tile


@triton.jit
def multiply(acc, left, right, m0, n0, start, end, M, N, K, stride,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
             TRANSPOSED: tl.constexpr):
    """acc [BM, BN] + the tile at (m0, n0) of left [M, K] times right, over k from start to end.

    right is [K, N], or [N, K] if TRANSPOSED. stride: of left's rows."""
    for k in range(start, end, BK):
        left_tile = block(left, m0, k, M, K, stride, BM, BK, TMA)
        if TRANSPOSED:
            right_tile = block(right, n0, k, N, K, K, BN, BK, TMA).T
        else:
            right_tile = block(right, k, n0, K, N, N, BK, BN, TMA)
        acc = dot(left_tile, right_tile, acc)
    return acc


@triton.jit
def place(number, tiles_m, tiles_n, BM: tl.constexpr, BN: tl.constexpr):
    """(first row, first column) of a tile; eight rows of tiles at a time share the cache."""
    band = number // (8 * tiles_n)
    height = min(tiles_m - band * 8, 8)
    row = (band * 8 + number % (8 * tiles_n) % height) * BM
    column = number % (8 * tiles_n) // height * BN
    return row, column


@triton.jit
def ranks_acting(n0, BN: tl.constexpr, R: tl.constexpr, J: tl.constexpr,
                 S0: tl.constexpr, E0: tl.constexpr, S1: tl.constexpr, E1: tl.constexpr,
                 S2: tl.constexpr, E2: tl.constexpr):
    """(low, high): the ranks of adapters with a column, Si to Ei, among the BN from n0."""
    hit0 = (n0 < E0) & (n0 + BN > S0)
    hit1 = (n0 < E1) & (n0 + BN > S1)
    hit2 = (n0 < E2) & (n0 + BN > S2)
    low = tl.where(hit0, 0, tl.where(hit1, R, tl.where(hit2, 2 * R, J)))
    high = tl.where(hit2, 3 * R, tl.where(hit1, 2 * R, tl.where(hit0, R, 0)))
    return low, high


# ----------------------------------------------------------------------------- tuning
def tuned(configs, key, choose, **how):
    """Choose a kernel's config by measurement, once a key, and keep it in Triton's cache on disk.

    choose(configs, named arguments, **others) leaves those that fit a call."""
    if INTERPRETED:
        configs = configs[:1]
    return triton.autotune(configs, key=key, cache_results=True,
                           prune_configs_by=dict(early_config_prune=choose), **how)


def is_half(named):
    """Is the x of a call in half precision?"""
    return named["x"].dtype != torch.float32


# ----------------------------------------------------------------------------- down: P
# What spills registers on one of the chips is left out; fp32 has no tensor cores here, so its
# operands take registers.
DOWN = [Config(dict(BK=64), num_warps=8, num_stages=4),
        Config(dict(BK=32), num_warps=4, num_stages=4),
        Config(dict(BK=32), num_warps=4, num_stages=2)]
DOWN_FP32 = [Config(dict(BK=16), num_warps=8, num_stages=3)]


def down_configs(configs, named, **others):
    return DOWN if is_half(named) else DOWN_FP32


@tuned([*DOWN, *DOWN_FP32], ["bucket", "K", "G", "R", "DROP"], down_configs)
@triton.jit
def down_kernel(x, a, out, seeds, T, K, sx, span, limit, bucket,
                G: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [parts, T, G R]: dropout_i(x) A_i^T side by side, over `span` columns of x a part.

    x [T, K], its rows sx apart; a [G R, K]. A program makes BM rows and BN ranks of every adapter,
    from one tile of x."""
    # where this program's tile and part of the sum are
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    start = tl.program_id(2) * span
    acc0 = tl.zeros([BM, BN], tl.float32)
    acc1 = tl.zeros([BM, BN], tl.float32)
    acc2 = tl.zeros([BM, BN], tl.float32)
    for k in range(start, min(start + span, K), BK):
        cols = k + tl.arange(0, BK)
        tile = load(x, rows, cols, T, K, sx)
        # A_i^T [BK, BN], R rows of a further for each adapter
        at = a + ranks[None, :] * K + cols[:, None]
        inside = (cols < K)[:, None]
        kept = keep(tile, rows, cols, K, seeds, 0, limit, DROP)
        acc0 = dot(kept, tl.load(at, mask=inside, other=0.0), acc0)
        if G > 1:
            kept = keep(tile, rows, cols, K, seeds, 1, limit, DROP)
            acc1 = dot(kept, tl.load(at + R * K, mask=inside, other=0.0), acc1)
        if G > 2:
            kept = keep(tile, rows, cols, K, seeds, 2, limit, DROP)
            acc2 = dot(kept, tl.load(at + 2 * R * K, mask=inside, other=0.0), acc2)
    # each adapter's ranks beside the others'
    out += part.to(tl.int64) * T * (G * R)
    store_each(out, R, acc0, acc1, acc2, rows, ranks, T, R, G * R, G)


# ----------------------------------------------------------------------------- reduce: dA; Q, dB
RIGHT = [Config(dict(BT=32), num_warps=8, num_stages=4),
         Config(dict(BT=32), num_warps=8, num_stages=2)]
RIGHT_FP32 = [Config(dict(BT=16), num_warps=8, num_stages=3)]
BOTH = [Config(dict(BT=64), num_warps=8, num_stages=3),
        Config(dict(BT=64), num_warps=4, num_stages=3)]
BOTH_FP32 = [Config(dict(BT=32), num_warps=8, num_stages=2),
             Config(dict(BT=16), num_warps=8, num_stages=2)]


def reduce_configs(configs, named, LEFT, **others):
    if LEFT:
        return BOTH if is_half(named) else BOTH_FP32
    return RIGHT if is_half(named) else RIGHT_FP32


@tuned([*RIGHT, *RIGHT_FP32, *BOTH, *BOTH_FP32],
       ["bucket", "K", "J", "G", "DROP", "LEFT", "BN"], reduce_configs)
@triton.jit
def reduce_kernel(x, u, v, out, left, seeds, strips, T, K, J, sx, span, limit, scale, bucket,
                  G: tl.constexpr, R: tl.constexpr, DROP: tl.constexpr, LEFT: tl.constexpr,
                  BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    """Sums over rows of x [T, ..], `span` rows a part, for a strip of BN columns of x and BR ranks.

    LEFT False: out [parts, J, K] = u_i^T dropout_i(x), for G adapters from one tile of x; u [T, J].
    LEFT True: a strip of x belongs to one adapter; strips, a table [.., 4], has its first column,
    end, adapter, and row of out: out [parts, K, R] = scale x_i^T u_i, and left [strips, T, R] = the
    strip's part of scale x_i v_i; v [.., J]."""
    strip = tl.program_id(0)
    part = tl.program_id(2)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)

    # columns `first` to `end` of x, and where this adapter's ranks stand in u and v
    if LEFT:
        first = tl.load(strips + 4 * strip)
        end = tl.load(strips + 4 * strip + 1)
        column = tl.load(strips + 4 * strip + 2) * R + ranks
        row = tl.load(strips + 4 * strip + 3)
    else:
        first = strip * BN
        end = K
        column = ranks
        row = 0
    cols = first + tl.arange(0, BN)
    if LEFT:
        of_strip = (cols < end)[:, None]
        v_strip = tl.load(v + cols[:, None] * J + column[None, :], mask=of_strip, other=0.0)

    # sums over this part's rows, BT at a time
    acc0 = tl.zeros([BR, BN], tl.float32)
    acc1 = tl.zeros([BR, BN], tl.float32)
    acc2 = tl.zeros([BR, BN], tl.float32)
    for t in range(part * span, min(part * span + span, T), BT):
        rows = t + tl.arange(0, BT)
        tile = load(x, rows, cols, T, end, sx)
        # u_i^T [BR, BT], R columns of u further for each adapter
        at = u + rows[None, :] * J + column[:, None]
        inside = (rows < T)[None, :]
        u_0 = tl.load(at, mask=inside, other=0.0)
        acc0 = dot(u_0, keep(tile, rows, cols, K, seeds, 0, limit, DROP), acc0)
        if G > 1:
            u_1 = tl.load(at + R, mask=inside, other=0.0)
            acc1 = dot(u_1, keep(tile, rows, cols, K, seeds, 1, limit, DROP), acc1)
        if G > 2:
            u_2 = tl.load(at + 2 * R, mask=inside, other=0.0)
            acc2 = dot(u_2, keep(tile, rows, cols, K, seeds, 2, limit, DROP), acc2)
        if LEFT:
            q = dot(tile, v_strip, tl.zeros([BT, BR], tl.float32))
            store(left + strip.to(tl.int64) * T * R, q * scale, rows, ranks, T, R, R, 1)

    if LEFT:
        out += (part * K + row) * R
        store(out, acc0 * scale, ranks, tl.arange(0, BN), R, end - first, 1, R)
    else:
        out += part.to(tl.int64) * J * K
        store_each(out, R * K, acc0, acc1, acc2, ranks, cols, R, K, K, G)


# ----------------------------------------------------------------------------- gemm: y, or dx
def tile_config(BM, BN, BK, TMA, warps, stages, maxnreg=None):
    return Config(dict(BM=BM, BN=BN, BK=BK, TMA=TMA), num_warps=warps, num_stages=stages,
                  maxnreg=maxnreg)


# the first would be given 80 registers for rank 32 on sm_100, and spill
ADDED = [tile_config(64, 64, 64, False, 4, 2, maxnreg=224),
         tile_config(64, 128, 64, False, 8, 2),
         tile_config(128, 128, 64, False, 8, 2)]
PLAIN = [tile_config(128, 128, 32, False, 8, 4),
         tile_config(64, 128, 64, False, 8, 3)]
PERSISTENT = [tile_config(128, 128, 64, True, 8, 3),
              tile_config(128, 128, 64, True, 4, 3),
              tile_config(128, 256, 64, True, 8, 4)]
FP32 = [tile_config(64, 32, 16, False, 8, 2, maxnreg=224)]


def applicable(G, DROP, ADD, HALF, TMA_FITS):
    """The configs of gemm_kernel that fit a call."""
    if not HALF:
        return FP32
    if ADD:
        return ADDED
    fitting = []
    candidates = PERSISTENT if TMA_FITS else PLAIN
    for config in candidates:
        # registers of a thread, beside pointers, for accumulators
        room = 128 if config.kwargs["TMA"] else 64
        if DROP and G > 1:  # with masks each adapter's term has an accumulator beside the sum
            room = room // 2
        tile = config.kwargs["BM"] * config.kwargs["BN"]
        if tile <= room * 32 * config.num_warps:
            fitting.append(config)
    return fitting


def gemm_configs(configs, named, G, DROP, ADD, HALF, TMA_FITS, **others):
    return applicable(G, DROP, ADD, HALF, TMA_FITS)


@tuned([*ADDED, *PLAIN, *PERSISTENT, *FP32],
       ["bucket", "N", "K", "G", "R", "BACK", "DROP", "ADD", "HALF", "TMA_FITS"], gemm_configs,
       restore_value=["out"])
@triton.jit
def gemm_kernel(x, w, u, v, out, seeds, M, N, K, sx, limit, scale, bucket,
                G: tl.constexpr, R: tl.constexpr,
                S0: tl.constexpr, E0: tl.constexpr, S1: tl.constexpr, E1: tl.constexpr,
                S2: tl.constexpr, E2: tl.constexpr,
                BACK: tl.constexpr, DROP: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr,
                TMA_FITS: tl.constexpr, BR: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """out [M, N] = x [M, K] times W, plus the low-rank term, in one fp32 accumulator; u [M, G R].

    Forward: w [N, K], v [N, G R], out = x w^T + scale u v^T; adapter i acts on columns Si to Ei,
    the rest of v is zero.
    BACK: w [K, N], v [G R, N], out = x w + sum of mask_i * (u_i v_i), without masks if not DROP.
    ADD: out already holds the product with W. TMA: tiles move by descriptors; there the grid is
    what fits on the GPU at once, one program a multiprocessor or two, each with many tiles."""
    J: tl.constexpr = G * R
    # descriptors of x, u, w and v, or their pointers
    if TMA:
        xs = tl.make_tensor_descriptor(x, [M, K], [sx, 1], [BM, BK])
        us = tl.make_tensor_descriptor(u, [M, J], [J, 1], [BM, BR])
        if BACK:
            ws = tl.make_tensor_descriptor(w, [K, N], [N, 1], [BK, BN])
            vs = tl.make_tensor_descriptor(v, [J, N], [N, 1], [BR, BN])
        else:
            ws = tl.make_tensor_descriptor(w, [N, K], [K, 1], [BN, BK])
            vs = tl.make_tensor_descriptor(v, [N, J], [J, 1], [BN, BR])
    else:
        xs = x
        us = u
        ws = w
        vs = v

    # this program's tiles
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for number in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m0, n0 = place(number, tiles_m, tiles_n, BM, BN)
        m = m0 + tl.arange(0, BM)
        n = n0 + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)

        # the low-rank term
        if BACK and DROP:
            for i in range(G):
                term = tl.zeros([BM, BN], tl.float32)
                term = multiply(term, us, vs, m0, n0, i * R, i * R + R, M, N, J, J,
                                BM, BN, BR, TMA, False)
                acc += keep(term, m, n, N, seeds, i, limit, True)
        elif BACK:
            acc = multiply(acc, us, vs, m0, n0, 0, J, M, N, J, J, BM, BN, BR, TMA, False)
        else:
            low, high = ranks_acting(n0, BN, R, J, S0, E0, S1, E1, S2, E2)
            acc = multiply(acc, us, vs, m0, n0, low, high, M, N, J, J, BM, BN, BR, TMA, True)
            acc *= scale

        # the product with W
        if ADD:
            acc += block(out, m0, n0, M, N, N, BM, BN, False).to(tl.float32)
        else:
            acc = multiply(acc, xs, ws, m0, n0, 0, K, M, N, K, sx, BM, BN, BK, TMA, not BACK)
        store(out, acc, m, n, M, N, N, 1)
