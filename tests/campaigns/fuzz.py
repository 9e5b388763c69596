"""
Damage a file and run the real command that reads it: it must work, or say why in one line.

    python tests/campaigns/fuzz.py --mutants=3000 --seed=1
    python tests/campaigns/fuzz.py --seconds=600 --only=meta.json --out_dir=/tmp/fuzz

    whole folder --copy--> live folder --damage a file--> fork: train.py, lora.py, ... --> verdict

A mutant is bad if its command ends with a traceback or a status other than 0 and 2, hangs, says
more than one line, or fails and leaves something under a final name. Bad ones go to
OUT_DIR/bad.jsonl with their damage. A mutant is a function of seed, only and its number N:
--first=N --mutants=1 repeats it.
"""
import collections
import copy
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import forks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from configurator import configure
from forks import ROOT, wait

os.environ["MPLBACKEND"] = "Agg"
import prepare_data  # noqa: E402, F401 (with all that takes long to import)
import eval_gsm8k  # noqa: E402, F401
import eval_loss  # noqa: E402, F401
import paper.claims  # noqa: E402, F401
import paper.plot  # noqa: E402, F401
import spectrum  # noqa: E402, F401
import train  # noqa: E402, F401

# -----------------------------------------------------------------------------
mutants = 3000
first = 0                # number of the first mutant
seconds = 0              # stop after so long; 0 = no limit
seed = 1
only = ''                # only files with this in their name
out_dir = '/tmp/fuzz'

LIMIT = 20               # seconds of CPU that a command may take
WALL = 600               # seconds in all, however busy the machine: a command that waits for ever
MEMORY = 8 << 30         # bytes of address space that it may take
CPU = ["--device=cpu", "--dtype=float32"]


# ----------------------------------------------------------------------------- the valid inputs
def make_inputs(folder):
    """One small file of every kind, in a new folder."""
    from samples import byte_tokenizer, stories, word_problems

    from lora import apply_lora, init_adapters, save_adapter
    from model import Llama

    # two bases, which differ in the tokenizer
    original = ROOT / "tests/golden/data/stories260k"
    for name in ("base", "bpe"):
        shutil.copytree(original, folder / name)
    for name, content in (("tokenizer_config", {"add_bos_token": True, "bos_token": "<s>",
                                                "eos_token": {"content": "</s>"}}),
                          ("generation_config", {"eos_token_id": [2], "bos_token_id": 1})):
        (folder / "base" / f"{name}.json").write_text(json.dumps(content))
    (folder / "bpe/tokenizer.model").unlink()
    byte_tokenizer(folder / "bpe")
    (folder / "bpe/tokenizer_config.json").write_text(json.dumps(
        {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}))

    # an adapter
    adapted = apply_lora(Llama.from_pretrained(original), 2, 4)
    init_adapters(adapted)
    save_adapter(adapted, folder / "adapter", str(folder / "base"))

    # records
    stories(folder / "stories.txt", 30)
    word_problems(folder / "train.jsonl", 12, seed=2)
    word_problems(folder / "test.jsonl", 4, seed=1)
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), folder / "train.parquet")
    chats = [{"messages": [{"role": "user", "content": record["question"]},
                           {"role": "assistant", "content": record["answer"]}]}
             for record in records]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    # what the stages leave
    words = {"L": str(folder)}
    for command in (["prepare_data.py", "--source={L}/stories.txt", "--tokenizer={L}/base",
                     "--txt_split=\\n\\n", "--seq_len=64", "--workers=1", "--out_dir={L}/data",
                     "--val_fraction=0.3"],
                    [*TRAIN, "--out_dir={L}/run", "--max_steps=2"],
                    [*TRAIN, "--out_dir={L}/full", "--max_steps=2", "--lora_rank=0"],
                    [*LOSS, "--model={L}/run/step_2", "--out_dir={L}/run"],
                    [*LOSS, "--model={L}/base", "--out_dir={L}/base_results"],
                    ["spectrum.py", "--tuned={L}/run", "--device=cpu", "--layers=0"]):
        status, _, error = run(fill(command, words), folder.parent)
        assert status == 0, (command, error)


TRAIN = ["train.py", "--base={L}/base", "--data={L}/data", "--lora_rank=2", "--learning_rate=1e-3",
         "--global_batch=2", "--microbatch=2", *CPU, "--eval_rows=2"]
LOSS = ["eval_loss.py", "--data={L}/data", "--rows=2", *CPU]
GSM8K = ["eval_gsm8k.py", "--model={L}/base", "--test_data={L}/test.jsonl",
         "--train_data={L}/train.jsonl", "--limit=1", "--max_new_tokens=4", "--shots=1",
         "--out_dir={L}/out", *CPU]
