"""Tokens that reach over the end of a context: cut as lm-eval 0.4.2 cuts them, and what is left when nothing is."""
import json
import shutil

import pytest
from conftest import need, run_here
from tokenizers import Tokenizer, models

import eval_forgetting as ef
from text.tokenizer import load_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?\n'-"


def write_tokenizer(folder, *words):
    """A tokenizer.json of single characters, in which each of `words` is one token as well."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[:end - 1], word[end - 1]))
    Tokenizer(models.BPE(vocab, merges)).save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def lm_eval_pair(tok, context, continuation):
    """lm-eval 0.4.2's HFLM._encode_pair and what it puts into the model."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        continuation = context[-blanks:] + continuation
        context = context[:-blanks]
    whole = tok.encode(context + continuation)
    ids = tok.encode(context)
    return ids + whole[len(ids):], len(whole[len(ids):])


QUESTION = ef.Question(("Question: a b",), ("A", "Abc", "no"), 1)
JOINS = {"no token over the join": (), "one that eats a whole choice": ("r: A",), "one that eats a part": (": Ab",),
         "one before the join": ("Answer:",), "two on either side": ("er:", "r: A", " no"), "a long one": ("er: no",)}


@pytest.mark.parametrize("what", JOINS)
@pytest.mark.parametrize("task", ["hellaswag", "arc_challenge"])
def test_choices_are_cut_as_lm_eval_cuts_them(tmp_path, what, task):
    tok = write_tokenizer(tmp_path, *JOINS[what])
    delimiter = ef.TASKS[task].delimiter
    expected = []
    for context, choice in QUESTION.pairs:
        expected.append(lm_eval_pair(tok, context + delimiter[:-1], " " + choice))
    found = ef.lm_eval_sequences(QUESTION, [], delimiter, tok, False, 2048)
    if min(scored for _, scored in expected) > 0:
        assert found == (expected, 0)
    else:  # an AssertionError there
        assert found == ([], None)


def run(tmp_path, *knobs):
    model = tmp_path / "model"
    shutil.copytree(need("data/stories260k"), model)
    (model / "tokenizer.model").unlink()
    write_tokenizer(model, "r: A")
    lines = []
    for i, label in enumerate("ABAB"):
        # every other question has the choice that loses its token
        texts = ["A", "bc"] if i % 2 else ["d", "bc"]
        lines.append({"question": f"a{i}", "choices": {"text": texts, "label": ["A", "B"]}, "answerKey": label})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_here("eval_forgetting.py", f"--model={model}", f"--out_dir={tmp_path / 'out'}", "--tasks=arc_challenge",
                    f"--arc_challenge={tmp_path / 'q.jsonl'}", "--arc_challenge_shots=0", "--bos=False", *knobs)
    results = tmp_path / "out/results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    return done, {line["metric"]: line for line in map(json.loads, lines)}


def test_items_without_a_token_are_left_out_and_the_other_style_is_kept(tmp_path):
    done, results = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: arc_challenge, lm_eval: 2 of 4 items are left out" in done.stdout
    assert results["arc_challenge"]["n"] == results["arc_challenge_loss"]["n"] == 4
    assert results["arc_challenge_acc"]["n"] == results["arc_challenge_acc_norm"]["n"] == 2
    records = [json.loads(line) for line in (tmp_path / "out/eval_forgetting_arc_challenge.jsonl").read_text().splitlines()]
    assert ["refused" in record["lm_eval"] for record in records] == [False, True, False, True]


def test_a_style_whose_items_are_all_refused_has_no_score(tmp_path):
    done, results = run(tmp_path, "--styles=lm_eval", "--limit=1")
    assert done.returncode == 0 and results["arc_challenge_acc"]["n"] == 1, done.stderr
    # the second question alone, which has no such choice
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    (tmp_path / "q2.jsonl").write_text(lines[1] + "\n")
    done = run_here("eval_forgetting.py", f"--model={tmp_path / 'model'}", f"--out_dir={tmp_path / 'out2'}",
                    "--tasks=arc_challenge", f"--arc_challenge={tmp_path / 'q2.jsonl'}", "--arc_challenge_shots=0",
                    "--bos=False", "--styles=lm_eval")
    assert done.returncode == 0 and "1 of 1 items are left out" in done.stdout, done.stderr
    assert not (tmp_path / "out2/results.jsonl").is_file()
