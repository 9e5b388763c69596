"""lora.py against peft and float64 autograd: the matmul and its dropout, adapters in and out, merging, bad input."""
import math
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import golden, need, need_peft, run_here
from safetensors.torch import load_file
from test_model import CUTS, close, edit_bytes, edit_config, edit_tensors, loss_of, one_line, tiny, tokens_like
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from llama.identity import identity_of
from llama.lora_matmul import LoRAMatmul, keep_mask
from llama.weights import PROJECTIONS
from lora import (LoRAProjection, adapter_tensors, apply_lora, init_adapters, load_adapter, merge_folders,
                  merge_lora, resolve_targets, save_adapter)
from model import Llama, LlamaConfig

GOLDEN_ADAPTERS = ["stories260k-r4-all", "gqa-r8-rslora", "gqa-r16-qv"]
CONFIG, ADAPTER, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


# ----------------------------------------------------------------------------- helpers
def published(model):
    """PEFT tensor name -> that tensor."""
    return {name: place.view(place.parameter) for name, place in adapter_tensors(model).items()}


def with_adapters(model=None, rank=4, alpha=8, seed=0, **knobs):
    """A tiny model with adapters whose B is random, not zero; in eval mode."""
    torch.manual_seed(seed)
    model = apply_lora(model or tiny(), rank, alpha, **knobs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.3)
    return model.eval()


def weights_by_published_name(model, folder):
    """All weights as a written folder holds them."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def golden_adapter(name):
    """(model with the adapter, its recorded outputs)."""
    record = next(a for a in golden("peft")["adapters"] if a["name"] == name)
    base = record["base"] if record["base"].startswith("data") else f"golden/{record['base']}"
    return load_adapter(Llama.from_pretrained(need(base)), need(f"golden/{record['adapter_dir']}")).eval(), record


# ----------------------------------------------------------------------------- the recorded adapters
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("name", GOLDEN_ADAPTERS)
def test_logits_and_loss_are_pefts(name, merged):
    model, record = golden_adapter(name)
    batch = record["batch"]
    if merged:
        merge_lora(model)
        close(model(torch.tensor(batch["input_ids"]))[0][0, -1], record["merged_logits_row0_last"], 2e-4)
    logits = model(torch.tensor(batch["input_ids"]))[0]
    close(logits[0, record["logits_row0_positions"]], record["logits_row0"], 2e-4)
    close(logits[1, 14], record["logits_row1_pos14"], 2e-4)
    close(loss_of(model, batch["input_ids"], batch["labels"]), record["merged_loss" if merged else "loss"], 1e-5)


@pytest.mark.parametrize("name", GOLDEN_ADAPTERS)
def test_gradients_are_pefts(name):
    model, record = golden_adapter(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == record["trainable_params"]
    loss_of(model, record["batch"]["input_ids"], record["batch"]["labels"]).backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm = torch.cat([p.grad.flatten() for p in trainable]).double().norm()
    close(norm, record["grad_global_l2_norm_all_adapter_params"], atol=0, rtol=1e-5)
    with torch.no_grad():
        for p in trainable:
            p.copy_(p.grad)  # their gradients then stand under the published names
    got, want = published(model), load_file(need(f"golden/{record['grad_file']}"))
    assert want and want.keys() == {name for name in got if f"layers.{record['grad_layer']}." in name}
    for tensor, grad in want.items():
        close(got[tensor].detach(), grad, 1e-4 * grad.abs().max().item())


@pytest.mark.parametrize("name", GOLDEN_ADAPTERS)
def test_merged_matrices_are_pefts(name, tmp_path):
    model, record = golden_adapter(name)
    got = weights_by_published_name(merge_lora(model), tmp_path)
    full = load_file(need(f"golden/{record['merged_layer_file']}"))
    assert full and record["merged_weight_stats"]
    for tensor, want in full.items():
        close(got[tensor], want, 1e-6 * want.abs().max().item())
    for tensor, want in record["merged_weight_stats"].items():
        w = got[tensor].double()
        assert list(w.shape) == want["shape"]
        for stat, value in (("sum", w.sum()), ("abs_sum", w.abs().sum()), ("sq_sum", w.square().sum())):
            close(value, want[stat], atol=1e-5 * want["abs_sum" if stat == "sum" else stat])


# ----------------------------------------------------------------------------- folders of peft
PEFT_CONFIGS = {
    "list": dict(target_modules=["q_proj", "v_proj"]),
    "regex": dict(target_modules=r".*\.layers\.\d+\.(self_attn\.[qk]|mlp\.down)_proj"),
    "regex of one block": dict(target_modules=r"model\.layers\.1\..*_proj"),
    "all-linear": dict(target_modules="all-linear", lora_dropout=0.1),
    "rslora": dict(target_modules=list(PROJECTIONS), use_rslora=True, lora_alpha=3),
    "layers": dict(target_modules=["k_proj", "up_proj"], layers_to_transform=[1]),
    "one layer": dict(target_modules=["o_proj"], layers_to_transform=0),
    "whole names": dict(target_modules=["model.layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj", "v_proj"]),
    "gaussian": dict(target_modules=["q_proj"], init_lora_weights="gaussian")}


@pytest.fixture
def base(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def peft_adapter(base, folder, **config):
    """Save an adapter as peft does, with random A and B; returns the logits of peft's model on TOKENS."""
    peft = need_peft()
    torch.manual_seed(0)
    config = peft.LoraConfig(**{**dict(r=4, lora_alpha=8, task_type="CAUSAL_LM"), **config})
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
        model.save_pretrained(folder)
        return model(TOKENS).logits


