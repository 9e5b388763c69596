"""Shared by all tests: where the recorded outputs and the data are, and three ways to run a stage as a user does."""
import contextlib
import gzip
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from warm import Warm

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
torch.set_num_threads(1)  # tiny models: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"  # outputs of the original tools, in the repository
SHARED = ROOT.parent / "shared"  # larger real data, beside the checkout
sys.path.insert(0, str(ROOT))


# the files that take longest, which begin first: else the last of them runs alone on one core
LONGEST = ["test_lora_kernels", "test_parallel", "test_quickstart", "test_study", "test_train", "test_eval_loss",
           "test_prepare_data_robust", "test_bench", "test_eval_forgetting", "test_end_to_end"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def need(path):
    """The file or folder that a test needs, or skip the test and say which is missing.

        need("golden/models/sharded3")  ->  tests/golden/models/sharded3
        need("data/stories260k")        ->  tests/golden/data/stories260k
        need("data/gsm8k/test.jsonl")   ->  ../shared/data/gsm8k/test.jsonl, or a skipped test
    """
    in_repository = GOLDEN / path.removeprefix("golden/")
    if in_repository.exists():
        return in_repository
    beside = SHARED / path
    if not beside.exists():
        pytest.skip(f"needs ../shared/{path}")
    return beside


def need_peft():
    """The package peft, or skip the test: a machine lent with a GPU may lack it."""
    return pytest.importorskip("peft", reason="needs peft")


def golden(name):
    """The recorded outputs in tests/golden/NAME.json.gz, parsed."""
    with gzip.open(GOLDEN / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def whole_golden(name):
    """As golden(), with what may not be handed on as well, where ../shared/golden has it: see golden/README.md."""
    whole = SHARED / "golden" / f"{name}.json"
    return json.loads(whole.read_text()) if whole.exists() else golden(name)


def run_stage(*argv, cwd=ROOT, timeout=300, **env):
    """Run `python argv...` as a user would; returns the CompletedProcess (text)."""
    full_env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in env.items()}}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=full_env, timeout=timeout,
                          capture_output=True, text=True)


def run_warm(*argv, **how):
    """As run_stage, in a fork of this process: for a run that dies, is limited or starts others."""
    with patch.object(subprocess, "Popen", Warm):
        return run_stage(*argv, **how)


def run_here(script, *argv):
    """As run_stage, but in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with patch.object(sys, "argv", [script, *map(str, argv)]), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())
