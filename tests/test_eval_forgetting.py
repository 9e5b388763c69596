"""eval_forgetting.py against the outputs of lm-eval and LLM Foundry, against plain forward passes, and as a script."""
import functools
import json
import math
import random
import signal

import pytest
import torch
from conftest import golden, need, run_here, run_stage, run_warm
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import choice_items

import eval_forgetting as ef
from evaluation import trees
from evaluation.scores import score
from evaluation.shots import gauntlet_shots, lm_eval_shots_from, lm_eval_shots_of_subject
from model import Llama, LlamaConfig
from text.tokenizer import load_tokenizer

FILES = {"hellaswag": "hellaswag/hellaswag_val.jsonl.gz", "arc_challenge": "arc-challenge/ARC-Challenge-test.jsonl",
         "winogrande": "winogrande/winogrande_xl_validation.jsonl"}
MOSAIC = {"arc_challenge": "mosaic-icl/arc_challenge.jsonl", "winogrande": "mosaic-icl/winogrande.jsonl"}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """stories260k and its tokenizer as the fixtures used it: LlamaTokenizerFast keeps blanks that stand together."""
    file = tmp_path_factory.mktemp("stories") / "tokenizer.model"
    # normalizer_spec.remove_extra_whitespaces = false; protobuf merges a field that comes twice
    file.write_bytes(need("data/stories260k/tokenizer.model").read_bytes() + b"\x1a\x02\x20\x00")
    return Llama.from_pretrained(need("data/stories260k")).eval(), load_tokenizer(file)


@pytest.fixture(scope="module")
def items():
    return {task: ef.load_questions(task, str(need(f"data/{file}"))) for task, file in FILES.items()}


@pytest.fixture(scope="module")
def mosaic(items):
    rows = {task: ef.load_questions(task, str(need(f"data/{file}"))) for task, file in MOSAIC.items()}
    return {"hellaswag": items["hellaswag"], **rows}


def judged(stories, exam, style, ids, batch_tokens=1024):
    """{i: the style's part of the record of question i}"""
    llama, tok = stories
    return {i: record[style] for i, record in ef.judge_questions(llama, tok, exam, ids, batch_tokens)}


# ----------------------------------------------------------------------------- the original tools
@pytest.mark.parametrize("number", range(12))
def test_golden(number, stories, items, mosaic):
    run = golden("forgetting")["runs"][number]
    _, tok = stories
    task, few = run["task"], run["num_fewshot"]
    delimiter = ef.TASKS[task].delimiter
    if run["flavour"] == "lm-eval":
        rows, style, key = items[task], "lm_eval", "doc_id"
        pool = ef.load_questions(task, str(need("data/arc-challenge/ARC-Challenge-validation.jsonl"))) if few else []
        shots = lm_eval_shots_from(pool, rows, few, ef.TASKS[task].spare_shot)
        bos, limit, most = run["add_bos_token"], run["max_length"], run["max_length"] + 1
    else:
        rows, style, key = mosaic[task], "gauntlet", "row"
        rows = rows[:200] if task == "hellaswag" and few else rows
        assert delimiter == run["continuation_delimiter"]
        shots = gauntlet_shots(rows, few, run["fewshot_random_seed"])
        bos, limit, most = True, run["max_seq_len"], run["max_seq_len"]
    exam = ef.Exam(rows, delimiter, {style: shots}, {style: bos}, limit)
    records = judged(stories, exam, style, [item[key] for item in run["items"]])
    right = {"sum": 0, "per_char": 0, "per_token": 0}
    for item in run["items"]:
        i = item[key]
        record, (sequences, _) = records[i], exam.put(i, style, tok)
        if style == "lm_eval":
            contexts = item.get("contexts", [item.get("context")] * len(sequences))
            texts = list(zip(contexts, item["continuations"]))
            ours = [(context + delimiter[:-1], " " + choice) for context, choice in rows[i].pairs]
            assert [(c[-len(o):], e) for (o, _), (c, e) in zip(ours, texts)] == ours
            assert rows[i].chars(style) == item["choice_char_len"]
        elif "shot_rows_in_order" in item:
            assert [rows[j] for j in item["shot_rows_in_order"]] == shots[i]
        for (ids, _), theirs in zip(sequences, item.get("input_ids", [])):
            assert ids == theirs[-most:]
        assert rows[i].gold == item["gold"] and record["tokens"] == item["num_scored_tokens"]
        for ours, theirs, count in zip(record["logprobs"], item["sum_logprob"], record["tokens"]):
            assert ours == pytest.approx(theirs, abs=1e-3) and ours / count == pytest.approx(theirs / count, abs=1e-4)
        for kind in right:
            assert record[kind] == item[f"pred_{kind}"], (i, kind)
            right[kind] += record[kind] == item["gold"]
    for kind, count in right.items():
        assert count / len(run["items"]) == pytest.approx(run[f"acc_{kind}"], abs=1e-7)


