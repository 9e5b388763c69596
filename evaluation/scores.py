"""From values of items to a line of results.jsonl: mean, error, interval, and what was judged.

    score([1, 1, 0, 1])  ->  mean .75, standard error .25, 95% interval .3006 to .9544

    values of items  ->  out/RUN/values.jsonl    {metric, step, values}
    their score      ->  out/RUN/results.jsonl   {run, step, tokens, epoch, metric, value, stderr,
                                                  n, settings, seconds, version, time}
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
        squares = [(value - mean) ** 2 for value in values]
        variance = math.fsum(squares) / (n - 1)
        stderr = math.sqrt(variance / n)

    # 95% of a normal distribution lie within 1.96 deviations
    z = 1.96
    is_share = all(value in (0, 1) for value in values)
    if not is_share:
        low = mean - z * stderr
        high = mean + z * stderr
        return mean, stderr, low, high

    # Wilson's: the shares p that are 1.96 of their own deviations sqrt(p (1 - p) / n) from the mean
    shrink = 1 + z ** 2 / n
    centre = (mean + z ** 2 / 2 / n) / shrink
    variance = mean * (1 - mean) / n + z ** 2 / 4 / n ** 2
    half = z * math.sqrt(variance) / shrink
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return mean, stderr, low, high


def write_result(subject, metric, values, settings, seconds):
    """As write_score, for the mean of `values`, one number an item; returns it."""
    scored = score(values)
    write_score(subject, metric, scored, values, settings, seconds)
    return scored[0]


def write_mean(subject, metric, groups, settings, seconds):
    """As write_result, for the unweighted mean of the means of some lists.

    Its interval is +- 1.96 errors; the values of items are made to have this mean and error."""
    # the means of the lists are independent
    scores = [score(values) for values in groups]
    means = [scored[0] for scored in scores]
    variances = [scored[1] ** 2 for scored in scores]
    mean = sum(means) / len(groups)
    stderr = math.sqrt(sum(variances)) / len(groups)
    # an item of a small list weighs more
    total = sum(len(values) for values in groups)
    of_items = []
    for group_mean, values in zip(means, groups):
        for value in values:
            excess = value - group_mean
            of_items.append(mean + excess * total / len(groups) / len(values))
    scored = (mean, stderr, mean - 1.96 * stderr, mean + 1.96 * stderr)
    write_score(subject, metric, scored, of_items, settings, seconds)


def with_identity(subject, settings):
    """The settings as JSON holds them, with what is judged.

    Where a knob has the name of a part of its identity (model, adapter, dtype, tokenizer), the
    identity wins: the knob may say 'auto', or name a checkpoint for its base and adapter."""
    return json.loads(json.dumps({**settings, **subject.identity}))


def json_lines(path):
    """Yield the objects of a .jsonl file, none where there is no file.

    Raises ValueError for a line that holds none."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{number}: not valid JSON ({e}); delete the line") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}:{number}: holds no object; delete the line")
        yield content


def last_of(path, record):
    """The last line of a .jsonl file with a record's metric and step, which counts; {} for none."""
    last = {}
    for line in json_lines(path):
        if (line.get("metric"), line.get("step")) == (record["metric"], record["step"]):
            last = line
    return last


def write_score(subject, metric, scored, values, settings, seconds):
    """Print a metric and append it to results.jsonl, and the items' values to values.jsonl.

    scored: as score() returns it; settings: every knob; the subject's identity is added.
    Raises ValueError for values that are NaN or infinite."""
    mean, stderr, low, high = scored
    if not all(math.isfinite(number) for number in (*scored, *values)):
        raise ValueError(f"{subject.run}, step {subject.step}: {metric} is {mean}, of values that "
                         "are NaN or infinite")
    n = len(values)
    interval = f"({low:.4f} to {high:.4f} with 95%)"
    print0(f"{metric}: {mean:.4f} +- {stderr:.4f} {interval}, {n} items")
    if RANK:
        return
    settings = with_identity(subject, settings)
    record = {"run": subject.run,
              "step": subject.step,
              "tokens": subject.tokens,
              "epoch": subject.epoch,
              "metric": metric,
              "value": mean,
              "stderr": stderr,
              "n": n,
              "settings": settings}
    # two models are compared by these, item by item
    of_items = {"metric": metric, "step": subject.step, "values": list(values)}

    # what the last line says already comes from finished items that were judged again
    subject.results.parent.mkdir(parents=True, exist_ok=True)
    values_file = subject.results.with_name("values.jsonl")
    if last_of(values_file, of_items) != of_items:
        append_jsonl(values_file, of_items)
    if not record.items() <= last_of(subject.results, record).items():
        record["seconds"] = round(seconds, 3)
        record["version"] = versions()
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%S")
        append_jsonl(subject.results, record)
