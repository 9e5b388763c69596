"""Shared by all tests: the path to the repo, the golden fixtures, a way to run a stage as a user does."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
