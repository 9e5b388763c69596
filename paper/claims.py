"""
The paper's claims, one by one, over any runs: holds, does not hold, or cannot be told, with the numbers.

    python -m paper.claims --runs='out/claims/*/*' --learning='loss target' --forgetting='loss source'     # several seeds
    python -m paper.claims --runs='out/smollm2/*' --learning='loss gsm8k_test' --forgetting=hellaswag

A run is a folder of train.py; one seed's runs are compared with one another, and a number is the mean over seeds of their
difference, with its 95% interval (Student's t). With one seed or two the interval is that of the evaluation's items, the same
ones in both runs, so of their differences (values.jsonl; without it the errors of the two are taken as independent); it says
nothing about other seeds. A loss from train.py's log has no items, and a claim with no interval cannot be told. It holds where
the whole interval does. What a run began with is its base's folder beside it, or step 0 of its log for what train.py logged.
All at the longest duration.
"""
import glob
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from configurator import configure
from paper.results import falls, mean_of_seeds, problems, read_run, regularised, targets_name
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
learning = 'gsm8k_strict_match'   # metric of what was learned; 'loss NAME' is of eval_loss.py or train.py's val_data
forgetting = 'forgetting'         # and of what was forgotten
fraction = '0.9'         # of the squares, for the effective rank in spectrum.json


class Method(NamedTuple):
    """What is compared: full finetuning (rank 0) or LoRA, and what sets it apart from the plain form."""
    rank: int
    variant: str  # '' | 'weight decay' | 'attention dropout' | 'attention' | 'mlp'

    def __str__(self):
        return (f"LoRA r={self.rank}" if self.rank else "full") + (f", {self.variant}" if self.variant else "")


# ----------------------------------------------------------------------------- reading
def method_of(config):
    """The Method of a run's knobs; None for what the claims do not speak of."""
    rank = config.get("lora_rank") or 0
    changed = regularised(config)
    targets = targets_name(config.get("lora_targets", "all")) if rank else "all"
    changed += [targets] if targets != "all" else []
    return Method(rank, changed[0].replace("_", " ") if changed else "") if len(changed) < 2 else None


class Change(NamedTuple):
    """How much better or worse than the base, with its standard error and its items' values, where known."""
    value: float
    stderr: float | None = None
    items: tuple = ()


def change(metric, before, after, items_before, items_after):
    """The Change from (value, stderr) of the base to that of a run, up where the metric rises. The base's own error is in the
    items, which are the same ones, but not in stderr: between runs it cancels. ValueError for other items than the base's."""
    if items_before and items_after and len(items_before) != len(items_after):
        raise ValueError(f"{metric}: {len(items_before)} items of the base, {len(items_after)} of a run; evaluate the same ones")
    return Change(after[0] - before[0], after[1], tuple(b - a for a, b in zip(items_before, items_after)))


def combine(weights, changes):
    """The Change that is their weighted sum: over the same items if all have them, else of independent errors."""
    value = math.fsum(w * c.value for w, c in zip(weights, changes))
    if (n := min(len(c.items) for c in changes)) > 1:
        items = tuple(math.fsum(w * x for w, x in zip(weights, values)) for values in zip(*(c.items for c in changes)))
        discrete = 1 / n / 1.96 if set(items) <= {-1, 0, 1} else 0  # of right and wrong: a handful of items tells nothing
        return Change(value, statistics.stdev(items) / n ** 0.5 + discrete, items)
    known = all(c.stderr for c in changes)
    return Change(value, math.hypot(*(w * c.stderr for w, c in zip(weights, changes))) if known else None)


