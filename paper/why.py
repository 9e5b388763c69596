r"""
Why a method forgets: how far it has moved from the base, intruders, and half the way back.

    python -m paper.study config/regret.py
    python -m paper.study config/why.py
    python -m paper.why --runs='out/regret/*'

    KL     is forgetting a function of KL(base || model) on the new task, whatever the method?
           "RL's Razor", arXiv 2509.04259, says so
    ID     intruders, leading directions of W unlike any of W0: Shuttleworth et al., 2410.21228
    RW     W0 + t (W - W0) for t = 1/2: PEFT-Arena, arXiv 2605.28819

Runs are read as by paper/laws.py, with the results of eval_loss.py (--against=BASE, and --t=0.5
--name=half) and the spectrum.json of each. Intervals are over seeds.
"""
import math
import statistics
from pathlib import Path

import numpy as np

from configurator import configure
from paper.changes import Change, folders_of, spared_on
from paper.claims import print_claims
from paper.families import (best_runs, difference_row, lowest_so_far, read_sweeps, sorted_families,
                            verdict_within)
from paper.looks import STYLE, plt
from paper.plot import save_figure
from paper.plot_why import draw_why
from paper.results import falls, mean_of_seeds, read_json, read_run
from paper.sweeps import factor_words, mean_factor
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
# metrics, as of paper/claims.py
learning = 'loss target'
forgetting = 'loss source'
divergence = 'kl target'           # KL(base || model) on the new task
half_learning = 'loss half target'      # of the same checkpoints at t = 1/2
half_forgetting = 'loss half source'
out_dir = ''             # folder for the figure, why.png and why.pdf; '' = none

EQUAL = 1.25             # forgetting that differs by less than this factor counts as equal


# ----------------------------------------------------------------------------- KL
def value_of(measured, metric):
    """A metric at the end of a Measured run; None if it was not measured."""
    return measured.run.metrics.get(metric, {}).get(measured.steps, (None,))[0]


def was_measured(sweep, metric):
    """Whether the best runs of a sweep all have a metric."""
    return None not in [value_of(run, metric) for run in best_runs(sweep).values()]


def kl_points(sweep, seed, divergence):
    """[(log KL, log of what was forgotten)] of a seed's runs that forgot at all, by KL."""
    points = []
    for measured in sweep.runs[seed].values():
        kl = value_of(measured, divergence)
        if kl and kl > 0 and measured.forgot.value > 0:
            points.append((math.log(kl), math.log(measured.forgot.value)))
    return sorted(points)


def correlation_row(sweeps, families, divergence):
    """The row of Spearman's rank correlation of KL and forgetting over all runs, less .9."""
    seeds = set.intersection(*(set(sweeps[family].runs) for family in families))
    values = []
    for seed in sorted(seeds):
        points = []
        for family in families:
            points += kl_points(sweeps[family], seed, divergence)
        order = np.argsort(np.argsort(np.array(points), axis=0), axis=0)
        values.append(float(np.corrcoef(order.T)[0, 1]) - 0.9)
    return difference_row("rank correlation over all runs - 0.9", values)


def kl_row(family, sweeps, divergence):
    """The row of LoRA's forgetting over full finetuning's at equal KL, by a line between its runs
    on logarithmic axes; None where no run lies between two of full finetuning's."""
    factors = []
    for seed in sorted(sweeps[family].runs.keys() & sweeps[family.full].runs.keys()):
        mine = kl_points(sweeps[family], seed, divergence)
        theirs = kl_points(sweeps[family.full], seed, divergence)
        if len(theirs) < 2:
            continue
        x, y = zip(*theirs)
        above = [forgot - np.interp(kl, x, y) for kl, forgot in mine if x[0] <= kl <= x[-1]]
        if above:
            factors.append(math.exp(statistics.fmean(above)))
    if not factors:
        return None
    mean, factor = mean_factor(factors)
    half = factor and math.log(factor)
    said = verdict_within(math.log(mean), half, -math.log(EQUAL), math.log(EQUAL))
    return f"{family} / full", factor_words(mean, factor), said


# ----------------------------------------------------------------------------- intruders
def intruders_of(measured):
    """The mean number of intruders a matrix at the end of a run, by its spectrum.json; None."""
    path = measured.folder / "spectrum.json"
    content = read_json(path) if path.is_file() else {}
    made = []
    for i, checkpoint in enumerate(content.get("checkpoints", [])):
        if checkpoint.get("step") == measured.steps:
            made.append(i)
    counts = []
    for matrix in content.get("matrices", []):
        if matrix.get("checkpoint") in made and "intruders" in matrix:
            counts.append(matrix["intruders"])
    return statistics.fmean(counts) if counts else None


