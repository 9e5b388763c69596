"""evals.py: subjects, items and their resume on any number of ranks, scores, results.jsonl."""
import gzip
import json
import math
import os
import random
import re
import shutil

import pytest
import torch
from conftest import ROOT, need, run_here, run_warm
from safetensors.torch import load_file, save_file
from samples import choice_items, mtbench_questions, programs, word_problems

from evaluation.evals import cut_left, load_for_eval, open_items, read_done, read_items
from evaluation.scores import score, write_result
from lora import apply_lora, save_adapter
from model import Llama
from text.records import Source


def subject_in(folder):
    return load_for_eval(str(need("data/stories260k")), out_dir=str(folder))


def squares(folder, ids, settings):
    """Evaluate the squares of `ids`; returns the records and which were computed now."""
    items = open_items(subject_in(folder), "toy", ids, settings)
    for i in items.todo:
        items.finish(i, {"square": i * i})
    return items.close(), items.todo


# ----------------------------------------------------------------------------- subjects
def test_base_folder_has_its_place_under_out():
    subject = load_for_eval(str(need("data/stories260k")))
    assert (subject.run, subject.step, subject.tokens, subject.epoch) == ("stories260k", 0, None, None)
    assert str(subject.folder) == "out/stories260k" and str(subject.results) == "out/stories260k/results.jsonl"
    assert not subject.model.training


def make_lora_checkpoint(folder, base):
    torch.manual_seed(0)
    model = apply_lora(Llama.from_pretrained(base), 4, 8)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p, std=0.05)
    save_adapter(model, folder, str(base))
    (folder / "state").mkdir()
    (folder / "state" / "state.json").write_text(json.dumps({"step": 30, "tokens": 960, "config": {"base": str(base)}}))
    (folder.parent / "log.jsonl").write_text('{"step": 0, "val": {}}\n{"step": 10, "epoch": 0.5}\n')
    return model.eval()


def test_checkpoint_of_a_lora_run_finds_its_base_step_epoch_and_place(tmp_path):
    base = need("data/stories260k")
    want = make_lora_checkpoint(tmp_path / "run" / "step_30", base)
    tokens = torch.arange(3, 40)[None]
    for subject in (load_for_eval(str(tmp_path / "run/step_30")), load_for_eval(str(base), str(tmp_path / "run/step_30"))):
        assert (subject.run, subject.step, subject.tokens) == ("run", 30, 960) and subject.epoch == pytest.approx(1.5)
        assert subject.folder == tmp_path / "run/step_30" and subject.results == tmp_path / "run/results.jsonl"
        assert torch.allclose(subject.model(tokens)[0], want(tokens)[0], atol=1e-4)
        assert not torch.allclose(subject.model(tokens)[0], Llama.from_pretrained(base)(tokens)[0], atol=1e-2)
        assert subject.identity["weights"] != load_for_eval(str(base)).identity["weights"]


def test_folders_that_cannot_be_judged_are_refused(tmp_path):
    base = need("data/stories260k")
    make_lora_checkpoint(tmp_path / "run" / "step_30", base)
    with pytest.raises(ValueError, match="give one of its checkpoints: step_30"):
        load_for_eval(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="is an adapter"):
        load_for_eval(str(tmp_path / "run/step_30"), str(tmp_path / "run/step_30"))
    with pytest.raises(ValueError, match="model is not set"):
        load_for_eval("")
    (tmp_path / "run" / "step_30").rename(tmp_path / "step_30.tmp")
    with pytest.raises(ValueError, match="never finished"):
        load_for_eval(str(tmp_path / "step_30.tmp"))
    config = json.loads((tmp_path / "step_30.tmp" / "adapter_config.json").read_text())
    (tmp_path / "step_30.tmp" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "x/y"}))
    (tmp_path / "step_30.tmp").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="names the base 'x/y', no folder here; say --model=BASE"):
        load_for_eval(str(tmp_path / "lost"))
    with pytest.raises(ValueError, match="another base"):
        load_for_eval(str(need("golden/models/mha-untied")), str(tmp_path / "lost"), tokenizer=str(base))


