"""PEFT's public plane of learning and forgetting, our own runs over it: plot.py's figure `peft`.

    accuracy on GSM8K |  . Lily              A grey dot is a method of PEFT's table, one seed each;
                      |    . rsLoRA r=64     a coloured one is ours, with 95% intervals. What was
                      |. OSF  o--full        forgotten is the rise of the loss on Wikipedia.
                      +---------------
"""
from paper.looks import CHANCE, COLUMN, legend_entry, method_name, plt, style_of
from paper.results import ends_of

# {method: (accuracy, rise of the loss)} of Llama-3.2-3B after 20,000 examples of MetaMathQA.
# Source: huggingface/peft 5d602fd, method_comparison/MetaMathQA/results of 2026-07-15, one seed.
PUBLISHED = {
    "full, 1e-5": (0.472, 0.030), "LoRA r=32": (0.478, 0.050), "LoRA r=64": (0.474, 0.059),
    "rsLoRA r=64": (0.513, 0.111), "LoRA r=10, MLP": (0.494, 0.032), "DoRA r=32": (0.469, 0.051),
    "OFT": (0.491, 0.041), "SHiRA": (0.510, 0.052), "Lily r=140, MLP": (0.526, 0.216),
    "OSF r=128": (0.427, 0.017)}


def draw_peft(points, bases, metrics):
    """The plane; None where no run has both metrics, or its base has no value of forgetting.

    metrics.learning and forgetting: the first is an accuracy, the second a loss."""
    learn = metrics.learning[0]
    forget = metrics.forgetting[0]
    ours = []
    for point in ends_of(points):
        before = bases.get((point.dataset, point.base, forget))
        if learn in point.values and forget in point.values and before:
            ours.append((point, before[0]))
    if not ours:
        return None

    # theirs
    fig, ax = plt.subplots(figsize=(COLUMN * 1.5, COLUMN * 1.2))
    for name, (accuracy, rise) in PUBLISHED.items():
        ax.scatter(rise, accuracy, 12, color=CHANCE, zorder=2)
        ax.annotate(name, (rise, accuracy), (3, 2), textcoords="offset points", fontsize=6,
                    color=CHANCE)
    # ours, with both intervals
    ranks = {point.rank for point, _ in ours}
    handles = [legend_entry("PEFT's table, one seed", ls="", color=CHANCE, marker="o")]
    named = set()
    for point, before in ours:
        style = style_of(point.rank, ranks)
        learned, half_learned = point.values[learn]
        loss, half_loss = point.values[forget]
        ax.errorbar(loss - before, learned, half_learned or 0, half_loss or 0, elinewidth=0.8,
                    **style, zorder=3)
        name = name_of(point)
        if name not in named:
            named.add(name)
            handles.append(legend_entry(name, ls="", **style))
    ax.set(xlabel=f"rise of {metrics.title(forget)}", ylabel=metrics.title(learn))
    ax.legend(handles=handles, loc="lower right")
    return fig


def name_of(point):
    """The method of a point, as PEFT's table has it."""
    knobs = dict(point.other)
    name = method_name(point.rank)
    if knobs.get("rslora") == "True":
        name = name.replace("LoRA", "rsLoRA")
    if knobs.get("dora") == "True":
        name = name.replace("LoRA", "DoRA")
    if point.targets == "mlp":
        name += ", MLP"
    return f"ours: {name}"