def peft_logits(base, folder):
    """Logits on TOKENS of an adapter folder that peft loads, with nothing missing."""
    model = need_peft().PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    names = {name.replace(".default", "").replace("_vector.weight", "_vector")
             for name, _ in model.named_parameters() if "lora_" in name}
    assert load_file(folder / ADAPTER).keys() == names
    with torch.no_grad():
        return model(TOKENS).logits


TOKENS = tokens_like(2, 21)


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_adapter_of_peft_loads_here_and_goes_back(base, tmp_path, config):
    """peft -> here -> peft and here again: the same logits at each stop."""
    want = peft_adapter(base, tmp_path / "theirs", **config)
    model = load_adapter(Llama.from_pretrained(base), tmp_path / "theirs").eval()
    assert (model(TOKENS)[0] - Llama.from_pretrained(base)(TOKENS)[0]).abs().max() > 0.1
    close(model(TOKENS)[0], want, 1e-4)
    save_adapter(model, tmp_path / "ours", str(base))
    close(peft_logits(base, tmp_path / "ours"), want, 1e-4)
    again = load_adapter(Llama.from_pretrained(base), tmp_path / "ours").eval()
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0]) and again.lora == model.lora


def test_all_linear_as_a_word_in_the_file_is_all_projections(tmp_path):
    """peft writes the names it stood for; a config written by hand may keep the word."""
    model = with_adapters()
    save_adapter(model, tmp_path)
    edit_config(CONFIG, target_modules="all-linear")(tmp_path)
    assert torch.equal(load_adapter(tiny(), tmp_path).eval()(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_whose_init_changed_the_base_is_refused(base, tmp_path, init):
    """peft subtracts such an adapter's start from the base when it loads it; ignoring that gives wrong logits."""
    peft_adapter(base, tmp_path / "theirs", target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(ValueError) as error:
        load_adapter(Llama.from_pretrained(base), tmp_path / "theirs")
    one_line(error, "adapter_config.json", "init_lora_weights", init)


@pytest.mark.parametrize("targets", ["all", "attention", "mlp", ("v_proj", "q_proj"), "up_proj,k_proj"], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_our_adapter_in_peft_gives_our_logits(base, tmp_path, targets, rslora):
    model = with_adapters(Llama.from_pretrained(base), alpha=5, dropout=0.2, targets=targets, rslora=rslora)
    save_adapter(model, tmp_path / "ours", str(base))
    close(peft_logits(base, tmp_path / "ours"), model(TOKENS)[0], 1e-4)


def test_published_adapter_of_tinyllama_reads():
    """Every tensor of a real adapter lands where its name says, on a base of its shape that takes no memory."""
    folder = need("data/peft-adapter-tinyllama")
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=8, hidden_size=2048, intermediate_size=8, num_hidden_layers=22,
                                  num_attention_heads=32, num_key_value_heads=4, head_dim=64))
    empty = {name: torch.zeros(1).expand(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict(empty, assign=True)
    load_adapter(model, folder)
    want, got = load_file(folder / ADAPTER), published(model)
    assert len(want) == 88 and want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 563200
    assert model.lora == dict(rank=4, alpha=8, dropout=0.05, targets=("q_proj", "v_proj"), rslora=False, dora=False)
    a, b = (want[f"base_model.model.model.layers.21.self_attn.v_proj.lora_{x}.weight"] for x in "AB")
    close(model.layers[21].self_attn.qkv_proj.deltas()["v_proj"].detach(), 2 * b @ a, 1e-6)


# ----------------------------------------------------------------------------- a fresh adapter
def test_trainable_parameters_of_llama_2_7b():
    for rank in (1, 16, 256):
        with torch.device("meta"):
            model = Llama(LlamaConfig())
        apply_lora(model, rank, 2 * rank)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2498560 * rank


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_is_pefts_init_in_fp32_and_changes_nothing(base_dtype):
    before = tiny(base_dtype, hidden_size=64)
    want = before(TOKENS)[0]
    torch.manual_seed(0)
    model = apply_lora(before, 32, 64, dropout=0.5)
    for module in model.modules():
        if isinstance(module, LoRAProjection):
            bound, a = module.weight.shape[1] ** -0.5, module.lora_A.detach().flatten().sort().values
            assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
            assert module.lora_B.count_nonzero() == 0 and a.abs().max() <= bound
            uniform = torch.linspace(-bound, bound, len(a))  # Kolmogorov-Smirnov, one time in 10,000
            assert (a - uniform).abs().max() / (2 * bound) < 2.2 / len(a) ** 0.5
    # not bit-equal: the same product in another shape may take another kernel
    torch.testing.assert_close(model.train()(TOKENS)[0], want, rtol=1e-5, atol=1e-5 if base_dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("rslora, scale", [(False, 3.0), (True, 6.0)])
def test_scale_is_alpha_over_rank_or_over_its_root(rslora, scale):
    model = apply_lora(tiny(), 4, 12, rslora=rslora)
    assert {m.scale for m in model.modules() if isinstance(m, LoRAProjection)} == {scale}


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_adapters_get_gradients(base_dtype):
    model = with_adapters(tiny(base_dtype), dropout=0.1).train()
    model(TOKENS, TOKENS)[1].backward()
    for name, p in model.named_parameters():
        adapter = name.endswith(("lora_A", "lora_B"))
        assert p.requires_grad == adapter and (p.grad is not None) == adapter, name
        assert not adapter or p.grad.count_nonzero() and p.grad.dtype == torch.float32, name


@pytest.mark.parametrize("targets, names", [
    ("all", PROJECTIONS), ("attention", PROJECTIONS[:4]), ("mlp", PROJECTIONS[4:]),
    ("q_proj, v_proj", ("q_proj", "v_proj")), (["down_proj"], ("down_proj",))], ids=str)
def test_targets_by_word_text_and_list(targets, names):
    assert resolve_targets(targets) == tuple(names)
    paths = {name.split(".")[-3] for name in adapter_tensors(apply_lora(tiny(), 1, 1, targets=targets))}
    assert paths == set(names)


# ----------------------------------------------------------------------------- the matmul in float64
K, ROWS = 24, dict(q=8, k=4, v=4)  # of a q, k, v group
SUBSETS = {"q": "q", "k": "k", "v": "v", "q and v": "qv", "k and v": "kv", "q and k": "qk", "all": "qkv"}


def matmul_inputs(which, T=10, rank=3, seed=0):
    """x, W, A, B in float64 and the spans of some of q, k, v."""
    torch.manual_seed(seed)
    ends = dict(zip(ROWS, torch.tensor(list(ROWS.values())).cumsum(0).tolist()))
    spans = tuple((ends[name] - ROWS[name], ends[name]) for name in ROWS if name in which)
    shapes = (T, K), (16, K), (len(spans) * rank, K), (sum(end - start for start, end in spans), rank)
    x, W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return x.requires_grad_(), W, A.requires_grad_(), B.requires_grad_(), spans


def matmul_by_hand(x, W, A, B, spans, scale, p, seeds):
    """What PEFT computes, with the masks that keep_mask draws, for autograd to differentiate."""
    drop = round(p * 2 ** 32)
    keep = [keep_mask(seed, x, drop) for seed in seeds] if p else torch.ones(len(spans), 1, 1)
    y, rank, row = x @ W.T, B.shape[1], 0
    for i, (start, end) in enumerate(spans):
        part = x * keep[i] / (1 - drop / 2 ** 32) @ A[i * rank:(i + 1) * rank].T @ B[row:row + end - start].T
        y = y + scale * torch.nn.functional.pad(part, (start, W.shape[0] - end))
        row += end - start
    return y


def same_value_and_gradients(inputs, *calls, scale=1.7):
    """LoRAMatmul equals the formula summed over calls (p, seed), and so do its gradients."""
    x, W, A, B, spans = inputs
    wanted = [t for t in (x, A, B) if t.requires_grad]
    found = []
    for function in (LoRAMatmul.apply, matmul_by_hand):
        outs = [function(x, W, A, B, spans, scale, p, seed) for p, seed in calls]
        weights = [torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
                   for i, out in enumerate(outs)]
        total = sum((out * weight).sum() for out, weight in zip(outs, weights))
        found.append([*outs, *torch.autograd.grad(total, wanted)])
    for got, want in zip(*found):
        close(got, want, 1e-10)


def seeds(n):
    return torch.randint(-2 ** 31, 2 ** 31, (3, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(n))


NO_DROPOUT, DROPOUT = (0.0, None), (0.25, seeds(7))


@pytest.mark.parametrize("call", [NO_DROPOUT, DROPOUT, (0.05, seeds(8))], ids=["p=0", "p=0.25", "p=0.05"])
@pytest.mark.parametrize("which", SUBSETS.values(), ids=SUBSETS)
def test_matmul_and_its_backward_are_autograds(which, call):
    same_value_and_gradients(matmul_inputs(which), call)


@pytest.mark.parametrize("call", [NO_DROPOUT, DROPOUT], ids=["p=0", "p=0.25"])
@pytest.mark.parametrize("kind", ["x needs no gradient", "x not contiguous", "one token", "rank one", "one span"])
def test_matmul_of_unusual_inputs(kind, call):
    x, W, A, B, spans = matmul_inputs("qv", T=1 if kind == "one token" else 10, rank=1 if kind == "rank one" else 3)
    if kind == "x needs no gradient":
        x = x.detach()
    elif kind == "x not contiguous":
        x = x.detach().T.contiguous().T.requires_grad_()
        assert not x.is_contiguous()
    elif kind == "one span":
        spans, W = ((0, 12),), W[:12]
        A, B = (t.detach()[:n].requires_grad_() for t, n in ((A, 3), (B, 12)))
    same_value_and_gradients((x, W, A, B, spans), call)


def test_each_forward_keeps_its_own_mask_for_its_backward():
    same_value_and_gradients(matmul_inputs("qv"), DROPOUT, (0.25, seeds(9)), NO_DROPOUT)


@pytest.mark.parametrize("x_needs_gradient", [True, False])
def test_backward_spends_nothing_on_gradients_of_the_base(x_needs_gradient):
    """One product with W if x needs it; the rest is small at rank 1."""
    W, A, B = (torch.randn(shape, requires_grad=shape != (512, 256)) for shape in ((512, 256), (1, 256), (512, 1)))
    x = torch.randn(32, 256, requires_grad=x_needs_gradient)
    y = LoRAMatmul.apply(x, W, A, B, ((0, 512),), 1.0, *DROPOUT)
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() / (2 * 32 * 512 * 256) < x_needs_gradient + 0.1 and W.grad is None


def test_backward_can_be_repeated():
    x, W, A, B, spans = matmul_inputs("qv")
    y = LoRAMatmul.apply(x, W, A, B, spans, 1.7, *DROPOUT)
    first, second = (torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


# ----------------------------------------------------------------------------- dropout
def test_masks_are_fair_and_independent():
    """The rate, and every pair of neighbours (in a row, in a column, of two seeds), within five sigma."""
    drop, many = round(0.05 * 2 ** 32), torch.cat([seeds(n) for n in range(6)])
    dropped = torch.stack([(~keep_mask(seed, torch.empty(500, 331), drop)).float() for seed in many])
    pairs = [(a, b) for i, a in enumerate(dropped) for b in dropped[i + 1:]]
    pairs += [(dropped[..., lag:], dropped[..., :-lag]) for lag in (1, 2, 3, 4, 8, 16)]
    pairs += [(dropped[:, lag:], dropped[:, :-lag]) for lag in (1, 2, 16)]
    for sample, p in [(d, 0.05) for d in dropped] + [(a * b, 0.05 ** 2) for a, b in pairs]:
        assert abs(sample.mean(dtype=torch.float64).item() - p) < 5 * (p * (1 - p) / sample.numel()) ** 0.5


@pytest.mark.parametrize("p", [2 ** -16, 0.004, 0.05, 0.25, 0.5, 0.9, 0.99])
def test_rate_is_right_over_its_whole_range(p):
    dropped = (~torch.stack([keep_mask(seed, torch.empty(512, 512), round(p * 2 ** 32)) for seed in seeds(3)])).double()
    assert abs(dropped.mean().item() - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5


def test_masks_are_lowbias32_of_the_index():
    """Against the hash in Python's own integers; drawn again, and for a shape that is not contiguous, they are the same."""
    def shift(h, n):
        return h ^ (h >> n)

    def by_hand(i, seed, drop, full=2 ** 32):
        h = (shift(((i * 0x9E3779B9 + seed[0]) % full), 16) + seed[1]) * 0x21F0AAAD % full
        h = shift(shift(h, 15) * 0x735A2D97 % full, 15)
        return (h - full if h >= full // 2 else h) >= drop - full // 2

    seed, drop = seeds(5)[0], round(0.4 * 2 ** 32)
    want = [by_hand(i, [s % 2 ** 32 for s in seed.tolist()], drop) for i in range(70)]
    assert keep_mask(seed, torch.empty(5, 14), drop).flatten().tolist() == want
    assert torch.equal(keep_mask(seed, torch.empty(14, 5).T, drop, again=True), keep_mask(seed, torch.empty(5, 14), drop))


def test_dropout_is_unbiased():
    """The mean over many masks is the value without dropout, within five standard errors."""
    inputs = [t.detach() for t in matmul_inputs("qkv")[:4]]
    spans = matmul_inputs("qkv")[4]
    many = torch.stack([LoRAMatmul.apply(*inputs, spans, 1.7, 0.25, seeds(n)) for n in range(2000)])
    plain = LoRAMatmul.apply(*inputs, spans, 1.7, 0.0, None)
    assert many.std(0).min() > 0.1
    assert ((many.mean(0) - plain).abs() < 5 * many.std(0) / 2000 ** 0.5).all()


def test_the_same_seed_drops_the_same_and_eval_drops_nothing():
    model = with_adapters(dropout=0.3).train()

    def draw(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(TOKENS, TOKENS)[1]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    assert all(map(torch.equal, draw(1), draw(1))) and not torch.equal(draw(1)[0], draw(2)[0])
    model.eval()
    assert torch.equal(draw(1)[0], draw(2)[0])
    close(draw(1)[0], with_adapters(dropout=0.0)(TOKENS, TOKENS)[1], 1e-6)


def test_layers_and_groups_draw_their_own_masks(monkeypatch):
    seeds = []
    monkeypatch.setattr("llama.lora_matmul.keep_mask", lambda seed, *rest: seeds.append(tuple(seed.tolist())) or keep_mask(seed, *rest))
    with_adapters(dropout=0.3).train()(TOKENS)
    assert len(set(seeds)) == len(seeds) == 2 * 7


# ----------------------------------------------------------------------------- merging
@pytest.mark.parametrize("targets", ["all", ("k_proj", "up_proj")], ids=str)
def test_merging_keeps_the_logits_and_removes_the_adapters(targets):
    model = with_adapters(tiny(torch.float64), targets=targets)
    want, shapes = model(TOKENS)[0], [(n, p.shape) for n, p in tiny().named_parameters()]
    assert merge_lora(model) is model
    close(model(TOKENS)[0], want, 1e-10)
    assert [(n, p.shape) for n, p in model.named_parameters()] == shapes and not hasattr(model, "lora")
    apply_lora(model, 2, 4)  # it is a plain model again


def test_merging_rounds_once():
    model, plain = with_adapters(tiny(torch.bfloat16)), tiny(torch.bfloat16)
    module = model.layers[1].self_attn.qkv_proj
    a, b = module.lora_A.detach().split(4), module.lora_B.detach().split([32, 16, 16])
    delta = torch.cat([2.0 * b_i @ a_i for a_i, b_i in zip(a, b)])
    merged = merge_lora(model).layers[1].self_attn.qkv_proj.weight
    want = plain.layers[1].self_attn.qkv_proj.weight.float() + delta
    assert (merged.float() - want).abs().max() <= (want.abs() * 2 ** -8).max()
    assert (merged == want.bfloat16()).float().mean() > 0.999


@pytest.fixture
def merge(base, tmp_path):
    """Run `python lora.py` on a tiny base and adapter, with other knobs if given."""
    save_adapter(with_adapters(Llama.from_pretrained(base)), tmp_path / "adapter", str(base))
    (base / "tokenizer.model").write_bytes(b"as it was")

    def run(**knobs):
        knobs = {**dict(base=base, adapter=tmp_path / "adapter", out=tmp_path / "out"), **knobs}
        return run_here("lora.py", *(f"--{name}={value}" for name, value in knobs.items()))
    return run


def test_merge_script_proves_itself_and_then_refuses_to_overwrite(merge, base, tmp_path):
    done = merge()
    assert done.returncode == 0, done.stderr
    difference, largest = map(float, re.search(r"agree to (\S+) \(largest logit (\S+)\)", done.stdout).groups())
    want = load_adapter(Llama.from_pretrained(base), tmp_path / "adapter").eval()(TOKENS)[0]
    close(Llama.from_pretrained(tmp_path / "out")(TOKENS)[0], want, 1e-4)
    assert difference < 1e-4 and largest > 1 and (tmp_path / "out" / "tokenizer.model").read_bytes() == b"as it was"
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    fails_with(merge(), "out: exists already; delete it")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written


def test_merge_script_in_bf16_prints_the_share_that_rounding_took(merge, base, tmp_path):
    done = merge(dtype="bfloat16")
    assert done.returncode == 0, done.stderr
    printed = float(re.search(r"(\S+)% of the change was lost", done.stdout).group(1)) / 100
    exact = merge_lora(load_adapter(Llama.from_pretrained(base), tmp_path / "adapter")).state_dict()
    stored, plain = (Llama.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", base))
    adapted = [name for name in exact if "_proj" in name]
    lost, change = (math.sqrt(sum((a[n] - b[n]).square().sum().item() for n in adapted))
                    for a, b in ((stored, exact), (exact, plain)))
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert printed > 1e-4 and abs(printed - lost / change) < 1e-4


def fails_with(done, words):
    """The script ended with status 2 and one line that matches."""
    assert done.returncode == 2 and re.fullmatch(f"lora.py: error: .*{words}.*\n", done.stderr), done.stderr


def test_merge_script_refuses_another_base_and_writes_nothing(merge, tmp_path):
    tiny(seed=1).save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    fails_with(merge(base=tmp_path / "other"), "adapter.*another base")
    assert sorted(tmp_path.iterdir()) == before


def test_merge_script_names_the_knob_that_was_not_given():
    fails_with(run_here("lora.py"), r"\b(base|adapter|out)\b")


def test_a_merge_that_does_not_compute_the_same_leaves_nothing(merge, base, tmp_path, monkeypatch):
    def wrong(model):
        merge_lora(model).layers[0].mlp.down_proj.weight.data[0] += 1

    monkeypatch.setattr("lora.merge_lora", wrong)
    with pytest.raises(ValueError, match="differ by.*nothing was written"):
        merge_folders(base, tmp_path / "adapter", tmp_path / "out", torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


# ----------------------------------------------------------------------------- random numbers
def test_loading_an_adapter_draws_no_random_numbers(tmp_path):
    saved = with_adapters()
    save_adapter(saved, tmp_path)
    plain = tiny()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded = load_adapter(plain, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in published(saved).items():
        assert torch.equal(published(loaded)[name], tensor)


def test_new_adapters_are_drawn_from_the_random_state_in_the_order_of_init_adapters():
    model = tiny()
    torch.manual_seed(3)
    apply_lora(model, 4, 8)
    drawn = [p.clone() for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    init_adapters(model)
    assert all(map(torch.equal, drawn, [p for p in model.parameters() if p.requires_grad]))
    assert model.layers[1].mlp.down_proj.lora_A.count_nonzero() > 0


# ----------------------------------------------------------------------------- which base
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fingerprint_is_the_bases_in_any_dtype(base, dtype):
    assert identity_of(Llama.from_pretrained(base, dtype)) == identity_of(tiny())
    assert identity_of(with_adapters(Llama.from_pretrained(base, dtype))) == identity_of(tiny())


def test_fingerprint_tells_bases_apart(base, tmp_path):
    save_adapter(with_adapters(), tmp_path / "adapter")
    load_adapter(Llama.from_pretrained(base), tmp_path / "adapter")
    tiny(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError) as error:
        load_adapter(Llama.from_pretrained(tmp_path / "other"), tmp_path / "adapter")
    one_line(error, str(tmp_path / "adapter"), "another base")


# ----------------------------------------------------------------------------- bad input
Q = "base_model.model.model.layers.1.self_attn.q_proj"
changed = partial(edit_config, CONFIG)
BAD_ADAPTERS = {
    "no folder": (shutil.rmtree, [CONFIG, "not found"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG, "not found"]),
    "config cut short": (edit_bytes(CONFIG, lambda b: b[:40]), [CONFIG, "JSON"]),
    "config not an object": (edit_bytes(CONFIG, lambda b: b"[1]"), [CONFIG]),
    "no rank": (changed(r=None), [CONFIG, "missing r"]),
    "no targets": (changed(target_modules=None), [CONFIG, "target_modules"]),
    "unknown targets": (changed(target_modules=["c_attn", "c_proj"]), [CONFIG, "target_modules"]),
    "head as a target": (changed(target_modules=["q_proj", "lm_head"]), [CONFIG, "lm_head", "merge_and_unload"]),
    "embeddings as a target": (changed(target_modules=r".*(q_proj|v_proj|embed_tokens)"), [CONFIG, "model.embed_tokens"]),
    "regex that fits nothing": (changed(target_modules="transformer.*"), [CONFIG, "target_modules"]),
    "another method": (changed(peft_type="IA3"), [CONFIG, "peft_type", "IA3"]),
    "another tool": (edit_bytes(CONFIG, lambda _: b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}'),
                     [CONFIG, "no peft_type", "mlx_lm fuse"]),
    "DoRA without magnitudes": (changed(use_dora=True), [f"missing {Q.replace('1', '0')}.lora_magnitude_vector"]),
    "DoRA as a text": (changed(use_dora="yes"), [CONFIG, "use_dora", "'yes'"]),
    "rank pattern": (changed(rank_pattern={"q_proj": 8}), [r"q_proj.lora_A.weight \[4, 32\] for \[8, 32\]"]),
    "rank pattern of a text": (changed(rank_pattern={"q_proj": "8"}), [CONFIG, "rank_pattern", "'8'"]),
    "alpha pattern": (changed(alpha_pattern={"q_proj": None}), [CONFIG, "alpha_pattern", "None"]),
    "pattern that is none": (changed(rank_pattern={"q_proj(": 4}), [CONFIG, "q_proj", "regular expression"]),
    "target that is no pattern": (changed(target_modules="q_proj("), [CONFIG, "q_proj", "regular expression"]),
    "rank as a text": (changed(r="4"), [CONFIG, "'4'", "rank"]), "rank 0": (changed(r=0), [CONFIG, "0", "rank"]),
    "alpha as a text": (changed(lora_alpha="8"), [CONFIG, "lora_alpha", "'8'"]),
    "dropout as a text": (changed(lora_dropout="8"), [CONFIG, "lora_dropout", "'8'"]),
    "targets as numbers": (changed(target_modules=[1, 2]), [CONFIG, "target_modules"]),
    "layers as text": (changed(layers_to_transform=["1"]), [CONFIG, "layers_to_transform"]),
    "trained tokens": (changed(trainable_token_indices=[1]), [CONFIG, "trainable_token_indices", "merge_and_unload"]),
    "bias of B": (changed(lora_bias=True), [CONFIG, "lora_bias", "merge_and_unload"]),
    "parameters": (changed(target_parameters=["x"]), [CONFIG, "target_parameters", "merge_and_unload"]),
    "alora": (changed(alora_invocation_tokens=[1]), [CONFIG, "alora_invocation_tokens"]),
    "pissa": (changed(init_lora_weights="pissa"), [CONFIG, "pissa", "path_initial_model_for_weight_conversion"]),
    "bias": (changed(bias="lora_only"), [CONFIG, "bias"]),
    "whole modules": (changed(modules_to_save=["lm_head"]), [CONFIG, "modules_to_save"]),
    "transposed base": (changed(fan_in_fan_out=True), [CONFIG, "fan_in_fan_out"]),
    "excluded modules": (changed(exclude_modules=["layers.0.self_attn.q_proj"]), ["unexpected .*layers.0.self_attn.q_proj"]),
    "repeated layers": (changed(layer_replication=[[0, 2]]), [CONFIG, "layer_replication"]),
    "no tensors": (lambda f: (f / ADAPTER).unlink(), [ADAPTER]),
    "only a pickle": (lambda f: (f / ADAPTER).rename(f / PICKLE), [PICKLE, "pickle", "[Pp]eft"]),
    "missing tensor": (edit_tensors({f"{Q}.lora_A.weight": None}, ADAPTER), [f"missing {Q}.lora_A.weight"]),
    "unexpected tensor": (edit_tensors({f"{Q}.lora_C.weight": torch.ones(2)}, ADAPTER), [f"unexpected {Q}.lora_C"]),
    "another shape": (edit_tensors({f"{Q}.lora_A.weight": torch.ones(4, 31)}, ADAPTER), [r"lora_A.weight \[4, 31\]"]),
    "another rank": (changed(r=8), [r"lora_A.weight \[4, 32\] for \[8, 32\]"]),
    "fewer targets than tensors": (changed(target_modules=["q_proj"]), ["unexpected .*v_proj"]),
    "more targets than tensors": (changed(target_modules=["q_proj", "v_proj", "o_proj"]), ["missing .*o_proj"]),
    **{f"tensors {what}": (edit_bytes(ADAPTER, cut), [ADAPTER]) for what, cut in CUTS.items()}}


@pytest.mark.parametrize("spoil, words", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_bad_adapter_is_one_line_that_names_it(tmp_path, spoil, words):
    folder = tmp_path / "adapter"
    save_adapter(with_adapters(targets=("q_proj", "v_proj")), folder)
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_adapter(tiny(), folder)
    one_line(error, str(folder), *words)


@pytest.mark.parametrize("bad, words", [
    (dict(rank=0), "rank.*found 0"), (dict(rank=-1), "rank"), (dict(alpha=0), "alpha"), (dict(alpha=-8), "alpha"),
    (dict(alpha=math.nan), "alpha"), (dict(dropout=1.0), "dropout.*1.0"), (dict(dropout=-0.1), "dropout"),
    (dict(targets="q_porj"), "q_porj.*q_proj"), (dict(targets=""), "lora_targets"),
    (dict(targets=()), "lora_targets: (?!True)"), (dict(targets=["q_proj", "lm_head"]), "lm_head")], ids=str)
def test_impossible_values_are_refused(bad, words):
    with pytest.raises(ValueError, match=words) as error:
        apply_lora(tiny(), **{**dict(rank=4, alpha=8), **bad}).train()(TOKENS)
    one_line(error)


def test_adapters_are_not_put_on_adapters():
    with pytest.raises(ValueError, match="already has adapters"):
        apply_lora(with_adapters(), 2, 4)
