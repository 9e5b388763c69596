r"""
Where LoRA's best learning rate lies, and what is left between it and full finetuning there.

    python -m paper.study config/regret.py                    # runs at several rates
    python -m paper.laws --runs='out/regret/*'

    | W2 LoRA's best rate is 5 to 20 times full's | r=16 | 6.1 (5.2 to 7.2) | holds |
                                      geometric mean over seeds, 95% interval

    W1 to W4    "LoRA Without Regret", Schulman et al. 2025
    muA         how the best rate moves with the rank: Chen, Villar, Hayou 2026 (arXiv 2602.06204)
    OC          optimizer-model consistency: arXiv 2605.06654, May 2026

Runs that differ in learning rate and seed alone are a sweep. Everything here is said of best rates,
which paper/sweeps.py finds; where one does not lie inside its sweep, nothing that rests on it can
be told. Intervals are over seeds (Student's t), so it takes three.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import configure
from paper.changes import folders_of, measure_runs
from paper.claims import (SAME_SIZE, add_row, differences_at_equal_learning, print_claims,
                          verdict)
from paper.results import (KNOBS, LORA_KNOBS, mean_of_seeds, read_config, setting_of,
                           trained_numbers)
from paper.sweeps import bests_of_seeds, factor_words, mean_factor
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
learning = 'loss target'      # metrics, as of paper/claims.py; learning is a loss
forgetting = 'loss source'

# muA's exponents of the rank in the best rate, by (rslora, lora_init, what is fixed)
EXPONENTS = {("False", "default", "alpha / r"): -0.5, ("False", "default", "alpha"): 0.0,
             ("True", "default", "alpha"): -0.25, ("False", "zero_a", "alpha / r"): 0.0}
AS_GOOD_AS = 0.125       # half of what lies between two of these exponents


class Family(NamedTuple):
    """What the runs of a sweep share: all but learning rate and seed."""
    base: str
    optimizer: str
    batch: int
    steps: int
    other: tuple     # further knobs, sorted pairs of str
    rank: int        # 0 = full finetuning
    alpha: float
    targets: str
    lora: tuple      # knobs that LoRA alone has, sorted pairs of str

    @property
    def full(self):
        """The Family of full finetuning beside this one."""
        return self._replace(rank=0, alpha=0, targets="all", lora=())

    def __str__(self):
        if not self.rank:
            return "full"
        name = f"r={self.rank}"
        if self.targets != "all":
            name += f" {self.targets}"
        return name


class Sweep(NamedTuple):
    """The runs of one Family."""
    runs: dict   # {seed: {rate: Measured}}
    bests: dict  # {seed: Best}; None = not inside the sweep


# ----------------------------------------------------------------------------- reading
def family_of(measured):
    """The Family of a Measured run."""
    setting = setting_of(measured.run)
    knobs = dict(setting.other)
    lora = tuple((name, knobs.pop(name)) for name in sorted(LORA_KNOBS) if name in knobs)
    del knobs["learning_rate"]
    optimizer = knobs.pop("optimizer")
    batch = int(knobs.pop("global_batch"))
    base = measured.run.config.get("base", "")
    return Family(base, optimizer, batch, measured.steps, tuple(sorted(knobs.items())),
                  setting.rank, setting.alpha, setting.targets, lora)


def read_sweeps(folders, learning, forgetting):
    """{Family: Sweep} of those with several learning rates. ValueError for two equal runs."""
    found = {}
    for measured in measure_runs(folders, learning, forgetting):
        by_rate = found.setdefault(family_of(measured), {}).setdefault(measured.seed, {})
        if measured.rate in by_rate:
            first = by_rate[measured.rate].folder
            raise ValueError(f"{measured.folder}: a second run of what {first} is, seed and "
                             "learning rate too")
        by_rate[measured.rate] = measured
    sweeps = {}
    for family, of_seeds in found.items():
        # a seed of one rate repeats what the others have found
        runs = {seed: of_seeds[seed] for seed in sorted(of_seeds) if len(of_seeds[seed]) > 1}
        if runs:
            losses = [losses_at_end(by_rate, learning) for by_rate in runs.values()]
            bests = bests_of_seeds(losses)
            sweeps[family] = Sweep(runs, bests and dict(zip(runs, bests)))
    return sweeps


def losses_at_end(by_rate, metric):
    """{rate: loss} of {rate: Measured}."""
    losses = {}
    for rate, measured in by_rate.items():
        losses[rate], _ = measured.run.metrics[metric][measured.steps]
    return losses


def sorted_families(sweeps, wanted):
    """Those of the families that `wanted(family)` says, by base, batch, targets and rank."""
    return sorted(filter(wanted, sweeps), key=lambda family: (family.other, family))


# ----------------------------------------------------------------------------- rows
def unknown(what, sweeps, families):
    """The row that says which of the families has no best rate; None if all have one."""
    names = [str(family) for family in families if sweeps[family].bests is None]
    if not names:
        return None
    named = " and ".join(dict.fromkeys(names))
    return what, "", f"cannot be told: the best rate of {named} is not inside its sweep"


def shared_seeds(sweeps, families):
    """The seeds that all of these sweeps have."""
    seeds = [set(sweeps[family].bests) for family in families]
    return sorted(set.intersection(*seeds))


def loss_row(what, sweeps, terms):
    """The row (what, numbers, verdict) of a sum of lowest losses that the claim says is above 0.

    terms [(weight, Family)]; None where a family was not swept."""
    families = [family for _, family in terms]
    if not all(family in sweeps for family in families):
        return None
    row = unknown(what, sweeps, families)
    if row:
        return row
    sums = []
    for seed in shared_seeds(sweeps, families):
        total = 0.0
        for weight, family in terms:
            total += weight * sweeps[family].bests[seed].loss
        sums.append(total)
    return difference_row(what, sums)


def difference_row(what, values):
    """The row of a difference that the claim says is above 0, from its values of the seeds."""
    rows = []
    add_row(rows, what, [(value, None) for value in values])
    return rows[0] if rows else None


def factor_row(what, sweeps, family, other, least, most):
    """The row of best rate over best rate, which the claim says is from `least` to `most`."""
    if family not in sweeps or other not in sweeps:
        return None
    row = unknown(what, sweeps, [family, other])
    if row:
        return row
    factors = []
    for seed in shared_seeds(sweeps, [family, other]):
        factors.append(sweeps[family].bests[seed].rate / sweeps[other].bests[seed].rate)
    mean, factor = mean_factor(factors)
    half = factor and math.log(factor)
    return what, factor_words(mean, factor), verdict_within(math.log(mean), half, math.log(least),
                                                            math.log(most))


def verdict_within(mean, half, least, most):
    """Does the value lie between two others? half: half the width of its interval, or None."""
    above = verdict(mean, half, least)
    below = verdict(-mean, half, -most)
    if above == below:
        return above
    return "does not hold" if "does not hold" in (above, below) else "cannot be told"


# ----------------------------------------------------------------------------- LoRA Without Regret
def lowest_so_far(sweep, metric):
    """{seed: {step: lowest loss of all rates}}: what a method can reach by each step.

    Of the rates that every seed has."""
    shared = set.intersection(*map(set, sweep.runs.values()))
    curves = {}
    for seed, by_rate in sweep.runs.items():
        curve = curves.setdefault(seed, {})
        for rate in shared:
            measured = by_rate[rate]
            for step, (loss, _) in measured.run.metrics[metric].items():
                curve[step] = min(loss, curve.get(step, math.inf))
    return curves


def rows_of_curves(sweeps, ranks, metric):
    """By how much each rank falls further behind full finetuning's curve after the first steps.

    ranks: Families in order of rank."""
    rows = []
    for family in ranks:
        if family.full not in sweeps:
            continue
        name = short_name(family, ranks, sweeps)
        row = unknown(f"{name}: gap to full", sweeps, [family, family.full])
        if row:
            rows.append(row)
            continue
        mine = lowest_so_far(sweeps[family], metric)
        theirs = lowest_so_far(sweeps[family.full], metric)
        behind = []  # of each seed, at the end less at the first step
        for seed in sorted(mine.keys() & theirs.keys()):
            steps = sorted((mine[seed].keys() & theirs[seed].keys()) - {0})
            gaps = [mine[seed][step] - theirs[seed][step] for step in steps]
            if len(gaps) > 1:
                behind.append(gaps[-1] - gaps[0])
                first = steps[0]
        if behind:
            what = f"{name}: gap to full, step {family.steps} - {first}"
            rows.append(difference_row(what, behind))
    return rows


def rows_of_regret(sweeps, metric):
    """[(claim, rows)]: W1 to W4."""
    loras = sorted_families(sweeps, lambda family: family.rank)
    plain = [family for family in loras if family.targets == "all"]
    smallest = min((family.batch for family in sweeps), default=0)
    ranks = [family for family in plain if family.batch == smallest]

    of_full = []
    for family in ranks:
        name = short_name(family, ranks, sweeps)
        of_full.append(factor_row(name, sweeps, family, family.full, 5, 20))

    # ranks whose alpha goes by one rule
    between = []
    drift = []
    rules = rules_of(ranks)
    for rule, group in rules.items():
        words = f" ({words_of(rule)})" if len(rules) > 1 else ""
        first = group[0]
        for lower, higher in zip(group, group[1:]):
            what = f"{lower} - {higher}{words}"
            between.append(loss_row(what, sweeps, [(1, lower), (-1, higher)]))
            drift.append(factor_row(f"{higher} / {first}{words}", sweeps, higher, first, 0.5, 2))

    # W3: the gap at a batch, less that at the smallest one
    by_batch = []
    for family in plain:
        small = find(sweeps, family, batch=smallest)
        if family.batch > smallest and small:
            terms = [(1, family), (-1, family.full), (-1, small), (1, small.full)]
            what = f"{family}, {family.batch} rows a step - {smallest}"
            by_batch.append(loss_row(what, sweeps, terms))

    return [
        ("W1 A rank falls behind full finetuning's curve as it trains",
         rows_of_curves(sweeps, ranks, metric)),
        ("W1 A lower rank ends above a higher one", between),
        ("W2 LoRA's best rate is 5 to 20 times full finetuning's", of_full),
        ("W2 The best rate is the same for all ranks, within a factor of 2", drift),
        ("W3 LoRA's loss is the further above full finetuning's the larger the batch", by_batch),
        ("W4 Attention alone learns less than the MLP alone, at equal size",
         rows_of_modules(sweeps, loras))]


def find(sweeps, family, **fields):
    """The swept Family with other fields than this one, at any length; None if there is none."""
    wanted = family._replace(**fields)
    for other in sweeps:
        if other._replace(steps=0) == wanted._replace(steps=0):
            return other
    return None


def rows_of_modules(sweeps, loras):
    """W4: attention's lowest loss less the MLP's, of adapters that are of equal size."""
    rows = []
    for attention in loras:
        for mlp in loras:
            if attention.targets != "attention" or mlp.targets != "mlp":
                continue
            if attention._replace(rank=mlp.rank, targets="mlp") != mlp:
                continue
            sizes = size_of(sweeps[attention]), size_of(sweeps[mlp])
            if 0 not in sizes and abs(math.log(sizes[0] / sizes[1])) < SAME_SIZE:
                rows.append(loss_row(f"{attention} - {mlp}", sweeps, [(1, attention), (-1, mlp)]))
    return rows


def size_of(sweep):
    """The numbers in an adapter of a sweep; 0 if its checkpoints are gone."""
    of_seed = next(iter(sweep.runs.values()))
    measured = next(iter(of_seed.values()))
    return trained_numbers(measured.folder)


# ----------------------------------------------------------------------------- muA
class Rule(NamedTuple):
    """What several ranks share: all but rank and alpha, and alpha or alpha / r."""
    rest: Family
    fixed: str      # 'alpha' | 'alpha / r'
    value: float    # of that


def rules_of(families):
    """{Rule: its families} of those that several of the families go by; they stay in order."""
    groups = {}
    for family in families:
        rest = family._replace(rank=0, alpha=0)
        scale = family.alpha / family.rank
        groups.setdefault(Rule(rest, "alpha", family.alpha), []).append(family)
        groups.setdefault(Rule(rest, "alpha / r", scale), []).append(family)
    return {rule: group for rule, group in groups.items() if len(group) > 1}


def words_of(rule):
    """A Rule in words: 'alpha / r = 1, A zero'."""
    lora = dict(rule.rest.lora)
    words = f"{rule.fixed} = {rule.value:g}"
    words += ", rslora" if lora.get("rslora") == "True" else ""
    words += ", A zero" if lora.get("lora_init") == "zero_a" else ""
    return words


def rows_of_exponents(sweeps):
    """[(what, exponent of the rank in the best rate, verdict)] of each rule with three ranks."""
    rows = []
    loras = sorted_families(sweeps, lambda family: family.rank)
    for rule, families in rules_of(loras).items():
        lora = dict(rule.rest.lora)
        theory = EXPONENTS.get((lora.get("rslora"), lora.get("lora_init"), rule.fixed))
        if len(families) < 3 or theory is None:
            continue
        what = f"{words_of(rule)}; theory {theory:+.2f}"
        rows.append(exponent_row(what, sweeps, families, theory))
    return rows


def exponent_row(what, sweeps, families, theory):
    """The slope of log best rate over log rank, a line through the ranks of each seed."""
    row = unknown(what, sweeps, families)
    if row:
        return row
    slopes = []
    for seed in shared_seeds(sweeps, families):
        ranks = [math.log(family.rank) for family in families]
        rates = [math.log(sweeps[family].bests[seed].rate) for family in families]
        slopes.append((float(np.polyfit(ranks, rates, 1)[0]), None))
    mean, half = mean_of_seeds(slopes)
    interval = "" if half is None else f" ± {half:.3f}"
    said = verdict_within(mean, half, theory - AS_GOOD_AS, theory + AS_GOOD_AS)
    return what, f"{mean:+.3f}{interval} (n={len(slopes)})", said


def rows_of_zero_a(sweeps):
    """With A zero and scale 1 the best rate is full finetuning's, within a factor of 2."""
    rows = []
    for family in sorted_families(sweeps, lambda family: family.rank):
        if dict(family.lora).get("lora_init") == "zero_a" and family.alpha == family.rank:
            rows.append(factor_row(str(family), sweeps, family, family.full, 0.5, 2))
    return rows


