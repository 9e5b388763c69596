"""
The paper's claims, one by one, over any runs: holds, does not hold, or cannot be told, with the numbers.

    python claims.py --runs='out/claims/*/*' --learning='loss target' --forgetting='loss source'     # several seeds
    python claims.py --runs='out/smollm2/*' --learning='loss gsm8k_test' --forgetting=hellaswag

A run is a folder of train.py; one seed's runs are compared with one another, and a number is the mean over seeds of their
difference, with its 95% interval (Student's t). With one seed or two the interval is that of the evaluation's items, taken as
independent; a loss has none then, and a claim with no interval cannot be told. It holds where the whole interval does. All
at the longest duration there is.
"""
import glob
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from configurator import configure
from results import falls, mean_of_seeds, problems, read_run, targets_name
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
learning = 'gsm8k_strict_match'   # metric of what was learned; 'loss NAME' is train.py's val_data
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
    changed = [name for name in ("weight_decay", "attention_dropout") if config.get(name)]
    targets = targets_name(config.get("lora_targets", "all")) if rank else "all"
    changed += [targets] if targets != "all" else []
    return Method(rank, changed[0].replace("_", " ") if changed else "") if len(changed) < 2 else None


def gain(metric, before, after):
    """(how much better the second (value, stderr) is than the first, the second's stderr): the base's cancels between runs."""
    return (before[0] - after[0] if falls(metric) else after[0] - before[0]), after[1]


def read_runs(folders):
    """{(seed, method, steps): (learned, forgot)} at each run's end, (change, stderr) both, and {the same: effective rank}.

    Raises ValueError where two runs are of one seed, method and length, or a metric is missing."""
    changes, ranks, bases = {}, {}, {}
    for run, folder in sorted(((read_run(folder), folder) for folder in folders), key=lambda pair: bool(pair[0].config)):
        if not run.config:  # a base, which comes first: its evaluations are the start of the runs beside it
            bases[folder.parent] = {metric: steps[max(steps)] for metric, steps in run.metrics.items()}
            continue
        if run.config.get("scratch") or not (method := method_of(run.config)) or not run.places:
            continue  # a pretraining, or nothing that the claims speak of
        steps = max(run.places)
        key = run.config.get("seed"), method, steps
        if key in changes:
            raise ValueError(f"{folder}: a second run of {method}, {steps} steps and seed {key[0]}")
        for metric in (learning, forgetting):
            if steps not in run.metrics.get(metric, {}):
                raise ValueError(f"{folder}: no {metric!r} at step {steps}; there are {', '.join(sorted(run.metrics))}")
            if 0 not in run.metrics[metric] and metric not in bases.get(folder.parent, {}):
                raise ValueError(f"{folder}: no {metric!r} of the base, at step 0 or in a folder beside it")
        start = {metric: run.metrics[metric].get(0) or bases[folder.parent][metric] for metric in (learning, forgetting)}
        learned, kept = (gain(metric, start[metric], run.metrics[metric][steps]) for metric in (learning, forgetting))
        changes[key] = learned, (-kept[0], kept[1])
        if (folder / "spectrum.json").is_file():
            content = json.loads((folder / "spectrum.json").read_text())
            last = len(content["checkpoints"]) - 1
            ranks[key] = statistics.fmean(m["effective_rank"][fraction] for m in content["matrices"]
                                          if m["matrix"] == "D" and m["checkpoint"] == last)
    return changes, ranks


# ----------------------------------------------------------------------------- numbers and verdicts
def verdict(mean, half, least=0.0):
    """Is the value above `least`?"""
    if half is None or abs(mean - least) <= half:
        return "cannot be told"
    return "holds" if mean > least else "does not hold"


