"""Bases are told apart by what they hold: in any dtype, under any path; old adapters too."""
import gc
import json
import shutil
from itertools import permutations, product

import pytest
import torch
from conftest import need, run_here
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import close, one_line, tiny, tokens_like
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_train import setting  # noqa: F401

from llama.identity import identity_of, identity_of_folder, is_same_base
from llama.weights import file_tensors
from lora import apply_lora, load_adapter, merge_lora, save_adapter
from model import Llama
from training.checkpoint import means_the_same

ADAPTER = "adapter_model.safetensors"
OLD_FINGERPRINT = "29098229e549bafa7f74d4ad75ca83be453019d98a129f2e785a3b8f1830d109"  # of tiny()
DTYPES = torch.float32, torch.float16, torch.bfloat16
# what the weights went through: every chain of up to three dtypes
CHAINS = [chain for n in (1, 2, 3) for chain in permutations(DTYPES, n)]


def through(folder, chain, out):
    """A base whose weights were stored in each dtype of the chain."""
    for dtype in chain:
        model = Llama.from_pretrained(folder, torch.float32)
        model.save_pretrained(out, dtype)
        folder = out
    return out


def with_adapter(base, folder, **knobs):
    torch.manual_seed(0)
    model = apply_lora(Llama.from_pretrained(base, **knobs), 4, 8)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, 0, 0.3)
    save_adapter(model, folder, str(base))
    return model.eval()


# ----------------------------------------------------------------------------- in any dtype
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(str(dtype)[6:] for dtype in chain))
@pytest.mark.parametrize("base", ["tiny", "data/stories260k"])
def test_a_base_is_the_same_whatever_dtypes_it_went_through(base, chain, tmp_path):
    if base == "tiny":
        tiny(initializer_range=0.02, hidden_size=128).save_pretrained(tmp_path / "tiny")
        base = tmp_path / "tiny"
    else:
        base = need(base)
    assert_same_through(base, chain, tmp_path)


def test_a_larger_base_is_the_same_whatever_dtypes_it_went_through(tmp_path):
    base = need("data/tinystories-656k")
    for number, chain in enumerate(CHAINS):
        assert_same_through(base, chain, tmp_path / str(number))


def assert_same_through(base, chain, tmp_path):
    """A base stored in each dtype of the chain takes the first one's adapter, and the other way."""
    want = with_adapter(base, tmp_path / "adapter")
    other = through(base, chain, tmp_path / "other")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_adapter(Llama.from_pretrained(other, dtype), tmp_path / "adapter")
    tokens = tokens_like(1, 9)
    close(load_adapter(Llama.from_pretrained(other), tmp_path / "adapter").eval()(tokens)[0], want(tokens)[0], 0.5)
    # and an adapter trained on the other one goes on the first
    with_adapter(other, tmp_path / "back")
    load_adapter(Llama.from_pretrained(base), tmp_path / "back")
    assert model.config.vocab_size and is_same_base(identity_of_folder(base), identity_of_folder(other))


@pytest.mark.parametrize("seeds", list(product((0, 1, 2), repeat=2)), ids=str)
def test_other_bases_are_others(seeds):
    a, b = (identity_of(tiny(initializer_range=0.02, hidden_size=128, seed=seed)) for seed in seeds)
    assert is_same_base(a, b) == (seeds[0] == seeds[1])


@pytest.mark.parametrize("change", [0.05, 0.01, 0.005, 0.003])
def test_a_base_that_was_trained_on_is_another(change):
    model = tiny(initializer_range=0.02, hidden_size=128)
    before = identity_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + change * torch.randn_like(p).sign())
    assert not is_same_base(before, identity_of(model)) and not is_same_base(identity_of(model), before)


