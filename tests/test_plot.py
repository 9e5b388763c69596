"""plot.py: what stands in the figures is what stands in the files; names apart, colours told apart; bad input survived."""
import itertools
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

import train
from configurator import find_knobs
from paper.looks import BASE, FULL, PAGE, RANKS, STYLE, place_names, plt, spread_apart
from paper.plot_curves import Metrics, draw_curves, draw_pareto, draw_regularisers, draw_story
from paper.plot_samples import draw_diversity, draw_pass_at_k
from paper.plot_spectra import draw_directions, draw_effective_ranks, draw_spectra, ranks_of_changes
from paper.plot_speed import draw_throughput, draw_training
from paper.plot_sweeps import draw_alphas, draw_learning_rates, draw_ranks, draw_targets
from paper import results
from paper.results import (SETTING, ends_of, is_base, main_settings, mean_of_seeds, points_of, problems, read_run,
                           targets_name)

BASE_CONFIG = {"base": "models/base", "data": "data/gsm8k", "lora_rank": 0, "lora_alpha": None, "lora_targets": "all",
               "learning_rate": 1e-5, "weight_decay": 0.0, "lora_dropout": 0.05, "optimizer": "lionw", "seed": 1, "max_steps": 10}
LEARN, FORGET = "gsm8k_strict_match", "forgetting"
LEARNING = (LEARN, "humaneval_pass@1", "loss val")
METRICS = Metrics(LEARNING, (FORGET,), {}, "auto")


# ----------------------------------------------------------------------------- helpers
@pytest.fixture(autouse=True)
def fresh():
    problems.clear()
    matplotlib.rcParams.update(STYLE)
    yield
    plt.close("all")


def write_run(folder, results=(), log=(), **changes):
    """A run folder; results: (step, metric, value[, stderr])."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {**BASE_CONFIG, **changes}}))
    (folder / "results.jsonl").write_text("".join(json.dumps(
        {"run": folder.name, "step": s, "tokens": 1000 * s, "epoch": s / 10, "metric": m, "value": v,
         "stderr": e[0] if e else None}) + "\n" for s, m, v, *e in results))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder


def write_base(folder):
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(
        {"run": "base", "step": 0, "metric": m, "value": v, "stderr": 0.01}) + "\n" for m, v in ((LEARN, 0.1), (FORGET, 0.6))))


def study(folder, lengths=(10, 20, 40), ranks=(0, 16, 64), **more):
    """Separate runs of every length and rank; learning = rank / 1000 + length / 100, forgetting what is missing to 0.6."""
    for rank in ranks:
        for n in lengths:
            forgot = n / 1000 + (0.1 if not rank else 0)
            write_run(folder / f"r{rank}-{n}", ((n, LEARN, rank / 1000 + n / 100), (n, FORGET, 0.6 - forgot)),
                      lora_rank=rank, max_steps=n, **more)
    write_base(folder / "base")
    return folder


def load(folder):
    return points_of([read_run(f) for f in sorted(folder.iterdir())])


def line_with(ax, colour):
    """(xs, ys) of the first line of a colour."""
    line = next(line for line in ax.lines if line.get_color() == colour)
    return list(line.get_xdata()), list(line.get_ydata())


def names_in(fig):
    """The names beside lines as placed: [(text, box)]."""
    place_names(fig)
    fig.canvas.draw()
    extent = matplotlib.text.Text.get_window_extent  # an annotation's own would count the line that leads to it
    return [(t.get_text(), extent(t)) for ax in fig.axes for t in ax.texts]


def run_plot(out, *argv, **knobs):
    return run_here("paper/plot.py", *(f"--{k}={v}" for k, v in {"out_dir": out, "dpi": 40, "formats": "png", **knobs}.items()), *argv)


# ----------------------------------------------------------------------------- small parts
@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12).map(sorted), st.floats(0.01, 2))
def test_names_are_spread_no_more_than_needed(wanted, gap):
    got = spread_apart(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in zip(got, got[1:]))
    assert np.mean(got) == pytest.approx(np.mean(wanted), abs=1e-6)  # the least-squares answer moves no centre
    if all(b - a >= gap for a, b in zip(wanted, wanted[1:])):
        assert got == pytest.approx(wanted, abs=1e-9)


def test_intervals():
    assert mean_of_seeds([(0.5, None)]) == (0.5, None)
    assert mean_of_seeds([(0.5, 0.1)]) == (0.5, pytest.approx(0.196))
    mean, half = mean_of_seeds([(1.0, 0.1), (2.0, 0.1), (3.0, 0.1)])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)  # Student's t with two degrees of freedom
    assert mean_of_seeds([(1.0, 0.3), (2.0, 0.4)]) == (1.5, pytest.approx(1.96 * 0.35))
    assert mean_of_seeds([(1.0, None), (2.0, 0.4)])[1] is None


def test_targets_have_names():
    assert targets_name("all") == "all" and targets_name("q_proj,k_proj, v_proj,o_proj") == "attention"
    assert targets_name("up_proj,gate_proj,down_proj") == "mlp" and targets_name("q_proj") == "q_proj"


def seen_as(rgb, matrix):
    """CIE Lab of a colour as a colour-blind reader sees it (Machado et al. 2009), by the standard formulas."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb])
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("matrix", [
    np.eye(3).tolist(),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]],
    ids=["normal", "protanopia", "deuteranopia"])
