"""What the evaluations share: the model that is judged, its items in order and their resume, ranks, scores.

    device = start_ranks(device)                                  # under torchrun, this rank's GPU
    subject = load_for_eval(model, adapter, device, dtype)        # base, adapter or checkpoint folder
    items = read_items("data/gsm8k/test.jsonl", ("question", "answer"))
    records = evaluate(subject, "gsm8k", range(len(items)), settings, work, running)
    write_result(subject, "gsm8k_strict", [records[i]["strict"] for i in records], settings, seconds)

Items go to FOLDER/eval_NAME.jsonl, scores to results.jsonl and each item's to values.jsonl; FOLDER is the checkpoint
out/RUN/step_N and the other two stand in out/RUN, or all are in out/NAME of a model that is no checkpoint, or where out_dir says.
"""
import atexit
import datetime
import hashlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from training.checkpoint import checkpoints, read_state
from lora import fingerprint, is_adapter, load_adapter, merge_lora
from model import Llama
from text.records import Source, check_format, from_hub, parse, read_records
from runtime import RANK, WORLD, append_jsonl, join_ranks, pick_device, print0, versions, write_whole
from text.tokenizer import Tokenizer, load_tokenizer


class Subject(NamedTuple):
    """What is evaluated, and where its results belong."""
    model: Llama
    tokenizer: Tokenizer
    run: str
    step: int        # 0: not trained here
    tokens: int      # seen in training, None if unknown
    epoch: float     # None if unknown
    folder: Path     # of eval_NAME.jsonl
    results: Path    # results.jsonl
    identity: dict   # what tells it from another: folders, hash of weights, dtype, tokenizer


# ----------------------------------------------------------------------------- ranks
def start_ranks(device):
    """The torch.device of this rank; under torchrun it also joins the others.

    The group is gloo's on GPUs as well: only finished records travel. No rank times out waiting for a slower one."""
    device = join_ranks(pick_device(device), "gloo", timeout=datetime.timedelta(days=7))
    if WORLD > 1:
        atexit.register(dist.destroy_process_group)
    return device


def gather(value):
    """[the value of each rank], on every rank."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------- model
def load_for_eval(model, adapter="", device=torch.device("cpu"), dtype=torch.float32, tokenizer="", out_dir=""):
    """The Subject of a model folder, a checkpoint folder out/RUN/step_N, or an adapter, merged in fp32 and rounded once.

    An adapter stands in `adapter`, its base in `model`; or in `model` alone, and its config names the base.
    Raises ValueError or FileNotFoundError for a folder that is none of these, and as model, lora, tokenizer do."""
    if not (model or adapter):
        raise ValueError("model is not set; see --help")
    if not adapter and is_adapter(model):
        model, adapter = "", model
    judged, base = Path(adapter or model), model or base_of(adapter)
    if judged.name.endswith(".tmp"):
        raise ValueError(f"{judged} is a checkpoint that was never finished")
    if steps := sorted(p.name for p in judged.glob("step_*") if p.name[5:].isdigit()):
        raise ValueError(f"{judged} is a run; give one of its checkpoints: {', '.join(steps)}")
    if is_adapter(base):
        raise ValueError(f"model: {base} is an adapter, expected the base of {adapter}")
    if missing := [str(folder) for folder in (judged, base) if not Path(folder).is_dir()]:
        there = ", ".join(p.name for _, p in checkpoints(Path(missing[0]).parent))
        raise ValueError(f"{missing[0]}: no such folder" + (f"; there are {there} beside it" if there else ""))
    tok = load_tokenizer(tokenizer or base)
    llama = Llama.from_pretrained(base, torch.promote_types(dtype, torch.float32) if adapter else dtype, device)
    weights = fingerprint(llama)
    if adapter:
        llama = merge_lora(load_adapter(llama, adapter)).to(dtype)
        llama.compute_dtype = dtype
        weights += hashlib.sha256((judged / "adapter_model.safetensors").read_bytes()).hexdigest()
    if tok.vocab_size > llama.config.vocab_size:
        raise ValueError(f"tokenizer has {tok.vocab_size:,} ids, the model {llama.config.vocab_size:,}: not its own")
    identity = {"model": str(base), "adapter": str(adapter), "weights": weights, "dtype": str(dtype)[6:],
                "tokenizer": tok.sha256}
    return place(judged, out_dir or (Path("out") / judged.resolve().name), bool(out_dir))._replace(
        model=llama.eval().requires_grad_(False), tokenizer=tok, identity=identity)


def place(judged, elsewhere, always=False):
    """A Subject without a model: run, step and folder of a checkpoint, whose results.jsonl is its run's; or items and
    results in the folder `elsewhere`, if `judged` is no checkpoint or if that is asked for."""
    trained = read_state(judged)
    name, step = (judged.resolve().parent if trained else judged.resolve()).name, trained.get("step", 0)
    folder, results = (judged, judged.parent) if trained and not always else (Path(elsewhere), Path(elsewhere))
    return Subject(None, None, name, step, trained.get("tokens"), epoch_of(judged.parent / "log.jsonl", step), folder,
                   results / "results.jsonl", {})


def base_of(adapter):
    """The base that an adapter folder names; raises ValueError when that is no folder here."""
    if not is_adapter(adapter):
        raise ValueError(f"adapter: {adapter} holds no adapter_config.json")
    base = json.loads((Path(adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    if not (base and Path(base).is_dir()):
        raise ValueError(f"{adapter} names the base {base!r}, no folder here; say --model=BASE --adapter={adapter}")
    return base


def epoch_of(log, step):
    """Epochs done at a step by train.py's log.jsonl: epochs are proportional to steps. None if it does not tell."""
    for line in log.read_text().splitlines() if step and log.is_file() else []:
        if (record := json.loads(line)).get("epoch"):
            return record["epoch"] / record["step"] * step
    return None


