"""lora_kernels.py: its cases in Triton's interpreter or on a GPU, and what its kernels compile to without one."""
import itertools
import re
import subprocess
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, run_stage

pytest.importorskip("triton", reason="needs Triton")
from llama import lora_kernels as lk  # noqa: E402
from llama import lora_operators  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile as triton_compile  # noqa: E402
from triton.knobs import nvidia  # noqa: E402

from llama.lora_matmul import choose_kernel, time_kernel  # noqa: E402
from lora import apply_lora  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

SHARED_KB = {80: 163, 90: 227, 100: 227}


def cases_pass(*options, **env):
    """Run kernel_cases.py in a process of its own, which may be told of the interpreter before it imports Triton."""
    done = run_stage("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, ROOT / "tests" / "kernel_cases.py", timeout=900,
                     OMP_NUM_THREADS=1, **env)
    assert done.returncode == 0 and int(re.search(r"(\d+) passed", done.stdout)[1]) > 50, done.stdout + done.stderr


@pytest.mark.slow
def test_in_the_interpreter():
    cases_pass(TRITON_INTERPRET=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    cases_pass(*["-n", "8"] * (find_spec("xdist") is not None))  # compiling takes most of the time


def test_kernels_asked_for_that_cannot_run_are_an_error():
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    model = apply_lora(Llama(config), 4, 8)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="lora_kernel=triton: the kernels need a GPU, found device=cpu"):
        choose_kernel(model, "triton", 18, torch.float32, cpu)
    assert choose_kernel(model, "auto", 18, torch.float32, cpu) == choose_kernel(model, "torch", 18, torch.float32, cpu) == []
    assert {m.kernel for m in model.modules() if hasattr(m, "lora_A")} == {"torch"}


@pytest.mark.parametrize("kernel, names", [("auto", ["torch", "fused", "added"]), ("triton", ["fused", "added"])])
def test_the_fastest_is_chosen_for_each_group_by_itself(kernel, names, monkeypatch):
    """As on a GPU, with a clock of our own: one measurement of a variant for each kind of group, not for each block."""
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    model, asked = apply_lora(Llama(config), 4, 8, 0.05), []

    def clock(name, shape, spans, rank, p, rows, dtype, device, compiled):
        asked.append((name, shape))
        assert (rank, p, rows, dtype, compiled) == (4, 0.05, 18, torch.bfloat16, True)
        return {"torch": 2.0 if shape == (64, 32) else 0.5, "fused": 1.0, "added": 3.0 - len(spans)}[name]

    monkeypatch.setattr("llama.lora_matmul.time_kernel", clock)
    monkeypatch.setattr(lora_operators, "check", lambda dtype, device: None)
    lines = choose_kernel(model, kernel, 18, torch.bfloat16, torch.device("cuda"), True)
    assert sorted(asked) == sorted((n, s) for n in names for s in [(64, 32), (32, 32), (96, 32), (32, 48)])
    block, other = model.layers[2], "torch" if kernel == "auto" else "fused"
    found = [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj]
    assert [m.kernel for m in found] == ["added", other, other, other]
    assert len(lines) == 4 and "64 x 32, 3 adapters of rank 4: added" in lines[0] and "added 0.000" in lines[0]


def test_every_variant_is_measured_compiled(monkeypatch):
    """Groups and kernels are variants of one function to the compiler, which runs the ninth uncompiled unless told anew."""
    monkeypatch.setattr("llama.lora_matmul.milliseconds", lambda run: len(run()))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for N, K, n in itertools.product((12, 24, 36), (8, 10), (1, 2)):
            spans = tuple((i * N // n, (i + 1) * N // n) for i in range(n))
            assert time_kernel("torch", (N, K), spans, 2, 0.05, 5, torch.float32, torch.device("cpu"), True) == 3


# ----------------------------------------------------------------------------- ahead of time
TYPES = {"left": "*fp32", "seeds": "*i32", "strips": "*i32", "scale": "fp32"}
QKV = dict(S0=0, E0=4096, S1=4096, E1=8192, S2=8192, E2=12288, HALF=True, TMA_FITS=True)  # Llama-2-7B's


def compiled(kernel, config, arch, dtype="bf16", **constants):
    """The kernel compiled for a chip, all sizes and pointers multiples of 16."""
    fn, constants = kernel.fn, {**constants, **config.kwargs}
    types = {**TYPES, **dict.fromkeys(("out", "x", "a", "u", "v", "w"), f"*{dtype}")}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in fn.arg_names}
    if kernel is lk.reduce_kernel:
        signature["out"] = "*fp32"
    even = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(signature.items())
            if t[0] == "*" or t == "i32" and n not in ("limit", "bucket")}
    return triton_compile(ASTSource(fn, signature, constants, even), target=GPUTarget("cuda", arch, 32),
                          options={name: value for name, value in vars(config).items()
                                   if name in ("num_warps", "num_stages", "maxnreg") and value})


