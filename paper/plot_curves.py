"""Figures of learning and forgetting: curves by length, and both on one plane.

    learned |   o full        A curve shows one metric by length. The plane shows what was learned
            |  /   .s LoRA    (up) by what was kept (right): a method is better the further up and
            | o  s'           right its points are (figure 3 of the paper).
            +---------- kept
"""
import math
import statistics
from dataclasses import dataclass

from paper.looks import (BASE, CHANCE, OTHERS, datasets_of, draw_base_line, draw_line, grid_of,
                         has_length, legend_entry, length_axis, method_name, name_end, short,
                         style_of)
from paper.results import curve_of, falls, main_settings, pick, problems

NAMES = {"gsm8k_strict_match": "GSM8K accuracy", "humaneval_pass@1": "HumanEval pass@1",
         "forgetting": "mean accuracy on HellaSwag,\nARC-c and WinoGrande"}


@dataclass
class Metrics:
    """What the figures show of the points, from the knobs of paper/plot.py."""
    learning: tuple    # metrics of what was learned: the first that a dataset has
    forgetting: tuple  # and of what was forgotten
    titles: dict       # {metric: words for its axis}
    length: str        # unit of the x axis: auto | tokens | epoch | step

    def title(self, metric):
        words = (NAMES | self.titles).get(metric, metric)
        return f"{words} (less is better)" if falls(metric) else words


def ranks_in(points):
    return {point.rank for point in points}


# ----------------------------------------------------------------------------- curves
def draw_curves(points, bases, names, metrics):
    """The first metric of `names` by length: a panel for each dataset, a line for each rank."""
    # a panel for each dataset that has one of the metrics
    panels = []
    for key, some in datasets_of(points).items():
        metric = pick(names, some)
        if metric:
            panels.append((key, some, metric))
    if not panels:
        return None
    fig, axes = grid_of(len(panels))
    for ax, (key, some, metric) in zip(axes, panels):
        note_other_settings([point for point in some if metric in point.values])
        draw_curve_panel(ax, some, metric, bases.get((*key, metric)), metrics)
        ax.set_title(key[0])
    return fig


def note_other_settings(points):
    """Note which settings of a rank the curves of a dataset leave out."""
    for rank, shown in main_settings(points):
        settings = {point.setting for point in points if point.rank == rank}
        if len(settings) == 1:
            continue
        # what tells the one that is shown from the others
        knobs = [knobs_of(setting) for setting in settings]
        words = []
        for knob, value in knobs_of(shown).items():
            if len({other[knob] for other in knobs}) > 1:
                words.append(f"{knob}={value}")
        problems[f"{shown.dataset}: of {len(settings)} settings of {method_name(rank)} the curves "
                 f"show the one with {', '.join(words)}"] = 1


def knobs_of(setting):
    """{knob: value} of a Setting."""
    return {"lora_alpha": setting.alpha, "lora_targets": setting.targets, **dict(setting.other)}


def draw_curve_panel(ax, points, metric, base, metrics):
    """A metric by length, a line for each rank, and the base as (value, half width) or None."""
    # the settings to show, of those points that have the metric
    measured = [point for point in points if metric in point.values]
    lines = {}
    for rank, setting in main_settings(measured):
        lines[rank] = curve_of(measured, setting)
    kind = length_axis(ax, sum(lines.values(), []), metrics.length)
    for rank, line in lines.items():
        style = style_of(rank, ranks_in(points))
        lengths = [point.place[kind] for point in line]
        values = [point.values[metric] for point in line]
        draw_line(ax, lengths, values, **style)
        last, _ = values[-1]
        name_end(ax, lengths[-1], last, method_name(rank), style["color"])
    draw_base_line(ax, base)
    ax.set_ylabel(metrics.title(metric))


# ----------------------------------------------------------------------------- planes
def main_series(points):
    """[(name, style, points by length)] of the settings that the curves of a dataset show."""
    series = []
    for rank, setting in main_settings(points):
        style = style_of(rank, ranks_in(points))
        series.append((method_name(rank), style, curve_of(points, setting)))
    return series


def draw_pareto(points, bases, metrics):
    """Figure 3: the methods on the plane of learning and forgetting."""
    series = {key: main_series(some) for key, some in datasets_of(points).items()}
    return draw_planes(series, points, bases, metrics)


