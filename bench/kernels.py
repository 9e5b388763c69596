"""
LoRA's products alone, forward and backward, by projection group, rank and number of tokens.

    x [tokens, K] --> W [N, K] ----------------------> + --> y [tokens, N]
        |                                              |
        +--> dropout --> A [rank, K] --> B [rows, rank]      for each projection of the group

    plain    the product with W alone, the floor; it has no dropout
    peft     what peft computes, eagerly
    torch    the path of lora.py
    fused    llama/lora_kernels.py, the low-rank term inside the product with W
    added    llama/lora_kernels.py, the low-rank term added to it

    python -m bench.kernels                    # Llama-2's shapes on a GPU; on a CPU a tiny one
    python -m bench.kernels --shapes=7b --ranks=16 --rows=8192,1024 --out=kernels.json

TFLOP/s counts the true number of operations, GB/s x, W and y once in each direction. The error is
the largest of y, dx, dA and dB against float64, by norm, without dropout.
"""
import itertools
import statistics
import time
import traceback
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.sides import Settings, clock, print_machine, write_results
from configurator import configure, knob_table
from llama.lora_matmul import lora_matmul, milliseconds
from runtime import one_line_errors, pick_device

# -----------------------------------------------------------------------------
shapes = ()              # 7b, 13b, 70b: Llama-2's; tiny; none = Llama-2's on a GPU, tiny on a CPU
ranks = (16, 64, 256)
rows = (8192,)           # tokens at once
lora_dropout = 0.05
compile = True           # torch.compile of the torch path on a GPU, as in training
repeats = 3              # rounds on a CPU, the median counts; a GPU takes ten
stop_after = 0           # seconds after which no further group is begun; 0 = none
dtype = 'bfloat16'
device = 'auto'          # auto | cpu | cuda | cuda:N
out = ''                 # also write the results to this JSON file, as they come
_choices = {'shapes': ('7b', '13b', '70b', 'tiny'), 'dtype': ('float32', 'float16', 'bfloat16')}

# hidden size, rows of k and of v, intermediate size
SHAPES = {"7b": (4096, 4096, 11008), "13b": (5120, 5120, 13824), "70b": (8192, 1024, 28672),
          "tiny": (64, 32, 160)}
SCALE = 2.0  # alpha / rank


class Group(NamedTuple):
    """Projections that read the same x."""
    name: str
    sizes: tuple   # rows of each projection
    K: int         # columns

    def spans(self):
        """First row and end of each projection."""
        ends = itertools.accumulate(self.sizes)
        return tuple((end - size, end) for size, end in zip(self.sizes, ends))


def groups_of(shape):
    hidden, kv, intermediate = SHAPES[shape]
    return (Group("qkv", (hidden, kv, kv), hidden),
            Group("o", (hidden,), hidden),
            Group("gate_up", (intermediate, intermediate), hidden),
            Group("down", (hidden,), intermediate))


# ----------------------------------------------------------------------------- the products
class Product:
    """y = f(x) of one variant for a group."""

    def __init__(self, variant, spans, compiled):
        self.variant = variant
        self.spans = spans
        self.matmul = torch.compile(lora_matmul, dynamic=False) if compiled else lora_matmul
        self.seeds = torch.zeros(len(spans), 2, dtype=torch.int32)

    def forward(self, x, W, A, B, p):
        if self.variant == "plain":
            return x @ W.T
        if self.variant == "peft":
            return peft_matmul(x, W, A, B, self.spans, p)
        return self.matmul(self.variant, x, W, A, B, self.spans, SCALE, p, self.seeds)

    def forward_backward(self, x, W, A, B, dy, p):
        """y, dx, and dA and dB where there are adapters."""
        x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
        y = self.forward(x, W, A, B, p)
        inputs = (x,) if self.variant == "plain" else (x, A, B)
        gradients = torch.autograd.grad(y, inputs, dy)
        return y, *gradients


def peft_matmul(x, W, A, B, spans, p):
    """What peft computes for a group: a linear, a dropout and two small linears a projection."""
    sizes = [end - start for start, end in spans]
    rank = B.shape[1]
    outputs = []
    for w, a, b in zip(W.split(sizes), A.split(rank), B.split(sizes)):
        y = F.linear(x, w)
        low_rank = F.linear(F.linear(F.dropout(x, p), a), b)
        outputs.append(y + low_rank * SCALE)
    return torch.cat(outputs, -1)


# ----------------------------------------------------------------------------- measuring
def median_ms(run, settings):
    """Milliseconds of run(), the median over its rounds."""
    if settings.device.type == "cuda":
        return milliseconds(run)
    times = []
    for _ in range(settings.repeats):
        started = clock(settings.device)
        run()
        times.append(clock(settings.device) - started)
    return 1e3 * statistics.median(times)


def random_operands(variant, group, rank, tokens, settings):
    """x, W, A, B and dy of a group; A and B are fp32, but peft's in its dtype, which is faster."""
    generator = torch.Generator(settings.device).manual_seed(0)
    how = {"generator": generator, "device": settings.device}
    dtype = settings.dtype
    N = sum(group.sizes)
    K = group.K
    # scaled so that all products are of the size of x
    x = torch.randn(tokens, K, **how)
    W = torch.randn(N, K, **how) / K ** 0.5
    dy = torch.randn(tokens, N, **how)
    A = torch.randn(len(group.sizes) * rank, K, **how) / K ** 0.5
    B = torch.randn(N, rank, **how) / rank ** 0.5
    if variant == "peft":
        A = A.to(dtype)
        B = B.to(dtype)
    return x.to(dtype), W.to(dtype), A, B, dy.to(dtype)


