"""The kernels against float64, where they can run: in Triton's interpreter or on a GPU. test_lora_kernels.py starts this file.

    TRITON_INTERPRET=1 python -m pytest tests/kernel_cases.py      # on a GPU without the variable
"""
import os

import pytest
import torch
import triton.language as tl
from conftest import ROOT  # noqa: F401  puts the repo on the path
from triton.runtime import interpreter

from llama import lora_kernels, lora_operators
from lion import DecoupledLionW
from llama.lion_kernel import lion_step
from llama.lora_matmul import choose_kernel, keep_mask, lora_matmul
from lora import apply_lora
from model import Llama, LlamaConfig

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")  # the interpreter's bf16 is wrong
SPANS = {"qkv": ((0, 64), (64, 83), (83, 101)), "o": ((0, 70),), "gate_up": ((0, 45), (45, 90)), "down": ((0, 64),),
         "q and v": ((0, 64), (83, 101)), "k": ((64, 83),)}
ROWS = {"qkv": 101, "o": 70, "gate_up": 90, "down": 64, "q and v": 110, "k": 101}
COLUMNS = {"qkv": 72, "o": 64, "gate_up": 72, "down": 150, "q and v": 72, "k": 72}
CASES = [  # each pair of group, rank, rows and dropout at least once
    ("qkv", 1, 77, 0.05), ("qkv", 8, 300, 0.0), ("qkv", 16, 128, 0.05), ("qkv", 17, 1, 0.05), ("qkv", 64, 77, 0.0),
    ("qkv", 256, 128, 0.05), ("o", 1, 128, 0.0), ("o", 8, 1, 0.05), ("o", 16, 300, 0.05), ("o", 17, 77, 0.05),
    ("o", 64, 128, 0.05), ("o", 256, 77, 0.0), ("gate_up", 1, 1, 0.05), ("gate_up", 8, 128, 0.05), ("gate_up", 16, 77, 0.0),
    ("gate_up", 17, 300, 0.0), ("gate_up", 64, 300, 0.05), ("gate_up", 256, 1, 0.0), ("down", 1, 300, 0.05),
    ("down", 8, 77, 0.0), ("down", 16, 1, 0.0), ("down", 17, 128, 0.0), ("down", 64, 1, 0.05), ("down", 256, 300, 0.05),
    ("q and v", 8, 77, 0.05), ("q and v", 64, 128, 0.05), ("q and v", 17, 300, 0.0), ("k", 16, 77, 0.05)]
BOUND = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True, scope="module")
def patched_once():
    """The interpreter puts its functions into Triton's modules anew at each call of tl.cdiv or tl.zeros: a fifth of
    its time, without effect once they are there."""
    put = interpreter._patch_lang

    def put_once(fn):
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return put(fn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", put_once)
        yield


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch):
    """On a GPU take the last config that applies: measuring them all at 50 shapes would take very long."""
    for kernel in (lora_kernels.down_kernel, lora_kernels.reduce_kernel, lora_kernels.gemm_kernel):
        choose = kernel.early_config_prune or (lambda configs, named, **_: configs)
        monkeypatch.setattr(kernel, "early_config_prune", lambda *args, choose=choose, **how: choose(*args, **how)[-1:])


