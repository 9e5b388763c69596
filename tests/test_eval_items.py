"""Items with values of a wrong type, splits without labels, and records that are no numbers: one line, nothing written."""
import json
import math

import pytest
from conftest import need, run_here

import eval_forgetting as ef
from eval_gsm8k import read_questions
from eval_humaneval import FIELDS
from evaluation.answer_mtbench import read_questions as read_mtbench
from evaluation.evals import load_for_eval, open_items, read_items
from evaluation.scores import write_result
from paper.results import read_run

GOOD = {
    "hellaswag": {"activity_label": "Sport", "ctx_a": "A man", "ctx_b": "he", "endings": ["a", "b", "c", "d"], "label": "3"},
    "arc_challenge": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "winogrande": {"sentence": "So _ is.", "option1": "A", "option2": "B", "answer": "2"},
    "mmlu": {"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "law"},
}
FOUNDRY = {
    "hellaswag": {"query": "A", "choices": ["a", "b"], "gold": 1},
    "winogrande": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
}
LABEL = {"hellaswag": "label", "arc_challenge": "answerKey", "winogrande": "answer", "mmlu": "answer"}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ----------------------------------------------------------------------------- labels
@pytest.mark.parametrize("value", ["", None, -1, "-1"])
@pytest.mark.parametrize("task", GOOD)
def test_a_split_without_labels_is_named_so(tmp_path, task, value):
    """As on the hub: '' in HellaSwag's and WinoGrande's test splits, -1 in many others."""
    records = [GOOD[task], {**GOOD[task], LABEL[task]: value}]
    with pytest.raises(ValueError, match=f"{task}: .*x.jsonl, record 2: .*{LABEL[task]} is .*this split has no labels"):
        ef.load_questions(task, write_lines(tmp_path / "x.jsonl", records))


@pytest.mark.parametrize("task", FOUNDRY)
def test_rows_of_llm_foundry_without_labels(tmp_path, task):
    with pytest.raises(ValueError, match="record 1: .*gold is -1: this split has no labels"):
        ef.load_questions(task, write_lines(tmp_path / "x.jsonl", [{**FOUNDRY[task], "gold": -1}]))


# ----------------------------------------------------------------------------- types
WRONG = [5, 1.5, True, None, [], {}, ["a"], {"a": 1}, "", "ab"]


@pytest.mark.parametrize("task, field", [(task, field) for task, record in GOOD.items() for field in record]
                         + [(f"{task}, foundry", field) for task, record in FOUNDRY.items() for field in record])
def test_any_value_of_a_wrong_type_is_one_message_or_a_right_item(tmp_path, task, field):
    good = FOUNDRY[task.removesuffix(", foundry")] if "foundry" in task else GOOD[task]
    task = task.removesuffix(", foundry")
    refused = 0
    for value in WRONG:
        if type(value) is type(good[field]):
            continue
        path = write_lines(tmp_path / "x.jsonl", [good, {**good, field: value}])
        try:
            questions = ef.load_questions(task, path)
        except ValueError as e:
            assert f"{task}: {path}, record 2: not an item" in str(e) and "\n" not in str(e)
            refused += 1
            continue
        assert field == LABEL[task]  # a number for a number in quotes
        assert questions[1].gold in range(len(questions[1].choices))
    assert refused


@pytest.mark.parametrize("value", WRONG[:-2])
@pytest.mark.parametrize("field", ["question", "answer"])
def test_gsm8k_takes_text_alone(tmp_path, field, value):
    good = {"question": "Why?", "answer": "So. #### 1"}
    path = write_lines(tmp_path / "x.jsonl", [good, {**good, field: value}])
    with pytest.raises(ValueError, match=f"x.jsonl, record 2: {field} is .*, expected text"):
        read_questions(path, "test_data")


@pytest.mark.parametrize("value", WRONG[:-2])
@pytest.mark.parametrize("field", FIELDS)
def test_humaneval_takes_text_alone(tmp_path, field, value):
    good = dict.fromkeys(FIELDS, "x")
    path = write_lines(tmp_path / "x.jsonl", [{**good, field: value}])
    done = run_here("eval_humaneval.py", f"--model={need('data/stories260k')}", f"--data={path}", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and f"x.jsonl, record 1: {field} is " in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("field, value", [("category", 5), ("category", ["math"]), ("turns", "hello"), ("turns", [5]),
                                          ("turns", []), ("turns", {"a": 1}), ("turns", [["a"]])])
def test_mtbench_takes_lists_of_text(tmp_path, field, value):
    good = {"question_id": 81, "category": "math", "turns": ["a", "b"]}
    path = write_lines(tmp_path / "x.jsonl", [good, {**good, field: value}])
    with pytest.raises(ValueError, match="x.jsonl, record 2: "):
        read_mtbench(path)


def test_names_alone_ask_for_no_type(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"q": 1}])
    assert read_items(path, ("q",)) == read_items(path, {"q": int}) == [{"q": 1}]
    with pytest.raises(ValueError, match="record 1: q is 1, expected text"):
        read_items(path, {"q": str})


# ----------------------------------------------------------------------------- NaN
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_no_item_and_no_result(tmp_path, value):
    subject = load_for_eval(str(need("data/stories260k")), out_dir=str(tmp_path))
    items = open_items(subject, "toy", range(2), {})
    items.finish(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="stories260k, item 1 of eval_toy.jsonl: .*NaN or infinite"):
        items.finish(1, {"loss": value})
    with pytest.raises(ValueError, match="stories260k, step 0: loss is .*NaN or infinite"):
        write_result(subject, "loss", [1.0, value], {}, 1.0)
    assert not (tmp_path / "results.jsonl").exists() and not (tmp_path / "values.jsonl").exists()
    # started again, what was finished is there, and what was not is asked for
    assert open_items(subject, "toy", range(2), {}).todo == [1]


def test_results_of_earlier_versions_with_nan_are_left_out(tmp_path):
    lines = [{"metric": "a", "step": 1, "value": math.nan}, {"metric": "b", "step": 1, "value": 2.0}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = [{"metric": "b", "step": 1, "values": [1.0, math.nan]}, {"metric": "c", "step": 1, "values": [1.0, 2.0]},
              {"metric": "d", "step": 1, "values": None}]
    (tmp_path / "values.jsonl").write_text("".join(json.dumps(line) + "\n" for line in values))
    run = read_run(tmp_path)
    assert run.metrics == {"b": {1: (2.0, None)}}
    assert run.items == {("c", 1): [1.0, 2.0], ("d", 1): []}