def read_runs(folders):
    """{(seed, method, steps): (learned, forgot)} at each run's end, both a Change, and {the same: effective rank}.

    Raises ValueError where two runs are of one seed, method and length, or a metric is missing."""
    changes, ranks, bases = {}, {}, {}
    for run, folder in sorted(((read_run(folder), folder) for folder in folders), key=lambda pair: bool(pair[0].config)):
        if not run.config:  # a base, which comes first: its evaluations are the start of the runs beside it
            found = {metric: (steps[max(steps)], run.items.get((metric, max(steps)), ()))
                     for metric, steps in run.metrics.items()}
            bases.setdefault((folder.parent, run.name), {}).update(found)
            continue
        if run.config.get("scratch") or not (method := method_of(run.config)):
            continue  # a pretraining, or nothing that the claims speak of
        if not (steps := max(run.places, default=0)):
            problems[f"{folder}: nothing was measured after step 0, left out"] += 1
            continue
        key = run.config.get("seed"), method, steps
        beside = bases.get((folder.parent, Path(run.config.get("base", "")).name), {})
        if key in changes:
            raise ValueError(f"{folder}: a second run of {method}, {steps} steps and seed {key[0]}")
        for metric in (learning, forgetting):
            if steps not in run.metrics.get(metric, {}):
                raise ValueError(f"{folder}: no {metric!r} at step {steps}; there are {', '.join(sorted(run.metrics))}")
            if 0 not in run.metrics[metric] and metric not in beside:
                raise ValueError(f"{folder}: no {metric!r} of the base, at step 0 or in a folder beside it")
        both = []
        for metric, better in ((learning, 1), (forgetting, -1)):
            first, items = run.metrics[metric].get(0), run.items.get((metric, steps), ())
            in_log = first and run.metrics[metric][steps][1] is None  # whose rows need not be those of eval_loss.py
            before, items_before = (first, ()) if in_log else beside.get(metric, (first, ()))
            rise = change(metric, before, run.metrics[metric][steps], items_before, items)
            sign = -better if falls(metric) else better
            both.append(rise._replace(value=sign * rise.value, items=tuple(sign * x for x in rise.items)))
        changes[key] = tuple(both)
        if (folder / "spectrum.json").is_file():
            content = json.loads((folder / "spectrum.json").read_text())
            taken = [m["effective_rank"] for i, made in enumerate(content["checkpoints"]) if made["step"] == steps
                     for m in content["matrices"] if m["matrix"] == "D" and m["checkpoint"] == i]
            if taken and fraction not in taken[0]:
                raise ValueError(f"fraction: {folder}/spectrum.json has {', '.join(taken[0])}, not {fraction!r}")
            if taken:
                ranks[key] = statistics.fmean(found[fraction] for found in taken)
            else:
                problems[f"{folder}: spectrum.json is not of step {steps}, left out"] += 1
    return changes, ranks


# ----------------------------------------------------------------------------- numbers and verdicts
def verdict(mean, half, least=0.0):
    """Is the value above `least`?"""
    if half is None or not abs(mean - least) > half:
        return "cannot be told"
    return "holds" if mean > least else "does not hold"


def line(what, pairs, least=0.0):
    """(what, numbers, verdict) of a difference that the claim says is above `least`; None where no seed has it."""
    if not (pairs := [pair for pair in pairs if pair]):
        return None
    mean, half = mean_of_seeds(pairs)
    numbers = f"{mean:+.3f}" + (f" ± {half:.3f}" if half is not None else "") + f" (n={len(pairs)})"
    return what, numbers, verdict(mean, half, least)


def spared(points, mine):
    """(how much more a method had forgotten than `mine` by the time it had learned as much, standard error or None), on lines
    through the base and its points; all are (learned, forgot), two Changes. None where it never learned as much."""
    base = tuple(Change(0.0, None, (0.0,) * len(c.items)) for c in mine)
    points, x = sorted([base, *points], key=lambda point: point[0].value), mine[0].value
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0.value <= x <= x1.value and x1.value > x0.value:
            share, slope = (x - x0.value) / (x1.value - x0.value), (y1.value - y0.value) / (x1.value - x0.value)
            forgot = combine([1 - share, share, -1], [y0, y1, mine[1]])
            place = combine([slope, -slope * (1 - share), -slope * share], [mine[0], x0, x1])  # its sum is 0, its error is not
            known = forgot.items and place.items  # without them the base's error is not known
            return forgot.value, math.hypot(forgot.stderr, place.stderr) if known else None
    return None


