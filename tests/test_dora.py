"""llama/dora.py against peft: a layer in float64, folders in and out, merging, spectrum, training and its resume."""
import gc
import json

import pytest
import torch
from conftest import need_peft, run_here
from safetensors.torch import load_file
from test_lora import ADAPTER, TOKENS, peft_adapter, peft_logits, published, weights_by_published_name
from test_lora import base  # noqa: F401 (a fixture)
from test_model import close, edit_tensors, one_line, tiny
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_train import setting  # noqa: F401 (a fixture)
from torch import nn
from transformers import LlamaForCausalLM

from llama.lora_matmul import keep_mask
from llama.weights import PROJECTIONS
from lora import LoRAProjection, apply_lora, load_adapter, merge_folders, merge_lora, save_adapter
from model import Llama, Projection

ROWS, K = dict(q_proj=8, k_proj=4, v_proj=4), 24
CONFIGS = {
    "all": dict(target_modules=list(PROJECTIONS)),
    "some of a group": dict(target_modules=["q_proj", "v_proj", "up_proj"]),
    "ranks and alphas": dict(target_modules=list(PROJECTIONS), rank_pattern={"q_proj": 8, "down_proj": 2},
                             alpha_pattern={"v_proj": 3, r"layers\.1\.mlp.*": 5}),
    "rslora": dict(target_modules=list(PROJECTIONS), use_rslora=True, lora_alpha=3),
    "one block": dict(target_modules=["o_proj"], layers_to_transform=[1]),
    "alpha 0": dict(target_modules=["k_proj"], lora_alpha=0)}


# ----------------------------------------------------------------------------- a layer in float64
class Group(nn.Module):
    """peft's side: the projections of a group, each a module of its own."""

    def __init__(self):
        super().__init__()
        for name, rows in ROWS.items():
            setattr(self, name, nn.Linear(K, rows, bias=False, dtype=torch.float64))

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in ROWS], -1)


class OurMask(nn.Module):
    """The dropout of a layer of peft's, with the mask that ours draws from a seed."""

    def __init__(self, p, seed):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        return x * keep_mask(self.seed, x, round(self.p * 2 ** 32)) / (1 - self.p)


def pair(targets=tuple(ROWS), random=True, **config):
    """(our layer, peft's group) with equal weights, and with random adapters if asked."""
    peft = need_peft()
    torch.manual_seed(0)
    theirs = Group()
    config = peft.LoraConfig(**{**dict(r=4, lora_alpha=6, target_modules=list(targets), use_dora=True), **config})
    theirs = peft.inject_adapter_in_model(config, theirs)
    parts = {name: getattr(theirs, name) for name in ROWS}
    with torch.device("meta"):
        plain = Projection(K, ROWS)
    plain.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts.values()]), requires_grad=False)
    adapted = {name: part for name, part in parts.items() if hasattr(part, "lora_A")}
    sizes = {name: (part.r["default"], part.lora_alpha["default"]) for name, part in adapted.items()}
    ours = LoRAProjection(plain, sizes, dict(rslora=False, dropout=0.0, dora=True))
    ours.init_weights()
    if random:
        for p in theirs.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        set_ours(ours, adapted)
    return ours, theirs, adapted


def set_ours(ours, adapted):
    with torch.no_grad():
        ours.lora_A.zero_(), ours.lora_B.zero_()
        for (a, b, m), part in zip(views(ours, ours.lora_A, ours.lora_B, ours.lora_magnitude), adapted.values()):
            a.copy_(part.lora_A["default"].weight)
            b.copy_(part.lora_B["default"].weight)
            m.copy_(part.lora_magnitude_vector["default"].weight)


def views(ours, A, B, m):
    """For each adapted part its rows of A, B and m."""
    found, row = [], 0
    for i, (name, (start, end)) in enumerate(zip(ours.adapted, ours.spans)):
        rank, rows = ours.sizes[name][0], slice(row, row + end - start)
        found.append((A[i * ours.rank:i * ours.rank + rank], B[rows, :rank], m[rows]))
        row += end - start
    return found


def same(ours, adapted, mine, of_theirs, atol=1e-10):
    """Whether tensors beside A, B and m are equal on both sides; of_theirs(parameter) gives peft's."""
    for found, part in zip(views(ours, *mine), adapted.values(), strict=True):
        theirs = part.lora_A["default"].weight, part.lora_B["default"].weight, part.lora_magnitude_vector["default"].weight
        for a, b in zip(found, theirs):
            close(a, of_theirs(b), atol)


