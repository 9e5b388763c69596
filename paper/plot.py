"""
Stage 4: figures, as .png and .pdf, from what the other stages left.

    python -m paper.plot --runs='out/llama2-7b,out/gsm8k-*'   # every figure that there is data for
    python -m paper.plot --runs='out/*' --figures=learning,pareto --learning=gsm8k_strict_match
    python -m paper.plot --spectra=out/noise.json --benches=bench.json

    results.jsonl, log.jsonl --> plot_curves, plot_sweeps, plot_samples --.
    spectrum.json -------------> plot_spectra ----------------------------+--> figures/NAME.png
    bench.json, log.jsonl -----> plot_speed ------------------------------'

A run is a folder of train.py; a folder with results.jsonl alone is a base that was evaluated. Runs
that differ only in seed become one series, those that differ only in length its points. Of several
settings of one method and rank the curves show the one with the most lengths (then the paper's
form: all modules, alpha 2 r); the sweeps show the others.
Bars are 95% intervals: of the mean over seeds where there are three or more (Student's t), else of
the evaluation's items. Missing series are left out. Lines that cannot be read and values that are
no numbers are counted and reported at the end.
"""
import glob
from collections import Counter
from pathlib import Path

from configurator import configure
from paper.looks import STYLE, place_names, plt
from paper.plot_curves import Metrics, draw_curves, draw_pareto, draw_regularisers, draw_story
from paper.plot_peft import draw_peft
from paper.plot_samples import draw_diversity, draw_pass_at_k
from paper.plot_spectra import (draw_directions, draw_effective_ranks, draw_noise, draw_spectra,
                                ranks_of_changes)
from paper.plot_speed import draw_speed, draw_throughput, draw_training
from paper.plot_sweeps import draw_alphas, draw_learning_rates, draw_ranks, draw_targets
from paper.results import points_of, problems, read_json, read_run, setting_of, spectrum_fault
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
spectra = ()             # JSON of spectrum.py; none = the spectrum.json of the runs
benches = ()             # JSON of bench/train.py, generate.py or throughput.py
out_dir = 'figures'
figures = ()             # some of the names below; none = all that there is data for
# metrics, the first that a dataset has; 'loss NAME' is eval_loss.py's or train.py's val_data
learning = ('gsm8k_strict_match', 'humaneval_pass@1', 'loss val')   # of what was learned
forgetting = ('forgetting',)                                        # of what was forgotten
labels = ()              # METRIC=WORDS for the axes
x = 'auto'               # of curves; auto = epochs from one epoch on, else tokens
block = -1               # spectra: of this block; -1 = the middle one
formats = ('png', 'pdf')
dpi = 300

_choices = {'x': ('auto', 'tokens', 'epoch', 'step'), 'formats': ('png', 'pdf', 'svg'),
            'figures': ('story', 'learning', 'forgetting', 'pareto', 'ranks', 'targets',
                        'learning_rates', 'alphas', 'regularisers', 'pass_at_k', 'diversity',
                        'training', 'effective_rank', 'spectra', 'directions', 'noise', 'speed',
                        'throughput', 'peft')}


# ----------------------------------------------------------------------------- reading
def read_titles(labels):
    """('METRIC=WORDS', ...) -> {METRIC: WORDS}; ValueError for a label without '='."""
    titles = {}
    for label in labels:
        metric, equals, words = label.partition("=")
        if not equals:
            raise ValueError(f"labels: expected METRIC=WORDS, found {label!r}")
        titles[metric] = words
    return titles


def find_folders(patterns):
    """The folders that the patterns name, each once; what is not there is noted."""
    # a pattern that matches nothing stands for itself
    folders = []
    for pattern in patterns:
        for path in map(Path, sorted(glob.glob(pattern)) or [pattern]):
            if not path.exists():
                problems[f"{path}: no such folder, left out"] += 1
            elif path.is_dir() and path not in folders:
                folders.append(path)
    return folders


def read_runs_in(folders):
    """{folder: Run}, without those that have nothing to show."""
    found = {}
    for folder in folders:
        run = read_run(folder)
        if run.metrics or run.log:
            found[folder] = run
        else:
            problems[f"{run.name}: neither results nor a log, left out"] += 1
    return found


def read_spectra(files):
    """[(path, JSON)] of what spectrum.py wrote whole."""
    # what the figures of each kind need
    needed = {"noise": ("spectra", "differences"), "spectrum": ("checkpoints", "matrices")}
    loaded = []
    for path in map(Path, files):
        content = read_json(path)
        keys = needed.get(str(content.get("kind")), ("kind of spectrum",))
        fault = spectrum_fault(content) if content.get("kind") == "spectrum" else ""
        if fault:
            problems[f"{path}: no whole spectrum ({fault}), left out"] += 1
        elif all(content.get(key) for key in keys):
            loaded.append((path, content))
        elif content:
            problems[f"{path}: no whole spectrum, left out"] += 1
    return loaded


