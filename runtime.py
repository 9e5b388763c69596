"""
What every stage needs from the machine: device, ranks, printing, errors in one line, safe files.

    $ python sample.py --device=cuda:0
    sample.py: error: device=cuda:0: no GPU is visible to PyTorch 2.13.0; try --device=cpu
    $ echo $?
    2
    write_whole("config.json", text)     config.json.tmp -> fsync -> config.json: whole or absent
"""
import contextlib
import ctypes
import json
import os
import platform
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent

# set by torchrun; one rank without it
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

# A part of a GPU's name, the first match counts: dense bf16 TFLOP/s and GB, by vendors' data sheets
# (the A100 is also sold with 40 GB, the V100 with 16: --memory_gb).
GPUS = (("GB200", 2500, 186), ("B200", 2250, 180), ("GH200", 989, 96), ("H200", 989, 141),
        ("H100 PCIe", 756, 80), ("H100 NVL", 835, 94), ("H100", 989, 80), ("H800", 989, 80),
        ("A100", 312, 80), ("A800", 312, 80), ("L40S", 362, 48), ("L40", 181, 48), ("L4", 121, 24),
        ("A10G", 70, 24), ("A6000", 155, 48), ("RTX 4090", 165, 24), ("RTX 3090", 71, 24),
        ("V100", 125, 32))


# ----------------------------------------------------------------------------- printing and ending
def print0(*args, **kwargs):
    """print on rank 0 only."""
    if RANK == 0:
        print(*args, **kwargs, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """The user's mistakes (ValueError, OSError) and running out of memory end the script with one
    line on stderr and status 2.

    TRACEBACK=1 in the environment shows where they were raised as well."""
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError, RuntimeError) as e:
        if isinstance(e, BrokenPipeError):
            end_if_nobody_reads()
        if isinstance(e, RuntimeError) and not is_out_of_memory(e):
            raise
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        # one line, even if the message has several
        message = " ".join(str(e).split())
        if len(message) > 580:  # a library's error can hold a whole file
            message = f"{message[:400]} ... {message[-150:]}"
        if isinstance(e, RuntimeError):
            message = ("out of memory: try a smaller microbatch or batch_size, in training also "
                       f"--activation_checkpointing=block or --shard=full. {message}")
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def is_out_of_memory(error):
    """Whether a RuntimeError says that a GPU or the CPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def end_if_nobody_reads():
    """Exit silently if the reader of the output has gone, as with `| head`."""
    output = sys.stdout.fileno()
    watch = select.poll()
    watch.register(output, 0)  # errors are always reported
    if not any(event & select.POLLERR for _, event in watch.poll(0)):
        return
    # Python flushes what is left when it exits
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    raise SystemExit(128 + signal.SIGPIPE)


def catch_stop_signals():
    """A list to which SIGTERM or Ctrl-C is appended, so that a loop can end cleanly.

    A second signal kills."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, catch)
    signal.signal(signal.SIGINT, catch)
    return caught


# ----------------------------------------------------------------------------- device
def pick_device(device):
    """'auto' -> the GPU if there is one, else the CPU; ValueError for one that is missing."""
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    if device.startswith("cuda") and not has_gpu:
        raise ValueError(f"device={device}: no GPU is visible to PyTorch {torch.__version__}; "
                         "try --device=cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda":
        check_gpu(found.index or 0)
    return found


def check_gpu(index):
    """ValueError for a GPU that is not there."""
    there = torch.cuda.device_count()
    if index >= there:
        raise ValueError(f"device: no GPU {index}; {there} visible, cuda:0 to cuda:{there - 1}; "
                         "torchrun --nproc_per_node=gpu starts one rank per GPU")


def available_cores():
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def join_ranks(device, backend="", **how):
    """Join torchrun's process group, by default NCCL on GPUs, gloo on CPUs; returns the device."""
    # each rank of a node has a GPU of its own
    if device.type == "cuda":
        index = LOCAL_RANK if device.index is None else device.index
        check_gpu(index)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if WORLD > 1:
        default = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend or default, **how)
    return device


