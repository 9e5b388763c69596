"""study.py and config/: the paper's runs in miniature through train, evaluation and plot; what is done is skipped."""
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, need, run_here, run_stage, run_warm
from samples import stories, word_problems
from warm import Warm

from paper.stages import Study, commands, done_before, fetch, is_complete, progress
from paper.study import further_runs, sweeps_of

CONFIGS = ("math_cpt", "code_cpt", "math_ift", "code_ift", "tulu_ift")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Token folders {cpt, ift} for stories260k."""
    folder, base = tmp_path_factory.mktemp("data"), need("data/stories260k")
    problems = word_problems(folder / "train.jsonl", 60)
    for kind, source, knobs in (("cpt", stories(folder / "stories.txt", 60), ["--max_tokens=8192"]),
                                ("ift", problems, ["--template=Q: {question}\nA:", "--response_field=answer",
                                                   "--packing=paper", "--paper_ranks=1", "--paper_batch=4",
                                                   "--paper_epochs=2"])):
        result = run_here("prepare_data.py", f"--kind={kind}", f"--source={source}", f"--tokenizer={base}",
                          "--seq_len=256", "--val_fraction=0", f"--out_dir={folder / kind}", *knobs)
        assert result.returncode == 0, result.stderr
    return folder


def study_of(out_dir, models=(), runs=(), evals=(), launch=()):
    """A Study without spectra and figures."""
    return Study(out_dir=out_dir, base="b", models=dict(models), runs=dict(runs), train=[], evals=list(evals), spectrum=None,
                 plot=None, checkpoint="last", launch=list(launch), jobs=1)


def run_study(path, text, *argv):
    path.write_text(text)
    return run_warm("-m", "paper.study", path, *argv, timeout=900)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("rank", [0, 16, 256])
def test_learning_rates_are_the_papers(config, rank):
    want = {"math_cpt": (1e-5, 4e-5, 4e-5), "code_cpt": (1e-5, 1e-5, 1e-5), "math_ift": (1e-5, 1e-4, 5e-5),
            "code_ift": (5e-5, 2e-4, 1e-4), "tulu_ift": (5e-6, 1e-4, 1e-4)}[config][(0, 16, 256).index(rank)]
    help_text = run_here("train.py", ROOT / f"config/{config}.py", f"--lora_rank={rank}", "--help").stdout
    line, = (line for line in help_text.splitlines() if line[2:].startswith("learning_rate ="))
    assert line.startswith("  ") if want == 1e-4 else f"-> {want!r}" in line  # 1e-4 is train.py's own


@pytest.mark.parametrize("config, knobs, words", [
    ("math_cpt", [ROOT / "config/cpt_durations.py", "--max_tokens=4e9", "--out_dir=out/math/4B"],
     ["resume_from = 'out/math/20B/step_4069'", "5,086 steps"]),
    ("math_cpt", [], ["25,431 steps of 192 rows = 786,432 tokens", "together 19,999,752,192 tokens"]),
    ("code_cpt", ["--lora_rank=256"], ["25,431 steps", f"{2498560 * 256:,} trained"]),
    ("math_ift", ["--lora_rank=16"], ["of 768 rows = 786,432 tokens", f"{2498560 * 16:,} trained"]),
    ("tulu_ift", ["--lora_rank=64"], [f"{2498560 * 64:,} trained", "= 6 epochs"]),
    *(("code_ift", [f"--max_epochs={n}"], [f"{193 * n:,} steps of 192 rows", "6,738,415,616 trained, in full"]) for n in (1, 4, 16))])
def test_plan_of_every_config_has_the_papers_steps(config, knobs, words):
    result = run_here("train.py", ROOT / f"config/{config}.py", "--dry_run=True", "--gpu=H100", "--gpus=32", *knobs)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in words), result.stdout


MINI = ("--global_batch=4", "--microbatch=2", "--max_steps=3", "--save_interval=0", "--seq_len=256", "--device=cpu",
        "--dtype=float32", "--compile=False")


def gsm8k(folder):
    """Knobs of eval_gsm8k.py for two short answers to problems of our own."""
    test = word_problems(folder / "test.jsonl", 4, seed=1)
    train = word_problems(folder / "shots.jsonl", 4, seed=2)
    return ["--limit=2", "--shots=1", "--max_new_tokens=8", f"--test_data={test}", f"--train_data={train}", "--device=cpu"]


def test_miniature_of_every_config(tmp_path, tokens):
    """Each of the configs with its own knobs and a tiny model trains, is evaluated, and is drawn."""
    for i, name in enumerate(CONFIGS):
        out = tmp_path / name
        for argv in (["train.py", ROOT / f"config/{name}.py", f"--base={need('data/stories260k')}", f"--out_dir={out}",
                      f"--data={tokens}/{name[-3:]}", f"--lora_rank={i % 2 * 2}", *MINI],
                     ["eval_gsm8k.py", f"--model={out}/step_3", *gsm8k(tmp_path)]):
            result = run_here(*argv)
            assert result.returncode == 0, result.stderr
        config = json.loads((out / "config.json").read_text())["config"]
        assert config["doc_mask"] is False and config["loss_norm"] == ("paper" if "ift" in name else "token")
        assert config["schedule"] == ("cosine" if "ift" in name else "inv_sqrt") and config["lora_rank"] == i % 2 * 2
    drawn = run_here("paper/plot.py", f"--runs={tmp_path}/*", f"--out_dir={tmp_path}/figures", "--formats=png", "--dpi=50")
    assert drawn.returncode == 0 and (tmp_path / "figures/training.png").is_file(), drawn.stderr


SWEPT = {f"r1-{rate}-s{seed}": ["--lora_rank=1", f"--learning_rate={rate}", f"--seed={seed}"]
         for rate in ("0.001", "0.002") for seed in (1, 2)}


def write_losses(out, losses):
    """Runs that end with these losses on target, {name: loss}."""
    for name, loss in losses.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "log.jsonl").write_text(json.dumps({"step": 5, "tokens": 5, "val": {"target": loss}}) + "\n")


def test_a_sweep_goes_on_until_its_best_rate_lies_inside(tmp_path, capsys):
    study = study_of(tmp_path, runs={**SWEPT, "alone": ["--lora_rank=2", "--learning_rate=1"], "none": ["--lora_rank=3"]})
    asked = dict(study.runs)
    assert [sorted(by_rate) for by_rate in sweeps_of(study.runs).values()] == [[0.001, 0.002], [1.0]]
    write_losses(tmp_path, {**{name: 2 if "0.001" in name else 1 for name in SWEPT}, "alone": 9})
    further = further_runs(study, asked, "loss target", 2)
    assert further == {f"r1-0.004-s{seed}": ["--lora_rank=1", f"--seed={seed}", "--learning_rate=0.004"] for seed in (1, 2)}
    assert "r1-0.002-s1: of 0.001, 0.002 a best one is at the end; 0.004 follows" in capsys.readouterr().out
    # it is worse with every seed: the best lies inside
    study.runs.update(further)
    write_losses(tmp_path, {"r1-0.004-s1": 1.1, "r1-0.004-s2": 1.2})
    assert further_runs(study, asked, "loss target", 2) == {}
    # it is worse in the mean, though not with one of the seeds
    write_losses(tmp_path, {"r1-0.004-s1": 0.9, "r1-0.004-s2": 1.2})
    assert sorted(further_runs(study, asked, "loss target", 2)) == ["r1-0.008-s1", "r1-0.008-s2"]
    # it is better, and one more may follow; then no more
    write_losses(tmp_path, {"r1-0.004-s1": 0.5, "r1-0.004-s2": 0.6})
    assert further_runs(study, asked, "loss target", 1) == {} and "no more are tried" in capsys.readouterr().out
    assert sorted(further_runs(study, asked, "loss target", 2)) == ["r1-0.008-s1", "r1-0.008-s2"]


@pytest.mark.parametrize("runs, message", [
    ({"fast": ["--learning_rate=1"], "slow": ["--learning_rate=2"]}, "in whose name it takes the place of 2"),
    ({"a-1": ["--learning_rate=1"], "a-2": ["--learning_rate=2"]}, "has no 'loss source'")])
def test_sweeps_that_cannot_go_on(tmp_path, runs, message):
    study = study_of(tmp_path, runs=runs)
    write_losses(tmp_path, dict(zip(runs, (2, 1))))
    metric = "loss source" if "source" in message else "loss target"
    with pytest.raises(ValueError, match=message):
        further_runs(study, dict(runs), metric, 2)


def test_a_study_adds_the_rates_itself_and_again_when_it_is_repeated(tmp_path, tokens):
    text = (f"out_dir={str(tmp_path / 'out')!r}\nbase={str(need('data/stories260k'))!r}\nspectrum=plot='none'\n"
            f"sweep='loss held_out'\nsweep_more=1\ntrain='--data={tokens}/ift --val_data=held_out={tokens}/ift --max_steps=1 "
            "--global_batch=4 --microbatch=2 --eval_rows=2 --device=cpu --dtype=float32 --lora_rank=1 --schedule=constant'\n"
            "runs=('a-1e-06 --learning_rate=1e-6', 'a-1e-05 --learning_rate=1e-5')\n")
    result = run_study(tmp_path / "x.py", text)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert len(names) == 3 and "no more are tried" in result.stdout, result.stdout
    before = (tmp_path / "out/study.jsonl").read_text()
    again = run_study(tmp_path / "x.py", text)
    assert again.returncode == 0 and (tmp_path / "out/study.jsonl").read_text() == before, again.stderr


@pytest.fixture
def several(tmp_path, tokens):
    """The text of a study of three runs that take a while, and of one evaluation of each."""
    return (f"out_dir={str(tmp_path / 'out')!r}\nbase={str(need('data/stories260k'))!r}\nspectrum=plot='none'\n"
            f"train='--data={tokens}/cpt --seq_len=64 --max_steps=16 --save_interval=2 --global_batch=4 --microbatch=2 --device=cpu "
            "--dtype=float32'\n"
            f"evals=('eval_loss.py --data=held_out={tokens}/cpt --rows=2 --device=cpu',)\n"
            "runs=('a --lora_rank=1', 'b --lora_rank=2', 'c --lora_rank=3')\n")


def test_several_runs_at_a_time_are_the_runs_of_one(tmp_path, several):
    several = several.replace("max_steps=16", "max_steps=2")
    done = run_study(tmp_path / "x.py", several, "--jobs=2")
    assert done.returncode == 0, done.stderr
    # two began before one had ended, and a run is evaluated before the next one begins
    tables = [text.split("\n\n")[0] for text in re.split("\n\n +train ", done.stdout)[1:]]
    assert max(table.count("running") for table in tables) == 2
    lines = [json.loads(line) for line in (tmp_path / "out/study.jsonl").read_text().splitlines()]
    assert sorted((line["run"], line["stage"]) for line in lines) == [
        (name, stage) for name in "abc" for stage in ("eval_loss.py", "train")]
    for name in "abc":
        text = (tmp_path / f"out/logs/{name}.log").read_text()
        assert "step 2/2" in text and "held_out" in text and "1 threads" in text
    # one at a time
    alone = run_study(tmp_path / "y.py", several, "--only=b", f"--out_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0 and "step 2/2" in alone.stdout and not (tmp_path / "alone/logs").exists()
    weights = [tmp_path / folder / "b/step_2/adapter_model.safetensors" for folder in ("out", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_with_several_at_work_it_resumes(tmp_path, several, number):
    (tmp_path / "x.py").write_text(several)
    argv = [sys.executable, "-m", "paper.study", tmp_path / "x.py", "--jobs=2"]
    with Warm(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not all(list((tmp_path / "out").glob(f"{name}/step_*/state/state.json")) for name in "ab"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == 2 and errors == "study.py: error: stopped; run the same command again to resume\n"
    for name in "ab":  # both have ended in order
        text = (tmp_path / f"out/logs/{name}.log").read_text()
        assert "stopped by SIGTERM after step" in text or is_complete(tmp_path / "out" / name), text
    again = run_study(tmp_path / "x.py", several, "--jobs=3")
    assert again.returncode == 0, again.stderr
    assert all(is_complete(tmp_path / "out" / name) for name in "abc")


def test_a_run_that_fails_beside_others_is_named_with_its_log(tmp_path, several):
    several = several.replace("max_steps=16", "max_steps=2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b").write_text("in the way")
    done = run_study(tmp_path / "x.py", several, "--jobs=2")
    assert done.returncode == 2 and re.search(r"error: b: train ended with status 2 \(.*out/logs/b.log says why\); run", done.stderr)
    assert "error: " in (tmp_path / "out/logs/b.log").read_text()
    assert run_study(tmp_path / "x.py", several, "--jobs=-1").stderr == "study.py: error: jobs=-1: expected a number from 0 up\n"


def test_models_are_evaluated_once_and_printed_beside_what_was_expected(tmp_path):
    base = need("data/stories260k")
    text = f"""
