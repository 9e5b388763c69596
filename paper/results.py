"""What runs left behind, for paper/plot.py and paper/claims.py: values as points with intervals.

    out/r16-s1   seed 1, 10 steps   gsm8k .21 --.
    out/r16-s2   seed 2, 10 steps   gsm8k .19 --+--> Point(rank=16, step 10, gsm8k .20 +- .02)
    out/r16-s3   seed 3, 10 steps   gsm8k .20 --'

Runs of one setting differ only in their seed and in how long they trained. The seeds of one length
become one Point, the lengths of one setting become a curve.
"""
import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

import train
from configurator import default_values
from training.checkpoint import checkpoints

# Every knob of train.py makes a setting, but for those that only say how, where and how long a run
# trains. So a new knob sets runs apart, and a run from before it counts as having its default.
KNOBS = default_values(vars(train))
NO_SETTING = train._free | {"seed", "microbatch", "compile", "warmup_steps", "cooldown_steps"}
# which mean nothing in full finetuning
LORA_KNOBS = {"lora_dropout", "rslora", "dora", "lora_init", "lora_plus"}
# fields of Setting
FIELDS = {"base", "data", "lora_rank", "lora_alpha", "lora_targets"}
SETTING = sorted(KNOBS.keys() - NO_SETTING - FIELDS)

# The regularisers of figure 4 and from where on they count: code CPT's weight decay, 1e-6, is none.
REGULARISERS = {"weight_decay": 1e-5, "attention_dropout": 1e-9}

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}

# Student's t for a two-sided 95% interval, by degrees of freedom
T_975 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

problems = Counter()  # what could not be read: printed at the end, and no reason to stop


# ----------------------------------------------------------------------------- reading
def number(value):
    """A finite float, else None and a note."""
    if is_number(value):
        return float(value)
    if value is not None:
        problems["values that are no finite numbers"] += 1
    return None


def read_jsonl(path):
    """The objects of a .jsonl file; lines that are none, or were cut short, are counted."""
    if not path.is_file():
        return []
    if not path.stat().st_size:
        problems[f"empty files, such as {path}"] += 1
    objects = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            problems[f"lines that are not JSON, as in {path}"] += 1
            continue
        if isinstance(content, dict):
            objects.append(of_types(content, OF_LINE, path))
    return objects


def read_json(path):
    """The object in a .json file, {} with a note if there is none."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        problems[f"{path}: {type(error).__name__}, left out"] += 1
        return {}
    return content if isinstance(content, dict) else {}


def is_number(value):
    """Whether a value of parsed JSON is a finite number."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) < 1e300


# what is used of the lines of log.jsonl, results.jsonl and values.jsonl, and of a run's knobs
OF_LINE = {"step": int, "tokens": int, "epoch": float, "metric": str}
OF_CONFIG = {"base": str, "data": str, "lora_rank": int, "lora_alpha": float, "seed": float,
             "weight_decay": float, "attention_dropout": float}


def of_types(content, kinds, path):
    """An object of a file without null and the values of a wrong type, which are counted."""
    kept = {}
    for name, value in content.items():
        kind = kinds.get(name)
        if kind is None or is_of_kind(value, kind):
            kept[name] = value
        elif value is not None:
            problems[f"{path}: values of a wrong type, such as {name}"] += 1
    return kept


# what a matrix of spectrum.json has: numbers (float), a list or an object of numbers, text
OF_MATRIX = {"matrix": str, "module": str, "layer": float, "norm": float, "shape": list,
             "singular_values": list, "effective_rank": dict}
OF_ANGLES = ("overlap_out", "overlap_in", "random_out", "change_out")


