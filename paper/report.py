r"""
One page to look at a study: a single HTML file, which needs no server and no network.

    python -m paper.report --runs='out/smollm2/*' --learning='loss gsm8k_test' \
        --forgetting=hellaswag_loss --out=smollm2.html
    python -m paper.report --runs='out/code/*' --humaneval=HumanEval.jsonl.gz   # with its prompts

    results.jsonl, log.jsonl, spectrum.json --> figures, claims, results --.
    config.json ------------------------------> knobs that differ ---------+--> report.html
    step_N/eval_NAME.jsonl -------------------> items, side by side -------'

The items can be searched and filtered ("full right, r16 wrong"), by mouse or keyboard; the page's
address holds what is shown, so that it can be kept or sent. Of each run the newest checkpoint that
was evaluated is shown. Runs, claims and figures are read as by paper/claims.py and paper/plot.py.
"""
import base64
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configurator import configure
from evaluation.evals import read_items
from paper import claims
from paper.items import item_files, read_evaluations, share_paragraphs
from paper.looks import STYLE, method_name, plt
from paper.plot import find_folders, read_runs_in, read_spectra, read_titles, save_figure
from paper.plot_curves import Metrics, draw_curves, draw_pareto, draw_story
from paper.plot_samples import draw_diversity, draw_pass_at_k
from paper.plot_spectra import ranks_of_changes
from paper.plot_speed import draw_training
from paper.results import KNOBS, is_base, mean_of_seeds, points_of, problems, setting_of
from runtime import one_line_errors, write_whole

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
out = 'report.html'
title = 'Learning and forgetting'
# metrics, the first that there is; 'loss NAME' is eval_loss.py's or train.py's val_data
learning = ('gsm8k_strict_match', 'humaneval_pass@1', 'loss val')   # of what was learned
forgetting = ('forgetting',)                                        # of what was forgotten
labels = ()              # METRIC=WORDS for the axes
x = 'auto'               # of curves; auto = epochs from one epoch on, else tokens
fraction = '0.9'         # of the squares, for the effective rank in the claims
humaneval = ''           # HumanEval's problems, whose prompts and solutions the samples lack
_choices = {'x': ('auto', 'tokens', 'epoch', 'step')}

# knobs that differ between any two runs, and say nothing about them
OF_NO_INTEREST = {"out_dir", "resume", "auto_resume", "resume_from"}


# ----------------------------------------------------------------------------- figures
def make_figures(found, loaded, metrics):
    """[{"title", "source"}] of the figures that there is data for, as data URIs of SVG.

    found {folder: Run}; loaded [(path, JSON)] of the spectra."""
    read = list(found.values())
    points, bases = points_of(read)
    settings = {folder: setting_of(run) for folder, run in found.items()}
    changes = ranks_of_changes(loaded, settings)

    # the story has learning, forgetting and both in one; without spectra they stand alone
    story = draw_story(points, bases, changes, metrics)
    drawn = [("What each method learned and forgot", story)]
    if story is None:
        drawn = [
            ("Learning", draw_curves(points, bases, metrics.learning, metrics)),
            ("Forgetting", draw_curves(points, bases, metrics.forgetting, metrics)),
            ("Learning and forgetting", draw_pareto(points, bases, metrics))]
    drawn += [
        ("Loss while training: each step, and its running median", draw_training(read)),
        ("HumanEval: pass@k", draw_pass_at_k(read)),
        ("HumanEval: how samples differ", draw_diversity(read))]
    return [{"title": title, "source": data_uri(fig)} for title, fig in drawn if fig is not None]