def line(what, pairs, least=0.0):
    """(what, numbers, verdict) of a difference that the claim says is above `least`; None where no seed has it."""
    if not (pairs := [pair for pair in pairs if pair]):
        return None
    mean, half = mean_of_seeds(pairs)
    return what, f"{mean:+.3f}" + (f" ± {half:.3f}" if half is not None else "") + f" (n={len(pairs)})", verdict(mean, half, least)


def minus(a, b):
    """a - b of (value, stderr) pairs."""
    return a[0] - b[0], math.hypot(a[1], b[1]) if a[1] and b[1] else None


def forgot_at(points, learned):
    """What the runs of one method and seed had forgotten when they had learned so much: on a line through (0, 0) and
    their [(learned, forgot)]; None beyond the last."""
    points = sorted([(0.0, 0.0), *points])
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= learned <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (learned - x0) / (x1 - x0)
    return None


# ----------------------------------------------------------------------------- the claims
def claims(changes, ranks):
    """[(claim, [(what, numbers, verdict)])] from what read_runs returns."""
    seeds, methods = sorted({k[0] for k in changes}, key=str), sorted({k[1] for k in changes})
    longest = max(k[2] for k in changes)
    loras = [m for m in methods if m.rank and not m.variant]
    plain = Method(0, "")
    at = lambda seed, method, column: changes[seed, method, longest][column] if (seed, method, longest) in changes else None
    over = lambda a, b, column: [minus(at(s, a, column), at(s, b, column)) for s in seeds if at(s, a, column) and at(s, b, column)]
    curve = lambda seed, method: [(c[0][0], c[1][0]) for k, c in changes.items() if k[:2] == (seed, method)]

    def spared(seed, lora, method):
        """What `method` forgot more than LoRA by the time it had learned what LoRA learned."""
        if not (mine := at(seed, lora, 0)) or (theirs := forgot_at(curve(seed, method), mine[0])) is None:
            return None
        return theirs - at(seed, lora, 1)[0], None

    def by_rank(column):
        steps = zip(loras, loras[1:])
        return [*(line(f"full - {m}", over(plain, m, column)) for m in loras),
                *(line(f"{b} - {a}", over(b, a, column)) for a, b in steps)]

    regularised = [m for m in methods if not m.rank and m.variant]
    nearest = []  # (effective rank of full's change) / (rank of the LoRA run that learned most nearly as much), by seed
    for s in seeds:
        if (s, plain, longest) in ranks and any(at(s, m, 0) for m in loras):
            close = min((m for m in loras if at(s, m, 0)), key=lambda m: abs(at(s, m, 0)[0] - at(s, plain, 0)[0]))
            nearest.append((ranks[s, plain, longest] / close.rank, None))
    found = [
        ("C1 Full finetuning learns more than LoRA, and LoRA the more the higher its rank", by_rank(0)),
        ("C2 Full finetuning forgets more than LoRA, and LoRA the more the higher its rank", by_rank(1)),
        ("C2 At equal learning full finetuning has forgotten more than LoRA",
         [line(f"full - {m}", [spared(s, m, plain) for s in seeds]) for m in loras]),
        ("C3 At equal learning full finetuning with a regulariser has forgotten more than LoRA",
         [line(f"{r} - {m}", [spared(s, m, r) for s in seeds]) for r in regularised for m in loras]),
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
        folders = [path for pattern in runs for path in sorted(map(Path, glob.glob(pattern))) if path.is_dir()]
        changes, ranks = read_runs(folders)
        if not changes:
            raise ValueError("runs: no finished run of train.py in " + (", ".join(runs) or "nothing"))
        print(f"Learned: {learning}, forgotten: {forgetting}; {len(changes)} runs, seeds {len({k[0] for k in changes})}\n")
        print("| claim | | difference | |\n|---|---|---|---|")
        for claim, rows in claims(changes, ranks):
            for i, row in enumerate(rows or [("", "", "no such runs")]):
                print(f"| {claim if not i else ''} | {' | '.join(row)} |")
        for problem, count in problems.items():
            print(f"note: {count} {problem}")
