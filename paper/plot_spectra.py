"""Figures of spectrum.py's JSON: singular values and effective ranks of W0, W and D = W - W0.

    log s |`--.___________  W0      A panel for each kind of projection (q, k, v, ...). Each
          |    `-.                  checkpoint has a colour: full finetuning from light to dark
          |___    `-._____  D       by length, LoRA by rank.
          +---------------- index
"""
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from paper.looks import (BASE, CHANCE, FULL, OTHERS, draw_chance_line, grid_of, legend_entry,
                         method_name, name_end, powers_axis, shades_of, short, style_of)
from paper.results import problems

DOTTED = (0, (1, 1.5))


# ----------------------------------------------------------------------------- reading the JSON
def share_of(spectrum):
    """The share of squares for the effective rank: 0.9 where spectrum.py took it, else the most."""
    shares = spectrum["matrices"][0]["effective_rank"]
    return "0.9" if "0.9" in shares else max(shares)


def rows_of(rows, matrix, module, checkpoint=None):
    """The rows of W0, or of a checkpoint's W or D, of one module, in order of blocks."""
    wanted = matrix, module, checkpoint
    found = []
    for row in rows:
        if (row["matrix"], row["module"], row["checkpoint"]) == wanted:
            found.append(row)
    return sorted(found, key=lambda row: row["layer"])


def modules_of(spectrum):
    """The modules in the file's order."""
    return list(dict.fromkeys(row["module"] for row in spectrum["matrices"]))


def short_module(module):
    return module.removesuffix("_proj")


def checkpoint_looks(spectrum):
    """[(name, colour)] of the checkpoints, in the file's order."""
    # full finetuning has one colour, or a shade a checkpoint
    made = spectrum["checkpoints"]
    ranks = {checkpoint["lora_rank"] for checkpoint in made if checkpoint["lora_rank"]}
    full_count = sum(not checkpoint["lora_rank"] for checkpoint in made)
    shades = [FULL] if full_count == 1 else shades_of(full_count)
    looks = []
    for checkpoint in made:
        rank = checkpoint["lora_rank"]
        name = method_name(rank)
        if checkpoint.get("tokens") and len(made) > 1:
            name += f", {short(checkpoint['tokens'])} tokens"
        colour = style_of(rank, ranks)["color"] if rank else shades.pop(0)
        looks.append((name, colour))
    return looks


def ranks_of_changes(loaded, settings):
    """{setting: [(tokens, effective rank of D, that of a random matrix, share)]}; ranks are means.

    loaded [(path, JSON)]; settings {run folder: setting}. A checkpoint is of the run whose folder
    it names, or, where everything has been moved, of the run whose folder holds the JSON."""
    settings = {folder.resolve(): setting for folder, setting in settings.items()}
    found = defaultdict(list)
    for path, spectrum in loaded:
        share = share_of(spectrum)
        changed = [row for row in spectrum["matrices"] if row["matrix"] == "D"]
        beside = settings.get(path.resolve().parent)
        for i, made in enumerate(spectrum["checkpoints"]):
            # means over all matrices of this checkpoint
            rows = [row for row in changed if row["checkpoint"] == i]
            if not rows:
                problems[f"{path}: checkpoint {i} changes none of its matrices, left out"] = 1
                continue
            effective = statistics.fmean(row["effective_rank"][share] for row in rows)
            random = statistics.fmean(row["random_rank"][share] for row in rows)
            # whose they are
            run_dir = Path(made["folder"]).resolve().parent
            setting = settings.get(run_dir, beside)
            tokens = made.get("tokens") or 0
            found[setting].append((tokens, effective, random, share))
    return found


# ----------------------------------------------------------------------------- panels of modules
def module_panels(spectrum, height):
    """(fig, {module: axes}): a panel a module, four in a row; finish_panels does the rest."""
    modules = modules_of(spectrum)
    fig, axes = grid_of(len(modules), height=height, columns=4)
    return fig, dict(zip(modules, axes))


