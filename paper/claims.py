r"""
The paper's claims, one by one, over any runs: each holds, does not hold, or cannot be told.

    python -m paper.claims --runs='out/claims/*/*' --learning='loss target' \
        --forgetting='loss source'
    python -m paper.claims --runs='out/smollm2/*' --learning='loss gsm8k_test' \
        --forgetting=hellaswag

    | C1 Full finetuning learns more ... | full - LoRA r=4 | +0.449 ± 0.025 (n=5) | holds |
                                mean over 5 seeds of the difference, 95% interval

A run is a folder of train.py. The runs of one seed are compared with one another, and a number is
the mean over seeds of their difference, with its 95% interval (Student's t). With one seed or two
the interval is that of the evaluation's items: the same ones in both runs, so of their differences
(values.jsonl; without it the errors of the two are taken as independent). It says nothing about
other seeds. A loss from train.py's log has no items, and a claim without an interval cannot be
told. A claim holds where the whole interval does. What a run began with is its base's folder beside
it, or step 0 of its log for what train.py logged. All at the longest duration.
"""
import glob
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from configurator import configure
from paper.results import (falls, mean_of_seeds, problems, read_json, read_run, regularised,
                           spectrum_fault, targets_name)
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
# metrics; 'loss NAME' is of eval_loss.py or train.py's val_data
learning = 'gsm8k_strict_match'   # of what was learned
forgetting = 'forgetting'         # of what was forgotten
fraction = '0.9'         # of the squares, for the effective rank in spectrum.json

# places in a run's pair of Changes
LEARNED = 0
FORGOT = 1


class Method(NamedTuple):
    """What is compared: full finetuning (rank 0) or LoRA, and what makes it other than plain."""
    rank: int
    variant: str  # '' | 'weight decay' | 'attention dropout' | 'attention' | 'mlp'

    def __str__(self):
        name = f"LoRA r={self.rank}" if self.rank else "full"
        return f"{name}, {self.variant}" if self.variant else name


class Change(NamedTuple):
    """How much better or worse than the base, with its standard error and its items, if known."""
    value: float
    stderr: float | None = None
    items: tuple = ()


# ----------------------------------------------------------------------------- reading
def method_of(config):
    """The Method of a run's knobs; None for what the claims do not speak of."""
    rank = config.get("lora_rank") or 0
    # what sets it apart from the plain form; two such things are more than a claim speaks of
    variants = [name.replace("_", " ") for name in regularised(config)]
    if rank:
        targets = targets_name(config.get("lora_targets", "all"))
        if targets != "all":
            variants.append(targets)
    if len(variants) > 1:
        return None
    return Method(rank, variants[0] if variants else "")


def read_runs(folders, learning, forgetting, fraction):
    """What each run learned and forgot, and the effective rank of its change.

    Returns {(seed, method, steps): (learned, forgot)} at each run's end, both a Change, and
    {the same: effective rank}. Raises ValueError where two runs are of one seed, method and length,
    or a metric is missing."""
    found = {folder: read_run(folder) for folder in folders}
    bases = read_bases(found)
    changes = {}
    ranks = {}
    for folder, run in found.items():
        method = method_of(run.config)
        if not run.config or run.config.get("scratch") or method is None:
            continue  # a base, a pretraining, or nothing that the claims speak of
        steps = max(run.places, default=0)
        if steps == 0:
            problems[f"{folder}: nothing was measured after step 0, left out"] += 1
            continue
        # one run a seed, method and length
        seed = run.config.get("seed")
        key = seed, method, steps
        if key in changes:
            raise ValueError(f"{folder}: a second run of {method}, {steps} steps and seed {seed}")

        # what it learned and forgot, from its base on
        base_name = Path(run.config.get("base", "")).name
        base = bases.get((folder.parent, base_name), {})
        learned = change_of(folder, run, learning, steps, base)
        forgot = change_of(folder, run, forgetting, steps, base)
        changes[key] = learned, scaled(forgot, -1)
        rank = rank_of_change(folder, steps, fraction)
        if rank is not None:
            ranks[key] = rank
    return changes, ranks