def test_original_records_are_the_rows_of_llm_foundry(items, mosaic):
    assert items["winogrande"] == mosaic["winogrande"]
    pairs = list(zip(items["arc_challenge"], mosaic["arc_challenge"]))
    assert sum(a != b for a, b in pairs) == 26  # 23 wrong golds there, and 7 items with a choice more or less
    assert sum(a[:2] != b[:2] for a, b in pairs) == 7


def test_every_task_has_a_line_in_the_table_and_its_knobs():
    assert set(ef._choices["tasks"]) == set(ef.TASKS)
    for task in ef.TASKS:
        assert isinstance(getattr(ef, task), str) and isinstance(getattr(ef, f"{task}_shots"), int)


MMLU = [{"question": " What is 1 + 1?\n", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "abstract_algebra"},
        {"question": "Which is prime?", "choices": ["7", "8", "9", "10"], "answer": 0, "subject": "abstract_algebra"},
        {"question": "Who wrote it?", "choices": ["I", "You", "He", "She"], "answer": "3", "subject": "world_history"}]


def test_mmlu_prompt(stories, capsys):
    """lm-eval 0.4.2's text for MMLU, as its code made it: description, shots of the subject, first come first, letters."""
    _, tok = stories
    test, dev, other = (ef.mmlu_question(record) for record in MMLU)
    [shots] = lm_eval_shots_of_subject([other, dev, dev], [test], 1)
    with pytest.raises(ValueError, match="holds 2 of abstract_algebra"):
        lm_eval_shots_of_subject([other, dev, dev], [test], 3)
    sequences, _ = ef.lm_eval_sequences(test, shots, ef.TASKS["mmlu"].delimiter, tok, False, 2048)
    front = ("The following are multiple choice questions (with answers) about abstract algebra.\n"
             "Which is prime?\nA. 7\nB. 8\nC. 9\nD. 10\nAnswer: A\n\nWhat is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
    assert [tok.decode(ids) for ids, _ in sequences] == [f"{front} {letter}" for letter in "ABCD"]
    assert all(tok.decode(ids[-scored:]).strip() == letter for (ids, scored), letter in zip(sequences, "ABCD"))
    assert (test.gold, other.gold) == (1, 3)
    capsys.readouterr()
    drawn = gauntlet_shots([test, other, dev], 5, 1234)  # within the subject, without itself
    assert drawn == [[dev], [], [test]]
    notes = capsys.readouterr().out.splitlines()  # where a subject has fewer than are asked for
    assert notes[0] == "note: 2 questions of abstract_algebra have 1 others as shots, fewer than the 5 asked for" and len(notes) == 2


def test_lm_eval_draws_one_more_where_it_has_no_test_split():
    """Its sampler asks for one more than it uses if the splits for shots and tests are the same; both unset are, too."""
    pool, tests = list(range(20)), [None] * 3
    assert lm_eval_shots_from(pool, tests, 2, ef.TASKS["winogrande"].spare_shot) == [[14, 3], [2, 18], [2, 3]]
    assert lm_eval_shots_from(pool, tests, 2, ef.TASKS["arc_challenge"].spare_shot) == [[14, 3], [0, 2], [18, 1]]
    with pytest.raises(ValueError, match="holds 20 items, expected 21"):
        lm_eval_shots_from(pool, tests, 20, ef.TASKS["hellaswag"].spare_shot)


# ----------------------------------------------------------------------------- trees
@pytest.fixture(scope="module")
def small():
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    return Llama(config).init_weights(3).double().eval()


SEQUENCES = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.integers(1, 11)), min_size=1,
                     max_size=5)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(SEQUENCES, min_size=1, max_size=4))