# ----------------------------------------------------------------------------- consistency
def pretrained_with(base):
    """The optimizer that a base was pretrained with, by the run that it is a checkpoint of; ''."""
    path = Path(base).parent / "config.json"
    if not path.is_file():
        return ""
    config = read_config(path.parent)
    return config.get("optimizer", "") if config.get("scratch") else ""


def rows_of_consistency(sweeps):
    """At equal learning, what the other optimizer forgot more than that of the pretraining."""
    of_optimizers = []
    of_lora = []
    for family in sorted_families(sweeps, lambda family: True):
        if family.optimizer != pretrained_with(family.base):
            continue
        for other in sweeps:
            if other._replace(optimizer=family.optimizer) == family and other != family:
                difference = f"{other.optimizer} - {family.optimizer}"
                what = f"{family}, base of {family.optimizer}: {difference}"
                of_optimizers.append(forgotten_row(what, sweeps, other, family))
        if family.rank and family.full in sweeps:
            what = f"{family} - full, base and tuning of {family.optimizer}"
            of_lora.append(forgotten_row(what, sweeps, family, family.full))
    return of_optimizers, of_lora


def forgotten_row(what, sweeps, more, less):
    """The row of what one sweep had forgotten more than another at equal learning."""
    row = unknown(what, sweeps, [more, less])
    if row:
        return row
    # as paper/claims.py has them: by seed and length, each at its rate of the lowest loss
    changes = {}
    ends = {}
    for family in (more, less):
        for seed, by_rate in sweeps[family].runs.items():
            pairs = {rate: (run.learned, run.forgot) for rate, run in by_rate.items()}
            changes[seed, family, family.steps] = pairs
            ends[seed, family] = max(pairs.values(), key=lambda pair: pair[0].value)
    found = differences_at_equal_learning(changes, ends, more, less)
    return difference_row(what, [value for value, _ in found])