def read_bases(found):
    """{(parent folder, base's name): {metric: ((value, stderr), items)}} of the bases."""
    bases = {}
    for folder, run in found.items():
        if run.config:
            continue
        base = bases.setdefault((folder.parent, run.name), {})
        for metric, steps in run.metrics.items():
            last = max(steps)
            base[metric] = steps[last], run.items.get((metric, last), ())
    return bases


def change_of(folder, run, metric, steps, base):
    """The Change of a metric from the base to the end of a run, up where it got better.

    base: {metric: ((value, stderr), items)}. ValueError where the metric is missing."""
    measured = run.metrics.get(metric, {})
    if steps not in measured:
        there = ", ".join(sorted(run.metrics))
        raise ValueError(f"{folder}: no {metric!r} at step {steps}; there are {there}")
    if 0 not in measured and metric not in base:
        raise ValueError(f"{folder}: no {metric!r} of the base, at step 0 or in a folder beside "
                         "it; evaluate the base into a folder beside it and list it in --runs")

    # a value with no error is of the log, whose rows need not be those of eval_loss.py
    of_log = 0 in measured and measured[steps][1] is None
    if of_log or metric not in base:
        before, items_before = measured[0], ()
    else:
        before, items_before = base[metric]
    items_after = run.items.get((metric, steps), ())
    change = change_between(metric, before, measured[steps], items_before, items_after)
    return scaled(change, -1) if falls(metric) else change


def change_between(metric, before, after, items_before, items_after):
    """The Change from (value, stderr) of the base to that of a run, up where the metric rises.

    The base's own error is in the items, which are the same ones, but not in stderr: between runs
    it cancels. ValueError for other items than the base's."""
    if items_before and items_after and len(items_before) != len(items_after):
        raise ValueError(f"{metric}: {len(items_before)} items of the base, {len(items_after)} of "
                         "a run; evaluate the same ones")
    items = tuple(end - start for start, end in zip(items_before, items_after))
    return Change(after[0] - before[0], after[1], items)


def rank_of_change(folder, steps, fraction):
    """The mean effective rank of W - W0 over all matrices, of spectrum.json; None without it."""
    path = folder / "spectrum.json"
    if not path.is_file():
        return None
    content = read_json(path)
    fault = spectrum_fault(content, ("matrix", "effective_rank"))
    if fault:
        problems[f"{path}: no whole spectrum ({fault}), left out"] += 1
        return None
    # the matrices of the checkpoint at this step
    made = []
    for i, checkpoint in enumerate(content["checkpoints"]):
        if checkpoint.get("step") == steps:
            made.append(i)
    found = []
    for matrix in content["matrices"]:
        if matrix["matrix"] == "D" and matrix["checkpoint"] in made:
            found.append(matrix["effective_rank"])
    if not found:
        problems[f"{folder}: spectrum.json is not of step {steps}, left out"] += 1
        return None
    if fraction not in found[0]:
        raise ValueError(f"fraction: {path} has {', '.join(found[0])}, not {fraction!r}")
    return statistics.fmean(of_matrix[fraction] for of_matrix in found)


# ----------------------------------------------------------------------------- numbers and verdicts
def scaled(change, factor):
    """A Change times a number of size 1."""
    items = tuple(factor * item for item in change.items)
    return Change(factor * change.value, change.stderr, items)


def combine(weights, changes):
    """The Change that is their weighted sum: over the same items if all have them, else of
    independent errors."""
    value = math.fsum(weight * change.value for weight, change in zip(weights, changes))
    # item by item, where every change has its items
    n = min(len(change.items) for change in changes)
    if n > 1:
        items = []
        for values in zip(*(change.items for change in changes)):
            items.append(math.fsum(weight * value for weight, value in zip(weights, values)))
        stderr = statistics.stdev(items) / n ** 0.5
        if set(items) <= {-1, 0, 1}:  # of right and wrong, where a handful of items tells nothing
            stderr += 1 / n / 1.96
        return Change(value, stderr, tuple(items))
    # else as of independent items, where every error is known
    if all(change.stderr for change in changes):
        errors = [weight * change.stderr for weight, change in zip(weights, changes)]
        return Change(value, math.hypot(*errors))
    return Change(value)


