"""--harness=0.4.13 against outputs and scores of lm-eval 0.4.13 (transformers 5.24), on data of the tests' own."""
import json

import pytest
from conftest import golden, need, run_here
from samples import TASKS, choice_items, word_problems

from evaluation.evals import UNTIL_CUT, bos_of_harness, read_done
from text.tokenizer import load_tokenizer


def run(script, tmp_path, **knobs):
    knobs = {"model": need("data/stories260k"), "out_dir": tmp_path / "out", "harness": "0.4.13", "dtype": "float32", **knobs}
    done = run_here(script, *(f"--{name}={value}" for name, value in knobs.items()))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(4))
def test_answers_of_gsm8k(tmp_path, number):
    recorded = golden("lm_eval_0413")["gsm8k"][number]
    items = recorded["items"]
    out = run("eval_gsm8k.py", tmp_path, test_data=need("golden/data/word_problems/test.jsonl"),
              train_data=need("golden/data/word_problems/train.jsonl"), shots=recorded["shots"],
              max_new_tokens=recorded["max_gen_toks"])
    assert "BOS (id 1) in front where a prompt is whole" in out
    records = read_done(tmp_path / "out/eval_gsm8k.jsonl")
    assert len(records) == len(items) == 12
    for i, item in enumerate(items):
        record = records[i]
        # with BOS
        assert record["prompt_tokens"] + record["cut"] == item["tokens"]
        assert record["output"] == item["output"]
        assert [record["strict"], record["strict_match"]] == item["strict-match"]
        assert [record["flexible"], record["flexible_match"]] == item["flexible-extract"]


@pytest.mark.parametrize("max_length", [0, 40])
def test_scores_of_choices(tmp_path, max_length):
    run("eval_forgetting.py", tmp_path, **choice_items(tmp_path, 20), styles="lm_eval", max_seq_len=max_length)
    cut = 0
    for task in TASKS:
        [recorded] = [entry for entry in golden("lm_eval_0413")["choices"]
                      if (entry["task"], entry["max_length"]) == (task, max_length)]
        records = read_done(tmp_path / f"out/eval_forgetting_{task}.jsonl")
        assert len(records) == len(recorded["items"]) == 20
        for i, item in enumerate(recorded["items"]):
            ours = records[i]["lm_eval"]
            cut += ours["cut"] > 0
            assert ours["logprobs"] == pytest.approx(item["logprobs"], abs=1e-3)
            assert (ours["sum"] == records[i]["gold"]) == item["acc"]
            if item["acc_norm"] is not None:
                assert (ours["per_char"] == records[i]["gold"]) == item["acc_norm"]
    # both kinds were compared: whole prompts, and some that lost their BOS
    assert (cut > 0) == (max_length > 0)


def test_the_knob_wins_over_the_harness(tmp_path):
    tok = load_tokenizer(need("data/stories260k"))
    assert tok.adds_bos
    found = [bos_of_harness(harness, bos, tok) for harness in ("0.4.2", "0.4.13") for bos in (None, True, False)]
    assert found == [False, True, False, UNTIL_CUT, UNTIL_CUT, False]
    # a tokenizer that puts none
    tok.adds_bos = False
    assert bos_of_harness("0.4.13", None, tok) is False
    done = run_here("eval_gsm8k.py", f"--model={need('data/stories260k')}", "--harness=0.4.3")
    assert done.returncode == 2 and "'0.4.2', '0.4.13'" in done.stderr, done.stderr


def test_items_of_another_harness_are_not_mixed(tmp_path):
    files = dict(test_data=word_problems(tmp_path / "test.jsonl", 2), train_data=word_problems(tmp_path / "train.jsonl", 2))
    run("eval_gsm8k.py", tmp_path, **files, shots=0, max_new_tokens=2, bos=True)
    settings = json.loads((tmp_path / "out/eval_gsm8k.settings.json").read_text())
    assert settings["bos"] == UNTIL_CUT
    with pytest.raises(AssertionError, match="was made with bos='until cut', not True"):
        run("eval_gsm8k.py", tmp_path, **files, shots=0, max_new_tokens=2, bos=True, harness="0.4.2")