def pick_dtype(dtype, device):
    """torch.dtype of a name; 'auto' is bf16 where the GPU has it, else fp32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def peak_flops(device):
    """Dense bf16 FLOP/s of the device by data sheet; None if unknown, so that no MFU is made up."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, tflops, _ in GPUS:
        if part in name:
            return tflops * 1e12
    return None


def matmul_flops(device, dtype, n=1024, seconds=0.1):
    """FLOP/s of a square matrix product here, measured for about `seconds`."""
    # the first product warms up
    a = torch.ones(n, n, device=device, dtype=dtype)
    (a @ a).sum().item()
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        (a @ a)[0, 0].item()  # waits for the device
        count += 1
    return count * 2 * n ** 3 / (time.perf_counter() - start)


def device_name(device):
    """What to call the device in a printed line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {cpu_kind()}, {torch.get_num_threads()} threads"


def cpu_kind():
    """The processor's name, and the widest instructions that PyTorch uses on it."""
    name = platform.machine()
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return f"{name} with {torch.backends.cpu.get_cpu_capability()}"


def device_memory(device):
    """Bytes that a rank may use: those of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // LOCAL_WORLD


def tune_cpu_memory():
    """Set how the C library and oneDNN keep memory, where the CPU trains; before its first product.

    Every step takes the memory again that the last one freed. Given back to the system in between,
    it returns page by page, which is up to a fifth of a step (NOTES.md, 2026-12-01). So glibc keeps
    freed blocks below 1 GB (before glibc 2.35 below 32 MB, as it allows no more). Nothing happens
    with another C library.

    In bf16 each product is compiled anew for each number of tokens, and each of 1,024 that oneDNN
    and PyTorch's layer over it keep costs memory of about its result's size: small blocks that stay
    split the free ones. So they keep 128, where the user set no other number."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        libc.mallopt(trim_threshold, 2 ** 31 - 1)
        # the second is refused by an old glibc
        for size in (2 ** 25, 2 ** 30):
            libc.mallopt(mmap_threshold, size)
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def peak_memory(device):
    """Highest memory use so far in decimal GB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # not getrusage: its maximum is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def versions():
    """What a result depends on besides its knobs."""
    # None where the code is no git checkout
    command = ["git", "describe", "--always", "--dirty"]
    described = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    git = described.stdout.strip() or None
    return {"git": git, "python": platform.python_version(), "torch": torch.__version__}


# ----------------------------------------------------------------------------- files
def fsync_folder(folder):
    """Force every file of a folder, and the folder's own entries, to disk."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path, text):
    """Write a file so that it is there in full or not at all."""
    # a rename is atomic, if the content is on disk before it
    partial = Path(f"{path}.tmp")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read_object(path, hint=""):
    """The object in a .json file; raises FileNotFoundError, with the `hint`, or ValueError."""
    if not path.is_file():
        below = named_below(path.parent, path.name)
        explained = f"; {hint}" if hint else ""
        raise FileNotFoundError(f"{path}: not found{', ' if below else explained}{below}")
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no object")
    return found


def named_below(folder, pattern):
    """The end of a message about a folder without such a file, '' if no subfolder has one either.

    A Trainer leaves models, adapters and tokenizers in checkpoint-N of its output folder."""
    found = {file.parent.name for file in Path(folder).glob(f"*/{pattern}")}
    if not found:
        return ""
    return f"but in {', '.join(sorted(found)[:8])} below it; name one of these"


def append_jsonl(path, record):
    """Add one object as a line."""
    if RANK == 0:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


def script_words(script):
    """Python's arguments that run one of our scripts.

    A script in the root runs by its file, others as modules: paper/plot.py -> -m paper.plot, which
    finds the scripts in the root if PYTHONPATH holds ROOT."""
    if "/" not in script:
        return [str(ROOT / script)]
    module = script.removesuffix(".py").replace("/", ".")
    return ["-m", module]
