r"""
Where LoRA's best learning rate lies, and what is left between it and full finetuning there.

    python -m paper.study config/regret.py                    # runs at several rates
    python -m paper.laws --runs='out/regret/*'

    | W2 LoRA's best rate is 5 to 20 times full's | r=16 | 6.1 (5.2 to 7.2) | holds |
                                      geometric mean over seeds, 95% interval

    W1 to W4    "LoRA Without Regret", Schulman et al. 2025
    muA         how the best rate moves with the rank: Chen, Villar, Hayou 2026 (arXiv 2602.06204)
    OC          optimizer-model consistency: arXiv 2605.06654, May 2026
    LM          at their best rates LoRA's variants are as good as LoRA: "Learning Rate Matters",
                arXiv 2602.04998; whether they forget as much is asked here

Runs that differ in learning rate and seed alone are a sweep. Everything here is said of best rates,
which paper/sweeps.py finds; where one does not lie inside its sweep, nothing that rests on it can
be told. Intervals are over seeds (Student's t), so it takes three.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import configure
from paper.changes import folders_of
from paper.claims import SAME_SIZE, print_claims
from paper.families import (Family, difference_row, factor_row, find, forgotten_row, full_name,
                            loss_row, lowest_so_far, read_sweeps, runs_at_best_rate, shared_seeds,
                            short_name, sorted_families, unknown, verdict_within)
from paper.results import KNOBS, mean_of_seeds, read_config, trained_numbers
from paper.sweeps import factor_words, mean_factor
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
learning = 'loss target'      # metrics, as of paper/claims.py; learning is a loss
forgetting = 'loss source'

# muA's exponents of the rank in the best rate, by (rslora, lora_init, what is fixed)
EXPONENTS = {("False", "default", "alpha / r"): -0.5, ("False", "default", "alpha"): 0.0,
             ("True", "default", "alpha"): -0.25, ("False", "zero_a", "alpha / r"): 0.0}
SAME_POWER = 0.125       # half of what lies between two of these exponents
SAME_LEARNING = 0.02     # what was learned counts as the same if it differs by less than this share


# ----------------------------------------------------------------------------- LoRA Without Regret
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
    said = verdict_within(mean, half, theory - SAME_POWER, theory + SAME_POWER)
    return what, f"{mean:+.3f}{interval} (n={len(slopes)})", said


def rows_of_zero_a(sweeps):
    """With A zero and scale 1 the best rate is full finetuning's, within a factor of 2."""
    rows = []
    for family in sorted_families(sweeps, lambda family: family.rank):
        if dict(family.lora).get("lora_init") == "zero_a" and family.alpha == family.rank:
            rows.append(factor_row(str(family), sweeps, family, family.full, 0.5, 2))
    return rows


# ----------------------------------------------------------------------------- variants
def rows_of_variants(sweeps, learning):
    """Each variant of LoRA beside plain LoRA, both at their best rates, as two lists of rows: by
    what share it has learned more, and how much more it has forgotten at equal learning."""
    learned = []
    forgotten = []
    loras = sorted_families(sweeps, lambda family: family.rank)
    for plain in filter(is_plain, loras):
        for variant in loras:
            is_alike = variant._replace(lora=plain.lora) == plain
            if is_alike and not is_plain(variant) and dropout_of(variant) == dropout_of(plain):
                name = full_name(variant, sweeps)
                learned.append(share_row(name, sweeps, variant, plain, learning))
                forgotten.append(forgotten_row(name, sweeps, variant, plain))
    return learned, forgotten


def is_plain(family):
    """Whether a LoRA Family is no variant: the default of every knob but dropout."""
    for knob, value in family.lora:
        if knob != "lora_dropout" and value != str(KNOBS[knob]):
            return False
    return True


def dropout_of(family):
    return dict(family.lora)["lora_dropout"]


def share_row(what, sweeps, variant, plain, learning):
    """The row of the share by which a variant has learned more than plain LoRA.

    The claim says that it is within SAME_LEARNING of 0."""
    row = unknown(what, sweeps, [variant, plain])
    if row:
        return row
    mine = runs_at_best_rate(sweeps[variant], learning)
    theirs = runs_at_best_rate(sweeps[plain], learning)
    shares = []
    for seed in shared_seeds(sweeps, [variant, plain]):
        share = mine[seed].learned.value / theirs[seed].learned.value - 1
        shares.append((share, None))
    mean, half = mean_of_seeds(shares)
    interval = "" if half is None else f" ± {half:.1%}"
    said = verdict_within(mean, half, -SAME_LEARNING, SAME_LEARNING)
    return what, f"{mean:+.1%}{interval} (n={len(shares)})", said


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
        learned_more, forgot_more = rows_of_variants(sweeps, learning)
        print()
        found = [
            *rows_of_regret(sweeps, learning),
            ("muA The best rate goes as a power of the rank", rows_of_exponents(sweeps)),
            ("muA With A zero and scale 1 the best rate is full finetuning's, within a factor of 2",
             rows_of_zero_a(sweeps)),
            ("OC At equal learning the optimizer that did not pretrain the base has forgotten more",
             of_optimizers),
            ("OC At equal learning LoRA has forgotten more than full finetuning, both with the "
             "optimizer that pretrained the base", of_lora),
            ("LM A variant of LoRA has learned as much as plain LoRA, within 2%", learned_more),
            ("LM At equal learning a variant of LoRA has forgotten more than plain LoRA",
             forgot_more)]
        print_claims(found)