def test_colours_are_told_apart(matrix):
    labs = [seen_as(to_rgb(c), matrix) for c in (FULL, BASE, *RANKS[:3])]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(labs) for b in labs[:i]) > 12
    assert all(lab[0] < 75 for lab in labs)  # dark enough on white


def test_runs_that_are_left_out_are_named_with_the_reason(tmp_path):
    for name, base in (("a", "one/step_7"), ("b", "one/step_7"), ("c", "other/step_7")):
        write_run(tmp_path / name, ((10, LEARN, 0.5),), ({"step": 0},), base=base, max_steps=10)
    points, _ = load(tmp_path)
    assert len(points) == 1 and set(problems) == {"b: a second run of one setting, seed and length, left out",
                                                  "c: its base other/step_7 has the name of one/step_7, left out"}


# ----------------------------------------------------------------------------- what is drawn
def test_learning_curve_shows_the_files_numbers(tmp_path):
    points, bases = load(study(tmp_path / "runs"))
    fig = draw_curves(points, bases, LEARNING, METRICS)
    ax, = fig.axes
    assert line_with(ax, FULL) == ([1, 2, 4], pytest.approx([0.1, 0.2, 0.4]))  # epochs
    assert line_with(ax, RANKS[1]) == ([1, 2, 4], pytest.approx([0.164, 0.264, 0.464]))
    dashed = line_with(ax, BASE)
    assert set(dashed[1]) == {0.1} and ax.get_ylabel() == "GSM8K accuracy" and ax.get_title() == "gsm8k"
    assert {text for text, _ in names_in(fig)} == {"full", "LoRA r=16", "LoRA r=64", "base"}


def test_names_do_not_overlap_and_are_large_enough(tmp_path):
    for rank in (0, 2, 4, 8, 16, 64, 256):
        write_run(tmp_path / "runs" / f"r{rank}", [(n, LEARN, 0.5 + rank * 1e-6) for n in (1, 10)], lora_rank=rank)
    write_base(tmp_path / "runs" / "base")
    fig = draw_curves(*load(tmp_path / "runs"), LEARNING, METRICS)
    boxes = [box for _, box in names_in(fig)]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert fig.get_figwidth() <= PAGE
    assert all(t.get_fontsize() >= 7 for t in fig.findobj(matplotlib.text.Text) if t.get_text())


def test_one_run_of_many_checkpoints_is_a_curve_and_val_losses_are_metrics(tmp_path):
    log = [{"step": s, "tokens": s * 100, "epoch": s / 100, "loss": 3 - s / 10, "lr": 1e-3, "tok_per_s": 5.0, "peak_gb": 1.0}
           for s in (1, 2, 3, 4)]
    log += [{"step": s, "tokens": s * 100, "val": {"val": 2 - s / 10, "stories": 1 + s / 10}} for s in (0, 2, 4)]
    write_run(tmp_path / "runs" / "a", log=log)
    points, bases = load(tmp_path / "runs")
    ax, = draw_curves(points, bases, LEARNING, METRICS).axes
    assert line_with(ax, FULL) == ([200, 400], pytest.approx([1.8, 1.6])) and bases["gsm8k", "base", "loss val"][0] == 2
    assert [p.place["epoch"] for p in points] == [0.02, 0.04] and "less is better" in ax.get_ylabel()
    fig = draw_training([read_run(tmp_path / "runs" / "a")])
    assert list(fig.axes[0].lines[0].get_ydata()) == [2.9, 2.8, 2.7, 2.6]

    # a longer run that made a base has other losses, and is shown only where it is alone
    longer = [{"step": s, "tokens": s * 1000, "loss": 9.0} for s in (1, 2, 3)]
    write_run(tmp_path / "runs" / "made", log=longer, scratch=True)
    both = [read_run(tmp_path / "runs" / name) for name in ("a", "made")]
    assert list(draw_training(both).axes[0].lines[0].get_ydata()) == [2.9, 2.8, 2.7, 2.6]
    assert list(draw_training(both[1:]).axes[0].lines[0].get_ydata()) == [9.0, 9.0, 9.0]


def noted():
    return [problem for problem in problems if not problem.startswith("empty files")]


