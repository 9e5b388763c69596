"""The figure of paper/why.py: four views of runs at several learning rates.

    loss by rate        lowest loss by step      learned by forgotten     forgotten by KL
    a line a method,    with the best rate       a line joins the rates   a point a run: one curve,
    a bar its interval  at each step             of a method              or one a method?
"""
import math
import statistics

from paper.looks import draw_line, grid_of, legend_entry, powers_axis, style_of
from paper.results import mean_of_seeds


def draw_why(sweeps, families, learning, forgetting, divergence, lowest_so_far):
    """The figure of the families {Family: Sweep}; metrics as in paper/why.py.

    lowest_so_far: of paper/families.py."""
    ranks = {family.rank for family in families}
    styles = {family: style_of(family.rank, ranks) for family in families}
    fig, (by_rate, by_step, plane, by_kl) = grid_of(4, height=2.5)
    for family in families:
        sweep = sweeps[family]
        draw_by_rate(by_rate, sweep, learning, styles[family])
        steps = draw_by_step(by_step, lowest_so_far(sweep, learning), styles[family])
        draw_on_plane(plane, sweep, styles[family])
        draw_by_kl(by_kl, sweep, divergence, styles[family])

    # axes
    rates = {rate for family in families for rate in rates_of(sweeps[family])}
    powers_axis(by_rate, rates)
    by_rate.set(title="Every method has a best rate", xlabel="learning rate", ylabel=learning)
    powers_axis(by_step, steps)
    by_step.set(title="The best rate at every step", xlabel="step", ylabel=f"lowest {learning}")
    plane.set(title="Learning and forgetting, rate by rate", xscale="log",
              xlabel=f"rise of {forgetting}", ylabel=f"fall of {learning}")
    by_kl.set(title="Forgetting by distance from the base", yscale="log",
              xlabel=f"{divergence}, nats a target", ylabel=f"rise of {forgetting}")
    for axis in (plane.xaxis, by_kl.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    handles = [legend_entry(str(family), ls="", **styles[family]) for family in families]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(families))
    return fig


def rates_of(sweep):
    """The learning rates that every seed has, ascending."""
    return sorted(set.intersection(*(set(by_rate) for by_rate in sweep.runs.values())))


def draw_by_rate(ax, sweep, metric, style):
    """The loss at the end by learning rate, mean and interval over seeds."""
    pairs = []
    for rate in rates_of(sweep):
        values = []
        for by_rate in sweep.runs.values():
            measured = by_rate[rate]
            values.append((measured.run.metrics[metric][measured.steps][0], None))
        pairs.append(mean_of_seeds(values))
    draw_line(ax, rates_of(sweep), pairs, **style)


def draw_by_step(ax, curves, style):
    """The lowest loss of all rates by step, mean over seeds; returns the steps.

    curves {seed: {step: loss}}."""
    shared = set.intersection(*map(set, curves.values())) - {0}
    steps = sorted(shared)
    pairs = []
    for step in steps:
        pairs.append(mean_of_seeds([(curve[step], None) for curve in curves.values()]))
    draw_line(ax, steps, pairs, **style)
    return steps


def draw_on_plane(ax, sweep, style):
    """What was learned by what was forgotten, from the lowest rate to the highest."""
    xs = []
    ys = []
    for rate in rates_of(sweep):
        runs = [by_rate[rate] for by_rate in sweep.runs.values()]
        xs.append(statistics.fmean(run.forgot.value for run in runs))
        ys.append(statistics.fmean(run.learned.value for run in runs))
    ax.plot(xs, ys, **style)


def draw_by_kl(ax, sweep, divergence, style):
    """What each run forgot, by its KL from the base."""
    xs = []
    ys = []
    for by_rate in sweep.runs.values():
        for measured in by_rate.values():
            kl, _ = measured.run.metrics.get(divergence, {}).get(measured.steps, (math.nan, None))
            xs.append(kl)
            ys.append(measured.forgot.value)
    ax.scatter(xs, ys, 12, alpha=0.8, linewidths=0.3, edgecolors="white", **style)
