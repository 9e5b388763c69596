"""
Sweeps of several methods, and the rows of claims about their best rates: for laws.py and why.py.

    Family r=16, alpha 32   seed 1: 5e-4 0.43, 1e-3 0.41, 2e-3 0.95   best rate 9.1e-4, loss 0.41
                            seed 2: ...
    Family full             ...
    row                     r=16 - full | +0.198 ± 0.073 (n=3) | holds

Runs that differ in learning rate and seed alone are a sweep; a Family is what they share. A row is
(what, numbers, verdict), in words.
"""
import math
from typing import NamedTuple

from paper.changes import measure_runs
from paper.claims import add_row, differences_at_equal_learning, verdict
from paper.results import KNOBS, LORA_KNOBS, setting_of
from paper.sweeps import bests_of_seeds, factor_words, mean_factor, mean_losses


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
    """The families for which `wanted(family)` is true, by further knobs, base, batch and rank."""
    return sorted(filter(wanted, sweeps), key=lambda family: (family.other, family))


def best_runs(sweep):
    """{seed: Measured} at the rate of the lowest loss of each seed."""
    best = {}
    for seed, by_rate in sweep.runs.items():
        best[seed] = max(by_rate.values(), key=lambda measured: measured.learned.value)
    return best


def runs_at_best_rate(sweep, metric):
    """{seed: Measured} of a sweep at the rate of its lowest mean loss, which all seeds have."""
    losses = [losses_at_end(by_rate, metric) for by_rate in sweep.runs.values()]
    means = mean_losses(losses)
    rate = min(means, key=means.get)
    return {seed: by_rate[rate] for seed, by_rate in sweep.runs.items()}


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


def find(sweeps, family, **fields):
    """The swept Family with other fields than this one, at any length; None if there is none."""
    wanted = family._replace(**fields)
    for other in sweeps:
        if other._replace(steps=0) == wanted._replace(steps=0):
            return other
    return None


# ----------------------------------------------------------------------------- names
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


# ----------------------------------------------------------------------------- rows
def unknown(what, sweeps, families):
    """The row that says which of the families has no best rate; None if all have one."""
    names = []
    for family in families:
        if sweeps[family].bests is None:
            names.append(short_name(family, sweeps, sweeps))
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


def forgotten_row(what, sweeps, more, less):
    """The row of what one sweep had forgotten more than another at equal learning."""
    row = unknown(what, sweeps, [more, less])
    if row:
        return row
    # in the form that paper/claims.py has; each seed at its own rate of the lowest loss
    changes = {}
    ends = {}
    for family in (more, less):
        for seed, by_rate in sweeps[family].runs.items():
            pairs = {rate: (run.learned, run.forgot) for rate, run in by_rate.items()}
            changes[seed, family, family.steps] = pairs
            ends[seed, family] = max(pairs.values(), key=lambda pair: pair[0].value)
    found = differences_at_equal_learning(changes, ends, more, less)
    return difference_row(what, [value for value, _ in found])