def measure_variant(variant, group, rank, tokens, settings):
    """Times of a group's forward and backward, rates, and the error."""
    # what is computed
    operands = random_operands(variant, group, rank, tokens, settings)
    x, W, A, B, dy = operands
    torch.compiler.reset()
    compiled = settings.compile and settings.device.type == "cuda" and variant == "torch"
    product = Product(variant, group.spans(), compiled)

    # time
    def forward():
        with torch.no_grad():
            product.forward(x, W, A, B, settings.lora_dropout)

    def forward_backward():
        product.forward_backward(x, W, A, B, dy, settings.lora_dropout)

    ms_forward = median_ms(forward, settings)
    ms_both = median_ms(forward_backward, settings)

    # operations: W is used for y and dx; A and B are for y, dx and their own gradients
    N, K = W.shape
    operations = 2 * (2 * tokens * N * K)
    if variant != "plain":
        operations += 3 * (2 * tokens * rank * (len(group.sizes) * K + N))
    # bytes of x, W and y in both directions
    moved = 2 * (tokens * K + N * K + tokens * N) * x.itemsize
    return {"forward_ms": ms_forward, "backward_ms": ms_both - ms_forward,
            "tflops": operations / ms_both / 1e9, "gb_per_s": moved / ms_both / 1e6,
            "error": largest_error(product, operands)}


def largest_error(product, operands):
    """Of y, dx, dA and dB for at most 512 rows, against float64, by norm, without dropout."""
    x, W, A, B, dy = operands
    operands = (x[:512], W, A, B, dy[:512])
    in_fp64 = [tensor.double() for tensor in operands]
    exact = Product("plain" if product.variant == "plain" else "peft", product.spans, False)
    # the same operands through the plain formulas
    found = product.forward_backward(*operands, 0.0)
    wanted = exact.forward_backward(*in_fp64, 0.0)
    errors = []
    for tensor, want in zip(found, wanted):
        error = (tensor.double() - want).norm() / want.norm()
        errors.append(error.item())
    return max(errors)


def variants_here(settings):
    """Names of the variants that can run here."""
    try:
        from llama import lora_operators
        lora_operators.check(settings.dtype, settings.device)
    except (ImportError, ValueError) as e:
        print(f"without fused and added: {e}")
        return ("plain", "peft", "torch")
    return ("plain", "peft", "torch", "fused", "added")


def kernel_table(shapes, rows, ranks, settings, stop_after=0):
    """Yield a record for each shape, number of tokens, rank, group and variant; print it as a line.

    A variant that fails is a record that says so, and the next one is measured."""
    # a shape that is not begun in time is left out, with a line that says so
    began = time.perf_counter()
    variants = variants_here(settings)
    for shape, tokens in itertools.product(shapes, rows):
        # all ranks of q, k and v come first
        for group, rank in itertools.product(groups_of(shape), ranks):
            if stop_after and time.perf_counter() - began > stop_after:
                print(f"not begun within {stop_after} s: {shape} {group.name} tokens {tokens} "
                      f"r={rank}")
                continue
            # the first variant, plain, is what the others are compared to
            floor = None
            for variant in variants:
                record = {"shape": shape, "group": group.name, "variant": variant,
                          "N": sum(group.sizes), "K": group.K, "rank": rank, "tokens": tokens}
                line = f"{shape:4} {group.name:7} tokens {tokens:5} r={rank:<3} {variant:5}"
                try:
                    found = measure_variant(variant, group, rank, tokens, settings)
                except Exception as e:  # whatever it is, it must not cost the other variants
                    traceback.print_exc()
                    print(f"{line}  FAILED: {type(e).__name__}", flush=True)
                    why = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                    yield {**record, "failed": why}
                    continue
                ms = found["forward_ms"] + found["backward_ms"]
                if variant == "plain":
                    floor = ms
                print(f"{line}  {kernel_figures(found, ms, floor)}", flush=True)
                yield {**record, **found}


def kernel_figures(found, ms, floor):
    """A record in words; floor: milliseconds of plain, or None where it failed."""
    above = f"{ms / floor - 1:+7.1%} of plain  " if floor else ""
    return (f"forward {found['forward_ms']:8.3f} ms  backward {found['backward_ms']:8.3f} ms  "
            f"{above}{found['tflops']:6.1f} TFLOP/s  {found['gb_per_s']:6.0f} GB/s  "
            f"error {found['error']:.1e}")


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)

        # a CPU shows only that the script runs
        on_cpu = device.type == "cpu"
        if not shapes:
            shapes = ("tiny",) if on_cpu else ("7b", "13b", "70b")
        if on_cpu and set(shapes) != {"tiny"}:
            raise ValueError(f"shapes={','.join(shapes)}: these need a GPU; "
                             "--shapes=tiny runs on a CPU")
        print(knob_table(globals()))
        print_machine(device)
        if on_cpu:
            print("times on a CPU say nothing about a GPU")

        settings = Settings(device, getattr(torch, dtype), repeats, compile, lora_dropout)
        # the table, written line by line
        records = []
        for record in kernel_table(shapes, rows, ranks, settings, stop_after):
            records.append(record)
            write_results(out, config, device, {"kernels": records})
        failed = sum("failed" in record for record in records)
        if failed:
            raise SystemExit(f"{failed} of {len(records)} variants failed")