def test_training_losses_have_a_panel_for_each_dataset_and_say_what_is_left_out(tmp_path):
    problems.clear()
    for name, data, last in (("a", "data/code", 3), ("b", "data/code", 2), ("c", "data/math", 1)):
        log = [{"step": s, "tokens": s * 100, "loss": float(last)} for s in range(1, last + 1)]
        write_run(tmp_path / "runs" / name, log=log, data=data)
    code, math = draw_training([read_run(tmp_path / "runs" / name) for name in "abc"]).axes
    assert (code.get_title(), math.get_title()) == ("code", "math")
    assert list(code.lines[0].get_ydata()) == [3.0, 3.0, 3.0] and list(math.lines[0].get_ydata()) == [1.0]
    assert noted() == ["training loss: the longest run of each rank; runs left out: 1"]


def test_settings_that_no_curve_shows_are_noted(tmp_path):
    problems.clear()
    write_run(tmp_path / "runs/a", ((10, LEARN, 0.1),), lora_rank=4)
    write_run(tmp_path / "runs/b", ((10, LEARN, 0.2),), lora_rank=4, lora_targets="attention", schedule="constant")
    points, bases = load(tmp_path / "runs")
    draw_curves(points, bases, LEARNING, METRICS)
    assert noted() == ["gsm8k: of 2 settings of LoRA r=4 the curves show the one with lora_targets=all, schedule=cosine"]


def test_seeds_become_one_point_with_an_interval(tmp_path):
    for seed, value in ((1, 0.1), (2, 0.2), (3, 0.3)):
        write_run(tmp_path / "runs" / f"s{seed}", ((10, LEARN, value),), seed=seed)
    points, _ = load(tmp_path / "runs")
    assert len(points) == 1 and points[0].values[LEARN] == (pytest.approx(0.2), pytest.approx(4.303 * 0.1 / 3 ** 0.5, rel=1e-3))
    assert draw_curves(points, {}, LEARNING, METRICS).axes[0].collections  # the bar


def test_main_setting_is_the_one_with_most_lengths_then_the_papers(tmp_path):
    study(tmp_path / "runs", ranks=(16,))
    write_run(tmp_path / "runs" / "other", ((10, LEARN, 0.9),), lora_rank=16, learning_rate=1.0)
    write_run(tmp_path / "runs" / "mlp", ((10, LEARN, 0.9),), lora_rank=8, lora_targets="mlp", max_steps=10)
    write_run(tmp_path / "runs" / "all", ((10, LEARN, 0.1),), lora_rank=8, max_steps=10)
    points, _ = load(tmp_path / "runs")
    mains = dict(main_settings(points))
    assert dict(mains[16][5])["learning_rate"] == "1e-05" and mains[8][4] == "all"


def test_pareto_is_better_further_up_and_right(tmp_path):
    points, bases = load(study(tmp_path / "runs"))
    ax, = draw_pareto(points, bases, METRICS).axes
    offsets = {tuple(np.round(o, 4)) for c in ax.collections if hasattr(c, "get_offsets") for o in np.asarray(c.get_offsets())}
    assert {(0.49, 0.1), (0.48, 0.2), (0.46, 0.4), (0.6, 0.1)} <= offsets  # full, and the base's star
    sizes = next(c.get_sizes() for c in ax.collections if len(np.asarray(c.get_offsets())) == 3)
    assert sizes[0] < sizes[1] < sizes[2]  # longer is larger
    for run in ("a", "b"):
        write_run(tmp_path / "losses" / run, log=[
            {"step": s, "tokens": s, "val": {"val": 2.0 - s / 9, "stories": 1.0 + s / 9}} for s in (0, 1, 2)])
    ax, = draw_pareto(*load(tmp_path / "losses"), Metrics(LEARNING, ("loss stories",), {}, "auto")).axes
    assert ax.xaxis_inverted() and ax.yaxis_inverted()