def finish_panels(fig, panels, xlabel, ylabel, entries):
    """Name the axes once and add one legend, [(name, line style)], in a free panel or below."""
    for ax in list(panels.values())[-4:]:  # those with nothing below
        ax.set_xlabel(xlabel)
    fig.supylabel(ylabel, fontsize=8)
    handles = [legend_entry(name, **style) for name, style in entries]
    free = [ax for ax in fig.axes if not ax.get_visible()]
    if free and len(handles) <= 8:
        free[0].set_visible(True)
        free[0].axis("off")
        free[0].legend(handles=handles, loc="center left", bbox_to_anchor=(-0.2, 0.5),
                       borderpad=0)
    else:
        fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def draw_effective_ranks(spectrum):
    """Figure 6: least rank that holds the share of D's squares, by block, a panel a module."""
    looks = checkpoint_looks(spectrum)
    share = share_of(spectrum)
    fig, panels = module_panels(spectrum, 1.55)
    for module, ax in panels.items():
        # the change of each checkpoint
        for i, (_, colour) in enumerate(looks):
            rows = rows_of(spectrum["matrices"], "D", module, i)
            blocks, ranks = ranks_by_block(rows, share)
            ax.plot(blocks, ranks, color=colour, marker="o", ms=2)
        # the base's weight, and a random matrix of its shape
        before = rows_of(spectrum["matrices"], "W0", module)
        blocks, ranks = ranks_by_block(before, share)
        ax.plot(blocks, ranks, color=BASE, ls=":", lw=1)
        if before:
            draw_chance_line(ax, before[0]["random_rank"][share])
            shape = "x".join(map(str, before[0]["shape"]))
            ax.set_title(f"{short_module(module)}, {shape}")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))

    entries = []
    for name, colour in looks:
        entries.append((f"D, {name}", {"color": colour, "marker": "o", "ms": 2}))
    entries.append(("the base's weight", {"color": BASE, "ls": ":"}))
    entries.append(("random, same shape", {"color": CHANCE, "ls": "--"}))
    finish_panels(fig, panels, "block", f"rank for {float(share):.0%} of squares", entries)
    return fig


def ranks_by_block(rows, share):
    """([block], [effective rank]) of rows in order of blocks."""
    blocks = [row["layer"] for row in rows]
    ranks = [row["effective_rank"][share] for row in rows]
    return blocks, ranks