def make(spans, N, K, rank, T, dtype, seed=0):
    """x, W, A, B with gradients wanted of all but W, seeds, dy."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(end - start for start, end in spans)
    x, W, A, B, dy = (torch.randn(shape, generator=g).to(DEVICE) for shape in
                      ((T, K), (N, K), (len(spans) * rank, K), (rows, rank), (T, N)))
    seeds = torch.randint(-2 ** 31, 2 ** 31, (len(spans), 2), dtype=torch.int32, generator=g)
    x, W, dy = x.to(dtype), (W / K ** 0.5).to(dtype), dy.to(dtype)
    return x.requires_grad_(), W, (A / K ** 0.5).requires_grad_(), (B / rank ** 0.5).requires_grad_(), seeds, dy


def run(kernel, x, W, A, B, spans, scale, p, seeds, dy):
    """y and the gradients of those of x, A, B that want one."""
    y = lora_matmul(kernel, x, W, A, B, spans, scale, p, seeds)
    return y.detach(), *torch.autograd.grad(y, [t for t in (x, A, B) if t.requires_grad], dy)


def exact(x, W, A, B, spans, scale, p, seeds, dy):
    """The same in float64 on the CPU, with explicit masks."""
    x, W, A, B, dy = (t.detach().cpu().double().requires_grad_(t.requires_grad) for t in (x, W, A, B, dy))
    y, row, drop = x @ W.T, 0, round(p * 2 ** 32)
    for seed, a, (start, end) in zip(seeds, A.split(B.shape[1]), spans):
        kept = x * keep_mask(seed, x, drop) / (1 - drop / 2 ** 32) if drop else x
        low_rank = scale * kept @ a.T @ B[row:row + end - start].T
        y, row = y + torch.nn.functional.pad(low_rank, (start, len(W) - end)), row + end - start
    return y.detach(), *torch.autograd.grad(y, [t for t in (x, A, B) if t.requires_grad], dy)


def error(got, want):
    """Largest of the relative errors, by norm."""
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(((g.cpu().double() - w).norm() / w.norm()).item() for g, w in zip(got, want))


def close(got, want, dtype):
    assert error(got, want) < BOUND[dtype]


@pytest.mark.parametrize("group, rank, T, p", CASES, ids=str)
def test_value_and_gradients(group, rank, T, p):
    """fused and added, in each dtype in turn: value and gradients, and in half precision no worse than the torch path."""
    spans = SPANS[group]
    dtype = DTYPES[(rank + T + len(spans)) % len(DTYPES)]
    x, W, A, B, seeds, dy = make(spans, ROWS[group], COLUMNS[group], rank, T, dtype)
    problem = x, W, A, B, spans, 1.7, p, seeds, dy
    want = exact(*problem)
    torchs = run("torch", *problem)
    for kernel in ("fused", "added"):
        got = run(kernel, *problem)
        close(got, want, dtype)
        if dtype != torch.float32 and T > 1:
            assert error(got, want) < 1.05 * error(torchs, want)
        if dtype == torch.float32:
            for mine, other in zip(got, torchs):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p, rank", [(0.0, 17), (0.05, 64), (0.05, 16)])
@pytest.mark.parametrize("group", ["qkv", "gate_up", "o"])
def test_descriptors_and_a_persistent_grid(group, p, rank, monkeypatch):
    spans = {"qkv": ((0, 96), (96, 128), (128, 160)), "gate_up": ((0, 80), (80, 160)), "o": ((0, 160),)}[group]
    if DEVICE.type == "cpu":
        monkeypatch.setattr(lora_kernels.gemm_kernel, "configs", [lora_kernels.tile_config(64, 64, 32, True, 4, 2)])
        monkeypatch.setattr(lora_operators, "multiprocessors", lambda device: 4)
    elif not lora_operators.has_tma(DEVICE):
        pytest.skip("this GPU has no tensor memory accelerator")
    x, W, A, B, seeds, dy = make(spans, 160, 136, rank, 200, torch.float16)
    problem = x, W, A, B, spans, 1.7, p, seeds, dy
    close(run("fused", *problem), exact(*problem), torch.float16)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])
def test_all_three_masks_are_keep_masks_bit_for_bit(p):
    """With identities for operands the kernels show what they drop: P, dA and dx are masked copies."""
    T, K, drop = 70, 64, round(p * 2 ** 32)
    g = torch.Generator().manual_seed(1)
    x = torch.rand(T, K, generator=g).to(DEVICE) + 1
    seeds = torch.randint(-2 ** 31, 2 ** 31, (3, 2), dtype=torch.int32, generator=g)
    keep = [keep_mask(seed, x.cpu(), drop).to(DEVICE) for seed in seeds]
    eye = torch.eye(K, device=DEVICE).repeat(3, 1)
    for i, P in enumerate(lora_operators.down(x, eye, 3, seeds, drop).split(K, 1)):
        assert torch.equal(P, x * keep[i])
    Q = torch.eye(T, 128, device=DEVICE).repeat(1, 3)
    for i, dA in enumerate(lora_operators.gradient_of_a(x, Q, 3, seeds, drop).split(128)):
        assert torch.equal(dA[:T], x * keep[i])
    dx = lora_operators.gemm(torch.zeros(T, 32, device=DEVICE), torch.zeros(32, K, device=DEVICE), x.repeat(1, 3), eye,
                           ((0, 1),) * 3, 1.0, seeds, drop, True, True)
    assert torch.equal(dx, (x * keep[0] + x * keep[1]) + x * keep[2])


@pytest.mark.parametrize("kernel", ["fused", "added"])
def test_runs_and_backward_passes_repeat_to_the_last_bit(kernel):
    spans = ((0, 32), (32, 48))
    x, W, A, B, seeds, dy = make(spans, 50, 40, 4, 260, torch.float32)
    assert lora_operators.split(260, 2, DEVICE, 64)[0] > 1  # two stages
    results = [run(kernel, x, W, A, B, spans, 1.7, 0.05, seeds, dy)]
    y = lora_matmul(kernel, x, W, A, B, spans, 1.7, 0.05, seeds)
    results += [(y, *torch.autograd.grad(y, (x, A, B), dy, retain_graph=True)) for _ in range(2)]
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result))
    other = run(kernel, x, W, A, B, spans, 1.7, 0.05, seeds + 1, dy)
    assert not any(torch.equal(a, b) for a, b in zip(results[0], other))


def test_long_sums_are_split_in_two_stages():
    assert lora_operators.split(520, 1, DEVICE, 128)[0] > 1
    x, W, A, B, seeds, dy = make(SPANS["q and v"], 110, 520, 8, 16, torch.float16)
    problem = x, W, A, B, SPANS["q and v"], 0.3, 0.05, seeds, dy
    close(run("fused", *problem), exact(*problem), torch.float16)


def test_more_rows_of_tiles_than_share_the_cache_and_more_columns_than_a_strip():
    spans = (0, 270), (270, 300)
    assert lora_operators.strip_table(spans, DEVICE)[1] in ([2, 1], [3, 1])
    x, W, A, B, seeds, dy = make(spans, 300, 16, 4, 590, torch.float32)
    problem = x, W, A, B, spans, 1.7, 0.05, seeds, dy
    close(run("fused", *problem), exact(*problem), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_tuning_measures_what_applies_and_spoils_nothing(dtype, monkeypatch):
    """All configs of every kernel, one after another on the same operands, as Triton's tuner runs them."""
    monkeypatch.undo()  # no_tuning
    lk, tried = lora_kernels, []
    for kernel, configs in ((lk.down_kernel, [*lk.DOWN, *lk.DOWN_FP32]),
                            (lk.reduce_kernel, [*lk.RIGHT, *lk.RIGHT_FP32, *lk.BOTH, *lk.BOTH_FP32]),
                            (lk.gemm_kernel, [*lk.ADDED, *lk.PLAIN, *lk.PERSISTENT, *lk.FP32])):
        monkeypatch.setattr(kernel, "configs", configs)
        monkeypatch.setattr(kernel, "cache", {})
        monkeypatch.setitem(vars(kernel), "do_bench", lambda call, quantiles: tried.append(call()) or [1.0] * 3)
    spans = (0, 64), (64, 96)
    x, W, A, B, seeds, dy = make(spans, 96, 72, 16, 130, dtype)
    for kernel in ("fused", "added"):
        close(run(kernel, x, W, A, B, spans, 1.7, 0.05, seeds, dy), exact(x, W, A, B, spans, 1.7, 0.05, seeds, dy), dtype)
    half, tma = dtype == torch.float16, dtype == torch.float16 and lora_operators.has_tma(DEVICE)
    choices = [lk.DOWN, lk.RIGHT, lk.BOTH] if half else [lk.DOWN_FP32, lk.RIGHT_FP32, lk.BOTH_FP32]
    choices += [lk.applicable(2, masked, added, half, tma) for added in (False, True) for masked in (False, True)]
    # what has no rival is measured by Triton 3.7, and taken as it is by 3.8
    several = sum(len(choice) for choice in choices if len(choice) > 1)
    alone = sum(len(choice) == 1 for choice in choices)
    assert len(tried) in (several, several + alone)


