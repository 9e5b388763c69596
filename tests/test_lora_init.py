"""How adapters begin and how fast their factors learn: PiSSA against peft, zero A, LoRA+; exact resume of each."""
import gc
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import need_peft, run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lora import ADAPTER, CONFIG, TOKENS, peft_logits
from test_lora import base  # noqa: F401 (a fixture)
from test_model import close, tiny
from test_model import one_thread  # noqa: F401 (a fixture of the whole file)
from test_train import setting  # noqa: F401
from transformers import LlamaForCausalLM

import train
from llama.identity import identity_of
from lora import LoRAProjection, apply_lora, init_adapters, load_adapter, save_adapter
from model import Llama, Projection
from training.checkpoint import load_trained_adapter
from training.checks import check_first_step


def begun(base, init, rank=3, alpha=5, **knobs):  # noqa: F811
    model = apply_lora(Llama.from_pretrained(base), rank, alpha, **knobs)
    init_adapters(model, init)
    return model


def projections(model):
    return [module for module in model.modules() if isinstance(module, LoRAProjection)]


def nudge(model):
    """As after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


# ----------------------------------------------------------------------------- PiSSA
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_begins_as_pefts_and_as_the_base(base, rslora):  # noqa: F811
    peft = need_peft()
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, init_lora_weights="pissa", target_modules="all-linear")
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model = begun(base, "pissa", rslora=rslora)
    for layer, block in enumerate(model.layers):
        for module in projections(block):
            for (name, delta), (start, end) in zip(module.deltas().items(), module.spans):
                part = "self_attn" if name[0] in "qkvo" else "mlp"
                their = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{part}.{name}")
                close(delta, their.get_delta_weight("default"), 1e-5)
                close(module.weight[start:end], their.base_layer.weight, 1e-5)
    close(model(TOKENS)[0], Llama.from_pretrained(base)(TOKENS)[0], 1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_saved_pissa_is_a_plain_adapter_of_the_base(base, tmp_path, rslora):  # noqa: F811
    model = nudge(begun(base, "pissa", rslora=rslora, targets="q_proj,v_proj,up_proj,down_proj")).eval()
    want = model(TOKENS)[0]
    assert (want - Llama.from_pretrained(base)(TOKENS)[0]).abs().max() > 0.05
    save_adapter(model, tmp_path / "out", str(base))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == 6 and config["init_lora_weights"] is True
    assert config["lora_alpha"] == pytest.approx(5 * 2 ** 0.5 if rslora else 10)
    close(peft_logits(base, tmp_path / "out"), want, 5e-4)
    close(load_adapter(Llama.from_pretrained(base), tmp_path / "out").eval()(TOKENS)[0], want, 5e-4)
    assert identity_of(model) == identity_of(Llama.from_pretrained(base))  # though its weights are others


def test_resumed_pissa_is_bit_equal(base, tmp_path):  # noqa: F811
    model = nudge(begun(base, "pissa"))
    save_adapter(model, tmp_path / "out", str(base))
    again = apply_lora(Llama.from_pretrained(base), 3, 5)
    load_trained_adapter(again, tmp_path / "out", "pissa")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    save_adapter(again, tmp_path / "again", str(base))
    one, other = (load_file(tmp_path / name / ADAPTER) for name in ("out", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pissa_in_bf16_is_off_by_the_rounding_of_the_frozen_weights(base):  # noqa: F811
    model = apply_lora(Llama.from_pretrained(base, torch.bfloat16), 3, 5)
    init_adapters(model, "pissa")
    for module, plain in zip(projections(model), projections(begun(base, "default"))):
        deltas = module.deltas()
        whole = torch.cat([deltas[name] for name in module.adapted]) + module.weight.float()
        exact = plain.weight.to(torch.bfloat16).float()
        assert ((whole - exact).abs() <= 2 ** -8 * module.weight.float().abs() + 1e-6).all()


def test_pissa_needs_a_rank_that_the_weights_have(base):  # noqa: F811
    with pytest.raises(ValueError, match="larger than a side"):
        begun(base, "pissa", rank=1000)


# ----------------------------------------------------------------------------- zero A
def test_zero_a_draws_b_and_begins_as_the_base(base):  # noqa: F811
    torch.manual_seed(0)
    model = begun(base, "zero_a", rank=4)
    drawn = torch.cat([module.lora_B.detach().flatten() for module in projections(model)])
    assert all(not module.lora_A.any() for module in projections(model))
    assert drawn.abs().max() <= 0.5 and drawn.std().item() == pytest.approx(0.5 / 3 ** 0.5, rel=0.05)  # U(-1, 1) / sqrt(4)
    assert torch.equal(model(TOKENS)[0], Llama.from_pretrained(base)(TOKENS)[0])


@pytest.mark.parametrize("init, still, moving", [("default", "lora_A", "lora_B"), ("zero_a", "lora_B", "lora_A")])
def test_the_factor_beside_a_zero_may_stand_still_at_first_but_not_the_zero(base, init, still, moving):  # noqa: F811
    model = begun(base, init)
    model(TOKENS, TOKENS)[1].backward()
    check_first_step(model, 3.0, False)
    assert not any(getattr(module, still).grad.any() for module in projections(model))
    getattr(model.layers[0].mlp.down_proj, moving).grad.zero_()
    with pytest.raises(ValueError, match=f"down_proj.{moving} is trained but has no gradient"):
        check_first_step(model, 3.0, False)


# ----------------------------------------------------------------------------- LoRA+
def knobs(**changes):
    given = dict(lora_plus=1.0, learning_rate=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.0, optimizer="lionw")
    return SimpleNamespace(**{**given, **changes})


def test_lora_plus_moves_b_so_many_times_as_far():
    model = apply_lora(tiny(), 3, 6)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optim = train.make_optimizer(model, knobs(lora_plus=16))
    assert [group["lr_scale"] for group in optim.param_groups] == pytest.approx([1, 16])
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optim.step()  # Lion: each weight moves by its rate
    for name, p in model.named_parameters():
        if p.requires_grad:
            step = 16e-3 if name.endswith("lora_B") else 1e-3
            close(before[name] - p, torch.full_like(p, step), 1e-6)
    assert len(train.make_optimizer(model, knobs()).param_groups) == 1


# ----------------------------------------------------------------------------- runs
@pytest.mark.parametrize("how", [["--lora_init=pissa"], ["--lora_init=zero_a"], ["--lora_plus=16", "--optimizer=adamw"]],
                         ids=["pissa", "zero_a", "lora_plus"])
def test_resumed_runs_are_bit_equal_and_peft_reads_them(setting, how):  # noqa: F811
    folder, argv = setting
    argv = [*argv, "--lora_rank=3", "--max_steps=4", "--save_interval=2", "--keep_last=0", *how]
    assert run_here("train.py", *argv, f"--out_dir={folder / 'whole'}").returncode == 0
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(folder / "half/step_4")
    gc.collect()  # lets go of the first run's lock
    done = run_here("train.py", *argv, f"--out_dir={folder / 'half'}", "--resume=True")
    assert done.returncode == 0 and "step 3/4" in done.stdout, done.stderr
    one, other = (load_file(folder / name / "step_4" / ADAPTER) for name in ("whole", "half"))
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    first, last = (load_file(folder / "whole" / step / ADAPTER) for step in ("step_2", "step_4"))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    tokens = TOKENS % 61
    ours = load_adapter(Llama.from_pretrained(folder / "base"), folder / "whole/step_4").eval()
    close(ours(tokens)[0], peft_logits_on(folder / "base", folder / "whole/step_4", tokens), 5e-4)


def peft_logits_on(base, folder, tokens):  # noqa: F811
    model = need_peft().PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        return model(tokens).logits


def test_async_save_of_pissa_is_the_same(setting):  # noqa: F811
    folder, argv = setting
    argv = [*argv, "--lora_rank=3", "--max_steps=2", "--lora_init=pissa"]
    for name, more in (("plain", []), ("async", ["--async_save=True"])):
        done = run_here("train.py", *argv, *more, f"--out_dir={folder / name}")
        assert done.returncode == 0, done.stderr
    one, other = (load_file(folder / name / "step_2" / ADAPTER) for name in ("plain", "async"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("more, wanted", [
    (["--lora_init=pissa"], "lora_rank is 0, which is full finetuning"), (["--lora_plus=16"], "lora_rank is 0"),
    (["--lora_rank=2", "--lora_plus=0"], "must be positive, found 0"), (["--lora_rank=2", "--lora_init=olora"], "lora_init"),
    (["--lora_rank=2", "--lora_init=pissa", "--shard=full"], "--shard=none"),
    (["--lora_rank=40", "--lora_init=pissa"], "larger than a side of a weight [")])
def test_bad_knobs_are_one_line(setting, more, wanted):  # noqa: F811
    folder, argv = setting
    done = run_here("train.py", *argv, "--max_steps=1", f"--out_dir={folder / 'out'}", *more)
    assert done.returncode == 2 and wanted in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


# ----------------------------------------------------------------------------- what the knobs do together
def trained_deltas(base, alpha, init, rate, ratio, steps=4):  # noqa: F811
    """Every adapter's change after some of Lion's steps in float64: A begins `init` times as large, B learns at
    `ratio` times A's rate."""
    torch.manual_seed(0)
    model = begun(base, "default", rank=3, alpha=alpha).double()
    with torch.no_grad():
        for module in projections(model):
            module.lora_A *= init
    knobs = SimpleNamespace(optimizer="lionw", learning_rate=rate, beta1=0.9, beta2=0.95, weight_decay=0.0, lora_plus=ratio)
    optim = train.make_optimizer(model, knobs)
    for _ in range(steps):
        optim.zero_grad()
        model(TOKENS)[0].logsumexp(-1).sum().backward()
        optim.step()
    return [delta for module in projections(model) for delta in module.deltas().values()]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-3, 3), st.integers(-3, 3))