def data_uri(fig):
    """A figure as the address of an image that holds it."""
    with tempfile.TemporaryDirectory() as folder:
        path, = save_figure(fig, "figure", folder, ("svg",), dpi=150)
        encoded = base64.b64encode(path.read_bytes()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


# ----------------------------------------------------------------------------- tables
def names_of(folders):
    """A name for each folder: its own, with those above it where that is another one's too."""
    names = {folder: folder.name for folder in folders}
    for above in range(2, 6):
        count = Counter(names.values())
        for folder, name in names.items():
            if count[name] > 1:
                names[folder] = "/".join(folder.resolve().parts[-above:])
    return names


def method_of(run, all_runs):
    """What was trained, in words."""
    if is_base(run, all_runs):
        return "base"
    if not run.config:
        return "not trained here"
    if run.config.get("scratch"):
        return "pretraining"
    return method_name(run.config.get("lora_rank"))


def place_of(folder, run, all_runs):
    """Where a run stands among others: bases, pretraining, full, LoRA from the lowest rank on."""
    kinds = ("base", "pretraining", "full")
    method = method_of(run, all_runs)
    kind = kinds.index(method) if method in kinds else len(kinds)
    return kind, run.config.get("lora_rank") or 0, str(folder)


def results_table(found, names, first):
    """{"head", "rows"} of each run's last values, 'value ± half' with a 95% interval.

    first: the metrics that stand in front."""
    metrics = set()
    for run in found.values():
        metrics |= run.metrics.keys()
    in_front = [metric for metric in first if metric in metrics]
    columns = in_front + sorted(metrics - set(in_front))
    rows = []
    for folder, run in found.items():
        last = max(run.places, default=0)
        cells = [names[folder], method_of(run, found.values()), str(last)]
        for metric in columns:
            value = run.metrics.get(metric, {}).get(last)
            cells.append(value_in_words(value))
        rows.append(cells)
    return {"head": ["run", "method", "step", *columns], "rows": rows}


def value_in_words(value):
    """'0.520 ± 0.027' of (value, standard error or None), '' of None."""
    if value is None:
        return ""
    mean, half = mean_of_seeds([value])
    interval = "" if half is None else f" ± {half:.3f}"
    return f"{mean:.3f}{interval}"


def knobs_table(found, names):
    """{"head", "rows"} of the knobs in which the finetuned runs differ; a knob that is newer than a
    run had its default in it."""
    configs = {}
    for folder, run in found.items():
        if run.config and not run.config.get("scratch"):
            configs[folder] = {**KNOBS, **run.config}
    columns = []
    for knob in KNOBS:
        values = {str(config[knob]) for config in configs.values()}
        if len(values) > 1 and knob not in OF_NO_INTEREST:
            columns.append(knob)
    rows = []
    for folder, config in configs.items():
        rows.append([names[folder], *(str(config[knob]) for knob in columns)])
    return {"head": ["run", *columns], "rows": rows}


def claims_table(folders, learned, forgotten, fraction):
    """({"head", "rows"}, why there is none): the claims of paper/claims.py.

    learned, forgotten: the metrics, or None where no run has one."""
    table = {"head": ["claim", "difference of", "value, 95% interval", "verdict"], "rows": []}
    if learned is None or forgotten is None:
        return table, "No run has a metric of what was learned and one of what was forgotten."
    try:
        changes, ranks, sizes = claims.read_runs(folders, learned, forgotten, fraction)
    except ValueError as error:
        return table, f"They cannot be checked: {error}."
    if not changes:
        return table, "No run is finished."
    for claim, rows in claims.claims(changes, ranks, sizes):
        for row in rows or [("", "", "no such runs")]:
            table["rows"].append([claim, *row])
            claim = ""  # named once
    return table, ""


def first_measured(names, found):
    """The first of the metrics that some run has, or None."""
    for name in names:
        if any(name in run.metrics for run in found.values()):
            return name
    return None


def read_tasks(path):
    """{task_id: record} of HumanEval's problems; {} without a path."""
    if not path:
        return {}
    records = read_items(path, {"task_id": str, "prompt": str}, "humaneval")
    return {record["task_id"]: record for record in records}


# ----------------------------------------------------------------------------- the page
def json_in_script(data):
    """JSON that can stand in a <script>: the '<' of </script, <!-- and <script is written \\u003c.

    The HTML standard names these three. Escaping every < > & ' makes answers in GSM8K's form, with
    their <<48/2=24>>, a seventh longer."""
    text = json.dumps(data, separators=(",", ":"))
    return Markup(re.sub("<(?=[/!sS])", r"\\u003c", text))


def render(**page):
    """The HTML of paper/report.html, in which all text is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json_in_script"] = json_in_script
    return environment.get_template("report.html").render(page)


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())
        metrics = Metrics(learning, forgetting, read_titles(labels), x)
        tasks = read_tasks(humaneval)

        # what there is
        folders = find_folders(runs)
        found = read_runs_in(folders)
        if not found:
            raise ValueError(f"runs: no folder with results or a log is named {', '.join(runs)}")
        every_run = list(found.values())
        found = dict(sorted(found.items(), key=lambda pair: place_of(*pair, every_run)))
        beside = [folder / "spectrum.json" for folder in found]
        loaded = []
        for path, content in read_spectra([path for path in beside if path.is_file()]):
            if content["kind"] == "spectrum":
                loaded.append((path, content))
        names = names_of(found)
        asked = [folder for folder in found if item_files(folder)]
        items = read_evaluations(asked, tasks)
        paragraphs = share_paragraphs(items)

        # figures and tables
        plt.rcParams.update(STYLE)
        plt.rcParams["svg.hashsalt"] = "report"  # the same data make the same bytes
        figures = make_figures(found, loaded, metrics)
        learned = first_measured(learning, found)
        forgotten = first_measured(forgetting, found)
        noted = Counter(problems)
        problems.clear()  # the claims read the same files, and would note the same again
        claimed, no_claims = claims_table(list(found), learned, forgotten, fraction)
        noted |= problems

        # the page
        notes = [f"{count} × {problem}" for problem, count in noted.items()]
        columns = []
        for folder in asked:
            method = method_of(found[folder], every_run)
            columns.append({"name": names[folder], "method": method})
        text = render(title=title, n_runs=len(found), figures=figures, claims=claimed,
                      no_claims=no_claims, learned=learned, forgotten=forgotten, notes=notes,
                      results=results_table(found, names, (*learning, *forgetting)),
                      knobs=knobs_table(found, names),
                      data={"runs": columns, "paragraphs": paragraphs, "evaluations": items})
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
        counts = [f"{len(part['items'])} of {part['name']}" for part in items]
        print(f"wrote {out}: {len(found)} runs, {len(figures)} figures, "
              f"items: {', '.join(counts) or 'none'}; {len(text) / 1e6:.1f} MB")
        for note in notes:
            print(f"note: {note}")
