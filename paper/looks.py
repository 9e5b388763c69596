"""How the figures of paper/ look: colours, markers, axes, and names beside the lines' ends.

    0.6 |        ,--o  LoRA r=64      A line is named where it ends, not in a legend. Names
        |  ,--o-'--s   LoRA r=16      that would overlap are moved apart, as little as possible,
    0.2 | o-' - - - -  base           and a thin line leads from each name to its point.
        +-------------
"""
import math
from collections import defaultdict

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well.
# Ranks go from light to dark.
FULL = "#D55E00"
BASE = "#555555"
CHANCE = "#999999"
RANKS = ("#56B4E9", "#0072B2", "#004C78", "#CC79A7", "#882E72", "#332288")
OTHERS = ("#009E73", "#E69F00", "#CC79A7", "#0072B2", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^vP"

# inches: one column of a two-column paper, and both
COLUMN = 3.4
PAGE = 7.0

STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
    "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8e8e8", "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "lines.linewidth": 1.3, "lines.markersize": 3.5,
    "axes.unicode_minus": False,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text stays text
}


# ----------------------------------------------------------------------------- words and colours
def method_name(rank):
    """What a reader calls a rank; 0 and None are full finetuning."""
    return f"LoRA r={rank}" if rank else "full"


def style_of(rank, ranks):
    """Colour and marker of full finetuning, or of a rank among those in the figure."""
    if not rank:
        return {"color": FULL, "marker": "o"}
    # the first marker is full finetuning's
    i = sorted(set(ranks) - {0}).index(rank)
    marker = MARKERS[1 + i % 5]
    return {"color": RANKS[i % len(RANKS)], "marker": marker}


def shades_of(n):
    """n colours from light to dark, for lengths."""
    shades = plt.cm.cividis(np.linspace(0.75, 0.0, n))
    return [matplotlib.colors.to_hex(shade) for shade in shades]


