"""Adapter folders of peft 0.21 as people have them, judged by peft: ranks, alphas and modules of their own."""
import json

import pytest
import torch
from conftest import run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lora import ADAPTER, CONFIG, TOKENS, peft_adapter, peft_logits, published
from test_lora import base  # noqa: F401
from test_model import close, edit_tensors, one_line, tiny
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_train import setting  # noqa: F401
from transformers import LlamaForCausalLM

from llama.adapter_config import module_path, read_adapter_config
from llama.weights import PROJECTIONS
from lora import load_adapter, merge_folders, merge_lora, save_adapter
from model import Llama

peft = pytest.importorskip("peft", reason="needs peft")
ALL = list(PROJECTIONS)
CONFIGS = {
    "ranks by name": dict(target_modules=ALL, rank_pattern={"q_proj": 8, "down_proj": 2}),
    "ranks and alphas by name": dict(target_modules=ALL, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 32, "v_proj": 3}),
    "equal scales": dict(target_modules=ALL, rank_pattern={"q_proj": 8, "up_proj": 2}, alpha_pattern={"q_proj": 16, "up_proj": 4}),
    "ranks by block": dict(target_modules=["q_proj", "up_proj"], rank_pattern={r"layers\.1\..*": 6}),
    "ranks by regex": dict(target_modules=ALL, rank_pattern={r"layers\.0\.self_attn\.[qk]_proj": 1, "mlp.*": 3}),
    "first pattern counts": dict(target_modules=ALL, rank_pattern={r".*_proj": 2, "q_proj": 8}),
    "whole names": dict(target_modules=ALL, alpha_pattern={"model.layers.0.self_attn.q_proj": 100}),
    "pattern of nothing": dict(target_modules=ALL, rank_pattern={"c_attn": 9, "proj": 7}),
    "end of a name alone": dict(target_modules=ALL, rank_pattern={"_proj": 7}),
    "rslora with ranks": dict(target_modules=ALL, use_rslora=True, rank_pattern={"v_proj": 9, "o_proj": 1}),
    "excluded names": dict(target_modules=ALL, exclude_modules=["v_proj", "layers.0.mlp.up_proj"]),
    "excluded regex": dict(target_modules="all-linear", exclude_modules=r".*layers\.1\..*|.*\.k_proj"),
    "excluded head": dict(target_modules=r".*(q_proj|lm_head)", exclude_modules=["lm_head"]),
    "no layers is all": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "layers and their pattern": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "whole names in spite of layers": dict(target_modules=["model.layers.0.self_attn.q_proj", "v_proj"], layers_to_transform=[1]),
    "alpha 0": dict(target_modules=ALL, lora_alpha=0),
    "alpha 0 of one": dict(target_modules=ALL, alpha_pattern={"o_proj": 0}),
    "negative alpha": dict(target_modules=["o_proj"], lora_alpha=-4),
    "targets that a Llama lacks": dict(target_modules=["q_proj", "c_attn", "query_key_value", "w1", "proj"]),
    "orthogonal": dict(target_modules=["q_proj"], init_lora_weights="orthogonal", r=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapter_of_peft_gives_pefts_logits_and_goes_back(base, tmp_path, config):  # noqa: F811
    want = peft_adapter(base, tmp_path / "theirs", **config)
    model = load_adapter(Llama.from_pretrained(base), tmp_path / "theirs").eval()
    close(model(TOKENS)[0], want, 5e-4)
    save_adapter(model, tmp_path / "ours", str(base))
    close(peft_logits(base, tmp_path / "ours"), want, 5e-4)
    theirs, ours = load_file(tmp_path / "theirs" / ADAPTER), load_file(tmp_path / "ours" / ADAPTER)
    assert theirs.keys() == ours.keys()
    for name in theirs:  # factors of B are powers of two but for odd ranks and alphas
        close(ours[name], theirs[name], atol=0, rtol=2e-7)
    again = load_adapter(Llama.from_pretrained(base), tmp_path / "ours").eval()
    assert again.lora == model.lora
    close(again(TOKENS)[0], model(TOKENS)[0], 1e-6)
    close(merge_lora(model)(TOKENS)[0], want, 5e-4)


def test_alpha_0_beside_another_in_one_group_is_read_and_not_saved_wrong(base, tmp_path):  # noqa: F811
    want = peft_adapter(base, tmp_path / "theirs", target_modules=ALL, alpha_pattern={"k_proj": 0})
    model = load_adapter(Llama.from_pretrained(base), tmp_path / "theirs").eval()
    close(model(TOKENS)[0], want, 5e-4)
    with pytest.raises(ValueError, match="k_proj.*alpha 0"):
        save_adapter(model, tmp_path / "ours", str(base))
    assert not (tmp_path / "ours").exists()


NAMES = st.sampled_from([*ALL, "self_attn.q_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", r".*\.0\..*",
                         r".*mlp.*", r"[qk]_proj", r"layers\.1.*", "c_attn", "_proj", r".*"])
NUMBERS = st.integers(1, 9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(targets=st.lists(NAMES.filter(lambda name: "*" not in name and "[" not in name), min_size=1, max_size=4),
       excluded=st.lists(NAMES.filter(lambda name: "*" not in name), max_size=2), rank=NUMBERS, alpha=NUMBERS,
       ranks=st.dictionaries(NAMES, NUMBERS, max_size=3), alphas=st.dictionaries(NAMES, NUMBERS, max_size=3),
       layers=st.one_of(st.none(), st.lists(st.integers(0, 1), max_size=2), st.integers(0, 1)), rslora=st.booleans())
def test_every_module_has_pefts_rank_and_scale(tmp_path_factory, theirs, targets, excluded, rank, alpha, ranks, alphas,
                                               layers, rslora):
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(target_modules=targets, exclude_modules=excluded, r=rank, lora_alpha=alpha, rank_pattern=ranks,
                             alpha_pattern=alphas, layers_to_transform=layers, use_rslora=rslora)
    config.save_pretrained(folder)
    config = peft.LoraConfig.from_pretrained(folder)  # as their own file says it: without the order
    try:
        model = peft.get_peft_model(theirs(), config)
    except ValueError:
        model = None  # no module fits
    ours = read_adapter_config(folder)
    for layer in range(2):
        for name in PROJECTIONS:
            module = model and model.base_model.model.get_submodule(module_path(layer, name))
            has = hasattr(module, "lora_A")
            assert ours.adapts(layer, name) == has
            if has:
                assert ours.size_of(layer, name)[0] == module.r["default"]
                assert ours.scale_of(layer, name) == module.scaling["default"]


@pytest.fixture
def theirs(base):  # noqa: F811
    return lambda: LlamaForCausalLM.from_pretrained(base)


def test_spectrum_of_an_adapter_with_ranks_of_its_own_is_that_of_its_change(base, tmp_path):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", **CONFIGS["ranks and alphas by name"])
    done = run_here("spectrum.py", f"--base={base}", f"--tuned={tmp_path / 'theirs'}", f"--out={tmp_path / 's.json'}")
    assert done.returncode == 0, done.stderr
    merged = merge_lora(load_adapter(Llama.from_pretrained(base, torch.float64), tmp_path / "theirs"))
    plain = Llama.from_pretrained(base, torch.float64)
    matrices = json.loads((tmp_path / "s.json").read_text())["matrices"]
    found = {(m["layer"], m["module"]): m for m in matrices if m["matrix"] == "D"}
    assert len(found) == 14
    rows = {"q_proj": slice(0, 32), "k_proj": slice(32, 48), "v_proj": slice(48, 64)}
    for layer in range(2):
        weights = [model.layers[layer].self_attn.qkv_proj.weight for model in (merged, plain)]
        for name, part in rows.items():
            want = torch.linalg.svdvals((weights[0] - weights[1])[part])
            got = torch.tensor(found[layer, name]["singular_values"], dtype=torch.float64)
            close(got[:4], want[:4], atol=1e-6)


def test_what_has_other_scales_in_a_group_is_not_trained_and_equal_scales_are(setting, tmp_path):  # noqa: F811
    folder, knobs = setting
    for name, status in (("ranks by name", 2), ("equal scales", 0)):
        peft_adapter(folder / "base", folder / name, **CONFIGS[name])
        run = folder / f"run of {name}"
        done = run_here("train.py", *knobs, f"--adapter={folder / name}", f"--out_dir={run}", "--max_steps=3",
                        "--optimizer=adamw", "--weight_decay=0.1")
        assert done.returncode == status, done.stderr
        if status:
            assert "rank_pattern" in done.stderr and done.stderr.count("\n") == 1
    # what fills up the smaller ranks stayed zero: the file holds no more than peft's
    model = load_adapter(Llama.from_pretrained(folder / "base"), run / "step_3").eval()
    close(peft_logits(folder / "base", run / "step_3"), model(TOKENS)[0], 1e-4)
    before = load_adapter(Llama.from_pretrained(folder / "base"), folder / "equal scales")
    assert not torch.equal(published(before)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
                           published(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"])
    assert model.layers[0].self_attn.qkv_proj.lora_B[32:, 4:].count_nonzero() == 0


def test_training_keeps_what_fills_up_smaller_ranks_at_zero(base, tmp_path):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", **CONFIGS["equal scales"])
    model = load_adapter(Llama.from_pretrained(base), tmp_path / "theirs").train()
    model(TOKENS, TOKENS)[1].backward()
    module = model.layers[1].self_attn.qkv_proj
    assert module.rank == 8 and module.sizes["k_proj"] == (4, 8)
    assert module.lora_A.grad[12:16].count_nonzero() == 0 and module.lora_A.grad[8:12].count_nonzero() > 0
    assert module.lora_B.grad[32:, 4:].count_nonzero() == 0 and module.lora_B.grad[:32, 4:].count_nonzero() > 0


# ----------------------------------------------------------------------------- embeddings saved along
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_untrained_embeddings_saved_along_change_nothing(tmp_path, dtype, tied):
    base = tmp_path / "base"  # noqa: F811
    tiny(tie_word_embeddings=tied).save_pretrained(base)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    names = load_file(tmp_path / "with" / ADAPTER).keys() - load_file(tmp_path / "without" / ADAPTER).keys()
    assert names >= {"base_model.model.model.embed_tokens.weight"}
    for own in (torch.float32, torch.bfloat16):
        a, b = (load_adapter(Llama.from_pretrained(base, own), tmp_path / which) for which in ("with", "without"))
        assert torch.equal(a(TOKENS)[0], b(TOKENS)[0])


@pytest.mark.parametrize("how", ["trained", "resized", "trained head"])
def test_trained_or_resized_embeddings_are_refused_by_name(base, tmp_path, how):  # noqa: F811
    theirs = LlamaForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    name = "base_model.model.lm_head.weight" if how == "trained head" else "base_model.model.model.embed_tokens.weight"
    matrix = load_file(tmp_path / "theirs" / ADAPTER)[name]
    matrix = torch.cat((matrix, matrix[:3])) if how == "resized" else matrix + 1e-4
    edit_tensors({name: matrix}, ADAPTER)(tmp_path / "theirs")
    with pytest.raises(ValueError) as error:
        load_adapter(Llama.from_pretrained(base), tmp_path / "theirs")
    one_line(error, "theirs", name, "merge_and_unload")
    with pytest.raises(ValueError):
        merge_folders(base, tmp_path / "theirs", tmp_path / "out", torch.float32)
    softened = run_here("analysis/soften.py", f"--adapter={tmp_path}/theirs", f"--base={base}", f"--out={tmp_path}/out")
    spectra = run_here("spectrum.py", f"--tuned={tmp_path}/theirs", f"--base={base}", f"--out={tmp_path}/out")
    for refused in (softened, spectra):
        assert refused.returncode == 2 and f"{name} " in refused.stderr and "is not the base's" in refused.stderr
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- wrong types
WRONG = ["4", [4], {"a": 1}, True, 1.5, -1, 10 ** 30, float("nan"), "", [[1]], "(", ["("], {"(": 4}, {"q_proj": "4"}, None]
KEYS = ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "modules_to_save", "init_lora_weights", "peft_type",
        "trainable_token_indices", "base_model_name_or_path"]


@pytest.mark.parametrize("key", KEYS)
def test_wrong_types_in_adapter_config_are_one_line(base, tmp_path, key):  # noqa: F811
    peft_adapter(base, tmp_path / "theirs", target_modules=["q_proj"])
    as_it_was = (tmp_path / "theirs" / CONFIG).read_text()
    for value in WRONG:
        (tmp_path / "theirs" / CONFIG).write_text(json.dumps({**json.loads(as_it_was), key: value}))
        try:
            load_adapter(Llama.from_pretrained(base), tmp_path / "theirs")
        except ValueError as error:
            assert "theirs" in str(error) and "\n" not in str(error) and len(str(error)) < 600
