"""analysis/intruders.py and analysis/soften.py against peft's reduce_intruder_dimension and float64; the chance level."""
import json
import re

import pytest
import torch
from conftest import need, need_peft, run_here
from safetensors.torch import load_file
from test_lora import ADAPTER, TOKENS, with_adapters
from test_model import close, tiny
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_spectrum import gaussian, with_values
from transformers import LlamaForCausalLM

from analysis.chance import random_cosine
from analysis.intruders import intruders, left_vectors, softened
from llama.adapter_config import module_path
from llama.weights import PROJECTIONS
from lora import load_adapter, save_adapter
from model import Llama

# golden adapters and their bases; two more of other shapes are made by made_folder
GOLDEN_PAIRS = {"stories260k-r4-all": "data/stories260k", "gqa-r8-rslora": "golden/models/gqa-theta500k",
                "gqa-r16-qv": "golden/models/gqa-theta500k"}
SHAPES = {"tall": dict(hidden_size=32, intermediate_size=96), "wide": dict(hidden_size=48, intermediate_size=16, head_dim=12)}
FOLDERS = [*GOLDEN_PAIRS, *SHAPES]


def pair(name, folder):
    """(base, adapter) folders of one of FOLDERS."""
    if name in GOLDEN_PAIRS:
        return need(GOLDEN_PAIRS[name]), need(f"golden/adapters/{name}")
    model = tiny(**SHAPES[name])
    model.save_pretrained(folder / "base")
    save_adapter(with_adapters(model, rank=3, alpha=5), folder / "adapter", str(folder / "base"))
    return folder / "base", folder / "adapter"


def peft_softened(base, adapter, k, eps, share):
    """({module: its intruders by peft}, {module: the softened change by peft})."""
    peft = need_peft()
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), adapter)
    lines = []
    reduce_intruder_dimension(model, top_k=k, threshold_epsilon=eps, mitigation_lambda=share, logging_sink=lines.append)
    counts = {}
    for line in lines:
        found = re.match(r"base_model\.model\.(\S+): (?:Intruders: (\d+)|No intruders)", line)
        if found:
            counts[found[1]] = int(found[2] or 0)
    changes = {path: model.get_submodule(f"base_model.model.{path}").get_delta_weight("intruder_reduced") for path in counts}
    return counts, changes


def run_soften(base, adapter, out, **knobs):
    return run_here("analysis/soften.py", f"--base={base}", f"--adapter={adapter}", f"--out={out}/",
                    *(f"--{knob}={value}" for knob, value in knobs.items()))


def weights_of(base, adapter):
    """{module: (W0, W0 + its change)} in fp64, by our own reader."""
    model = load_adapter(Llama.from_pretrained(base, torch.float64), adapter)
    found = {}
    for layer, block in enumerate(model.layers):
        for module in block.modules():
            if hasattr(module, "deltas"):
                for (name, delta), (start, end) in zip(module.deltas().items(), module.spans):
                    W0 = module.weight[start:end].detach().double()
                    found[module_path(layer, name)] = (W0, W0 + delta.detach().double())
    return found


# ----------------------------------------------------------------------------- counting
@pytest.mark.parametrize("k, eps", [(10, 0.5), (3, 0.7), (1000, 0.3)])
@pytest.mark.parametrize("name", FOLDERS)
def test_counts_are_pefts(tmp_path, name, k, eps):
    base, adapter = pair(name, tmp_path)
    want, _ = peft_softened(base, adapter, k, eps, 0.75)
    counts = {path: intruders(W0, W, k, eps)["intruders"] for path, (W0, W) in weights_of(base, adapter).items()}
    assert counts == want and (eps != 0.7 or sum(counts.values()) > 0)