# ----------------------------------------------------------------------------- which figures
def figures_of_spectra(loaded, block):
    """[(figure, suffix of its file's name, function, arguments)] of every file of spectrum.py.

    Where there are several, a name has the run's folder in it, or the file's own name."""
    several = sum(content["kind"] == "spectrum" for _, content in loaded) > 1
    same_name = Counter(path.parent.name for path, _ in loaded)
    listed = []
    for path, content in loaded:
        suffix = ""
        if several and path.name == "spectrum.json":
            # runs of one name, in two studies, have the study's name as well
            first = -3 if same_name[path.parent.name] > 1 else -2
            suffix = "_" + "_".join(path.parts[first:-1])
        elif several:
            suffix = f"_{path.stem}"
        # the figures of this kind of file
        if content["kind"] == "noise":
            listed.append(("noise", suffix, draw_noise, (content,)))
        else:
            listed.append(("effective_rank", suffix, draw_effective_ranks, (content,)))
            listed.append(("spectra", suffix, draw_spectra, (content, block)))
            listed.append(("directions", suffix, draw_directions, (content,)))
    return listed


def save_figure(fig, name, out_dir, formats, dpi):
    """Write a figure in every format, under its name only when it is whole; returns the paths."""
    place_names(fig)
    # no dates: the same data make the same bytes
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    paths = []
    for ending in formats:
        path = Path(out_dir) / f"{name}.{ending}"
        partial = path.with_suffix(f".tmp.{ending}")
        fig.savefig(partial, dpi=dpi, bbox_inches="tight", pad_inches=0.03,
                    metadata=undated[ending])
        partial.rename(path)
        paths.append(path)
    plt.close(fig)
    return paths


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        metrics = Metrics(learning, forgetting, read_titles(labels), x)

        # what there is
        folders = find_folders(runs)
        found = read_runs_in(folders)
        read = list(found.values())
        beside = [folder / "spectrum.json" for folder in folders]
        loaded = read_spectra(spectra or [path for path in beside if path.is_file()])
        tables = [read_json(path) for path in benches]
        points, bases = points_of(read)
        settings = {folder: setting_of(run) for folder, run in found.items()}
        changes = {}
        if not figures or "story" in figures:
            taken = [(path, content) for path, content in loaded if content["kind"] == "spectrum"]
            changes = ranks_of_changes(taken, settings)

        # every figure: its name, the suffix of its file's name, what draws it
        listed = [
            ("learning", "", draw_curves, (points, bases, learning, metrics)),
            ("forgetting", "", draw_curves, (points, bases, forgetting, metrics)),
            ("pareto", "", draw_pareto, (points, bases, metrics)),
            ("ranks", "", draw_ranks, (points, bases, metrics)),
            ("targets", "", draw_targets, (points, bases, metrics)),
            ("learning_rates", "", draw_learning_rates, (points, bases, metrics)),
            ("alphas", "", draw_alphas, (points, bases, metrics)),
            ("regularisers", "", draw_regularisers, (points, bases, metrics)),
            ("pass_at_k", "", draw_pass_at_k, (read,)),
            ("diversity", "", draw_diversity, (read,)),
            ("story", "", draw_story, (points, bases, changes, metrics)),
            ("training", "", draw_training, (read,)),
            ("speed", "", draw_speed, (read, tables)),
            ("throughput", "", draw_throughput, (tables,)),
            *figures_of_spectra(loaded, block)]
        if "peft" in figures:  # of one study only, so it has to be asked for
            listed.append(("peft", "", draw_peft, (found, metrics)))

        # draw those that are wanted
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        plt.rcParams.update(STYLE)
        drawn = set()
        without = []
        for figure, suffix, draw_it, arguments in listed:
            if figures and figure not in figures:
                continue
            fig = draw_it(*arguments)
            name = figure + suffix
            if fig is None:
                without.append(name)
                continue
            while name in drawn:  # two files of one name
                name += "_2"
            drawn.add(name)
            print("wrote", ", ".join(map(str, save_figure(fig, name, out_dir, formats, dpi))))

        # what was not drawn, and why
        there = ", ".join(sorted({metric for run in read for metric in run.metrics}))
        if without and drawn:
            print(f"no data for: {', '.join(without)}; metrics found: {there}")
        elif without:
            print(f"no data for: {', '.join(without)}")
        for problem, count in problems.items():
            print(f"note: {problem}" if "left out" in problem else f"note: {count} {problem}")
        if not drawn:
            raise ValueError(
                f"nothing to draw from {len(read)} runs, {len(loaded)} spectra, {len(tables)} "
                f"benches; metrics found: {there or 'none'}; learning={','.join(learning)}, "
                f"forgetting={','.join(forgetting)}")