out_dir = {str(tmp_path / 'out')!r}
base = {str(base)!r}
models = ('base', 'again {base}')
evals = ('eval_gsm8k.py {' '.join(gsm8k(tmp_path))}',)
spectrum = plot = 'none'
expected = ('base gsm8k_strict_match=.5',)
"""
    result = run_study(tmp_path / "mini.py", text, "--only=0")
    assert result.returncode == 0 and "expected .5" in result.stdout and "again" not in result.stdout, result.stderr
    before = (tmp_path / "out" / "study.jsonl").read_text()
    again = run_study(tmp_path / "mini.py", text, "--only=base")
    assert again.returncode == 0 and (tmp_path / "out" / "study.jsonl").read_text() == before, again.stderr
    assert "to do" not in again.stdout and json.loads(before)["stage"] == "eval_gsm8k.py"


def test_what_was_done_to_a_run_that_is_gone_or_trained_anew_does_not_count(tmp_path):
    did = [("a", "train", "train a"), ("a", "eval.py", "eval a"), ("b", "train", "train b"), ("b", "eval.py", "eval b"),
           ("a", "train", "train a again"), ("gone", "train", "train gone"), ("base", "eval.py", "eval base")]
    (tmp_path / "study.jsonl").write_text("".join(
        json.dumps({"run": run, "stage": stage, "command": command, "seconds": 1.0}) + "\n" for run, stage, command in did))
    for run in ("a", "b", "base"):
        (tmp_path / run).mkdir()
    assert set(done_before(study_of(tmp_path))) == {"train b", "eval b", "train a again", "eval base"}
    for run, step in (("a", 5), ("b", 10)):  # a was started once more and stopped half way
        (tmp_path / run / f"step_{step}/state").mkdir(parents=True)
        (tmp_path / run / f"step_{step}/state/state.json").write_text(json.dumps({"step": step, "steps": 10}))
    assert set(done_before(study_of(tmp_path, runs={"a": [], "b": []}))) == {"train b", "eval b", "eval base"}


def test_an_evaluation_whose_results_were_written_over_is_done_again(tmp_path):
    def evals_of(*words):
        study = study_of(tmp_path, models={"base": []}, evals=[["eval_loss.py", *word.split()] for word in words])
        return study, [shlex.join(command) for _, command in commands(study, "base")]

    def did(command):
        with open(tmp_path / "study.jsonl", "a") as file:
            file.write(json.dumps({"run": "base", "stage": "eval_loss.py", "command": command, "seconds": 1.0}) + "\n")

    (tmp_path / "base").mkdir()
    first, (few, half) = evals_of("--rows=1", "--name=half")
    second, (many,) = evals_of("--rows=2")
    did(few), did(half)
    assert set(done_before(first)) == {few, half}
    # results of --rows=2 take the place of those of --rows=1, but not of those with a name of their own
    did(many)
    assert set(done_before(first)) - {many} == {half}
    assert many in done_before(second)
    did(few)
    assert {few, half} <= set(done_before(first)) and many not in done_before(second)


def test_a_spectrum_with_other_knobs_takes_the_place_of_the_one_before(tmp_path, tokens):
    text = (f"out_dir={str(tmp_path / 'out')!r}\nbase={str(need('data/stories260k'))!r}\nplot='none'\n"
            f"train='--data={tokens}/cpt --max_steps=1 --global_batch=2 --microbatch=2'\nruns=('a --lora_rank=1',)\n")
    for k in ("1", "2"):
        done = run_study(tmp_path / "x.py", f"{text}spectrum='--modules=q_proj --layers=0 --subspaces={k}'")
        assert done.returncode == 0, done.stderr
        spectrum = json.loads((tmp_path / "out/a/spectrum.json").read_text())
        assert spectrum["made_with"]["subspaces"] == [int(k)]
    before = (tmp_path / "out/a/spectrum.json").stat()
    assert run_study(tmp_path / "x.py", f"{text}spectrum='--modules=q_proj --layers=0 --subspaces=2'").returncode == 0
    assert (tmp_path / "out/a/spectrum.json").stat() == before


def test_an_impossible_run_is_refused_before_the_first_one_starts(tmp_path, tokens):
    text = (f"out_dir={str(tmp_path / 'out')!r}\nbase={str(need('data/stories260k'))!r}\nspectrum=plot='none'\n"
            f"train='--data={tokens}/cpt --max_steps=1 --global_batch=2 --microbatch=2'\n"
            "runs=('good --lora_rank=1', 'bad --lora_rank=1 --scratch=True')\n")
    result = run_study(tmp_path / "x.py", text)
    assert result.returncode == 2 and "bad" in result.stderr and "scratch" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, message", [
    ("models=('far nowhere',)", "models: far: nowhere holds neither config.json nor adapter_config.json"),
    ("runs=('a --learning_rate 1e-3',)", "runs: a: write --learning_rate=VALUE, without a blank"),
    ("models=('base',)\nbase='nowhere'", "base: nowhere holds neither"),
    ("models=('base',)\nevals=('eval_gsm8.py',)", "evals: no script named eval_gsm8.py")])
def test_what_is_not_there_is_refused_before_the_first_run(tmp_path, text, message):
    result = run_study(tmp_path / "x.py", f"out_dir={str(tmp_path / 'out')!r}\nbase={str(need('data/stories260k'))!r}\n{text}")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_stage_is_done_when_all_its_commands_are(tmp_path):
    study = study_of(tmp_path, models={"base": []}, evals=[["eval_loss.py", "--a=1"], ["eval_loss.py", "--a=2"]])
    both = [shlex.join(command) for _, command in commands(study, "base")]

    def cells(*done):
        return progress(study, ["base"], dict.fromkeys(done, 60.0)).splitlines()[1].split()
    assert cells(*both) == ["base", "-", "2.0", "min"] and cells(both[0]) == cells() == ["base", "-", "to", "do"]


def test_evaluations_are_those_of_the_checkpoints_that_training_left(tmp_path):
    """commands() goes on after the training: what it yields then is of the checkpoint that was made meanwhile."""
    study = study_of(tmp_path, runs={"a": ["--lora_rank=1"]}, evals=[["eval_loss.py"]], launch=["torchrun", "-n2"])
    steps = commands(study, "a")
    assert next(steps) == ("train", ["torchrun", "-n2", "train.py", "--lora_rank=1", "--base=b", f"--out_dir={tmp_path}/a",
                                     "--auto_resume=True"])
    (tmp_path / "a/step_5/state").mkdir(parents=True)
    (tmp_path / "a/step_5/state/state.json").write_text("{}")
    assert list(steps) == [("eval_loss.py", ["torchrun", "-n2", "eval_loss.py", f"--model={tmp_path}/a/step_5"])]


def test_figures_that_cannot_be_drawn_fail_the_study(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/figures").write_text("in the way")
    result = run_study(tmp_path / "x.py", f"out_dir={str(tmp_path / 'out')!r}\nbase={str(need('data/stories260k'))!r}\n"
                                      "models=('base',)\nspectrum='none'")
    assert result.returncode == 2 and "plot.py ended with status" in result.stderr, result.stderr


@pytest.mark.parametrize("text, message", [
    ("runs=('a --lora_rank=1', 'a --lora_rank=2')", "no other one has"),
    ("runs=('a',)\nmodels=('a',)", "share the name a"),
    ("runs=('a',)\nonly=('b',)", "only: b not found"),
    ("runs=('a',)\nexpected=('b m=1',)", "no model or run is named b"),
    ("runs=('a',)\nbase=''", "have to be set"),
    ("runs=()", "have to be set"),
])
def test_bad_lists(tmp_path, text, message):
    path = tmp_path / "x.py"
    path.write_text(f"out_dir={str(tmp_path / 'out')!r}\nbase={str(tmp_path)!r}\n{text}\n")
    result = run_here("paper/study.py", path)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_fetched_is_one_line(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(f"out_dir={str(tmp_path / 'out')!r}\nbase='hf://nobody/nothing'\nmodels=('base',)")
    result = run_stage("-m", "paper.study", path, HF_HUB_OFFLINE=1)
    assert result.returncode == 2 and "cannot be fetched" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind, text, wanted", [
    ("ConnectError", "[Errno -2] Name or service not known", "(ConnectError: no connection to the hub)"),  # httpx's
    ("LocalEntryNotFoundError", "a long story " * 40, "(LocalEntryNotFoundError: no connection to the hub)"),
    ("RepositoryNotFoundError", "401 " * 90, "no such model or revision"),
    ("GatedRepoError", "403 " * 90, "accept its terms at https://huggingface.co/nobody/nothing and set HF_TOKEN"),
    ("RemoteProtocolError", "a long story\n" * 40, "(RemoteProtocolError: a long story")])
def test_a_model_that_cannot_be_fetched_is_one_short_line(monkeypatch, kind, text, wanted):
    import huggingface_hub
    from huggingface_hub import errors
    found = getattr(errors, kind, Exception)

    def fails(*_, **__):
        error = type(kind, (found,), {"__init__": lambda self: Exception.__init__(self, text)})()
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ValueError) as error:
        fetch("hf://nobody/nothing@v1")
    message = str(error.value)
    assert wanted in message and "\n" not in message and len(message) < 400
    assert "hf download nobody/nothing --local-dir DIR" in message
    assert fetch("hf://nobody/nothing@v1", download=False) is None


@pytest.mark.parametrize("config, only, stages", [("regret", "r27-attention-0.001-s2", 1), ("rate_laws", "r64-zero_a-0.0004-s3", 1),
                                                  ("consistency", "r16-adamw-0.005-s1", 1), ("why", "r4-0.001-s1", 3),
                                                  ("rate_laws_docs", "r64-fixed-0.00025-s1", 1), ("regret_docs", "b10-r16-0.001-s2", 3),
                                                  ("regret_python", "r64-0.0005-s3", 3), ("variants", "zero_a-0.001-s6", 1),
                                                  ("peft_smollm2", "r10-mlp-10x", 3),
                                                  ("peft_metamath", "r32-dora-s1", 3)])
def test_lists_of_the_sweeps_are_possible(tmp_path, tokens, config, only, stages):
    more = " --max_steps=5 --optimizer=adamw --global_batch=1" if config.startswith("peft") else ""
    result = run_warm("-m", "paper.study", ROOT / f"config/{config}.py", f"--base={need('data/stories260k')}", f"--only={only}",
                      f"--train=--data={tokens}/cpt --microbatch=1{more}", "--dry_run=True", f"--out_dir={tmp_path}")
    assert result.returncode == 0 and result.stdout.count("to do") == stages, result.stderr


@pytest.mark.parametrize("config, only, stages", [("study_smollm2_code", "r16-75", 5),
                                                  ("study_smollm2_full", "r16-attention-s3-4ep", 6)])
def test_lists_of_the_replication_are_possible(tmp_path, tokens, config, only, stages):
    result = run_warm("-m", "paper.study", ROOT / f"config/{config}.py", f"--base={need('data/stories260k')}", f"--only={only}",
                      f"--train=--data={tokens}/cpt --global_batch=4", "--dry_run=True", f"--out_dir={tmp_path}")
    assert result.returncode == 0 and result.stdout.count("to do") == stages, result.stderr


def test_published_models_are_listed_with_what_the_paper_found(tmp_path):
    result = run_here("paper/study.py", ROOT / "config/published.py", "--only=nothing")
    assert result.returncode == 2 and "16 openwebmath-full" in result.stderr