def names_of(model):
    return [published for parts in file_tensors(model).values() for published, _ in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_change_of_any_weight_makes_another_base(tmp_path, tied, dtype):
    """As merging an adapter of the MLP does, which leaves the beginning of a model as it was."""
    model = tiny(initializer_range=0.02, hidden_size=128, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, dtype)
    before = identity_of_folder(tmp_path)
    assert before == identity_of(Llama.from_pretrained(tmp_path)) == identity_of(Llama.from_pretrained(tmp_path, torch.float64))
    tensors = load_file(tmp_path / "model.safetensors")
    assert sorted(tensors) == sorted(names_of(model))
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            changed = tensor * 1.02
        else:
            changed = tensor + 0.002 * torch.outer(torch.randn(len(tensor)), torch.randn(tensor.shape[1])).to(dtype)
        save_file({**tensors, name: changed}, tmp_path / "model.safetensors")
        after = identity_of_folder(tmp_path)
        assert not is_same_base(before, after) and not is_same_base(after, before), name
        # and stored in fp16 on the way, it is none of the others either
        save_file({n: t.half() for n, t in {**tensors, name: tensor * 1.02}.items()}, tmp_path / "model.safetensors")
        assert not is_same_base(before, identity_of_folder(tmp_path)), name


def test_an_adapter_of_a_merged_base_does_not_go_on_the_one_below(tmp_path):
    tiny(initializer_range=0.02, hidden_size=128).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = apply_lora(Llama.from_pretrained(tmp_path / "base"), 4, 8, targets="mlp")
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, 0, 0.05)
    merge_lora(model).save_pretrained(tmp_path / "merged")
    with_adapter(tmp_path / "merged", tmp_path / "adapter")
    load_adapter(Llama.from_pretrained(tmp_path / "merged"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="another base model; its adapter_config.json names .*merged"):
        load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_head_stored_beside_the_embedding_that_it_is_tied_to_changes_nothing(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    identity = identity_of_folder(tmp_path)
    embedding = tensors.pop("model.embed_tokens.weight")
    for stored in ({"lm_head.weight": embedding}, {"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": embedding}):
        save_file({**tensors, **stored}, tmp_path / "model.safetensors")
        assert identity_of_folder(tmp_path) == identity == identity_of(Llama.from_pretrained(tmp_path))


def test_the_adapters_of_before_are_accepted_by_their_fingerprint_alone(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    tiny(seed=1).save_pretrained(tmp_path / "other")
    with_adapter(tmp_path / "base", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / ADAPTER)
    with safe_open(tmp_path / "adapter" / ADAPTER, "pt") as file:
        fingerprint = file.metadata()["base_fingerprint"]
    # what the commit before wrote for this base
    assert fingerprint == OLD_FINGERPRINT
    # or by the first 320 numbers as well
    sample = identity_of_folder(through(tmp_path / "base", [torch.float16, torch.bfloat16], tmp_path / "half"))["base_sample"][:1280]
    old = {"base_fingerprint": "of another rounding", "base_sample": sample}
    assert is_same_base(old, identity_of_folder(tmp_path / "base")) and not is_same_base(old, identity_of_folder(tmp_path / "other"))
    save_file(tensors, tmp_path / "adapter" / ADAPTER, {"format": "pt", "base_fingerprint": fingerprint})
    load_adapter(Llama.from_pretrained(tmp_path / "base", torch.bfloat16), tmp_path / "adapter")
    with pytest.raises(ValueError) as error:
        load_adapter(Llama.from_pretrained(tmp_path / "other"), tmp_path / "adapter")
    one_line(error, "adapter", "another base")


@pytest.mark.parametrize("sample", ["", "zz", "00", "0" * 1280, "7fc0" * 320])
def test_a_broken_sample_is_another_base(tmp_path, sample):
    identity = identity_of(tiny())
    assert not is_same_base({"base_fingerprint": "x", "base_sample": sample}, identity)


# ----------------------------------------------------------------------------- under any path
def trained(folder, knobs, *more):
    """train.py with knobs, of which `more` replaces some."""
    gc.collect()  # lets go of the lock
    given = dict(knob.split("=", 1) for knob in [*knobs, f"--out_dir={folder / 'run'}", *more])
    return run_here("train.py", *(f"{name}={value}" for name, value in given.items()))


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("move", ["slash", "relative", "moved base", "fp16 base", "moved data", "microbatch"])
def test_a_run_goes_on_where_its_folders_were_moved(setting, monkeypatch, rank, move):  # noqa: F811
    folder, knobs = setting
    knobs = [*knobs, f"--lora_rank={rank}"]
    assert trained(folder, knobs, "--max_steps=1").returncode == 0
    monkeypatch.chdir(folder)
    if move == "slash":
        knobs.append(f"--base={folder}//base/")
    elif move == "relative":
        knobs += ["--base=base", "--data=./data"]
    elif move == "moved base":
        (folder / "base").rename(folder / "elsewhere")
        knobs.append("--base=elsewhere")
    elif move == "fp16 base":
        through(folder / "base", [torch.float16], folder / "half")
        shutil.rmtree(folder / "base")
        knobs.append("--base=half")
    elif move == "moved data":
        (folder / "data").rename(folder / "tokens")
        knobs.append(f"--data={folder / 'tokens'}")
    else:
        knobs.append("--microbatch=4")
    done = trained(folder, knobs, "--max_steps=2", "--resume=True")
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "step_2").is_dir()
    assert ("note: microbatch was 2" in done.stdout) == (move == "microbatch")


@pytest.mark.parametrize("knob, before, value, norm, same", [
    ("compile", True, False, "token", True), ("compile", False, True, "paper", True),
    ("microbatch", 2, 4, "token", True), ("microbatch", 2, 4, "paper", False), ("seed", 1, 2, "token", False)])
def test_what_changes_dropout_masks_alone_is_noted(capsys, knob, before, value, norm, same):
    assert means_the_same(knob, before, value, {}, {"loss_norm": norm}) == same
    note = (f"note: {knob} was {before}, and is {value} from here on: the same loss but for rounding, and other masks "
            "if there is dropout\n")
    assert capsys.readouterr().out == (note if same else "")


def test_another_base_and_other_microbatches_under_paper_loss_are_refused(setting):  # noqa: F811
    folder, knobs = setting
    assert trained(folder, knobs, "--max_steps=1", "--loss_norm=paper").returncode == 0
    other = Llama.from_pretrained(folder / "base").init_weights(5)
    other.save_pretrained(folder / "other")
    for more, words in ((["--microbatch=4"], "microbatch=2 (now 4)"), ([f"--base={folder / 'other'}"], "base=")):
        done = trained(folder, knobs, "--max_steps=2", "--resume=True", "--loss_norm=paper", *more)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    # a checkpoint that does not say what its base held is compared by the path
    state = folder / "run" / "step_1" / "state" / "state.json"
    content = json.loads(state.read_text())
    for broken in (None, [], "x", {}, {"base_sample": 3}):
        state.write_text(json.dumps({**content, "base": broken}))
        done = trained(folder, knobs, "--max_steps=2", "--resume=True", "--loss_norm=paper", f"--base={folder / 'other'}")
        assert done.returncode == 2 and "base=" in done.stderr, done.stderr


def test_spectrum_takes_checkpoints_that_name_one_base_in_two_ways(setting, monkeypatch):  # noqa: F811
    folder, knobs = setting
    monkeypatch.chdir(folder)
    for i, base in enumerate(("base", "./base/")):
        done = trained(folder, knobs, "--lora_rank=2", f"--base={base}", f"--out_dir=run{i}", "--max_steps=1")
        assert done.returncode == 0, done.stderr
    done = run_here("spectrum.py", "--tuned=run0/step_1,run1/step_1", "--out=s.json", "--layers=0", "--modules=q_proj")
    assert done.returncode == 0, done.stderr