# ----------------------------------------------------------------------------- items
def read_items(source, fields, knob="data"):
    """The records of a .jsonl, .json (these also .gz) or .parquet file, here or on the hub, a list of dicts.

    Raises FileNotFoundError, or ValueError naming the first record that lacks one of `fields`; `knob` is what named it."""
    if source.startswith("hf://"):
        sources = from_hub(source, knob)
    elif Path(source).is_file():
        check_format(source, knob)
        sources = [Source(source, source)]
    else:
        raise FileNotFoundError(f"{knob}: {source}: no such file; expected .parquet, .json, .jsonl (.gz) or "
                                f"hf://datasets/OWNER/NAME/FILE")
    items = []
    for part in sources:
        for number, raw, _ in read_records(part):
            try:
                items.append(parse(raw))
            except ValueError as e:
                raise ValueError(f"{part.name}, record {number}: {e}") from None
            found = list(items[-1]) if isinstance(items[-1], dict) else [type(items[-1]).__name__]
            if missing := [field for field in fields if field not in found]:
                raise ValueError(f"{part.name}, record {number}: expected {', '.join(fields)}; found {', '.join(found)}, "
                                 f"without {', '.join(missing)}")
    return items


def cut_left(ids, most, bos_id=None):
    """(the last `most` ids, how many were cut); a BOS in front stays in front."""
    cut = max(0, len(ids) - most)
    keep = [bos_id] if cut and ids[0] == bos_id else []
    return keep + ids[cut + len(keep):], cut


def digest(records):
    """A hash of what the records say, whatever file they came in."""
    return hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()[:16]


def evaluate(subject, name, ids, settings, work, running=None):
    """{id: record} of all `ids` (ints) in order, on every rank, as FOLDER/eval_NAME.jsonl ends up holding them.

    work(ids, finish) is given those that this rank has to do, and calls finish(id, record), a dict, as each is done.
    Finished ones are in FOLDER/eval_NAME.jsonl.part* at once and are not done again, on whatever number of ranks.
    running(record) is the number whose mean the progress bar shows.
    Raises ValueError when the folder holds items of the same name made with other settings."""
    final = subject.folder / f"eval_{name}.jsonl"
    done = {}
    if RANK == 0:
        keep_settings(final, {**subject.identity, **settings})
        for part in (final, *sorted(final.parent.glob(f"{final.name}.part*"))):
            done.update(read_done(part))
        write_records(final.with_name(f"{final.name}.part0"), done)  # in one file again, without torn ends
        for part in final.parent.glob(f"{final.name}.part[1-9]*"):
            part.unlink()
    done = gather(done)[0]
    todo = [i for i in ids if i not in done]
    if len(todo) < len(ids):
        print0(f"{final}: {len(ids) - len(todo)} of {len(ids)} items are there already")
    mine, score = todo[RANK::WORLD], [running(done[i]) for i in ids if i in done] if running else []
    new = {}
    with open(f"{final}.part{RANK}", "a") as part, \
            tqdm(total=len(mine), desc=name, disable=None if RANK == 0 else True, smoothing=0.05) as bar:
        def finish(i, record):
            new[i] = record
            part.write(json.dumps({"id": i, **record}) + "\n")
            part.flush()
            if running:
                score.append(running(record))
                bar.set_postfix_str(f"score {sum(score) / len(score):.4f}", refresh=False)
            bar.update()

        if mine:
            work(mine, finish)
    for records in gather(new):
        done.update(records)
    if missing := [i for i in ids if i not in done]:
        raise RuntimeError(f"{name}: items {missing[:5]} were not evaluated")
    if RANK == 0:
        write_records(final, done)
        for part in final.parent.glob(f"{final.name}.part*"):
            part.unlink()
    return {i: done[i] for i in ids}


