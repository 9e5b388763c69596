"""
LoRA's products alone, forward and backward, for the projection groups of a Llama, rank and number of tokens.

    python -m bench.kernels                                    # Llama-2's shapes on a GPU; on a CPU a tiny one
    python -m bench.kernels --shapes=7b --ranks=16 --rows=8192,1024 --out=kernels.json

Variants: plain is the two products with W alone, the floor; peft what peft computes, eagerly; torch the path of lora.py;
fused and added the kernels of llama/lora_kernels.py. All but plain with dropout. TFLOP/s counts the true number of operations,
GB/s x, W and y once in each direction; error is the largest of y, dx, dA and dB against float64, by norm, without dropout.
"""
import itertools
import json
import statistics
import time
import traceback

import torch
import torch.nn.functional as F

from bench.train import alternate
from configurator import configure, knob_table
from llama.lora_matmul import lora_matmul, milliseconds
from runtime import device_name, one_line_errors, pick_device, versions, write_whole

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
out = ''                 # also write the results to this JSON file, group by group
_choices = {'shapes': ('7b', '13b', '70b', 'tiny'), 'dtype': ('float32', 'float16', 'bfloat16')}

# hidden size, rows of k and of v, intermediate size
SHAPES = {"7b": (4096, 4096, 11008), "13b": (5120, 5120, 13824), "70b": (8192, 1024, 28672), "tiny": (64, 32, 160)}


def peft_matmul(x, W, A, B, spans, scale, p):
    """What peft computes for a group, eagerly: a linear, a dropout and two small linears for each projection."""
    parts = zip(W.split([end - start for start, end in spans]), A.split(B.shape[1]), B.split([e - s for s, e in spans]))
    return torch.cat([F.linear(x, w) + F.linear(F.linear(F.dropout(x, p), a), b) * scale for w, a, b in parts], -1)


def plain_matmul(x, W, A, B, spans, scale, p):
    return x @ W.T


def measure(name, N, K, spans, rank, T):
    """One line of the table: times of a group's forward and backward, rates, and the error for at most 512 rows."""
    generator, how = torch.Generator(device).manual_seed(0), dict(device=device, dtype=getattr(torch, dtype))
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)
    x, W, dy = draw(T, K).to(**how), (draw(N, K) / K ** 0.5).to(**how), draw(T, N).to(**how)
    A, B = draw(len(spans) * rank, K) / K ** 0.5, draw(N, rank) / rank ** 0.5  # fp32, except peft's, its fastest
    if name == "peft":
        A, B = A.to(**how), B.to(**how)
    cuda = torch.device(device).type == "cuda"
    torch.compiler.reset()
    ours = torch.compile(lora_matmul, dynamic=False) if compile and cuda and name == "torch" else lora_matmul
    seeds = torch.zeros(len(spans), 2, dtype=torch.int32)
    product = {"plain": plain_matmul, "peft": peft_matmul}.get(name, lambda *operands: ours(name, *operands, seeds))

    def gradients(x, W, A, B, dy, p, product):
        wanted = [t.detach().requires_grad_() for t in (x, A, B)][:1 if name == "plain" else 3]
        y = product(wanted[0], W, *(wanted[1:] or (A, B)), spans, 2.0, p)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    timed = milliseconds if cuda else lambda run: 1e3 * statistics.median(alternate({0: run}, repeats, device)[0])
    with torch.no_grad():
        ms = timed(lambda: product(x, W, A, B, spans, 2.0, lora_dropout))
    both = timed(lambda: gradients(x, W, A, B, dy, lora_dropout, product))
    few = x[:512], W, A, B, dy[:512]
    want = gradients(*(t.double() for t in few), 0.0, plain_matmul if name == "plain" else peft_matmul)
    flops, moved = 2 * T * N * K, (T * K + N * K + T * N) * x.itemsize
    small = 0 if name == "plain" else 2 * T * rank * (len(spans) * K + N)
    return {"forward_ms": ms, "backward_ms": both - ms,
            "tflops": (2 * flops + 3 * small) / both / 1e9, "gb_per_s": 2 * moved / both / 1e6,
            "error": max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(gradients(*few, 0.0, product), want))}


def variants():
    """Names of the variants that can run here."""
    try:
        from llama import lora_operators
        lora_operators.check(getattr(torch, dtype), torch.device(device))
        return "plain", "peft", "torch", "fused", "added"
    except (ImportError, ValueError) as e:
        print(f"without fused and added: {e}")
        return "plain", "peft", "torch"


def table():
    """Yield a record for each shape, number of tokens, rank, group and variant, and print it as a line.

    A variant that fails is a record that says so, and the next one is measured."""
    began, names = time.perf_counter(), variants()
    for shape, T, rank in itertools.product(shapes, rows, ranks):
        d, kv, ff = SHAPES[shape]
        for group, sizes, K in (("qkv", (d, kv, kv), d), ("o", (d,), d), ("gate_up", (ff, ff), d), ("down", (d,), ff)):
            if stop_after and time.perf_counter() - began > stop_after:
                print(f"not begun within {stop_after} s: {shape} {group} tokens {T} r={rank}")
                continue
            spans, floor = tuple((end - n, end) for n, end in zip(sizes, itertools.accumulate(sizes))), None
            for name in names:
                record = {"shape": shape, "group": group, "variant": name, "N": sum(sizes), "K": K, "rank": rank, "tokens": T}
                line = f"{shape:4} {group:7} tokens {T:5} r={rank:<3} {name:5}"
                try:
                    found = measure(name, sum(sizes), K, spans, rank, T)
                except Exception as e:  # whatever it is, it must not cost the other variants
                    traceback.print_exc()
                    print(f"{line}  FAILED: {type(e).__name__}", flush=True)
                    yield {**record, "failed": " ".join(f"{type(e).__name__}: {e}".split())[:300]}
                    continue
                total = found["forward_ms"] + found["backward_ms"]
                floor = total if name == "plain" else floor
                print(f"{line}  forward {found['forward_ms']:8.3f} ms  backward {found['backward_ms']:8.3f} ms  " +
                      (f"{total / floor - 1:+7.1%} of plain  " if floor else "") + f"{found['tflops']:6.1f} TFLOP/s  "
                      f"{found['gb_per_s']:6.0f} GB/s  error {found['error']:.1e}", flush=True)
                yield {**record, **found}


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        device = pick_device(device)
        on_cpu = device.type == "cpu"
        shapes = shapes or (("tiny",) if on_cpu else ("7b", "13b", "70b"))
        if on_cpu and set(shapes) != {"tiny"}:
            raise ValueError(f"shapes={','.join(shapes)}: these need a GPU; --shapes=tiny runs on a CPU")
        print(knob_table(globals()))
        print(f"{device_name(device)}, {versions()}" + "; times on a CPU say nothing of a GPU" * on_cpu)
        records, head = [], {"config": {**config, "device": str(device)}, "device": device_name(device), "versions": versions()}
        for found in table():
            records.append(found)
            if out:
                write_whole(out, json.dumps({**head, "results": {"kernels": records}}, indent=1))
        if failed := sum("failed" in record for record in records):
            raise SystemExit(f"{failed} of {len(records)} variants failed")
