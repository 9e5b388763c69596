"""
Stage 4: figures, as .png and .pdf, from what the other stages left: results.jsonl and log.jsonl of any runs, the JSON of
spectrum.py and of bench/train.py.

    python -m paper.plot --runs=out/llama2-7b,out/gsm8k-*                # every figure that these runs have data for
    python -m paper.plot --runs=out/* --figures=learning,pareto --learning=gsm8k_strict_match --x=tokens
    python -m paper.plot --spectra=out/noise.json --benches=bench.json

A run is a folder of train.py; a folder with results.jsonl alone is a base that was evaluated. Runs that differ only in
seed become one series, those that differ only in length its points. Of several settings of one method and rank, the
curves show the one with the most lengths (then the paper's: all modules, alpha 2 r), the sweeps show the others.
Bars are 95% intervals: of the mean over seeds where there are three or more (Student's t), else of the evaluation's items.
Series that are missing are left out; lines that cannot be read and values that are no numbers are counted and said.
"""
import glob
import math
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from configurator import configure
from paper.results import (curve_of, ends_of, falls, main_settings, number, pick, points_of, problems, read_json, read_run, regularised,
                     setting_of)
from runtime import one_line_errors

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
spectra = ()             # JSON of spectrum.py; none = the spectrum.json of the runs
benches = ()             # JSON of bench/train.py
out_dir = 'figures'
figures = ()             # some of the names below; none = all that there is data for
learning = ('gsm8k_strict_match', 'humaneval_pass@1', 'loss val')   # metrics of what was learned: the first that a run has
forgetting = ('forgetting',)                                        # and forgot; 'loss NAME' is eval_loss.py's or train.py's val_data
labels = ()              # METRIC=WORDS for the axes
x = 'auto'               # of curves; auto = epochs from one epoch on, else tokens
block = -1               # spectra: of this block; -1 = the middle one
formats = ('png', 'pdf')
dpi = 300
_choices = {'x': ('auto', 'tokens', 'epoch', 'step'), 'formats': ('png', 'pdf', 'svg'),
            'figures': ('story', 'learning', 'forgetting', 'pareto', 'ranks', 'targets', 'learning_rates', 'alphas',
                        'regularisers', 'pass_at_k', 'diversity', 'training', 'effective_rank', 'spectra', 'directions',
                        'noise', 'speed', 'throughput')}

# Okabe and Ito's colours, told apart by colour-blind readers; ranks go from light to dark, markers differ as well
FULL, BASE, CHANCE = "#D55E00", "#555555", "#999999"
RANKS = ("#56B4E9", "#0072B2", "#004C78", "#CC79A7", "#882E72", "#332288")
OTHERS = ("#009E73", "#E69F00", "#CC79A7", "#0072B2", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vP"
COLUMN, PAGE = 3.4, 7.0  # inches: one column of a two-column paper, and both
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
         "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3, "lines.markersize": 3.5,
         "axes.grid": True, "grid.color": "#e8e8e8", "grid.linewidth": 0.5, "axes.axisbelow": True, "legend.frameon": False,
         "legend.fontsize": 7, "figure.constrained_layout.use": True, "pdf.fonttype": 42, "axes.unicode_minus": False}
NAMES = {"gsm8k_strict_match": "GSM8K accuracy", "humaneval_pass@1": "HumanEval pass@1",
         "forgetting": "mean accuracy on HellaSwag,\nARC-c and WinoGrande"}


# ----------------------------------------------------------------------------- looks
def title_of(metric):
    named = NAMES | dict(label.split("=", 1) for label in labels)
    return named.get(metric, metric) + (" (less is better)" if falls(metric) else "")


def method_name(rank):
    return f"LoRA r={rank}" if rank else "full"


def look(rank, ranks):
    """Colour and marker of full finetuning or of a rank among those in the figure."""
    if not rank:
        return {"color": FULL, "marker": "o"}
    i = sorted(set(ranks) - {0}).index(rank)
    return {"color": RANKS[i % len(RANKS)], "marker": MARKERS[1:][i % 5]}


def shades_of(n):
    """n colours from light to dark, for lengths."""
    return [matplotlib.colors.to_hex(c) for c in plt.cm.cividis(np.linspace(0.75, 0.0, n))]


