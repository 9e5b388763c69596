"""
The steps of a study's models and runs: their commands, which are done, and doing the rest.

    r16-75:  train.py --lora_rank=16  -->  eval_gsm8k.py --model=...  -->  spectrum.py --tuned=...

A step is done if its whole command line stands in out_dir/study.jsonl and what it made is still
there. Several runs may be at work at a time, each at one of its steps.
"""
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from llama.adapter_config import is_adapter
from runtime import ROOT, append_jsonl, available_cores, script_words
from text.records import why_not_fetched
from training.checkpoint import checkpoints, read_state


@dataclass
class Study:
    """What there is to do, read from the knobs of the same names."""
    out_dir: Path
    base: str         # a folder, or hf://... that is not downloaded yet
    models: dict      # {name: [folder or hf://..., more knobs of its evaluations]}
    runs: dict        # {name: what train.py takes}
    train: list
    evals: list       # [[script, knobs ...]]
    spectrum: list    # None = no spectra
    plot: list        # None = no figures
    checkpoint: str
    launch: list
    jobs: int         # at a time


# ----------------------------------------------------------------------------- what there is to do
def fetch(where, download=True):
    """A model's folder: as it stands, or that of hf://OWNER/NAME[@REVISION] in the hub's cache.

    None if it is not there yet and is not to be downloaded; ValueError if it cannot be."""
    if not where.startswith("hf://"):
        return where
    from huggingface_hub import snapshot_download
    repo, _, revision = where.removeprefix("hf://").partition("@")
    try:
        return snapshot_download(repo, revision=revision or None, local_files_only=not download,
                                 allow_patterns=["*.json", "*.safetensors", "tokenizer.model"])
    except Exception as error:  # requests', httpx's and the hub's own, by its version
        if not download:
            return None
        raise ValueError(f"{where}: {why_not_fetched(error, 'model', repo)}; or fetch it elsewhere "
                         f"(hf download {repo} --local-dir DIR) and name DIR") from None


def train_command(study, name, launch):
    """train.py for a run; it resumes from its newest checkpoint if there is one."""
    return [*launch, "train.py", *study.runs[name], *study.train, f"--base={study.base}",
            f"--out_dir={study.out_dir / name}", "--auto_resume=True"]


def is_complete(run_dir):
    """Is a run's newest checkpoint its last? train.py ends with status 0 when it is stopped."""
    found = checkpoints(run_dir)
    if not found:
        return False
    state = read_state(found[-1][1])
    return state["step"] >= state["steps"]


def trained_of(study, name):
    """The folders of those checkpoints of a run that are evaluated, oldest first."""
    found = [folder for _, folder in checkpoints(study.out_dir / name)]
    return found if study.checkpoint == "all" else found[-1:]


def model_words(study, name, download):
    """[the knobs that tell an evaluation what to judge], one list for each checkpoint or model."""
    if name in study.runs:
        return [[f"--model={folder}"] for folder in trained_of(study, name)]
    # an adapter is judged with its base
    where, *more = study.models[name] or [study.base]
    folder = fetch(where, download)
    if folder is None:
        return []
    model = [f"--model={folder}"]
    if is_adapter(folder):
        model = [f"--model={study.base}", f"--adapter={folder}"]
    return [[*model, *more, f"--out_dir={study.out_dir / name}"]]


def commands(study, name, download=True):
    """Yield (stage, command line) of a model or a run, in order.

    What follows a run's training is known only when it is trained: run each before the next."""
    if name in study.runs:
        yield "train", train_command(study, name, study.launch)
    for model in model_words(study, name, download):
        for evaluation in study.evals:
            yield evaluation[0], [*study.launch, *evaluation, *model]
    trained = trained_of(study, name)
    if study.spectrum is not None and trained:
        tuned = ",".join(map(str, trained))
        out = study.out_dir / name / "spectrum.json"
        yield "spectrum.py", ["spectrum.py", f"--base={study.base}", f"--tuned={tuned}",
                              f"--out={out}", *study.spectrum]


# ----------------------------------------------------------------------------- doing it
def writes(record):
    """What the results of a step in study.jsonl are known by: its script, and --name if given."""
    words = shlex.split(record["command"])
    return record["stage"], [word for word in words if word.startswith("--name=")]


def records_of(study):
    """The objects of study.jsonl, in the order in which it was done."""
    path = study.out_dir / "study.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def done_before(study):
    """{command line: seconds} of study.jsonl.

    Without what was done to a run that is deleted, is not complete, or was trained again since, and
    without an evaluation whose results were written over by one that the study no longer has."""
    asked = set()
    for name in [*study.models, *study.runs]:
        asked.update(shlex.join(command) for _, command in commands(study, name, download=False))

    # training makes what came before it void
    done = {}  # {run: {command line: record}}
    for record in records_of(study):
        of_run = done.setdefault(record["run"], {})
        if record["stage"] == "train":
            of_run.clear()
        elif record["command"] not in asked:
            for command, earlier in list(of_run.items()):
                if writes(earlier) == writes(record):
                    del of_run[command]
        of_run[record["command"]] = record

    # only of what is still there
    still_done = {}
    for name, of_run in done.items():
        folder = study.out_dir / name
        if is_complete(folder) if name in study.runs else folder.is_dir():
            for command, record in of_run.items():
                still_done[command] = record["seconds"]
    return still_done


