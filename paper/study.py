"""
A study: train, evaluate, take spectra and draw, for a list of runs.

    python -m paper.study config/study_smollm2.py                 # all of it, one process at a time
    python -m paper.study config/regret.py --jobs=8               # small runs: eight at a time
    python -m paper.study config/study_smollm2.py --dry_run=True  # what is done and what is left
    python -m paper.study config/published.py                     # the paper's own adapters
    # on a cluster a run a job, then once without --only
    sbatch --array=0-11 --wrap='python -m paper.study config/mine.py --only=$SLURM_ARRAY_TASK_ID'

              train       eval_gsm8k    spectrum
    base      -           2.1 min       -
    r16-75    11.0 min    running       to do

Finished steps are skipped, and what was stopped is resumed. Every run is tried with train.py
--dry_run=True before the first one starts. out_dir/NAME is the run of train.py with its
results.jsonl and spectrum.json, out_dir/figures what paper/plot.py draws, out_dir/study.jsonl what
was done and how long it took. A finished step is known by its whole command line: change it, and it
is done again; delete out_dir/NAME, and all of its steps are.

Of --jobs=N each has its share of the CPU's cores, and what it prints goes to out_dir/logs/NAME.log.

Runs that differ in learning rate and seed alone are a sweep. With --sweep='loss target' further
rates follow where the lowest such loss, of a seed or in the mean, lies at an end.
"""
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configurator import configure
from llama.adapter_config import is_adapter
from paper.results import read_run
from paper.sweeps import next_rate
from runtime import ROOT, append_jsonl, available_cores, one_line_errors, script_words
from text.records import why_not_fetched
from training.checkpoint import checkpoints, read_state

# -----------------------------------------------------------------------------
out_dir = ''             # folder of the study
base = ''                # of runs and adapters: a model folder, or hf://OWNER/NAME[@REVISION]
models = ()              # not trained here: 'NAME FOLDER' or 'NAME hf://...'; 'base' is base itself
runs = ()                # trained here: 'NAME config/x.py --knob=value ...', what train.py takes
train = ''               # what train.py takes in every run: '--data=data/gsm8k --global_batch=64'
evals = ()               # 'eval_gsm8k.py --limit=200', ...: without model, which is filled in
spectrum = ''            # what spectrum.py takes, such as '--subspaces=1,16'; 'none' = no spectra
plot = ''                # what paper/plot.py takes; 'none' = no figures
sweep = ''               # metric, less is better: add learning rates until its best lies inside
sweep_more = 4           # learning rates that may be added to one sweep
expected = ()            # 'NAME METRIC=VALUE ...': numbers to print beside one's own
checkpoint = 'last'      # of each run, to evaluate: last | all that were kept
only = ()                # names of models and runs, or numbers from 0; none = all, and the figures
jobs = 1                 # models and runs at a time; 0 = as many as there are cores
launch = ''              # before train.py and the evaluations: 'torchrun --nproc_per_node=8'
dry_run = False          # only check, and print the table

_choices = {'checkpoint': ('last', 'all')}


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
    jobs: int


# ----------------------------------------------------------------------------- reading the knobs
def read_list(entries, knob):
    """'NAME words ...' -> {NAME: words}; ValueError for an empty entry or a name used twice."""
    named = {}
    for entry in entries:
        name, *words = shlex.split(entry) or [""]
        if not name or "/" in name or name.startswith("-") or name in named:
            raise ValueError(f"{knob}: {entry!r} should begin with a name that no other one has")
        named[name] = words
    return named


def read_words(text):
    """The words of a command line; None for 'none'."""
    return None if text == "none" else shlex.split(text)


def check_names(study, expected):
    """ValueError for a study without names, with one name for two things, or with unknown ones."""
    # there is something to do, each name means one thing, and numbers belong to a name
    names = [*study.models, *study.runs]
    if not study.base or not names:
        raise ValueError("out_dir, base and models or runs have to be set; see --help")
    both = set(study.models) & set(study.runs)
    if both:
        raise ValueError(f"models and runs share the name {', '.join(sorted(both))}")
    unknown = [name for name in expected if name not in names]
    if unknown:
        raise ValueError(f"expected: no model or run is named {', '.join(unknown)}")


def chosen(names, only):
    """Those of the names that `only` asks for, by name or by number; all if it is empty."""
    wanted = set()
    for asked in only:
        if asked in names:
            wanted.add(asked)
        elif asked.isdigit() and int(asked) < len(names):
            wanted.add(names[int(asked)])
        else:
            there = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise ValueError(f"only: {asked} not found; there are {there}")
    return [name for name in names if name in wanted or not wanted]


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