def short(n):
    """1234567 -> 1.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def draw(ax, xs, pairs, **look_of):
    """A line with intervals where there are any."""
    ax.plot(xs, [m for m, _ in pairs], **look_of)
    with_bars = [(at, m, h) for at, (m, h) in zip(xs, pairs) if h]
    if with_bars:
        at, m, h = zip(*with_bars)
        ax.errorbar(at, m, h, fmt="none", ecolor=look_of["color"], elinewidth=0.8, capsize=1.5, alpha=0.5)


def at_base(ax, value):
    """The base as a dashed line, named."""
    if value:
        ax.axhline(value[0], color=BASE, ls="--", lw=1, zorder=1)
        ax.ends = [*getattr(ax, "ends", []), (None, value[0], "base", BASE)]


def name_end(ax, at, y, text, colour):
    """Ask for a name beside the last point of a line; place_names writes them all."""
    ax.ends = [*getattr(ax, "ends", []), (at, y, text, colour)]


def spread(wanted, gap):
    """Positions as near as possible to the wanted ones (ascending) with at least `gap` between neighbours.

    Least squares: positions less i * gap must not fall, so neighbours that do are pooled to their mean."""
    pools = []
    for i, y in enumerate(wanted):
        pools.append([y - i * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            y2, n2 = pools.pop()
            y1, n1 = pools.pop()
            pools.append([(y1 * n1 + y2 * n2) / (n1 + n2), n1 + n2])
    flat = [y for y, n in pools for _ in range(n)]
    return [y + i * gap for i, y in enumerate(flat)]


def place_names(fig):
    """Write the names of all lines at the right edge of their axes, moved apart where they would overlap."""
    fig.canvas.draw()
    for ax in fig.axes:
        ends = getattr(ax, "ends", [])
        if not ends:
            continue
        box = ax.get_window_extent()
        right, to_axes = ax.get_xlim()[1], ax.transAxes.inverted()
        heights = [to_axes.transform(ax.transData.transform((right if at is None else at, y)))[1] for at, y, _, _ in ends]
        order = sorted(range(len(ends)), key=lambda i: heights[i])
        gap = 7 * 1.15 * fig.dpi / 72 / box.height
        for i, y in zip(order, spread([heights[i] for i in order], gap)):
            at, value, text, colour = ends[i]
            ax.annotate(text, (right if at is None else at, value), (1.03, y), xycoords="data", textcoords="axes fraction",
                        color=colour, fontsize=7, va="center", annotation_clip=False,
                        arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 2})


def length_axis(ax, points, kind):
    """(name of the length to plot, and the axis set up for it): epochs from one epoch on, else tokens, else steps."""
    have = lambda name: all(p.place.get(name) for p in points)
    if kind == "auto":
        kind = "epoch" if have("epoch") and max(p.place["epoch"] for p in points) >= 1 else "tokens"
    kind = kind if have(kind) else "step"
    values = sorted({p.place[kind] for p in points})
    ax.set_xlabel({"epoch": "epochs", "tokens": "tokens", "step": "steps"}[kind])
    powers_axis(ax, values)
    return kind


def powers_axis(ax, values):
    """A logarithmic axis with the values as ticks, thinned, if they span a factor of 4; a single value is the only tick."""
    values = sorted(set(values))
    if len(values) == 1:
        ax.set_xticks(values, [short(values[0])])
    elif len(values) > 1 and values[0] > 0 and values[-1] / values[0] >= 4:
        ax.set_xscale("log", base=2)
        kept = [values[-1]]
        for v in reversed(values[:-1]):
            if kept[-1] / v >= (values[-1] / values[0]) ** 0.12:
                kept.append(v)
        ax.set_xticks(kept, [short(v) if v >= 1 else f"{v:.1e}".replace(".0e", "e").replace("e-0", "e-") for v in kept])
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def grid(n, width=PAGE, height=2.1, columns=2, **how):
    """A figure of n panels, (fig, [axes])."""
    columns = min(n, columns)
    rows = -(-n // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(width if columns > 1 else COLUMN, rows * height), squeeze=False, **how)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:n])


def datasets_of(points):
    """{(dataset, base): its points}, the panels of most figures."""
    panels = defaultdict(list)
    for p in points:
        panels[p.dataset, p.base].append(p)
    return dict(sorted(panels.items()))


# ----------------------------------------------------------------------------- figures of runs; None = no data for it
def curves(points, bases, metrics):
    """Figure 1 of the paper's README: a metric by length, a panel for each dataset, a line for each rank."""
    panels = {key: (some, metric) for key, some in datasets_of(points).items() if (metric := pick(metrics, some))}
    if not panels:
        return None
    fig, axes = grid(len(panels))
    for ax, ((dataset, base), (some, metric)) in zip(axes, panels.items()):
        curve_panel(ax, some, metric, bases.get((dataset, base, metric)))
        ax.set_title(dataset)
    return fig


def curve_panel(ax, points, metric, base):
    """A metric by length, a line for each rank, the base as (value, half an interval) or None."""
    have = [p for p in points if metric in p.values]
    lines = {rank: curve_of(have, setting) for rank, setting in main_settings(have)}
    kind = length_axis(ax, [p for line in lines.values() for p in line], x)
    for rank, line in lines.items():
        style = look(rank, {p.rank for p in points})
        xs, pairs = [p.place[kind] for p in line], [p.values[metric] for p in line]
        draw(ax, xs, pairs, **style)
        name_end(ax, xs[-1], pairs[-1][0], method_name(rank), style["color"])
    at_base(ax, base)
    ax.set_ylabel(title_of(metric))


def sizes_of(points, kind):
    """Marker areas, growing with the logarithm of the length."""
    lengths = sorted({p.place[kind] for p in points})
    low, high = math.log(lengths[0]), math.log(lengths[-1])
    return {v: 14 + 60 * ((math.log(v) - low) / (high - low) if high > low else 0) for v in lengths}


def plane(points, bases, series_of):
    """Learning against forgetting, the better the further up and right, a marker's size its length.

    series_of(points of a dataset) -> [(name, style, points of the series in order)]."""
    panels = {}
    for key, some in datasets_of(points).items():
        learn, forget = pick(learning, some), pick(forgetting, some)
        series = [(name, style, [p for p in line if learn in p.values and forget in p.values])
                  for name, style, line in (series_of(some) if learn and forget else [])]
        if series := [s for s in series if s[2]]:
            panels[key] = learn, forget, series
    if not panels:
        return None
    below = len(panels) == 1  # a legend at the side would leave too little of one column
    fig, axes = grid(len(panels), height=2.6)
    for ax, ((dataset, base), (learn, forget, series)) in zip(axes, panels.items()):
        handles = plane_panel(ax, learn, forget, series, *(bases.get((dataset, base, metric)) for metric in (learn, forget)))
        ax.set_title(dataset)
        if below:
            fig.set_figheight(2.4 + 0.16 * -(-len(handles) // 2))
            fig.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.3)
        else:
            ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3, borderpad=0)
    return fig


