"""Model and adapter folders that people really have: not finite, saved twice, quantised, of either transformers."""
import gc
import json
import math
import os
import shutil
import stat

import pytest
import torch
from conftest import run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import SHAPE, close, edit_config, edit_tensors, one_line, tiny, tokens_like
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_train import setting  # noqa: F401
from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM

from analysis.folders import open_model
from llama.functions import rotary_frequencies
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 20), entry=st.integers(0, 10 ** 6), stored=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
       loaded=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
       value=st.one_of(st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 65504.0, 65520.0, 1e-45, -0.0]),
                       st.floats(width=32)))
def test_a_base_loads_if_all_entries_are_finite_and_only_then(tmp_path_factory, which, entry, stored, loaded, value):
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder, stored, shard_bytes=10 ** 9 if entry % 2 else 12000)
    files = sorted(folder.glob("*.safetensors"))
    file = files[which % len(files)]
    tensors = load_file(file)
    name = sorted(tensors)[which % len(tensors)]
    tensor = tensors[name]
    tensor.view(-1)[entry % tensor.numel()] = value
    save_file(tensors, file, {"format": "pt"})
    if tensor.to(loaded).isfinite().all():
        Llama.from_pretrained(folder, loaded)
        return
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(folder, loaded)
    one_line(error, str(folder), name, "NaN or infinity")


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.embed_tokens.weight"])
def test_spectra_of_a_folder_without_its_norm_or_embeddings(base, tmp_path, lost):
    """One line; and a tensor whose name has no dot is none of ours."""
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["scale"] = torch.ones(1)
    save_file(tensors, other / "model.safetensors")
    done = run_here("spectrum.py", f"--base={base}", f"--tuned={other}", f"--out={tmp_path}/a.json", "--device=cpu")
    assert done.returncode == 0, done.stderr
    for name in (lost, "lm_head.weight"):
        tensors.pop(name, None)
    save_file(tensors, other / "model.safetensors")
    done = run_here("spectrum.py", f"--base={base}", f"--tuned={other}", f"--out={tmp_path}/b.json", "--device=cpu")
    assert done.returncode == 2 and "its norm or its embeddings are missing" in done.stderr, done.stderr


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


# ----------------------------------------------------------------------------- two saves in one folder
def transformers_norm(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).model.norm.weight


@pytest.mark.parametrize("leftovers", ["shards and index", "index alone", "shards alone", "a shard is missing", "broken index"])
def test_a_single_file_is_read_before_an_index_as_in_transformers(tmp_path, capsys, leftovers):
    old, new = tiny(seed=0), tiny(seed=1)
    old.save_pretrained(tmp_path / "old", shard_bytes=12000)
    new.save_pretrained(tmp_path / "new")
    shards = sorted((tmp_path / "old").glob("*.safetensors"))
    index = tmp_path / "old" / "model.safetensors.index.json"
    if leftovers == "index alone":
        [shard.unlink() for shard in shards]
    elif leftovers == "a shard is missing":
        shards[1].unlink()
    elif leftovers == "shards alone":
        index.unlink()
    elif leftovers == "broken index":
        index.write_text("{")
    shutil.copyfile(tmp_path / "new" / "model.safetensors", tmp_path / "old" / "model.safetensors")
    model = Llama.from_pretrained(tmp_path / "old")
    note = capsys.readouterr().out
    assert torch.equal(model.norm.weight, new.norm.weight)
    assert torch.equal(model.norm.weight, transformers_norm(tmp_path / "old"))
    for path in (tmp_path / "old").glob("model*"):
        assert note.count(path.name) >= 1
    assert note.count("\n") == 1 and "passed over" in note
    # and the tensors of spectrum.py are the same file's
    files = open_model(tmp_path / "old", model.config).files
    assert torch.equal(files["model.norm.weight"].get_tensor("model.norm.weight"), new.norm.weight)


def test_an_index_of_the_single_file_itself_is_not_passed_over(tmp_path, capsys):
    """mlx-lm 0.32.2 writes one beside every model."""
    model = tiny()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(Llama.from_pretrained(tmp_path).norm.weight, model.norm.weight)
    assert capsys.readouterr().out == ""


LEFT = [(single, index, shards) for single in (False, True) for index in (False, True) for shards in range(8)]