def test_trees_score_what_plain_passes_score(small, groups):
    small.compute_dtype = torch.float64
    groups = [[(ids, min(scored, len(ids) - 1)) for ids, scored in group] for group in groups]
    with torch.no_grad():
        for group, found in zip(groups, trees.score_sequences(small, groups)):
            for (ids, scored), values in zip(group, found):
                logp = small(torch.tensor([ids]))[0][0].log_softmax(-1)
                expected = [logp[t - 1, ids[t]].item() for t in range(len(ids) - scored, len(ids))]
                assert values == pytest.approx(expected, abs=1e-12)


def test_a_beginning_is_computed_once(small, monkeypatch):
    shared = [1, 2, 3, 4, 5, 6, 7]
    group = [(shared + end, len(end)) for end in ([8, 9], [8, 10, 11], [12], [8, 9])]
    tree = trees.make_tree([ids[:-1] for ids, _ in group])
    assert tree.tokens == shared + [8, 10] and tree.parents[-2:] == [6, 7]
    rows = []
    monkeypatch.setattr(small, "head", lambda x, head=small.head: rows.append(len(x)) or head(x))
    found = trees.score_sequences(small, [group])[0]
    assert rows == [3]  # after the shared part, after 8, after 10
    assert found[0] == found[3] and len(found[1]) == 3


def test_bundles_take_neighbours_that_share_much():
    shots = list(range(20))
    asked = [(i, [(shots + [30 + i, letter], 1) for letter in (1, 2)]) for i in range(5)]
    asked += [(5, [([9] * 10, 1)]), (6, [([9] * 3 + [8] * 8, 1)]), (7, [([9] * 3 + [8] + [7] * 7, 1)])]
    ids = lambda most: [[i for i, _ in tree.members] for tree in trees.bundle(asked, most)]
    assert ids(1000) == [[0, 1, 2, 3, 4], [5], [6, 7]]  # 3 of 10 nodes are less than a third, 4 are more
    assert [tree.size for tree in trees.bundle(asked, 1000)] == [25, 9, 16]
    assert ids(22) == [[0, 1], [2, 3], [4], [5], [6, 7]] and ids(15)[-2:] == [[6], [7]]


def test_equal_choices_go_to_the_first():
    record = ef.judge_choices([[-1.0, -1.0], [-2.0], [-1.0, -1.0]], [4, 4, 4])
    assert record["sum"] == record["per_char"] == 0 and record["per_token"] == 0
    assert ef.judge_choices([[-3.0], [-2.0, -2.0]], [1, 8]) == {"per_token": 1, "sum": 0, "per_char": 1, "logprobs": [-3.0, -4.0],
                                                        "tokens": [1, 2]}


# ----------------------------------------------------------------------------- the script
@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """{task: file} with forty items of our own each."""
    return choice_items(tmp_path_factory.mktemp("items"), 40)


@pytest.fixture
def argv(own_files):
    """A function (out, *more) -> the command line of a short run; what `more` says replaces what stands here."""
    return functools.partial(command_line, own_files)


def command_line(files, out, *more):
    knobs = {"--model": need("data/stories260k"), "--out_dir": out, "--device": "cpu", "--limit": 12}
    knobs.update((f"--{task}", file) for task, file in files.items())
    knobs.update(knob.split("=", 1) for knob in more)
    return ["eval_forgetting.py", *[f"{knob}={value}" for knob, value in knobs.items()]]


def item_lines(out):
    return {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in sorted(out.glob("eval_*.jsonl"))}


def assert_same_items(first, second):
    assert first.keys() == second.keys() and len(first) == 3
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            for style in ("gauntlet", "lm_eval"):
                assert a[style].pop("logprobs") == pytest.approx(b[style].pop("logprobs"), abs=2e-4)
            assert a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory, own_files):
    out = tmp_path_factory.mktemp("whole")
    ran = run_here(*command_line(own_files, out))
    assert ran.returncode == 0, ran.stderr
    return out, ran.stdout