def plane_panel(ax, learn, forget, series, base_learn, base_forget):
    """Learning (up) against forgetting (right is less of it), as in `plane`; returns the handles of a legend."""
    shown = [p for _, _, line in series for p in line]
    kind = "tokens" if all(p.place.get("tokens") for p in shown) else "step"
    sizes = sizes_of(shown, kind)
    for name, style, line in series:
        xs, ys = zip(*[(p.values[forget][0], p.values[learn][0]) for p in line])
        ax.plot(xs, ys, color=style["color"], lw=0.8, alpha=0.6)
        ax.scatter(xs, ys, [sizes[p.place[kind]] for p in line], color=style["color"], marker=style["marker"],
                   alpha=0.85, linewidths=0.4, edgecolors="white", zorder=3)
        for p, at, y in zip(line, xs, ys):
            ax.errorbar(at, y, p.values[learn][1] or 0, p.values[forget][1] or 0, ecolor=style["color"],
                        elinewidth=0.5, alpha=0.5)
    if base_learn and base_forget:
        ax.scatter(base_forget[0], base_learn[0], 40, color=BASE, marker="*", zorder=4)
    for value, line_at in ((base_forget, ax.axvline), (base_learn, ax.axhline)):
        if value:
            line_at(value[0], color=BASE, ls="--", lw=0.8, zorder=1)
    if falls(forget):
        ax.invert_xaxis()
    if falls(learn):
        ax.invert_yaxis()
    ax.set(xlabel=title_of(forget), ylabel=title_of(learn))
    handles = [plt.Line2D([], [], ls="", **style, label=name) for name, style, _ in series]
    handles += [plt.Line2D([], [], ls="", color=BASE, marker="*", label="base")] * bool(base_learn and base_forget)
    return handles + [plt.Line2D([], [], ls="", color="#bbbbbb", marker="o", markersize=sizes[v] ** 0.5, label=f"{short(v)} {kind}")
                      for v in (list(sizes)[::max(1, len(sizes) - 1)] if len(sizes) > 1 else [])]


def share_of(spectrum):
    """Of the squares, for the effective rank: 0.9 where spectrum.py took it, else the most that it took."""
    shares = spectrum["matrices"][0]["effective_rank"]
    return "0.9" if "0.9" in shares else max(shares)


def ranks_of_changes(loaded, settings):
    """{setting: [(tokens, mean effective rank of D, of a random matrix, share)]} of spectrum.py's JSON, [(path, content)].

    settings {run folder: setting}: it holds a checkpoint that the file names, or the file, where all has been moved."""
    found, settings = defaultdict(list), {folder.resolve(): setting for folder, setting in settings.items()}
    for path, content in loaded:
        share = share_of(content)
        for i, made in enumerate(content["checkpoints"]):
            rows = [r for r in content["matrices"] if r["matrix"] == "D" and r["checkpoint"] == i]
            setting = settings.get(Path(made["folder"]).resolve().parent, settings.get(path.resolve().parent))
            found[setting].append((made.get("tokens") or 0, *(statistics.fmean(r[name][share] for r in rows)
                                                              for name in ("effective_rank", "random_rank")), share))
    return found


