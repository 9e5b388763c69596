"""
What the kernels of LoRA compile to, without a GPU: registers, stack, shared memory, instructions.

    python -m bench.compiled                                 # for an H100 or H200
    python -m bench.compiled --arch=80 --ranks=16 --dtype=float32

    kernel                                       regs  stack  shared KB  products  copies
    r=16  y fused  128x256x64, 8 warps, 4 stages  184      0      192.0  5 wgmma   16 TMA

A line is a kernel, for q, k and v of Llama-2-7B, with one of the configs that are measured against
each other before training. Products and copies are instructions in the program's text: of the
tensor cores, or fma, and those that fetch a tile. Stack is what spills from registers; where there
is any, or more shared memory than the chip has, the command fails.
"""
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from triton import __version__ as triton_version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile as triton_compile
from triton.knobs import nvidia

from configurator import configure
from llama import lora_kernels as kernels
from llama.lora_operators import COLUMNS, FUSED_RANK, ROWS, padded_rank, piece_of
from runtime import one_line_errors

# -----------------------------------------------------------------------------
arch = '90'              # compute capability: 80 A100, 90 H100 and H200, 100 B200
ranks = (16, 64, 256)
dtype = 'bfloat16'
_choices = {'arch': ('80', '90', '100'), 'dtype': ('float32', 'float16', 'bfloat16')}

SHARED_KB = {80: 163, 90: 227, 100: 227}  # of a block, at most
# instructions, the chip's own first: of tensor cores, or of none; and those that fetch a tile
PRODUCTS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync",
            "fma.rn.f32": "fma"}
COPIES = {"cp.async.bulk.tensor": "TMA", "cp.async.cg": "cp.async", "cp.async.ca": "cp.async"}
TRITON_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# of the kernels' arguments, the others being integers or of the dtype
TYPES = {"left": "*fp32", "seeds": "*i32", "strips": "*i32", "scale": "fp32"}
# q, k and v of Llama-2-7B: first column and end of each adapter
SPANS = {"S0": 0, "E0": 4096, "S1": 4096, "E1": 8192, "S2": 8192, "E2": 12288}


class Call(NamedTuple):
    """A kernel as lora_operators.py calls it."""
    name: str
    kernel: object
    configs: list      # that tuning chooses from
    constants: dict    # its tl.constexpr arguments


class Usage(NamedTuple):
    """What a compiled kernel takes of a multiprocessor, and its program."""
    registers: int     # of a thread
    stack: int         # bytes of a thread
    shared: int        # bytes of a block
    ptx: str


def kernel_calls(rank, dtype, arch):
    """The calls of a group of three adapters, with dropout's masks and without."""
    R, chunk = padded_rank(rank)
    chunk = piece_of(chunk, dtype)
    half = dtype != torch.float32
    group = {"G": 3, "R": R}
    calls = []
    for masks in (True, False):
        if masks or R <= FUSED_RANK:  # else cuBLAS makes them
            with_masks = " masks" if masks else ""
            calls.append(Call(f"P{with_masks}", kernels.down_kernel,
                              kernels.DOWN if half else kernels.DOWN_FP32,
                              {**group, "DROP": masks, "BM": ROWS, "BN": chunk}))
            calls.append(Call(f"dA{with_masks}", kernels.reduce_kernel,
                              kernels.RIGHT if half else kernels.RIGHT_FP32,
                              {**group, "DROP": masks, "LEFT": False, "BN": COLUMNS, "BR": chunk}))
    if R <= FUSED_RANK:
        width = 2 * COLUMNS if half and arch >= 90 else COLUMNS
        calls.append(Call("Q, dB", kernels.reduce_kernel,
                          kernels.BOTH if half else kernels.BOTH_FP32,
                          {"G": 1, "R": R, "DROP": False, "LEFT": True, "BN": width, "BR": R}))
    for name, back, masks in (("y", False, False), ("dx", True, False), ("dx masks", True, True)):
        for add in (False, True):
            tma = half and not add and arch >= 90
            calls.append(Call(f"{name} {'added' if add else 'fused'}", kernels.gemm_kernel,
                              kernels.applicable(3, masks, add, half, tma),
                              {**group, **SPANS, "BR": chunk, "BACK": back, "DROP": masks,
                               "ADD": add, "HALF": half, "TMA_FITS": tma}))
    return calls


def compile_for(call, config, dtype, arch):
    """Usage of a call with a config; its sizes and pointers are multiples of 16."""
    kernel = call.kernel.fn
    constants = {**call.constants, **config.kwargs}
    # the types of its arguments
    types = dict(TYPES)
    for name in ("out", "x", "a", "u", "v", "w"):
        types[name] = f"*{TRITON_NAMES[dtype]}"
    if call.kernel is kernels.reduce_kernel:
        types["out"] = "*fp32"
    signature = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "i32")
        if name not in ("limit", "bucket", "scale"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.maxnreg:
        options["maxnreg"] = config.maxnreg
    made = triton_compile(ASTSource(kernel, signature, constants, attributes),
                          target=GPUTarget("cuda", arch, 32), options=options)
    # registers and stack, as NVIDIA's tool reads them from the binary
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        told = subprocess.run([nvidia.cuobjdump.path, "-res-usage", cubin], text=True, check=True,
                              capture_output=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", told).groups()
    return Usage(int(registers), int(stack) + int(local), made.metadata.shared, made.asm["ptx"])


def count_first(ptx, names):
    """'12 wgmma': how often the first of the instructions that a program has stands in it."""
    for instruction, name in names.items():
        count = ptx.count(instruction)
        if count:
            return f"{count} {name}"
    return "-"


def config_words(config):
    """'128x256x64, 8 warps, 4 stages' of a config."""
    sizes = [str(size) for name, size in config.kwargs.items() if name != "TMA"]
    return f"{'x'.join(sizes)}, {config.num_warps} warps, {config.num_stages} stages"


def print_table(ranks, dtype, arch):
    """A line for each kernel and config; returns those that spill or need too much memory."""
    print(f"{'kernel':50} regs  stack  shared KB  {'products':13} copies")
    too_large = []
    for rank in ranks:
        for call in kernel_calls(rank, dtype, arch):
            for config in call.configs:
                usage = compile_for(call, config, dtype, arch)
                line = f"r={rank:<3} {call.name:14} {config_words(config)}"
                kilobytes = usage.shared / 1024
                products = count_first(usage.ptx, PRODUCTS)
                copies = count_first(usage.ptx, COPIES)
                print(f"{line:50} {usage.registers:4} {usage.stack:6} {kilobytes:10.1f}  "
                      f"{products:13} {copies}", flush=True)
                if usage.stack or kilobytes > SHARED_KB[arch]:
                    too_large.append(line)
    return too_large


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        arch = int(arch)
        dtype = getattr(torch, dtype)
        print(f"Triton {triton_version}, sm_{arch}, {TRITON_NAMES[dtype]}; a block has at most "
              f"{SHARED_KB[arch]} KB of shared memory, a thread 255 registers")
        too_large = print_table(ranks, dtype, arch)
        if too_large:
            raise SystemExit("spills, or too much shared memory:\n" + "\n".join(too_large))