def test_ranks_targets_rates_alphas_and_regularisers(tmp_path):
    runs = study(tmp_path / "runs")
    number = 0

    def more(value, **changes):
        nonlocal number
        number += 1
        write_run(runs / f"x{number}", ((20, LEARN, value), (20, FORGET, 0.5)), max_steps=20, **changes)

    for targets in ("attention", "mlp"):
        for rank in (16, 64):
            more(0.2 if targets == "mlp" else 0.1, lora_rank=rank, lora_targets=targets)
    for rate in (1e-4, 1e-3):
        more(0.3, lora_rank=16, learning_rate=rate)
        more(0.4, learning_rate=rate)
        for alpha in (16.0, 64.0):
            more(alpha / 100, lora_rank=16, lora_alpha=alpha, learning_rate=rate)
    more(0.35, weight_decay=1e-3)
    points, bases = load(runs)

    learn, forget = draw_ranks(points, bases, METRICS).axes
    xs = next(list(line.get_xdata()) for line in learn.lines if list(line.get_ydata()) == pytest.approx([0.216, 0.264]))
    assert xs == [0, 1] and [t.get_text() for t in learn.get_xticklabels()] == ["16", "64", "full"]
    assert any(list(line.get_xdata()) == [2] and list(line.get_ydata()) == pytest.approx([0.2]) for line in learn.lines)

    learn, forget = draw_targets(points, bases, METRICS).axes
    assert line_with(learn, RANKS[0]) == ([0, 1, 2], pytest.approx([0.1, 0.2, 0.216]))
    learn, forget = draw_learning_rates(points, bases, METRICS).axes
    assert line_with(learn, FULL) == ([1e-5, 1e-4, 1e-3], pytest.approx([0.2, 0.4, 0.4]))
    learn, forget = draw_alphas(points, bases, METRICS).axes
    found = {tuple(np.round(line.get_ydata(), 3)) for line in learn.lines}
    assert {(0.16, 0.16), (0.64, 0.64), (0.216, 0.3, 0.3)} <= found and learn.get_xscale() == "log"
    fig = draw_regularisers(points, bases, METRICS)
    assert "full, weight decay 0.001" in [t.get_text() for t in fig.legends[0].get_texts()]


def test_pass_at_k_and_diversity(tmp_path):
    write_base(tmp_path / "runs" / "llama")
    for rank in (0, 64):
        passed = [(20, f"humaneval_pass@{k}", 0.1 * (i + 1), 0.01) for i, k in enumerate((1, 4, 16))]
        unique = [(20, "humaneval_unique_passed", 3.0, 0.1), (20, "humaneval_unique_failed", 20.0, 1.0)]
        write_run(tmp_path / "runs" / f"r{rank}", passed + unique, lora_rank=rank)
    runs = [read_run(f) for f in sorted((tmp_path / "runs").iterdir())]
    ax, = draw_pass_at_k(runs).axes
    assert line_with(ax, FULL) == ([1, 4, 16], pytest.approx([0.1, 0.2, 0.3]))
    passed, failed = draw_diversity(runs).axes
    assert [bar.get_width() for bar in failed.patches] == [20, 20]
    assert [t.get_text() for t in passed.get_yticklabels()] == ["full", "LoRA r=64"]
    none = [run._replace(metrics={m: {20: (0.0, 0.0)} for m in run.metrics}) for run in runs]
    assert draw_diversity(none).axes[0].get_xlim() == (0, 1)


def test_evaluations_of_one_model_under_two_names_stay_apart(tmp_path):
    """The paper's two protocols, whose samples differ in temperature and number, in one results.jsonl."""
    protocols = {"humaneval": {1: 0.18, 10: 0.21}, "passk": {1: 0.1, 10: 0.3, 100: 0.5}}
    values = [(20, f"{name}_pass@{k}", value, 0.01) for name, of_name in protocols.items() for k, value in of_name.items()]
    values += [(20, f"{name}_unique_{part}", n, 0.1) for name, n in (("humaneval", 2.0), ("passk", 9.0)) for part in ("passed", "failed")]
    write_run(tmp_path / "r16", values, lora_rank=16)
    runs = [read_run(tmp_path / "r16")]
    ax, = draw_pass_at_k(runs).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
    lines = [(xs, ys) for xs, ys in lines if len(set(xs)) > 1]  # the others are error bars
    assert lines == [(list(of_name), pytest.approx(list(of_name.values()))) for of_name in protocols.values()]
    assert [text for _, _, text, _ in ax.ends] == ["LoRA r=16, humaneval", "LoRA r=16, passk"]
    assert [bar.get_width() for bar in draw_diversity(runs).axes[0].patches] == [2, 9]