def keep_settings(final, settings):
    """Write eval_NAME.settings.json; raises ValueError when it is there and differs."""
    path = final.with_suffix(".settings.json")
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text())
        if other := [k for k in {**before, **settings} if before.get(k) != settings.get(k)]:
            raise ValueError(f"{final} was made with " +
                             ", ".join(f"{k}={before.get(k)!r}, not {settings.get(k)!r}" for k in other) +
                             "; choose another --name or --out_dir, or delete it and its parts and settings")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=1))


def write_records(path, records):
    write_whole(path, "".join(json.dumps({"id": i, **records[i]}) + "\n" for i in sorted(records)))


def read_done(path):
    """{id: record} of a file of items, without a last line that a kill tore."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return {record.pop("id"): record for record in records}


# ----------------------------------------------------------------------------- scores
def score(values):
    """(mean, standard error, low, high) of per-item values; low and high are the 95% interval.

    The error is lm-eval's (sample deviation / sqrt n). Of values that are all 0 or 1 the interval is Wilson's,
    which holds for shares near 0 and 1 as well, else mean +- 1.96 errors. Raises ValueError without values."""
    if not (n := len(values)):
        raise ValueError("no items were evaluated")
    mean = math.fsum(values) / n
    stderr = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0
    if not all(v in (0, 1) for v in values):
        return mean, stderr, mean - 1.96 * stderr, mean + 1.96 * stderr
    z2 = 1.96 ** 2
    centre, half = (mean + z2 / 2 / n) / (1 + z2 / n), math.sqrt(z2) / (1 + z2 / n) * math.sqrt(
        mean * (1 - mean) / n + z2 / 4 / n ** 2)
    return mean, stderr, max(0.0, centre - half), min(1.0, centre + half)


def write_result(subject, metric, values, settings, seconds):
    """As write_score, for the mean of `values`, one number an item; returns it."""
    scored = score(values)
    write_score(subject, metric, scored, values, settings, seconds)
    return scored[0]


def write_score(subject, metric, scored, values, settings, seconds):
    """Print a metric with its interval, and append it to results.jsonl, and the items' values to values.jsonl beside it, by
    which two models can be compared item by item; unless they stand there.

    scored: as of score(), settings: every knob; the subject's identity is added."""
    mean, stderr, low, high = scored
    print0(f"{metric}: {mean:.4f} +- {stderr:.4f} ({low:.4f} to {high:.4f} with 95%), {len(values)} items")
    record = {"run": subject.run, "step": subject.step, "tokens": subject.tokens, "epoch": subject.epoch, "metric": metric,
              "value": mean, "stderr": stderr, "n": len(values),
              "settings": json.loads(json.dumps({**subject.identity, **settings}))}
    if RANK:
        return
    subject.results.parent.mkdir(parents=True, exist_ok=True)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    of_items, path = {"metric": metric, "step": subject.step, "values": list(values)}, subject.results.with_name("values.jsonl")
    new = not any(record.items() <= line.items() for line in read(subject.results))  # else finished items were judged again
    if new or of_items not in read(path):
        append_jsonl(path, of_items)
    if new:
        append_jsonl(subject.results, {**record, "seconds": round(seconds, 3), "version": versions(),
                                       "time": time.strftime("%Y-%m-%dT%H:%M:%S")})