# ----------------------------------------------------------------------------- items
def test_items_of_every_format_are_the_same(tmp_path):
    records = [{"q": "a,\n\"b\"", "a": "1"}, {"q": "ü", "a": "2"}]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "i.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress((tmp_path / "i.jsonl").read_bytes()))
    for name in ("i.jsonl", "i.json", "i.jsonl.gz"):
        assert read_items(str(tmp_path / name), ("q", "a")) == records
    with pytest.raises(ValueError, match=r"i.json, record 1: expected q, z; found q, a, without z"):
        read_items(str(tmp_path / "i.json"), ("q", "z"))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.table({"q": ["x"], "c": [["1", "2"]]}), tmp_path / "i.parquet")
    assert read_items(str(tmp_path / "i.parquet"), ("q",)) == [{"q": "x", "c": ["1", "2"]}]


@pytest.mark.parametrize("text, message", [("", "holds no records"), ("{}", "without q"), ("[1]", "found int"),
                                           ("{", "record 1: not JSON"), ('[{"q": 1}, {', "record 2: cannot be read"),
                                           ("\x00", "record 1: not JSON")])
def test_files_of_the_wrong_shape_are_refused(tmp_path, text, message):
    (tmp_path / "i.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_items(str(tmp_path / "i.json"), ("q",))
    with pytest.raises(FileNotFoundError, match="test_data: .*absent.json: no such file; expected .parquet"):
        read_items(str(tmp_path / "absent.json"), ("q",), "test_data")
    (tmp_path / "i.csv").write_text("q\n1\n")
    with pytest.raises(ValueError, match="expected .parquet, .mds, .txt, .json or .jsonl"):
        read_items(str(tmp_path / "i.csv"), ("q",))


def test_a_file_of_the_hub_is_read_where_prepare_datas_sources_come_from(monkeypatch, tmp_path):
    (tmp_path / "x").write_text('{"q": 1}')
    asked, found = [], [Source("hf://datasets/a/b@1/c.jsonl", tmp_path / "x")]
    monkeypatch.setattr("evaluation.evals.from_hub", lambda *what: asked.append(what) or found)
    assert read_items("hf://datasets/a/b/c.jsonl", ("q",), "test_data") == [{"q": 1}]
    assert asked == [("hf://datasets/a/b/c.jsonl", "test_data")]
    with pytest.raises(ValueError, match="hf://datasets/a/b@1/c.jsonl, record 1: expected z"):
        read_items("hf://datasets/a/b/c.jsonl", ("z",))


def test_cut_left():
    assert cut_left([1, 2, 3], 3) == ([1, 2, 3], 0)
    assert cut_left([1, 2, 3, 4], 3) == ([2, 3, 4], 1)
    assert cut_left([1, 2, 3, 4], 3, bos_id=1) == ([1, 3, 4], 1)
    assert cut_left([1, 2, 3, 4], 3, bos_id=9) == ([2, 3, 4], 1)


# ----------------------------------------------------------------------------- resume and ranks
def test_a_killed_evaluation_resumes_with_the_items_it_lacks(tmp_path):
    items = open_items(subject_in(tmp_path), "toy", range(10), {"a": 1})
    for i in items.todo[:4]:
        items.finish(i, {"square": i * i})
    del items  # killed: never closed
    assert not (tmp_path / "eval_toy.jsonl").exists()
    with open(tmp_path / "eval_toy.jsonl.part0", "a") as part:
        part.write('{"id": 4, "squ')  # the kill came in the middle of a line
    records, computed = squares(tmp_path, range(10), {"a": 1})
    assert computed == [4, 5, 6, 7, 8, 9]
    assert records == {i: {"square": i * i} for i in range(10)} == read_done(tmp_path / "eval_toy.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval_toy.jsonl", "eval_toy.settings.json"]


def test_more_items_build_on_the_finished_ones_and_fewer_leave_them(tmp_path):
    squares(tmp_path, range(3), {})
    records, computed = squares(tmp_path, range(5), {})
    assert list(records) == [0, 1, 2, 3, 4] and computed == [3, 4]
    records, computed = squares(tmp_path, range(2), {})
    assert list(records) == [0, 1] and computed == []
    assert len(read_done(tmp_path / "eval_toy.jsonl")) == 5


def test_running_score_counts_what_was_done_before(tmp_path):
    squares(tmp_path, range(3), {})
    items = open_items(subject_in(tmp_path), "toy", range(4), {}, lambda record: record["square"])
    assert items.scores == [0, 1, 4]
    items.finish(3, {"square": 9})
    assert items.scores == [0, 1, 4, 9]


def test_other_settings_are_refused_in_one_line(tmp_path):
    squares(tmp_path, range(3), {"shots": 5, "stop": ("a",)})
    squares(tmp_path, range(3), {"shots": 5, "stop": ("a",)})
    with pytest.raises(ValueError, match="eval_toy.jsonl was made with shots=5, not 0; choose another --name"):
        squares(tmp_path, range(3), {"shots": 0, "stop": ("a",)})


@pytest.mark.parametrize("change", ["weights of an MLP", "one number of the embedding", "order of rows", "config.json", "alpha of the adapter"])
def test_a_model_that_was_replaced_is_another(tmp_path, change):
    """In its own folder, as after merging another adapter into it: no item of the one before counts."""
    base = shutil.copytree(need("data/stories260k"), tmp_path / "base", copy_function=shutil.copyfile)
    os.chmod(base, 0o755)
    make_lora_checkpoint(tmp_path / "adapter", base)
    judged = str(tmp_path / "adapter" if "adapter" in change else base)
    open_items(load_for_eval(judged, out_dir=str(tmp_path / "a")), "toy", range(3), {})
    if not change.endswith(("json", "adapter")):
        tensors = load_file(base / "model.safetensors")
        if "MLP" in change:
            tensors["model.layers.3.mlp.down_proj.weight"] *= 1.01
        elif "order" in change:
            tensors["model.layers.2.self_attn.k_proj.weight"] = tensors["model.layers.2.self_attn.k_proj.weight"].roll(1, 0)
        else:
            tensors["model.embed_tokens.weight"][77, 5] += 0.01
        save_file(tensors, base / "model.safetensors")
    else:
        path = base / "config.json" if "config" in change else tmp_path / "adapter/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 20000.0, "lora_alpha": 9}))
    with pytest.raises(ValueError, match="eval_toy.jsonl was made with weights="):
        open_items(load_for_eval(judged, out_dir=str(tmp_path / "a")), "toy", range(3), {})


def test_items_that_were_left_out_are_noticed(tmp_path):
    items = open_items(subject_in(tmp_path), "toy", range(3), {})
    for i in items.todo[:2]:
        items.finish(i, {})
    with pytest.raises(RuntimeError, match=r"\[2\]"):
        items.close()


def test_two_ranks_finish_what_one_began_and_write_the_same_file(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(f"""
import os
import sys
sys.path.insert(0, {str(ROOT)!r})
from evaluation.evals import *
from evaluation.scores import write_result
start_ranks("cpu")
subject = load_for_eval({str(need("data/stories260k"))!r}, out_dir=sys.argv[1])
items = open_items(subject, "toy", range(9), {{}}, lambda record: record["square"])
for i in items.todo:
    if i == int(sys.argv[2]):
        raise SystemExit("killed")
    os.write(1, f"did {{i}} of {{RANK}}\\n".encode())  # in one piece: two ranks share the pipe
    items.finish(i, {{"square": i * i}})
records = items.close()
assert records == {{i: {{"square": i * i}} for i in range(9)}}
write_result(subject, "toy_square", [r["square"] for r in records.values()], {{}}, 1.0)
""")
    out = tmp_path / "out"
    assert run_warm(script, out, "3").returncode == 1
    two = run_warm("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out, "-1")
    assert two.returncode == 0, two.stderr
    # wherever they stand: both ranks print, and a line may begin where the other rank's has not ended yet
    did = sorted(re.findall(r"did \d of \d", two.stdout))
    assert did == ["did 3 of 0", "did 4 of 1", "did 5 of 0", "did 6 of 1", "did 7 of 0", "did 8 of 1"]
    squares(tmp_path / "alone", range(9), {})
    assert (out / "eval_toy.jsonl").read_bytes() == (tmp_path / "alone" / "eval_toy.jsonl").read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ["eval_toy.jsonl", "eval_toy.settings.json", "results.jsonl", "values.jsonl"]
    assert len((out / "results.jsonl").read_text().splitlines()) == 1


# ----------------------------------------------------------------------------- scores
def test_score_of_shares_is_wilsons_interval():
    mean, stderr, low, high = score([1] * 30 + [0] * 70)
    assert mean == 0.3 and stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))  # lm-eval's: sample deviation / sqrt n
    for p in (low, high):  # Wilson (1927): the p whose own normal interval just reaches the mean
        assert abs(0.3 - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 100))
    assert low < 0.3 < high
    assert score([0, 0, 0])[2] == 0 and 0.5 < score([0, 0, 0])[3] < 0.6
    assert score([True])[:2] == (1, 0.0)