# ----------------------------------------------------------------------------- the whole
def rate_table(sweeps):
    """[(method, best rate, lowest loss)] of every sweep, in words."""
    rows = []
    for family in sorted_families(sweeps, lambda family: True):
        sweep = sweeps[family]
        rates = sorted({rate for by_rate in sweep.runs.values() for rate in by_rate})
        name = full_name(family, sweeps)
        if sweep.bests is None:
            rows.append((name, f"not inside {rates[0]:.3g} to {rates[-1]:.3g}", ""))
            continue
        bests = sweep.bests.values()
        mean, half = mean_of_seeds([(best.loss, None) for best in bests])
        interval = "" if half is None else f" ± {half:.3f}"
        rate = factor_words(*mean_factor([best.rate for best in bests]))
        rows.append((name, rate, f"{mean:.3f}{interval}"))
    return rows


def short_name(family, families, sweeps):
    """The name of one of the families: 'r=16' where that tells it from the others."""
    alike = [other for other in families if str(other) == str(family)]
    return str(family) if len(alike) == 1 else full_name(family, sweeps)


def full_name(family, sweeps):
    """The name of a Family with all in which the sweeps differ."""
    words = [str(family)]
    if len({other.base for other in sweeps}) > 1:
        words.append(f"base {family.base}")
    if len({other.optimizer for other in sweeps}) > 1:
        words.append(family.optimizer)
    if len({other.batch for other in sweeps}) > 1:
        words.append(f"{family.batch} rows a step")
    if family.rank:
        words.append(f"alpha {family.alpha:g}")
        loras = [dict(other.lora) for other in sweeps if other.rank]
        for knob, value in family.lora:
            if len({lora[knob] for lora in loras}) > 1 and value != str(KNOBS[knob]):
                words.append(f"{knob} {value}")
    return ", ".join(words)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        sweeps = read_sweeps(folders_of(runs), learning, forgetting)
        if not sweeps:
            raise ValueError("runs: none of them were trained at several learning rates")

        print(f"Learned: {learning}, forgotten: {forgetting}\n")
        print("| | best learning rate | lowest loss |\n|---|---|---|")
        for row in rate_table(sweeps):
            print(f"| {' | '.join(row)} |")

        of_optimizers, of_lora = rows_of_consistency(sweeps)
        print()
        found = [
            *rows_of_regret(sweeps, learning),
            ("muA The best rate goes as a power of the rank", rows_of_exponents(sweeps)),
            ("muA With A zero and scale 1 the best rate is full finetuning's, within a factor of 2",
             rows_of_zero_a(sweeps)),
            ("OC At equal learning the optimizer that did not pretrain the base has forgotten more",
             of_optimizers),
            ("OC At equal learning LoRA has forgotten more than full finetuning, both with the "
             "optimizer that pretrained the base", of_lora)]
        print_claims(found)
