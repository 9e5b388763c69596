"""model.py against transformers: logits, loss, gradients, files, generation; every bad folder as one line."""
import json
import math
import shutil
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, need
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

import model as model_module
from model import IGNORE, ChunkedCrossEntropy, Llama, LlamaConfig, RMSNorm, Rotary, SwiGLU, rotary_frequencies, sample_ids

GOLDEN_MODELS = ["mha-untied", "gqa-theta500k", "mqa-tied-eps6", "headdim-explicit", "llama3-rope", "sharded3",
                 "fp16-stored"]
PRECISIONS = [pytest.param(torch.float32, "fp32", 1e-4, 1e-5, id="fp32"),
              pytest.param(torch.float64, "fp64", 1e-8, 1e-8, id="fp64")]  # dtype, suffix, of logits, of loss
SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3)
ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=32)
KINDS = {"mha": dict(num_key_value_heads=4), "gqa-tied": dict(tie_word_embeddings=True),
         "mqa-eps6": dict(num_key_value_heads=1, rms_norm_eps=1e-6), "headdim": dict(hidden_size=40, head_dim=16),
         "llama3-tied": dict(rope_scaling=ROPE3, rope_theta=500000.0, tie_word_embeddings=True)}


# ----------------------------------------------------------------------------- helpers
def tiny(dtype=torch.float32, seed=0, **changes):
    """A small model whose every parameter is random, norms too."""
    model = Llama(LlamaConfig(**{**SHAPE, **changes})).init_weights(seed).to(dtype)
    model.compute_dtype = dtype
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.linspace(-0.4, 0.4, len(p)))
    return model


def tokens_like(*shape, seed=0, vocab=SHAPE["vocab_size"]):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, atol, rtol=0.0):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), atol=atol, rtol=rtol)


def loss_of(model, input_ids, labels):
    """Mean loss for labels that stand under their own token, as the fixtures have them."""
    labels = torch.tensor(labels)
    targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), 1)
    return model(torch.tensor(input_ids), targets)[1]


def transformers_logits(folder, tokens):
    """Logits of the folder in transformers, which must use each of its tensors."""
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model(tokens).logits


@cache
def fixture(name):
    return golden(name)


def golden_model(name, dtype=torch.float32):
    """(model, its recorded outputs)."""
    record = next(m for m in fixture("llama_logits")["random_models"] if m["name"] == name)
    return Llama.from_pretrained(need(f"golden/{record['dir']}"), dtype), record


# ----------------------------------------------------------------------------- the forward pass
@pytest.mark.parametrize("dtype, suffix, of_logits, of_loss", PRECISIONS)
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_logits_and_losses_are_transformers(name, dtype, suffix, of_logits, of_loss):
    model, record = golden_model(name, dtype)
    assert sum(p.numel() for p in model.parameters()) == record["n_params"]
    for item in record["items"]:
        logits = model(torch.tensor([item["input_ids"]]))[0][0, item["positions"]]
        close(logits, item[f"logits_{suffix}"], of_logits)
        close(loss_of(model, [item["input_ids"]], [item["labels"]]), item[f"loss_{suffix}"], of_loss)
    batch = record["right_padded_batch"]  # what stands right of a row's end does not change it
    last = torch.tensor(batch["attention_mask"]).sum(1) - 1
    logits = model(torch.tensor(batch["input_ids"]))[0][torch.arange(len(last)), last]
    close(logits, batch[f"last_real_logits_{suffix}"], of_logits)
    close(loss_of(model, batch["input_ids"], batch["labels"]), batch[f"loss_{suffix}"], of_loss)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_greedy_ids_and_rotary_frequencies_are_transformers(name):
    model, record = golden_model(name)
    ids = model.generate([record["greedy"]["prompt_ids"]], len(record["greedy"]["ids"]))
    assert ids == [[record["greedy"]["ids"]]]
    close(rotary_frequencies(model.config), record["inv_freq"], atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype, suffix, of_logits, of_loss", PRECISIONS)
def test_pretrained_stories260k(dtype, suffix, of_logits, of_loss):
    model = Llama.from_pretrained(need("data/stories260k"), dtype)
    items = fixture("llama_logits")["pretrained"]["items"]
    for item in items:
        ids = torch.tensor([item["input_ids"]])
        close(model(ids)[0][0, -1], item[f"last_logits_{suffix}"], of_logits)
        close(loss_of(model, ids.tolist(), ids.tolist()), item[f"mean_loss_{suffix}"], of_loss)
        for i, want in enumerate(item["token_losses_fp64"]):
            one = torch.full_like(ids, IGNORE)
            one[0, i] = ids[0, i + 1]
            close(model(ids, one)[1], want, max(of_loss, 2e-5 if dtype == torch.float32 else 0))
    assert model.generate([i["input_ids"] for i in items], 64) == [[i["greedy_ids"]] for i in items]


def test_stories260k_writes_the_published_story():
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = need("data/stories260k")
    words = (folder / "greedy_reference.txt").read_text().split()
    ids = Llama.from_pretrained(folder).generate([[1]], 300)[0][0]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(words) > 100 and tokenizer.decode(ids).split()[:len(words)] == words


def test_tinystories_656k_stored_under_the_heads_name():
    folder = need("data/tinystories-656k")
    assert "model.embed_tokens.weight" not in load_file(folder / "model.safetensors")
    tokens = tokens_like(2, 40, vocab=2048)
    close(Llama.from_pretrained(folder)(tokens)[0], transformers_logits(folder, tokens), 1e-4)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_of_transformers_loads_with_equal_logits(tmp_path, kind, shard_size):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(HFConfig(**{**SHAPE, **KINDS[kind]}))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.5, 1.5)
        theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
        tokens = tokens_like(2, 50)
        close(Llama.from_pretrained(tmp_path)(tokens)[0], theirs(tokens).logits, 1e-4)