def draw_regularisers(points, bases, metrics):
    """Figure 4: the same, and full finetuning with weight decay, attention dropout or the like."""
    series = {key: regularised_series(some) for key, some in datasets_of(points).items()}
    return draw_planes(series, points, bases, metrics)


def regularised_series(points):
    """main_series and full finetuning with other knobs at its learning rate; [] without these."""
    full = dict(main_settings(points)).get(0)
    if full is None:
        return []
    # settings of full finetuning that differ from the plain one, but not in the learning rate
    plain = dict(full.other)
    found = []  # (what is different, setting)
    for setting in dict.fromkeys(point.setting for point in points):
        changed = {knob: value for knob, value in setting.other if plain.get(knob) != value}
        if setting.rank == 0 and changed and "learning_rate" not in changed:
            words = [f"{knob.replace('_', ' ')} {value}" for knob, value in changed.items()]
            found.append((", ".join(words), setting))
    if not found:
        return []

    # they stand beside the plain methods, in colours of their own
    series = main_series(points)
    for i, (words, setting) in enumerate(sorted(found)):
        style = {"color": OTHERS[i % 3], "marker": "XphH*"[i % 5]}
        series.append((f"full, {words}", style, curve_of(points, setting)))
    return series


def draw_planes(series_of, points, bases, metrics):
    """A plane for each dataset; series_of {(dataset, base): [(name, style, points by length)]}."""
    panels = []
    # the datasets that have both metrics
    for key, some in datasets_of(points).items():
        learn = pick(metrics.learning, some)
        forget = pick(metrics.forgetting, some)
        series = with_both(series_of[key], learn, forget)
        if series:
            panels.append((key, learn, forget, series))
    if not panels:
        return None

    fig, axes = grid_of(len(panels), height=2.6)
    for ax, (key, learn, forget, series) in zip(axes, panels):
        base_learn = bases.get((*key, learn))
        base_forget = bases.get((*key, forget))
        handles = draw_plane_panel(ax, learn, forget, series, base_learn, base_forget, metrics)
        ax.set_title(key[0])
        if len(panels) > 1:
            ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5),
                      handletextpad=0.3, borderpad=0)
        else:  # a legend at the side would leave too little of one column
            fig.set_figheight(2.4 + 0.16 * math.ceil(len(handles) / 2))
            fig.legend(handles=handles, loc="outside lower center", ncols=2, handletextpad=0.3)
    return fig


def with_both(series, learn, forget):
    """The series with only those points that have both metrics, as far as any are left."""
    kept = []
    for name, style, line in series:
        line = [point for point in line if learn in point.values and forget in point.values]
        if line:
            kept.append((name, style, line))
    return kept


def draw_plane_panel(ax, learn, forget, series, base_learn, base_forget, metrics):
    """One plane, a marker's size its length; returns the handles of a legend."""
    shown = sum((line for _, _, line in series), [])
    kind = "tokens" if has_length(shown, "tokens") else "step"
    sizes = marker_sizes(shown, kind)

    # the series, each point with both of its intervals
    for _, style, line in series:
        colour = style["color"]
        xs = [point.values[forget][0] for point in line]
        ys = [point.values[learn][0] for point in line]
        areas = [sizes[point.place[kind]] for point in line]
        ax.plot(xs, ys, color=colour, lw=0.8, alpha=0.6)
        ax.scatter(xs, ys, areas, **style, alpha=0.85, linewidths=0.4, edgecolors="white", zorder=3)
        for point, x, y in zip(line, xs, ys):
            half_y = point.values[learn][1] or 0
            half_x = point.values[forget][1] or 0
            ax.errorbar(x, y, half_y, half_x, ecolor=colour, elinewidth=0.5, alpha=0.5)

    # the base: a star, and a line for each metric that is known of it
    if base_learn and base_forget:
        ax.scatter(base_forget[0], base_learn[0], 40, color=BASE, marker="*", zorder=4)
    if base_forget:
        ax.axvline(base_forget[0], color=BASE, ls="--", lw=0.8, zorder=1)
    if base_learn:
        ax.axhline(base_learn[0], color=BASE, ls="--", lw=0.8, zorder=1)

    # better is up and right, also where less is better
    if falls(forget):
        ax.invert_xaxis()
    if falls(learn):
        ax.invert_yaxis()
    ax.set(xlabel=metrics.title(forget), ylabel=metrics.title(learn))
    return plane_handles(series, sizes, kind, with_base=bool(base_learn and base_forget))