def short(number):
    """1234567 -> 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


# ----------------------------------------------------------------------------- lines and names
def draw_line(ax, xs, pairs, **style):
    """A line through [(value, half width or None)], with the intervals where there are any."""
    ax.plot(xs, [value for value, _ in pairs], **style)
    for x, (value, half) in zip(xs, pairs):
        if half:
            ax.errorbar(x, value, half, fmt="none", ecolor=style["color"], elinewidth=0.8,
                        capsize=1.5, alpha=0.5)


def draw_base_line(ax, base):
    """The base, (value, half width) or None, as a dashed line with its name."""
    if base:
        ax.axhline(base[0], color=BASE, ls="--", lw=1, zorder=1)
        name_end(ax, None, base[0], "base", BASE)


def draw_chance_line(ax, y):
    """What chance would give, dashed."""
    ax.axhline(y, color=CHANCE, ls="--", lw=1)


def legend_entry(name, **style):
    """A handle for a legend that is not taken from a line in the figure."""
    return plt.Line2D([], [], label=name, **style)


def name_end(ax, x, y, text, colour):
    """Ask for a name at the end of a line, for place_names to write; x = None is the right edge."""
    if not hasattr(ax, "ends"):
        ax.ends = []
    ax.ends.append((x, y, text, colour))


def spread_apart(wanted, gap):
    """Positions as near as possible to the wanted ones (ascending), with `gap` between neighbours.

    Least squares by pooling adjacent violators: position i less i * gap must not fall, so
    neighbours that do are pooled to their mean."""
    pools = []  # (mean, how many)
    for i, y in enumerate(wanted):
        mean = y - i * gap
        n = 1
        # pool with the neighbour below for as long as that one is higher
        while pools and pools[-1][0] > mean:
            below, n_below = pools.pop()
            mean = (below * n_below + mean * n) / (n_below + n)
            n += n_below
        pools.append((mean, n))

    placed = []
    for mean, n in pools:
        for _ in range(n):
            placed.append(mean + len(placed) * gap)
    return placed


def place_names(fig):
    """Write the names of all lines at the right edge of their axes, apart from one another."""
    fig.canvas.draw()  # only now the sizes of the axes are known
    for ax in fig.axes:
        ends = getattr(ax, "ends", [])
        if not ends:
            continue
        # the height of each line's end as a share of the axes
        right = ax.get_xlim()[1]
        to_axes = ax.transAxes.inverted()
        anchors = []
        heights = []
        for x, y, _, _ in ends:
            anchor = (right if x is None else x, y)
            pixels = ax.transData.transform(anchor)
            anchors.append(anchor)
            heights.append(to_axes.transform(pixels)[1])

        # a line of text, 7 points high, as a share of the axes
        gap = 7 * 1.15 * fig.dpi / 72 / ax.get_window_extent().height
        order = sorted(range(len(ends)), key=lambda i: heights[i])
        placed = spread_apart([heights[i] for i in order], gap)
        for i, height in zip(order, placed):
            _, _, text, colour = ends[i]
            leader = {"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
            ax.annotate(text, anchors[i], (1.03, height), xycoords="data",
                        textcoords="axes fraction", color=colour, fontsize=7, va="center",
                        annotation_clip=False, arrowprops=leader)


# ----------------------------------------------------------------------------- axes and panels
def has_length(points, kind):
    """Does every point know how long it was trained in this unit?"""
    return all(point.place.get(kind) for point in points)


def length_axis(ax, points, kind):
    """Set up the x axis for lengths; returns their unit: epoch | tokens | step.

    'auto' takes epochs from one epoch on, else tokens; steps where a point lacks the unit."""
    if kind == "auto":
        kind = "tokens"
        if has_length(points, "epoch"):
            longest = max(point.place["epoch"] for point in points)
            kind = "epoch" if longest >= 1 else "tokens"
    if not has_length(points, kind):
        kind = "step"
    ax.set_xlabel({"epoch": "epochs", "tokens": "tokens", "step": "steps"}[kind])
    if kind == "tokens":
        token_ticks(ax)
    powers_axis(ax, [point.place[kind] for point in points])
    return kind


def token_ticks(ax):
    """A few ticks of an x axis of tokens, in short: 200k, 1.2M."""
    ax.xaxis.set_major_formatter(lambda value, _: short(value) if value > 0 else "0")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))


def powers_axis(ax, values):
    """A logarithmic x axis with the values as ticks, if they span a factor of 4; crowded ones go.

    A single value is the only tick; anything else is left to matplotlib."""
    values = sorted(set(values))
    if len(values) == 1:
        ax.set_xticks(values, [short(values[0])])
    if len(values) < 2 or values[0] <= 0:
        return
    span = values[-1] / values[0]
    if span < 4:
        return

    # from the largest value down, each tick an eighth of the axis away from the last, or further
    # where its label is long: names at the right may leave a narrow axis
    ax.set_xscale("log", base=2)
    longest = max(len(tick_label(value)) for value in values)
    least_ratio = span ** max(0.12, 0.035 * longest)
    ticks = [values[-1]]
    for value in reversed(values[:-1]):
        if ticks[-1] / value >= least_ratio:
            ticks.append(value)
    ax.set_xticks(ticks, [tick_label(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def tick_label(value):
    """1000 -> 1k, and 0.0003 -> 3e-4."""
    if value >= 1:
        return short(value)
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def grid_of(n, width=PAGE, height=2.1, columns=2, **how):
    """A figure of n panels, (fig, [axes]); a single column has the width of a column."""
    columns = min(n, columns)
    rows = math.ceil(n / columns)
    size = (width if columns > 1 else COLUMN, rows * height)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **how)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return fig, list(axes.flat[:n])


def datasets_of(points):
    """{(dataset, base): its points}, the panels of most figures."""
    panels = defaultdict(list)
    for point in points:
        panels[point.dataset, point.base].append(point)
    return dict(sorted(panels.items()))
