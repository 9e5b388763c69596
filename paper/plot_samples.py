"""Figures of HumanEval's many samples: pass@k (appendix F) and how they differ (figure 5).

    pass@k |      .--o  full         Each line, and each bar, is the last evaluated checkpoint
           |  .--'.--s  LoRA r=16    of a run, or a base that was evaluated.
           | o--s'
           +-1---4---16 samples
"""
import re
from collections import Counter, defaultdict

from paper.looks import (BASE, OTHERS, PAGE, draw_line, grid_of, method_name, name_end,
                         powers_axis, style_of)
from paper.results import is_base

PARTS = {"unique_passed": "that pass", "unique_failed": "that fail"}


def rank_of(run):
    return run.config.get("lora_rank") or 0


def order_of(run):
    """Bases first, then by rank and name."""
    return bool(run.config), rank_of(run), run.name


def subjects_of(all_runs, pattern):
    """[(name, style, {what the pattern found: (value, stderr)})] of evaluations with two such
    metrics, those that `--name` sets apart each for itself.

    Bases first, then by rank. A rank with several runs has their folders' names."""
    # evaluations with such metrics, and what the pattern found in each
    matching = []  # (run, evaluation, {metric: what the pattern found})
    count = Counter()  # runs that have some, by rank
    for run in sorted(all_runs, key=order_of):
        by_name = defaultdict(dict)
        for metric in run.metrics:
            match = re.fullmatch(f"(.*?)_?{pattern}", metric)
            if match:
                by_name[match[1]][metric] = match[2]
        several = {name: found for name, found in by_name.items() if len(found) > 1}
        matching += [(run, name, found) for name, found in several.items()]
        if run.config and several:
            count[rank_of(run)] += 1

    # their names, styles and values at the last step
    ranks = {rank_of(run) for run in all_runs if run.config}
    evaluations = {evaluation for _, evaluation, _ in matching}
    subjects = []
    for run, evaluation, found in matching:
        last = max(max(run.metrics[metric]) for metric in found)
        rank = rank_of(run)
        if is_base(run, all_runs) or (run.config and last == 0):
            name = "base"
            style = {"color": BASE, "marker": "*"}
        elif not run.config:
            name = run.name
            style = {"color": OTHERS[len(subjects) % 7], "marker": "D"}
        else:
            name = method_name(rank) if count[rank] == 1 else run.name
            style = style_of(rank, ranks)
        if len(evaluations) > 1:
            name += f", {evaluation}"
        values = {}
        for metric, what in found.items():
            if last in run.metrics[metric]:
                values[what] = run.metrics[metric][last]
        subjects.append((name, style, values))
    return subjects


def draw_pass_at_k(all_runs):
    """Figure of appendix F: pass@k by k."""
    subjects = subjects_of(all_runs, r"pass@(\d+)")
    if not subjects:
        return None
    fig, (ax,) = grid_of(1, height=2.4)
    every_k = set()
    for name, style, values in subjects:
        # values by k, with 95% intervals from their standard errors
        ks = sorted(map(int, values))
        every_k.update(ks)
        pairs = []
        for k in ks:
            value, stderr = values[str(k)]
            pairs.append((value, 1.96 * stderr if stderr else None))
        dashes = "--" if style["color"] == BASE else "-"
        draw_line(ax, ks, pairs, ls=dashes, **style)
        last, _ = pairs[-1]
        name_end(ax, ks[-1], last, name, style["color"])
    powers_axis(ax, every_k)
    ax.set(xlabel="k samples", ylabel="pass@k")
    return fig


def draw_diversity(all_runs):
    """Figure 5: unique outputs a problem, those that pass and those that fail."""
    # those that have both parts
    pattern = f"({'|'.join(PARTS)})"
    subjects = []
    for name, style, values in subjects_of(all_runs, pattern):
        if len(values) == len(PARTS):
            subjects.append((name, style, values))
    if not subjects:
        return None

    # a panel a part, a bar a subject
    names = [name for name, _, _ in subjects]
    height = 0.6 + 0.24 * len(subjects)
    fig, axes = grid_of(2, width=PAGE * 0.8, height=height, sharey=True)
    for ax, (part, title) in zip(axes, PARTS.items()):
        for i, (_, style, values) in enumerate(subjects):
            # a bar with its 95% interval and its number
            value, stderr = values[part]
            half = 1.96 * stderr if stderr else 0
            ax.barh(i, value, color=style["color"], height=0.7, xerr=half or None,
                    error_kw={"elinewidth": 0.8})
            ax.annotate(f" {value:.3g}", (value + half, i), va="center", fontsize=7)
        ax.set_yticks(range(len(subjects)), names)
        ax.set(xlabel=f"unique outputs a problem {title}")
        ax.margins(x=0.15)
        ax.set_xlim(0, max(1, ax.get_xlim()[1]))  # also where none passes
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return fig