@pytest.mark.parametrize("single, index, shards", LEFT)
def test_whatever_is_left_of_two_saves_is_read_as_transformers_reads_it(tmp_path, single, index, shards):
    """Of a newer single file, an older index and three older shards, all that may be there."""
    total = sum(p.nbytes for p in tiny().parameters())
    tiny(seed=0).save_pretrained(tmp_path, shard_bytes=total * 2 // 5)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    for number, file in enumerate(files):
        if not shards & 1 << number:
            file.unlink()
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    if single:
        tiny(seed=1).save_pretrained(tmp_path / "new")
        shutil.copyfile(tmp_path / "new" / "model.safetensors", tmp_path / "model.safetensors")
    try:
        want = transformers_norm(tmp_path)
    except Exception:  # 4.57 and 5.24 raise different ones
        with pytest.raises(FileNotFoundError):
            Llama.from_pretrained(tmp_path)
        return
    assert torch.equal(Llama.from_pretrained(tmp_path).norm.weight, want)


def test_shards_without_a_single_file_are_read_by_their_index_without_a_note(tmp_path, capsys):
    tiny(seed=0).save_pretrained(tmp_path, shard_bytes=12000)
    assert torch.equal(Llama.from_pretrained(tmp_path).norm.weight, transformers_norm(tmp_path))
    assert not capsys.readouterr().out


# ----------------------------------------------------------------------------- config.json
LEAST = {"model_type": "llama", **{k: SHAPE[k] for k in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings")}}
ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=32)
FIVE = dict(rope_type="default", rope_theta=5e5)
# keys of config.json, inv_freq that LlamaForCausalLM of transformers 5.24.0 has for them
ROPES_5_24 = [
    (dict(rope_parameters=FIVE, rope_scaling=ROPE3), [1.0, 0.012500000186264515, 0.0012499999720603228, 0.0001250000059371814]),
    (dict(rope_parameters=FIVE, rope_scaling=ROPE3, rope_theta=7e4),
     [1.0, 0.007684851530939341, 0.00047245557652786374, 2.904601024056319e-05]),
    (dict(rope_parameters=FIVE, rope_scaling={**ROPE3, "rope_theta": 9e4}, rope_theta=7e4),
     [1.0, 0.007216877769678831, 0.00041666667675599456, 2.40562621911522e-05]),
    (dict(rope_parameters=dict(rope_type="default"), rope_theta=7e4),
     [1.0, 0.061478812247514725, 0.00377964461222291, 0.00023236808192450553]),
    (dict(rope_scaling=ROPE3, rope_theta=7e4), [1.0, 0.007684851530939341, 0.00047245557652786374, 2.904601024056319e-05]),
    (dict(rope_parameters=dict(rope_theta=5e5), rope_scaling={}),
     [1.0, 0.03760603070259094, 0.001414213445968926, 5.3182957344688475e-05]),
    (dict(rope_parameters=dict(rope_theta=5e5), rope_scaling=None, rope_theta=7e4),
     [1.0, 0.03760603070259094, 0.001414213445968926, 5.3182957344688475e-05]),
    (dict(rope_parameters=None, rope_theta=7e4), [1.0, 0.061478812247514725, 0.00377964461222291, 0.00023236808192450553]),
    (dict(rope_parameters={}, rope_theta=7e4), [1.0, 0.061478812247514725, 0.00377964461222291, 0.00023236808192450553]),
    (dict(rope_parameters={**ROPE3, "rope_theta": 5e5}, rope_scaling=dict(type="default")),
     [1.0, 0.10000000149011612, 0.009999999776482582, 0.0010000000474974513])]


@pytest.mark.parametrize("rope, wanted", ROPES_5_24, ids=range(len(ROPES_5_24)))
def test_rope_is_what_transformers_5_24_makes_of_all_keys(tmp_path, rope, wanted):
    (tmp_path / "config.json").write_text(json.dumps({**LEAST, **rope}))
    close(rotary_frequencies(LlamaConfig.from_json(tmp_path)), wanted, atol=0, rtol=1e-6)


@pytest.mark.parametrize("rope", [dict(rope_theta=None), dict(rope_parameters=dict(rope_theta=None)),
                                  dict(rope_scaling=ROPE3, rope_theta=None), dict(rope_theta="10000"),
                                  dict(rope_parameters=[1]), dict(rope_scaling="llama3"), dict(rope_theta=0),
                                  dict(rope_scaling={**ROPE3, "factor": "8"}), dict(rope_scaling=dict(factor=8.0)),
                                  dict(rope_scaling=dict(rope_type="default", type="linear", factor=8.0)),
                                  dict(rope_scaling={**ROPE3, "type": "dynamic"}), dict(partial_rotary_factor=0.5)], ids=str)
def test_rope_that_no_tool_computes_is_one_line(tmp_path, rope):
    (tmp_path / "config.json").write_text(json.dumps({**LEAST, **rope}))
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_json(tmp_path)
    one_line(error, "config.json", "rope|factor")


def test_missing_keys_have_the_defaults_of_transformers(tmp_path):
    least = {key: LEAST[key] for key in LEAST if key not in ("num_key_value_heads", "max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(least))
    ours, theirs = LlamaConfig.from_json(tmp_path), AutoConfig.from_pretrained(tmp_path)
    for key in ("num_key_value_heads", "max_position_embeddings", "head_dim", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
                "bos_token_id", "eos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == getattr(theirs, "rope_theta", 10000.0) and ours.rope_scaling is None


WRONG = ["32", [32], {"a": 1}, True, 1.5, -1, 0, 10 ** 30, math.nan, math.inf, "", [], [[1]], "x" * 10 ** 5]


@pytest.mark.parametrize("key", [*LEAST, "head_dim", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id",
                                 "eos_token_id", "hidden_act", "attention_bias", "mlp_bias", "rope_theta", "rope_scaling",
                                 "rope_parameters", "quantization_config", "partial_rotary_factor"])
def test_wrong_types_in_config_are_one_line(base, key):
    as_it_was = (base / "config.json").read_text()
    refused = 0
    for value in WRONG:
        config = {**json.loads(as_it_was), key: value}
        (base / "config.json").write_text(json.dumps(config))
        try:
            Llama.from_pretrained(base)
        except ValueError as error:
            refused += 1
            assert str(base) in str(error) and "\n" not in str(error) and len(str(error)) < 500
    assert refused >= 6


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool])
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_quantised_weights_are_refused_by_that_word(base, adapter, dtype, what):
    folder, file, name = {"base": (base, "model.safetensors", "model.layers.0.mlp.up_proj.weight"),
                          "adapter": (adapter, ADAPTER, Q_A)}[what]
    tensors = load_file(folder / file)
    edit_tensors({name: tensors[name].clamp(-1, 1).to(dtype)}, file)(folder)
    with pytest.raises(ValueError) as error:
        load_adapter(Llama.from_pretrained(base), adapter)
    one_line(error, file, name, "quantised")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "compressed-tensors"])
def test_a_quantization_config_is_refused_by_that_word(base, method):
    edit_config(quantization_config={"quant_method": method})(base)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(base)
    one_line(error, "config.json", "quantised", "dequantize")


# ----------------------------------------------------------------------------- folders made from a base
BESIDE = {"tokenizer.model": b"m", "tokenizer.json": b"{}", "tokenizer_config.json": b'{"chat_template": "x"}',
          "special_tokens_map.json": b'{"pad_token": "<pad>"}', "added_tokens.json": b'{"<pad>": 60}',
          "chat_template.jinja": b"{{ messages }}", "generation_config.json": b'{"eos_token_id": [2, 7], "do_sample": true}'}


def dress(base):
    """Give a base all that people's bases have."""
    for name, content in BESIDE.items():
        (base / name).write_bytes(content)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("r")
    config = json.loads((base / "config.json").read_text())
    config.update(eos_token_id=[2, 7], bos_token_id=None, pad_token_id=60, use_cache=True, pretraining_tp=1,
                  transformers_version="4.31.0", _name_or_path="/home/me", torch_dtype="float16")
    (base / "config.json").write_text(json.dumps(config))


def check_carried(folder, base):
    for name, content in BESIDE.items():
        assert (folder / name).read_bytes() == content
    assert (folder / "additional_chat_templates" / "rag.jinja").read_text() == "r"
    config, before = (AutoConfig.from_pretrained(path) for path in (folder, base))
    for key in ("eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "vocab_size"):
        assert getattr(config, key) == getattr(before, key), key
    ours, its = (LlamaConfig.from_json(path) for path in (folder, base))
    assert (ours.rope_theta, ours.rope_scaling) == (its.rope_theta, its.rope_scaling)
    assert config.eos_token_id == [2, 7] and config.bos_token_id is None and config.pad_token_id == 60
    assert config.dtype == torch.float32
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 7]
    raw = json.loads((folder / "config.json").read_text())
    assert "_name_or_path" not in raw and "dtype" not in raw


@pytest.mark.parametrize("slash", ["", "/"])
def test_merged_folder_carries_what_its_base_has(base, adapter, tmp_path, slash):
    dress(base)
    merge_folders(base, adapter, f"{tmp_path / 'out'}{slash}", torch.float32)
    check_carried(tmp_path / "out", base)


def test_checkpoint_of_full_finetuning_carries_what_its_base_has(setting):  # noqa: F811
    folder, knobs = setting
    dress(folder / "base")
    for name in ("tokenizer.model", "tokenizer.json"):  # train.py looks into them
        (folder / "base" / name).unlink()
    done = run_here("train.py", *knobs, f"--out_dir={folder / 'run'}", "--max_steps=1")
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / "run" / "step_1" / name).write_bytes(BESIDE[name])
    check_carried(folder / "run" / "step_1", folder / "base")


def test_a_base_in_the_form_of_transformers_5_is_carried_in_one_form(base, adapter, tmp_path):
    """No folder of ours has rope_parameters beside rope_scaling, nor dtype beside torch_dtype."""
    config = json.loads((base / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    config.update(dtype="bfloat16", rope_parameters={**ROPE3, "rope_theta": 5e5})
    (base / "config.json").write_text(json.dumps(config))
    model = load_adapter(Llama.from_pretrained(base), adapter)
    merge_folders(base, adapter, tmp_path / "out", torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_parameters" not in written and "dtype" not in written and written["torch_dtype"] == "float32"
    assert LlamaConfig.from_json(tmp_path / "out") == model.config