def test_script(whole):
    out, stdout = whole
    results = {r["metric"]: r for r in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert set(results) == {"hellaswag", "hellaswag_acc", "hellaswag_acc_norm", "arc_challenge", "arc_challenge_acc",
                            "arc_challenge_acc_norm", "winogrande", "winogrande_acc", "forgetting",
                            *(f"{task}_loss" for task in ef.FORGETTING)}
    lines = item_lines(out)
    means, errors = [], []
    for task in ef.FORGETTING:
        records = lines[f"eval_forgetting_{task}.jsonl"]
        assert [r["id"] for r in records] == list(range(12))
        hits = [r["gauntlet"]["per_token"] == r["gold"] for r in records]
        means.append(sum(hits) / 12)
        errors.append(means[-1] * (1 - means[-1]) / 11)
        assert results[task]["value"] == pytest.approx(means[-1])
        gold = [r["gauntlet"]["logprobs"][r["gold"]] / r["gauntlet"]["tokens"][r["gold"]] for r in records]
        assert results[f"{task}_loss"]["value"] == pytest.approx(-sum(gold) / 12)
        assert results[f"{task}_acc"]["value"] == pytest.approx(sum(r["lm_eval"]["sum"] == r["gold"] for r in records) / 12)
    found = results["forgetting"]
    assert found["value"] == pytest.approx(sum(means) / 3) and found["n"] == 36
    assert found["stderr"] == pytest.approx(math.sqrt(sum(errors)) / 3)
    values = [json.loads(line) for line in (out / "values.jsonl").read_text().splitlines()]
    of_mean = score(next(line["values"] for line in values if line["metric"] == "forgetting"))
    assert of_mean[0] == pytest.approx(found["value"]) and of_mean[1] == pytest.approx(found["stderr"], rel=0.05)
    assert f"forgetting: {found['value']:.4f} +- {found['stderr']:.4f}" in stdout
    assert found["settings"]["dtype"] == "float32" and found["settings"]["winogrande_shots"] == 5
    assert results["arc_challenge"]["settings"]["shots"] == 3 and results["arc_challenge"]["settings"]["limit"] == 12
    assert "gauntlet: " in stdout and "lost their beginning to max_seq_len=512" in stdout  # three shots do not always fit
    cut = sum(r["gauntlet"]["cut"] > 0 for r in lines["eval_forgetting_arc_challenge.jsonl"])
    assert 0 < cut < 12 and f"arc_challenge, gauntlet: {cut} of 12 items" in stdout


def test_another_name_has_metrics_of_its_own(whole, argv, tmp_path):
    """So that results with other shots do not take the place of the first in results.jsonl."""
    ran = run_here(*argv(tmp_path, "--name=noshots", "--limit=2", "--arc_challenge_shots=0", "--winogrande_shots=0"))
    assert ran.returncode == 0, ran.stderr
    named = [json.loads(line)["metric"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    plain = [json.loads(line)["metric"] for line in (whole[0] / "results.jsonl").read_text().splitlines()]
    assert named == [f"noshots_{metric}" for metric in plain]


@pytest.mark.parametrize("batch_tokens", [1, 700])
def test_batch_size_does_not_matter(whole, argv, tmp_path, batch_tokens):
    assert run_here(*argv(tmp_path, f"--batch_tokens={batch_tokens}")).returncode == 0
    assert_same_items(item_lines(whole[0]), item_lines(tmp_path))


def test_world_size_does_not_matter(whole, argv, tmp_path):
    ran = run_stage("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert_same_items(item_lines(whole[0]), item_lines(tmp_path))
    assert [line for line in ran.stdout.splitlines() if line.startswith("forgetting:")] == \
        [line for line in whole[1].splitlines() if line.startswith("forgetting:")]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 12


# runs the command that follows, and kills it when it has finished 20 items
KILLED_AT_20 = """
import os, runpy, signal, sys
from evaluation.evals import Items

finish = Items.finish

def finish_and_die(self, i, record):
    finish(self, i, record)
    if len(self.new) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

Items.finish = finish_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_resumes_after_a_kill(argv, tmp_path):
    """SIGKILL in the middle; the rest is done, what was finished is not done again."""
    killed = run_warm("-c", KILLED_AT_20, *argv(tmp_path, "--batch_tokens=1", "--limit=40", "--tasks=hellaswag"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    part = tmp_path / "eval_forgetting_hellaswag.jsonl.part0"
    lines = part.read_text().splitlines()
    assert len(lines) == 20
    before = lines[:-1]
    marked = [json.dumps({**json.loads(line), "mark": True}) for line in before]
    part.write_text("\n".join(marked) + '\n' + lines[-1][:8])
    ran = run_here(*argv(tmp_path, "--limit=40", "--tasks=hellaswag"))
    assert ran.returncode == 0, ran.stderr
    records = item_lines(tmp_path)["eval_forgetting_hellaswag.jsonl"]
    assert sorted(r["id"] for r in records) == list(range(40)) and sum("mark" in r for r in records) == len(before)
    assert f"{len(before)} of 40 items are there already" in ran.stdout
    assert "no forgetting number" in ran.stdout


def test_mmlu_script(argv, tmp_path):
    """Mean over subjects; questions after the same shots in one tree score as one by one."""
    rng = random.Random(0)
    subjects = {"world_history": 7, "abstract_algebra": 3}
    records = [{"question": f"What is {rng.randrange(99)} and {i}?", "choices": [f"{rng.randrange(99)} cats" for _ in "abcd"],
                "answer": rng.randrange(4), "subject": subject} for subject, n in subjects.items() for i in range(n)]
    dev = [{**r, "question": "Now: " + r["question"]} for r in records]
    for file, rows in (("test", records), ("dev", dev)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ("--tasks=mmlu", f"--mmlu={tmp_path / 'test.jsonl'}", f"--lm_eval_shot_data={tmp_path / 'dev.jsonl'}",
              "--lm_eval_shots=2")
    out = {}
    for size in (1, 4096):
        ran = run_here(*argv(tmp_path / str(size), *common, f"--batch_tokens={size}"))
        assert ran.returncode == 0, ran.stderr
        out[size] = item_lines(tmp_path / str(size))["eval_forgetting_mmlu.jsonl"]
    for a, b in zip(*out.values(), strict=True):
        assert a["lm_eval"]["logprobs"] == pytest.approx(b["lm_eval"]["logprobs"], abs=2e-4)
        assert a["gauntlet"]["per_token"] == b["gauntlet"]["per_token"]
    results = {r["metric"]: r["value"] for r in map(json.loads, (tmp_path / "1" / "results.jsonl").read_text().splitlines())}
    hits = {s: [r["gauntlet"]["per_token"] == r["gold"] for r in out[1] if r["subject"] == s] for s in subjects}
    assert results["mmlu"] == pytest.approx(sum(sum(h) / len(h) for h in hits.values()) / 2)
    assert results["mmlu_acc"] == pytest.approx(sum(r["lm_eval"]["sum"] == r["gold"] for r in out[1]) / 10)


# ----------------------------------------------------------------------------- mistakes
def test_mistakes_are_one_line(whole, own_files, argv, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}\n')
    short = tmp_path / "short.jsonl"
    short.write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n')
    cases = [(("--tasks=helaswag",), "--tasks=helaswag: expected a tuple of str out of 'hellaswag'"),
             (("--tasks=",), "tasks is empty"),
             ((f"--hellaswag={tmp_path / 'none.jsonl'}",), "no such file"),
             ((f"--hellaswag={own_files['winogrande']}",),
              "record 1: not an item of hellaswag (no 'activity_label'); fields found: sentence"),
             ((f"--arc_challenge={bad}",), "record 1: not an item of arc_challenge ('C' is not in list)"),
             ((f"--hellaswag={short}",), "record 1: not an item of hellaswag (2 choices, gold 2)"),
             (("--max_seq_len=513",), "max_seq_len=513: the model reads 512 tokens at most"),
             (("--max_seq_len=20", "--tasks=hellaswag"), "leaves no room for a question"),
             (("--winogrande_shots=-1",), "winogrande_shots=-1: expected 0 or more"),
             (("--lm_eval_shots=2",), "lm_eval_shots needs lm_eval_shot_data"),
             ((f"--adapter={need('golden/adapters/gqa-r16-qv')}",), "adapter")]
    for given_knobs, message in cases:
        ran = run_here(*argv(tmp_path / "out", *given_knobs))
        errors = [line for line in ran.stderr.splitlines() if "error: " in line]
        assert ran.returncode == 2 and len(errors) == 1 and message in errors[0], (given_knobs, ran.stderr)
        assert not list(tmp_path.glob("out/*.jsonl")), given_knobs
    ran = run_here(*argv(whole[0], "--winogrande_shots=4", "--tasks=winogrande"))
    assert ran.returncode == 2 and "was made with shots=5, not 4" in ran.stderr
