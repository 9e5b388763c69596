"""
Ranks of train.py as forks of one process, for campaigns of many short runs: torch is imported once.

    parent (has imported torch) -- fork --> rank 0: runs train.py
                                -- fork --> rank 1: runs train.py
"""
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # for an optimizer: else each fork imports it, for seconds
import torch.distributed.checkpoint
import torch.distributed.fsdp

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import lion  # noqa: E402, F401 (with all that takes long to import)
import lora  # noqa: E402, F401

torch.set_num_threads(1)
PHASES = ("start", "forward", "backward", "save", "write", "rename", "delete", "fsync")


def fork(work, output=os.devnull):
    """Run work() in a child whose output is added to a file; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    # torch 2.14 makes its thread pool anew in a fork, where it is asked for first, and aborts if two threads ask at once
    torch.set_num_threads(1)
    status = 1
    try:
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = work() or 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def make_setting(folder):
    """A tiny base and ten rows of data in a new folder; returns the knobs that train on them."""
    def work():
        import test_train
        test_train.setting.__wrapped__(folder)
    if not folder.exists():
        folder.mkdir(parents=True)
        assert wait([fork(work)]) == [0]
    return [f"--base={folder / 'base'}", f"--data={folder / 'data'}", "--dtype=float32",
            "--learning_rate=1e-3", "--device=cpu"]


def fork_ranks(ranks, argv, output, beats=None, fatal=None):
    """Start train.py with argv on `ranks` ranks, with torchrun's environment; returns their pids.

    beats: shared bytes, where each rank leaves the number of the phase it is in. fatal = (rank, n):
    that rank kills itself on the n-th border between phases."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]

    def work(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        del sys.modules["runtime"]  # it reads the rank when it is imported: here, a second time
        sys.argv = ["train.py", *argv]
        if beats is not None:
            last = fatal[1] if fatal and fatal[0] == rank else -1
            watch(rank, beats, last)
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return [fork(lambda rank=rank: work(rank), output) for rank in range(ranks)]


def wait(pids, seconds=120):
    """Exit statuses of processes; those that take longer are killed."""
    statuses = []
    until = time.time() + seconds
    for pid in pids:
        while is_alive(pid) and time.time() < until:
            time.sleep(0.01)
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return statuses


def is_alive(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def watch(rank, beats, last):
    """Let this process note its phase in beats[rank], and die on border number `last`."""
    from training import checkpoint
    import model
    borders = 0

    def border(phase):
        nonlocal borders
        beats[rank] = phase
        borders += 1
        if borders == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name, phase):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            before = beats[rank]
            border(PHASES.index(phase))
            result = inner(*args, **kwargs)
            border(before)
            return result
        setattr(owner, name, call)

    wrap(model.Llama, "forward", "forward")
    wrap(torch.Tensor, "backward", "backward")
    wrap(checkpoint, "save_checkpoint", "save")
    wrap(checkpoint, "save_weights", "write")
    wrap(checkpoint, "write_safetensors", "write")
    wrap(Path, "rename", "rename")
    wrap(checkpoint, "delete_checkpoint", "delete")
    wrap(checkpoint, "fsync_folder", "fsync")