def fits(kernel, arch, tmp_path):
    """No spills (no stack, no local memory) and no more shared memory than the chip has; returns the PTX."""
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"], text=True, check=True,
                           capture_output=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert "LOCAL:0" in usage and stack == 0 and 0 < registers <= 255, usage
    assert kernel.metadata.shared <= SHARED_KB[arch] * 1024, kernel.metadata.shared
    return kernel.asm["ptx"]


PIECES = {
    "down": (lk.down_kernel, lk.DOWN[0], dict(G=3, R=16, DROP=True, BM=64, BN=16)),
    "down r=256": (lk.down_kernel, lk.DOWN[0], dict(G=3, R=256, DROP=True, BM=64, BN=64)),
    "dA": (lk.reduce_kernel, lk.RIGHT[0], dict(G=3, R=16, DROP=True, LEFT=False, BN=128, BR=16)),
    "dA r=256": (lk.reduce_kernel, lk.RIGHT[0], dict(G=3, R=256, DROP=True, LEFT=False, BN=128, BR=64)),
    "Q and dB": (lk.reduce_kernel, lk.BOTH[0], dict(G=1, R=32, DROP=False, LEFT=True, BR=32)),
    "added": (lk.gemm_kernel, lk.ADDED[1], dict(G=3, R=16, BR=16, BACK=True, DROP=True, ADD=True, **QKV))}
PRODUCTS = {
    "forward": dict(G=3, R=256, BR=64, BACK=False, DROP=False, ADD=False, **QKV),
    "backward": dict(G=3, R=16, BR=16, BACK=True, DROP=True, ADD=False, **QKV)}


@pytest.mark.parametrize("arch", SHARED_KB)
@pytest.mark.parametrize("name", PIECES)
def test_small_kernels_compile_without_spills(name, arch, tmp_path):
    kernel, config, constants = PIECES[name]
    if name == "Q and dB":
        constants = dict(constants, BN=128 if arch < 90 else 256)
    for dtype in ("bf16", "fp16") if arch == 90 else ("bf16",):
        fits(compiled(kernel, config, arch, dtype, **constants), arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("G, R", [(3, 16), (3, 32), (3, 256)])
@pytest.mark.parametrize("arch", SHARED_KB)
def test_fp32_kernels_compile_without_spills_and_round_nothing_to_tf32(arch, G, R, tmp_path):
    """Every config that fp32 is given, with the pieces of the rank that it is given."""
    chunk = lora_operators.piece_of(lora_operators.padded_rank(R)[1], torch.float32)
    whole = dict(G=G, R=R, **{**QKV, "HALF": False, "TMA_FITS": False})
    cases = [(lk.down_kernel, lk.DOWN_FP32, dict(G=G, R=R, DROP=True, BM=lora_operators.ROWS, BN=chunk)),
             (lk.reduce_kernel, lk.RIGHT_FP32, dict(G=G, R=R, DROP=True, LEFT=False, BN=lora_operators.COLUMNS, BR=chunk))]
    if R <= lora_operators.FUSED_RANK:
        cases.append((lk.reduce_kernel, lk.BOTH_FP32, dict(G=1, R=R, DROP=False, LEFT=True, BN=lora_operators.COLUMNS, BR=R)))
    cases += [(lk.gemm_kernel, lk.FP32, dict(whole, BR=chunk, BACK=back, DROP=drop, ADD=add))
              for back, drop in ((False, False), (True, False), (True, True)) for add in (False, True)]
    for kernel, configs, constants in cases:
        for config in configs:
            ptx = fits(compiled(kernel, config, arch, "fp32", **constants), arch, tmp_path)
            assert "tf32" not in ptx and "mma" not in ptx and "fma.rn.f32" in ptx


@pytest.mark.parametrize("arch", SHARED_KB)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_compile_to_the_chips_own_instructions(name, arch, tmp_path):
    instructions = {80: ["mma.sync", "cp.async"], 90: ["wgmma", "cp.async.bulk.tensor"],
                    100: ["tcgen05.mma", "cp.async.bulk.tensor"]}[arch]
    configs = lk.applicable(3, PRODUCTS[name]["DROP"], False, True, arch >= 90)
    assert configs
    for config in configs:
        ptx = fits(compiled(lk.gemm_kernel, config, arch, **PRODUCTS[name]), arch, tmp_path)
        assert all(instruction in ptx for instruction in instructions)
