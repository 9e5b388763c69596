"""Model and adapter folders that people really have: not finite, saved twice, quantised, of either transformers."""
import gc
import json
import math
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here, run_stage
from safetensors.torch import load_file, save_file
from test_model import SHAPE, close, edit_config, edit_tensors, one_line, tiny, tokens_like
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_train import setting  # noqa: F401
from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

from analysis.folders import open_model
from llama.weights import write_safetensors
from lora import apply_lora, load_adapter, merge_folders, save_adapter
from model import Llama, LlamaConfig

ADAPTER = "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
TOKENS = tokens_like(2, 21)


@pytest.fixture
def base(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    torch.manual_seed(0)
    model = apply_lora(Llama.from_pretrained(base), 4, 8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.3)
    save_adapter(model, tmp_path / "adapter", str(base))
    return tmp_path / "adapter"


def put(folder, file, name, value, index=-1):
    """Set one entry of a stored tensor."""
    tensors = load_file(folder / file)
    tensors[name].view(-1)[index] = value
    save_file(tensors, folder / file, {"format": "pt"})


# ----------------------------------------------------------------------------- not finite
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight",
                                  "model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_base_that_is_not_finite_is_refused_by_tensor_name(base, name, value):
    put(base, "model.safetensors", name, value)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError) as error:
            Llama.from_pretrained(base, dtype)
        one_line(error, str(base), name, "NaN or infinity")


def test_a_base_that_overflows_in_the_dtype_asked_for_is_refused(base):
    put(base, "model.safetensors", "model.norm.weight", 1e5)
    Llama.from_pretrained(base)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(base, torch.float16)
    one_line(error, "model.norm.weight", "float16")


def test_a_tied_head_that_is_not_finite_is_named(tmp_path):
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    matrix = model.embed_tokens.weight.detach().clone()
    matrix[3, 3] = math.nan
    edit_tensors({"lm_head.weight": matrix, "model.embed_tokens.weight": matrix.clone()})(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight holds NaN"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_an_adapter_that_is_not_finite_is_refused_by_tensor_name(base, adapter, tmp_path, value, letter):
    name = Q_A.replace("lora_A", f"lora_{letter}")
    put(adapter, ADAPTER, name, value)
    with pytest.raises(ValueError) as error:
        load_adapter(Llama.from_pretrained(base), adapter)
    one_line(error, str(adapter), name, "NaN or infinity")
    done = run_here("lora.py", f"--base={base}", f"--adapter={adapter}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1
    done = run_here("spectrum.py", f"--base={base}", f"--tuned={adapter}", f"--out={tmp_path / 's.json'}")
    assert done.returncode == 2 and name in done.stderr.splitlines()[-1]  # below the progress bar
    assert not (tmp_path / "out").exists() and not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                                  "mlp.down_proj"])
@pytest.mark.parametrize("value", [1e30, -1e25, 1e20])
def test_a_merge_that_cannot_be_proved_is_refused(base, adapter, tmp_path, value, part):
    put(adapter, ADAPTER, Q_A.replace("self_attn.q_proj", part), value)
    with pytest.raises(ValueError) as error:
        merge_folders(base, adapter, tmp_path / "out", torch.float32)
    one_line(error, part.split(".")[1])
    assert not list(tmp_path.glob("out*"))


def test_a_merge_beyond_the_dtype_is_refused(base, adapter, tmp_path):
    put(base, "model.safetensors", "model.norm.weight", 1e5)
    put(adapter, ADAPTER, Q_A, 0.1)  # without the fingerprint of the base before
    with pytest.raises(ValueError, match="model.norm.weight.*float16"):
        merge_folders(base, adapter, tmp_path / "out", torch.float16)
    assert not list(tmp_path.glob("out*"))


def test_momenta_that_are_not_finite_are_refused_at_a_resume(setting):  # noqa: F811
    folder, knobs = setting
    out = f"--out_dir={folder / 'run'}"
    assert run_here("train.py", *knobs, out, "--max_steps=1", "--lora_rank=2").returncode == 0
    state = folder / "run" / "step_1" / "state"
    name = next(iter(load_file(state / "optimizer.safetensors")))
    put(state, "optimizer.safetensors", name, math.nan)
    gc.collect()  # lets go of the lock
    done = run_here("train.py", *knobs, out, "--max_steps=2", "--lora_rank=2", "--resume=True")
    assert done.returncode == 2 and name in done.stderr and "NaN" in done.stderr


# ----------------------------------------------------------------------------- files that are written
METADATA = [{"format": "pt"}, {}, {"format": "pt", "a": "1", "b": "2", "base_fingerprint": "f" * 64, "z": "", "y": "é\"\n"}]


@pytest.mark.parametrize("metadata", METADATA, ids=len)
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_equal_content_is_equal_bytes_with_the_mode_that_the_umask_allows(tmp_path, umask, metadata):
    tensors = {"b": torch.ones(3, 2), "a": torch.ones(2).half(), "é": torch.zeros(0)}
    before = os.umask(umask)
    try:
        for i in range(8):
            write_safetensors(tensors, tmp_path / f"{i}.safetensors", dict(metadata))
    finally:
        os.umask(before)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len({file.read_bytes() for file in files}) == 1
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}
    again = load_file(files[0])
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    header = files[0].read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8:8 + length]).get("__metadata__", {}) == metadata


def test_the_same_adapter_has_the_same_hash_from_save_to_save(base, adapter, tmp_path):
    model = load_adapter(Llama.from_pretrained(base), adapter)
    for i in range(6):
        save_adapter(model, tmp_path / str(i), str(base))
    assert len({(tmp_path / str(i) / ADAPTER).read_bytes() for i in range(6)}) == 1
