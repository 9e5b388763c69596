"""PEFT's public plane of learning and forgetting, our own runs over it: plot.py's figure `peft`.

    accuracy on GSM8K |  . Lily              A grey dot is a method of PEFT's table, one seed each;
                      |    . rsLoRA r=64     a coloured one is ours, with 95% intervals. What was
                      |. OSF  o--full        forgotten is the rise of the loss on Wikipedia.
                      +---------------
"""
from paper.changes import base_of, change_of, combine, read_bases
from paper.looks import CHANCE, COLUMN, legend_entry, method_name, name_end, plt, style_of
from paper.results import mean_of_seeds, setting_of

# {method: (accuracy, rise of the loss)} of Llama-3.2-3B after 20,000 examples of MetaMathQA.
# Source: huggingface/peft 5d602fd, method_comparison/MetaMathQA/results of 2026-07-15, one seed.
PUBLISHED = {
    "full, 1e-5": (0.472, 0.030), "LoRA r=32": (0.478, 0.050), "LoRA r=64": (0.474, 0.059),
    "rsLoRA r=64": (0.513, 0.111), "LoRA r=10, MLP": (0.494, 0.032), "DoRA r=32": (0.469, 0.051),
    "OFT": (0.491, 0.041), "SHiRA": (0.510, 0.052), "Lily r=140, MLP": (0.526, 0.216),
    "OSF r=128": (0.427, 0.017)}


def draw_peft(found, metrics):
    """The plane; None where no run has both metrics, or its base has no value of forgetting.

    found {folder: Run}; metrics.learning and forgetting: the first is an accuracy, the second a
    loss, whose rise is taken item by item where the items are known."""
    learn = metrics.learning[0]
    forget = metrics.forgetting[0]
    ours = ours_in_plane(found, learn, forget)
    if not ours:
        return None

    # theirs
    fig, ax = plt.subplots(figsize=(COLUMN * 1.5, COLUMN * 1.2))
    for name, (accuracy, rise) in PUBLISHED.items():
        ax.scatter(rise, accuracy, 12, color=CHANCE, zorder=2)
        name_end(ax, rise, accuracy, name, CHANCE)
    # ours, with both intervals
    ranks = {setting.rank for setting in ours}
    for setting, (learned, rise) in ours.items():
        style = style_of(setting.rank, ranks)
        ax.errorbar(rise[0], learned[0], learned[1] or 0, rise[1] or 0, elinewidth=0.8, **style,
                    zorder=3)
        rate = float(dict(setting.other)["learning_rate"])
        power = f"{rate:.0e}".replace("e-0", "e-")
        name_end(ax, rise[0], learned[0], f"{name_of(setting)}, {power}", style["color"])
    ax.margins(y=0.1)
    ax.set(xlabel=f"rise of {metrics.title(forget)}", ylabel=metrics.title(learn))
    theirs = legend_entry("PEFT's table, one seed", ls="", color=CHANCE, marker="o")
    ax.legend(handles=[theirs], loc="best")
    return fig


def ours_in_plane(found, learn, forget):
    """{Setting: (accuracy, rise of the loss)} at the end of its runs, each (mean, half width of
    its 95% interval or None) over the seeds."""
    bases = read_bases(found)
    of_seeds = {}
    for folder, run in found.items():
        if not run.config:
            continue
        steps = max(run.places, default=0)
        base = base_of(folder, run, bases)
        has_both = steps in run.metrics.get(learn, {}) and steps in run.metrics.get(forget, {})
        if has_both and (forget in base or 0 in run.metrics[forget]):
            better = change_of(folder, run, forget, steps, base)
            rise = combine([-1], [better])
            pair = run.metrics[learn][steps], (rise.value, rise.stderr)
            of_seeds.setdefault(setting_of(run), []).append(pair)
    ours = {}
    for setting, pairs in of_seeds.items():
        accuracies, rises = zip(*pairs)
        ours[setting] = mean_of_seeds(accuracies), mean_of_seeds(rises)
    return ours


def name_of(setting):
    """The method of a Setting, as PEFT's table has it."""
    knobs = dict(setting.other)
    name = method_name(setting.rank)
    if knobs.get("rslora") == "True":
        name = name.replace("LoRA", "rsLoRA")
    if knobs.get("dora") == "True":
        name = name.replace("LoRA", "DoRA")
    if setting.targets == "mlp":
        name += ", MLP"
    return name