def test_only_two_combinations_of_alpha_init_and_rates_matter(base, of_a, of_b):  # noqa: F811
    """alpha * init_A * rate_B and init_A / rate_A ("LoRA Without Regret"), to the last bit for powers of two."""
    a, b = 2.0 ** of_a, 2.0 ** of_b
    want = trained_deltas(base, alpha=5.0, init=1.0, rate=1e-2, ratio=4.0)
    same = trained_deltas(base, alpha=5.0 / (a * b), init=a, rate=1e-2 * a, ratio=4.0 * b / a)
    assert all(torch.equal(x, y) for x, y in zip(want, same))
    # either combination alone changes what is learned
    for other in ({"init": 2.0, "rate": 1e-2, "ratio": 2.0}, {"init": 1.0, "rate": 1e-2, "ratio": 8.0}):
        changed = trained_deltas(base, alpha=5.0, **other)
        assert max((x - y).abs().max() for x, y in zip(want, changed)) > 1e-3


@pytest.mark.parametrize("alpha, grows", [(lambda rank: 32.0, 1), (lambda rank: 2.0 * rank, 16)])
def test_the_first_step_is_the_same_for_all_ranks_where_the_scale_is_alpha_over_rank(alpha, grows):
    """In the mean over what A begins as: a step of Lion moves W by alpha / rank times a sum over rank of sign(G a) a."""
    gradient = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    moved = {}
    for rank in (1, 16):
        lora = {"dropout": 0.0, "rslora": False, "dora": False}
        module = LoRAProjection(Projection(12, {"q_proj": 6}), {"q_proj": (rank, alpha(rank))}, lora).double()
        with torch.no_grad():
            module.weight.zero_()
        mean = 0
        draws = 4800 // rank
        for draw in range(draws):
            torch.manual_seed(draw)
            module.init_weights("default")
            module.zero_grad()
            (module(torch.eye(12, dtype=torch.float64)) * gradient).sum().backward()
            with torch.no_grad():
                module.lora_B -= 1e-3 * module.lora_B.grad.sign()
            mean = mean + module.deltas()["q_proj"].detach() / draws
        moved[rank] = mean
    cosine = torch.nn.functional.cosine_similarity(moved[1].flatten(), moved[16].flatten(), dim=0)
    assert cosine > 0.99 and (moved[16].norm() / moved[1].norm()).item() == pytest.approx(grows, rel=0.03)
