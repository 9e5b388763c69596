"""Run a script as on a GPU that is not there: a rehearsal of `make gpu`.

    make gpu GPU_PYTHON=".venv/bin/python tests/campaigns/fake_card.py" GPU_OUT=out/rehearsal
    python tests/campaigns/fake_card.py -m bench.kernels --device=cuda --shapes=7b

    the script        torch.cuda answers as an H200; every line for a GPU runs, with tiny shapes
    its tensors       on the CPU, whatever device is asked for
    its Triton        in the interpreter, in fp16 where bf16 is asked for (it is wrong in bf16)

So it shows that the scripts reach their end and write their results. It shows nothing about times,
about what is_cuda decides, or about torch.compile, which is left out.
"""
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

# all of it before anything imports triton
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, os.getcwd())

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# flags that make a part small
SMALL = {
    "bench.kernels": {"shapes": "tiny", "rows": "64"},
    "bench.throughput": {"shape": "tiny", "seq_lens": "64", "microbatch_tokens": "128"},
    "bench.generate": {"prompts": "3", "samples": "4", "new_tokens": "9", "repeats": "2"},
}


# ----------------------------------------------------------------------------- the card
class Event:
    """torch.cuda.Event by the CPU's clock."""

    def __init__(self, enable_timing=False):
        self.time = None

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Generator:
    """torch.Generator, always on the CPU."""
    real = torch.Generator

    def __new__(cls, device="cpu"):
        return cls.real(on_cpu(device))


def on_cpu(value):
    """The same argument of an operator, with the CPU in the place of the card."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    return value


class OnCPU(TorchFunctionMode):
    """Operators that are told to work on the card work on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.device:
            args, kwargs = tree_map(on_cpu, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def insert_card():
    """Let torch.cuda answer as an H200."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10 ** 9, multi_processor_count=132,
                           major=9, minor=0)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "get_device_name": card.name, "get_device_properties": card,
        "get_device_capability": (9, 0), "mem_get_info": (card.total_memory, card.total_memory),
        "max_memory_allocated": 10 ** 9, "memory_allocated": 10 ** 9,
        "synchronize": None, "set_device": None, "empty_cache": None,
        "reset_peak_memory_stats": None, "manual_seed": None, "manual_seed_all": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.Event = Event

    # what is no operator
    torch.Generator = Generator
    torch.compiler.reset = lambda: None
    torch.compile = lambda function, **kwargs: function
    torch.nn.Module.compile = lambda module, **kwargs: None


def insert_kernels():
    """Let the interpreter's fp16 pass for the card's bf16."""
    from llama import lora_operators
    lora_operators.check = lambda dtype, device: None
    torch.bfloat16 = torch.float16


# ----------------------------------------------------------------------------- the script
def smaller(module, argv, folder):
    """The script's arguments, with those of SMALL in their place."""
    flags = dict(SMALL.get(module, {}))
    if module == "bench.generate":
        flags["model"] = folder
    kept = []
    for word in argv:
        name = word.removeprefix("--").split("=")[0]
        if name not in flags:
            kept.append(word)
    return kept + [f"--{name}={value}" for name, value in flags.items()]


def insert_itself(folder):
    """Let what the script starts with sys.executable run as it does itself."""
    command = Path(folder) / "python"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {os.path.abspath(__file__)} "$@"\n')
    command.chmod(0o755)
    sys.executable = str(command)


def write_tiny_model(folder):
    """A model folder for bench.generate."""
    from bench.throughput import TINY
    from model import Llama
    Llama(TINY).init_weights().save_pretrained(folder)


def run(module, argv):
    """As `python -m module argv...` does."""
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_with_card(module, argv):
    """The same, with the card and small shapes."""
    insert_card()
    if module in ("bench.kernels", "bench.throughput"):
        insert_kernels()
    with tempfile.TemporaryDirectory() as folder, OnCPU():
        insert_itself(folder)
        if module == "bench.generate":
            write_tiny_model(folder)
        run(module, smaller(module, argv, folder))


if __name__ == "__main__":
    flag, module, *rest = sys.argv[1:]
    if flag != "-m":
        raise SystemExit("fake_card.py: expected -m MODULE and its arguments")
    if module == "pytest":
        # the kernels' tests run in the interpreter by themselves, torch.compile and all
        run(module, rest)
    else:
        run_with_card(module, rest)
