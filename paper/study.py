"""
A study: train, evaluate, take spectra and draw, for a list of runs. What is done is skipped, what was stopped goes on.

    python -m paper.study config/study_smollm2.py                 # all of it, one process at a time
    python -m paper.study config/study_smollm2.py --dry_run=True  # the table of what is done and what is left
    python -m paper.study config/published.py                     # the paper's own adapters, beside the paper's numbers
    sbatch --array=0-11 --wrap='python -m paper.study config/mine.py --only=$SLURM_ARRAY_TASK_ID'   # a run a job, then once without

Every run is tried with train.py --dry_run=True before the first one starts. out_dir/NAME is the run of train.py with
its results.jsonl and spectrum.json, out_dir/figures what paper/plot.py draws, out_dir/study.jsonl what was done and how long
it took. A finished step is known by its whole command line: change it, and it is done again; delete out_dir/NAME, and all is.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from training.checkpoint import checkpoints, read_state
from configurator import configure
from lora import is_adapter
from runtime import ROOT, append_jsonl, one_line_errors, script_words

# -----------------------------------------------------------------------------
out_dir = ''             # folder of the study
base = ''                # model folder, or hf://OWNER/NAME[@REVISION]: trained in the runs, and the base of adapters in `models`
models = ()              # not trained here: 'NAME FOLDER' or 'NAME hf://OWNER/NAME[@REVISION]'; 'base' is base itself
runs = ()                # trained here: 'NAME config/x.py --knob=value ...', what train.py takes
train = ''               # what train.py takes in every run, such as '--data=data/gsm8k --global_batch=64'
evals = ()               # 'eval_gsm8k.py --limit=200', ...: without model, which is filled in
spectrum = ''            # what spectrum.py takes, such as '--subspaces=1,16'; 'none' = no spectra
plot = ''                # what paper/plot.py takes; 'none' = no figures
expected = ()            # 'NAME METRIC=VALUE ...': numbers to print beside one's own
checkpoint = 'last'      # of each run, to evaluate: last | all that were kept
only = ()                # names of models and runs, or their numbers from 0; none = all, and then the figures
launch = ''              # before train.py and the evaluations: 'torchrun --nproc_per_node=8'
dry_run = False          # only check, and print the table
_choices = {'checkpoint': ('last', 'all')}


# ----------------------------------------------------------------------------- what there is to do
def read_list(entries, knob):
    """'NAME words ...' -> {NAME: words}; raises ValueError for an empty entry or a name that stands twice."""
    named = {}
    for entry in entries:
        name, *words = shlex.split(entry) or [""]
        if not name or "/" in name or name.startswith("-") or name in named:
            raise ValueError(f"{knob}: {entry!r} should begin with a name that no other one has")
        named[name] = words
    return named


def chosen(names):
    """The names that `only` asks for."""
    if unknown := [n for n in only if n not in names and not (n.isdigit() and int(n) < len(names))]:
        raise ValueError(f"only: {', '.join(unknown)} not found; there are {', '.join(f'{i} {n}' for i, n in enumerate(names))}")
    wanted = {n if n in names else names[int(n)] for n in only}
    return [n for n in names if n in wanted or not wanted]


def is_run(name):
    """Whether a name is of `runs`, so trained here, and not of `models`."""
    return any(shlex.split(entry)[0] == name for entry in runs)


def fetch(where, download=True):
    """A folder as it stands; hf://OWNER/NAME[@REVISION] is downloaded to the hub's cache, or None if it is not there yet
    and is not to be downloaded."""
    if not where.startswith("hf://"):
        return where
    from huggingface_hub import errors, snapshot_download
    repo, _, revision = where.removeprefix("hf://").partition("@")
    try:
        return snapshot_download(repo, revision=revision or None, local_files_only=not download,
                                 allow_patterns=["*.json", "*.safetensors", "tokenizer.model"])
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as e:
        if not download:
            return None
        raise ValueError(f"{where} cannot be fetched ({type(e).__name__}: {e}); for gated models set HF_TOKEN, without a "
                         f"network download {repo} elsewhere and name its folder") from None


def train_command(name, words, base, launch):
    """train.py for a run, going on from its newest checkpoint if there is one."""
    return [*shlex.split(launch), "train.py", *words, *shlex.split(train), f"--base={base}", f"--out_dir={Path(out_dir) / name}",
            "--auto_resume=True"]


def is_complete(name):
    """Whether the newest checkpoint of a run is its last: train.py ends with status 0 when it is asked to stop."""
    if not (found := checkpoints(Path(out_dir) / name)):
        return False
    state = read_state(found[-1][1])
    return state["step"] >= state["steps"]


def trained_of(name):
    """[(step, folder)] of the checkpoints of a run that are looked at."""
    found = checkpoints(Path(out_dir) / name)
    return found if checkpoint == "all" else found[-1:]


def judged(name, words, base, download=True):
    """The knobs that tell an evaluation what to judge: [[knob, ...]], one list for each evaluation of a model or run."""
    if is_run(name):
        return [[f"--model={folder}"] for _, folder in trained_of(name)]
    if (folder := fetch(words[0], download) if words else base) is None:
        return []
    which = [f"--model={base}", f"--adapter={folder}"] if is_adapter(folder) else [f"--model={folder}"]
    return [[*which, *words[1:], f"--out_dir={Path(out_dir) / name}"]]


def commands(name, words, base, download=True):
    """Yield (stage, command line) of a model or a run, in order; evaluations are known once it is trained or downloaded."""
    if is_run(name):
        yield "train", train_command(name, words, base, launch)
    for what in judged(name, words, base, download):
        for text in evals:
            yield text.split()[0], [*shlex.split(launch), *shlex.split(text), *what]
    if spectrum != "none" and (trained := [path for _, path in trained_of(name)]):
        yield "spectrum.py", ["spectrum.py", f"--base={base}", f"--tuned={','.join(map(str, trained))}",
                              f"--out={Path(out_dir) / name / 'spectrum.json'}", *shlex.split(spectrum)]


# ----------------------------------------------------------------------------- doing it
def done_before():
    """{command line: seconds} of study.jsonl, without what was done to a run that has been deleted or trained anew since."""
    is_there = lambda name: is_complete(name) if is_run(name) else (Path(out_dir) / name).is_dir()
    path, done = Path(out_dir) / "study.jsonl", {}
    for record in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
        of_run = {} if record["stage"] == "train" else done.get(record["run"], {})
        done[record["run"]] = of_run | {record["command"]: record["seconds"]}
    return {command: seconds for name, of_run in done.items() if is_there(name) for command, seconds in of_run.items()}


def run(command, quiet=False):
    """Run one of our scripts; SIGTERM and Ctrl-C reach it, and it is waited for. Returns status, stderr."""
    launched = shlex.split(launch) if launch and not quiet and command[0] == shlex.split(launch)[0] else []
    script, *words = command[len(launched):]
    python = launched or [sys.executable]
    child = subprocess.Popen([*python, *script_words(script), *words], text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                             **dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) if quiet else {})
    try:
        _, err = child.communicate()
    except KeyboardInterrupt:  # train.py saves a checkpoint and ends
        child.terminate()
        child.wait()
        raise
    return child.returncode, err


def check_all(entries, base):
    """Refuse a study one of whose commands has an impossible combination of knobs, before any of them starts."""
    for knob, where in [("base", base), *((f"models: {name}", words[0]) for name, words in entries.items()
                                          if words and not is_run(name))]:
        if not where.startswith("hf://") and not any((Path(where) / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise ValueError(f"{knob}: {where} holds neither config.json nor adapter_config.json")
    if unknown := [text for text in evals if not (ROOT / text.split()[0]).is_file()]:
        raise ValueError(f"evals: no script named {unknown[0].split()[0]}")
    if base.startswith("hf://"):
        print(f"{base} is not downloaded yet, so runs that train it are not checked")
    planned = {f"runs: {name}: {shlex.join(words)}": [*train_command(name, words, base, launch=""), "--dry_run=True"]
               for name, words in entries.items()
               if is_run(name) and not base.startswith("hf://") and not checkpoints(Path(out_dir) / name)}
    others = [f"{script} {words}" for script, words in (("spectrum.py", spectrum), ("paper/plot.py", plot)) if words != "none"]
    planned |= {text: [*shlex.split(text), "--help"] for text in [*evals, *others]}
    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        for text, (status, err) in zip(planned, pool.map(partial(run, quiet=True), planned.values())):
            if status:
                raise ValueError(f"{text}: {err.strip()}")
            print("checked", text)


def progress(entries, done, now=()):
    """The table: a line a model or run, a column a stage, with minutes where it is done."""
    judging = dict.fromkeys(text.split()[0] for text in evals)
    stages = ["train", *judging, *([] if spectrum == "none" else ["spectrum.py"])]
    rows = [["", *(stage.removesuffix(".py") for stage in stages)]]
    for name, words in entries.items():
        times = {stage: [] for stage in stages}  # of its commands: an evaluation with several settings, of several checkpoints
        for stage, command in commands(name, words, base, download=False):
            times[stage].append(done.get(shlex.join(command)))
        rows.append([name, *(f"{sum(found) / 60:.1f} min" if found and None not in found else "running" if (name, stage) == now
                             else "to do" if is_run(name) or stage in judging else "-" for stage, found in times.items())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def results(entries):
    """The last value of every metric of each model and run as a table, with what was expected beside it."""
    wanted = {name: dict(word.split("=", 1) for word in words) for name, words in read_list(expected, "expected").items()}
    lines = []
    for name in entries:
        path = Path(out_dir) / name / "results.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        latest = {record["metric"]: record for record in sorted(found, key=lambda record: record["step"])}
        for metric, record in latest.items():
            beside = f"   expected {wanted[name][metric]}" if metric in wanted.get(name, {}) else ""
            lines.append(f"{name:24} step {record['step']:<7} {metric:28} {record['value']:.4f} +- {record['stderr']:.4f}"
                         f"  n={record['n']}{beside}")
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        everything = read_list(models, "models") | read_list(runs, "runs")
        if not out_dir or not base or not everything:
            raise ValueError("out_dir, base and models or runs have to be set; see --help")
        if twice := set(read_list(models, "models")) & set(read_list(runs, "runs")):
            raise ValueError(f"models and runs share the name {', '.join(twice)}")
        if stray := [name for name in read_list(expected, "expected") if name not in everything]:
            raise ValueError(f"expected: no model or run is named {', '.join(stray)}")
        entries = {name: everything[name] for name in chosen(list(everything))}
        base = fetch(base, not dry_run) or base
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        check_all(entries, base)
        if dry_run:
            print(progress(entries, done_before()))
            raise SystemExit
        try:
            for name, words in entries.items():
                for stage, command in commands(name, words, base):
                    if shlex.join(command) in (done := done_before()):
                        continue
                    print(f"\n{progress(entries, done, (name, stage))}\n\n{shlex.join(command)}", flush=True)
                    Path(out_dir).mkdir(parents=True, exist_ok=True)
                    started = time.time()
                    status, _ = run(command)
                    if status or stage == "train" and not is_complete(name):
                        how = f"ended with status {status}" if status else "was stopped"
                        raise ValueError(f"{name}: {stage} {how}; the same command goes on from there")
                    append_jsonl(Path(out_dir) / "study.jsonl", {"run": name, "stage": stage, "command": shlex.join(command),
                                                                 "seconds": round(time.time() - started, 1)})
        except KeyboardInterrupt:
            raise ValueError("stopped; the same command goes on from there") from None
        print(f"\n{progress(entries, done_before())}\n\n{results(entries)}")
        if not only and plot != "none":
            folders = ",".join(str(Path(out_dir) / name) for name in entries)
            status, _ = run(["paper/plot.py", f"--runs={folders}", f"--out_dir={Path(out_dir) / 'figures'}", *shlex.split(plot)])
            if status:
                raise ValueError(f"plot.py ended with status {status}; the same command draws again")