SAMPLE = ["sample.py", "--prompt=Once upon", "--max_new_tokens=2", *CPU]
MERGE = ["lora.py", "--base={L}/base", "--adapter={L}/adapter", "--out={L}/out"]
PREPARE = ["prepare_data.py", "--seq_len=64", "--workers=1", "--val_fraction=0",
           "--out_dir={L}/out"]
IFT = [*PREPARE, "--kind=ift", "--tokenizer={L}/base", "--prompt_field=question",
       "--response_field=answer"]
CHATS = [*PREPARE, "--kind=ift", "--tokenizer={L}/base", "--source={L}/chats.jsonl",
         "--template=tulu"]
DOCUMENTS = [*PREPARE, "--source={L}/stories.txt"]
SPECTRUM = ["spectrum.py", "--layers=0", "--modules=q_proj", "--device=cpu", "--out={L}/out"]
PLOT = ["paper/plot.py", "--runs={L}/run,{L}/base_results", "--out_dir={L}/figures",
        "--formats=png", "--dpi=20", "--learning=loss data", "--forgetting=loss data"]
CLAIMS = ["paper/claims.py", "--runs={L}/run,{L}/full,{L}/base_results", "--learning=loss data",
          "--forgetting=loss data"]
RESUME = [*TRAIN, "--out_dir={L}/run", "--max_steps=3", "--resume=True"]
ONWARD = [*TRAIN, "--out_dir={L}/out", "--max_steps=3", "--resume_from={L}/run/step_2"]

# a file, the commands that read it, each with what it may leave only when it ends well
READERS = [
    ("base/config.json", [(SAMPLE + ["--model={L}/base"], ""), (MERGE, "out"),
                          (TRAIN + ["--max_steps=1", "--out_dir={L}/out"], "out/step_1"),
                          (SPECTRUM + ["--tuned={L}/run/step_2", "--base={L}/base"], "out")]),
    ("base/tokenizer.model", [(SAMPLE + ["--model={L}/base"], ""), (GSM8K, "out/results.jsonl"),
                              (DOCUMENTS + ["--tokenizer={L}/base"], "out/meta.json")]),
    ("base/tokenizer_config.json", [(SAMPLE + ["--model={L}/base"], ""), (MERGE, "out"),
                                    (DOCUMENTS + ["--tokenizer={L}/base"], "out/meta.json")]),
    ("base/generation_config.json", [(SAMPLE + ["--model={L}/base"], ""), (MERGE, "out")]),
    ("bpe/tokenizer.json", [(SAMPLE + ["--model={L}/bpe"], ""),
                            (DOCUMENTS + ["--tokenizer={L}/bpe"], "out/meta.json")]),
    ("bpe/tokenizer_config.json", [(SAMPLE + ["--model={L}/bpe"], "")]),
    ("base/model.safetensors", [(SAMPLE + ["--model={L}/base"], ""), (MERGE, "out"),
                                (SPECTRUM + ["--tuned={L}/run/step_2", "--base={L}/base"], "out")]),
    ("adapter/adapter_model.safetensors", [
        (SAMPLE + ["--model={L}/adapter"], ""), (MERGE, "out"),
        (SPECTRUM + ["--tuned={L}/adapter"], "out")]),
    ("adapter/adapter_config.json", [
        (SAMPLE + ["--model={L}/adapter"], ""), (MERGE, "out"),
        (SPECTRUM + ["--tuned={L}/adapter"], "out"),
        (TRAIN + ["--max_steps=1", "--out_dir={L}/out", "--lora_rank=0", "--adapter={L}/adapter"],
         "out/step_1")]),
    ("data/meta.json", [(TRAIN + ["--max_steps=1", "--out_dir={L}/out"], "out/step_1"),
                        (LOSS + ["--model={L}/base", "--out_dir={L}/out"], "out/results.jsonl"),
                        (["prepare_data.py", "--inspect={L}/data"], "")]),
    ("data/train.bin", [(TRAIN + ["--max_steps=1", "--out_dir={L}/out"], "out/step_1"),
                        (["prepare_data.py", "--inspect={L}/data"], "")]),
    ("data/train.docs.bin", [(TRAIN + ["--max_steps=1", "--out_dir={L}/out"], "out/step_1"),
                             (["prepare_data.py", "--inspect={L}/data"], "")]),
    ("run/step_2/state/state.json", [(RESUME, "run/step_3"), (ONWARD, "out/step_3"), (PLOT, ""),
                                     (LOSS + ["--model={L}/run/step_2", "--out_dir={L}/out"],
                                      "out/results.jsonl"),
                                     (SPECTRUM + ["--tuned={L}/run/step_2"], "out")]),
    ("run/step_2/adapter_config.json", [(RESUME, "run/step_3"), (ONWARD, "out/step_3")]),
    ("run/log.jsonl", [(PLOT, ""), (CLAIMS, ""), (RESUME, "run/step_3")]),
    ("run/config.json", [(PLOT, ""), (CLAIMS, ""), (RESUME, "run/step_3")]),
    ("run/results.jsonl", [(PLOT, ""), (CLAIMS, ""),
                           (LOSS + ["--model={L}/run/step_2", "--out_dir={L}/run"], "")]),
    ("run/eval_loss_data.jsonl", [(LOSS + ["--model={L}/run/step_2", "--out_dir={L}/run"], ""),
                                  (CLAIMS, "")]),
    ("run/spectrum.json", [(PLOT, ""), (CLAIMS, ""),
                           (["spectrum.py", "--tuned={L}/run", "--device=cpu", "--layers=0"], "")]),
    ("run/values.jsonl", [(CLAIMS, ""), (PLOT, ""),
                          (LOSS + ["--model={L}/run/step_2", "--out_dir={L}/run"], "")]),
    ("run/eval_loss_data.settings.json", [
        (LOSS + ["--model={L}/run/step_2", "--out_dir={L}/run"], "")]),
    ("run/step_2/state/optimizer.safetensors", [(RESUME, "run/step_3"), (ONWARD, "out/step_3")]),
    ("run/step_2/adapter_model.safetensors", [(RESUME, "run/step_3"), (ONWARD, "out/step_3")]),
    ("data/val.bin", [(TRAIN + ["--max_steps=1", "--out_dir={L}/out"], "out/step_1"),
                      (LOSS + ["--model={L}/base", "--out_dir={L}/out"], "out/results.jsonl")]),
    ("train.jsonl", [(GSM8K, "out/results.jsonl"),
                     (IFT + ["--source={L}/train.jsonl"], "out/meta.json")]),
    ("test.jsonl", [(GSM8K, "out/results.jsonl")]),
    ("chats.jsonl", [(CHATS, "out/meta.json")]),
    ("train.parquet", [(IFT + ["--source={L}/train.parquet"], "out/meta.json")]),
]


