"""lora_kernels.py: its cases in Triton's interpreter or on a GPU, and what its kernels compile to without one."""
import itertools
import re
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, run_stage

pytest.importorskip("triton", reason="needs Triton")
from bench import compiled  # noqa: E402
from llama import lora_kernels as lk  # noqa: E402
from llama import lora_operators  # noqa: E402
from llama.lora_matmul import choose_kernel, time_kernel  # noqa: E402
from lora import apply_lora  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402


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
def fits(call, config, dtype, arch):
    """The program of a call with a config, which spills nothing and takes no more shared memory than the chip has."""
    usage = compiled.compile_for(call, config, dtype, arch)
    assert usage.stack == 0 and 0 < usage.registers <= 255, (call.name, config, usage[:3])
    assert usage.shared <= compiled.SHARED_KB[arch] * 1024, (call.name, config, usage[:3])
    return usage.ptx


@pytest.mark.parametrize("arch", compiled.SHARED_KB)
@pytest.mark.parametrize("rank", [16, 32, 256])
def test_kernels_compile_without_spills_to_the_chips_own_instructions(rank, arch):
    """Of the fused products all configs, of the others the first, on an H100 in fp16 as well; bench.compiled goes through all."""
    chips_own = {80: ["mma.sync", "cp.async"], 90: ["wgmma", "cp.async.bulk.tensor"], 100: ["tcgen05.mma", "cp.async.bulk.tensor"]}[arch]
    for call in compiled.kernel_calls(rank, torch.bfloat16, arch):
        fused = call.name.endswith("fused")
        if fused and rank == 32:
            continue
        for config in call.configs if fused else call.configs[:1]:
            ptx = fits(call, config, torch.bfloat16, arch)
            assert not fused or all(instruction in ptx for instruction in chips_own)
        if not fused and arch == 90 and rank == 16:
            fits(call, call.configs[0], torch.float16, arch)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 32, 256])
@pytest.mark.parametrize("arch", compiled.SHARED_KB)
def test_fp32_kernels_compile_without_spills_and_round_nothing_to_tf32(arch, rank):
    for call in compiled.kernel_calls(rank, torch.float32, arch):
        for config in call.configs:
            ptx = fits(call, config, torch.float32, arch)
            assert "tf32" not in ptx and "mma" not in ptx and "fma.rn.f32" in ptx


def test_the_table_names_what_spills(capsys, monkeypatch):
    """A line for each kernel and config; what spills, or needs more memory than the chip has, is returned."""
    assert compiled.print_table([16], torch.float32, 80) == []
    lines = capsys.readouterr().out.splitlines()
    calls = compiled.kernel_calls(16, torch.float32, 80)
    assert len(lines) == 1 + sum(len(call.configs) for call in calls)
    assert all(" fma " in line or line.endswith(" fma") for line in lines[1:])
    small = calls[0]._replace(configs=[lk.Config(dict(BK=16), num_warps=8, num_stages=3, maxnreg=32)])
    monkeypatch.setattr(compiled, "kernel_calls", lambda *_: [small])
    assert compiled.print_table([16], torch.float32, 80) == ["r=16  P masks        16, 8 warps, 3 stages"]


def test_the_calls_compiled_are_those_that_are_made(monkeypatch):
    """What lora_operators.py calls the kernels with, on a GPU that nobody has: the same constants, and configs that fit."""
    made = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *tensors, **constants: made.append((self.kernel, constants))

    for name in ("down_kernel", "gemm_kernel", "reduce_kernel"):
        monkeypatch.setattr(lora_operators, name, Recorder(getattr(lk, name)))
    monkeypatch.setattr(lora_operators, "check", lambda dtype, device: None)
    starts, ends = [0, 256, 512], [256, 512, 768]
    for dtype, rank in itertools.product((torch.bfloat16, torch.float32), (16, 32, 256)):
        calls = [(c.kernel, {n: v for n, v in c.constants.items() if n not in compiled.SPANS})
                 for c in compiled.kernel_calls(rank, dtype, 90)]
        x, dy = torch.zeros(128, 256, dtype=dtype), torch.zeros(128, 768, dtype=dtype)
        W, A, B = torch.zeros(768, 256, dtype=dtype), torch.zeros(3 * rank, 256), torch.zeros(768, rank)
        for drop, fused in itertools.product((0, 1), (True, False)):
            made.clear()
            args = torch.zeros(3, 2, dtype=torch.int32), starts, ends, 2.0, drop, fused
            _, P = lora_operators.matmul(x, W, A, B, *args)
            lora_operators.matmul_backward(dy, x, W, A, B, P, *args, True)
            assert len(made) == (5 if rank <= 32 else 4 if drop else 2)
            for kernel, constants in made:
                assert (kernel, {n: v for n, v in constants.items() if n not in compiled.SPANS}) in calls