def test_x_without_gradient_spends_nothing_on_it(monkeypatch):
    spans = SPANS["gate_up"]
    x, W, A, B, seeds, dy = make(spans, 90, 72, 8, 77, torch.float32)
    problem = x.detach(), W, A, B, spans, 1.7, 0.05, seeds, dy
    y = lora_matmul("fused", *problem[:-1])
    monkeypatch.setattr(lora_operators, "gemm", None)
    close((y.detach(), *torch.autograd.grad(y, (A, B), dy)), exact(*problem), torch.float32)


@pytest.mark.parametrize("kernel", ["fused", "added"])
def test_operands_in_any_memory_order(kernel):
    spans = SPANS["qkv"]
    x, W, A, B, seeds, dy = make(spans, 101, 72, 8, 20, torch.float32)
    want = run(kernel, x, W, A, B, spans, 1.7, 0.05, seeds, dy)
    wide = torch.zeros(20, 200, device=DEVICE)
    wide[:, 3:75] = x.detach()
    for odd in (x.detach().T.contiguous().T, wide[:, 3:75]):
        assert not odd.is_contiguous()
        for d in (dy, dy.T.contiguous().T):
            got = run(kernel, odd.requires_grad_(), W, A, B, spans, 1.7, 0.05, seeds, d)
            assert all(map(torch.equal, got, want))
    y = lora_matmul(kernel, x, W, A, B, spans, 1.7, 0.05, seeds)
    ones = torch.autograd.grad(y.sum(), (x, A, B))  # its dy has strides of 0
    assert all(map(torch.equal, ones, run(kernel, x, W, A, B, spans, 1.7, 0.05, seeds, torch.ones_like(dy))[1:]))