GROUPS = {"all": {}, "q and v": dict(targets=("q_proj", "v_proj")), "k": dict(targets=("k_proj",)),
          "equal scales": dict(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3})}


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("config", GROUPS.values(), ids=GROUPS)
def test_a_layer_and_its_gradients_are_pefts(config, p):
    ours, theirs, adapted = pair(**config)
    ours.dropout = p
    torch.manual_seed(3)
    seeds = torch.randint(-2 ** 31, 2 ** 31, (len(adapted), 2), dtype=torch.int32)
    if p:
        for seed, part in zip(seeds, adapted.values()):
            part.lora_dropout["default"] = OurMask(p, seed)
    x = torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.manual_seed(3)
    found = []
    for side in (ours.train(), theirs.train()):
        x.grad = None
        y = side(x)
        y.backward(dy)
        found.append((y, x.grad.clone()))
    close(found[0][0], found[1][0], 1e-10)
    close(found[0][1], found[1][1], 1e-10)
    same(ours, adapted, (ours.lora_A.grad, ours.lora_B.grad, ours.lora_magnitude.grad), lambda p: p.grad)
    assert ours.lora_magnitude.grad.abs().min() > 0
    close(ours.eval()(x), theirs.eval()(x), 1e-10)


@pytest.mark.parametrize("config", GROUPS.values(), ids=GROUPS)
def test_a_fresh_layer_is_pefts_and_changes_nothing(config):
    ours, theirs, adapted = pair(random=False, **config)
    same(ours, adapted, (ours.lora_A * 0, ours.lora_B, ours.lora_magnitude), lambda p: p if p.shape[-1] != K else p * 0)
    x = torch.randn(3, K, dtype=torch.float64)
    close(ours(x), x @ ours.weight.T, 1e-12)
    trained = [sum(p.numel() for p in side.parameters() if p.requires_grad) for side in (ours, theirs)]
    assert trained[0] == trained[1] or "rank_pattern" in config


@pytest.mark.parametrize("config", GROUPS.values(), ids=GROUPS)
def test_three_steps_give_pefts_weights_and_merge(config):
    ours, theirs, adapted = pair(**config)
    x, dy = torch.randn(7, K, dtype=torch.float64), torch.randn(7, 16, dtype=torch.float64)
    before = ours.lora_magnitude.detach().clone()
    for side in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in side.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            (side(x) - step).square().mul(dy).sum().backward()
            optimizer.step()
    assert (ours.lora_magnitude - before).abs().mean() > 0.01
    same(ours, adapted, (ours.lora_A, ours.lora_B, ours.lora_magnitude), lambda p: p, 1e-8)
    deltas = ours.deltas()
    first = dict(zip(ours.adapted, ours.spans))
    for name, part in adapted.items():
        part.merge()
        start, end = first[name]
        close(ours.weight[start:end] + deltas[name], part.get_base_layer().weight, 1e-8)


def test_a_row_of_zeros_stays_one():
    """peft divides 0 by 0."""
    ours, _, _ = pair(random=False)
    with torch.no_grad():
        ours.weight[[2, 9]] = 0
        ours.init_weights()
    x = torch.randn(3, K, dtype=torch.float64)
    y = ours(x)
    y.sum().backward()
    close(y, x @ ours.weight.T, 1e-12)
    assert all(p.grad.isfinite().all() for p in (ours.lora_A, ours.lora_B, ours.lora_magnitude))
    assert all(delta.isfinite().all() for delta in ours.deltas().values())


def test_half_precision_and_the_compiler_trace_one_graph():
    ours, _, _ = pair(targets=("q_proj", "v_proj"))
    ours.dropout = 0.1
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    found = []
    for side in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        y = side(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, ours.lora_A, ours.lora_B, ours.lora_magnitude))))
    for a, b in zip(*found):
        close(a, b, 1e-9)
    half = ours.to(torch.bfloat16).eval()
    for p in (half.lora_A, half.lora_B, half.lora_magnitude):
        p.data = p.data.float()
    y = half(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16 and all(delta.dtype == torch.float32 for delta in half.deltas().values())
    want = ours.double().eval()(x)
    close(y, want, 0.03 * want.abs().max().item())


# ----------------------------------------------------------------------------- folders
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapter_of_peft_gives_pefts_logits_and_goes_back(base, tmp_path, config):  # noqa: F811
    want = peft_adapter(base, tmp_path / "theirs", use_dora=True, **config)
    within = 1e-5 * want.abs().max().item()
    model = load_adapter(Llama.from_pretrained(base), tmp_path / "theirs").eval()
    assert model.lora["dora"] and (want - Llama.from_pretrained(base)(TOKENS)[0]).abs().max() > 1000 * within
    close(model(TOKENS)[0], want, within)
    save_adapter(model, tmp_path / "ours", str(base))
    close(peft_logits(base, tmp_path / "ours"), want, within)
    theirs, ours = load_file(tmp_path / "theirs" / ADAPTER), load_file(tmp_path / "ours" / ADAPTER)
    assert theirs.keys() == ours.keys() and any("magnitude" in name for name in ours)
    for name in theirs:
        close(ours[name], theirs[name], atol=0, rtol=2e-7)
    close(merge_lora(model)(TOKENS)[0], want, within)


def test_merged_folder_is_pefts(base, tmp_path):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", use_dora=True, **CONFIGS["ranks and alphas"])
    difference, largest, _ = merge_folders(base, tmp_path / "theirs", tmp_path / "out", torch.float32)
    assert difference < 1e-5 * largest
    theirs = need_peft().PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "theirs")
    merged = theirs.merge_and_unload()
    want, got = merged.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    for name in got:
        close(got[name], want[name], 2e-6 * want[name].abs().max().item())
    assert sum(not torch.equal(got[name], plain[name]) for name in got) == 14


