"""What every stage needs from the machine: device, printing on rank 0, errors in one line, safe files."""
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

# torchrun's; one rank without it
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))

# Dense bf16 TFLOP/s of one GPU by a part of its name, first match counts (vendors' data sheets).
PEAK_TFLOPS = (("GB200", 2500), ("B200", 2250), ("GH200", 989), ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835),
               ("H100", 989), ("H800", 989), ("A100", 312), ("A800", 312), ("L40S", 362), ("L4", 121), ("A10G", 70),
               ("A6000", 155), ("RTX 4090", 165), ("RTX 3090", 71), ("V100", 125))


def print0(*args, **kwargs):
    """print on rank 0 only."""
    if RANK == 0:
        print(*args, **kwargs, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """Mistakes of the user (ValueError, OSError) end the script with one line and status 2.

    TRACEBACK=1 in the environment shows where they were raised as well."""
    try:
        yield
    except (ValueError, OSError) as e:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        message = " ".join(str(e).split())
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def pick_device(device):
    """'auto' -> the GPU if there is one, else the CPU; a GPU asked for that is not there is a ValueError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: no GPU is visible to PyTorch {torch.__version__}; try --device=cpu")
    return torch.device(device)


def join_ranks(device, backend="", **how):
    """Join torchrun's process group, by default NCCL on GPUs and gloo on CPUs; returns the device of this rank."""
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
        torch.cuda.set_device(device)
    if WORLD > 1:
        torch.distributed.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"), **how)
    return device


def pick_dtype(dtype, device):
    """'auto' -> bf16 where the GPU has it, else fp32; any other name as it stands. Returns a torch.dtype."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, dtype)


def peak_flops(device):
    """Dense bf16 FLOP/s of the device by data sheet; None when unknown, so that no MFU is made up."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS if part in name), None)


def matmul_flops(device, dtype, n=1024, seconds=0.1):
    """FLOP/s of a square matrix product here, measured for about `seconds`."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    (a @ a).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        (a @ a)[0, 0].item()
        count += 1
    return count * 2 * n ** 3 / (time.perf_counter() - start)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """Highest memory use so far in decimal GB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # not getrusage: its maximum is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def versions():
    """What a result depends on beside its knobs."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True,
                         capture_output=True, check=False).stdout.strip()
    return {"git": git or None, "python": platform.python_version(), "torch": torch.__version__}


def fsync_folder(folder):
    """Force every file of a folder, and the folder's own entries, to disk."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path, text):
    """A file that is there in full or not at all."""
    partial = Path(f"{path}.tmp")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


ROOT = Path(__file__).resolve().parent


def script_words(script):
    """How Python is told to run one of our scripts: a stage by its file, one in a drawer as a module (paper/plot.py ->
    -m paper.plot, which finds the stages beside the drawer where PYTHONPATH holds ROOT)."""
    if "/" not in script:
        return [str(ROOT / script)]
    return ["-m", script.removesuffix(".py").replace("/", ".")]


def read_object(path, hint=""):
    """The object in a .json file; raises FileNotFoundError, which the hint explains, or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found{hint and '; ' + hint}")
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no object")
    return found


def append_jsonl(path, record):
    """Add one object as a line."""
    if RANK == 0:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
