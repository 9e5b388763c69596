"""Figures of one knob: learning and forgetting by rank, target modules, learning rate or alpha.

    learned |      .---o   r=64       Two panels a dataset, one of each metric. A line joins
            |  .--'.---s   r=16       points that differ only in the knob on the x axis.
            | o--s'
            +-attention-mlp-all
"""
from collections import Counter, defaultdict

import numpy as np

from paper.looks import (MARKERS, OTHERS, datasets_of, draw_base_line, draw_line, grid_of,
                         method_name, name_end, powers_axis, shades_of, short, style_of)
from paper.plot_curves import ranks_in
from paper.results import ends_of, main_settings, pick, regularised

TARGETS = ("attention", "mlp", "all")


def draw_sweep(lines_of, points, bases, metrics, label, categories=()):
    """Both metrics by one knob; lines_of {(dataset, base): [(name, style, [(x, point)])]}.

    categories: names of the places 0, 1, ... of an x axis without numbers. Points of full
    finetuning are not joined to the LoRA points of their line."""
    panels = sweep_panels(lines_of, points, metrics)
    if not panels:
        return None
    fig, axes = grid_of(len(panels))
    for ax, (key, metric, lines) in zip(axes, panels):
        # the lines, LoRA and full finetuning apart, and the base
        for name, style, line in lines:
            loras = [(x, point) for x, point in line if point.rank]
            full = [(x, point) for x, point in line if not point.rank]
            for part in (loras, full):
                if part:
                    values = [point.values[metric] for _, point in part]
                    draw_line(ax, [x for x, _ in part], values, **style)
            last_x, last = line[-1]
            name_end(ax, last_x, last.values[metric][0], name, style["color"])
        draw_base_line(ax, bases.get((*key, metric)))

        # the x axis
        if categories:
            ax.set_xticks(range(len(categories)), categories)
            ax.set_xlim(-0.2, len(categories) - 0.8)
        else:
            xs = set()
            for _, _, line in lines:
                xs.update(x for x, _ in line)
            powers_axis(ax, xs)
        ax.set(title=key[0], xlabel=label, ylabel=metrics.title(metric))
    return fig


def sweep_panels(lines_of, points, metrics):
    """[(key, metric, lines)] of those panels in which some line has points at two places."""
    panels = []
    for key, some in datasets_of(points).items():
        for names in (metrics.learning, metrics.forgetting):
            metric = pick(names, some)
            lines = []
            sweeps = False
            for name, style, line in lines_of[key]:
                line = [(x, point) for x, point in line if metric in point.values]
                line.sort(key=lambda pair: pair[0])
                if line:
                    lines.append((name, style, line))
                    sweeps = sweeps or line[0][0] < line[-1][0]
            if sweeps:
                panels.append((key, metric, lines))
    return panels


# ----------------------------------------------------------------------------- rank
def draw_ranks(points, bases, metrics):
    """By rank, a line for each of up to five lengths, full finetuning beside it."""
    ranks = sorted(ranks_in(points) - {0})
    lines_of = {key: rank_lines(some, [*ranks, 0]) for key, some in datasets_of(points).items()}
    categories = [*map(str, ranks), "full"]
    return draw_sweep(lines_of, points, bases, metrics, "LoRA rank", categories)


def rank_lines(points, order):
    """[(length, style, [(place of the rank, point)])] of the settings that the curves show."""
    # the ends of the runs by length
    mains = dict(main_settings(points)).values()
    by_step = defaultdict(list)
    for point in points:
        if point.last and point.setting in mains:
            by_step[point.place["step"]].append(point)

    # of the lengths with several ranks, five that are evenly spaced
    lengths = []
    for step in sorted(by_step):
        loras = ranks_in(by_step[step]) - {0}
        if len(loras) > 1:
            lengths.append(step)
    n = min(5, len(lengths))
    places = np.linspace(0, len(lengths) - 1, n)
    shown = [lengths[round(place)] for place in places]
    lines = []
    for step, shade in zip(shown, shades_of(len(shown))):
        line = [(order.index(point.rank), point) for point in by_step[step]]
        style = {"color": shade, "marker": "o"}
        lines.append((length_name(by_step[step][0]), style, line))
    return lines


def length_name(point):
    """How long a point was trained, in words."""
    epochs = point.place.get("epoch") or 0
    if epochs == 1:
        return "1 epoch"
    if epochs > 1:
        return f"{epochs:.3g} epochs"
    if point.place.get("tokens"):
        return f"{short(point.place['tokens'])} tokens"
    return f"{point.place['step']} steps"


# ----------------------------------------------------------------------------- target modules
def draw_targets(points, bases, metrics):
    """Figure 7: which modules have adapters, a line for each rank."""
    lines_of = {key: target_lines(some) for key, some in datasets_of(points).items()}
    return draw_sweep(lines_of, points, bases, metrics, "modules with adapters", TARGETS)