def verdict(mean, half, least=0.0):
    """Is the value above `least`? half: half the width of its 95% interval, or None."""
    if half is None or not abs(mean - least) > half:
        return "cannot be told"
    return "holds" if mean > least else "does not hold"


def add_row(rows, what, pairs, least=0.0):
    """Add (what, numbers, verdict) of a difference that the claim says is above `least`.

    pairs [(value, stderr or None)] of the seeds; where no seed has it there is no row."""
    if not pairs:
        return
    mean, half = mean_of_seeds(pairs)
    interval = "" if half is None else f" ± {half:.3f}"
    rows.append((what, f"{mean:+.3f}{interval} (n={len(pairs)})", verdict(mean, half, least)))


def spared(points, mine):
    """How much more a method had forgotten than `mine` by the time it had learned as much.

    All are (learned, forgot), two Changes; the method's curve joins the base and its points by
    straight lines. Returns (value, standard error or None), or None where the method never learned
    as much."""
    base = tuple(Change(0.0, None, (0.0,) * len(change.items)) for change in mine)
    curve = sorted([base, *points], key=lambda point: point[LEARNED].value)
    x, y = mine
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        width = x1.value - x0.value
        if width <= 0 or not x0.value <= x.value <= x1.value:
            continue
        share = (x.value - x0.value) / width
        slope = (y1.value - y0.value) / width
        # between the two ends of this piece of the curve
        forgot = combine([1 - share, share, -1], [y0, y1, y])
        # the error of the place on the curve; the value of this sum is 0
        place = combine([slope, -slope * (1 - share), -slope * share], [x, x0, x1])
        if forgot.items and place.items:
            return forgot.value, math.hypot(forgot.stderr, place.stderr)
        return forgot.value, None  # without items the base's error is not known
    return None


# ----------------------------------------------------------------------------- the claims
def differences(ends, first, second, column):
    """[(value, stderr)] of how much more one method learned or forgot than another, one a seed.

    ends {(seed, method): (learned, forgot)}; column LEARNED or FORGOT."""
    found = []
    for (seed, method), changes in ends.items():
        if method == first and (seed, second) in ends:
            pair = [changes[column], ends[seed, second][column]]
            difference = combine([1, -1], pair)
            found.append((difference.value, difference.stderr))
    return found


def differences_at_equal_learning(changes, ends, method, lora):
    """[(value, stderr)] of how much more a method had forgotten when it had learned as much."""
    found = []
    for (seed, other), mine in ends.items():
        if other == lora:
            points = [pair for key, pair in changes.items() if key[:2] == (seed, method)]
            more = spared(points, mine)
            if more is not None:
                found.append(more)
    return found


def rows_by_rank(ends, plain, loras, column):
    """Full finetuning above each LoRA, and each LoRA above the one of the next lower rank."""
    rows = []
    for lora in loras:
        add_row(rows, f"full - {lora}", differences(ends, plain, lora, column))
    for lower, higher in zip(loras, loras[1:]):
        add_row(rows, f"{higher} - {lower}", differences(ends, higher, lower, column))
    return rows


def ratios_of_rank(ends, ranks, plain, loras):
    """[(effective rank of full finetuning's change / rank of the LoRA that learned most nearly as
    much, None)], one a seed. ranks {(seed, method): effective rank}."""
    found = []
    for (seed, method), (learned, _) in ends.items():
        # how far each LoRA of this seed is from it in learning
        distances = {}
        for lora in loras:
            if (seed, lora) in ends:
                distances[lora] = abs(ends[seed, lora][LEARNED].value - learned.value)
        if method == plain and (seed, plain) in ranks and distances:
            nearest = min(distances, key=distances.get)
            found.append((ranks[seed, plain] / nearest.rank, None))
    return found


