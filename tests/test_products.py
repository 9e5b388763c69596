"""llama/products.py: oneDNN's products are products; compiled models in fp32 take them with AVX512, others do not."""
import pytest
import torch
from test_model import close, tiny, tokens_like

from llama import products
from llama.attention import BlockAttention, in_blocks
from llama.products import HAS_ONEDNN, OneDNNLinear, onednn, product
from lora import apply_lora

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this PyTorch was built without oneDNN")


@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 1), (0,)], ids=str)
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["both", "x", "weight"])
def test_value_and_gradients_are_those_of_float64(shape, trained):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(*shape, 48), torch.randn(33, 48), torch.randn(*shape, 33)
    found = []
    for linear, dtype in ((OneDNNLinear.apply, torch.float32), (torch.nn.functional.linear, torch.float64)):
        inputs = [t.to(dtype).requires_grad_(wanted) for t, wanted in zip((x, weight), trained)]
        y = linear(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        found.append((y, *torch.autograd.grad(y, wanted, dy.to(dtype))))
    for got, want in zip(*found):
        assert got.dtype == torch.float32 and got.shape == want.shape
        close(got, want, 2e-5)


def test_strided_tensors_make_the_same_product():
    torch.manual_seed(0)
    weight, wide = torch.randn(40, 24), torch.randn(6, 100)
    dy = wide[:, 30:70]
    close(onednn(dy, weight.T), dy.double() @ weight.double(), 1e-5)
    close(onednn(wide.T, weight[:, :6]), wide.T.double() @ weight[:, :6].T.double(), 1e-5)


def test_the_operator_is_registered_right():
    torch.library.opcheck(torch.ops.llama.onednn.default, (torch.randn(2, 5, 8), torch.randn(3, 8)))


@pytest.fixture(params=[True, False], ids=["avx512", "avx2"])
def avx512(request, monkeypatch):
    """Whether the CPU has AVX512, by which compiled models choose."""
    monkeypatch.setattr(products, "HAS_AVX512", request.param)
    return request.param


def test_without_a_compiler_or_avx512_products_are_pytorchs_to_the_last_bit(avx512):
    torch.manual_seed(0)
    x, weight = torch.randn(64, 1536), torch.randn(80, 1536)
    assert torch.equal(product(x, weight, compiled=False), x @ weight.T)
    assert torch.equal(product(x, weight, compiled=True), x @ weight.T) != avx512


def trained(rank, compiled, dtype=torch.float32, **changes):
    """(loss, gradients by name) of a small model, its blocks traced as torch.compile does if `compiled`."""
    model = tiny(dtype, **changes)
    if rank:
        apply_lora(model, rank, 2 * rank, targets="q_proj,v_proj,up_proj,down_proj")
        torch.manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data.copy_(torch.randn(p.shape) / 10)  # the same in every dtype
    if compiled:
        torch._dynamo.reset()
        model.compiled = True
        for block in model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
    tokens = tokens_like(2, 12)
    loss = model.train()(tokens, tokens)[1]
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def products_by_onednn(run):
    """(what run() returns, calls of oneDNN's product in it, by the profiler)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        found = run()
    calls = [event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise"]
    return found, sum(calls)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_compiled_model_in_fp32_takes_them_and_learns_the_same(rank, avx512):
    (_, exact), none = products_by_onednn(lambda: trained(rank, True, torch.float64))
    (loss, _), none_either = products_by_onednn(lambda: trained(rank, False))
    assert none == none_either == 0
    (compiled_loss, gradients), calls = products_by_onednn(lambda: trained(rank, True))
    # two blocks of four products forward and four backward, and the head's logits; with a frozen
    # embedding nothing needs the first block's input's gradient
    taken = 17 if rank == 0 else 16
    assert calls == (taken if avx512 else 0)
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, want in exact.items():
        close(gradients[name], want, 1e-5 * max(1, want.abs().max().item()))


def test_block_attention_is_for_compiled_fp32_and_for_bf16(monkeypatch):
    taken = []
    apply = BlockAttention.apply
    monkeypatch.setattr(BlockAttention, "apply", lambda *qkv: taken.append(qkv[0].dtype) or apply(*qkv))
    trained(0, compiled=False)
    trained(0, compiled=False, dtype=torch.float64)
    assert not taken
    for compiled, dtype, length, wanted in ((True, torch.float32, 512, True), (True, torch.float32, 513, False),
                                            (False, torch.float32, 9, False), (True, torch.float64, 9, False),
                                            (False, torch.bfloat16, 2048, True), (True, torch.bfloat16, 2049, False)):
        assert in_blocks(length, dtype, "cpu", compiled) == wanted
    assert not in_blocks(9, torch.bfloat16, "cuda", True)