def target_lines(points):
    """[(rank, style, [(place in TARGETS, point)])] of runs that differ in their targets alone."""
    loras = [point for point in points if point.rank and point.targets in TARGETS]
    ends = [point for point in ends_of(loras) if point.alpha == 2 * point.rank]
    lines = []
    for rank in sorted(ranks_in(ends)):
        mine = [point for point in ends if point.rank == rank]
        # the other knobs that most of attention and mlp share
        shared = Counter(point.other for point in mine if point.targets != "all")
        usual = max(shared, key=shared.get, default=None)
        line = []
        for point in mine:
            if point.other == usual:
                line.append((TARGETS.index(point.targets), point))
        lines.append((f"r={rank}", style_of(rank, ranks_in(points)), line))
    return lines


# ----------------------------------------------------------------------------- rate and alpha
def rate_of(point):
    return float(dict(point.other)["learning_rate"])


def draw_learning_rates(points, bases, metrics):
    """Figure S1: by learning rate, a line for each method; LoRA on all modules with alpha = 2 r."""
    lines_of = {key: rate_lines(some) for key, some in datasets_of(points).items()}
    return draw_sweep(lines_of, points, bases, metrics, "learning rate")


def with_differences(names, knobs):
    """The names; those that are equal get what sets them apart behind them: 'r=16, dora True'.

    knobs: of each name, {knob: value}."""
    alike = defaultdict(list)
    for name, own in zip(names, knobs):
        alike[name].append(own)
    longer = []
    for name, own in zip(names, knobs):
        words = [name]
        for knob, value in own.items():
            if any(other.get(knob) != value for other in alike[name]):
                words.append(f"{knob.replace('_', ' ')} {value}")
        longer.append(", ".join(words))
    return longer


def rate_lines(points):
    """[(method, style, [(rate, point)])] of runs that differ in their learning rate alone."""
    # points of the paper's form, by what they have in common but for the rate
    families = defaultdict(list)  # {(rank, other knobs): line}
    for point in ends_of(points):
        knobs = dict(point.other)
        papers_form = point.targets == "all" and point.alpha == 2 * point.rank
        if papers_form and not regularised(knobs):
            del knobs["learning_rate"]
            family = point.rank, tuple(knobs.items())
            families[family].append((rate_of(point), point))
    several = {}
    for family, line in sorted(families.items()):
        if len({rate for rate, _ in line}) > 1:
            several[family] = line

    # families of one rank share its colour
    names = [method_name(rank) for rank, _ in several]
    names = with_differences(names, [dict(knobs) for _, knobs in several])
    lines = []
    drawn = Counter()
    for name, ((rank, _), line) in zip(names, several.items()):
        style = style_of(rank, ranks_in(points))
        if drawn[rank]:
            style = {**style, "marker": MARKERS[-drawn[rank] % 6]}
        drawn[rank] += 1
        lines.append((name, style, line))
    return lines


def draw_alphas(points, bases, metrics):
    """Figure S3: of one rank by learning rate, a line for each alpha; by alpha at a single rate."""
    candidates = {key: points_of_alphas(some) for key, some in datasets_of(points).items()}
    by_rate = any(has_two_rates(some) for some in candidates.values())
    lines_of = {key: alpha_lines(some, by_rate) for key, some in candidates.items()}
    label = "learning rate" if by_rate else "alpha"
    return draw_sweep(lines_of, points, bases, metrics, label)


def points_of_alphas(points):
    """The ends of that rank which was trained with most alphas; none if that is a single one."""
    ends = [point for point in ends_of(points) if point.rank and point.targets == "all"]
    # count each alpha of a rank once
    alphas = {(point.rank, point.alpha): point for point in ends}
    count = Counter(rank for rank, _ in alphas)
    most = max(count, key=count.get, default=0)
    return [point for point in ends if point.rank == most and count[most] > 1]


def has_two_rates(points):
    """Was some alpha trained at two learning rates?"""
    pairs = {(point.alpha, rate_of(point)) for point in points}
    return len(pairs) > len({alpha for alpha, _ in pairs})


def alpha_lines(points, by_rate):
    """[(name, style, [(x, point)])]: a line an alpha with rates on x, or a line a rate."""
    # lines by what is not on the x axis
    families = defaultdict(list)  # {(alpha or rate, other knobs): line}
    for point in points:
        alpha = point.alpha
        rate = rate_of(point)
        knobs = dict(point.other)
        del knobs["learning_rate"]
        if by_rate:
            families[alpha, tuple(knobs.items())].append((rate, point))
        else:
            families[rate, tuple(knobs.items())].append((alpha, point))
    families = dict(sorted(families.items()))

    names = []
    for (value, _), line in families.items():
        rank = line[0][1].rank
        names.append(f"alpha={value:g} ({value / rank:g} r)" if by_rate else f"rate {value:g}")
    names = with_differences(names, [dict(knobs) for _, knobs in families])
    lines = []
    for i, (name, line) in enumerate(zip(names, families.values())):
        style = {"color": OTHERS[i % 7], "marker": MARKERS[i % 6]}
        lines.append((name, style, line))
    return lines
