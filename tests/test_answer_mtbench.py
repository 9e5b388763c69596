"""answer_mtbench.py: FastChat's answer file, by a tiny model, from questions in FastChat's form."""
import json

import pytest
from conftest import need, run_here
from samples import mtbench_questions, word_problems

from evaluation.answer_mtbench import TEMPERATURES, Form, next_prompt
from text.tokenizer import load_tokenizer


# FastChat's reference answers have these keys, in this order
KEYS = ["question_id", "answer_id", "model_id", "choices", "tstamp"]
CHOICE_KEYS = ["index", "turns"]


def run(tmp_path, folder="a", **knobs):
    knobs = {"model": need("data/stories260k"), "out_dir": tmp_path / folder, "max_new_tokens": 20,
             "questions": mtbench_questions(tmp_path / "q.jsonl"), **knobs}
    return run_here("evaluation/answer_mtbench.py", *(f"--{knob}={value}" for knob, value in knobs.items()))


def test_the_file_is_fastchats_and_the_same_whatever_the_batch(tmp_path):
    file = mtbench_questions(tmp_path / "q.jsonl")
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    assert {question["category"] for question in asked} == set(TEMPERATURES)
    answers = {}
    for name, batch in (("a", 8), ("b", 1)):
        done = run(tmp_path, name, questions=file, batch_size=batch, model_id="tiny")
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "mt_bench/model_answer/tiny.jsonl").read_text().splitlines()
        answers[name] = [json.loads(line) for line in lines]
    for line, question in zip(answers["a"], asked, strict=True):
        assert list(line) == KEYS and list(line["choices"][0]) == CHOICE_KEYS
        assert line["question_id"] == question["question_id"] and line["model_id"] == "tiny"
        assert len(line["choices"][0]["turns"]) == 2 and all(isinstance(t, str) for t in line["choices"][0]["turns"])
    drop = lambda lines: [{k: v for k, v in line.items() if k != "tstamp"} for line in lines]
    assert drop(answers["a"]) == drop(answers["b"])
    assert len({line["answer_id"] for line in answers["a"]}) == len(asked)


def test_answers_under_another_name_have_a_file_of_their_own(tmp_path):
    file = mtbench_questions(tmp_path / "q.jsonl")
    for name in ("mtbench", "plain"):
        done = run(tmp_path, "a", questions=file, limit=1, name=name)
        assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "a/mt_bench/model_answer").iterdir()}
    assert written == {"stories260k-0.jsonl", "stories260k-0-plain.jsonl"}


def test_started_again_it_answers_what_is_left(tmp_path):
    assert run(tmp_path, limit=2, bos=False).returncode == 0
    more = run(tmp_path, limit=3, bos=False)
    assert more.returncode == 0 and "2 of 3 items are there already" in more.stdout and "3 answers" in more.stdout
    other = run(tmp_path, limit=3)
    assert other.returncode == 2 and "made with bos=False, not True" in other.stderr


def test_second_prompt_holds_the_first_turn_and_one_eos():
    tok = load_tokenizer(need("data/stories260k"))
    form = Form("U: {message} A:", "\n", bos=True)
    first = next_prompt(tok, [], "hi {message}", form)
    assert first == tok.encode("U: hi {message} A:", bos=True)
    second = next_prompt(tok, first + [50, 51], "more", form)
    assert second == first + [50, 51, tok.eos_id] + tok.encode("\nU: more A:")
    assert second.count(tok.bos_id) == second.count(tok.eos_id) == 1


def test_special_tokens_in_a_template_are_said_to_be_text(tmp_path):
    done = run(tmp_path, limit=1, template="<s>{message}</s>")
    assert done.returncode == 0 and "WARNING: template: <s>, </s> are special tokens of this model" in done.stdout, done.stderr


def test_backslashes_are_read_as_prepare_data_reads_them(tmp_path):
    r"""\n, \t and \\ in the template, the separator and the stop texts are a newline, a tab and a backslash."""
    done = run(tmp_path, limit=1, template=r"a\tb\\n{message}\n", separator=r"\t\\t", stop=r"\n\n,\\n")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "a/eval_mtbench.settings.json").read_text())
    assert settings["template"] == "a\tb\\n{message}\n"
    assert settings["separator"] == "\t\\t"
    assert settings["stop"] == ["\n\n", "\\n"]


@pytest.mark.parametrize("knob, value, message", [
    ("template", "hello", "template: expected {message} in it"), ("max_new_tokens", 512, "leaves no room"),
    ("limit", -1, "limit: at least 0"), ("batch_size", 0, "batch_size, max_new_tokens: at least 1"),
    ("questions", "", "questions is not set"), ("questions", "word problems", "expected question_id, category, turns"),
])
def test_mistakes_are_one_line(tmp_path, knob, value, message):
    if value == "word problems":
        value = word_problems(tmp_path / "problems.jsonl", 3)
    done = run(tmp_path, **{knob: value})
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_an_answer_ends_before_the_text_that_ends_it(tmp_path):
    """The next turn's prompt does not hold that text either: 'the' ends every answer here."""
    done = run(tmp_path, limit=1, stop="the")
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "a/mt_bench/model_answer/stories260k-0.jsonl").read_text())
    assert all("the" not in turn for turn in line["choices"][0]["turns"])