def test_score_of_other_means_is_the_normal_interval():
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    mean, stderr, low, high = score(values)
    assert stderr == pytest.approx(torch.tensor(values).std().item() / math.sqrt(50))
    assert (low, high) == (mean - 1.96 * stderr, mean + 1.96 * stderr)
    with pytest.raises(ValueError, match="no items"):
        score([])


def test_results_hold_every_field_and_no_line_twice(tmp_path):
    subject = subject_in(tmp_path)
    for seconds in (1.5, 2.5):
        assert write_result(subject, "acc", [1, 0], {"shots": 5, "t": (1,)}, seconds) == 0.5
    write_result(subject, "acc", [1, 0], {"shots": 0}, 1)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert set("run step tokens epoch metric value stderr n settings seconds version".split()) <= lines[0].keys()
    assert lines[0]["value"] == 0.5 and lines[0]["seconds"] == 1.5 and lines[0]["n"] == 2
    assert lines[0]["settings"]["shots"] == 5 and lines[0]["settings"]["dtype"] == "float32"
    # the last line counts, so one that was there before another is written again
    write_result(subject, "acc", [1, 0, 0, 0], {"shots": 0}, 1)
    write_result(subject, "acc", [1, 0], {"shots": 0}, 1)
    assert [json.loads(line)["n"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [2, 2, 4, 2]
    assert [len(json.loads(line)["values"]) for line in (tmp_path / "values.jsonl").read_text().splitlines()] == [2, 4, 2]


def test_every_evaluation_says_the_same_of_what_it_judged(tmp_path):
    """The identity of a LoRA checkpoint in results.jsonl: base, adapter, weights, dtype and tokenizer."""
    base = need("data/stories260k")
    make_lora_checkpoint(tmp_path / "run" / "step_30", base)
    gsm8k = word_problems(tmp_path / "test.jsonl", 20)
    tokens = run_here("prepare_data.py", f"--source={gsm8k}", "--text_field=question", f"--tokenizer={base}",
                      "--seq_len=64", "--val_fraction=0",
                      f"--out_dir={tmp_path / 'tokens'}", "--workers=1")
    assert tokens.returncode == 0, tokens.stderr
    commands = [
        ("eval_gsm8k.py", f"--test_data={gsm8k}", "--shots=0", "--limit=1", "--max_new_tokens=2"),
        ("eval_humaneval.py", f"--data={programs(tmp_path / 'programs.jsonl')}", "--limit=1", "--n_samples=1",
         "--temperature=0"),
        ("eval_forgetting.py", f"--hellaswag={choice_items(tmp_path, 2)['hellaswag']}", "--tasks=hellaswag",
         "--limit=2"),
        ("eval_loss.py", f"--data={tmp_path / 'tokens'}", "--rows=2"),
        ("evaluation/answer_mtbench.py", f"--questions={mtbench_questions(tmp_path / 'questions.jsonl')}", "--limit=1",
         "--max_new_tokens=2"),
    ]
    for script, *argv in commands:
        done = run_here(script, f"--model={tmp_path / 'run/step_30'}", "--device=cpu", *argv)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    metrics = {line["metric"] for line in lines}
    assert {"gsm8k_strict_match", "humaneval_truncated", "hellaswag", "loss tokens", "mtbench_cut"} <= metrics
    identity = load_for_eval(str(tmp_path / "run/step_30")).identity
    assert identity["model"] == str(base) and identity["adapter"] == str(tmp_path / "run/step_30")
    for line in lines:
        assert {key: line["settings"][key] for key in identity} == identity, line["metric"]


def test_epoch_is_found_while_training_still_writes_its_log(tmp_path):
    make_lora_checkpoint(tmp_path / "run" / "step_30", need("data/stories260k"))
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 11, "ep')
    assert load_for_eval(str(tmp_path / "run/step_30")).epoch == pytest.approx(1.5)


@pytest.mark.parametrize("script, data", [
    ("eval_gsm8k.py", "test_data"), ("eval_humaneval.py", "data"), ("eval_forgetting.py", "hellaswag")])
@pytest.mark.parametrize("model, wanted", [
    ("nowhere", "nowhere: no such folder"), ("run", "give one of its checkpoints: step_30"), ("", "model is not set")])
def test_the_model_is_looked_at_before_data_is_fetched(tmp_path, script, data, model, wanted):
    make_lora_checkpoint(tmp_path / "run" / "step_30", need("data/stories260k"))
    folder = tmp_path / model if model else ""
    result = run_here(script, f"--model={folder}", f"--{data}=gone.jsonl")
    assert result.returncode and result.stderr.count("\n") == 1 and wanted in result.stderr, result.stderr
