"""model.py against transformers: logits, loss, gradients, files, generation; every bad folder as one line."""
import copy
import json
import math
import re
import shutil
from collections import defaultdict
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden, need
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from llama.attention import BlockAttention, causal_attention, document_attention
from llama.functions import ChunkedCrossEntropy, RMSNorm, Rotary, SwiGLU, rotary_frequencies
from llama.generate import pick, sample_ids
from llama.weights import file_tensors
from model import IGNORE, Llama, LlamaConfig

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


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are several times faster on one thread, and on a busy machine ten times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        logits = model(ids)[0][0]
        close(logits[-1], item[f"last_logits_{suffix}"], of_logits)
        close(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"), item["token_losses_fp64"], of_logits)
        close(loss_of(model, ids.tolist(), ids.tolist()), item[f"mean_loss_{suffix}"], of_loss)
    assert model.generate([i["input_ids"] for i in items], 64) == [[i["greedy_ids"]] for i in items]


def test_stories260k_writes_the_published_story():
    folder = need("data/stories260k")
    story = " ".join((folder / "greedy_reference.txt").read_text().split())
    ids = Llama.from_pretrained(folder).generate([[1]], 300)[0][0]
    tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(story) > 500 and " ".join(tokenizer.decode(ids).split()).startswith(story)


def test_tinystories_656k_stored_under_the_heads_name():
    folder, tokens = need("data/tinystories-656k"), tokens_like(2, 40, vocab=2048)
    tensors = load_file(folder / "model.safetensors")
    assert "model.embed_tokens.weight" not in tensors
    # the alias in the file's header leaves 4.57.6's from_pretrained with weights on meta
    theirs = LlamaForCausalLM(HFConfig.from_pretrained(folder))
    theirs.load_state_dict({**tensors, "model.embed_tokens.weight": tensors["lm_head.weight"]})
    close(Llama.from_pretrained(folder)(tokens)[0], theirs(tokens).logits, 1e-4)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_of_transformers_loads_with_equal_logits(tmp_path, kind, shard_size):
    torch.manual_seed(0)
    # a copy: transformers 5 writes into the dict of rope_scaling
    theirs = LlamaForCausalLM(HFConfig(**copy.deepcopy({**SHAPE, **KINDS[kind]})))
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
        parts = file_tensors(model)[name]
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
ANGLES = torch.linspace(-3, 3, 12, dtype=torch.float64).view(1, 3, 1, 4)


def norm_by_hand(x, w):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w


def rotary_by_hand(x):
    z = torch.complex(*x.chunk(2, -1)) * torch.complex(ANGLES.cos(), ANGLES.sin())
    return torch.cat((z.real, z.imag), -1)


def swiglu_by_hand(gu):
    gate, up = gu.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("piece, by_hand, shapes", [
    (lambda x, w: RMSNorm.apply(x, w, 1e-5), norm_by_hand, [(2, 3, 8), (8,)]),
    (lambda x: Rotary.apply(x, *Rotary.tables(ANGLES)), rotary_by_hand, [(2, 3, 4, 8)]),
    (SwiGLU.apply, swiglu_by_hand, [(2, 3, 8)])], ids=["RMSNorm", "Rotary", "SwiGLU"])
def test_piece_equals_its_formula_and_its_backward_is_the_derivative(piece, by_hand, shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    close(piece(*inputs), by_hand(*inputs), 1e-12)
    assert torch.autograd.gradcheck(piece, inputs)


def attention_and_gradients(attention, tensors):
    """Value and gradients of attention(q, k, v), in float64, for the same random weights of the outputs."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    out = attention(q, k, v)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), weight))]


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_block_attention_is_attention(monkeypatch, length, kv_heads):
    """Value and gradients: the fused kernel's in fp32, within bf16's rounding in bf16."""
    monkeypatch.setattr("llama.attention.BLOCK", 8)
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, length, 16).bfloat16().float() for heads in (4, kv_heads, kv_heads)]
    exact = attention_and_gradients(fused, tensors)
    for got, want in zip(attention_and_gradients(BlockAttention.apply, tensors), exact):
        close(got, want, 1e-5)
    if length > 1:  # the gradients of one token's q and k are exactly 0
        for got, want in zip(attention_and_gradients(BlockAttention.apply, [x.bfloat16() for x in tensors]), exact):
            assert (got - want).norm() < 0.02 * want.norm()


def test_bf16_on_a_cpu_takes_block_attention_for_training_and_long_prompts(monkeypatch):
    taken, model, tokens = [], tiny(torch.bfloat16), tokens_like(2, 12)
    monkeypatch.setattr(BlockAttention, "apply", lambda *qkv: taken.append(qkv[0].shape) or fused(*qkv))
    with torch.no_grad():
        model(tokens)
    assert not taken
    for docs in (None, torch.tensor([0, 5, 12, 24])):
        model(tokens, tokens, docs)[1].backward()
    assert taken == 2 * [(2, 4, 12, 8)] + 2 * [(1, 4, 5, 8), (1, 4, 7, 8), (1, 4, 12, 8)]
    taken.clear()
    monkeypatch.setattr("llama.attention.BLOCK", 12)
    with torch.no_grad():
        model(tokens)
    assert taken == 2 * [(2, 4, 12, 8)]


@pytest.mark.parametrize("docs", [None, (0, 5, 12, 24)])
def test_attention_dropout_zeroes_its_share_of_probabilities_in_training_alone(docs):
    q, k = (torch.randn(2, 12, heads, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    v = torch.eye(24, dtype=torch.float64).view(2, 12, 1, 24).expand(2, 12, 2, 24)  # so that the output is the probabilities
    attend = lambda p: (causal_attention(q, k, v, p) if docs is None else document_attention(q, k, v, torch.tensor(docs), p))
    torch.manual_seed(0)
    plain, kept = attend(0.0), torch.stack([attend(0.25) for _ in range(200)])
    assert torch.all((kept == 0) | ((kept - plain / 0.75).abs() < 1e-12))
    seen = plain > 0
    assert abs((kept[:, seen] == 0).double().mean() - 0.25) < 0.01

    model, tokens = tiny(), tokens_like(1, 20)
    evaluated = model.eval()(tokens)[0]
    for block in model.layers:
        block.self_attn.dropout = 0.5
    torch.testing.assert_close(model.eval()(tokens)[0], evaluated, rtol=0, atol=0)
    assert not torch.allclose(model.train()(tokens)[0], evaluated)


@pytest.fixture(params=[(1, 1), (61, 61), (3 * 61, 2 * 61), (7 * 61, 10 ** 9), (10 ** 9, 61), (10 ** 9, 10 ** 9)],
                ids=lambda sizes: "chunk{}-piece{}".format(*sizes))
def chunks(request, monkeypatch):
    """Cut the loss into GEMMs and softmaxes of that many logits."""
    for name, numel in zip(("chunk_bytes", "piece_bytes"), request.param):
        monkeypatch.setattr(ChunkedCrossEntropy, name, 8 * numel)


@pytest.mark.parametrize("wanted", [("h", "weight"), ("h",), ("weight",), ()], ids=str)
def test_chunked_loss_is_cross_entropy_and_makes_only_the_gradients_asked_for(chunks, wanted):
    torch.manual_seed(0)
    h, weight = torch.randn(23, 8, dtype=torch.float64), torch.randn(61, 8, dtype=torch.float64)
    inputs = [x.requires_grad_(name in wanted) for x, name in ((h, "h"), (weight, "weight"))]
    targets = tokens_like(23)
    with FlopCounterMode(display=False) as counted:
        got = ChunkedCrossEntropy.apply(*inputs, targets)
    assert counted.get_total_flops() == 2 * 23 * 61 * 8 * (1 + len(wanted))
    want = F.cross_entropy(h @ weight.T, targets, reduction="sum")
    close(got, want, 1e-12)
    if wanted:
        differentiable = [x for x in inputs if x.requires_grad]
        for a, b in zip(*(torch.autograd.grad(0.37 * loss, differentiable) for loss in (got, want))):
            close(a, b, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_the_loss_are_bounded_in_bytes(dtype, monkeypatch):
    rows = []
    monkeypatch.setattr(ChunkedCrossEntropy, "chunk_bytes", 10 * 61 * dtype.itemsize + 3)
    monkeypatch.setattr(torch, "mm", lambda logits, w, out: rows.append(len(logits)))
    ChunkedCrossEntropy.apply(torch.randn(31, 8).to(dtype).requires_grad_(), torch.randn(61, 8).to(dtype), tokens_like(31))
    assert rows == [10, 10, 10, 1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_models_loss_and_gradients_are_those_of_full_logits(chunks, tied, reduction):
    model, tokens = tiny(torch.float64, tie_word_embeddings=tied), tokens_like(2, 11)
    targets = tokens_like(2, 11, seed=1).masked_fill(torch.rand(2, 11, generator=torch.manual_seed(2)) < 0.4, IGNORE)
    full = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
    logits, loss = model(tokens, targets, reduction=reduction)
    assert logits is None
    close(loss, full, 1e-12)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (loss, full))):
        close(a, b, 1e-11)


def test_sum_over_no_predicted_token_is_zero_with_zero_gradients():
    model, tokens = tiny(), tokens_like(2, 5)
    loss = model(tokens, torch.full_like(tokens, IGNORE), reduction="sum")[1]
    loss.backward()
    assert loss.item() == 0 and all(p.grad.count_nonzero() == 0 for p in model.parameters())


@pytest.mark.parametrize("rows", [0, 3, 7])
def test_gradient_of_a_trained_head_is_summed_in_fp32_over_chunks(rows, monkeypatch):
    """bf16 activations, more rows of the head than are added at once, one or several chunks, or no row at all."""
    torch.manual_seed(0)
    V = 5000
    monkeypatch.setattr(ChunkedCrossEntropy, "chunk_bytes", 3 * V * 2)
    h, weight, targets = torch.randn(rows, 16).bfloat16(), torch.randn(V, 16, requires_grad=True), tokens_like(rows)
    got, = torch.autograd.grad(ChunkedCrossEntropy.apply(h, weight, targets), weight)
    # what the chunks are: logits and their gradient in bf16, each product rounded to bf16, sums in fp32
    want = torch.zeros(V, 16)
    for rows_of_h, target in zip(h.split(3), targets.split(3)) if rows else ():
        logits = (rows_of_h @ weight.detach().bfloat16().T).float()
        dz = torch.softmax(logits, -1) - F.one_hot(target, V)
        want += (dz.bfloat16().T @ rows_of_h).float()
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3 * want.abs().max().item())


def test_loss_of_bf16_activations_is_summed_in_fp32():
    torch.manual_seed(0)
    h, weight, targets = torch.randn(300, 16).bfloat16(), torch.randn(61, 16).bfloat16(), tokens_like(300)
    got = ChunkedCrossEntropy.apply(h, weight, targets)
    assert got.dtype == torch.float32
    close(got, F.cross_entropy((h @ weight.T).float(), targets, reduction="sum"), atol=0, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(5, 1, 6, 3, 9), (12, 12), (1,) * 24], ids=str)
def test_packed_documents_are_as_if_each_were_alone(lengths):
    """Logits, loss and all gradients, in float64."""
    model, tokens, targets = tiny(torch.float64), tokens_like(2, 12), tokens_like(2, 12, seed=1)
    targets[0, 3] = targets[1, 11] = IGNORE
    docs = torch.tensor([0, *lengths]).cumsum(0)
    close(model(tokens, docs=docs)[0].flatten(0, 1),
          torch.cat([model(d[None])[0][0] for d in tokens.flatten().split(lengths)]), 1e-10)
    packed = model(tokens, targets, docs=docs, reduction="sum")[1]
    alone = sum(model(d[None], t[None], reduction="sum")[1]
                for d, t in zip(tokens.flatten().split(lengths), targets.flatten().split(lengths)))
    close(packed, alone, 1e-10)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (packed, alone))):
        close(a, b, 1e-10)


def test_without_borders_the_documents_of_a_row_see_each_other():
    model, tokens = tiny(), tokens_like(1, 12)
    apart, together = (model(tokens, docs=docs)[0][0] for docs in (torch.tensor([0, 5, 12]), None))
    close(apart[:5], together[:5], 1e-5)
    assert ((apart - together)[5:].abs().amax(1) > 0.01).all()


# ----------------------------------------------------------------------------- files
@pytest.mark.parametrize("shard_bytes", [10 ** 9, 12000, 1], ids=["one file", "shards", "a shard a tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_is_bit_equal_here_and_complete_in_transformers(tmp_path, kind, shard_bytes):
    model, tokens = tiny(**KINDS[kind]), tokens_like(2, 30)
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10 ** 9) and (shard_bytes == 1 or all(
        sum(t.nbytes for t in load_file(file).values()) <= shard_bytes for file in files))
    again = Llama.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    close(model(tokens)[0], transformers_logits(tmp_path, tokens), 1e-4)


def test_saving_in_bf16_rounds_once_and_says_so(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in (torch.float32, torch.bfloat16):
        again = Llama.from_pretrained(tmp_path, dtype)
        assert again.compute_dtype == dtype
        assert all(torch.equal(p.bfloat16().to(dtype), q) for p, q in zip(model.parameters(), again.parameters()))


def test_saving_again_replaces_what_the_folder_held(tmp_path):
    old, new = tiny(seed=0), tiny(seed=1)
    old.save_pretrained(tmp_path, shard_bytes=12000)
    new.save_pretrained(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path).norm.weight, new.norm.weight)
    assert torch.equal(Llama.from_pretrained(tmp_path).embed_tokens.weight, new.embed_tokens.weight)


def test_rotary_tables_of_old_files_are_ignored(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    edit_tensors({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens_like(1, 9))[0], model(tokens_like(1, 9))[0])


@pytest.mark.parametrize("names", [("lm_head",), ("lm_head", "model.embed_tokens"), ("model.embed_tokens",)], ids=str)
def test_tied_matrix_loads_under_either_name_or_both(tmp_path, names):
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    matrix = {f"{name}.weight": model.embed_tokens.weight.detach().clone() for name in names}
    edit_tensors({"model.embed_tokens.weight": None, **matrix})(tmp_path)
    assert torch.equal(Llama.from_pretrained(tmp_path).embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["gqa-theta500k", "llama3-rope"])
def test_config_written_by_transformers_5_is_the_same(tmp_path, name):
    folder = need(f"golden/models/{name}")
    shutil.copyfile(folder / "config_transformers5.json", tmp_path / "config.json")
    assert LlamaConfig.from_json(tmp_path) == LlamaConfig.from_json(folder)


@pytest.mark.parametrize("rope", [
    dict(rope_theta=5e5), dict(rope_theta=500000, rope_scaling=None), dict(rope_parameters=dict(rope_theta=5e5)),
    dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), rope_scaling=None)], ids=str)
def test_config_defaults_and_forms_of_rope(tmp_path, rope):
    least = {k: SHAPE[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 7], **least, **rope}))
    assert LlamaConfig.from_json(tmp_path) == LlamaConfig(
        **least, num_key_value_heads=4, head_dim=8, rope_theta=5e5, eos_token_id=[2, 7], max_position_embeddings=2048,
        rms_norm_eps=1e-6)


# ----------------------------------------------------------------------------- bad folders
def edit_config(name="config.json", **changes):
    """What makes these changes to a folder's JSON file; None removes a key."""
    def edit(folder):
        config = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return edit


def edit_tensors(changes, file="model.safetensors"):
    """What makes these changes to a folder's tensors; None removes one."""
    def edit(folder):
        tensors = {**load_file(folder / file), **changes}
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / file, metadata={"format": "pt"})
    return edit


def edit_bytes(name, change):
    """What changes the bytes of a folder's file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def only_pickles(folder, name="pytorch_model.bin"):
    (folder / "model.safetensors").rename(folder / name)


def one_line(error, *words):
    """The message is one line that holds all the words."""
    message = str(error.value)
    assert "\n" not in message.strip() and all(re.search(word, message) for word in words), message


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
CUTS = {"cut short": lambda b: b[:-10], "cut in the header": lambda b: b[:100], "empty": lambda b: b"",
        "garbage": lambda b: bytes(range(256)) * 50, "text": lambda b: b"version https://git-lfs.github.com/spec/v1\n"}
BAD_FOLDERS = {
    "no folder": (shutil.rmtree, ["config.json", "not found"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "not found"]),
    "config cut short": (edit_bytes("config.json", lambda b: b[:40]), ["config.json", "JSON"]),
    "config not an object": (edit_bytes("config.json", lambda b: b"[1]"), ["config.json"]),
    "missing keys": (edit_config(vocab_size=None, hidden_size=None), ["config.json", "vocab_size", "hidden_size"]),
    "other heads than the weights": (edit_config(num_key_value_heads=1), ["config.json", "k_proj"]),
    "another model": (edit_config(model_type="mistral"), ["config.json", "model_type", "mistral", "llama"]),
    "no model type": (edit_config(model_type=None), ["config.json", "model_type"]),
    "attention bias": (edit_config(attention_bias=True), ["config.json", "attention_bias"]),
    "mlp bias": (edit_config(mlp_bias=True), ["config.json", "mlp_bias"]),
    "activation": (edit_config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu"]),
    "yarn": (edit_config(rope_scaling=dict(rope_type="yarn", factor=2.0)), ["config.json", "rope_type", "yarn"]),
    "yarn, old form": (edit_config(rope_scaling=dict(type="yarn", factor=2.0)), ["config.json", "yarn"]),
    "llama3 without its numbers": (edit_config(rope_scaling=dict(rope_type="llama3", factor=8.0)),
                                   ["config.json", "low_freq_factor"]),
    "missing tensor": (edit_tensors({"model.norm.weight": None}), ["missing model.norm.weight"]),
    "extra tensor": (edit_tensors({"model.extra": torch.ones(2)}), ["unexpected model.extra"]),
    "misshaped tensor": (edit_tensors({"model.norm.weight": torch.ones(31)}), [r"model.norm.weight \[31\] for \[32\]"]),
    "transposed tensor": (edit_tensors({"model.layers.0.mlp.down_proj.weight": torch.ones(56, 32)}),
                          [r"down_proj.weight \[56, 32\] for \[32, 56\]"]),
    "no head": (edit_tensors({"lm_head.weight": None}), ["missing lm_head.weight"]),
    "head unlike the embeddings": (edit_config(tie_word_embeddings=True), ["lm_head", "embed_tokens", "differ"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "only pickles": (only_pickles, ["pytorch_model.bin", "convert", r"from_pretrained\(folder\).save_pretrained"]),
    "litgpt's own pickle": (partial(only_pickles, name="lit_model.pth"), ["lit_model.pth", "litgpt convert_from_litgpt"]),
    "litgpt's pickle for others": (partial(only_pickles, name="model.pth"), ["model.pth", r"state_dict=torch.load\(it\)"]),
    **{f"weights {what}": (edit_bytes("model.safetensors", cut), ["model.safetensors"]) for what, cut in CUTS.items()}}
BAD_SHARDS = {
    "missing": (lambda f: (f / SHARD).unlink(), [SHARD, "missing", INDEX]),
    "cut short": (edit_bytes(SHARD, lambda b: b[:-10]), [SHARD]),
    "holds less than the index says": (edit_tensors({"model.layers.1.input_layernorm.weight": None}, SHARD),
                                       ["missing model.layers.1.input_layernorm.weight"]),
    "holds a tensor of another shard": (edit_tensors({"model.embed_tokens.weight": torch.ones(61, 32)}, SHARD),
                                        ["model.embed_tokens.weight"]),
    "index cut short": (edit_bytes(INDEX, lambda b: b[:40]), [INDEX]),
    "index without names": (edit_bytes(INDEX, lambda b: b"{}"), [INDEX]),
    "index not an object": (edit_bytes(INDEX, lambda b: b"[]"), [INDEX])}


@pytest.mark.parametrize("spoil, words, shards", [
    *(pytest.param(*case, 1, id=what) for what, case in BAD_FOLDERS.items()),
    *(pytest.param(*case, 3, id=f"shard {what}") for what, case in BAD_SHARDS.items())])
def test_bad_folder_is_one_line_that_names_the_file(tmp_path, spoil, words, shards):
    folder = tmp_path / "model"
    model = tiny()
    total = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder, shard_bytes=10 ** 9 if shards == 1 else total * 2 // 5)
    assert len(list(folder.glob("*.safetensors"))) == shards
    assert torch.equal(Llama.from_pretrained(folder).norm.weight, model.norm.weight)
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Llama.from_pretrained(folder)
    one_line(error, str(folder), *words)


def test_tokens_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="65 tokens.*max_position_embeddings=64"):
        tiny()(tokens_like(1, 65))


# ----------------------------------------------------------------------------- generation
RAGGED = [tokens_like(n, seed=i).tolist() for i, n in enumerate((7, 1, 13, 2, 30, 1, 9))]
SAMPLED = dict(temperature=0.8, top_p=0.9)


@pytest.fixture
def traced(monkeypatch):
    """traced(model, prompts, n_new, **knobs) -> (output, {(prompt, sample): logits of each token}, batches' rows)."""
    def run(model, prompts, n_new, **knobs):
        waiting, logits, rows = [], defaultdict(list), []

        def spy(batch, *args):
            waiting[:] = list(batch.clone())
            rows.append(len(batch))
            return sample_ids(batch, *args)

        monkeypatch.setattr("llama.generate.sample_ids", spy)
        ids = defaultdict(list)
        for p, s, token, _ in model.generate_tokens(prompts, n_new, **knobs):
            ids[p, s].append(token)
            logits[p, s].append(waiting.pop(0))
        out = [[ids[p, s] for s in range(knobs.get("n", 1))] for p in range(len(prompts))]
        return out, logits, rows
    return run


def in_words(knobs):
    """A test's id, which has to be the same in every worker: functions by their names, not their addresses."""
    return str({name: getattr(value, "__name__", value) for name, value in knobs.items()})


def uneven(ids):
    """A stop function that ends rows at very different lengths."""
    return sum(ids) % 5 == 0


@pytest.mark.parametrize("knobs", [dict(), dict(batch_size=2), dict(batch_size=3, stop=uneven, **SAMPLED),
                                   dict(batch_size=4, n=3, stop=uneven, temperature=1.0)], ids=in_words)
@pytest.mark.parametrize("kind", ["mha", "mqa-eps6", "llama3-tied"])
def test_cached_logits_are_those_of_the_whole_sequence(traced, kind, knobs):
    """Every token of every row, in float64: ragged prompts, rows that end, move and are replaced."""
    model = tiny(torch.float64, **KINDS[kind])
    out, logits, rows = traced(model, RAGGED, 20, **knobs)
    assert max(rows) <= knobs.get("batch_size", 64)
    for (p, s), steps in logits.items():
        whole = torch.tensor([RAGGED[p] + out[p][s][:-1]])
        close(torch.stack(steps), model(whole)[0][0, len(RAGGED[p]) - 1:], 1e-10)
    assert len(logits) == len(RAGGED) * knobs.get("n", 1)


@pytest.mark.parametrize("knobs", [dict(), dict(stop=uneven), dict(stop={3, 17, 40})], ids=in_words)
def test_batched_greedy_is_one_by_one_greedy(knobs):
    """In fp32, for ragged prompts, all at once and through two or three places."""
    model = tiny()
    alone = [model.generate([prompt], 20, **knobs)[0] for prompt in RAGGED]
    assert len({tuple(ids) for [ids] in alone}) == len(RAGGED)
    for batch_size in (64, 3, 2):
        assert model.generate(RAGGED, 20, batch_size=batch_size, **knobs) == alone


def test_sampled_rows_depend_on_seed_prompt_and_sample_alone():
    model = tiny()
    out = model.generate(RAGGED, 12, n=3, seed=5, **SAMPLED)
    for batch_size in (1, 2, 5):
        assert model.generate(RAGGED, 12, n=3, seed=5, batch_size=batch_size, **SAMPLED) == out
    others = [[9, 9, 9, 9]] * 2 + RAGGED[2:3] + [[1]] * 9
    assert model.generate(others, 12, n=3, seed=5, **SAMPLED)[2] == out[2]  # neighbours
    assert model.generate(RAGGED, 12, n=1, seed=5, **SAMPLED) == [rows[:1] for rows in out]  # fewer samples
    assert [[ids[:4] for ids in rows] for rows in out] == model.generate(RAGGED, 4, n=3, seed=5, **SAMPLED)


def test_samples_prompts_and_seeds_draw_their_own_numbers():
    model = tiny()
    by_seed = [model.generate([[1, 2, 3]] * 4, 8, n=4, temperature=1.0, seed=seed) for seed in (0, 1)]
    rows = [tuple(ids) for out in by_seed for samples in out for ids in samples]
    assert len(set(rows)) == len(rows) == 32


def falling(ids):
    """A stop function that looks at two tokens, as one on text does."""
    return len(ids) > 1 and ids[-1] < ids[-2]


def cut_at(ids, done):
    end = next((i for i in range(1, len(ids) + 1) if done(ids[:i])), len(ids))
    return ids[:end]


@pytest.mark.parametrize("stop, done", [
    ([3, 17, 40], lambda ids: ids[-1] in (3, 17, 40)), ({8}, lambda ids: ids[-1] == 8), ([], lambda ids: False),
    (uneven, uneven), (falling, falling), (len, len)], ids=["ids", "one id", "no ids", "sum", "pair", "at once"])
def test_a_row_ends_with_the_token_that_stops_it(stop, done):
    model, knobs = tiny(), dict(n=3, temperature=1.0)
    free = model.generate(RAGGED, 20, **knobs)
    for batch_size in (64, 4):
        stopped = model.generate(RAGGED, 20, stop=stop, batch_size=batch_size, **knobs)
        assert stopped == [[cut_at(ids, done) for ids in rows] for rows in free]


def test_tokens_come_in_each_rows_order_and_say_where_it_ends():
    seen, ends, knobs = defaultdict(list), defaultdict(list), dict(n=2, batch_size=3, stop=uneven, **SAMPLED)
    out = tiny().generate(RAGGED, 9, **knobs)
    for p, s, token, ended in tiny().generate_tokens(RAGGED, 9, **knobs):
        seen[p, s].append(token)
        ends[p, s].append(ended)
    assert out == [[seen[p, s] for s in range(2)] for p in range(len(RAGGED))]
    assert all(found == [False] * (len(found) - 1) + [True] for found in ends.values())


def test_a_prompt_is_read_once_for_all_its_samples():
    model, reads = tiny(), []
    model.layers[0].register_forward_pre_hook(lambda module, args: reads.append(args[0].shape))
    prompts = [p for p in RAGGED if len(p) > 1]
    model.generate(prompts, 4, n=5, batch_size=2, temperature=1.0)
    assert sum(rows * length for rows, length, _ in reads if length > 1) == sum(map(len, prompts))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_seed_and_a_length_of_its_own_make_a_prompt_as_if_alone(batch_size):
    model, seeds, lengths, seen = tiny(), [3, 3, 9, 2 ** 40, 0, 1, 7], [12, 5, 0, 9, 20, 1, 12], {}
    alone = [model.generate([p], new, n=3, seed=seed, **SAMPLED)[0] for p, seed, new in zip(RAGGED, seeds, lengths)]
    out = model.generate(RAGGED, lengths, n=3, seed=seeds, batch_size=batch_size, **SAMPLED)
    for p, rows in model.generate_each(RAGGED, lengths, n=3, seed=seeds, batch_size=batch_size, **SAMPLED):
        assert p not in seen
        seen[p] = [list(ids) for ids in rows]
    assert out == alone and seen == dict(enumerate(alone))
    assert [[len(ids) for ids in rows] for rows in out] == [[length] * 3 for length in lengths]
    for wrong in (dict(max_new_tokens=[1, 2]), dict(max_new_tokens=4, seed=[1])):
        with pytest.raises(ValueError, match="7 prompts, but"):
            model.generate(RAGGED, **wrong)


def test_prompts_are_read_behind_each_other_in_pieces(monkeypatch):
    model, read = tiny(torch.float64), []
    monkeypatch.setattr("llama.generate.READ_AT_ONCE", 20)
    model.layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    assert model.generate(RAGGED, 20) == [model.generate([prompt], 20)[0] for prompt in RAGGED]
    assert [length for length in read if length > 1][:3] == [8, 15, 30]  # 7 + 1, 13 + 2, 30 alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_onednns_order_are_used_for_more_than_one_token_and_left_again(monkeypatch, dtype):
    if dtype == torch.bfloat16 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("needs AVX512")
    for kind in ("mha", "llama3-tied"):
        model, fp32, plain = tiny(dtype, **KINDS[kind]), tiny(torch.float32, **KINDS[kind]), []
        model.compute_dtype = fp32.compute_dtype = dtype  # the second has master weights in fp32
        monkeypatch.setattr("model.F.linear", lambda x, w: plain.append(x.shape) or torch.matmul(x, w.T))
        states = []
        for _ in model.generate_tokens(RAGGED, 9):
            states.append(model.packed is not None)
        out = model.generate(RAGGED, 9)
        assert states and all(states) and not plain
        model.generate(RAGGED, 1)
        assert plain
        assert fp32.generate(RAGGED, 9) == out
        with pytest.raises(ZeroDivisionError):
            model.generate(RAGGED, 9, stop=lambda ids: 1 / 0)
        for _ in model.generate_tokens(RAGGED, 9):
            break  # who stops listening leaves nothing behind either
        assert all(module.packed is None for module in model.modules() if hasattr(module, "packed"))
        monkeypatch.undo()


def test_logits_of_packed_weights_are_those_of_bf16(traced):
    model, exact = tiny(torch.bfloat16), tiny(torch.float32)
    exact.load_state_dict(model.state_dict())  # the same weights, rounded
    out, logits, _ = traced(model, RAGGED, 20, batch_size=4)
    for (p, s), steps in logits.items():
        whole = torch.tensor([RAGGED[p] + out[p][s][:-1]])
        want = exact(whole)[0][0, len(RAGGED[p]) - 1:]
        ours, theirs = torch.stack(steps).float() - want, model(whole)[0][0, len(RAGGED[p]) - 1:].float() - want
        assert ours.norm() < 1.5 * theirs.norm() + 0.02 * want.norm()


def test_no_new_tokens_and_no_prompts():
    assert tiny().generate([[1, 2], [3]], 0, n=2) == [[[], []], [[], []]]
    assert tiny().generate([], 5) == []


def test_room_for_exactly_the_context_and_not_one_more():
    model, prompt = tiny(), tokens_like(60).tolist()
    assert len(model.generate([prompt, [5]], 4)[0][0]) == 4
    with pytest.raises(ValueError, match="65.*max_position_embeddings=64"):
        model.generate([prompt, [5]], 5)


@pytest.mark.parametrize("wrong, why", [([], "no tokens"), ([1, 4096], "outside the vocabulary"), ([-1], "outside the")])
def test_impossible_prompt_is_refused_by_its_number(wrong, why):
    with pytest.raises(ValueError, match=f"prompt 1 has .*{why}"):
        tiny().generate([[1], wrong, [2]], 3)


# ----------------------------------------------------------------------------- drawing a token
def share_by_hand(logits, temperature, top_p):
    """Probability of each token: softmax, then the likeliest tokens until top_p is reached, and all like the last."""
    p = np.exp(np.float64(logits) / temperature - np.max(np.float64(logits)) / temperature)
    p /= p.sum()
    falling = np.sort(p)[::-1]
    least = falling[np.searchsorted(falling.cumsum(), min(top_p, 1 - 1e-12))]
    kept = p * (p >= least)
    return kept / kept.sum()


def even_pairs(n):
    """[n, 2] points that fill the unit square evenly: a grid, and the golden ratio's multiples."""
    i = torch.arange(n, dtype=torch.float64)
    return torch.stack(((i + 0.5) / n, i * (5 ** 0.5 - 1) / 2 % 1), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bf16: many are equally likely
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-9])
@pytest.mark.parametrize("temperature", [0.2, 0.8, 1.5])
@pytest.mark.parametrize("vocab", [7, 300, 2000])
def test_even_points_draw_each_token_in_proportion(vocab, temperature, top_p, dtype):
    """Of N points a token gets N times its probability: to one of them from all tokens, from a set within two roots."""
    torch.manual_seed(vocab)
    logits, n = torch.randn(vocab).to(dtype), 3000
    ids = sample_ids(logits.expand(n, -1), temperature, top_p, even_pairs(n))
    got = torch.bincount(ids, minlength=vocab).numpy()
    want = n * share_by_hand(logits.float().numpy(), temperature, top_p)
    assert (np.abs(got - want) <= (1.01 if top_p == 1 else 2 * np.sqrt(want + 1))).all()
    assert not got[want == 0].any()


@pytest.mark.parametrize("first", [0, 255, 256, 600])  # of the six among 700 tokens: in one group of 256, or in two
def test_extreme_numbers_draw_a_possible_token(first):
    logits = torch.full((4, 700), -math.inf)
    logits[:, first:first + 6] = torch.tensor([-math.inf, 1.0, 2.0, -math.inf, 0.0, -math.inf])
    least, most = 0.0, 1 - 2 ** -53
    uniform = torch.tensor([(least, least), (least, most), (most, least), (most, most)], dtype=torch.float64)
    for top_p in (1.0, 0.999999, 0.5):
        ids = sample_ids(logits, 0.7, top_p, uniform).tolist()
        assert {each - first for each in ids} <= ({1, 2, 4} if top_p > 0.5 else {2})


def test_a_number_rounded_up_to_one_picks_the_last_column_that_has_a_weight():
    column, inside = pick(torch.tensor([[0.0, 2.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0]]), torch.ones(2, dtype=torch.float64))
    assert column.tolist() == [2, 0] and inside.tolist() == [1, 1]


def test_temperature_zero_is_the_likeliest_token():
    torch.manual_seed(0)
    logits = torch.randn(20, 50)
    assert torch.equal(sample_ids(logits, 0.0, 0.3, torch.rand(20, 2, dtype=torch.float64)), logits.argmax(-1))


@pytest.mark.parametrize("vocab, top_p", [(2000, 0.6), (4000, 0.3), (32000, 0.3)])
def test_equally_likely_tokens_are_drawn_without_regard_to_the_neighbours(vocab, top_p):
    """Logits of bf16 have many ties; a flat neighbour needs the whole vocabulary sorted, a peaked one does not."""
    torch.manual_seed(0)
    logits, flat = 2 * torch.randn(40, vocab).bfloat16(), torch.zeros(1, vocab).bfloat16()
    uniform = torch.rand(41, 2, dtype=torch.float64)
    together = sample_ids(torch.cat((logits, flat)), 1.0, top_p, uniform)[:-1]
    alone = torch.cat([sample_ids(row[None], 1.0, top_p, u[None]) for row, u in zip(logits, uniform)])
    assert torch.equal(together, alone)
