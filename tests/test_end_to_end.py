"""From a published checkpoint and records to a finetuned model and its text, through the scripts as a user runs them."""
import json

import pytest
from conftest import need, run_here
from safetensors.torch import load_file
from samples import stories, word_problems


def ran(script, **knobs):
    result = run_here(script, *(f"--{name}={value}" for name, value in knobs.items()))
    assert result.returncode == 0, result.stderr
    return result.stdout


def validation_losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["val"] for line in lines if "val" in line]


def test_greedy_text_of_the_published_model():
    model = need("data/stories260k")
    want = (model / "greedy_reference.txt").read_text().strip()
    text = ran("sample.py", model=model, max_new_tokens=240, dtype="float32", prompt="Once upon a time").strip()
    assert want.startswith(text[:-1]) or text.startswith(want)
    assert len(text) > 400


def test_samples_differ_and_repeat():
    knobs = dict(model=need("data/stories260k"), max_new_tokens=24, temperature=1.0, n=3, dtype="float32", prompt="Lily")
    first = ran("sample.py", **knobs)
    assert len(set(first.strip().split("\n\n"))) == 3 and ran("sample.py", **knobs) == first
    assert ran("sample.py", **{**knobs, "seed": 7}) != first


@pytest.mark.parametrize("lora_rank", [8, 0])
def test_records_lower_the_loss_and_the_result_runs(tmp_path, lora_rank):
    """IFT of stories260k on word problems, watching stories: the problems are learned, and the checkpoint samples."""
    base = need("data/stories260k")
    ran("prepare_data.py", kind="ift", source=word_problems(tmp_path / "train.jsonl", 300), tokenizer=base,
        seq_len=256, template="Question: {question}\\nAnswer:", response_field="answer", out_dir=tmp_path / "problems")
    ran("prepare_data.py", source=stories(tmp_path / "stories.txt", 60), tokenizer=base, seq_len=256, val_fraction=0,
        out_dir=tmp_path / "stories")
    out = tmp_path / "run"
    ran("train.py", base=base, data=tmp_path / "problems", val_data=f"stories={tmp_path / 'stories'}", dtype="float32",
        global_batch=4, max_steps=25, learning_rate=3e-3 if lora_rank else 5e-4, lora_rank=lora_rank, eval_rows=8, out_dir=out)
    before, after = validation_losses(out)
    assert after["val"] < before["val"] - 0.5
    assert after["stories"] > before["stories"]  # this much of another domain is not learned for nothing
    model = dict(model=base, adapter=out / "step_25") if lora_rank else dict(model=out / "step_25")
    text = ran("sample.py", prompt="Question: Tom has 3 apples.\\nAnswer:", max_new_tokens=20, dtype="float32", **model)
    assert text.startswith("Question: Tom has 3 apples.\nAnswer:") and len(text) > 40
    if lora_rank:
        ran("lora.py", base=base, adapter=out / "step_25", out=tmp_path / "merged")
        merged = ran("sample.py", prompt="Question: Tom has 3 apples.\\nAnswer:", max_new_tokens=20, dtype="float32",
                     model=tmp_path / "merged")
        assert merged == text


def test_continued_pretraining_on_stories_in_full(tmp_path):
    base = need("data/stories260k")
    ran("prepare_data.py", source=stories(tmp_path / "stories.txt", 200), tokenizer=base, seq_len=256,
        txt_split="\\n\\n", out_dir=tmp_path / "stories")
    ran("train.py", base=base, data=tmp_path / "stories", global_batch=8, max_steps=15, learning_rate=1e-4,
        dtype="float32", out_dir=tmp_path / "run")
    before, after = validation_losses(tmp_path / "run")
    assert after["val"] < before["val"]
    assert "model.embed_tokens.weight" in load_file(tmp_path / "run/step_15/model.safetensors")


@pytest.mark.parametrize("knobs, wanted", [
    (dict(), "model is not set"), (dict(model="nowhere"), "nowhere"), (dict(model="{base}", prompt="a b " * 300), "the model's context 512"),
    (dict(model="{base}", temperature=-1), "temperature=-1"), (dict(model="{base}", max_new_tokens=-1), "max_new_tokens=-1"),
    (dict(model="{base}", adapter="nowhere"), "nowhere: no such folder"), (dict(model="{base}", tokenizer="nowhere"), "nowhere")])
def test_sample_refuses_in_one_line(knobs, wanted):
    base = need("data/stories260k")
    result = run_here("sample.py", *["--prompt=a"] * ("prompt" not in knobs), *(f"--{k}={v}".format(base=base) for k, v in knobs.items()))
    *before, line = result.stderr.splitlines()
    assert result.returncode == 2 and wanted in line, result.stderr
    assert all(note.startswith("[") for note in before), result.stderr  # what sample.py says of the tokenizer