def intruder_rows(sweeps, families):
    """[(what, mean count, '')] of each family, and the rows of lower ranks above higher ones."""
    counts = {}
    rows = []
    for family in families:
        of_seeds = {seed: intruders_of(run) for seed, run in best_runs(sweeps[family]).items()}
        if None in of_seeds.values():
            continue
        counts[family] = of_seeds
        mean, half = mean_of_seeds([(count, None) for count in of_seeds.values()])
        interval = "" if half is None else f" ± {half:.3f}"
        rows.append((str(family), f"{mean:.3f}{interval} a matrix (n={len(of_seeds)})", ""))
    # full finetuning, whose rank is the highest, comes last
    order = sorted(counts, key=lambda family: family.rank or math.inf)
    for lower, higher in zip(order, order[1:]):
        seeds = counts[lower].keys() & counts[higher].keys()
        more = [counts[lower][seed] - counts[higher][seed] for seed in sorted(seeds)]
        rows.append(difference_row(f"{lower} - {higher}", more))
    return rows


# ----------------------------------------------------------------------------- half way back
def rewound(measured, learning, forgetting, half_learning, half_forgetting):
    """(learned, forgot) at t = 1/2, two Changes, of metrics that are losses; None where unknown."""
    judged = read_run(measured.folder / f"step_{measured.steps}" / "t_0.5").metrics
    learning_half, _ = judged.get(half_learning, {}).get(measured.steps, (None, None))
    forgetting_half, _ = judged.get(half_forgetting, {}).get(measured.steps, (None, None))
    if learning_half is None or forgetting_half is None:
        return None
    learned = measured.learned.value + value_of(measured, learning) - learning_half
    forgot = measured.forgot.value + forgetting_half - value_of(measured, forgetting)
    return Change(learned), Change(forgot)


def rewinding_rows(family, sweep, metrics):
    """The rows of a family: the share of learning kept, of forgetting left, and what a sweep of
    gentler rates had forgotten more at equal learning."""
    kept = []
    left = []
    more = []
    for seed, measured in sorted(best_runs(sweep).items()):
        pair = rewound(measured, *metrics)
        if pair is None:
            return []
        learned, forgot = pair
        kept.append(learned.value / measured.learned.value - 0.5)
        left.append(0.5 - forgot.value / measured.forgot.value)
        # only between rates that were tried: what still gentler ones forget is not known
        line = []
        for _, run in sorted(sweep.runs[seed].items()):
            line.append((run.learned, run.forgot))
            if run is measured:  # higher rates are no gentler
                break
        by_rate = [spared_on(start, end, pair) for start, end in zip(line, line[1:])]
        passed = [value for value, _ in filter(None, by_rate)]
        if passed:
            more.append(min(passed))
    return [difference_row(f"{family}: share of learning kept - 0.5", kept),
            difference_row(f"{family}: 0.5 - share of forgetting left", left),
            difference_row(f"{family}: forgotten by a gentler rate - by rewinding", more)]


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        if not falls(learning) or not falls(forgetting):
            raise ValueError("learning, forgetting: losses are expected here")
        sweeps = read_sweeps(folders_of(runs), learning, forgetting)
        families = sorted_families(sweeps, lambda family: family.targets == "all")
        # those that were measured further
        families = [family for family in families if was_measured(sweeps[family], divergence)]
        if not families:
            raise ValueError(f"runs: no sweep with {divergence!r}; see config/why.py")

        of_kl = [correlation_row(sweeps, families, divergence)]
        of_rewinding = []
        for family in families:
            if family.rank and family.full in families:
                of_kl.append(kl_row(family, sweeps, divergence))
            metrics = (learning, forgetting, half_learning, half_forgetting)
            of_rewinding += rewinding_rows(family, sweeps[family], metrics)
        found = [
            ("KL Forgetting goes with the KL on the new task: in one order, and at equal KL LoRA "
             "has forgotten as much as full finetuning, within a quarter", of_kl),
            ("ID Intruders among the leading directions, the more the lower the rank",
             intruder_rows(sweeps, families)),
            ("RW Half way back to the base more than half of the learning is kept, less than half "
             "of the forgetting left, and a gentler rate would have forgotten more", of_rewinding)]
        print_claims(found)

        if out_dir:
            plt.rcParams.update(STYLE)
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            fig = draw_why(sweeps, families, learning, forgetting, divergence, lowest_so_far)
            print("wrote", *save_figure(fig, "why", out_dir, ("png", "pdf"), dpi=300))