def claims(changes, ranks):
    """[(claim, [(what, numbers, verdict)])] from what read_runs returns."""
    # the ends of the longest runs, and the methods that there are
    longest = max(steps for _, _, steps in changes)
    ends = {key[:2]: pair for key, pair in changes.items() if key[2] == longest}
    ranks = {key[:2]: rank for key, rank in ranks.items() if key[2] == longest}
    methods = sorted({method for _, method, _ in changes})
    plain = Method(0, "")
    loras = [method for method in methods if method.rank and not method.variant]
    regularised = [method for method in methods if not method.rank and method.variant]
    mlps = [method for method in methods if method.variant == "mlp"]

    # C2 and C3: curves of full finetuning against the end of each LoRA
    at_equal_learning = []
    for lora in loras:
        found = differences_at_equal_learning(changes, ends, plain, lora)
        add_row(at_equal_learning, f"full - {lora}", found)
    with_regulariser = []
    for method in regularised:
        for lora in loras:
            found = differences_at_equal_learning(changes, ends, method, lora)
            add_row(with_regulariser, f"{method} - {lora}", found)
    # C4: ranks of the changes
    of_ranks = []
    add_row(of_ranks, "effective rank / r", ratios_of_rank(ends, ranks, plain, loras), least=10.0)
    # C5: target modules, of those ranks that were trained on MLP modules alone
    over_attention = []
    over_mlp = []
    for mlp in mlps:
        attention = Method(mlp.rank, "attention")
        everything = Method(mlp.rank, "")
        found = differences(ends, mlp, attention, LEARNED)
        add_row(over_attention, f"mlp - attention, r={mlp.rank}", found)
        found = differences(ends, everything, mlp, LEARNED)
        add_row(over_mlp, f"all - mlp, r={mlp.rank}", found)

    return [
        ("C1 Full finetuning learns more than LoRA, and LoRA the more the higher its rank",
         rows_by_rank(ends, plain, loras, LEARNED)),
        ("C2 Full finetuning forgets more than LoRA, and LoRA the more the higher its rank",
         rows_by_rank(ends, plain, loras, FORGOT)),
        ("C2 At equal learning full finetuning has forgotten more than LoRA", at_equal_learning),
        ("C3 At equal learning full finetuning with a regulariser has forgotten more than LoRA",
         with_regulariser),
        ("C4 The change of full finetuning has at least 10 times the rank of a LoRA that learns as "
         "much", of_ranks),
        ("C5 MLP modules alone learn more than attention alone", over_attention),
        ("C5 All modules learn more than MLP alone (the paper: about the same)", over_mlp)]


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())

        # the runs that are named
        if not runs:
            raise ValueError("runs is not set; see --help")
        folders = []
        for pattern in runs:
            paths = [Path(path) for path in sorted(glob.glob(pattern))]
            if not paths:
                raise ValueError(f"runs: nothing is named {pattern}")
            folders += [path for path in paths if path.is_dir()]
        changes, ranks = read_runs(folders, learning, forgetting, fraction)
        if not changes:
            raise ValueError(f"runs: no finished run of train.py is named {', '.join(runs)}; "
                             "for those in a folder say FOLDER/*")

        # what they say
        longest = max(steps for _, _, steps in changes)
        seeds = {seed for seed, _, steps in changes if steps == longest}
        print(f"Learned: {learning}, forgotten: {forgetting}; {len(changes)} runs, "
              f"{len(seeds)} seeds of {longest} steps\n")
        print("| claim | | difference | |\n|---|---|---|---|")
        for claim, rows in claims(changes, ranks):
            if not rows:
                print(f"| {claim} |  |  | no such runs |")
            for row in rows:
                print(f"| {claim} | {' | '.join(row)} |")
                claim = ""  # named once
        for problem, count in problems.items():
            print(f"note: {count} {problem}")
