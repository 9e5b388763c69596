"""eval_gsm8k.py against lm-eval 0.4.2 (prompts, draws of shots, extraction) and as a user runs it."""
import json
import random
import re
from types import SimpleNamespace

import pytest
from conftest import golden, need, run_here
from samples import hellaswag_record, word_problems, write_lines

from eval_gsm8k import (STOPS, build_prompt, cut_at_stops, draw_shots, extract_flexible, extract_strict, judge_answer,
                        normalise)
from evaluation.evals import read_done, read_items, with_eos_spelled
from quickstart import toy_math


def data():
    return [read_items(str(need(f"data/gsm8k/{split}.jsonl")), ("question", "answer")) for split in ("test", "train")]


def test_prompts_are_the_harness_to_the_character():
    (test, train), fixture = data(), golden("gsm8k")
    drawn = draw_shots(len(test), len(train), 5)
    assert drawn[:40] == fixture["shot_train_indices_first_40_items"]
    for item in fixture["prompts"]:
        rows = drawn[item["doc_id"]]
        assert rows == item["shot_train_indices"]
        assert build_prompt(test[item["doc_id"]]["question"], [train[i] for i in rows]) == item["prompt"]
    assert build_prompt("Why?", []) == "Question: Why?\nAnswer:"


def test_extraction_and_verdicts_are_the_harness():
    (test, _), fixture = data(), golden("gsm8k")
    for item in fixture["extraction"]:
        cut = cut_at_stops(item["output"])
        assert cut == item["after_stop_strings"]
        assert extract_strict(cut) == item["strict_match"]["extracted"], cut
        assert extract_flexible(cut) == item["flexible_extract"]["extracted"], cut
        record = judge_answer(item["output"], test[item["doc_id"]]["answer"])
        assert record["gold"] == item["gold"]
        assert record["strict_match"] == item["strict_match"]["exact_match"], cut
        assert record["flexible_match"] == item["flexible_extract"]["exact_match"], cut


def test_an_eos_that_a_model_spells_as_text_ends_its_answer():
    """lm-eval 0.4.13 (and 0.4.2) adds EOS's name to the stop strings; tinystories-656k spells its own before it ends."""
    tok = SimpleNamespace(special_ids={"<unk>": 0, "<|end_story|>": 2}, eos_id=2)
    stops = with_eos_spelled(STOPS, tok)
    verdict = judge_answer("So 3.\n#### 3<|end_story|>\n#### 4", "#### 3", stops)
    assert verdict["output"] == "So 3.\n#### 3" and verdict["flexible_match"] == 1
    llama = SimpleNamespace(special_ids={"<s>": 1, "</s>": 2}, eos_id=2)
    assert with_eos_spelled(STOPS, llama) == STOPS
    assert with_eos_spelled(STOPS, SimpleNamespace(special_ids={}, eos_id=None)) == STOPS


def test_every_gold_answer_is_right_by_its_own_text():
    for record in data()[0]:
        verdict = judge_answer(" " + record["answer"], record["answer"])
        assert verdict["strict_match"] == verdict["flexible_match"] == 1
        assert normalise(verdict["gold"]) == normalise(record["answer"])


def run(tmp_path, *argv, name="a"):
    """eval_gsm8k.py on ten problems of our own, with shots from twenty others; argv wins."""
    knobs = {"--model": need("data/stories260k"), "--out_dir": tmp_path / name, "--max_new_tokens": 12,
             "--test_data": word_problems(tmp_path / "test.jsonl", 10, seed=1),
             "--train_data": word_problems(tmp_path / "train.jsonl", 20, seed=2)}
    knobs.update(knob.split("=", 1) for knob in argv)
    return run_here("eval_gsm8k.py", *(f"{knob}={value}" for knob, value in knobs.items()))


def test_a_run_writes_items_and_results_whatever_the_batch(tmp_path):
    done = run(tmp_path, "--limit=5", "--shots=1", "--batch_size=5")
    assert done.returncode == 0, done.stderr
    [first, *_] = toy_math(1, seed=1)
    assert "no BOS in front" in done.stdout and f"Question: {first['question'][:30]}" in done.stdout
    records = read_done(tmp_path / "a/eval_gsm8k.jsonl")
    assert list(records) == [0, 1, 2, 3, 4] and records[0]["gold"] == first["answer"].split("#### ")[1]
    assert all(r["new_tokens"] == 12 and r["truncated"] for r in records.values())
    lines = {r["metric"]: r for r in map(json.loads, (tmp_path / "a/results.jsonl").read_text().splitlines())}
    assert lines["gsm8k_truncated"]["value"] == 1 and lines["gsm8k_strict_match"]["n"] == 5
    assert lines["gsm8k_strict_match"]["settings"]["shots"] == 1 and lines["gsm8k_strict_match"]["settings"]["limit"] == 5

    single = run(tmp_path, "--limit=5", "--shots=1", "--batch_size=1", name="b")
    assert single.returncode == 0, single.stderr
    assert (tmp_path / "a/eval_gsm8k.jsonl").read_bytes() == (tmp_path / "b/eval_gsm8k.jsonl").read_bytes()
    more = run(tmp_path, "--limit=6", "--shots=1")
    assert "5 of 6 items are there already" in more.stdout
    other = run(tmp_path, "--limit=5", "--shots=0")
    assert other.returncode == 2 and re.fullmatch(r".*error: .*was made with shots=1, not 0.*\n", other.stderr)


def test_bos_is_one_and_long_prompts_are_cut_behind_it_and_counted(tmp_path):
    done = run(tmp_path, "--limit=2", "--shots=10", "--bos=True", "--max_new_tokens=1")
    assert done.returncode == 0, done.stderr
    assert "BOS (id 1) in front" in done.stdout
    assert "WARNING: 2 prompts were cut from the left" in done.stdout and "to 511\n" in done.stdout
    records = read_done(tmp_path / "a/eval_gsm8k.jsonl")
    assert all(r["prompt_tokens"] == 511 and r["cut"] > 500 for r in records.values())


@pytest.mark.parametrize("argv, message", [
    (["--train_data=hellaswag.jsonl"], "expected question, answer"),
    (["--train_data=mosaic.jsonl"], "without question"),
    (["--test_data=absent.jsonl"], "no such file"),
    (["--shots=9999"], "has only 20 records"),
    (["--max_new_tokens=512"], "leaves no room for a prompt in the model's context of 512"),
    (["--batch_size=0"], "at least 1"),
    (["--adapter=golden/adapters/gqa-r16-qv"], "does not fit"),
])
def test_mistakes_are_one_line(tmp_path, argv, message):
    write_lines(tmp_path / "hellaswag.jsonl", [hellaswag_record(random.Random(0), 0)])
    foundry = {"context": "1 + 1?", "chain_of_thought": "", "answer": "2"}  # llm-foundry's form
    write_lines(tmp_path / "mosaic.jsonl", [foundry])
    argv = [re.sub("=([a-z]+.jsonl)", rf"={tmp_path}/\1", a) for a in argv]
    argv = [a.replace("=golden/", f"={need('golden/adapters').parent}/") for a in argv]
    done = run(tmp_path, "--limit=1", *argv)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_items_that_are_not_gsm8k_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "a", "answer": "1"}\n')
    done = run(tmp_path, f"--test_data={tmp_path / 'x.jsonl'}")
    assert done.returncode == 2 and "x.jsonl, record 2: its answer has no '#### '" in done.stderr