# ----------------------------------------------------------------------------- the claims
def claims(changes, ranks):
    """[(claim, [(what, numbers, verdict)])] from what read_runs returns."""
    seeds, methods = sorted({k[0] for k in changes}, key=str), sorted({k[1] for k in changes})
    longest = max(k[2] for k in changes)
    loras = [m for m in methods if m.rank and not m.variant]
    plain = Method(0, "")
    at = lambda seed, method: changes.get((seed, method, longest))
    over = lambda a, b, column: [combine([1, -1], [at(s, a)[column], at(s, b)[column]])[:2]
                                 for s in seeds if at(s, a) and at(s, b)]
    points = lambda seed, method: [both for key, both in changes.items() if key[:2] == (seed, method)]
    at_equal_learning = lambda method, lora: [spared(points(s, method), at(s, lora)) for s in seeds if at(s, lora)]

    def by_rank(column):
        steps = zip(loras, loras[1:])
        return [*(line(f"full - {m}", over(plain, m, column)) for m in loras),
                *(line(f"{b} - {a}", over(b, a, column)) for a, b in steps)]

    regularised = [m for m in methods if not m.rank and m.variant]
    nearest = []  # (effective rank of full's change) / (rank of the LoRA run that learned most nearly as much), by seed
    for s in seeds:
        if (s, plain, longest) in ranks and any(at(s, m) for m in loras):
            close = min((m for m in loras if at(s, m)), key=lambda m: abs(at(s, m)[0].value - at(s, plain)[0].value))
            nearest.append((ranks[s, plain, longest] / close.rank, None))
    found = [
        ("C1 Full finetuning learns more than LoRA, and LoRA the more the higher its rank", by_rank(0)),
        ("C2 Full finetuning forgets more than LoRA, and LoRA the more the higher its rank", by_rank(1)),
        ("C2 At equal learning full finetuning has forgotten more than LoRA",
         [line(f"full - {m}", at_equal_learning(plain, m)) for m in loras]),
        ("C3 At equal learning full finetuning with a regulariser has forgotten more than LoRA",
         [line(f"{r} - {m}", at_equal_learning(r, m)) for r in regularised for m in loras]),
        ("C4 The change of full finetuning has at least 10 times the rank of a LoRA that learns as much",
         [line("effective rank / r", nearest, 10.0)]),
        ("C5 MLP modules alone learn more than attention alone",
         [line(f"mlp - attention, r={m.rank}", over(m, Method(m.rank, "attention"), 0)) for m in methods if m.variant == "mlp"]),
        ("C5 All modules learn more than MLP alone (the paper: about the same)",
         [line(f"all - mlp, r={m.rank}", over(Method(m.rank, ""), m, 0)) for m in methods if m.variant == "mlp"])]
    return [(claim, [row for row in rows if row]) for claim, rows in found]


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        if not runs:
            raise ValueError("runs is not set; see --help")
        if unmatched := [pattern for pattern in runs if not glob.glob(pattern)]:
            raise ValueError(f"runs: nothing is named {', '.join(unmatched)}")
        folders = [path for pattern in runs for path in sorted(map(Path, glob.glob(pattern))) if path.is_dir()]
        changes, ranks = read_runs(folders)
        if not changes:
            raise ValueError(f"runs: no finished run of train.py is named {', '.join(runs)}; for those in a folder say FOLDER/*")
        longest = max(steps for _, _, steps in changes)
        seeds = {seed for seed, _, steps in changes if steps == longest}
        print(f"Learned: {learning}, forgotten: {forgetting}; {len(changes)} runs, {len(seeds)} seeds of {longest} steps\n")
        print("| claim | | difference | |\n|---|---|---|---|")
        for claim, rows in claims(changes, ranks):
            for i, row in enumerate(rows or [("", "", "no such runs")]):
                print(f"| {claim if not i else ''} | {' | '.join(row)} |")
        for problem, count in problems.items():
            print(f"note: {count} {problem}")
