"""--dry_run: what a run takes, told without data, weights or a GPU."""
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, run_stage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lion
from lora import apply_lora
from model import IGNORE, Llama, LlamaConfig
from runtime import peak_flops
from training.plan import (PUBLISHED, compare_with_paper, duration_text, flops_of_batch, flops_of_step, predict_memory, shape_of,
                           states)

PAPER = ["--base=meta-llama/Llama-2-7b-hf", "--data=nowhere", "--seq_len=4096", "--global_batch=192", "--microbatch=6",
         "--gpus=32", "--dry_run=True"]


def plan(*more):
    result = run_here("train.py", *PAPER, *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def meta(name, rank=0):
    with torch.device("meta"):
        model = Llama(PUBLISHED[name]).to(torch.bfloat16 if rank else torch.float32)
    model.compute_dtype = torch.bfloat16
    return apply_lora(model, rank, 2 * rank) if rank else model


def test_shapes_have_the_published_numbers_of_parameters():
    counts = {"Llama-2-7b-hf": 6_738_415_616, "Llama-2-13b-hf": 13_015_864_320, "Llama-2-70b-hf": 68_976_648_192,
              "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-70B": 70_553_706_496, "Llama-3.1-405B": 405_853_388_800}
    assert {name: sum(p.numel() for p in meta(name).parameters()) for name in PUBLISHED} == counts


def test_the_papers_steps_and_trained_parameters():
    """25,431 steps for 20B tokens; 193 an epoch of Magicoder in the paper's packing; 2,498,560 r adapter parameters."""
    out = plan("--max_tokens=20e9", "--lora_rank=16")
    assert "25,431 steps of 192 rows" in out and f"{2_498_560 * 16:,} trained, LoRA r=16" in out
    assert "nowhere does not exist yet" in out and "an unknown number of rows of 4096" in out
    out = plan("--max_epochs=16", f"--data_rows={193 * 192}")
    assert "3,088 steps" in out and "16 epochs" in out and "6,738,415,616 trained, in full" in out


def test_a_branch_is_planned_without_its_trunk():
    out = plan(ROOT / "config/cpt_durations.py", "--max_tokens=4e9", "--out_dir=out/math/4B")
    assert "step_4069" in out and "5,086 steps" in out
    times = [re.search(r"predicted time (\S+ \w+)", text)[1] for text in (out, plan("--max_steps=1017"))]
    assert times[0] == times[1]  # only what it adds


def test_hours_follow_from_the_gpu():
    hours = lambda *more: float(re.search(r"predicted time ([\d.]+) h", plan("--max_tokens=20e9", *more))[1])
    # 6 FLOPs a weight and token, without the embedding, and 6 T d layers of causal attention
    flops = 20e9 * (6 * (6_738_415_616 - 32000 * 4096) + 6 * 4096 * 4096 * 32)
    assert hours() == pytest.approx(flops / (32 * 0.4 * 989e12) / 3600, rel=1e-3)
    assert hours("--gpu=A100", "--mfu=0.5") == pytest.approx(hours() * 989 / 312 * 0.4 / 0.5, rel=1e-2)


def test_padding_that_is_left_out_is_not_planned():
    """Rows of 64 of which 10 or 40 tokens have targets: microbatches of two take 2 * 16 and 2 * 48, compiled 2 * 64 each."""
    model, rows = meta("Llama-2-7b-hf", 16), FourRows([10, 3, 40, 7])
    knobs = SimpleNamespace(global_batch=4, microbatch=2, seed=0, shuffle=False, doc_mask=True)
    flops, tokens = flops_of_step(model, knobs, rows, 0, compiled=False)
    short = [(row[0][:length], row[1][:length], row[2]) for row, length in zip(rows, (16, 16, 48, 48))]
    assert tokens == 128 and flops == pytest.approx(flops_of_batch(model, short), rel=1e-12)
    assert flops_of_step(model, knobs, rows, 0, compiled=True) == (flops_of_batch(model, list(rows)), 256)


class FourRows(list):
    """Rows of 64 tokens, the first of which are targets."""
    packed = None

    def __init__(self, targets):
        super().__init__((np.zeros(64, np.int64), np.where(np.arange(64) < n, 5, IGNORE), np.zeros(0, np.int64)) for n in targets)


def test_memory_follows_from_the_gpu():
    assert "of 141.00 GB a rank" in plan("--max_steps=1", "--gpu=H200") and "of 24.00 GB a rank" in plan("--max_steps=1", "--gpu=L4")
    assert "of 40.00 GB a rank" in plan("--max_steps=1", "--gpu=A100", "--memory_gb=40")


@pytest.mark.parametrize("name, tflops", [("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA H200", 989),
                                          ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA GB200", 2500)])
def test_a_gpu_is_known_by_its_whole_name(name, tflops, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12


@pytest.mark.parametrize("name", ["code_cpt", "math_cpt", "code_ift", "math_ift", "tulu_ift"])
def test_the_heads_of_configs_say_what_is_planned(name):
    """Memory of a GPU in GB, in full and with r=256."""
    path = ROOT / f"config/{name}.py"
    head = re.search(r"and (\d+) GB a GPU in full, \S+ h and (\d+) GB with r=256", path.read_text())
    for rank, said in zip((0, 256), head.groups()):
        result = run_here("training/plan.py", path, "--gpus=8", "--mfu=0.45", f"--lora_rank={rank}")
        planned = re.findall(r"together ([\d.]+); predicted time", result.stdout)[0]
        assert round(float(planned)) == int(said), (rank, result.stdout + result.stderr)


def test_the_papers_table_of_memory_stands_beside_ours():
    lines = {line[:18].strip(): [float(x) for x in re.findall(r"\d+\.\d+", line[18:])] for line in compare_with_paper(64)}
    assert lines["7B   adam full"][:4:2] == [112, 14] and lines["7B   adam + LoRA"][0] == 15.12
    assert lines["70B  lion full"][::2][:5] == [840, 105, 52.5, 26.25, 13.12]
    assert lines["405B lion + LoRA"][::2][0] == 858.6 and lines["405B adam full"][::2][-1] == 25.31
    assert lines["7B   adam full"][1] == pytest.approx(6.738415616 * 16, abs=0.01)
    assert lines["7B   lion + LoRA"][1] == pytest.approx(6.738415616 * 2 + 2_498_560 * 64 * 12 / 1e9, abs=0.01)
    assert len(lines) == 15  # two of remarks, the heads, and 3 models x 2 optimizers x with and without LoRA


@pytest.mark.parametrize("more, wanted", [
    (["--lora_rank=64", "--microbatch=1"], "none"), (["--microbatch=1"], "full"),
    (["--lora_rank=64", "--microbatch=1", "--memory_gb=16"], "full"), (["--base=Llama-3.1-405B", "--lora_rank=16"], "full")])
def test_auto_keeps_replicas_where_they_fit(more, wanted):
    more = [knob for knob in PAPER if knob.split("=")[0] not in {m.split("=")[0] for m in more}] + more
    result = run_here("train.py", *more, "--max_steps=1")
    assert f"a rank, so {wanted}" in result.stdout and f"32 ranks, shard={wanted}" in result.stdout, result.stderr


def test_memory_falls_with_shards_and_checkpointing():
    model = meta("Llama-2-7b-hf")
    need = lambda **how: sum(predict_memory(model, "lionw", 1, 4096, **how).values())
    assert need(shards=8, ranks=8) < need(shards=2, ranks=2) < need()
    plain = need(shards=8, ranks=8)
    model.activation_checkpointing = "block"
    assert need(shards=8, ranks=8) < plain


def test_the_predictor_asks_an_optimizer_for_the_numbers_that_it_keeps(monkeypatch):
    class Keeper(lion.DecoupledLionW):
        numbers_per_parameter = 3

    model = meta("Llama-2-7b-hf")
    trained = sum(p.nbytes for p in model.parameters())
    monkeypatch.setitem(lion.OPTIMIZERS, "keeper", Keeper)
    kept = [predict_memory(model, name, 1, 64)["optimizer"] / trained for name in ("lionw", "adamw", "keeper", "unknown")]
    assert kept == [1, 2, 3, 2]  # of an unknown one as much as Adam's


def test_the_planner_is_a_program_of_its_own():
    planned = run_stage("-m", "training.plan", *PAPER[:-1], "--max_steps=10")
    assert planned.returncode == 0 and planned.stdout == plan("--max_steps=10"), planned.stderr


@pytest.mark.parametrize("more, wanted", [
    (["--max_epochs=1"], "say data_rows"), (["--seq_len=0", "--max_steps=1"], "seq_len is not set"),
    (["--gpu=H1000", "--max_steps=1"], "gpu=H1000: not one of"), (["--base=Llama-2-8b", "--max_steps=1"], "Llama-2-7b-hf"),
    (["--gpus=5", "--max_steps=1"], "does not divide global_batch=192"),
    (["--shard=hybrid", "--shard_ranks=5", "--max_steps=1"], "groups of 5 ranks do not divide 32")])
def test_plans_that_cannot_be(more, wanted):
    result = run_here("train.py", *[k for k in PAPER if k.split("=")[0] not in {m.split("=")[0] for m in more}], *more)
    assert result.returncode == 2 and wanted in result.stderr and len(result.stderr.splitlines()) == 1


def test_dry_run_writes_nothing(tmp_path):
    plan("--max_steps=1", f"--out_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_folder_with_a_config_goes_before_the_table(tmp_path):
    (tmp_path / "Llama-2-7b-hf").mkdir()
    (tmp_path / "Llama-2-7b-hf/config.json").write_text('{"model_type": "llama", "vocab_size": 7, "hidden_size": 8, '
                                                        '"intermediate_size": 16, "num_hidden_layers": 1, '
                                                        '"num_attention_heads": 2}')
    assert shape_of(tmp_path / "Llama-2-7b-hf").vocab_size == 7


class MadeStorages(TorchDispatchMode):
    """The memory that operators make inside, as the allocator sees it: what nobody holds is gone."""

    def __init__(self, parameters):
        super().__init__()
        self.storages = {}
        self.weights = {p.untyped_storage().data_ptr() for p in parameters}  # operators return views of them

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return made

    def bytes_alive(self):
        return sum(nbytes for storage, nbytes in self.storages.values() if not storage.expired())


def step_of_layers(layers, rank, **how):
    """A real step of a small model: (the model, bytes that the forward pass kept for the backward pass, the optimizer)."""
    shape = LlamaConfig(vocab_size=300, hidden_size=128, intermediate_size=344, num_hidden_layers=layers,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256)
    model = Llama(shape).init_weights(0)
    if rank:
        apply_lora(model, rank, 2 * rank, **how)
    optimizer = lion.DecoupledLionW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, 300, (2, 129))
    with MadeStorages(model.parameters()) as made:
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
    kept = made.bytes_alive()
    loss.backward()
    optimizer.step()
    return model, kept, optimizer


@pytest.mark.parametrize("rank, how", [(0, {}), (16, {}), (16, dict(dora=True)), (16, dict(dora=True, dropout=0.1)),
                                       (4, dict(dora=True, dropout=0.1, targets="q_proj,up_proj"))], ids=str)
def test_tensors_of_a_step_take_the_predicted_bytes(rank, how):
    """Counted: weights, gradients, momenta, and what each further block keeps from the forward to the backward pass.

    Peaks of whole processes depend on the allocator and on what else runs: tests/campaigns/rank_memory.py measures those."""
    small, kept_by_4, _ = step_of_layers(4, rank, **how)
    model, kept_by_8, optimizer = step_of_layers(8, rank, **how)
    said = states(model, "lionw")
    assert said["weights"] == sum(p.nbytes for p in model.parameters())
    assert said["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    assert said["optimizer"] == sum(state["exp_avg"].nbytes for state in optimizer.state.values())
    predicted = [predict_memory(of, "lionw", 2, 128, device="cpu")["activations"] for of in (small, model)]
    assert kept_by_8 - kept_by_4 == pytest.approx(predicted[1] - predicted[0], rel=0.06)


def test_block_attention_in_fp32_counts_only_where_it_runs():
    model, _, _ = step_of_layers(4, 0)

    def activations(**how):
        return predict_memory(model, "lionw", 2, 128, device="cpu", **how)["activations"]

    # two rows of 128 tokens, four blocks, four heads of 32: probabilities, and the output again
    more = 4 * 4 * 2 * 128 * (4 * 128 // 2 + 4 * 32)
    assert activations(compiled=True) - activations(compiled=True, documents=True) == more
    assert activations() == activations(documents=True)


def test_a_time_is_in_the_unit_that_fits():
    assert [duration_text(seconds) for seconds in (0.04, 12.3, 90, 3599, 7200)] == ["0.04 s", "12 s", "1.5 min", "60.0 min", "2.00 h"]