def marker_sizes(points, kind):
    """{length: area of a marker}, growing with the logarithm of the length."""
    lengths = sorted({point.place[kind] for point in points})
    low = math.log(lengths[0])
    span = math.log(lengths[-1]) - low
    sizes = {}
    for length in lengths:
        share = (math.log(length) - low) / span if span > 0 else 0
        sizes[length] = 14 + 60 * share
    return sizes


def plane_handles(series, sizes, kind, with_base):
    """The legend of a plane: its series, the base, the shortest and the longest length."""
    handles = []
    for name, style, _ in series:
        handles.append(legend_entry(name, ls="", **style))
    if with_base:
        handles.append(legend_entry("base", ls="", color=BASE, marker="*"))
    if len(sizes) > 1:
        for length in (min(sizes), max(sizes)):
            diameter = sizes[length] ** 0.5  # the sizes are areas
            handles.append(legend_entry(f"{short(length)} {kind}", ls="", color="#bbbbbb",
                                        marker="o", markersize=diameter))
    return handles


# ----------------------------------------------------------------------------- the whole story
def draw_story(points, bases, changes, metrics):
    """The paper in one picture, of the dataset with most points: learning and forgetting by length,
    both on a plane, and the effective rank of what each method changed.

    changes: what ranks_of_changes returns, {setting: [(tokens, rank, random rank, share)]}."""
    # the dataset with most points that have both metrics
    most = []
    for key, some in datasets_of(points).items():
        learn = pick(metrics.learning, some)
        forget = pick(metrics.forgetting, some)
        some = [point for point in some if learn in point.values and forget in point.values]
        if len(some) > len(most):
            most = some
            best = key, learn, forget
    # of its methods those whose change was measured
    measured = {}
    for rank, setting in main_settings(most):
        if setting in changes:
            measured[rank] = changes[setting]
    if not measured:
        return None

    # the four panels
    key, learn, forget = best
    base_learn = bases.get((*key, learn))
    base_forget = bases.get((*key, forget))
    fig, (learned, forgot, both, ranks) = grid_of(4, height=2.5)
    draw_curve_panel(learned, most, learn, base_learn, metrics)
    learned.set_title("What was learned")
    draw_curve_panel(forgot, most, forget, base_forget, metrics)
    forgot.set_title("What was forgotten")
    draw_plane_panel(both, learn, forget, main_series(most), base_learn, base_forget, metrics)
    both.set_title("Both: better further up and right")
    draw_rank_bars(ranks, measured, ranks_in(most))
    return fig


def draw_rank_bars(ax, measured, ranks):
    """A bar a method: the effective rank of its change at the longest length, mean over seeds."""
    order = sorted(measured, key=lambda rank: rank or math.inf)  # full finetuning last
    for rank, found in measured.items():
        # means over the seeds of the longest length
        longest = max(tokens for tokens, _, _, _ in found)
        mean = statistics.fmean(effective for tokens, effective, _, _ in found if tokens == longest)
        chance = statistics.fmean(random for tokens, _, random, _ in found if tokens == longest)
        share = found[0][-1]

        # a bar, its number above it, and a dashed line where a random matrix would be
        at = order.index(rank)
        colour = style_of(rank, ranks)["color"]
        ax.bar(at, mean, color=colour, width=0.6)
        ax.plot([at - 0.4, at + 0.4], [chance, chance], color=CHANCE, ls="--", lw=1)
        ax.annotate(f"{mean:.3g}", (at, mean), (0, 2), textcoords="offset points", ha="center",
                    fontsize=7)
    names = [method_name(rank).replace(" ", "\n") for rank in order]
    ax.set_xticks(range(len(order)), names)
    ax.set(title="Rank of the change",
           ylabel=f"rank for {float(share):.0%} of its squares\n(dashed: a random matrix)")