def test_a_merge_that_forgets_the_magnitudes_is_refused(base, tmp_path, monkeypatch):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", use_dora=True, target_modules=["v_proj"])
    monkeypatch.setattr("lora.dora_change", lambda W, a, b, m, scale: scale * (b @ a))
    with pytest.raises(ValueError, match="merged and unmerged logits differ"):
        merge_folders(base, tmp_path / "theirs", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_fresh_adapters_on_a_model_change_nothing_and_load_in_peft(base, tmp_path):  # noqa: F811
    plain = Llama.from_pretrained(base)
    want = plain(TOKENS)[0]
    model = apply_lora(plain, 4, 8, targets="attention", dora=True).eval()
    close(model(TOKENS)[0], want, 1e-5 * want.abs().max().item())
    save_adapter(model, tmp_path / "ours", str(base))
    close(peft_logits(base, tmp_path / "ours"), want, 1e-5 * want.abs().max().item())


def test_spectrum_is_that_of_the_merged_change(base, tmp_path):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", use_dora=True, **CONFIGS["ranks and alphas"])
    done = run_here("spectrum.py", f"--base={base}", f"--tuned={tmp_path / 'theirs'}", f"--out={tmp_path / 's.json'}")
    assert done.returncode == 0, done.stderr
    merged = merge_lora(load_adapter(Llama.from_pretrained(base, torch.float64), tmp_path / "theirs"))
    merged = weights_by_published_name(merged, tmp_path / "merged")
    plain = load_file(base / "model.safetensors")
    written = json.loads((tmp_path / "s.json").read_text())
    found = [m for m in written["matrices"] if m["matrix"] == "D"]
    assert len(found) == 14 and written["checkpoints"][0]["lora_rank"] == 4
    for record in found:
        part = "mlp" if record["module"] in PROJECTIONS[4:] else "self_attn"
        name = f"model.layers.{record['layer']}.{part}.{record['module']}.weight"
        want = torch.linalg.svdvals(merged[name] - plain[name].double())
        got = torch.tensor(record["singular_values"], dtype=torch.float64)
        assert len(got) == min(record["shape"]) and record["method"] != "lora"
        close(got, want, 2e-6 * want[0].item())


# ----------------------------------------------------------------------------- train.py
def test_a_run_resumes_to_the_last_bit_and_peft_reads_it(setting):  # noqa: F811
    folder, knobs = setting
    how = ["--lora_rank=3", "--dora=True", "--lora_dropout=0.2", "--optimizer=adamw", "--schedule=constant"]

    def run(out, steps, *more):
        gc.collect()  # lets go of the lock of an earlier run
        done = run_here("train.py", *knobs, *how, f"--out_dir={folder / out}", f"--max_steps={steps}", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "DoRA r=3" in run("whole", 4)
    run("parts", 2)
    assert "DoRA r=3" in run("parts", 4, "--resume=True")
    got, want = (load_file(folder / out / "step_4" / ADAPTER) for out in ("parts", "whole"))
    assert got.keys() == want.keys() and len(got) == 3 * 14
    assert all(torch.equal(got[name], want[name]) for name in want)
    model = load_adapter(Llama.from_pretrained(folder / "base"), folder / "whole" / "step_4").eval()
    logits = model(TOKENS)[0]
    close(peft_logits(folder / "base", folder / "whole" / "step_4"), logits, 1e-5 * logits.abs().max().item())
    fresh = published(apply_lora(Llama.from_pretrained(folder / "base"), 3, 6, dora=True))
    magnitudes = [name for name in want if "magnitude" in name]
    assert len(magnitudes) == 14 and not any(torch.equal(want[name], fresh[name]) for name in magnitudes)


def test_dora_without_a_rank_is_refused(setting):  # noqa: F811
    folder, knobs = setting
    done = run_here("train.py", *knobs, "--dora=True", "--max_steps=1", f"--out_dir={folder / 'out'}")
    assert done.returncode == 2 and "dora" in done.stderr and done.stderr.count("\n") == 1


def test_a_magnitude_that_is_not_finite_is_named(base, tmp_path):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", use_dora=True, target_modules=["v_proj"])
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_magnitude_vector"
    edit_tensors({name: torch.full((16,), torch.nan)}, ADAPTER)(tmp_path / "theirs")
    with pytest.raises(ValueError) as error:
        load_adapter(tiny(), tmp_path / "theirs")
    one_line(error, "theirs", name)
