"""spectrum.py against numpy's recorded SVD, torch.linalg.svd in float64, and laws that hold: bounds, scaling, closed forms."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import golden, need, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from analysis.chance import (random_edge, random_lora_singular_values, random_singular_values,
                             rounding_share)
from analysis.directions import compare_directions, leading_vectors, overlap
from analysis.folders import module_path, open_model
from analysis.singular import gram, lora_singular_values, singular_values
from llama.weights import PROJECTIONS
from lora import apply_lora, load_adapter, save_adapter
from model import Llama, LlamaConfig
from paper.noise import noise_experiment
from spectrum import analyse, describe, effective_rank

MATRICES = ("spectrum_W0", "spectrum_W1", "spectrum_delta")


# ----------------------------------------------------------------------------- helpers
def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values, m, n, seed=0):
    """A matrix [m, n] with the given singular values."""
    U, V = (torch.linalg.qr(gaussian(size, len(values), seed=seed + i)).Q for i, size in enumerate((m, n)))
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


def tiny(seed=0, **changes):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True)
    return Llama(LlamaConfig(**{**shape, **changes})).init_weights(seed)


@pytest.fixture
def folders(tmp_path):
    """A base, a model trained in full and an adapter of rank 3 for it, as folders."""
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for i, p in enumerate(base.parameters()):
            if p.dim() == 2:
                p += 1e-3 * gaussian(*p.shape, seed=i).float()
    base.save_pretrained(tmp_path / "full")
    torch.manual_seed(0)
    adapted = apply_lora(tiny(), 3, 6, 0.0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.01)
    save_adapter(adapted, tmp_path / "lora", str(tmp_path / "base"))
    return tmp_path


def spectrum_of(folders, *tuned, **knobs):
    """Run the script on some of the folders; (its process, the JSON it wrote)."""
    knobs = {"base": folders / "base", "tuned": ",".join(str(folders / t) for t in tuned), "out": folders / "out.json",
             "subspaces": "1,4", **knobs}
    process = run_here("spectrum.py", *(f"--{k}={v}" for k, v in knobs.items()))
    written = folders / "out.json"
    return process, json.loads(written.read_text()) if process.returncode == 0 else None


def one_line(process, *words):
    lines = [line for line in process.stderr.split("\n") if "%|" not in line]  # but for the progress bar
    assert process.returncode == 2 and len(lines) == 2 and lines[0].startswith("spectrum.py: error:"), process.stderr
    for word in words:
        assert word in lines[0]


# ----------------------------------------------------------------------------- singular values
@pytest.mark.parametrize("method", ["auto", "gram", "svd"])
def test_golden_values_and_ranks(method):
    for case in golden("spectrum")["cases"]:
        W0, W1 = (torch.tensor(case[name], dtype=torch.float32) for name in ("W0", "W1"))
        for A, name in zip((W0, W1, W1.double() - W0.double()), MATRICES):
            want = torch.tensor(case[name]["singular_values"], dtype=torch.float64)
            values, bound, used = singular_values(A, method, fractions=(0.5, 0.9, 0.99))
            error = (values - want).abs().max()
            assert error <= max(bound, 1e-15 * want[0]) and error <= (1e-9 if used == "svd" else 1e-6) * want[0]
            assert {p: effective_rank(values, float(p)) for p in case[name]["min_rank"]} == \
                {p: found["rank"] for p, found in case[name]["min_rank"].items()}


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e20]), decay=st.integers(0, 12),
       method=st.sampled_from(["auto", "gram", "svd"]))
def test_errors_stay_below_the_bound(m, n, scale, decay, method):
    A = scale * with_values(np.logspace(0, -decay, min(m, n)).tolist(), m, n)
    want = torch.linalg.svdvals(A)
    values, bound, _ = singular_values(A, method)
    assert values.shape == want.shape and (values.diff() <= 0).all()
    assert (values - want).abs().max() <= bound + 1e-14 * want[0]


def test_auto_leaves_the_gram_matrix_where_it_is_not_accurate_enough():
    steep = with_values([1.0, 1e-4, 1e-9], 30, 20)
    assert singular_values(steep)[2] == "gram"
    values, bound, used = singular_values(steep, tolerance=1e-10)
    assert used == "svd" and bound < 1e-13 and torch.allclose(values[:3], torch.tensor([1.0, 1e-4, 1e-9]).double(), rtol=1e-5)
    # half of the squares in half of the values, up to rounding: the rank at 0.5 hangs on the last digit
    tie = with_values([1.0] * 8, 8, 8)
    assert singular_values(tie, fractions=(0.5,))[2] == "svd" and singular_values(tie, fractions=(0.6,))[2] == "gram"


def test_gram_is_the_lower_triangle_of_the_small_side():
    for A in (gaussian(50, 30), gaussian(30, 50)):
        whole = A.T @ A if A.shape[0] > A.shape[1] else A @ A.T
        assert torch.allclose(gram(A, block=7).tril(), whole.tril(), atol=1e-12)


def test_zero_and_not_finite():
    assert singular_values(torch.zeros(3, 5))[0].tolist() == [0, 0, 0]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            singular_values(torch.full((2, 2), bad))


# ----------------------------------------------------------------------------- effective rank
def test_effective_rank_counts_squares():
    assert effective_rank([1, 1, 1, 1], 0.5) == 2 and effective_rank([1, 1, 1, 1], 0.51) == 3
    assert effective_rank([3, 1], 0.9) == 1 and effective_rank([1, 3]) == 1  # 9 of 10; in any order
    assert effective_rank([2.0, 1, 0, 0], 1.0) == 2 and effective_rank([0.0, 0.0]) == 0 and effective_rank([]) == 0
    assert effective_rank(torch.tensor([5.0, 5.0])) == 2


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_effective_rank_is_the_least_and_knows_no_scale(values, fraction):
    k, ordered = effective_rank(values, fraction), np.sort(values)[::-1] ** 2
    assert ordered[:k].sum() >= fraction * ordered.sum() * (1 - 1e-12) and ordered[:k - 1].sum() < fraction * ordered.sum()
    assert effective_rank([4 * v for v in values], fraction) == k


@pytest.mark.parametrize("values, fraction", [([1, -1], 0.9), ([math.nan], 0.9), ([1.0], 0.0), ([1.0], 1.5)])
def test_effective_rank_refuses(values, fraction):
    with pytest.raises(ValueError):
        effective_rank(values, fraction)


# ----------------------------------------------------------------------------- LoRA
@pytest.mark.parametrize("m, n, r", [(40, 30, 4), (30, 40, 16), (12, 50, 20), (50, 12, 20), (10, 10, 1)])
def test_closed_form_is_the_dense_one(m, n, r):
    A, B = gaussian(r, n), gaussian(m, r, seed=1)
    values = lora_singular_values(A, B, -1.5)
    dense = torch.linalg.svdvals(-1.5 * B @ A)
    assert len(values) == min(m, n, r) and torch.allclose(values, dense[:len(values)], rtol=1e-12, atol=1e-12 * dense[0])
    assert (dense[r:] < 1e-12 * dense[0]).all()


@pytest.mark.parametrize("name, base", [
    ("stories260k-r4-all", "data/stories260k"), ("gqa-r8-rslora", "golden/models/gqa-theta500k"),
    ("gqa-r16-qv", "golden/models/gqa-theta500k")])
def test_golden_adapters_have_the_spectra_of_their_merged_change(name, base, tmp_path):
    folder, base = need(f"golden/adapters/{name}"), need(base)
    process = run_here("spectrum.py", f"--base={base}", f"--tuned={folder}", f"--out={tmp_path}/s.json", "--subspaces=")
    assert process.returncode == 0, process.stderr
    written = json.loads((tmp_path / "s.json").read_text())["matrices"]
    found = {(r["layer"], r["module"]): r for r in written if r["matrix"] == "D"}
    model = load_adapter(Llama.from_pretrained(base), folder)
    for layer, layer_block in enumerate(model.layers):
        deltas = {k: v for m in layer_block.modules() if hasattr(m, "deltas") for k, v in m.deltas().items()}
        assert {module for at, module in found if at == layer} == deltas.keys()
        for module, delta in deltas.items():
            want = torch.linalg.svdvals(delta.detach().double()).numpy()
            mine = np.array(found[layer, module]["singular_values"])
            np.testing.assert_allclose(mine, want[:len(mine)], atol=1e-6 * want[0])
            assert found[layer, module]["effective_rank"]["0.9"] == effective_rank(want)


# ----------------------------------------------------------------------------- chance
def test_a_sampled_gaussian_has_the_predicted_spectrum():
    for m, n in ((400, 300), (200, 500), (300, 300)):
        values = torch.linalg.svdvals(gaussian(m, n)).numpy()
        values /= np.linalg.norm(values)
        want = random_singular_values(m, n)
        assert np.abs(values - want).max() < 0.03 * want[0] and abs(values[0] / random_edge(m, n) - 1) < 0.02
        for fraction in (0.5, 0.9, 0.99):
            assert abs(effective_rank(values, fraction) - effective_rank(want, fraction)) <= 2


def test_llama_2_shapes_have_the_papers_ranks_by_chance_alone():
    """Its figures 6 and S7: about 2000 of 4096 for attention, up to 2800 or so for MLP (Gaussian samples: 51.1%, 71.2%)."""
    assert abs(effective_rank(random_singular_values(4096, 4096)) - 0.511 * 4096) < 6
    assert abs(effective_rank(random_singular_values(4096, 11008)) - 0.712 * 4096) < 6


def test_what_is_above_chance_is_counted():
    noise = gaussian(100, 80)
    noise /= noise.norm()
    values = torch.linalg.svdvals(noise + with_values([3.0, 2.0], 100, 80))
    record = describe(values, 0.0, "svd", (100, 80), (0.9,))
    assert record["above_random"] == 2 and 0.9 < record["above_random_share"] < 0.95 and record["effective_rank"] == {"0.9": 2}
    assert describe(torch.linalg.svdvals(noise), 0.0, "svd", (100, 80), (0.9,))["above_random"] <= 1
    low = describe(lora_singular_values(gaussian(16, 80), gaussian(100, 16, seed=1), 1), 0.0, "lora", (100, 80), (0.9,), 16)
    assert low["random_rank"]["0.9"] == effective_rank(random_lora_singular_values(100, 80, 16)) in (12, 13, 14)


def test_rounding_is_told_from_change():
    W0 = gaussian(50, 50).float()
    stored = (W0 + 1e-6 * gaussian(50, 50, seed=1).float()).bfloat16()
    assert 0.8 < rounding_share(stored, stored.double() - W0.double()) <= 1
    changed = (W0 + gaussian(50, 50, seed=1).float()).bfloat16()
    assert 0 < rounding_share(changed, changed.double() - W0.double()) < 1e-4
    assert rounding_share(W0 + 1e-6, torch.full((50, 50), 1e-6).double()) == 0


# ----------------------------------------------------------------------------- directions
@pytest.mark.parametrize("m, n", [(60, 40), (40, 60), (1060, 1030)], ids=["tall", "wide", "krylov"])
def test_leading_vectors_are_svds(m, n):
    A = with_values([3.0 * 0.9 ** i for i in range(60 if n > 60 else 30)], m, n) + 1e-3 * gaussian(m, n, seed=5)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    left, right, sines = leading_vectors(A, (1, 8), S)
    for mine, want in ((left, U[:, :8]), (right, Vh[:8].T)):
        assert torch.allclose(mine.T @ mine, torch.eye(8).double(), atol=1e-10)
        for k in (1, 8):
            outside = (mine[:, :k] - want[:, :k] @ (want[:, :k].T @ mine[:, :k])).norm().item()
            assert outside <= sines[k] + 1e-10 <= 1.1e-2


def test_a_space_that_is_not_defined_is_said_to_be_so():
    A = with_values([2.0, 1.0, 1.0], 30, 20)  # which one is second?
    assert leading_vectors(A, (1, 2, 3), torch.linalg.svdvals(A))[2][2] > 0.1
    records = analyse_pair(A, A)
    assert records["overlap_error"]["2"] == 1.0 and records["overlap_error"]["1"] < 1e-6


def analyse_pair(W0, W, sizes=(1, 2, 3)):
    leading = leading_vectors(W0, sizes, torch.linalg.svdvals(W0))
    return compare_directions(leading, W, torch.linalg.svdvals(W), W - W0, sizes)


def test_new_and_old_directions():
    W0 = with_values([5.0, 4, 3, 2, 1], 30, 20)
    kept = analyse_pair(W0, 2 * W0)
    assert kept["entered"] == {"1": 0, "2": 0, "3": 0} and kept["overlap_out"]["2"] == pytest.approx(1)
    assert kept["change_out"]["1"] == pytest.approx(25 / 55) and kept["change_in"]["3"] == pytest.approx(50 / 55)
    U, _, Vh = torch.linalg.svd(W0)
    intruder = W0 + 10 * torch.outer(U[:, 10], Vh[12])
    found = analyse_pair(W0, intruder)
    assert found["entered"] == {"1": 1, "2": 1, "3": 1} and found["overlap_out"]["1"] == pytest.approx(0, abs=1e-9)
    assert found["overlap_in"]["3"] == pytest.approx(2 / 3) and found["change_in"]["3"] == pytest.approx(0, abs=1e-9)
    assert found["random_out"]["3"] == 3 / 30 and found["random_in"]["3"] == 3 / 20


def test_overlap_of_random_spaces_is_chance():
    found = []
    for seed in range(30):
        before = torch.linalg.qr(gaussian(50, 10, seed=seed)).Q
        after = torch.linalg.qr(gaussian(50, 10, seed=seed + 100)).Q
        found.append(overlap((before.T @ after).square(), 10))
    assert abs(np.mean(found) - 10 / 50) < 0.03


# ----------------------------------------------------------------------------- the script
def test_script_writes_what_dense_svd_gives(folders):
    process, written = spectrum_of(folders, "full", "lora")
    assert process.returncode == 0, process.stderr
    assert written["kind"] == "spectrum" and [c["lora_rank"] for c in written["checkpoints"]] == [None, 3]
    base, full = (load_file(folders / name / "model.safetensors") for name in ("base", "full"))
    adapter = load_file(folders / "lora" / "adapter_model.safetensors")
    for record in written["matrices"]:
        path = module_path(record["layer"], record["module"])
        W0, W = (weights[f"{path}.weight"].double() for weights in (base, full))
        if record["checkpoint"] == 1:
            A, B = (adapter[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
            W = W0 + 2 * B @ A
        want = torch.linalg.svdvals({"W0": W0, "W": W, "D": W - W0}[record["matrix"]]).numpy()
        mine = np.array(record["singular_values"])
        np.testing.assert_allclose(mine, want[:len(mine)], atol=1e-6 * want[0])
        assert record["effective_rank"]["0.9"] == effective_rank(want) and record["norm"] == pytest.approx(np.linalg.norm(want))
        assert len(mine) == (3 if record["matrix"] == "D" and record["checkpoint"] == 1 else min(record["shape"]))
        assert ("overlap_out" in record) == (record["matrix"] == "W")
    assert len(written["matrices"]) == 2 * 7 * 5
    for module in PROJECTIONS:
        assert process.stdout.count(module) == 2  # a line for each checkpoint


def test_modules_layers_and_run_folders(folders):
    run = folders / "run"
    for step, source in ((10, "full"), (2, "full"), (30, "base")):
        shutil.copytree(folders / source, run / f"step_{step}")
        (run / f"step_{step}" / "state").mkdir()
        (run / f"step_{step}" / "state" / "state.json").write_text(json.dumps(
            {"step": step, "tokens": step * 100, "config": {"base": str(folders / "base")}}))
    shutil.copytree(folders / "full", run / "step_40.tmp")
    process = run_here("spectrum.py", f"--tuned={run}", "--modules=q_proj,down_proj", "--layers=1", "--subspaces=")
    assert process.returncode == 0, process.stderr
    written = json.loads((run / "spectrum.json").read_text())
    assert [c["step"] for c in written["checkpoints"]] == [2, 10, 30] and written["checkpoints"][1]["tokens"] == 1000
    assert {(r["layer"], r["module"]) for r in written["matrices"]} == {(1, "q_proj"), (1, "down_proj")}
    same = [r for r in written["matrices"] if r["matrix"] == "D" and r["checkpoint"] == 2]
    assert all(r["effective_rank"]["0.9"] == 0 and r["method"] == "zero" for r in same)  # step_30 is the base itself


def test_killed_and_started_again_gives_the_same(folders, monkeypatch):
    process, whole = spectrum_of(folders, "full", "lora")
    lines = [{"made_with": whole["made_with"]}]
    first = [r for r in whole["matrices"] if (r["layer"], r["module"]) == (0, "q_proj")]
    (folders / "out.json").unlink()
    marked = json.loads(json.dumps(first))
    marked[0]["norm"] = -1.0  # to be seen again if it was not done again
    part = folders / "out.json.part"
    part.write_text("".join(json.dumps(line) + "\n" for line in [*lines, marked]) + '[{"layer": 0, "modu')
    process, again = spectrum_of(folders, "full", "lora")
    assert process.returncode == 0 and not part.exists()
    assert again["matrices"][0]["norm"] == -1.0 and again["matrices"][1:] == whole["matrices"][1:]
    process, _ = spectrum_of(folders, "full", "lora")
    assert process.returncode == 0 and "complete already" in process.stdout
    one_line(spectrum_of(folders, "full", "lora", fractions="0.8")[0], "out.json", "other fractions")
    one_line(spectrum_of(folders, "full")[0], "other checkpoints")


def test_bad_input_is_one_line(folders):
    base = load_file(folders / "base" / "model.safetensors")
    shutil.copytree(folders / "base", folders / "nan")
    base["model.layers.1.mlp.up_proj.weight"] = torch.full((48, 32), math.nan)
    save_file(base, folders / "nan" / "model.safetensors")
    one_line(spectrum_of(folders, "nan")[0], "nan", "layers.1.mlp.up_proj", "NaN")
    (folders / "out.json.part").unlink()
    tiny(hidden_size=64, head_dim=16).save_pretrained(folders / "other")
    one_line(spectrum_of(folders, "other")[0], "other", "misshaped")
    one_line(spectrum_of(folders, "lora", base=folders / "full")[0], "another base")
    one_line(spectrum_of(folders, "absent")[0], "absent", "no such folder")
    one_line(spectrum_of(folders, "full", "full")[0], "named twice")
    one_line(run_here("spectrum.py"), "tuned is not set")
    one_line(run_here("spectrum.py", f"--tuned={folders / 'full'}"), "no run and no checkpoint of train.py")
    one_line(run_here("spectrum.py", f"--tuned={folders / 'full'}", "--out=x.json"), "base is not set")
    one_line(spectrum_of(folders, "full", layers="7")[0], "layers", "0 to 1")
    one_line(spectrum_of(folders, "full", fractions="1.5")[0], "fractions")
    one_line(spectrum_of(folders, "full", modules="qproj")[0], "qproj")
    (folders / "out.json").write_text("{")
    one_line(spectrum_of(folders, "full")[0], "out.json", "cut short")
    (folders / "lora" / "adapter_model.safetensors").write_bytes(b"")
    one_line(spectrum_of(folders, "lora", out=folders / "o.json")[0], "adapter_model.safetensors")


def test_two_shards_and_a_tied_head_are_read(folders):
    base = load_file(folders / "base" / "model.safetensors")
    base["lm_head.weight"] = base.pop("model.embed_tokens.weight")
    names = sorted(base)
    for i, part in enumerate((names[:5], names[5:])):
        save_file({name: base[name] for name in part}, folders / "base" / f"part{i}.safetensors")
    (folders / "base" / "model.safetensors").unlink()
    (folders / "base" / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: f"part{int(i >= 5)}.safetensors" for i, name in enumerate(names)}}))
    process, written = spectrum_of(folders, "lora")
    assert process.returncode == 0 and len(written["matrices"]) == 2 * 7 * 3, process.stderr


# ----------------------------------------------------------------------------- experiments
def test_weak_noise_has_full_rank_and_moves_the_spectrum_in_proportion(tmp_path):
    found = noise_experiment(100, 0, (0.9,), torch.device("cpu"))
    ranks = [spectrum_["effective_rank"]["0.9"] for spectrum_ in found["spectra"].values()]
    assert all(abs(rank - 51) <= 2 for rank in ranks)
    moved = {d["log10_c"]: d["mean_difference"] for d in found["differences"]}
    assert len(moved) == 13 and moved[-6] < 1e-5 and 0.2 < moved[0] and 30 < moved[-3] / moved[-5] < 300
    process = run_here("paper/noise.py", "--size=20", f"--out={tmp_path}/sub/n.json")
    assert process.returncode == 0, process.stderr
    written = json.loads((tmp_path / "sub" / "n.json").read_text())
    assert written["kind"] == "noise" and set(written["spectra"]) == {"A", "0.1 B", "A + 0.1 B"}
    assert "out is not set" in run_here("paper/noise.py").stderr


def test_routes_are_timed():
    process = run_here("bench/spectrum.py", "--size=64")
    assert process.returncode == 0, process.stderr
    assert "svdvals, fp64" in process.stdout and "7B" in process.stdout


def test_a_record_of_every_matrix_kind(folders):
    before = open_model(folders / "base", LlamaConfig.from_json(folders / "base"))
    after = open_model(folders / "full", LlamaConfig.from_json(folders / "full"))
    records = analyse(before, [after, after], 0, "k_proj", "cpu", fractions=(0.9,), subspaces=(1, 1000),
                      method="auto", tolerance=1e-6)
    assert [(r["matrix"], r["checkpoint"]) for r in records] == [("W0", None), ("W", 0), ("D", 0), ("W", 1), ("D", 1)]
    assert list(records[1]["overlap_in"]) == ["1"]  # more directions than the matrix has are left out
