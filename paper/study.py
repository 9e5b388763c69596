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

Finished steps are skipped, and what was stopped is resumed. Each kind of run is tried with train.py
--dry_run=True before the first one starts, and the knobs of all other steps are read. out_dir/NAME
is the run of train.py with its results.jsonl and spectrum.json, out_dir/figures what paper/plot.py
draws, out_dir/study.jsonl what was done and how long it took. A finished step is known by its whole
command line: change it, and it is done again; delete out_dir/NAME, and all of its steps are.

Of --jobs=N each has its share of the CPU's cores, and what it prints goes to out_dir/logs/NAME.log.

Runs that differ in learning rate and seed alone are a sweep. With --sweep='loss target' further
rates follow where the lowest such loss, of a seed or in the mean, lies at an end.
"""
import json
import math
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configurator import configure
from paper.results import read_run
from paper.stages import (Study, do_all, done_before, fetch, progress, run_quietly, start,
                          train_command)
from paper.sweeps import next_rate
from runtime import ROOT, available_cores, one_line_errors
from training.checkpoint import checkpoints

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


# ----------------------------------------------------------------------------- reading the knobs
def read_list(entries, knob):
    """'NAME words ...' -> {NAME: words}; ValueError for an empty entry or a name used twice."""
    named = {}
    for entry in entries:
        name, *words = shlex.split(entry) or [""]
        if not name or "/" in name or name.startswith("-") or name in named:
            raise ValueError(f"{knob}: {entry!r} should begin with a name that no other one has")
        for word in words:
            if word.startswith("--") and "=" not in word:
                raise ValueError(f"{knob}: {name}: write {word}=VALUE, without a blank")
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


# ----------------------------------------------------------------------------- before it starts
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
            read_words(plot), checkpoint, shlex.split(launch),
            jobs or available_cores())
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
