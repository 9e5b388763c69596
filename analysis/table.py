"""The table that spectrum.py prints at its end."""
from collections import defaultdict
from statistics import fmean

from llama.weights import PROJECTIONS


def summary(matrices, checkpoints, fraction):
    """The table printed at the end: means over layers, a line for each checkpoint and module."""
    key = str(fraction)
    # the layers of one module and matrix together
    groups = defaultdict(list)
    for record in matrices:
        groups[record["module"], record["matrix"], record["checkpoint"]].append(record)

    lines = [f"least rank that holds {fraction:.0%} of the squares, mean over layers; random: "
             "a Gaussian of the same shape and norm (LoRA: of the same rank)",
             f"{'':24} {'module':10} {'shape':>13} {'W0':>7} {'W':>7} {'D':>7} {'random':>7}  "
             f"{'D above random edge':>20} {'intruders':>10}"]
    for i, checkpoint in enumerate(checkpoints):
        name = "/".join(checkpoint.folder.parts[-2:])[-24:]
        for module in PROJECTIONS:
            of_D = groups[module, "D", i]
            if not of_D:
                continue
            shape = "x".join(map(str, of_D[0]["shape"]))
            line = f"{name:24} {module:10} {shape:>13}"
            for group in (groups[module, "W0", None], groups[module, "W", i], of_D):
                rank = fmean(record["effective_rank"][key] for record in group)
                line += f" {rank:7.1f}"
            above = fmean(record["above_random"] for record in of_D)
            share = fmean(record["above_random_share"] for record in of_D)
            random_rank = of_D[0]["random_rank"][key]
            line += f" {random_rank:7}  {above:6.1f} hold {share:7.1%}"
            # of all layers together, and of how many directions
            found = [record for record in groups[module, "W", i] if "intruders" in record]
            if found:
                count = sum(record["intruders"] for record in found)
                of = sum(len(record["max_cosines"]) for record in found)
                line += f" {count:4} of {of:3}"
            lines.append(line)

    # changes that may be rounding
    for i, checkpoint in enumerate(checkpoints):
        of_D = [r for r in matrices if r["matrix"] == "D" and r["checkpoint"] == i]
        if any(record["rounding_share"] > 0.1 for record in of_D):
            lines.append("note: rounding to 16 bits alone makes more than 10% of the change in "
                         f"{checkpoint.folder}")
    return "\n".join(lines)