# ----------------------------------------------------------------------------- singular values
def draw_spectra(spectrum, block):
    """Figure S7: singular values of W0, W and D of one block, and the largest of a random D.

    block: its number; the middle one where the file has no such block."""
    layers = sorted({row["layer"] for row in spectrum["matrices"]})
    layer = block if block in layers else layers[len(layers) // 2]
    looks = checkpoint_looks(spectrum)
    fig, panels = module_panels(spectrum, 1.65)
    rows = [row for row in spectrum["matrices"] if row["layer"] == layer]
    for module, ax in panels.items():
        draw_module_spectra(ax, rows, module, looks)

    entries = [("W0", {"color": BASE, "lw": 2.2})]
    for name, colour in looks:
        entries.append((f"D, {name}", {"color": colour}))
    entries.append(("W, same colours", {"color": colour, "ls": DOTTED}))
    entries.append(("largest, random D", {"color": CHANCE, "ls": "--"}))
    finish_panels(fig, panels, "index", f"singular value, block {layer}", entries)
    return fig


def draw_module_spectra(ax, rows, module, looks):
    """The spectra of one module, of one block's rows: W0, and W and D of every checkpoint."""
    # W0 in the background, then W and D of every checkpoint
    lines = []  # (row, colour, line style, line width)
    for row in rows_of(rows, "W0", module):
        lines.append((row, BASE, "-", 2.2))
    largest = None
    for i, (_, colour) in enumerate(looks):
        for row in rows_of(rows, "W", module, i):
            lines.append((row, colour, DOTTED, 1.3))
        for row in rows_of(rows, "D", module, i):
            lines.append((row, colour, "-", 1.1))
            # the largest singular value of a Gaussian matrix of this shape and norm
            height, width = row["shape"]
            largest = row["norm"] * (height ** -0.5 + width ** -0.5)

    drawn = False
    for row, colour, ls, lw in lines:
        values = row["singular_values"]
        if values and values[0] > 0:
            # numbers that only rounding keeps from zero would stretch the axis
            least = 1e-4 * values[0]
            shown = [value if value > least else math.nan for value in values]
            index = np.arange(1, len(shown) + 1)
            ax.plot(index, shown, color=colour, ls=ls, lw=lw)
            drawn = True
    if largest:
        draw_chance_line(ax, largest)
    ax.set(title=short_module(module), yscale="log" if drawn else "linear")


# ----------------------------------------------------------------------------- directions
def draw_directions(spectrum):
    """What became of W0's leading k singular directions, means over blocks.

    Two panels for the last checkpoint of full finetuning and of each rank: the share of them that
    is no longer among those of W, and how much of the change is written to them."""
    rows = []
    for row in spectrum["matrices"]:
        if row["matrix"] == "W" and row.get("overlap_out"):
            rows.append(row)
    if not rows:
        return None
    looks = checkpoint_looks(spectrum)
    last = {}  # {rank: its last checkpoint}
    for i in sorted({row["checkpoint"] for row in rows}):
        last[spectrum["checkpoints"][i]["lora_rank"]] = i

    fig, axes = grid_of(2 * len(last), height=2.2)
    for place, i in enumerate(last.values()):
        lost_ax, ratio_ax = axes[2 * place:2 * place + 2]
        for n, module in enumerate(modules_of(spectrum)):
            mine = [row for row in rows if row["module"] == module and row["checkpoint"] == i]
            draw_module_directions(lost_ax, ratio_ax, mine, short_module(module), n)
        draw_chance_line(ratio_ax, 1)
        name_end(ratio_ax, None, 1, "random", CHANCE)
        lost_ax.set(yscale="log", xlabel="k leading directions", ylabel="share of W0's that W lost",
                    title=looks[i][0])
        ratio_ax.set(yscale="log", xlabel="k leading directions of W0",
                     ylabel="D written to them / chance", title=looks[i][0])
        ratio_ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ratio_ax.yaxis.set_minor_formatter(minor_tick)
    return fig


def draw_module_directions(lost_ax, ratio_ax, rows, name, n):
    """One module's line in both panels, of its rows of all blocks; n = its place among modules."""
    ks = set()
    for row in rows:
        ks.update(map(int, row["overlap_out"]))
    ks = sorted(ks)

    # means over the blocks: what W lost of W0's directions, and what the change wrote to them
    lost = []
    ratio = []
    for k in ks:
        kept_out = mean_over_blocks(rows, "overlap_out", k)
        kept_in = mean_over_blocks(rows, "overlap_in", k)
        lost.append(max(1 - (kept_out + kept_in) / 2, 1e-16))
        chance = mean_over_blocks(rows, "random_out", k)
        ratio.append(mean_over_blocks(rows, "change_out", k) / chance)
    colour = OTHERS[n % 7]
    marker = "osD^vPX"[n % 7]
    for ax, ys in ((lost_ax, lost), (ratio_ax, ratio)):
        if ks:
            ax.plot(ks, ys, color=colour, marker=marker)
            name_end(ax, ks[-1], ys[-1], name, colour)
            powers_axis(ax, ks)


def mean_over_blocks(rows, key, k):
    k = str(k)
    return statistics.fmean(row[key][k] for row in rows if k in row[key])


def minor_tick(value, _):
    """Between the powers of ten only 2, 3 and 5 have labels."""
    return f"{value:g}" if f"{value:.0e}"[0] in "235" else ""


# ----------------------------------------------------------------------------- noise
def draw_noise(content):
    """Figure S8: Gaussian A, 0.1 B and their sum; and how much c B moves A's spectrum."""
    fig, (spectra_ax, moved_ax) = grid_of(2, height=2.2)
    # left: the three spectra
    colours = (BASE, OTHERS[1], OTHERS[0])
    styles = ("-", "-", "--")
    for name, colour, ls in zip(content["spectra"], colours, styles):
        found = content["spectra"][name]
        values = found["singular_values"]
        index = np.arange(1, len(values) + 1)
        rank = found["effective_rank"].get("0.9", "?")
        spectra_ax.plot(index, values, color=colour, ls=ls, label=f"{name}: rank {rank}")
    spectra_ax.legend()
    spectra_ax.set(xlabel="index", ylabel="singular value")

    # right: how far c B moves A's spectrum
    exponents = [found["log10_c"] for found in content["differences"]]
    moved = [found["mean_difference"] for found in content["differences"]]
    moved_ax.plot(exponents, moved, color=OTHERS[3], marker="o")
    moved_ax.set(yscale="log", xlabel="log10 c", ylabel="mean |change of spectrum|")
    return fig