def test_only_a_model_that_others_began_with_is_called_base(tmp_path):
    for name, settings in (("llama", {"model": "models/llama"}), ("magicoder-r16", {"model": "models/llama", "adapter": "a"}),
                           ("other", {"model": "models/other"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(
            {"step": 0, "metric": f"humaneval_pass@{k}", "value": 0.1, "stderr": 0.01, "settings": settings}) + "\n" for k in (1, 10)))
    write_run(tmp_path / "r4", [(20, f"humaneval_pass@{k}", 0.1, 0.01) for k in (1, 10)], lora_rank=4, base="models/llama")
    runs = [read_run(f) for f in sorted(tmp_path.iterdir())]
    assert [text for _, _, text, _ in draw_pass_at_k(runs).axes[0].ends] == ["base", "magicoder-r16", "other", "LoRA r=4"]
    assert [is_base(run, runs) for run in runs] == [True, False, False, False]
    # without a run of our own
    alone = [run for run in runs if not run.config]
    assert [is_base(run, alone) for run in alone] == [True, False, True]


def test_a_base_for_each_seed_is_their_mean(tmp_path):
    for seed, value in ((1, 0.05), (2, 0.40)):
        write_run(tmp_path / f"r4-{seed}", [(20, LEARN, value + 0.1)], lora_rank=4, seed=seed, base=f"out/{seed}/step_700")
        (tmp_path / f"base-{seed}").mkdir()
        (tmp_path / f"base-{seed}/results.jsonl").write_text(json.dumps(
            {"step": 0, "metric": LEARN, "value": value, "stderr": 0.01, "settings": {"model": f"out/{seed}/step_700"}}))
    points, bases = load(tmp_path)
    assert bases["gsm8k", "step_700", LEARN][0] == pytest.approx(0.225)
    assert points[0].values[LEARN][0] == pytest.approx(0.325)


def test_sweeps_of_other_knobs_are_other_lines(tmp_path):
    """A rank trained plainly, with rslora and with DoRA, at each of two alphas: names say which is which."""
    number = 0
    for knobs, value in (({}, 0.1), ({"rslora": True}, 0.5), ({"dora": True}, 0.7)):
        for alpha in (8.0, 16.0):
            for rate in (1e-3, 2e-3):
                number += 1
                write_run(tmp_path / f"x{number}", ((20, LEARN, value + 100 * rate), (20, FORGET, 0.5)), lora_rank=8, lora_alpha=alpha,
                          learning_rate=rate, **knobs)
    points, bases = load(tmp_path)
    learn, _ = draw_alphas(points, bases, METRICS).axes
    names = [text for _, _, text, _ in learn.ends]
    assert len(set(names)) == 6 and "alpha=8 (1 r), dora False, rslora True" in names
    learn, _ = draw_learning_rates(points, bases, METRICS).axes
    names = [text for _, _, text, _ in learn.ends]
    assert len(names) == 3 and "LoRA r=8, dora True, rslora False" in names
    assert len({line.get_marker() for line in learn.lines if len(set(line.get_xdata())) > 1}) == 3


def spectrum_json(layers=3, checkpoints=((None, 100), (16, 100))):
    def record(matrix, i, layer, module):
        rank = 16 if i == 1 and matrix == "D" else 40
        more = {"overlap_out": {"1": 0.9, "4": 0.8}, "overlap_in": {"1": 0.9, "4": 0.8}, "change_out": {"1": 0.1, "4": 0.2},
                "random_out": {"1": 0.01, "4": 0.04}} if matrix == "W" else {}
        return {"layer": layer, "module": module, "shape": [64, 64], "checkpoint": i, "matrix": matrix, "norm": 1.0,
                "effective_rank": {"0.9": rank + layer}, "random_rank": {"0.9": 33},
                "singular_values": [1.0 / (k + 1) for k in range(rank)], **more}
    return {"kind": "spectrum", "checkpoints": [{"folder": "f", "step": 1, "tokens": t, "lora_rank": r} for r, t in checkpoints],
            "matrices": [record(m, i, layer, module) for layer in range(layers) for module in ("q_proj", "up_proj")
                         for m, i in (("W0", None), *((m, i) for i in range(len(checkpoints)) for m in "WD"))]}


def test_spectra_show_the_files_numbers():
    content = spectrum_json()
    fig = draw_effective_ranks(content)
    assert line_with(fig.axes[0], FULL) == ([0, 1, 2], [40, 41, 42])
    assert line_with(fig.axes[0], RANKS[0]) == ([0, 1, 2], [16, 17, 18])
    assert fig.axes[0].get_title() == "q, 64x64" and fig.axes[0].get_ylim()[0] == 0
    fig = draw_spectra(content, block=-1)
    assert list(fig.axes[1].lines[0].get_ydata()) == content["matrices"][0]["singular_values"]
    lost, ratio, _, of_lora = draw_directions(content).axes
    assert of_lora.get_title().startswith("LoRA r=16")
    assert list(ratio.lines[0].get_ydata()) == pytest.approx([10, 5])
    assert list(lost.lines[0].get_ydata()) == pytest.approx([0.1, 0.2])
    several = draw_effective_ranks(spectrum_json(checkpoints=((None, 100), (None, 200), (None, 400))))
    assert len({line.get_color() for line in several.axes[0].lines[:3]}) == 3  # light to dark by length


def test_story_is_the_four_panels_with_the_files_numbers(tmp_path):
    points, bases = load(study(tmp_path / "runs"))
    full, r16 = (next(p.setting for p in points if p.rank == rank) for rank in (0, 16))
    changes = {r16: [(50, 99, 9, "0.9"), (100, 5, 8, "0.9")],  # the longest is shown, and of full the mean of two seeds
               full: [(100, 20, 30, "0.9"), (100, 40, 30, "0.9")], ("mlp",): [(200, 70, 30, "0.9")]}
    learned, forgot, both, ranks = draw_story(points, bases, changes, METRICS).axes
    assert line_with(learned, FULL) == ([1, 2, 4], pytest.approx([0.1, 0.2, 0.4]))
    assert len(both.collections) >= 3 and [t.get_text() for t in ranks.get_xticklabels()] == ["LoRA\nr=16", "full"]
    assert [bar.get_height() for bar in sorted(ranks.patches, key=lambda bar: bar.get_x())] == [5, 30]
    assert draw_story(points, bases, {}, METRICS) is None
    without = [p._replace(values={"gsm8k_strict_match": p.values["gsm8k_strict_match"]}) if p.rank else p for p in points]
    assert len(draw_story(without, bases, changes, METRICS).axes[2].collections) < len(both.collections)  # LoRA's are not on the plane


def test_ranks_of_changes_belong_to_the_run_they_were_taken_of():
    content, settings = spectrum_json(checkpoints=((None, 100), (16, 100))), {Path("out/a"): "A", Path("f"): "F"}
    content["checkpoints"][1]["folder"] = "elsewhere/step_9"
    for where, expected in (("out/a/spectrum.json", {"A": [41, 17]}), ("x.json", {None: [41, 17]})):
        found = ranks_of_changes([(Path(where), content)], settings)
        assert {s: [mean for _, mean, _, _ in rows] for s, rows in found.items()} == expected
    # none of the modules that were asked for has changed
    none = {**content, "matrices": [row for row in content["matrices"] if row["checkpoint"] != 1 or row["matrix"] != "D"]}
    assert list(ranks_of_changes([(Path("out/a/spectrum.json"), none)], settings)) == ["A"]
    assert "changes none of its matrices" in "".join(problems)
    content["checkpoints"][0]["folder"] = "f/step_1"
    found = ranks_of_changes([(Path("x.json"), content)], settings)
    assert found["F"] == [(100, 41, 33, "0.9")] and found[None] == [(100, 17, 33, "0.9")]


# ----------------------------------------------------------------------------- the script, with bad input too
def test_script_draws_every_figure_there_is_data_for(tmp_path):
    study(tmp_path / "runs", lengths=(10, 20))
    taken = spectrum_json()
    for made, run in zip(taken["checkpoints"], ("r0-20", "r16-20")):
        made["folder"] = str(tmp_path / "runs" / run / "step_20")
    (tmp_path / "s.json").write_text(json.dumps(taken))
    noise = {"kind": "noise", "spectra": {"A": {"singular_values": [2.0, 1.0], "effective_rank": {"0.9": 2}}},
             "differences": [{"log10_c": c, "mean_difference": 10.0 ** c} for c in (-1, 0)]}
    (tmp_path / "n.json").write_text(json.dumps(noise))
    sides = {"ours": {"tok_per_s": 2.0, "peak_gb": 1.0}, "peer": {"tok_per_s": 1.0}}
    (tmp_path / "b.json").write_text(json.dumps({"results": {"full": sides}}))
    process = run_plot(tmp_path / "fig", runs=tmp_path / "runs" / "*", spectra=f"{tmp_path}/s.json,{tmp_path}/n.json",
                       benches=tmp_path / "b.json")
    assert process.returncode == 0, process.stderr
    names = {"story", "learning", "forgetting", "pareto", "ranks", "speed", "effective_rank", "spectra", "directions", "noise"}
    assert {p.name for p in (tmp_path / "fig").iterdir()} == {f"{n}.png" for n in names}
    assert "no data for: targets" in process.stdout
    pdfs = []
    for _ in range(2):
        run_plot(tmp_path / "pdf", runs=tmp_path / "runs" / "*", figures="pareto", formats="pdf")
        pdfs.append((tmp_path / "pdf" / "pareto.pdf").read_bytes())
    assert pdfs[0] == pdfs[1] and pdfs[0].startswith(b"%PDF")  # the same data, the same bytes


def test_a_figure_is_asked_for_by_its_whole_name_and_spectra_of_namesakes_stay_apart(tmp_path):
    for seed in (1, 2):
        for rate in (1e-5, 1e-4):
            run = write_run(tmp_path / f"{seed}/full-{rate}", ((10, LEARN, 0.2),), seed=seed, learning_rate=rate)
            (run / "spectrum.json").write_text(json.dumps(spectrum_json(checkpoints=((None, 100),))))
    (tmp_path / "1/full-1e-05/spectrum.json").write_text('{"kind": "spectrum", "matrices": []}')
    process = run_plot(tmp_path / "fig", runs=f"{tmp_path}/*/full*", figures="learning,effective_rank")
    assert process.returncode == 0 and "full-1e-05/spectrum.json: no whole spectrum" in process.stdout, process.stderr
    assert {p.name for p in (tmp_path / "fig").iterdir()} == {
        "learning.png", "effective_rank_1_full-0.0001.png", "effective_rank_2_full-0.0001.png", "effective_rank_full-1e-05.png"}


def test_plain_full_finetuning_is_the_one_without_a_regulariser(tmp_path):
    write_base(tmp_path / "base")
    for name, more in (("a", {"attention_dropout": 0.1}), ("b", {"weight_decay": 5e-5}), ("c", {"weight_decay": 1e-6})):
        write_run(tmp_path / name, ((10, LEARN, 0.2),), **more)
    points, _ = load(tmp_path)
    (_, setting), = main_settings(points)
    assert dict(setting[5])["weight_decay"] == "1e-06" and dict(setting[5])["attention_dropout"] == "0.0"


def test_one_seed_twice_is_one_and_another_seeds_base_is_another(tmp_path):
    for name, seed, value in (("a", 1, 0.2), ("b", 1, 0.9), ("c", 2, 0.4)):
        write_run(tmp_path / name, ((10, LEARN, value),), [{"step": 0, "val": {"source": 3.0 + seed}}], seed=seed)
    points, bases = load(tmp_path)
    (point,) = (p for p in points if p.place["step"] == 10)
    assert point.values[LEARN][0] == pytest.approx(0.3) and "b: a second run" in "".join(problems)
    assert bases["gsm8k", "base", "loss source"][0] == pytest.approx(4.5)
    (tmp_path / "base").mkdir()  # what was evaluated goes before what a log says
    (tmp_path / "base/results.jsonl").write_text(json.dumps({"step": 0, "metric": "loss source", "value": 7.0, "stderr": 0.1}))
    assert load(tmp_path)[1]["gsm8k", "base", "loss source"] == (7.0, pytest.approx(0.196))


def training_records():
    for (seq, how), batch, rank, side in itertools.product([(64, "none"), (64, "block")], (8, 16, 64), (0, 16), ("ours", "peer")):
        record = {"side": side, "rank": rank, "seq_len": seq, "checkpointing": how, "batch": batch, "shape": "7b", "layers": 3,
                  "of_layers": 32}
        speed = (1.4 if rank else 1.0) * (batch + 40) / (1 if side == "ours" else 2)
        found = {"tok_per_s": speed, "peak_gb": batch / 2}
        yield record | ({"failed": "out of memory"} if side == "peer" and batch == 64 else found)


def test_throughput_has_a_line_for_each_method_and_side_and_a_row_for_each_setting():
    fig = draw_throughput([{"device": "a GPU", "results": {"training": list(training_records()), "full": None}}])
    assert len(fig.axes) == 4 and fig.axes[0].get_title() == "64 tokens a row, checkpointing none"
    for ax, label in zip(fig.axes, ("tokens a second", "peak memory, GB") * 2):
        lines = {text: line for line, (_, _, text, _) in zip(ax.lines, ax.ends)}
        assert set(lines) == {"full", "LoRA r=16", "peer full", "peer LoRA r=16"} and ax.get_ylabel() == label
        assert list(lines["full"].get_xdata()) == [8, 16, 64] and list(lines["peer full"].get_xdata()) == [8, 16]
    assert list(fig.axes[0].lines[1].get_ydata()) == pytest.approx([1.4 * (b + 40) for b in (8, 16, 64)])
    assert "3 of 32 blocks of 7b" in fig.get_suptitle()
    assert any("peer full, batch 64, 64 tokens, checkpointing none: out of memory" in p for p in problems)
    assert draw_throughput([{"results": {"training": []}}, {}]) is None


def test_figures_survive_bad_input(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "one", ((10, LEARN, 0.2), (10, FORGET, 0.5)))
    write_run(runs / "nan", ((10, LEARN, math.nan), (20, LEARN, 0.3), (20, FORGET, None)), lora_rank=16)
    write_run(runs / "torn", ((10, LEARN, 0.25),), lora_rank=64)
    with open(runs / "torn" / "results.jsonl", "a") as file:
        file.write('{"run": "torn", "step"\n[1]\n{"step": "x", "metric": "y", "value": 1}\n\xff\n')
    write_run(runs / "empty", lora_rank=4)
    (runs / "zero").mkdir()
    for name in ("config.json", "results.jsonl", "log.jsonl", "spectrum.json"):
        (runs / "zero" / name).write_bytes(b"")
    (runs / "odd").mkdir()
    (runs / "odd" / "config.json").write_text("[]")
    (tmp_path / "b.json").write_text(json.dumps({"results": {"full": None, "lora": {"ours": {"tok_per_s": "NaN"}}, "hellaswag": {"ours": [1.5]}}}))
    process = run_plot(tmp_path / "fig", runs=f"{runs}/*,{tmp_path}/absent", benches=f"{tmp_path}/b.json,{tmp_path}/none.json")
    assert process.returncode == 0, process.stderr
    assert {p.name for p in (tmp_path / "fig").iterdir()} >= {"learning.png", "pareto.png"}
    for word in ("absent: no such folder", "none.json", "not JSON", "no finite numbers", "empty files", "zero: neither",
                 "parts of benches without speed"):
        assert word in process.stdout, word


@pytest.mark.parametrize("spectrum", [b"", b"{}", b'{"kind": "spectrum", "matrices": []}', b"[1]"])
def test_nothing_to_draw_is_one_line(tmp_path, spectrum):
    (tmp_path / "s.json").write_bytes(spectrum)
    process = run_plot(tmp_path / "fig", spectra=tmp_path / "s.json")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "nothing to draw" in process.stderr


def test_one_checkpoint_and_zero_change_are_drawn(tmp_path):
    content = spectrum_json(layers=1, checkpoints=((None, None),))
    for record in content["matrices"]:
        if record["matrix"] == "D":
            record.update(norm=0.0, singular_values=[0.0] * 4, effective_rank={"0.9": 0})
    (tmp_path / "s.json").write_text(json.dumps(content))
    process = run_plot(tmp_path / "fig", spectra=tmp_path / "s.json")
    assert process.returncode == 0, process.stderr


def test_a_run_that_went_on_from_an_adapter_has_its_rank(tmp_path):
    run = write_run(tmp_path / "runs" / "a", ((10, LEARN, 0.5),), adapter="out/first")
    (run / "step_10").mkdir()
    (run / "step_10" / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    points, _ = load(tmp_path / "runs")
    assert [(p.rank, p.alpha) for p in points] == [(8, 16)]


def test_a_trunk_and_its_branches_are_one_setting(tmp_path):
    write_run(tmp_path / "trunk", ((20, LEARN, 0.5),), checkpoint_at=[8.0], max_steps=20)
    write_run(tmp_path / "branch", ((10, LEARN, 0.4),), resume_from="trunk/step_8", auto_resume=True, shard="full", max_steps=10)
    points, _ = load(tmp_path)
    assert len({p.setting for p in points}) == 1 and sorted(p.place["step"] for p in points) == [10, 20]


def test_old_and_new_seeds_are_one_setting_where_the_new_knobs_are_at_their_defaults(tmp_path):
    """A run made before train.py had a knob counts as one with its default; a knob that makes no setting is not looked at."""
    defaults = {name: knob.default for name, knob in find_knobs(vars(train)).items()}
    added = {**defaults, "rank_of_the_future": 3}
    write_run(tmp_path / "old", ((10, LEARN, 0.2),), seed=1)
    write_run(tmp_path / "new", ((10, LEARN, 0.4),), **{**added, **BASE_CONFIG, "seed": 2})
    write_run(tmp_path / "other", ((10, LEARN, 0.9),), **{**added, **BASE_CONFIG, "seed": 3, "schedule": "constant"})
    for seed in (1, 2):
        newer = added if seed == 2 else {}
        write_run(tmp_path / f"lora{seed}", ((10, LEARN, 0.3),), **{**newer, **BASE_CONFIG, "seed": seed, "lora_rank": 16})
    points, _ = load(tmp_path)
    values = {(point.rank, dict(point.other).get("schedule", "cosine")): point.values[LEARN][0] for point in points}
    assert values == {(0, "cosine"): pytest.approx(0.3), (0, "constant"): 0.9, (16, "cosine"): pytest.approx(0.3)}


def test_a_knob_that_nobody_listed_sets_runs_apart(tmp_path, monkeypatch):
    """A hack's new knob must never be averaged over; runs from before it count as having its default."""
    assert {"learning_rate", "loss_norm", "lora_dropout", "param_dtype"} < set(SETTING)
    assert not {"seed", "out_dir", "microbatch", "compile", "max_steps", "device", "base", "lora_rank"} & set(SETTING)
    monkeypatch.setattr(results, "SETTING", [*SETTING, "lora_plus"])
    monkeypatch.setitem(results.KNOBS, "lora_plus", 1.0)
    write_run(tmp_path / "old", ((10, LEARN, 0.2),), lora_rank=8, seed=1)
    write_run(tmp_path / "default", ((10, LEARN, 0.4),), lora_rank=8, seed=2, lora_plus=1.0)
    write_run(tmp_path / "other", ((10, LEARN, 0.9),), lora_rank=8, seed=3, lora_plus=16.0)
    points, _ = load(tmp_path)
    assert sorted(p.values[LEARN][0] for p in points) == pytest.approx([0.3, 0.9])


def test_ends_of_takes_the_length_most_settings_share(tmp_path):
    study(tmp_path / "runs", lengths=(10, 20))
    write_run(tmp_path / "runs" / "x", ((20, LEARN, 0.5),), lora_rank=8, max_steps=20)
    points, _ = load(tmp_path / "runs")
    assert {p.place["step"] for p in ends_of(points)} == {20} and len(ends_of(points)) == 4 and ends_of([]) == []
