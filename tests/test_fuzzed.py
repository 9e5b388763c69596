"""Damaged files of the kinds that tests/campaigns/fuzz.py found: one line that names the file, no traceback."""
import json
from operator import itemgetter

import numpy as np
import pytest
import torch
from conftest import run_here
from safetensors.torch import save_file
from test_train import tiny_model, write_tokens

from eval_loss import loss_per_target
from evaluation.evals import read_done
from evaluation.scores import json_lines
from lion import DecoupledLionW
from paper.claims import rank_of_change
from paper.plot import read_spectra
from paper.results import OF_CONFIG, OF_LINE, points_of, problems, read_run
from analysis.kept import resume_from
from text.report import inspect_folder
from training.checkpoint import load_optimizer
from training.rows import TokenRows

STRANGE = [None, True, -1, 1.5, "x", [], ["x"], {}, {"x": 1}, float("nan")]


@pytest.fixture
def data(tmp_path):
    tokens = np.arange(3, 51).reshape(3, 16)
    return write_tokens(tmp_path / "data", tokens, starts=[0, 5, 20, 40])


def rewrite(path, keys, value):
    """Set the value at these keys of a .json file."""
    content = json.loads(path.read_text())
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    path.write_text(json.dumps(content))


# ----------------------------------------------------------------------------- token folders
@pytest.mark.parametrize("value", STRANGE, ids=repr)
@pytest.mark.parametrize("keys", [("kind",), ("dtype",), ("seq_len",), ("vocab_size",), ("splits",), ("splits", "train"),
                                  ("splits", "train", "tokens")], ids=".".join)
def test_a_meta_json_with_a_strange_value(data, keys, value):
    rewrite(data / "meta.json", keys, value)
    with pytest.raises(ValueError, match="meta.json"):
        TokenRows(data)


@pytest.mark.parametrize("name", ["tokenizer_sha256", "tokenizer_name", "settings", "eos_id"])
def test_a_meta_json_with_a_strange_name(data, name):
    rewrite(data / "meta.json", (name,), [1])
    with pytest.raises(ValueError, match=f"meta.json: .*{name}"):
        TokenRows(data)


@pytest.mark.parametrize("content", [b"0", b"null", b"[]", b'"x"', b"", b'{"a": "\xff"}' + b" " * 5000, b"[" * 100_000],
                         ids=lambda content: repr(content[:9]))
def test_a_meta_json_that_is_no_object(data, content):
    (data / "meta.json").write_bytes(content)
    for read in (TokenRows, inspect_folder):
        with pytest.raises(ValueError, match="meta.json") as caught:
            read(data)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_inspect_names_a_strange_meta_json(data, value):
    rewrite(data / "meta.json", ("splits",), value)
    with pytest.raises(ValueError, match="meta.json"):
        inspect_folder(data)


@pytest.mark.parametrize("starts", [[0, 5, 2 ** 40, 7, 20], [30, 9, 5, 4, 20], [2 ** 63, 5, 6], [0, 40, 5, 20]])
def test_starts_of_documents_that_do_not_ascend(data, starts):
    np.asarray(starts, "<u8").tofile(data / "train.docs.bin")
    rows = TokenRows(data)
    for i in range(len(rows)):
        try:
            _, _, found = rows[i]
            assert all(0 < start < 16 for start in found)
        except ValueError as e:
            assert "train.docs.bin" in str(e)


def test_a_token_beyond_the_vocabulary(data):
    tokens = np.fromfile(data / "train.bin", "<u2")
    tokens[20] = 61
    tokens.tofile(data / "train.bin")
    rows = TokenRows(data)
    assert len(rows[0][0]) == 16
    with pytest.raises(ValueError, match="train.bin, row 1: token id 61"):
        rows[1]


# ----------------------------------------------------------------------------- items of evaluations
@pytest.mark.parametrize("record", [
    3, None, [], {}, {"id": "x"}, {"id": None}, {"id": 1}, {"id": 1, "loss": 1.0}, {"id": 1, "targets": 2},
    {"id": 1, "loss": [1.0], "targets": 2}, {"id": 1, "loss": 1.0, "targets": "x"}, {"id": 1, "loss": 1e308, "targets": 2},
    {"id": 1, "loss": float("nan"), "targets": 2}], ids=repr)