# ----------------------------------------------------------------------------- what there is to do
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
def done_before(study):
    """{command line: seconds} of study.jsonl.

    Without what was done to a run that is deleted, is not complete, or was trained again since."""
    # in the order in which it was done: training makes what came before it void
    path = study.out_dir / "study.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    done = {}  # {run: {command line: seconds}}
    for line in lines:
        record = json.loads(line)
        if record["stage"] == "train":
            done[record["run"]] = {}
        done.setdefault(record["run"], {})[record["command"]] = record["seconds"]

    # only of what is still there
    still_done = {}
    for name, of_run in done.items():
        folder = study.out_dir / name
        if is_complete(folder) if name in study.runs else folder.is_dir():
            still_done.update(of_run)
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


def check_files(study, names):
    """ValueError for a model that is no model folder, and for an evaluation without a script."""
    # model folders, by the knob that names them
    folders = {"base": study.base}
    for name in names:
        if study.models.get(name):
            folders[f"models: {name}"] = study.models[name][0]
    for knob, folder in folders.items():
        if folder.startswith("hf://"):
            continue
        configs = [Path(folder) / "config.json", Path(folder) / "adapter_config.json"]
        if not any(path.is_file() for path in configs):
            raise ValueError(f"{knob}: {folder} holds neither config.json nor adapter_config.json")
    # scripts
    for script, *_ in study.evals:
        if not (ROOT / script).is_file():
            raise ValueError(f"evals: no script named {script}")


def check_commands(study, names):
    """Refuse a study one of whose commands has impossible knobs, before any of them starts."""
    # runs are planned, other scripts only read their knobs
    planned = {}  # {what the user wrote: command}
    downloaded = not study.base.startswith("hf://")
    if not downloaded:
        print(f"{study.base} is not downloaded yet, so runs that train it are not checked")
    seen = set()
    for name in names:
        if name not in study.runs or not downloaded or checkpoints(study.out_dir / name):
            continue
        # of runs that differ in learning rate and seed alone the first is enough
        kept, _ = without(study.runs[name], "learning_rate", "seed")
        if tuple(kept) not in seen:
            seen.add(tuple(kept))
            text = f"runs: {name}: {shlex.join(study.runs[name])}"
            planned[text] = [*train_command(study, name, launch=[]), "--dry_run=True"]
    others = list(study.evals)
    if study.spectrum is not None:
        others.append(["spectrum.py", *study.spectrum])
    if study.plot is not None:
        others.append(["paper/plot.py", *study.plot])
    for command in others:
        planned[shlex.join(command)] = [*command, "--help"]

    # a few at a time, as each spends most of its seconds on imports
    with ThreadPoolExecutor(min(4, available_cores())) as pool:
        checks = {}
        for text, command in planned.items():
            checks[text] = pool.submit(run_quietly, command)
        for text, check in checks.items():
            status, errors = check.result()
            if status:
                raise ValueError(f"{text}: {errors.strip()}")
            print("checked", text)


def next_step(study, name, done):
    """(stage, command line) of a model's or a run's first step that is not done yet, or None."""
    for stage, command in commands(study, name):
        if shlex.join(command) not in done:
            return stage, command
    return None