def story(points, bases, changes):
    """The paper in one picture, of the dataset with most points: learning and forgetting by length, both on a plane, and the
    effective rank of what each method changed (of ranks_of_changes), the mean over seeds at the longest."""
    panels = [([p for p in some if learn in p.values and forget in p.values], learn, forget, key)
              for key, some in datasets_of(points).items()
              if (learn := pick(learning, some)) and (forget := pick(forgetting, some))]
    some, learn, forget, key = max(panels, key=lambda panel: len(panel[0]), default=((), "", "", ()))
    measured = [(rank, changes[setting]) for rank, setting in main_settings(some) if setting in changes]
    if not measured:
        return None
    fig, (learned, forgot, both, ranks_of_change) = grid(4, height=2.5)
    for ax, metric, title in ((learned, learn, "What was learned"), (forgot, forget, "What was forgotten")):
        curve_panel(ax, some, metric, bases.get((*key, metric)))
        ax.set_title(title)
    plane_panel(both, learn, forget, main_series(some), *(bases.get((*key, metric)) for metric in (learn, forget)))
    both.set_title("Both: better further up and right")

    order = sorted((rank for rank, _ in measured), key=lambda rank: rank or math.inf)
    for rank, found in measured:
        at, longest, share = order.index(rank), max(f[0] for f in found), found[0][-1]
        mean, chance = (statistics.fmean(values) for values in zip(*(f[1:3] for f in found if f[0] == longest)))
        ranks_of_change.bar(at, mean, color=look(rank, {p.rank for p in some})["color"], width=0.6)
        ranks_of_change.plot([at - 0.4, at + 0.4], [chance] * 2, color=CHANCE, ls="--", lw=1)
        ranks_of_change.annotate(f"{mean:.3g}", (at, mean), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    ranks_of_change.set_xticks(range(len(order)), [method_name(rank).replace(" ", "\n") for rank in order])
    ranks_of_change.set(title="Rank of the change", ylabel=f"rank for {float(share):.0%} of its squares\n(dashed: a random matrix)")
    return fig


def main_series(points):
    """[(name, style, points by length)] of the settings that a dataset's curves show, for `plane`."""
    return [(method_name(rank), look(rank, {p.rank for p in points}), curve_of(points, setting))
            for rank, setting in main_settings(points)]


def pareto(points, bases):
    """Figure 3: the methods on the plane of learning and forgetting."""
    return plane(points, bases, main_series)


def regularisers(points, bases):
    """Figure 4: full finetuning with weight decay, attention dropout or another optimizer, and LoRA, on the same plane."""
    def series(some):
        full = next((setting for rank, setting in main_settings(some) if not rank), None)
        if full is None:
            return []
        plain, found = dict(full[5]), []
        for setting in dict.fromkeys(p.setting for p in some if not p.rank and p.setting != full):
            changed = {k: v for k, v in setting[5] if plain.get(k) != v}
            if changed and "learning_rate" not in changed:
                found.append((", ".join(f"{k.replace('_', ' ')} {v}" for k, v in changed.items()), setting))
        if not found:
            return []
        return main_series(some) + [(f"full, {name}", {"color": OTHERS[i % 3], "marker": "XphH*"[i % 5]}, curve_of(some, setting))
                                    for i, (name, setting) in enumerate(sorted(found))]
    return plane(points, bases, series)


def sweep(points, bases, families, value_of, label, names=()):
    """Learning and forgetting by one knob: two panels a dataset. families(points) -> {(name, colour, marker): points};
    value_of(point): its place on the x axis; names: of the places 0, 1, ... on an axis of categories. Points of full
    finetuning in a line of LoRA points stand apart from it."""
    panels = []
    for key, some in datasets_of(points).items():
        for metrics in (learning, forgetting):
            if metric := pick(metrics, some):
                lines = {name: sorted((p for p in line if metric in p.values), key=value_of)
                         for name, line in families(some).items()}
                if any(len({value_of(p) for p in line}) > 1 for line in lines.values()):
                    panels.append((key, metric, {name: line for name, line in lines.items() if line}))
    if not panels:
        return None
    fig, axes = grid(len(panels))
    for ax, ((dataset, base), metric, lines) in zip(axes, panels):
        for (name, colour, marker), line in lines.items():
            loras = [p for p in line if p.rank]
            for part in (loras, [p for p in line if not p.rank]) if loras else (line,):
                draw(ax, [value_of(p) for p in part], [p.values[metric] for p in part], color=colour, marker=marker)
            name_end(ax, value_of(line[-1]), line[-1].values[metric][0], name, colour)
        at_base(ax, bases.get((dataset, base, metric)))
        if names:
            ax.set_xticks(range(len(names)), names)
            ax.set_xlim(-0.2, len(names) - 0.8)
        else:
            powers_axis(ax, {value_of(p) for line in lines.values() for p in line})
        ax.set(title=dataset, xlabel=label, ylabel=title_of(metric))
    return fig


def ranks(points, bases):
    """By rank, a line for each of up to five lengths, full finetuning beside it."""
    present = sorted({p.rank for p in points if p.rank}) + [0]

    def families(some):
        mains = {setting for _, setting in main_settings(some)}
        lines = defaultdict(list)
        for p in some:
            if p.setting in mains and p.last:
                lines[p.place["step"]].append(p)
        lengths = [step for step in sorted(lines) if len({p.rank for p in lines[step]} - {0}) > 1]
        shown = [lengths[round(i)] for i in np.linspace(0, len(lengths) - 1, min(5, len(lengths)))]
        return {(length_name(lines[step][0]), shade, "o"): lines[step] for step, shade in zip(shown, shades_of(len(shown)))}
    return sweep(points, bases, families, lambda p: present.index(p.rank), "LoRA rank", names=[*map(str, present[:-1]), "full"])


def length_name(p):
    """How long a point was trained, in words."""
    if (p.place.get("epoch") or 0) >= 1:
        return f"{p.place['epoch']:.3g} epoch" + "s" * (p.place["epoch"] != 1)
    return f"{short(p.place['tokens'])} tokens" if p.place.get("tokens") else f"{p.place['step']} steps"


TARGETS = ("attention", "mlp", "all")


def targets(points, bases):
    """Figure 7: which modules have adapters, a line for each rank."""
    def families(some):
        ends, lines = [p for p in ends_of([p for p in some if p.rank and p.targets in TARGETS]) if p.alpha == 2 * p.rank], {}
        for rank in {p.rank for p in ends}:
            usual = Counter(p.other for p in ends if p.rank == rank and p.targets != "all")
            lines[rank] = [p for p in ends if p.rank == rank and usual and p.other == max(usual, key=usual.get)]
        return {(f"r={rank}", *look(rank, {p.rank for p in some}).values()): line for rank, line in sorted(lines.items())}
    return sweep(points, bases, families, lambda p: TARGETS.index(p.targets), "modules with adapters", names=TARGETS)


def rate_of(p):
    return float(dict(p.other).get("learning_rate", 0) or 0)


def learning_rates(points, bases):
    """Figure S1: by learning rate, a line for each method; LoRA on all modules with alpha = 2 r."""
    def families(some):
        lines = defaultdict(list)
        for p in ends_of(some):
            if p.targets == "all" and p.alpha == 2 * p.rank and not regularised(dict(p.other)):
                rest = tuple(kv for kv in p.other if kv[0] != "learning_rate")
                lines[p.rank, rest].append(p)
        lines = {key: line for key, line in sorted(lines.items()) if len({rate_of(p) for p in line}) > 1}
        several = [rank for rank, _ in lines]
        return {(method_name(rank) + (", " + dict(rest).get("optimizer", "") if several.count(rank) > 1 else ""),
                 *look(rank, {p.rank for p in some}).values()): line for (rank, rest), line in lines.items()}
    return sweep(points, bases, families, rate_of, "learning rate")


def alphas(points, bases):
    """Figure S3: by learning rate, a line for each alpha of the rank that has the most of them; by alpha at a single rate."""
    def of_one_rank(some):
        ends = [p for p in ends_of(some) if p.rank and p.targets == "all"]
        found = Counter(p.rank for p in {(p.rank, p.alpha): p for p in ends}.values())
        return [p for p in ends if found and p.rank == max(found, key=found.get)] if found and max(found.values()) > 1 else []
    by_rate = any(len({rate_of(p) for p in of_one_rank(some) if p.alpha == a}) > 1
                  for some in datasets_of(points).values() for a in {p.alpha for p in of_one_rank(some)})

    def families(some):
        lines = defaultdict(list)
        for p in of_one_rank(some):
            lines[p.alpha if by_rate else rate_of(p)].append(p)
        name = lambda p, key: f"alpha={key:g}" + (f" ({key / p.rank:g} r)") if by_rate else f"rate {key:g}"
        return {(name(line[0], key), OTHERS[i % 7], MARKERS[i % 6]): line for i, (key, line) in enumerate(sorted(lines.items()))}
    return sweep(points, bases, families, rate_of if by_rate else lambda p: p.alpha, "learning rate" if by_rate else "alpha")


def subjects(all_runs, matches):
    """[(name, style, {metric: (value, stderr)})] of bases and of the last evaluated step of every run with two such metrics."""
    chosen = [run for run in all_runs if sum(bool(matches(m)) for m in run.metrics) > 1]
    several, every = (Counter(run.config.get("lora_rank") or 0 for run in some if run.config) for some in (chosen, all_runs))
    found = []
    for run in sorted(chosen, key=lambda run: (bool(run.config), run.config.get("lora_rank") or 0, run.name)):
        last = max(s for m, steps in run.metrics.items() if matches(m) for s in steps)
        rank = run.config.get("lora_rank") or 0
        name = "base" if not run.config or last == 0 else method_name(rank) if several[rank] == 1 else run.name
        style = {"color": BASE, "marker": "*"} if name == "base" else look(rank, every)
        found.append((name, style, {m: steps[last] for m, steps in run.metrics.items() if matches(m) and last in steps}))
    return found


def pass_at_k(all_runs):
    """Figure of appendix F: pass@k by k."""
    k_of = lambda metric: int(found[1]) if (found := re.search(r"pass@(\d+)$", metric)) else None
    if not (series := subjects(all_runs, k_of)):
        return None
    fig, (ax,) = grid(1, height=2.4)
    ks = sorted({k_of(m) for _, _, found in series for m in found})
    powers_axis(ax, ks)
    for name, style, found in series:
        line = sorted((k_of(m), v) for m, v in found.items())
        draw(ax, [k for k, _ in line], [(v, 1.96 * e if e else None) for _, (v, e) in line],
             **{**style, "ls": "--" if name == "base" else "-"})
        name_end(ax, line[-1][0], line[-1][1][0], name, style["color"])
    ax.set(xlabel="k samples", ylabel="pass@k")
    return fig


def diversity(all_runs):
    """Figure 5: unique outputs a problem, those that pass and those that fail."""
    parts = ("unique_passed", "unique_failed")
    series = [(name, {part: v for m, v in found.items() for part in parts if m.endswith(part)}, style)
              for name, style, found in subjects(all_runs, lambda m: m.endswith(parts))]
    if not (series := [s for s in series if len(s[1]) == 2]):
        return None
    fig, axes = grid(2, width=PAGE * 0.8, height=0.6 + 0.24 * len(series), sharey=True)
    for ax, part, title in zip(axes, parts, ("that pass", "that fail")):
        for i, (name, found, style) in enumerate(series):
            value, error = found[part]
            half = 1.96 * error if error else 0
            ax.barh(i, value, color=style["color"], height=0.7, xerr=half or None, error_kw={"elinewidth": 0.8})
            ax.annotate(f" {value:.3g}", (value + half, i), va="center", fontsize=7)
        ax.set_yticks(range(len(series)), [name for name, _, _ in series])
        ax.set(xlabel=f"unique outputs a problem {title}")
        ax.margins(x=0.15)
        ax.set_xlim(0, max(1, ax.get_xlim()[1]))  # where none passes as well
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return fig


def training(all_runs):
    """Loss of the training steps and its running median, of the longest run of each rank."""
    lines = []
    for run in all_runs:
        log = [(line["tokens"], loss) for line in run.log
               if number(line.get("tokens")) and (loss := number(line.get("loss"))) is not None]
        if log:
            lines.append((run, log))
    if not lines:
        return None
    longest = {}
    for run, log in lines:  # of each rank the longest run, else nothing could be read
        rank = run.config.get("lora_rank") or 0
        if rank not in longest or log[-1][0] > longest[rank][1][-1][0]:
            longest[rank] = run, log
    fig, (ax,) = grid(1, height=2.4)
    for rank, (run, log) in sorted(longest.items()):
        style, width = look(rank, longest), max(1, len(log) // 20)
        tokens, losses = zip(*log)
        smooth = [statistics.median(losses[max(0, i - width):i + width + 1]) for i in range(len(losses))]
        ax.plot(tokens, losses, color=style["color"], lw=0.5, alpha=0.3)
        ax.plot(tokens, smooth, color=style["color"])
        name_end(ax, tokens[-1], smooth[-1], method_name(rank), style["color"])
    ax.xaxis.set_major_formatter(lambda value, _: short(value) if value > 0 else "0")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    ax.set(xlabel="tokens", ylabel="training loss")
    return fig


# ----------------------------------------------------------------------------- figures of spectra
def checkpoint_names(spectrum):
    """A name and a colour for each checkpoint: its step, or tokens, from light to dark; LoRA by rank."""
    made = spectrum["checkpoints"]
    ranks_there = {c["lora_rank"] for c in made if c["lora_rank"]}
    full = [i for i, c in enumerate(made) if not c["lora_rank"]]
    shades = dict(zip(full, [FULL] if len(full) == 1 else shades_of(len(full))))
    looks = []
    for i, c in enumerate(made):
        length = f", {short(c['tokens'])} tokens" if c.get("tokens") and len(made) > 1 else ""
        colour = look(c["lora_rank"], ranks_there)["color"] if c["lora_rank"] else shades[i]
        looks.append((method_name(c["lora_rank"] or 0) + length, colour))
    return looks


def rows_of(spectrum, matrix, module, checkpoint=None):
    """The records of a matrix kind and module in order of blocks; of one checkpoint, or of W0."""
    rows = [r for r in spectrum["matrices"] if r["matrix"] == matrix and r["module"] == module and r["checkpoint"] == checkpoint]
    return sorted(rows, key=lambda r: r["layer"])


def modules_of(spectrum):
    return list(dict.fromkeys(r["module"] for r in spectrum["matrices"]))


def module_panels(spectrum, height):
    """(fig, {module: axes}): a panel for each module, four in a row; x labels and legend are finish_panels' work."""
    present = modules_of(spectrum)
    fig, axes = grid(len(present), height=height, columns=4)
    return fig, dict(zip(present, axes))


def finish_panels(fig, panels, xlabel, ylabel, entries):
    """Name the axes once, and put one legend, [(name, line style)], in the free place of the grid or below it."""
    for ax in list(panels.values())[-4:]:  # those with nothing below
        ax.set_xlabel(xlabel)
    fig.supylabel(ylabel, fontsize=8)
    handles = [plt.Line2D([], [], label=name, **style) for name, style in entries]
    free = [ax for ax in fig.axes if not ax.get_visible()]
    if free and len(handles) <= 8:
        free[0].set_visible(True)
        free[0].axis("off")
        free[0].legend(handles=handles, loc="center left", bbox_to_anchor=(-0.2, 0.5), borderpad=0)
    else:
        fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def effective_rank(spectrum):
    """Figure 6: least rank that holds the share of D's squares, by block, a panel for each module."""
    looks, share = checkpoint_names(spectrum), share_of(spectrum)
    fig, panels = module_panels(spectrum, 1.55)
    for module, ax in panels.items():
        before = rows_of(spectrum, "W0", module)
        for i, (name, colour) in enumerate(looks):
            rows = rows_of(spectrum, "D", module, i)
            ax.plot([r["layer"] for r in rows], [r["effective_rank"][share] for r in rows], color=colour, marker="o", ms=2)
        ax.plot([r["layer"] for r in before], [r["effective_rank"][share] for r in before], color=BASE, ls=":", lw=1)
        for r in before[:1]:
            ax.axhline(r["random_rank"][share], color=CHANCE, ls="--", lw=1)
            ax.set_title(f"{module.removesuffix('_proj')}, {'x'.join(map(str, r['shape']))}")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
    finish_panels(fig, panels, "block", f"rank for {float(share):.0%} of squares",
                  [*((f"D, {name}", {"color": colour, "marker": "o", "ms": 2}) for name, colour in looks),
                   ("the base's weight", {"color": BASE, "ls": ":"}), ("random, same shape", {"color": CHANCE, "ls": "--"})])
    return fig


def spectra_of_one(spectrum):
    """Figure S7: singular values of W0, W and D of one block, and the largest of a random matrix of the norm of the last D."""
    there = sorted({r["layer"] for r in spectrum["matrices"]})
    layer = block if block in there else there[len(there) // 2]
    looks = checkpoint_names(spectrum)
    fig, panels = module_panels(spectrum, 1.65)
    for module, ax in panels.items():
        of = lambda matrix, i=None, module=module: [r for r in rows_of(spectrum, matrix, module, i) if r["layer"] == layer]
        lines, edge = [(r["singular_values"], BASE, "-", 2.2) for r in of("W0")], None
        for i, (name, colour) in enumerate(looks):
            lines += [(r["singular_values"], colour, (0, (1, 1.5)), 1.3) for r in of("W", i)]
            lines += [(r["singular_values"], colour, "-", 1.1) for r in of("D", i)]
            edge = next((r["norm"] * (r["shape"][0] ** -0.5 + r["shape"][1] ** -0.5) for r in of("D", i)), edge)
        # numbers that only rounding keeps from zero would stretch the axis
        shown = [([v if v > 1e-4 * values[0] else math.nan for v in values], *style) for values, *style in lines
                 if values and values[0] > 0]
        for values, colour, ls, width in shown:
            ax.plot(np.arange(1, len(values) + 1), values, color=colour, ls=ls, lw=width)
        if edge:
            ax.axhline(edge, color=CHANCE, ls="--", lw=1)
        ax.set(title=module.removesuffix("_proj"), yscale="log" if shown else "linear")
    finish_panels(fig, panels, "index", f"singular value, block {layer}",
                  [("W0", {"color": BASE, "lw": 2.2}), *((f"D, {name}", {"color": colour}) for name, colour in looks),
                   ("W, same colours", {"color": looks[-1][1], "ls": (0, (1, 1.5))}),
                   ("largest, random D", {"color": CHANCE, "ls": "--"})])
    return fig


def directions(spectrum):
    """How much of the leading k directions of W0 is no longer among those of W, and how much of the change is written to
    them: means over blocks, two panels for the last checkpoint of full finetuning and of each rank."""
    rows = [r for r in spectrum["matrices"] if r["matrix"] == "W" and r.get("overlap_out")]
    if not rows:
        return None
    looks = checkpoint_names(spectrum)
    last = {spectrum["checkpoints"][i]["lora_rank"]: i for i in sorted({r["checkpoint"] for r in rows})}
    fig, axes = grid(2 * len(last), height=2.2)
    for i, lost_ax, ratio_ax in zip(last.values(), axes[::2], axes[1::2]):
        for n, module in enumerate(modules_of(spectrum)):
            mine = [r for r in rows if r["module"] == module and r["checkpoint"] == i]
            ks = sorted({int(k) for r in mine for k in r["overlap_out"]})
            over = lambda name, k, mine=mine: statistics.fmean(r[name][str(k)] for r in mine if str(k) in r[name])
            lost = [max(1 - (over("overlap_out", k) + over("overlap_in", k)) / 2, 1e-16) for k in ks]
            ratio = [over("change_out", k) / over("random_out", k) for k in ks]
            for ax, ys in ((lost_ax, lost), (ratio_ax, ratio)) if ks else ():
                ax.plot(ks, ys, color=OTHERS[n % 7], marker="osD^vPX"[n % 7])
                name_end(ax, ks[-1], ys[-1], module.removesuffix("_proj"), OTHERS[n % 7])
                powers_axis(ax, ks)
        ratio_ax.axhline(1, color=CHANCE, ls="--", lw=1)
        name_end(ratio_ax, None, 1, "random", CHANCE)
        lost_ax.set(yscale="log", xlabel="k leading directions", ylabel="share of W0's that W lost", title=looks[i][0])
        ratio_ax.set(yscale="log", xlabel="k leading directions of W0", ylabel="D written to them / chance", title=looks[i][0])
        ratio_ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ratio_ax.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "235" else "")
    return fig


def noise(content):
    """Figure S8: Gaussian A, 0.1 B and their sum; and how much c B moves A's spectrum."""
    fig, (ax, bx) = grid(2, height=2.2)
    for (name, found), colour, ls in zip(content["spectra"].items(), (BASE, OTHERS[1], OTHERS[0]), ("-", "-", "--")):
        values = found["singular_values"]
        ax.plot(np.arange(1, len(values) + 1), values, color=colour, ls=ls)
        ax.lines[-1].set_label(f"{name}: rank {found['effective_rank'].get('0.9', '?')}")
    ax.legend()
    ax.set(xlabel="index", ylabel="singular value")
    xs, ys = zip(*[(d["log10_c"], d["mean_difference"]) for d in content["differences"]])
    bx.plot(xs, ys, color=OTHERS[3], marker="o")
    bx.set(yscale="log", xlabel="log10 c", ylabel="mean |change of spectrum|")
    return fig


# ----------------------------------------------------------------------------- speed
def speed(all_runs, tables):
    """Tokens a second and peak memory: of bench.py's tables ours and the peer, of runs the median over their steps."""
    bars = []  # (group, name, colour, tokens a second, GB)
    for table in tables:
        for part, sides in (table.get("results") or {}).items():
            for side, found in sides.items() if isinstance(sides, dict) else ():
                colour, name = (OTHERS[3], "ours") if side == "ours" else (CHANCE, "transformers + peft")
                bars.append((f"bench: {part}", name, colour, number(found.get("tok_per_s")), number(found.get("peak_gb"))))
    by_method = defaultdict(list)
    for run in all_runs:
        steps = [line for line in run.log if number(line.get("tok_per_s")) is not None]
        if steps:
            by_method[run.config.get("lora_rank") or 0].append(
                (statistics.median(line["tok_per_s"] for line in steps), max(number(line.get("peak_gb")) or 0 for line in steps)))
    for rank, found in sorted(by_method.items()):
        bars.append(("train.py", method_name(rank), look(rank, by_method)["color"], statistics.median(t for t, _ in found),
                     max(g for _, g in found)))
    bars = [b for b in bars if b[3] is not None]
    if not bars:
        return None
    places, at, before = [], 0.0, None
    for group, *_ in bars:
        at += 0.6 if before not in (None, group) else 0
        places.append(at)
        at, before = at + 1, group
    fig, axes = grid(2, height=0.55 + 0.21 * at, sharey=True)
    for ax, column, label in zip(axes, (3, 4), ("tokens a second", "peak memory, GB")):
        shown = [(y, bar) for y, bar in zip(places, bars) if bar[column] is not None]
        ax.barh([y for y, _ in shown], [bar[column] for _, bar in shown], color=[bar[2] for _, bar in shown], height=0.8)
        for y, bar in shown:
            ax.annotate(f" {short(bar[column])}", (bar[column], y), va="center", fontsize=7)
        ax.set(xlabel=label)
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(places, [f"{group.removeprefix('bench: ')}, {name}" for group, name, *_ in bars])
    axes[0].invert_yaxis()
    return fig


def throughput(tables):
    """The paper's figure S10 from bench.py's part training: tokens a second and peak memory by batch size, a line for full
    finetuning and for each rank, dashed for the peer; a row of panels for each sequence length and checkpointing."""
    records = [r for t in tables if isinstance(t.get("results"), dict) for r in t["results"].get("training") or ()]
    for r in records:
        if "failed" in r:
            problems[f"{r['side']} {method_name(r['rank'])}, batch {r['batch']}, {r['seq_len']} tokens, checkpointing "
                     f"{r['checkpointing']}: {r['failed']}, left out"] += 1
    records = [r for r in records if number(r.get("tok_per_s")) is not None]
    settings = sorted({(r["seq_len"], r["checkpointing"]) for r in records}, key=lambda s: (-s[0], s[1] != "none"))
    if not settings:
        return None
    fig, axes = grid(2 * len(settings), height=2.4)
    for i, (seq, how) in enumerate(settings):
        mine = [r for r in records if (r["seq_len"], r["checkpointing"]) == (seq, how)]
        for ax, column, label in zip(axes[2 * i:], ("tok_per_s", "peak_gb"), ("tokens a second", "peak memory, GB")):
            for side, rank in sorted({(r["side"], r["rank"]) for r in mine}):
                line = sorted((r["batch"], r[column]) for r in mine
                              if (r["side"], r["rank"]) == (side, rank) and number(r[column]) is not None)
                if line:
                    how_drawn = look(rank, [r["rank"] for r in records]) | ({} if side == "ours" else {"ls": "--", "alpha": 0.6})
                    ax.plot(*zip(*line), **how_drawn)
                    name_end(ax, *line[-1], ("" if side == "ours" else "peer ") + method_name(rank), how_drawn["color"])
            powers_axis(ax, [r["batch"] for r in mine])
            ax.set(xlabel="batch size, of which this GPU takes an eighth", ylabel=label, ylim=(0, 1.3 * ax.get_ylim()[1]),
                   title=f"{seq:,} tokens a row, checkpointing {how}")
    shapes = {f"{r['layers']} of {r['of_layers']} blocks of {r['shape']}" for r in records}
    fig.suptitle(f"{', '.join(sorted({str(t.get('device')) for t in tables}))}; {', '.join(sorted(shapes))}", fontsize=8)
    return fig


# ----------------------------------------------------------------------------- the run
def save(fig, name):
    """Write a figure in every format, under its name only when it is whole; returns the paths."""
    place_names(fig)
    paths = []
    for ending in formats:
        path = Path(out_dir) / f"{name}.{ending}"
        partial = path.with_suffix(f".tmp.{ending}")
        fig.savefig(partial, dpi=dpi, bbox_inches="tight", pad_inches=0.03,
                    metadata={"CreationDate": None} if ending == "pdf" else {"Date": None} if ending == "svg" else {})
        partial.rename(path)
        paths.append(path)
    plt.close(fig)
    return paths


def is_whole(spectrum):
    """Has the JSON what the figures of its kind need?"""
    needed = {"noise": ("spectra", "differences"), "spectrum": ("checkpoints", "matrices")}.get(spectrum.get("kind"), ("?",))
    return all(spectrum.get(key) for key in needed)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        if wrong := [label for label in labels if "=" not in label]:
            raise ValueError(f"labels: expected METRIC=WORDS, found {wrong[0]!r}")
        named = [Path(path) for pattern in runs for path in sorted(glob.glob(pattern)) or [pattern]]
        folders = [path for path in dict.fromkeys(named) if path.is_dir()]
        problems.update(f"{path}: no such folder, left out" for path in named if not path.exists())
        every = [read_run(folder) for folder in folders]
        read = [run for run in every if run.metrics or run.log]
        problems.update(f"{run.name}: neither results nor a log, left out" for run in every if run not in read)
        files = list(spectra) or [folder / "spectrum.json" for folder in folders if (folder / "spectrum.json").is_file()]
        contents = [(Path(file), read_json(file)) for file in files]
        loaded = [(path, content) for path, content in contents if is_whole(content)]
        problems.update(f"{path}: no whole spectrum, left out" for path, content in contents if content and not is_whole(content))
        tables = [read_json(file) for file in benches]
        points, bases = points_of(read)
        wanted = figures or _choices["figures"]
        drawings = {"learning": lambda: curves(points, bases, learning), "forgetting": lambda: curves(points, bases, forgetting),
                    "pareto": lambda: pareto(points, bases), "ranks": lambda: ranks(points, bases),
                    "targets": lambda: targets(points, bases), "learning_rates": lambda: learning_rates(points, bases),
                    "alphas": lambda: alphas(points, bases), "regularisers": lambda: regularisers(points, bases),
                    "pass_at_k": lambda: pass_at_k(read), "diversity": lambda: diversity(read),
                    "story": lambda: story(points, bases, ranks_of_changes(
                        [(path, content) for path, content in loaded if content["kind"] == "spectrum"],
                        {folder: setting_of(run) for folder, run in zip(folders, every)})),
                    "training": lambda: training(read), "speed": lambda: speed(read, tables),
                    "throughput": lambda: throughput(tables)}
        drawings = {name: drawing for name, drawing in drawings.items() if name in wanted}
        several = sum(content["kind"] == "spectrum" for _, content in loaded) > 1
        same_name = Counter(path.parent.name for path, _ in loaded)
        for path, content in loaded:
            folder = "_".join(path.parts[-3 if same_name[path.parent.name] > 1 else -2:-1])
            suffix = f"_{folder}" if several and path.name == "spectrum.json" else f"_{path.stem}" if several else ""
            for name, drawing in (("noise", noise),) if content["kind"] == "noise" else (
                    ("effective_rank", effective_rank), ("spectra", spectra_of_one), ("directions", directions)):
                if name in wanted:
                    suffix += f"_{len(drawings)}" if name + suffix in drawings else ""
                    drawings[name + suffix] = lambda drawing=drawing, content=content: drawing(content)
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        plt.rcParams.update(STYLE)
        drawn, without, metrics = [], [], sorted({m for run in read for m in run.metrics})
        for name, drawing in drawings.items():
            fig = drawing()
            (without.append(name) if fig is None else drawn.append(name))
            if fig is not None:
                print("wrote", ", ".join(map(str, save(fig, name))))
        if without:
            print(f"no data for: {', '.join(without)}" + (f"; metrics found: {', '.join(metrics)}" if drawn else ""))
        for problem, count in problems.items():
            print(f"note: {count} {problem}" if "left out" not in problem else f"note: {problem}")
        if not drawn:
            raise ValueError(f"nothing to draw from {len(read)} runs, {len(loaded)} spectra, {len(tables)} benches; metrics "
                             f"found: {', '.join(metrics) or 'none'}; learning={','.join(learning)}, "
                             f"forgetting={','.join(forgetting)}")