def test_an_item_that_is_none(tmp_path, record):
    path = tmp_path / "eval_loss_a.jsonl"
    path.write_text(json.dumps({"id": 0, "loss": 1.0, "targets": 2}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="eval_loss_a.jsonl:2"):
        read_done(path, loss_per_target)


@pytest.mark.parametrize("line", ["3", "null", "[]", "{", "", "[" * 100_000], ids=lambda line: line[:5])
def test_a_line_of_results_that_is_none(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text('{"metric": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match="results.jsonl:2"):
        list(json_lines(path))


def test_items_that_are_right(tmp_path):
    path = tmp_path / "eval_a.jsonl"
    path.write_text('{"id": 4, "strict_match": 1}\n{"id": 5, "stri')
    assert read_done(path, itemgetter("strict_match")) == {4: {"strict_match": 1}}


# ----------------------------------------------------------------------------- the optimizer's state
def test_momenta_that_are_not_whole(tmp_path):
    model = tiny_model()
    momenta = {f"{name}:exp_avg": torch.full_like(p, 0.5).detach() for name, p in model.named_parameters()}
    path = tmp_path / "state/optimizer.safetensors"
    path.parent.mkdir()

    def load():
        optimizer = DecoupledLionW(model.parameters())
        load_optimizer(model, optimizer, tmp_path)
        return optimizer

    save_file(momenta, path)
    assert all((state["exp_avg"] == 0.5).all() for state in load().state.values())
    # one is missing, or has another name: it would begin at zero
    first = next(iter(momenta))
    without = {key: momenta[key] for key in momenta if key != first}
    for changed in (without, {**without, f"{first}_": momenta[first]}, {**without, "x": momenta[first]}):
        save_file(changed, path)
        with pytest.raises(ValueError, match="state: "):
            load()
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(ValueError, match="optimizer.safetensors: truncated"):
        load()


# ----------------------------------------------------------------------------- spectra
def spectrum_json():
    matrix = {"layer": 0, "module": "q_proj", "shape": [4, 4], "norm": 1.0, "effective_rank": {"0.9": 2},
              "random_rank": {"0.9": 3}, "singular_values": [1.0, 0.5]}
    return {"kind": "spectrum", "checkpoints": [{"folder": "run/step_2", "step": 2, "tokens": 9, "lora_rank": 2}],
            "matrices": [{**matrix, "checkpoint": None, "matrix": "W0"}, {**matrix, "checkpoint": 0, "matrix": "D"}]}


@pytest.mark.parametrize("value", [None, "x", [None], [1], {"x": "y"}], ids=repr)
@pytest.mark.parametrize("keys", [("checkpoints",), ("matrices",), ("matrices", 1), ("matrices", 1, "effective_rank"),
                                  ("checkpoints", 0), ("matrices", 1, "checkpoint")], ids=str)
def test_a_spectrum_with_a_strange_value_is_left_out(tmp_path, keys, value):
    problems.clear()
    path = tmp_path / "spectrum.json"
    path.write_text(json.dumps(spectrum_json()))
    assert rank_of_change(tmp_path, 2, "0.9") == 2 and len(read_spectra([path])) == 1 and not problems
    rewrite(path, keys, value)
    assert rank_of_change(tmp_path, 2, "0.9") is None and not read_spectra([path])
    assert any("spectrum" in problem for problem in problems)
    problems.clear()


@pytest.mark.parametrize("line", ["3", "[]", "[3]", '{"a": 1}', '[{"layer": 1}]', "{"])
def test_a_damaged_line_of_a_spectrum_that_is_resumed(tmp_path, line):
    part = tmp_path / "out.part"
    part.write_text('{"made_with": {}}\n' + line + "\n")
    with pytest.raises(ValueError, match="out.part"):
        resume_from(part, {})


@pytest.mark.parametrize("line", ['{"made_with": 3}', '{"made_with": null}', '{"made_with": "x"}'])
def test_a_spectrum_made_with_nothing(tmp_path, line):
    part = tmp_path / "out.part"
    part.write_text(line + "\n")
    with pytest.raises(ValueError, match="out.part"):
        resume_from(part, {"base": "x"})


def test_inspect_says_it_in_one_line(data):
    rewrite(data / "meta.json", ("splits",), 3)
    done = run_here("prepare_data.py", f"--inspect={data}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "meta.json" in done.stderr


# ----------------------------------------------------------------------------- what runs left behind
RUN = {"config.json": {"config": {"base": "b", "data": "d", "lora_rank": 2, "lora_alpha": 4.0, "seed": 1, "weight_decay": 0.0,
                                  "lora_targets": "all", "learning_rate": 1e-3}},
       "log.jsonl": {"step": 1, "tokens": 64, "epoch": 0.5, "loss": 2.0, "val": {"val": 2.5}},
       "results.jsonl": {"step": 1, "tokens": 64, "epoch": 0.5, "metric": "gsm8k", "value": 0.5, "stderr": 0.1,
                         "settings": {"model": "b"}},
       "values.jsonl": {"step": 1, "metric": "gsm8k", "values": [0.0, 1.0]}}


# numbers that are right for these keys
SAME = {(key, value) for key in ("epoch", "lora_alpha", "seed", "weight_decay") for value in ("-1", "1.5")}
PLACES = [(file, key) for file, content in RUN.items() for key in content.get("config", content)]


def points_with(folder, file, key, change):
    """(Run, [Point]) of RUN in a folder, with one of its objects changed."""
    for name, content in RUN.items():
        content = json.loads(json.dumps(content))
        if name == file:
            change(content.get("config", content))
        (folder / name).write_text(json.dumps(content) + "\n")
    run = read_run(folder)
    return run, points_of([run])[0]


@pytest.mark.parametrize("file, key", PLACES)
def test_values_of_a_wrong_type_in_a_run_count_as_missing(tmp_path, file, key):
    missing, _ = points_with(tmp_path, file, key, lambda content: content.pop(key))
    for value in [*STRANGE, 10 ** 30, [[1]], True]:
        problems.clear()
        run, _ = points_with(tmp_path, file, key, lambda content: content.update({key: value}))  # noqa: B023
        wanted = OF_CONFIG.get(key) or OF_LINE.get(key)
        if wanted and not (isinstance(value, str) and wanted is str) and value != 10 ** 30 and (key, repr(value)) not in SAME:
            assert (problems or value is None) and repr(run) == repr(missing), (key, value)


def test_a_run_with_right_values_has_no_problems(tmp_path):
    problems.clear()
    run, [point] = points_with(tmp_path, "", "", None)
    assert run.metrics == {"gsm8k": {1: (0.5, 0.1)}, "loss val": {1: (2.5, None)}} and not problems
    assert (point.rank, point.place) == (2, {"step": 1, "tokens": 64, "epoch": 0.5})