def do_all(study, names):
    """Do and record every step that is not done yet; ValueError where one fails or is stopped."""
    cores = available_cores()
    jobs = study.jobs or cores
    threads = max(1, cores // jobs) if jobs > 1 else 0
    left = list(names)
    running = {}  # {name: (stage, command line, process, when it began)}
    try:
        while True:
            # begin what there is room for; a run's next step comes before the next run
            for name in list(left):
                if name in running or len(running) == jobs:
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
                running[name] = stage, command, begin(study, name, command, jobs, threads), began
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


def begin(study, name, command, jobs, threads):
    """Start a step; returns its process."""
    study.out_dir.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        return start(command, study.launch)
    path = log_of(study, name)
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as output:
        return start(command, study.launch, output, threads)


def record(study, name, stage, command, status, seconds):
    """Add a step that has ended to study.jsonl; ValueError if it failed or was stopped."""
    how = ""
    if status:
        how = f"ended with status {status}"
    elif stage == "train" and not is_complete(study.out_dir / name):
        how = "was stopped"
    if how:
        if log_of(study, name).is_file():
            how += f" ({log_of(study, name)} says why)"
        raise ValueError(f"{name}: {stage} {how}; run the same command again to resume")
    append_jsonl(study.out_dir / "study.jsonl", {"run": name, "stage": stage,
                                                 "command": shlex.join(command),
                                                 "seconds": round(seconds, 1)})


# ----------------------------------------------------------------------------- sweeps
def without(words, *knobs):
    """The words of a command line without these knobs, and {knob: value} of those left out."""
    kept = []
    taken = {}
    for word in words:
        knob, _, value = word.removeprefix("--").partition("=")
        if knob in knobs:
            taken[knob] = value
        else:
            kept.append(word)
    return kept, taken


def sweeps_of(runs):
    """{what its runs share: {rate: {seed: name}}}, for runs that differ in rate and seed."""
    found = {}
    for name, words in runs.items():
        kept, taken = without(words, "learning_rate", "seed")
        if "learning_rate" in taken:
            by_rate = found.setdefault(tuple(kept), {})
            by_seed = by_rate.setdefault(float(taken["learning_rate"]), {})
            by_seed[taken.get("seed")] = name
    return found


def last_value(folder, metric):
    """A metric at the end of a run; ValueError if it was not measured there."""
    measured = read_run(folder).metrics.get(metric, {})
    if not measured:
        raise ValueError(f"sweep: {folder} has no {metric!r}")
    value, _ = measured[max(measured)]
    return value


def further_runs(study, asked, metric, most):
    """{name: words} of the runs that follow where a sweep's best lies at an end: a rate for each.

    asked: the runs that the study began with; at `most` rates more than these a sweep stays as it
    is. ValueError for a run without its rate in its name."""
    before = sweeps_of(asked)
    further = {}
    for shared, by_rate in sweeps_of(study.runs).items():
        of_seeds = {}  # {seed: {rate: loss}}
        for rate, by_seed in by_rate.items():
            for seed, name in by_seed.items():
                losses = of_seeds.setdefault(seed, {})
                losses[rate] = last_value(study.out_dir / name, metric)
        following = next_rate(list(of_seeds.values()))
        if following is None:
            continue
        # the runs at the end that it lies beyond become the following ones by another rate
        end = min(by_rate, key=lambda rate: abs(math.log(rate / following)))
        names = list(by_rate[end].values())
        tried = ", ".join(f"{rate:g}" for rate in sorted(by_rate))
        if len(by_rate) >= len(before[shared]) + most:
            print(f"{names[0]}: of {tried} a best one is still at the end; no more are tried")
            continue
        print(f"{names[0]}: of {tried} a best one is at the end; {following:g} follows")
        for name in names:
            if f"{end:g}" not in name:
                raise ValueError(f"runs: {name}: a rate is added to its sweep, in whose name it "
                                 f"takes the place of {end:g}, which is missing there")
            words, _ = without(study.runs[name], "learning_rate")
            new_name = name.replace(f"{end:g}", f"{following:g}")
            further[new_name] = [*words, f"--learning_rate={following:g}"]
    return further


# ----------------------------------------------------------------------------- tables
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


def results_table(study, names, expected):
    """The last value of every metric of each model and run, and what was expected beside it."""
    lines = []
    for name in names:
        wanted = dict(word.split("=", 1) for word in expected.get(name, []))
        path = study.out_dir / name / "results.jsonl"
        found = path.read_text().splitlines() if path.is_file() else []
        # of each metric the record of the last step
        records = sorted(map(json.loads, found), key=lambda record: record["step"])
        latest = {record["metric"]: record for record in records}
        for metric, record in latest.items():
            line = (f"{name:24} step {record['step']:<7} {metric:28} "
                    f"{record['value']:.4f} +- {record['stderr']:.4f}  n={record['n']}")
            if metric in wanted:
                line += f"   expected {wanted[metric]}"
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        if jobs < 0:
            raise ValueError(f"jobs={jobs}: expected a number from 0 up")
        if not out_dir:
            raise ValueError("out_dir, base and models or runs have to be set; see --help")
        # what there is to do
        expected = read_list(expected, "expected")
        study = Study(
            Path(out_dir), base, read_list(models, "models"), read_list(runs, "runs"),
            shlex.split(train), [shlex.split(text) for text in evals], read_words(spectrum),
            read_words(plot), checkpoint, shlex.split(launch), jobs)
        check_names(study, expected)
        names = chosen([*study.models, *study.runs], only)
        study.base = fetch(base, download=not dry_run) or base

        # before anything starts
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        check_files(study, names)
        check_commands(study, names)
        if dry_run:
            print(progress(study, names, done_before(study)))
            raise SystemExit

        # train, evaluate, take spectra
        asked = dict(study.runs)
        try:
            do_all(study, names)
            while sweep and not only:
                further = further_runs(study, asked, sweep, sweep_more)
                if not further:
                    break
                study.runs.update(further)
                names += further
                do_all(study, names)
        except KeyboardInterrupt:
            raise ValueError("stopped; run the same command again to resume") from None
        print(f"\n{progress(study, names, done_before(study))}")
        print(f"\n{results_table(study, names, expected)}")

        # draw, once everything is there
        if not only and study.plot is not None:
            folders = ",".join(str(study.out_dir / name) for name in names)
            status = start(["paper/plot.py", f"--runs={folders}",
                            f"--out_dir={study.out_dir / 'figures'}", *study.plot]).wait()
            if status:
                raise ValueError(f"plot.py ended with status {status}; "
                                 "run the same command again to draw")