def start(command, launch=(), output=None, threads=0):
    """Start one of our scripts; returns the subprocess.

    command begins with the words of `launch`, such as torchrun's, or with the script. output: where
    all that it prints goes; None = here. threads: of its computations, unless the environment says;
    0 = PyTorch's choice."""
    # torchrun and its like start Python themselves
    python = [sys.executable]
    if launch and command[:len(launch)] == launch:
        python = launch
        command = command[len(launch):]
    script, *words = command
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if threads:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    return subprocess.Popen([*python, *script_words(script), *words], text=True, stdout=output,
                            stderr=output, env=env)


def run_quietly(command):
    """Run one of our scripts and wait for it; returns (status, what it wrote to stderr)."""
    child = start(command, output=subprocess.PIPE)
    _, errors = child.communicate()
    return child.returncode, errors


def next_step(study, name, done):
    """(stage, command line) of a model's or a run's first step that is not done yet, or None."""
    for stage, command in commands(study, name):
        if shlex.join(command) not in done:
            return stage, command
    return None


def do_all(study, names):
    """Do and record every step that is not done yet; ValueError where one fails or is stopped."""
    left = list(names)
    running = {}  # {name: (stage, command line, process, when it began)}
    try:
        while True:
            # begin what there is room for; a run's next step comes before the next run
            for name in list(left):
                if name in running or len(running) == study.jobs:
                    continue
                done = done_before(study)
                step = next_step(study, name, done)
                if step is None:
                    left.remove(name)
                    continue
                stage, command = step
                now = {other: at[0] for other, at in running.items()} | {name: stage}
                print(f"\n{progress(study, names, done, now)}")
                print(f"\n{shlex.join(command)}", flush=True)
                began = time.time()
                running[name] = stage, command, begin(study, name, command), began
            if not running:
                return

            # wait for one to end
            ended = []
            while not ended:
                time.sleep(0.05)
                ended = [name for name, at in running.items() if at[2].poll() is not None]
            for name in ended:
                stage, command, process, began = running.pop(name)
                record(study, name, stage, command, process.returncode, time.time() - began)
    finally:
        # one of them failed, or this was stopped: train.py saves a checkpoint and ends
        for _, _, process, _ in running.values():
            process.terminate()
        for _, _, process, _ in running.values():
            process.wait()


def log_of(study, name):
    """The file that holds what a run's steps print, where several are at work."""
    return study.out_dir / "logs" / f"{name}.log"


def remove_other_spectrum(study, name, command):
    """Remove a run's spectrum.json that another command line made: spectrum.py would keep it."""
    made_by = shlex.join(command)
    for record in records_of(study):
        if record["run"] == name and record["stage"] == "spectrum.py":
            made_by = record["command"]
    if made_by != shlex.join(command):
        (study.out_dir / name / "spectrum.json").unlink(missing_ok=True)


def begin(study, name, command):
    """Start a step; returns its process."""
    study.out_dir.mkdir(parents=True, exist_ok=True)
    if command[0] == "spectrum.py":
        remove_other_spectrum(study, name, command)
    if study.jobs == 1:
        return start(command, study.launch)
    path = log_of(study, name)
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as output:
        return start(command, study.launch, output, max(1, available_cores() // study.jobs))


def record(study, name, stage, command, status, seconds):
    """Add a step that has ended to study.jsonl; ValueError if it failed or was stopped."""
    how = ""
    if status:
        how = f"ended with status {status}"
    elif stage == "train" and not is_complete(study.out_dir / name):
        how = "was stopped"
    if how:
        if study.jobs > 1:
            how += f" ({log_of(study, name)} says why)"
        raise ValueError(f"{name}: {stage} {how}; run the same command again to resume")
    append_jsonl(study.out_dir / "study.jsonl", {"run": name, "stage": stage,
                                                 "command": shlex.join(command),
                                                 "seconds": round(seconds, 1)})


# ----------------------------------------------------------------------------- the table
def progress(study, names, done, now=None):
    """The table: a line for each model or run, a column for each stage.

    done {command line: seconds}; now {name: stage} of what is running."""
    # the columns
    judging = list(dict.fromkeys(script for script, *_ in study.evals))
    stages = ["train", *judging]
    if study.spectrum is not None:
        stages.append("spectrum.py")
    rows = [["", *(stage.removesuffix(".py") for stage in stages)]]
    for name in names:
        # a stage has several commands where an evaluation has several settings or checkpoints
        times = {stage: [] for stage in stages}
        for stage, command in commands(study, name, download=False):
            times[stage].append(done.get(shlex.join(command)))
        # what to say of each stage; what cannot be done to this name is '-'
        row = [name]
        for stage, seconds in times.items():
            if seconds and None not in seconds:
                row.append(f"{sum(seconds) / 60:.1f} min")
            elif now and now.get(name) == stage:
                row.append("running")
            elif name in study.runs or stage in judging:
                row.append("to do")
            else:
                row.append("-")
        rows.append(row)

    # columns as wide as their longest cell
    widths = []
    for column in zip(*rows):
        widths.append(max(len(cell) for cell in column))
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