@pytest.mark.parametrize("model_name", ["gqa-theta500k", "mqa-tied-eps6"])
def test_gradients_of_all_base_parameters_are_transformers(model_name):
    record = next(g for g in fixture("peft")["full_grads"] if g["model"] == f"models/{model_name}")
    model = Llama.from_pretrained(need(f"golden/models/{model_name}"))
    loss = loss_of(model, record["batch"]["input_ids"], record["batch"]["labels"])
    loss.backward()
    close(loss.detach(), record["loss"], 1e-5)
    want, names = load_file(need(f"golden/{record['grad_file']}")), set()
    for name, p in model.named_parameters():
        parts = model.file_tensors()[name]
        for (published, _), got in zip(parts, p.grad.split([rows for _, rows in parts])):
            close(got, want[published], 1e-4 * want[published].abs().max().item())
            names.add(published)
    assert names == want.keys()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    close(norm, record["grad_global_l2_norm"], atol=0, rtol=1e-5)


def test_fp32_master_weights_compute_in_bf16():
    """compute_dtype bf16 over fp32 parameters is the model with rounded parameters, and has fp32 gradients."""
    master, rounded, tokens = tiny(), tiny(torch.bfloat16), tokens_like(2, 9)
    master.compute_dtype = torch.bfloat16
    assert torch.equal(master(tokens)[0], rounded(tokens)[0]) and master(tokens)[0].dtype == torch.bfloat16
    master(tokens, tokens)[1].backward()
    assert all(p.grad.dtype == torch.float32 for p in master.parameters())


def test_fresh_weights_are_a_function_of_the_seed_and_know_nothing():
    a, b, other = (Llama(LlamaConfig(**{**SHAPE, "initializer_range": 0.02})).init_weights(s) for s in (1, 1, 2))
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert not torch.equal(a.embed_tokens.weight, other.embed_tokens.weight)
    assert all(torch.equal(p, torch.ones_like(p)) for p in a.parameters() if p.dim() == 1)
    close(a.embed_tokens.weight.std(), 0.02, 1e-3)
    close(a.layers[0].mlp.down_proj.weight.std(), 0.02 / math.sqrt(2 * 2), 1e-3)
    close(a(tokens_like(4, 30), tokens_like(4, 30, seed=1))[1], math.log(61), 0.1)


# ----------------------------------------------------------------------------- pieces and their backward
def norm_by_hand(x, w):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w


def rotary_by_hand(x, cos, sin):
    z = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), -1)


def swiglu_by_hand(gu):
    gate, up = gu.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("piece, by_hand, shapes", [
    (lambda x, w: RMSNorm.apply(x, w, 1e-5), norm_by_hand, [(2, 3, 8), (8,)]),
    (lambda x, a: Rotary.apply(x, a.detach().cos(), a.detach().sin()),
     lambda x, a: rotary_by_hand(x, a.cos(), a.sin()), [(2, 3, 4, 8), (1, 3, 1, 4)]),
    (SwiGLU.apply, swiglu_by_hand, [(2, 3, 8)])], ids=["RMSNorm", "Rotary", "SwiGLU"])
def test_piece_equals_its_formula_and_its_backward_is_the_derivative(piece, by_hand, shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    close(piece(*inputs), by_hand(*inputs), 1e-12)
    differentiable = inputs if piece is not None and by_hand is norm_by_hand else inputs[:1]
    assert torch.autograd.gradcheck(piece, [x.requires_grad_(x in differentiable) if False else x.requires_grad_(
        any(x is d for d in differentiable)) for x in inputs])