def spectrum_fault(content, fields=tuple(OF_MATRIX)):
    """What is wrong with the parsed spectrum.json, of the fields that are used; '' = nothing."""
    made = content.get("checkpoints")
    matrices = content.get("matrices")
    if not isinstance(made, list) or not isinstance(matrices, list) or not made or not matrices:
        return "no list of checkpoints, or of matrices"
    for i, checkpoint in enumerate(made):
        if not isinstance(checkpoint, dict):
            return f"checkpoint {i} is no object"
        if "norm" in fields and not {"lora_rank", "folder"} <= checkpoint.keys():
            return f"checkpoint {i}: no lora_rank, or no folder"
        for name in ("step", "tokens", "lora_rank"):
            value = checkpoint.get(name)
            if value is not None and (not is_number(value) or value < 0):
                return f"checkpoint {i}: {name} is {str(value)[:40]!r}"
        if not isinstance(checkpoint.get("folder", ""), str):
            return f"checkpoint {i}: its folder is no text"
    for i, matrix in enumerate(matrices):
        if not isinstance(matrix, dict):
            return f"matrix {i} is no object"
        which = matrix.get("checkpoint")
        is_base = which is None and matrix.get("matrix") == "W0"
        if not is_base and (type(which) is not int or not 0 <= which < len(made)):
            return f"matrix {i}: checkpoint is {str(which)[:40]!r}"
        wanted = {name: OF_MATRIX[name] for name in fields}
        if "norm" in fields and matrix.get("matrix") == "D":
            wanted["random_rank"] = dict
        # directions are compared only where they were asked for
        wanted.update((name, dict) for name in OF_ANGLES if matrix.get(name) is not None)
        for name, kind in wanted.items():
            if not is_of_kind(matrix.get(name), kind):
                return f"matrix {i}: {name} is {str(matrix.get(name))[:40]!r}"
        if matrix["effective_rank"].keys() != matrices[0]["effective_rank"].keys():
            return f"matrix {i}: other shares in its effective_rank than the first has"
    return ""


def is_of_kind(value, kind):
    """Whether value is what OF_MATRIX, OF_LINE or OF_CONFIG says."""
    if kind is float:
        return is_number(value)
    if kind is int:
        return type(value) is int and 0 <= value < 1e18
    if not isinstance(value, kind):
        return False
    if kind is dict:
        value = list(value.values())
    return kind is str or all(is_number(each) for each in value)


def by_step(lines):
    """The lines of a log by step, training and validation apart; the last one of a step counts."""
    kept = {}
    for line in lines:
        if isinstance(line.get("step"), int):
            kept[line["step"], "val" in line] = line
    return [kept[key] for key in sorted(kept)]


def read_config(folder):
    """The knobs that a run was trained with; {} for a folder that train.py did not make."""
    path = folder / "config.json"
    config = read_json(path).get("config") if path.is_file() else {}
    if not isinstance(config, dict):
        return {}
    config = of_types(config, OF_CONFIG, path)
    # a run that started from an adapter has the adapter's rank
    if config.get("adapter") and not config.get("lora_rank"):
        made = sorted(folder.glob("step_*/adapter_config.json"))
        if made:
            adapter = read_json(made[0])
            of_adapter = {"lora_rank": adapter.get("r"), "lora_alpha": adapter.get("lora_alpha")}
            config |= of_types(of_adapter, OF_CONFIG, made[0])
    return config


def trained_numbers(folder):
    """How many numbers the adapter of a run's newest checkpoint holds; 0 without an adapter."""
    found = checkpoints(folder)
    path = found[-1][1] / "adapter_model.safetensors" if found else None
    if path is None or not path.is_file():
        return 0
    numbers = 0
    with safe_open(path, "numpy") as file:
        for name in file.keys():
            numbers += math.prod(file.get_slice(name).get_shape())
    return numbers


class Run(NamedTuple):
    """One folder: what was trained, and what was measured."""
    name: str
    config: dict   # {} = a base that was only evaluated
    metrics: dict  # {metric: {step: (value, stderr or None)}}
    log: list      # the lines of log.jsonl
    places: dict   # {step: {"step", "tokens", "epoch"}} of the steps with a metric
    items: dict    # {(metric, step): the values of the evaluation's items}
    judged: str    # the model folder that was evaluated, of a base; '' = not known


def read_run(folder):
    """The Run of a folder.

    The validation losses of its log are metrics 'loss NAME', where eval_loss.py measured none."""
    folder = Path(folder)
    config = read_config(folder)
    log = by_step(read_jsonl(folder / "log.jsonl"))
    results = read_jsonl(folder / "results.jsonl")

    # all that was measured; where two are of one metric and step, the later one counts
    measured = []
    for line in log:
        losses = line.get("val")
        if isinstance(losses, dict):
            for name, loss in losses.items():
                measured.append((line, f"loss {name}", loss, None))
    for line in results:
        if line.get("metric"):
            measured.append((line, line["metric"], line.get("value"), line.get("stderr")))

    # by metric and step; a place is what is known of a step from all of its lines
    metrics = defaultdict(dict)
    places = {}
    epochs_a_step = epochs_of_step(log)
    for line, metric, value, stderr in measured:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        value = number(value)
        if value is None:
            continue
        metrics[metric][step] = value, number(stderr)
        before = places.get(step, {})
        tokens = line.get("tokens") or before.get("tokens")
        epoch = line.get("epoch") or epochs_a_step * step or before.get("epoch")
        places[step] = {"step": step, "tokens": tokens, "epoch": epoch}

    # the values of the single items, which eval_*.py keeps apart
    items = {}
    for line in read_jsonl(folder / "values.jsonl"):
        # one that is no number would spoil every interval
        values = line.get("values") or []
        if isinstance(values, list) and None not in [number(value) for value in values]:
            items[line.get("metric"), line.get("step")] = values
    judged = "" if config else judged_model(results)
    name = Path(judged).name if judged else folder.name
    return Run(name, config, dict(metrics), log, places, items, judged)