@pytest.mark.parametrize("name", FOLDERS)
def test_spectrum_counts_them(tmp_path, name):
    base, adapter = pair(name, tmp_path)
    done = run_here("spectrum.py", f"--base={base}", f"--tuned={adapter}", f"--out={tmp_path}/s.json", "--intruder_k=5",
                    "--intruder_eps=0.6")
    assert done.returncode == 0, done.stderr
    want, _ = peft_softened(base, adapter, 5, 0.6, 0.75)
    matrices = json.loads((tmp_path / "s.json").read_text())["matrices"]
    found = {module_path(r["layer"], r["module"]): r for r in matrices if r["matrix"] == "W"}
    assert {path: record["intruders"] for path, record in found.items()} == want
    for record in found.values():
        cosines = record["max_cosines"]
        assert len(cosines) == 5 and record["intruders"] == sum(cosine < 0.6 for cosine in cosines)
        assert record["random_cosine"] == random_cosine(record["shape"][0], min(record["shape"]))
    assert not any("intruders" in r for r in matrices if r["matrix"] != "W")
    assert "intruders" in done.stdout and f"{sum(want.values()):4} of" in done.stdout or len(want) > 1


def test_none_are_counted_where_none_are_asked_for_and_other_knobs_are_another_file(tmp_path):
    base, adapter = pair("tall", tmp_path)
    argv = [f"--base={base}", f"--tuned={adapter}", f"--out={tmp_path}/s.json"]
    done = run_here("spectrum.py", *argv, "--intruder_k=0")
    assert done.returncode == 0 and "max_cosines" not in (tmp_path / "s.json").read_text()
    done = run_here("spectrum.py", *argv)
    assert done.returncode == 2 and "other intruder_k" in done.stderr
    done = run_here("spectrum.py", *argv[:2], f"--out={tmp_path}/t.json", "--intruder_eps=1.5")
    assert done.returncode == 2 and "0 < eps <= 1" in done.stderr


def test_a_planted_direction_is_the_only_intruder():
    W0 = with_values([9.0, 7, 5, 3, 1], 30, 20)
    U, _, Vh = torch.linalg.svd(W0)
    planted = W0 + 8 * torch.outer(U[:, 25], Vh[12])
    found = intruders(W0, planted, k=4)
    assert found["intruders"] == 1 and found["max_cosines"][1] == pytest.approx(0, abs=1e-6)
    assert found["max_cosines"][0] == found["max_cosines"][2] == 1
    # half of it is left, and only of it
    soft, count = softened(W0, planted, 0.5, k=4)
    assert count == 1 and torch.allclose(soft, W0 + 4 * torch.outer(U[:, 25], Vh[12]), atol=1e-12)
    assert torch.allclose(softened(W0, planted, 1.0)[0], planted, atol=1e-12)
    # inputs (V) are not looked at
    turned = W0 + 8 * torch.outer(U[:, 0], Vh[12])
    assert intruders(W0, turned, k=4)["intruders"] == 0


def test_fewer_directions_than_k_and_vectors_that_are_there_already():
    W0, W = gaussian(6, 40), gaussian(6, 40, seed=1)
    found = intruders(W0, W, k=10)
    assert len(found["max_cosines"]) == 6 and intruders(W0, W, 10, left=left_vectors(W0)) == found


def test_a_large_matrix_needs_no_whole_svd():
    W0 = with_values([3.0 * 0.9 ** i for i in range(40)], 1060, 1030) + 1e-3 * gaussian(1060, 1030, seed=5)
    W = W0 + with_values([2.8], 1060, 1030, seed=9)
    want = intruders(W0, W, 6)
    found = intruders(W0, W, 6, values=torch.linalg.svdvals(W))
    assert found["intruders"] == want["intruders"] == 1 and found["max_cosines"] == pytest.approx(want["max_cosines"], abs=2e-3)


@pytest.mark.parametrize("k, eps", [(0, 0.5), (10, 0.0), (10, 1.1)])
def test_impossible_knobs_are_refused(k, eps):
    with pytest.raises(ValueError, match="leading directions"):
        intruders(gaussian(4, 4), gaussian(4, 4), k, eps)