def test_an_empty_batch():
    spans = SPANS["q and v"]
    x, W, A, B, seeds, dy = make(spans, 110, 72, 8, 0, torch.float32)
    y, dx, dA, dB = run("fused", x, W, A, B, spans, 1.7, 0.05, seeds, dy)
    assert y.shape == (0, 110) and dx.shape == x.shape and not dA.any() and not dB.any()
    assert dA.shape == A.shape and dB.shape == B.shape


@pytest.mark.parametrize("p", [0.0, 0.05])
def test_the_operators_are_registered_right(p):
    """Schema, fake tensors, autograd and torch.compile's tracing, by torch's own check."""
    spans = SPANS["qkv"]
    x, W, A, B, seeds, dy = make(spans, 101, 72, 3, 5, torch.float32)
    drop = round(p * 2 ** 32)
    rest = seeds if drop else None, [s for s, _ in spans], [e for _, e in spans], 1.7, drop, True
    torch.library.opcheck(torch.ops.lora.matmul.default, (x, W, A, B, *rest))
    P = torch.ops.lora.matmul(x, W, A, B, *rest)[1].detach()
    A, B, x = A.detach(), B.detach(), x.detach()
    for x_needs_it in (True, False):
        torch.library.opcheck(torch.ops.lora.matmul_backward.default, (dy, x, W, A, B, P, *rest, x_needs_it),
                              test_utils=("test_schema", "test_faketensor"))
    traced = torch.compile(lora_matmul, backend="aot_eager", fullgraph=True)
    problem = "fused", x.requires_grad_(), W, A, B, spans, 1.7, p, seeds
    assert torch.equal(traced(*problem), lora_matmul(*problem))


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_a_model_trains_the_same_on_either_path(checkpointing, dora, monkeypatch):
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    calls, found = [], []
    for kernel in ("torch", "triton"):
        torch.manual_seed(0)
        model = apply_lora(Llama(config).init_weights(), 4, 8, 0.3, "q_proj,v_proj,up_proj,down_proj", dora=dora)
        model.to(DEVICE).train()
        model.activation_checkpointing = checkpointing
        for m in model.modules():
            if hasattr(m, "lora_B"):
                torch.nn.init.normal_(m.lora_B, 0, 0.3)
        lines = choose_kernel(model, kernel, 18, torch.float32, DEVICE)
        assert len(lines) == 3 * (kernel == "triton")  # qkv, gate_up and down
        if kernel == "triton":
            real = lora_operators.gemm
            monkeypatch.setattr(lora_operators, "gemm", lambda *args: calls.append(args) or real(*args))
        torch.manual_seed(1)
        loss = model(tokens, tokens)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    products = {"none": 2 * 2 * 3, "block": 3 * 2 * 3}[checkpointing]
    assert len(calls) == products - 1  # the first qkv needs no dx
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64] + [torch.bfloat16] * (DEVICE.type == "cpu"), ids=str)
def test_other_dtypes_are_refused(dtype):
    x, W, A, B, seeds, dy = make(SPANS["o"], 70, 64, 8, 20, dtype)
    with pytest.raises(ValueError, match="lora_kernel=triton: no kernels for"):
        lora_matmul("fused", x, W, A, B, SPANS["o"], 1.0, 0.0, None)


@pytest.mark.parametrize("numel, dtype, decay", [(5, torch.float32, 1.0), (5000, torch.float32, 0.999),
                                                 (2048, torch.float16, 0.999)])
def test_lion_step_is_the_foreach_steps(numel, dtype, decay):
    g = torch.Generator().manual_seed(0)
    p, grad, m = (torch.randn(numel, generator=g).to(DEVICE, dtype) for _ in range(3))
    grad[:2], m[:2] = 0, 0
    other = torch.nn.Parameter(p.cpu().clone())
    optimizer = DecoupledLionW([other], lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    optimizer.state[other]["exp_avg"] = m.cpu().clone()
    other.grad = grad.cpu().clone()
    with torch.no_grad():
        optimizer.update([other], decay, optimizer.param_groups[0])
    before = p.clone()
    lion_step(p, grad, m, decay, 2e-3, (0.9, 0.95))
    tolerance = dict(rtol=1e-6, atol=1e-7) if dtype == torch.float32 else dict(rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(p.cpu(), other.detach(), **tolerance)
    torch.testing.assert_close(m.cpu(), optimizer.state[other]["exp_avg"], **tolerance)
    torch.testing.assert_close(p[:2], before[:2] * decay, **tolerance)  # sign(0) = 0
    assert not torch.equal(p[2:], before[2:])
