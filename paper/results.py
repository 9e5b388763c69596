"""What runs left behind, for paper/plot.py and paper/claims.py: results.jsonl and log.jsonl of any runs as points with intervals."""
import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import train

# knobs of train.py that make two runs two settings; rank, alpha, targets, data and base stand beside them in a Point
SETTING = ("scratch", "adapter", "global_batch", "seq_len", "shuffle", "optimizer", "learning_rate", "beta1", "beta2",
           "weight_decay", "attention_dropout", "grad_clip", "loss_norm", "doc_mask", "schedule", "alpha_f", "t_scale",
           "alpha_f_decay", "alpha_f_cooldown", "schedule_lag", "dtype", "param_dtype")
LORA_SETTING = ("lora_dropout", "rslora")  # of LoRA alone
REGULARISERS = {"weight_decay": 1e-5, "attention_dropout": 1e-9}  # of figure 4, from where on; code CPT's decay of 1e-6 is none
T_975 = {2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t by degrees of freedom
problems = Counter()


# ----------------------------------------------------------------------------- reading
def number(value):
    """A finite float, else None and a note."""
    if isinstance(value, (int, float)) and math.isfinite(value):
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
            objects.append(json.loads(line))
        except ValueError:
            problems[f"lines that are not JSON, as in {path}"] += 1
    return [o for o in objects if isinstance(o, dict)]


def by_step(lines):
    """The lines of a log in order of steps, training and validation apart; of a step that was logged twice, the last."""
    kept = {(line["step"], "val" in line): line for line in lines if isinstance(line.get("step"), int)}
    return [kept[key] for key in sorted(kept)]


def read_json(path):
    """The object in a .json file, {} with a note if there is none."""
    try:
        content = json.loads(Path(path).read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError) as e:
        problems[f"{path}: {type(e).__name__}, left out"] += 1
        return {}


class Run(NamedTuple):
    """One folder: what was trained, and {metric: {step: (value, stderr)}}."""
    name: str
    config: dict
    metrics: dict
    log: list
    places: dict  # step -> {"step", "tokens", "epoch"}
    items: dict   # {(metric, step): a value an item}


def read_run(folder):
    """The Run of a folder; val losses of its log count as metrics 'loss NAME', where eval_loss.py measured none at that step."""
    folder = Path(folder)
    config = read_json(folder / "config.json").get("config") if (folder / "config.json").is_file() else {}
    config = config if isinstance(config, dict) else {}
    if config.get("adapter") and not config.get("lora_rank"):  # trained on from an adapter, which brought its rank
        made = [read_json(path) for path in sorted(folder.glob("step_*/adapter_config.json"))]
        config |= {"lora_rank": made[0].get("r"), "lora_alpha": made[0].get("lora_alpha")} if made else {}
    log, metrics, places = by_step(read_jsonl(folder / "log.jsonl")), defaultdict(dict), {}
    per_step = next((line["epoch"] / line["step"] for line in log if line.get("epoch") and line.get("step")), None)

    def keep(line, metric, value, stderr=None):
        step = line.get("step")
        if isinstance(step, int) and (value := number(value)) is not None:
            metrics[metric][step] = value, number(stderr)
            epoch = line.get("epoch") or (per_step * step if per_step else None)
            before = places.get(step, {})
            places[step] = {"step": step, "tokens": line.get("tokens") or before.get("tokens"),
                            "epoch": epoch or before.get("epoch")}

    for line in log:
        for name, loss in (line["val"].items() if isinstance(line.get("val"), dict) else ()):
            keep(line, f"loss {name}", loss)
    name = folder.name
    for line in read_jsonl(folder / "results.jsonl"):
        keep(line, str(line.get("metric")), line.get("value"), line.get("stderr"))
        judged = line.get("settings") if isinstance(line.get("settings"), dict) else {}
        if not config and judged.get("model") and not judged.get("adapter"):
            name = Path(judged["model"]).name  # as the runs that started from it call it
    items = {(line.get("metric"), line.get("step")): line.get("values") for line in read_jsonl(folder / "values.jsonl")}
    return Run(name, config, dict(metrics), log, places, items)


# ----------------------------------------------------------------------------- runs become points
class Point(NamedTuple):
    """One setting at one length, over its seeds: values {metric: (mean, half width of the interval or None)}."""
    dataset: str
    base: str
    rank: int        # 0 = full finetuning
    alpha: float
    targets: str
    other: tuple     # the other knobs, sorted pairs
    place: dict      # step, tokens, epoch
    last: bool       # nothing longer in its runs: its learning rate had come down
    values: dict

    @property
    def setting(self):
        return self.dataset, self.base, self.rank, self.alpha, self.targets, self.other


def targets_name(targets):
    """'attention', 'mlp' or 'all' for lora_targets that spell them out; others as they stand."""
    names = {t.strip() for t in str(targets).split(",")}
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    return "attention" if names == attention else "mlp" if names == mlp else "all" if names == attention | mlp else str(targets)


def regularised(config):
    """The names of the paper's regularisers that the knobs switch on."""
    return [name for name, least in REGULARISERS.items() if float(config.get(name) or 0) >= least]


def setting_of(run):
    """What the seeds and lengths of a series share: (dataset, base, rank, alpha, targets, other knobs), as in Point."""
    rank = run.config.get("lora_rank") or 0
    alpha = (run.config.get("lora_alpha") or 2 * rank) if rank else 0
    targets = targets_name(run.config.get("lora_targets", "all")) if rank else "all"
    # a knob that an older run does not know counts as train.py's default
    knobs = sorted(SETTING + LORA_SETTING if rank else SETTING)
    other = tuple((knob, str(run.config.get(knob, getattr(train, knob)))) for knob in knobs)
    base = Path(run.config["base"]).name if run.config.get("base") else run.name
    return Path(run.config.get("data", "")).name, base, rank, alpha, targets, other


def mean_of_seeds(pairs):
    """(mean, half width of its 95% interval or None) of the (value, stderr) of each seed."""
    values, errors = [v for v, _ in pairs], [e for _, e in pairs if e]
    mean = statistics.fmean(values)
    if len(values) > 2:
        return mean, T_975.get(df := len(values) - 1, 1.96 + 2.6 / df) * statistics.stdev(values) / len(values) ** 0.5
    return mean, 1.96 * sum(errors) / len(values) if len(errors) == len(values) else None  # the same items: not independent


def points_of(all_runs):
    """[Point] of the trained steps of all runs; {(dataset, base, metric): (value, half width or None)} of their bases: as
    evaluated, else step 0 of the logs."""
    groups, evaluated, starts, seen = defaultdict(list), {}, defaultdict(dict), set()
    for run in all_runs:
        setting, seed = setting_of(run), run.config.get("seed")
        last = max((s for steps in run.metrics.values() for s in steps), default=0)
        for metric, steps in run.metrics.items():
            for step, value in steps.items():
                if not run.config:
                    evaluated.setdefault((setting[1], metric), value)
                elif step == 0:
                    starts[*setting[:2], metric].setdefault(seed, value)
                elif (one := (setting, seed, metric, step, step == last)) not in seen:
                    seen.add(one)
                    groups[*setting, step, step == last].append((metric, value, run.places[step]))
                elif step == last:
                    problems[f"{run.name}: a second run of one setting, seed and length, left out"] = 1
    points = []
    for (*setting, _, last), found in groups.items():
        by_metric = defaultdict(list)
        for metric, value, _ in found:
            by_metric[metric].append(value)
        points.append(Point(*setting, found[0][2], last, {m: mean_of_seeds(v) for m, v in by_metric.items()}))
    bases = {key: mean_of_seeds([*of_seed.values()]) for key, of_seed in starts.items()}
    return points, bases | {(dataset, base, metric): mean_of_seeds([value]) for dataset, base in {p.setting[:2] for p in points}
                            for (name, metric), value in evaluated.items() if name == base}


def main_settings(points):
    """[(rank, setting)] a dataset's curves show, full first: of each rank the setting with the most lengths."""
    by_rank = defaultdict(lambda: defaultdict(set))
    for p in points:
        by_rank[p.rank][p.setting].add((p.place["step"], p.last))

    def merit(setting, lengths):
        other = dict(setting[5])
        paper = setting[4] == "all" and setting[3] == 2 * setting[2] and not regularised(other)
        return len({s for s, last in lengths if last}), len(lengths), paper

    same = Counter(s[5] for settings in by_rank.values() for s in settings)  # then what the other ranks use as well
    return [(rank, max(by_rank[rank], key=lambda s: (*merit(s, by_rank[rank][s]), same[s[5]]))) for rank in sorted(by_rank)]


def curve_of(points, setting):
    """The points of one setting by length: the ends of its runs, or, of a single run, all of it."""
    mine = [p for p in points if p.setting == setting]
    ends = [p for p in mine if p.last]
    return sorted(ends if len(ends) > 1 else mine, key=lambda p: p.place["step"])


def ends_of(points):
    """The points at the length that most settings were trained for."""
    ends = [p for p in points if p.last]
    lengths = Counter(p.place["step"] for p in ends)
    return [p for p in ends if p.place["step"] == max(lengths, key=lambda s: (lengths[s], s))] if ends else []


def pick(names, points):
    """The first of the metrics that some point has; None."""
    return next((m for m in names if any(m in p.values for p in points)), None)


def falls(metric):
    """Is less better?"""
    return metric.startswith("loss ") or metric.endswith("_loss") or "perplexity" in metric