def epochs_of_step(log):
    """How much of an epoch one step is, by the first line that has both; 0 = not known."""
    for line in log:
        if line.get("epoch") and line.get("step"):
            return line["epoch"] / line["step"]
    return 0


def judged_model(results):
    """The model folder that results are of, whose name its runs know it by; '' for none."""
    model = ""
    for line in results:
        judged = line.get("settings")
        if not isinstance(judged, dict) or judged.get("adapter"):
            continue
        if judged.get("model") and isinstance(judged["model"], str):
            model = judged["model"]
    return model


def is_base(run, all_runs):
    """Whether a run is of a model that was only evaluated, and that the others began with."""
    if run.config:
        return False
    begun_with = {Path(other.config["base"]).name for other in all_runs if other.config.get("base")}
    return run.name in begun_with if begun_with else bool(run.judged)


# ----------------------------------------------------------------------------- runs become points
class Setting(NamedTuple):
    """What the seeds and the lengths of one series share."""
    dataset: str
    base: str
    rank: int      # 0 = full finetuning
    alpha: float
    targets: str
    other: tuple   # the knobs of SETTING, sorted pairs of str


class Point(NamedTuple):
    """One setting at one length, over its seeds."""
    dataset: str
    base: str
    rank: int
    alpha: float
    targets: str
    other: tuple
    place: dict    # step, tokens, epoch
    last: bool     # the end of its runs, where the learning rate had come down
    values: dict   # {metric: (mean, half width of its 95% interval or None)}

    @property
    def setting(self):
        return Setting(*self[:6])


def targets_name(targets):
    """'attention', 'mlp' or 'all' for lora_targets that spell them out; others as they stand."""
    names = {name.strip() for name in str(targets).split(",")}
    if names == ATTENTION:
        return "attention"
    if names == MLP:
        return "mlp"
    if names == ATTENTION | MLP:
        return "all"
    return str(targets)


def regularised(config):
    """The names of the paper's regularisers that the knobs switch on."""
    return [name for name, least in REGULARISERS.items() if float(config.get(name) or 0) >= least]


def setting_of(run):
    """The Setting of a Run. A knob that an older run does not know counts as train.py's default."""
    # what was trained on what; LoRA has more to it
    config = run.config
    base = Path(config["base"]).name if config.get("base") else run.name
    dataset = Path(config.get("data", "")).name
    rank = config.get("lora_rank") or 0
    alpha = 0
    targets = "all"
    if rank:
        alpha = config.get("lora_alpha") or 2 * rank
        targets = targets_name(config.get("lora_targets", "all"))

    # the other knobs, as text, so that settings can be compared and sorted
    other = []
    for knob in SETTING:
        if rank or knob not in LORA_KNOBS:
            other.append((knob, str(config.get(knob, KNOBS[knob]))))
    return Setting(dataset, base, rank, alpha, targets, tuple(other))


def mean_of_seeds(pairs):
    """(mean, half width of its 95% interval or None) of the (value, stderr) of each seed.

    From three seeds on it is Student's interval, below that of the evaluation's items."""
    # a missing error, or one of 0, is not known
    values = [value for value, _ in pairs]
    errors = [stderr for _, stderr in pairs if stderr]
    n = len(values)
    mean = statistics.fmean(values)
    if n > 2:
        t = T_975.get(n - 1, 1.96 + 2.6 / (n - 1))
        return mean, t * statistics.stdev(values) / n ** 0.5
    if len(errors) < n:
        return mean, None
    # not / sqrt(n): the seeds are evaluated on the same items, so they are not independent
    return mean, 1.96 * sum(errors) / n