@pytest.mark.parametrize("m, n", [(400, 400), (400, 100), (100, 400)])
def test_chance_is_what_random_directions_have(m, n):
    largest = []
    for seed in range(200):
        directions = torch.linalg.qr(gaussian(m, min(m, n), seed=seed)).Q
        random = gaussian(m, seed=seed + 1000)
        largest.append((directions.T @ (random / random.norm())).abs().max().item())
    assert random_cosine(m, min(m, n)) == pytest.approx(sorted(largest)[100], rel=0.04)
    assert random_cosine(576, 576) == pytest.approx(0.135, abs=0.002)


# ----------------------------------------------------------------------------- softening
@pytest.mark.parametrize("name", FOLDERS)
def test_softened_adapter_is_pefts(tmp_path, name):
    base, adapter = pair(name, tmp_path)
    done = run_soften(base, adapter, tmp_path / "out", soften=0.4, intruder_eps=0.7)
    assert done.returncode == 0, done.stderr
    counts, want = peft_softened(base, adapter, 10, 0.7, 0.4)
    assert f"{sum(counts.values())} of" in done.stdout and sum(counts.values()) > 0
    for path, (W0, W) in weights_of(base, tmp_path / "out").items():
        close(W - W0, want[path], 1e-5 * want[path].abs().max().item())
    # the rank is kept, and peft and we read the folder alike
    before, after = (load_file(folder / ADAPTER) for folder in (adapter, tmp_path / "out"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    same_logits(base, tmp_path / "out")


@pytest.mark.parametrize("name", FOLDERS)
def test_exact_ranks_hold_the_whole_softened_change(tmp_path, name):
    base, adapter = pair(name, tmp_path)
    done = run_soften(base, adapter, tmp_path / "out", soften=0.4, intruder_eps=0.7, rank="exact")
    assert done.returncode == 0 and " 0.00% of the change" in done.stdout, done.stderr
    after = weights_of(base, tmp_path / "out")
    for path, (W0, W) in weights_of(base, adapter).items():
        want, _ = softened(W0, W, 0.4, 10, 0.7)
        close(after[path][1], want, 2e-6 * want.abs().max().item())
    same_logits(base, tmp_path / "out")


def same_logits(base, adapter):
    tokens = TOKENS % 64
    theirs = need_peft().PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    ours = load_adapter(Llama.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        close(ours(tokens)[0], theirs(tokens).logits, 5e-4)


def test_a_share_of_one_changes_nothing_and_the_base_is_recognised(tmp_path):
    base, adapter = pair("wide", tmp_path)
    done = run_soften("", adapter, tmp_path / "out", soften=1, rank="exact")
    assert done.returncode == 0, done.stderr
    after = weights_of(base, tmp_path / "out")
    for path, (_, W) in weights_of(base, adapter).items():
        close(after[path][1], W, 1e-6)
    tiny(seed=5, **SHAPES["wide"]).save_pretrained(tmp_path / "other")
    done = run_soften(tmp_path / "other", tmp_path / "out", tmp_path / "again")
    assert done.returncode == 2 and "another base" in done.stderr


@pytest.mark.parametrize("knobs, message", [
    (dict(soften=1.5), "soften must be 0 to 1"), (dict(intruder_k=0), "leading directions"), (dict(rank="best"), "rank"),
    (dict(adapter="nowhere"), "no adapter_config.json"), (dict(adapter=""), "not set"), (dict(out="here"), "exists already")])
def test_bad_input_is_one_line(tmp_path, knobs, message):
    base, adapter = pair("tall", tmp_path)
    (tmp_path / "here").mkdir()
    if "out" in knobs:
        knobs["out"] = tmp_path / "here"
    done = run_soften(base, knobs.pop("adapter", adapter), knobs.pop("out", tmp_path / "out"), **knobs)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()
