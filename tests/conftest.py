"""Shared by all tests: the path to the repo, the golden fixtures, two ways to run a stage as a user does."""
import contextlib
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

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
torch.set_num_threads(1)  # tiny models: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # outputs of the original tools and real data; beside the checkout, not in it
sys.path.insert(0, str(ROOT))


def need(path):
    """A path under ../shared, or skip the test and say which file is missing."""
    full = SHARED / path
    if not full.exists():
        pytest.skip(f"needs ../shared/{path}")
    return full


def golden(name):
    """The parsed fixture ../shared/golden/NAME.json."""
    return json.loads(need(f"golden/{name}.json").read_text())


def run_stage(*argv, cwd=ROOT, timeout=300, **env):
    """Run `python argv...` as a user would; returns the CompletedProcess (text)."""
    full_env = {**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in env.items()}}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=full_env, timeout=timeout,
                          capture_output=True, text=True)


def run_here(script, *argv):
    """As run_stage, but in this process, which spares the seconds that importing torch takes."""
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