# ----------------------------------------------------------------------------- damage
STRANGE = [None, True, False, 0, 1, -1, 3, 1.5, -0.5, 1e308, 1e-320, 10 ** 30, -10 ** 30, "", "x",
           "1", "\ud800", "a" * 300, "../x", [], [1], ["x"], [[]], [None], {}, {"x": 1}, float("nan"),
           float("inf")]


def places_in(value, path=()):
    """Paths of all values in parsed JSON."""
    found = [path] if path else []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    else:
        children = []
    for key, child in children:
        found += places_in(child, (*path, key))
    return found


def damage_value(rng, value):
    """Change one place of parsed JSON; returns (value, what was done)."""
    value = copy.deepcopy(value)
    places = places_in(value)
    if not places or rng.random() < 0.03:
        strange = rng.choice(STRANGE)
        return strange, f"the whole = {strange!r}"
    # shallow places first: a long vocabulary would hide the settings
    shallow = [place for place in places if len(place) <= 2]
    place = rng.choice(shallow if shallow and rng.random() < 0.6 else places)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    key = place[-1]
    kind = rng.choice(["set", "set", "set", "drop", "rename", "wrap"])
    if kind == "drop":
        del parent[key]
        return value, f"{place} dropped"
    if kind == "rename" and isinstance(parent, dict):
        parent[f"{key}_"] = parent.pop(key)
        return value, f"{place} renamed"
    if kind == "wrap":
        parent[key] = [parent[key]]
        return value, f"{place} in a list"
    parent[key] = rng.choice(STRANGE)
    return value, f"{place} = {parent[key]!r}"


def damage_bytes(rng, content):
    """Truncate, empty, flip or insert bytes; returns (bytes, what was done)."""
    kind = rng.choice(["truncated", "flipped", "flipped", "inserted", "empty"])
    if kind == "empty" and rng.random() < 0.2:
        return b"", "empty"
    at = rng.randrange(max(len(content), 1))
    if kind == "truncated":
        return content[:at], f"truncated at {at}"
    if kind == "inserted":
        added = rng.choice([rng.randbytes(1), rng.randbytes(4), b"[" * 100_000, b"\xef\xbb\xbf"])
        at = rng.choice([0, at])
        return content[:at] + added + content[at:], f"{added[:9]!r} inserted at {at}"
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 8])):
        # heads more often than the rest
        at = rng.randrange(rng.choice([min(64, len(changed)), len(changed)]))
        changed[at] = rng.randrange(256)
    return bytes(changed), f"bytes flipped, the last at {at}"


