"""Our scripts in a fork of this process, which spares each the seconds that importing torch takes.

    process = Warm([sys.executable, "train.py", "--max_steps=2"], stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate()

A child has its own memory, signals and status, as a program has. What it shares is what was imported before.
"""
import atexit
import gc
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# what runtime.py reads when it is imported, and others from it, by the variables of torchrun
RANKS = {"RANK": "RANK", "WORLD": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD": "LOCAL_WORLD_SIZE"}


class Warm(subprocess.Popen):
    """subprocess.Popen, but what runs Python is a fork of this process, as is what it starts in turn:
    `python a.py ...`, `python -c code ...`, and of modules those of this repository and torchrun."""

    def __init__(self, args, *, env=None, **how):
        words = [str(word) for word in args]
        if words[0] == sys.executable:
            # what most stages import late, and each fork would
            import matplotlib.pyplot  # noqa: F401
            import torch._dynamo  # noqa: F401
            # what runs between fork and exec never comes to the exec
            how["preexec_fn"] = lambda: become(words[1:], env)
        super().__init__(words, env=env, **how)


def become(words, env):
    """Be `python words...` from here on, in a fork; never returns."""
    # torch 2.14 makes its thread pool anew in a fork, where it is asked for first, and aborts if two threads ask at once
    torch.set_num_threads(torch.get_num_threads())
    # as Popen would before it starts a program: it also tells the parent that all is well
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    gc.enable()
    atexit._clear()
    # what a new process has of its own
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Popen gives them back what Python took when it started
        signal.signal(number, signal.SIG_IGN)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    set_rank()
    subprocess.Popen = Warm
    status = run(words)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def set_rank():
    """Let modules that are imported already know the rank."""
    values = {name: int(os.environ.get(variable, name.endswith("WORLD"))) for name, variable in RANKS.items()}
    values["RANK0"] = values["RANK"] == 0
    for module in list(sys.modules.values()):
        if not (getattr(module, "__file__", None) or "").startswith(str(ROOT)):
            continue
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)


def run(words):
    """Run what the words after `python` say to its end; returns the status."""
    if words[0] == "-u":
        words = words[1:]
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