def points_of(all_runs):
    """([Point], {(dataset, base, metric): (value, half width or None)} of the bases) of all runs.

    A base has the values that were evaluated, else those at step 0 of its runs' logs."""
    trained = [run for run in all_runs if run.config]
    points = points_of_trained(trained)
    bases = values_at_start(trained)

    # a base that was evaluated goes with every dataset that it was trained on
    panels = {(point.dataset, point.base) for point in points}
    evaluated = defaultdict(dict)  # {(name, metric): {model folder: value}}
    for run in all_runs:
        if not run.config:
            for metric, steps in run.metrics.items():
                first_measured = next(iter(steps.values()))
                evaluated[run.name, metric].setdefault(run.judged, first_measured)
    # each seed may have a base of its own
    for (name, metric), of_folders in evaluated.items():
        for dataset, base in panels:
            if base == name:
                bases[dataset, base, metric] = mean_of_seeds(list(of_folders.values()))
    return points, bases


def points_of_trained(runs):
    """[Point] of all steps above 0. Of two equal runs, seed and length too, the first counts."""
    # what belongs to one point: one value of a metric for each seed
    groups = defaultdict(lambda: defaultdict(list))  # {(setting, step, last): {metric: values}}
    places = {}
    seen = {}  # {measurement: base of its run}
    for run in runs:
        base = run.config.get("base")
        setting = setting_of(run)
        last_step = max(run.places, default=0)
        for metric, steps in run.metrics.items():
            for step, value in steps.items():
                key = setting, step, step == last_step
                measurement = key, metric, run.config.get("seed")
                if step == 0:
                    continue
                if measurement not in seen:
                    seen[measurement] = base
                    groups[key][metric].append(value)
                    places.setdefault(key, run.places[step])
                elif step == last_step:
                    which = "a second run of one setting, seed and length"
                    if base != seen[measurement]:
                        which = f"its base {base} has the name of {seen[measurement]}"
                    problems[f"{run.name}: {which}, left out"] = 1

    # means over the seeds
    points = []
    for key, by_metric in groups.items():
        setting, _, last = key
        values = {metric: mean_of_seeds(pairs) for metric, pairs in by_metric.items()}
        points.append(Point(*setting, places[key], last, values))
    return points


def values_at_start(runs):
    """{(dataset, base, metric): (mean, half width or None)} at step 0, each seed once."""
    starts = defaultdict(dict)
    for run in runs:
        setting = setting_of(run)
        for metric, steps in run.metrics.items():
            if 0 in steps:
                of_seed = starts[setting.dataset, setting.base, metric]
                of_seed.setdefault(run.config.get("seed"), steps[0])
    return {key: mean_of_seeds(list(of_seed.values())) for key, of_seed in starts.items()}


# ----------------------------------------------------------------------------- choosing points
def main_settings(points):
    """[(rank, setting)] that the curves of a dataset show, full finetuning first: one a rank.

    It is the setting with the most lengths, then the paper's form (LoRA on all modules, alpha 2 r,
    no regulariser), then the one whose other knobs most settings share."""
    # how long each setting was trained, and how many settings have its other knobs
    lengths = defaultdict(set)  # {setting: {(step, last)}}
    for point in points:
        lengths[point.setting].add((point.place["step"], point.last))
    shared = Counter(setting.other for setting in lengths)

    # of each rank the first setting with the highest merit
    best = {}  # {rank: (merit, setting)}
    for setting, found in lengths.items():
        ends = [step for step, last in found if last]
        papers_form = setting.targets == "all" and setting.alpha == 2 * setting.rank
        papers = papers_form and not regularised(dict(setting.other))
        merit = len(ends), len(found), papers, shared[setting.other]
        if setting.rank not in best or merit > best[setting.rank][0]:
            best[setting.rank] = merit, setting
    return [(rank, best[rank][1]) for rank in sorted(best)]


def curve_of(points, setting):
    """The points of one setting by length: the ends of its runs, or, of a single run, all of it."""
    mine = [point for point in points if point.setting == setting]
    ends = [point for point in mine if point.last]
    return sorted(ends if len(ends) > 1 else mine, key=lambda point: point.place["step"])


def ends_of(points):
    """The points at the length that most settings were trained for; among equals, the longest."""
    ends = [point for point in points if point.last]
    count = Counter(point.place["step"] for point in ends)
    chosen = max(count, key=lambda step: (count[step], step), default=None)
    return [point for point in ends if point.place["step"] == chosen]


def pick(names, points):
    """The first of the metrics that some point has; None."""
    for name in names:
        if any(name in point.values for point in points):
            return name
    return None


def falls(metric):
    """Is less better?"""
    of_rows = metric.startswith(("loss ", "bpb ", "kl ", "reverse kl "))
    return of_rows or metric.endswith("_loss") or "perplexity" in metric