def damage_file(rng, path):
    """Damage a file in a way that fits its name; returns (kind, what was done)."""
    content = path.read_bytes()
    if rng.random() < 0.25 or path.suffix not in (".json", ".jsonl", ".safetensors"):
        changed, what = damage_bytes(rng, content)
        kind = "bytes"
    elif path.suffix == ".json":
        value, what = damage_value(rng, json.loads(content))
        changed = json.dumps(value).encode()
        kind = "value"
    elif path.suffix == ".jsonl":
        lines = content.splitlines()
        chosen = rng.randrange(len(lines))
        value, what = damage_value(rng, json.loads(lines[chosen]))
        lines[chosen] = json.dumps(value).encode()
        changed = b"\n".join(lines) + b"\n"
        what = f"line {chosen + 1}: {what}"
        kind = "record"
    else:
        length = int.from_bytes(content[:8], "little")
        value, what = damage_value(rng, json.loads(content[8:8 + length]))
        header = json.dumps(value).encode()
        changed = len(header).to_bytes(8, "little") + header + content[8 + length:]
        kind = "header"
    path.write_bytes(changed)
    return kind, what


# ----------------------------------------------------------------------------- running and judging
def fill(command, words):
    """The command with {L} replaced; of a knob that is there twice the last counts."""
    filled = {}
    for word in command:
        for name, value in words.items():
            word = word.replace(f"{{{name}}}", value)
        filled[word.split("=")[0]] = word
    return list(filled.values())


def run(command, scratch):
    """Run a script in a fork of this process; returns (status, stdout, stderr)."""
    out = scratch / "stdout"
    error = scratch / "stderr"
    out.write_text("")
    error.write_text("")

    def work():
        for stream, number in ((out, 1), (error, 2)):
            descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
        os.chdir(scratch)
        sys.argv = command
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")

    status = wait([forks.fork(work)], WALL)[0]
    return status, out.read_text(errors="replace"), error.read_text(errors="replace")


def is_chatter(line):
    """Progress bars, and the lines of sample.py and of warnings, are no errors."""
    return not line.strip() or re.search(r"\d+%\||it/s|\[00:|^\[|Warning|^  |^note|warning", line)


def judge(status, error, final):
    """What is wrong with how a command ended, or '' if nothing is."""
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang"
    if "Traceback" in error:
        return "traceback"
    if status not in (0, 2):
        return f"status {status}"
    if status == 2:
        said = [line for line in re.split(r"[\r\n]+", error) if not is_chatter(line)]
        if len(said) != 1 or "error: " not in said[0]:
            return "lines"
        if len(said[0]) > 600:
            return "long line"
        if final and final.exists():
            return "half written"
    return ""


def campaign(folder):
    """Run the mutants; returns how many were bad."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / "whole"
    live = folder / "live"
    shutil.rmtree(live, ignore_errors=True)
    shutil.rmtree(whole, ignore_errors=True)
    live.mkdir()
    make_inputs(live)
    live.rename(whole)

    readers = [reader for reader in READERS if only in reader[0]]
    counts = collections.Counter()
    statuses = collections.Counter()
    seen = set()
    until = time.time() + seconds if seconds else float("inf")
    for number in tqdm(range(first, first + mutants), unit="mutant"):
        if time.time() > until:
            break
        rng = random.Random(f"{seed} {number}")
        name, commands = readers[number % len(readers)]
        command, final = rng.choice(commands)
        shutil.rmtree(live, ignore_errors=True)
        shutil.copytree(whole, live)
        kind, what = damage_file(rng, live / name)
        status, _, error = run(fill(command, {"L": str(live)}), folder)
        verdict = judge(status, error, live / final if final else None)
        counts[name, kind, verdict or "right"] += 1
        statuses[status] += 1
        if verdict:
            with open(folder / "bad.jsonl", "a") as file:
                file.write(json.dumps({"number": number, "seed": seed, "file": name, "damage": what,
                                       "command": command, "verdict": verdict,
                                       "status": status, "stderr": error[-3000:]}) + "\n")
            # one line for each place that raises
            where = (verdict, re.sub(r"\d+", "", "".join(error.strip().splitlines()[-3:]))[-200:])
            if where not in seen:
                seen.add(where)
                last = (error.strip().splitlines() or [""])[-1]
                print(f"{number} {name}: {what}: {command[0]}: {verdict}: {last[:200]}", flush=True)

    # the table
    print(f"{sum(counts.values())} mutants, by status {dict(statuses)}")
    names = sorted({key[:2] for key in counts})
    for name, kind in names:
        verdicts = {key[2]: n for key, n in counts.items() if key[:2] == (name, kind)}
        print(f"  {name} {kind}: " + ", ".join(f"{v} {n}" for v, n in sorted(verdicts.items())))
    return sum(n for key, n in counts.items() if key[2] != "right")


if __name__ == "__main__":
    configure(globals())
    warnings.filterwarnings("ignore")
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    raise SystemExit(1 if campaign(Path(out_dir)) else 0)
