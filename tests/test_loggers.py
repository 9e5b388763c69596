"""Logging where people look: the real packages, offline, show log.jsonl's names and numbers; a resumed run goes on in the same."""
import json
import math
import struct
import subprocess
import sys

import pytest
from conftest import ROOT, run_warm
from test_train import setting  # noqa: F401 (a fixture)

from training.loggers import numbers_of


def log_of(out):
    """{name: {step: number}} of log.jsonl, with the names that the other loggers have."""
    series = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, number in numbers_of(record).items():
            series.setdefault(name, {})[record["step"]] = number
    return series


def train_in_two(setting, *knobs):
    """Four steps, stopped after the second one that is saved, as after a kill: done are 3, saved are 2; then all four."""
    folder, common = setting
    out = [f"--out_dir={folder / 'run'}", *common, *knobs, f"--val_data=again={folder / 'data'}", "--schedule=constant",
           "--eval_interval=2"]
    begun = run_warm("train.py", *out, "--max_steps=3", "--checkpoint_at=2", "--save_interval=2")
    assert begun.returncode == 0, begun.stderr
    (folder / "run" / "step_3" / "state" / "state.json").unlink()  # as if it had been killed in step 3
    resumed = run_warm("train.py", *out, "--max_steps=4", "--resume=True")
    assert resumed.returncode == 0, resumed.stderr
    return folder / "run"


NAMES = {"tokens", "epoch", "loss", "lr", "grad_norm", "seconds", "tok_per_s", "peak_gb", "val/again"}


def test_tensorboard_has_the_log_and_forgets_the_steps_that_are_done_again(setting):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = setting[0] / "board"
    log = log_of(train_in_two(setting, f"--tensorboard={board}"))
    assert set(log) == NAMES and sorted(log["loss"]) == [1, 2, 3, 4]
    shown = EventAccumulator(str(board / "run")).Reload()
    assert set(shown.Tags()["scalars"]) == NAMES
    for name, numbers in log.items():
        events = shown.Scalars(name)
        assert [event.step for event in events] == sorted(numbers)
        assert [event.value for event in events] == pytest.approx([numbers[event.step] for event in events], rel=1e-6)


def records_of(path):
    """What an offline run of wandb wrote: a 7-byte head, then LevelDB's log of blocks, whose records are protobufs."""
    data = path.read_bytes()
    at, whole = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a record's head: the block's end is empty
            at += left
            continue
        length, part = struct.unpack_from("<HB", data, at + 4)  # part: 1 = all of a record, 2 = first, 3 = middle, 4 = last
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if part in (1, 4):
            yield whole
            whole = b""


def test_wandb_has_the_log_and_goes_on_in_the_same_run(setting, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    from wandb.proto import wandb_internal_pb2
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = train_in_two(setting, "--wandb=tries")

    # the records of both parts, in order
    ids, projects, shown = set(), set(), {}
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    for path in files:
        for data in records_of(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                projects.add(record.run.project)
            elif record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                for name, number in row.items():
                    shown.setdefault(name, {})[row["step"]] = number  # a step that was done again counts once
    assert ids == {(out / "wandb_id").read_text().strip()} and projects == {"tries"}
    log = log_of(out)
    assert set(log) == NAMES and NAMES <= set(shown)
    for name, numbers in log.items():  # it also has the validation of the step that was done again
        assert {step: shown[name][step] for step in numbers} == pytest.approx(numbers, rel=1e-12)


@pytest.mark.parametrize("package, knob", [("wandb", "--wandb=tries"), ("tensorboard", "--tensorboard=board")])
def test_a_package_that_is_missing_is_one_line_before_any_work(setting, package, knob):
    folder, common = setting
    hide = f"import sys; sys.modules[{package!r}] = None; sys.argv[0] = 'train.py'; import runpy; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide, *common, f"--out_dir={folder / 'run'}", "--max_steps=1", knob],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    line, = done.stderr.splitlines()
    assert line.startswith(f"train.py: error: {knob[2:]}: pip install {package} first")
    assert not (folder / "run").exists()


def test_numbers_of_a_record():
    """What has no number has no place in a curve; a list of skipped rows is as many as it has."""
    assert numbers_of({"step": 3, "skipped": [4, 5], "loss": "nan", "lr": 0.1}) == {"skipped": 2, "lr": 0.1}
    assert numbers_of({"step": 3, "tokens": 9, "val": {"a": 1.0, "b": math.inf}}) == {"val/a": 1.0, "val/b": math.inf}
