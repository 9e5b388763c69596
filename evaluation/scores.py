"""From values of items to a line of results.jsonl: mean, error, interval, and what was judged.

    score([1, 1, 0, 1])  ->  mean .75, standard error .25, 95% interval .3006 to .9544

    values of items  ->  out/RUN/values.jsonl    {metric, step, values}
    their score      ->  out/RUN/results.jsonl   {run, step, tokens, epoch, metric, value, stderr, n,
                                                  settings, seconds, version, time}
"""
import json
import math
import time

from runtime import RANK, append_jsonl, print0, versions


def score(values):
    """(mean, standard error, low, high) of per-item values; low and high are the 95% interval.

    The error is lm-eval's (sample deviation / sqrt n). Where all values are 0 or 1 the interval is
    Wilson's (1927), which holds near 0 and 1 as well; else it is mean +- 1.96 errors.
    Raises ValueError without values."""
    n = len(values)
    if n == 0:
        raise ValueError("no items were evaluated")
    mean = math.fsum(values) / n

    # of the mean: the sample's deviation, with n - 1 below it, over sqrt(n)
    stderr = 0.0
    if n > 1:
        squares = math.fsum((v - mean) ** 2 for v in values)
        stderr = math.sqrt(squares / (n - 1) / n)

    # 95% of a normal distribution lie within 1.96 deviations
    z = 1.96
    if not all(v in (0, 1) for v in values):
        return mean, stderr, mean - z * stderr, mean + z * stderr

    # Wilson's: the shares p of which the mean is 1.96 deviations sqrt(p (1 - p) / n) away
    shrink = 1 + z ** 2 / n
    centre = (mean + z ** 2 / 2 / n) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / n + z ** 2 / 4 / n ** 2)
    return mean, stderr, max(0.0, centre - half), min(1.0, centre + half)


def write_result(subject, metric, values, settings, seconds):
    """As write_score, for the mean of `values`, one number an item; returns it."""
    scored = score(values)
    write_score(subject, metric, scored, values, settings, seconds)
    return scored[0]


def with_identity(subject, settings):
    """The settings as JSON holds them, with what is judged.

    Where a knob has the name of a part of the subject's identity (model, adapter, dtype, tokenizer),
    the identity wins: the knob may say 'auto', or name a checkpoint for its base and adapter."""
    return json.loads(json.dumps({**settings, **subject.identity}))


def json_lines(path):
    """The objects of a .jsonl file, none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_score(subject, metric, scored, values, settings, seconds):
    """Print a metric and append it to results.jsonl, and the items' values to values.jsonl.

    scored: as score() returns it; settings: every knob, to which the subject's identity is added."""
    mean, stderr, low, high = scored
    print0(f"{metric}: {mean:.4f} +- {stderr:.4f} ({low:.4f} to {high:.4f} with 95%), "
           f"{len(values)} items")
    if RANK:
        return
    record = {"run": subject.run, "step": subject.step, "tokens": subject.tokens,
              "epoch": subject.epoch, "metric": metric, "value": mean, "stderr": stderr,
              "n": len(values), "settings": with_identity(subject, settings)}
    per_item = {"metric": metric, "step": subject.step, "values": list(values)}

    subject.results.parent.mkdir(parents=True, exist_ok=True)
    # a line that is there already comes from finished items that were judged again
    is_new = not any(record.items() <= line.items() for line in json_lines(subject.results))
    values_path = subject.results.with_name("values.jsonl")
    if is_new or per_item not in json_lines(values_path):
        append_jsonl(values_path, per_item)
    if is_new:
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        append_jsonl(subject.results, {**record, "seconds": round(seconds, 3),
                                       "version": versions(), "time": now})
