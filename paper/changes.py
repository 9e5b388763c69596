"""What runs learned and forgot, from their base on: for paper/claims.py, families.py and why.py.

    base   loss on the new task 3.4    held-out source 3.3
    run                         1.1                    3.9     learned 2.3, forgot 0.6: two Changes

A Change has the values of the evaluation's items where they are known, so that two runs are
compared item by item. A base is a folder beside its runs, or step 0 of their logs.
"""
import glob
import math
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from paper.results import KNOBS, Run, falls, problems, read_run


class Change(NamedTuple):
    """How much better or worse than the base, with its standard error and its items, if known."""
    value: float
    stderr: float | None = None
    items: tuple = ()


# ----------------------------------------------------------------------------- reading
def folders_of(patterns):
    """The run folders that are named, also by globs; ValueError where there are none."""
    if not patterns:
        raise ValueError("runs is not set; see --help")
    folders = []
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern))]
        if not paths:
            raise ValueError(f"runs: nothing is named {pattern}")
        folders += [path for path in paths if path.is_dir()]
    return folders


class Measured(NamedTuple):
    """A run at its end."""
    folder: Path
    run: Run
    steps: int
    learned: Change
    forgot: Change

    @property
    def seed(self):
        return self.run.config.get("seed")

    @property
    def rate(self):
        return float(self.run.config.get("learning_rate", KNOBS["learning_rate"]))


def measure_runs(folders, learning, forgetting):
    """[Measured] of the finetuning runs among the folders; ValueError where a metric is missing."""
    found = {folder: read_run(folder) for folder in folders}
    bases = read_bases(found)
    measured = []
    for folder, run in found.items():
        if not run.config or run.config.get("scratch"):
            continue  # a base, or a pretraining
        steps = max(run.places, default=0)
        if steps == 0:
            problems[f"{folder}: nothing was measured after step 0, left out"] += 1
            continue
        asked = run.config.get("max_steps", 0)
        if steps < asked:
            problems[f"{folder}: measured at step {steps} of {asked}, left out"] += 1
            continue
        # what it learned and forgot, from its base on
        base = base_of(folder, run, bases)
        learned = change_of(folder, run, learning, steps, base)
        forgot = change_of(folder, run, forgetting, steps, base)
        measured.append(Measured(folder, run, steps, learned, scaled(forgot, -1)))
    return measured


def read_bases(found):
    """{(parent folder, name): {path: {metric: ((value, stderr), items)}}} of the bases."""
    bases = {}
    for folder, run in found.items():
        if run.config:
            continue
        path = os.path.normpath(run.judged or folder)
        base = bases.setdefault((folder.parent, run.name), {}).setdefault(path, {})
        for metric, steps in run.metrics.items():
            last = max(steps)
            base[metric] = steps[last], run.items.get((metric, last), ())
    return bases


def base_of(folder, run, bases):
    """{metric: ((value, stderr), items)} of a run's base, as read_bases has it; {} for none.

    Bases of one name (.../step_700) are told apart by their paths; a base that was moved is known
    by its name. Raises ValueError where that leaves several."""
    path = os.path.normpath(run.config.get("base", ""))
    of_name = bases.get((folder.parent, Path(path).name), {})
    if path in of_name:
        return of_name[path]
    if len(of_name) > 1:
        raise ValueError(f"{folder}: its base is {path}; evaluated beside it are "
                         f"{' and '.join(sorted(of_name))}")
    return next(iter(of_name.values()), {})


def change_of(folder, run, metric, steps, base):
    """The Change of a metric from the base to the end of a run, up where it got better.

    base: {metric: ((value, stderr), items)}. ValueError where the metric is missing."""
    measured = run.metrics.get(metric, {})
    if measured and steps not in measured:
        raise ValueError(f"{folder}: {metric!r} was measured at step {max(measured)}, not at the "
                         f"last, {steps}; evaluate that checkpoint too")
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


# ----------------------------------------------------------------------------- arithmetic
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


def spared(lines, mine):
    """How much more a method had forgotten than `mine` by the time it had learned as much.

    All are (learned, forgot), two Changes. lines: a method's points in an order that joins them, by
    length or by learning rate; each line begins at the base. Returns (value, standard error or
    None) of the place where it had forgotten least, None where the method never learned as much."""
    base = tuple(Change(0.0, None, (0.0,) * len(change.items)) for change in mine)
    found = []
    for line in lines:
        points = [base, *line]
        for start, end in zip(points, points[1:]):
            more = spared_on(start, end, mine)
            if more is not None:
                found.append(more)
    return min(found, key=lambda more: more[0], default=None)


def spared_on(start, end, mine):
    """spared on the straight line between two points; None where it does not pass `mine`."""
    (x0, y0), (x1, y1), (x, y) = start, end, mine
    width = x1.value - x0.value
    if width == 0:
        return None
    share = (x.value - x0.value) / width
    if not 0 <= share <= 1:
        return None
    slope = (y1.value - y0.value) / width
    forgot = combine([1 - share, share, -1], [y0, y1, y])
    # the error of the place on the line; the value of this sum is 0
    place = combine([slope, -slope * (1 - share), -slope * share], [x, x0, x1])
    if forgot.items and place.items:
        return forgot.value, math.hypot(forgot.stderr, place.stderr)
    return forgot.value, None  # without items the base's error is not known
