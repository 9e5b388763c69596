"""prepare_data.py, the paper's side: llm-foundry's packing, its datasets, the hub, and the sources of its datasets."""
import gzip
import hashlib
import http.server
import io
import json
import re
import shutil
import threading
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from conftest import ROOT, golden, need, run_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare_data import documents_of, prepare, tokenizer_file, write_jsonl  # noqa: F401 (fixtures)

import prepare_data
from configurator import configure
from text.packing import auto_ratio, pack_first_fit, pack_no_wrap, pack_paper, packed_share
from text.records import CHUNK, array_items, expand, from_hub, parse, read_records, split_text, unescape
from text.report import show_document
from text.templates import tulu_turns
from text.tokenizer import load_tokenizer

DATASETS = ROOT / "config/data"

# ---- packing as llm-foundry


def test_first_fit_equals_llm_foundry():
    cases = golden("packing")["packing"]
    assert len(cases) == 12
    for case in cases:
        leftover, lengths = [], [min(length, case["max_seq_len"]) for length in case["lengths"]]
        for call in case["calls"]:
            rows, leftover = pack_first_fit(call["raw_examples"], lengths, case["max_seq_len"], case["device_batch_size"],
                                            leftover)
            leftover = leftover[:case["max_leftover_bins_to_keep"]]  # None keeps all, as we do
            assert [(row["size"], row["examples"]) for row in call["bins"]] == rows, case["name"]
            assert [(row["size"], row["examples"]) for row in call["leftover"]] == leftover, case["name"]


def test_auto_ratio_equals_llm_foundry():
    for case in golden("packing")["auto_ratio"]:
        lengths, seq_len, batch = case["lengths"], case["max_seq_len"], case["device_batch_size"]
        examples = list(range(len(lengths)))
        assert auto_ratio(examples, lengths, seq_len, batch) == case["auto_packing_ratio"]
        for entry in case["profile"][:4]:
            rows, left = packed_share(examples, lengths, seq_len, batch, entry["ratio"])
            packed, lost = sum(size for size, _ in rows), sum(size for size, _ in left)
            assert 100 * (1 - packed / (len(rows) * seq_len)) == pytest.approx(entry["padding_percent"], abs=1e-9)
            assert 100 * lost / (packed + lost) == pytest.approx(entry["waste_percent"], abs=1e-9)


def test_magicoder_has_193_steps():
    """The step counts that the authors publish fall out of 111,183 examples of Magicoder's mean length (656 tokens)."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(656) - 0.18, 0.6, 111183), 20, 4096).astype(int).tolist()
    assert 600 < np.mean(lengths) < 700
    rows, ratio = pack_paper(lengths, 4096, ranks=32, batch=6, ratio=0, seed=17)
    assert ratio == 3.1 and len(rows) == 193 * 192
    used = [example for row in rows for example in row]
    assert len(used) == len(set(used)) == 193 * 32 * 18  # int(3.1 * 6) examples a GPU and step
    assert max(sum(lengths[example] for example in row) for row in rows) <= 4096
    assert sum(lengths) / len(rows) / 4096 == pytest.approx(0.48, abs=0.01)
    # rows of a step come from that step's examples of each GPU
    order = np.random.Generator(np.random.Philox(key=[17, 0])).permutation(111183)
    for step, rank in ((0, 0), (5, 31), (192, 7)):
        here = [example for row in rows[step * 192 + rank * 6:step * 192 + rank * 6 + 6] for example in row]
        assert sorted(here) == sorted(order[rank::32][step * 18:step * 18 + 18].tolist())


def test_each_epoch_is_packed_anew():
    """As the paper's sampler and packer do: another order, other rows, and the first epoch the same as alone."""
    lengths = np.random.default_rng(0).integers(5, 60, 500).tolist()
    rows, ratio = pack_paper(lengths, 64, 4, 3, 0, seed=17, epochs=3)
    epochs = [rows[at:at + len(rows) // 3] for at in range(0, len(rows), len(rows) // 3)]
    assert len(epochs) == 3 and epochs[0] == pack_paper(lengths, 64, 4, 3, 0, seed=17)[0] and len(epochs[0]) % 12 == 0
    assert len({json.dumps(sorted(map(sorted, epoch))) for epoch in epochs}) == 3
    for number, epoch in enumerate(epochs):  # each a packing of its own shuffle, by the same ratio
        order = np.random.Generator(np.random.Philox(key=[17, number])).permutation(500)
        group = int(ratio * 3)
        first = [example for row in epoch[:3] for example in row]
        assert len(set(example for row in epoch for example in row)) == 125 // group * group * 4
        assert sorted(first) == sorted(order[0::4][:group].tolist())


def test_no_wrap_leaves_what_is_over():
    assert pack_no_wrap([3, 2, 9, 1, 3, 4, 1], 4) == [[0, 1], [2], [3, 4], [5]] and pack_no_wrap([3], 4) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(1, 4), st.integers(1, 5), st.floats(1, 6),
       st.integers(0, 9))
def test_paper_packing_loses_nothing_unseen(lengths, ranks, batch, ratio, seed):
    rows, _ = pack_paper(lengths, 64, ranks, batch, ratio, seed)
    used = [example for row in rows for example in row]
    assert len(used) == len(set(used)) and len(rows) % (ranks * batch) == 0
    assert all(row and sum(lengths[example] for example in row) <= 64 for row in rows)
    assert len(rows) == len(lengths) // ranks // int(ratio * batch) * ranks * batch


@pytest.mark.parametrize("packing", ["best_fit", "paper"])
def test_loss_of_packed_documents_is_their_loss_alone(prepare, tmp_path, packing):
    """From records to the loss that train.py takes: isolated, packed rows lose what their examples lose one a row."""
    import torch

    from model import Llama
    from training.rows import TokenRows
    from training.watch import mean_loss
    base, records = need("data/stories260k"), []
    for number, length in enumerate([3, 40, 9, 25, 14, 30, 5, 18]):
        records.append({"prompt": f"Once there were {number}", "response": "little birds who sang " * (length // 9 + 1)})
    write_jsonl(tmp_path / "a.jsonl", records)
    model, losses = Llama.from_pretrained(base, dtype=torch.float32, device="cpu"), []
    for kind, extra in [(packing, {"paper_ranks": 2, "paper_batch": 1, "packing_ratio": 4.0}), ("none", {})]:
        status, out, err = prepare(source="a.jsonl", kind="ift", tokenizer=base, seq_len=256, packing=kind, anew=True, **extra)
        assert status == 0, err
        rows = TokenRows(tmp_path / "data")
        targets = sum(int((rows[i][1] >= 0).sum()) for i in range(len(rows)))
        losses.append((mean_loss(model, rows, 1, torch.device("cpu")), targets))
        assert len(rows) == (8 if kind == "none" else 2)
    assert losses[0][1] == losses[1][1] > 100 and losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)


def test_paper_packing_run(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"question {i}", "response": "yes" * (i % 2 + 1)} for i in range(200)])
    status, out, err = prepare(source="a.jsonl", kind="ift", packing="paper", paper_ranks=2, paper_batch=3, packing_ratio=2,
                               seq_len=64)
    assert status == 0, err
    meta = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert "1 epochs of 16 steps of 6 rows; 8 documents left over" in out and (meta["rows"], meta["unpacked"]) == (96, 8)
    assert meta["documents"] == 192 and (meta["steps"], meta["packing_ratio"]) == (16, 2.0)
    shown = [ids for ids, mask in documents_of(tmp_path / "data") if any(mask)]
    assert len({tuple(ids) for ids in shown}) == 192
    status, out, err = prepare(source="a.jsonl", kind="ift", packing="paper", paper_ranks=64, anew=True)
    assert status == 2 and "--paper_ranks" in err


def test_train_reads_the_papers_epochs_in_their_order(prepare, tmp_path):
    """Three epochs on disk, read step by step with train.py's defaults; other batches, or more epochs, are refused."""
    from training.rows import TokenRows, rows_of_step
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"question {i}", "response": "yes" * (i % 2 + 1)} for i in range(100)])
    knobs = {"source": "a.jsonl", "kind": "ift", "packing": "paper", "paper_ranks": 2, "paper_batch": 3, "packing_ratio": 2,
             "seq_len": 64}
    assert prepare(**knobs)[0] == 0
    first = np.fromfile("data/train.bin", "<u2")
    status, out, err = prepare(**knobs, paper_epochs=3, anew=True)
    assert status == 0 and "3 epochs of 8 steps of 6 rows; 12 documents left over" in out, err
    stored, rows = np.fromfile("data/train.bin", "<u2"), TokenRows("data")
    assert len(rows) == 48 and rows.packed == (3, 8) and (stored[:48 * 64] == first).all() and len(stored) == 3 * len(first)
    read = [i for step in range(24) for i in rows_of_step(step, 6, len(rows), 1337, True, rows.packed)]
    assert read == list(range(144)) and (rows[143][0] == stored[143 * 64:]).all()
    with pytest.raises(ValueError, match="global_batch=4: the data has packing='paper', in steps of 6 rows"):
        rows_of_step(0, 4, len(rows), 1337, True, rows.packed)
    with pytest.raises(ValueError, match="step 32: .* for 3 epochs of 8 steps; prepare it with --paper_epochs=4"):
        rows_of_step(31, 6, len(rows), 1337, True, rows.packed)


# ---- datasets of the paper, and templates

# records of our own, with the fields of the published ones
OWN = {
    "magicoder": [{"instruction": "Write a function that doubles a number.\n\n```python\ndef double(x):\n    pass\n```",
                   "response": "```python\ndef double(x):\n    return 2 * x\n```"}],
    "metamathqa": [{"type": "GSM_Rephrased", "query": "How much are 3 pens at $4 each?",
                    "original_question": "A pen is $4. How much are 3?",
                    "response": "Each pen is $4, so 3 pens are 3 * 4 = $12.\n#### 12\nThe answer is: 12"},
                   {"type": "MATH_AnsAug", "query": "Compute $2^5$.", "original_question": "Compute $2^5$.",
                    "response": "$2^5 = \\boxed{32}$. The answer is: 32"}],
    "tulu_v2": [{"dataset": "own", "id": "own_0", "messages": [
        {"role": "user", "content": "Name a colour "}, {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another • one"}, {"role": "assistant", "content": "Green, as grass."}]}]}
OWN_SHOWN = {"magicoder": "[<BOS>Write a function that doubles", "metamathqa": "#### 12\nThe answer is: 12<EOS>»",
             "tulu_v2": "<|user|>\nAnother • one\n<|assistant|>\n]« Green, as grass.<EOS>»"}
PUBLISHED = {  # config file: (sample of its records, what stands in the example that is shown)
    "magicoder": ("magicoder_evol_instruct", "[<BOS>Please amend the subsequent"),
    "metamathqa": ("metamathqa", "#### 1200\nThe answer is: 1200<EOS>»"),
    "tulu_v2": ("tulu_v2", "<|assistant|>\n]« You're welcome! If you have any further questions, feel free to ask.<EOS>»")}


def assert_dataset_reads(prepare, tmp_path, dataset, records, tokenizer, shown):
    """Writes the records in the dataset's file format and prepares them with its config file."""
    if dataset == "metamathqa":  # published as one array
        (tmp_path / "in.json").write_text(json.dumps(records, indent=2))
    elif dataset == "tulu_v2":
        write_parquet(tmp_path / "in.parquet", records)
    else:
        write_jsonl(tmp_path / "in.jsonl", records)
    [file] = tmp_path.glob("in.*")
    status, out, err = prepare(DATASETS / f"{dataset}.py", source=file.name, tokenizer=tokenizer, seq_len=2048)
    assert status == 0, err
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert shown in "\n".join(meta["examples"]) and meta["source"][0]["records"] == len(records)
    assert (meta["kind"], meta["seq_len"], meta["settings"]["val_fraction"]) == ("ift", 2048, 0.0)
    assert meta["settings"]["paper_batch"] == (24 if dataset == "metamathqa" else 6)


@pytest.mark.parametrize("dataset", OWN)
def test_records_in_the_form_of_the_papers_datasets(prepare, tmp_path, dataset):
    assert_dataset_reads(prepare, tmp_path, dataset, OWN[dataset], need("data/stories260k"), OWN_SHOWN[dataset])


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_real_records_of_the_papers_datasets(prepare, tmp_path, dataset):
    name, shown = PUBLISHED[dataset]
    records = [json.loads(line) for line in need(f"data/schema-samples/{name}.jsonl").read_text().splitlines()]
    assert_dataset_reads(prepare, tmp_path, dataset, records, need("data/llama2-tokenizer"), shown)


def test_a_cpt_dataset_reads_its_field(prepare, tmp_path):
    records = [{"content": f"def f{i}():\n    return {i}\n" * 40, "id": str(i)} for i in range(60)]
    write_parquet(tmp_path / "train-0.parquet", records)
    status, out, err = prepare(DATASETS / "starcoder_python.py", source="train-*.parquet", seq_len=64, max_tokens=3000)
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert status == 0 and meta["settings"]["text_field"] == "content", err
    stats = meta["splits"]["train"]
    longest = max(len(ids) for ids, _ in documents_of(tmp_path / "data"))
    assert 3000 - 64 < stats["tokens"] < 3000 + longest and stats["dropped_why"]["not sampled"] > 5


def test_every_dataset_is_pinned_and_whole(capsys):
    for name in ("magicoder", "metamathqa", "openwebmath", "starcoder_python", "tulu_v2"):
        file = DATASETS / f"{name}.py"
        knobs = configure({**vars(prepare_data)}, [str(file)])  # every name in it is a knob
        assert re.fullmatch(r"hf://datasets/[^@]+@[0-9a-f]{40}/.*(\.parquet|\.jsonl|\.json)", knobs["source"][0])
        assert knobs["seq_len"] == (1024 if file.stem == "metamathqa" else 4096)
        assert f"prepare_data.py config/data/{file.name} " in file.read_text()


def test_the_command_line_wins_over_a_config_file(prepare, tmp_path):
    status, out, err = prepare(DATASETS / "magicoder.py", source="nowhere.jsonl", seq_len=99)
    assert status == 2 and "nowhere.jsonl" in err and "seq_len = 99" in out
    assert "nearest is" in prepare(DATASETS / "magicode.py")[2]
    assert "expected hf://datasets/OWNER/NAME" in prepare(source="hf://datasets/me")[2]


def test_named_templates(prepare, tmp_path, tokenizer_file):
    write_jsonl(tmp_path / "a.jsonl", [{"query": "2+2?", "response": "4"}])
    for name, before, after in [("alpaca", "Below is an instruction", "2+2?\n\n### Response:"), ("none", "2+2?", ""),
                                ("magicoder", "You are an exceptionally", "@@ Instruction\n2+2?\n\n@@ Response\n")]:
        assert prepare(source="a.jsonl", kind="ift", template=name, prompt_field="query", seq_len=512, anew=True)[0] == 0
        [shown] = json.loads((tmp_path / "data/meta.json").read_text())["examples"]
        assert shown.startswith(f"[<BOS>{before}") and shown.endswith(f"{after}]« 4<EOS>»")


def test_tulu_turns_and_which_are_learned(prepare, tmp_path):
    messages = [{"role": r, "content": c} for r, c in [("system", "Be kind."), ("user", "Hi "), ("assistant", "Hello."),
                                                       ("user", "Bye"), ("assistant", "See you.")]]
    assert tulu_turns([(m["role"], m["content"]) for m in messages]) == [
        ("<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n", "Hello."), ("\n<|user|>\nBye\n<|assistant|>\n", "See you.")]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    for turns, learned in [("last", ["See you."]), ("all", ["Hello.", "See you."])]:
        status, out, err = prepare(source="a.jsonl", kind="ift", template="tulu", train_on_turns=turns, seq_len=128, anew=True)
        assert status == 0, err
        [shown] = json.loads((tmp_path / "data/meta.json").read_text())["examples"]
        assert re.findall("« ?(.*?)<EOS>»", shown) == learned
    for bad, message in [(messages[:-1], "the last one is of role assistant"), ("text", "expected a list of messages"),
                         ([{"role": "bot", "content": ""}], "expected roles"),
                         ([{"role": "user"}], "expected a field 'content'")]:
        write_jsonl(tmp_path / "a.jsonl", [{"messages": bad}])
        status, out, err = prepare(source="a.jsonl", kind="ift", template="tulu", anew=True)
        assert status == 2 and "a.jsonl:1: " in err and message in err, err


CHATS_OF = {"system": "Be kind.", "user": "Hi", "assistant": "Hello."}


@pytest.mark.parametrize("template", ["tulu", "llama2"])
def test_misplaced_turns_are_refused(prepare, tmp_path, template):
    """As Llama-2's template in transformers raises, and llm-foundry for two of a role in a row."""
    for roles, place in [("system system user assistant", 2), ("user system assistant", 2), ("user user assistant", 2),
                         ("user assistant assistant", 3), ("assistant user assistant", 1), ("system assistant", 2),
                         ("user assistant system user assistant", 3), ("assistant", 1)]:
        messages = [{"role": role, "content": CHATS_OF[role]} for role in roles.split()]
        write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
        status, out, err = prepare(source="a.jsonl", kind="ift", template=template, anew=True)
        wanted = f"message {place} of {len(messages)} is {messages[place - 1]['role']!r}"
        assert status == 2 and wanted in err and err.count("\n") == 1, err
    good = [{"role": role, "content": CHATS_OF[role]} for role in ("user", "assistant")]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": good}])
    status, out, err = prepare(source="a.jsonl", kind="ift", template=template, anew=True, on_bad_record="skip")
    assert status == 0 and "1 bad records skipped\n  a.jsonl:1: expected roles" in out, err


@pytest.mark.parametrize("template", ["tulu", "llama2"])
@pytest.mark.parametrize("learned", ["last", "all"])
def test_an_empty_turn_drops_its_example(prepare, tmp_path, template, learned):
    """As llm-foundry, wherever the empty response stands; what is only read may be empty."""
    def chat(*contents):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}

    good = [chat("Hi", "Hello.", "Bye", "See you."), chat("", "Hello.")]
    empty = [chat("Hi", ""), chat("Hi", " \n"), chat("Hi", "", "Bye", "See you."), chat("Hi", "Hello.", "Bye", "")]
    write_jsonl(tmp_path / "a.jsonl", [*good, *empty])
    status, out, err = prepare(source="a.jsonl", kind="ift", template=template, train_on_turns=learned, seq_len=128,
                               train_on_prompt=True)
    assert status == 0, err
    counts = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert (counts["documents"], counts["dropped_why"]) == (2, {"empty": 4}) and "(4 empty)" in out


def test_an_empty_response_drops_its_example(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2?", "response": ""}, {"prompt": "2+2?", "response": "4"}])
    assert prepare(source="a.jsonl", kind="ift", seq_len=64, train_on_prompt=True)[0] == 0
    counts = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert (counts["documents"], counts["dropped_why"]) == (1, {"empty": 1})


def test_messages_as_columns(prepare, tmp_path):
    """As datasets stores a sequence of objects."""
    roles, contents, made = ["user", "assistant"] * 2, ["Hi", "Hello.", "Bye", "See you."], []
    rows = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    for messages in (rows, {"role": roles, "content": contents}):
        write_parquet(tmp_path / "a.parquet", [{"messages": messages}])
        status, out, err = prepare(source="a.parquet", kind="ift", template="tulu", seq_len=128, anew=True)
        assert status == 0, err
        made.append((tmp_path / "data/train.bin").read_bytes())
    assert made[0] == made[1]
    for bad in ({"role": roles, "content": contents[1:]}, {"role": roles}):
        write_jsonl(tmp_path / "a.jsonl", [{"messages": bad}])
        status, out, err = prepare(source="a.jsonl", kind="ift", template="tulu", anew=True)
        assert status == 2 and "as many contents as roles" in err


def test_one_prompt_cannot_be_in_both_splits(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2?", "response": str(i)} for i in range(30)])
    for fraction in (0.01, 0.99):
        status, out, err = prepare(source="a.jsonl", kind="ift", val_fraction=fraction, anew=True)
        assert status == 2 and "txt_split" not in err, err
        assert "0 dropped (none); prompts are held out whole, 30 went to the other split: give more prompts or" in err, err
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2?", "response": ""}] * 3)
    status, out, err = prepare(source="a.jsonl", kind="ift", val_fraction=0, anew=True)
    assert status == 2 and "3 dropped (3 empty); see source and the fields" in err


@pytest.mark.parametrize("val_fraction", [0, 0.2])
def test_a_split_whose_documents_are_all_dropped_says_what_to_do_about_it(prepare, tmp_path, val_fraction):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"{i} + 2 is how much?" * 9, "response": str(i)} for i in range(30)])
    status, out, err = prepare(source="a.jsonl", kind="ift", val_fraction=val_fraction, seq_len=16)
    assert status == 2 and "no room); give a larger seq_len\n" in err, err
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " + "ten words that are in the other file as well, and more of them"}
                                       for i in range(30)])
    status, out, err = prepare(source="a.jsonl", val_fraction=val_fraction, decontaminate="a.jsonl", anew=True)
    assert status == 2 and "contaminated); see decontaminate\n" in err, err


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\\n\\n", "\\r\\n\\r\\n", "\\n---\\n", "---", "\\t\\n"])
def test_windows_line_ends(prepare, tmp_path, monkeypatch, newline, separator):
    """A newline of txt_split is one of the text, however that spells it and wherever a read ends."""
    typed = separator.replace("\\r", "").replace("\\n", newline).replace("\\t", "\t")
    texts = [f"one{newline}line", "two", f"three{newline}"]
    (tmp_path / "a.txt").write_bytes(typed.join(texts).encode())
    for chunk in (1, 2, 3, 1 << 20):
        monkeypatch.setattr("text.records.CHUNK", chunk)
        [source] = expand(["a.txt"], ())
        found = [raw["text"].decode() for _, raw, _ in read_records(source, "text", unescape(separator))]
        assert found == texts


def test_train_on_prompt(prepare, tmp_path):
    records, learned = [{"prompt": "short", "response": "yes"}, {"prompt": "a much longer " * 9, "response": "no"}], {}
    write_jsonl(tmp_path / "a.jsonl", records)
    for name, knobs in [("no", {}), ("all", {"train_on_prompt": 1}),
                        ("long", {"train_on_prompt": 1, "train_on_prompt_from": 30})]:
        assert prepare(source="a.jsonl", kind="ift", packing="none", seq_len=128, anew=True, **knobs)[0] == 0
        learned[name] = [sum(mask) for _, mask in documents_of(tmp_path / "data") if any(mask)]
        lengths = [len(ids) for ids, mask in documents_of(tmp_path / "data") if any(mask)]
    assert learned["all"] == [length - 1 for length in lengths]  # nothing stands before BOS
    assert learned["long"] == [learned["no"][0], learned["all"][1]]


# ---- sources

def write_parquet(path, records, **options):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)


def records_in(path, **options):
    """(place, record or message) of what a source yields."""
    found = []
    for number, raw, used in read_records(expand([str(path)], (".py",))[0], **options):
        try:
            found.append((number, parse(raw)))
        except ValueError as error:
            found.append((number, str(error)))
    return found


def test_parquet_streams_row_groups_and_only_its_fields(tmp_path):
    records = [{"text": f"document {i} é", "n": i, "turns": [{"role": "user", "content": "x"}]} for i in range(1700)]
    write_parquet(tmp_path / "a.parquet", records, row_group_size=600)
    assert records_in(tmp_path / "a.parquet") == list(enumerate(records, 1))
    assert records_in(tmp_path / "a.parquet", fields=["text"])[-1] == (1700, {"text": "document 1699 é"})
    assert records_in(tmp_path / "a.parquet", fields=["txt"])[0] == (1, dict.fromkeys(records[0]))  # for a message that says what is there


def test_parquet_mistakes(prepare, tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"body": "x", "n": 3}])
    status, out, err = prepare(source="a.parquet")
    assert status == 2 and "a.parquet:1: expected a field 'text', found only 'body', 'n'" in err
    write_parquet(tmp_path / "a.parquet", [{"text": 3}])
    assert "a.parquet:1: expected text in field 'text', found int" in prepare(source="a.parquet")[2]
    write_parquet(tmp_path / "a.parquet", [{"text": "words " * 50}] * 3000, row_group_size=1000)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-100])
    status, out, err = prepare(source="a.parquet")
    assert status == 2 and re.search(r"a.parquet:1: cannot be read from here on: .*[Pp]arquet", err) and err.count("\n") == 1, err
    (tmp_path / "a.parquet").write_bytes(b"")
    assert "a.parquet:1: " in prepare(source="a.parquet")[2]
    write_parquet(tmp_path / "a.parquet", [{"text": b"\xff\xfe"}])
    assert "a.parquet:1: 'utf-8' codec can't decode" in prepare(source="a.parquet")[2]
    write_parquet(tmp_path / "a.parquet", [{"text": None}, {"text": "words " * 50}, {"text": None}])
    status, out, err = prepare(source="a.parquet", on_bad_record="skip")
    assert status == 0 and "2 bad records skipped" in out and "a.parquet:3: expected text in field 'text', found NoneType" in out


ITEMS = [{"a": "é\n" * 40}, 5, "x]", [1, [2]], {"text": "[{,"}, None, 1.5e3, {}]


@pytest.mark.parametrize("chunk", [1, 3, 64, 1 << 20])
def test_arrays_in_chunks_of_any_size(monkeypatch, chunk):
    monkeypatch.setattr("text.records.CHUNK", chunk)
    for text in (json.dumps(ITEMS), json.dumps(ITEMS, indent=3), "\ufeff \n" + json.dumps(ITEMS) + " \n", "[]", "[ 12]"):
        assert list(array_items(io.BytesIO(text.encode()))) == json.loads(text.removeprefix("\ufeff"))
    for text, message in [("[1 2]", "expected ',' or ']', found '2'"), ("[1, {]", "Expecting"), ("[1", "end of the file"),
                          ("[1]]", "after the array's end"), ("[1,]", "Expecting value"), ('["a', "Unterminated")]:
        with pytest.raises(ValueError, match=re.escape(message)):
            list(array_items(io.BytesIO(text.encode())))


@settings(max_examples=80, deadline=None)
@given(st.text("ab\n", max_size=40), st.sampled_from(["\n", "\n\n", "ab", "é"]), st.integers(1, 9))
def test_split_text(text, separator, chunk):
    with patch("text.records.CHUNK", chunk):
        parts = list(split_text(io.BytesIO(text.encode()), separator.encode()))
    assert [part.decode() for part in parts] == text.split(separator)


def test_a_long_text_without_a_border_is_searched_once(monkeypatch):
    """Each byte but the few that a border may straddle."""
    searched = []
    border = SimpleNamespace(split=lambda text: searched.append(len(text)) or [text])
    monkeypatch.setattr("text.records.re", SimpleNamespace(compile=lambda _: border, escape=re.escape, split=re.split))
    text = b"a" * (5 * CHUNK)
    assert list(split_text(io.BytesIO(text), b"--")) == [text]
    assert sum(searched) < 1.01 * len(text)


def test_a_template_of_ones_own_takes_the_prompt_from_its_field(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "wrong", "question": "right", "response": "r"}])
    status, out, err = prepare(source="a.jsonl", kind="ift", template="Q: {prompt}", prompt_field="question")
    assert status == 0 and "Q: right" in out and "wrong" not in out, err


def test_knobs_of_rows_do_not_tokenize_again(prepare, tmp_path):
    """What an error advises uses the blocks that are done; other knobs delete them, and say so."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2?", "response": f"{i} " * 30} for i in range(100)])
    knobs = {"source": "a.jsonl", "kind": "ift", "block_mb": 0.0002}
    status, _, err = prepare(**knobs, val_fraction=0.05)
    assert status == 2 and "--val_fraction=0" in err
    kept = len(list((tmp_path / "data.work").glob("*.npz")))
    status, out, err = prepare(**knobs, packing="none")
    assert status == 0 and kept > 16 and f"resuming with {kept} finished blocks" in out, err
    shutil.copytree(tmp_path / "data", tmp_path / "first")
    prepare(**knobs, val_fraction=0.05, anew=True)
    status, out, err = prepare(**knobs, response_prefix=" ")
    assert status == 0 and f"deleting {kept} blocks of data.work, made with other knobs" in out, err
    status, out, err = prepare(**knobs, packing="none", anew=True)
    assert (tmp_path / "first/train.bin").read_bytes() == (tmp_path / "data/train.bin").read_bytes()


def test_no_wrap_counts_the_documents_that_are_cut(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one two three four five six seven eight"} for _ in range(30)])
    status, out, err = prepare(source="a.jsonl", seq_len=8, no_wrap=True)
    assert status == 0 and "30 truncated" in out, err


def test_examples_show_the_ends_of_long_texts_and_tokens_between_turns(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "begins " + "word " * 800 + "ends", "response": "learned"}])
    status, out, err = prepare(source="a.jsonl", kind="ift", seq_len=4096)
    assert status == 0 and re.search(r"\[<BOS>begins .* \(\d+ characters more\) .*ends\]« ?learned<EOS>»", out), out + err
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": role, "content": content} for role, content in talk]}])
    status, out, err = prepare(source="b.jsonl", kind="ift", seq_len=128, template="llama2", anew=True)
    shown = r"\[<BOS>\[INST\] Hi \[/INST\] +Hello <EOS><BOS> ?\[INST\] Bye \[/INST\]\]« +See you <EOS>»"
    assert re.search(shown, out), out + err


def test_one_token_for_begin_and_end_is_shown_as_what_it_is(tmp_path):
    np.array([5, 97, 98, 5, 99], "<u2").tofile(tmp_path / "train.bin")
    np.array([0], "<u8").tofile(tmp_path / "train.docs.bin")
    tok = SimpleNamespace(bos_id=5, eos_id=5, special_ids={}, decode=lambda ids: bytes(ids).decode())
    assert show_document(tmp_path, "train", {"dtype": "uint16"}, tok, 0) == "«<BOS>ab<EOS>c»"


def test_lines_of_ndjson_are_records(tmp_path):
    (tmp_path / "a.ndjson").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert records_in(tmp_path / "a.ndjson") == [(1, {"text": "x"}), (2, {"text": "y"})]


def test_a_binary_column_hides_no_missing_field(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"image": b"\xff\xfe", "content": "x"}])
    [(_, record)] = records_in(tmp_path / "a.parquet", fields=["text"])
    assert list(record) == ["image", "content"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("sub/a.py", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfa = 1\n")
        assert records_in((tmp_path / name) if name == "b.txt" else tmp_path / "sub")[0][1]["text"] == "a = 1\n"


def test_a_folder_of_source_files(prepare, tmp_path, tokenizer_file):
    files = {"b/two.py": "two = 2\n" * 20, "a.py": "a = 1\n" * 20, "b/one.py": "one = 1\n" * 20, "c.txt": "no", ".git/x.py": "no"}
    for name, text in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(text)
    status, out, err = prepare(source="src", seq_len=2)
    assert status == 0 and "src: 3 records, " in out, err
    tok = load_tokenizer(tokenizer_file)
    texts = [tok.decode([i for i in ids if i not in (1, 2)]) for ids, _ in documents_of(tmp_path / "data")]
    assert texts[:2] == [files["a.py"], files["b/one.py"]]
    sha = json.loads((tmp_path / "data/meta.json").read_text())["source"][0]["sha256"]
    names = ["a.py", "b/one.py", "b/two.py"]
    assert sha == hashlib.sha256("".join(name + files[name] for name in names).encode()).hexdigest()
    assert "src: 1 records" in prepare(source="src", suffixes=".txt", seq_len=2, anew=True)[1]
    (tmp_path / "src/b/one.py").write_bytes(b"\xff")
    assert "src/b/one.py: 'utf-8' codec can't decode" in prepare(source="src", anew=True)[2]


# ---- the hub, imitated on this machine: its API and its files as huggingface_hub asks for them

@pytest.fixture
def hub(tmp_path):
    """Runs Python against a local hub that holds {path: bytes}; returns a function, and what was asked of it."""
    asked, files, gated, sha = [], {}, set(), "0123456789abcdef" * 2 + "01234567"

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, head=False):
            asked.append((self.command, self.path, self.headers.get("authorization"), self.headers.get("range")))
            repo = "/".join(re.match(r"/(?:api/)?datasets/([^/]+)/([^/]+)", self.path).groups())
            if repo in gated and not self.headers.get("authorization"):
                return self.reply(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            if not any(name.startswith(repo) for name in files):
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such"})
            if self.path.startswith("/api/"):
                names = [{"rfilename": name[len(repo) + 1:]} for name in files if name.startswith(repo)]
                return self.reply(200, json.dumps({"id": repo, "sha": sha, "siblings": names}).encode())
            content = files[repo + "/" + self.path.split(f"/resolve/{sha}/")[1]]
            etag = hashlib.sha256(content).hexdigest()
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}, head)

        def reply(self, status, content, headers={}, head=False):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if head else content)

        do_GET, do_HEAD = answer, lambda self: self.answer(head=True)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*argv, **env):
        return run_stage(*argv, cwd=tmp_path, **{
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": tmp_path / "cache", "HF_TOKEN": "",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "no_proxy": "*", **env})
    yield run, files, gated, asked, sha
    server.shutdown()


FETCH = ("import sys; from text.records import expand\n"  # as prepare_data.py does, without the seconds that importing torch takes
         "try:\n    print(*(source.name for source in expand(sys.argv[1:], ())))\n"
         "except ValueError as error:\n    sys.exit(str(error))")


def test_hub_dataset(hub, tokenizer_file, tmp_path):
    run, files, gated, asked, sha = hub
    line = b'{"text": "some words that make a document of a few tokens or more, for a row"}\n'
    files.update({"me/set/data/a.jsonl": line * 3, "me/set/data/b.jsonl.gz": gzip.compress(line * 2), "me/set/README.md": b"x"})
    done = run(ROOT / "prepare_data.py", "--source=hf://datasets/me/set@main/data/*.jsonl*", f"--tokenizer={tokenizer_file}",
               "--out_dir=d", "--val_fraction=0", "--seq_len=32", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert {token for *_, token, _ in asked} == {"Bearer hf_secret"} and "hf_secret" not in (tmp_path / "d/meta.json").read_text()
    entries = json.loads((tmp_path / "d/meta.json").read_text())["source"]
    names = [f"hf://datasets/me/set@{sha}/data/{name}" for name in ("a.jsonl", "b.jsonl.gz")]
    assert [entry["path"] for entry in entries] == names
    assert [(entry["records"], entry["revision"]) for entry in entries] == [(3, sha), (2, sha)]
    assert entries[0]["sha256"] == hashlib.sha256(line * 3).hexdigest()
    del asked[:]
    done = run("-c", FETCH, f"hf://datasets/me/set@{sha}/data/*.jsonl")
    assert done.stdout.split() == names[:1], done.stderr
    assert not any(method == "GET" and "/resolve/" in path for method, path, *_ in asked)  # nothing is fetched twice
    gated.add("me/set")
    done = run("-c", FETCH, "hf://datasets/me/set/data/a.jsonl", HF_HOME=tmp_path / "other")
    assert done.returncode and "accept its terms at https://huggingface.co/datasets/me/set and set HF_TOKEN" in done.stderr
    assert "hf download me/set --repo-type dataset" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("source, env, message", [
    ("hf://datasets/me/none", {}, "no such dataset or revision"),
    ("hf://datasets/me/set/*.parquet", {}, "no file matches '*.parquet'; the dataset holds data/a.jsonl"),
    ("hf://datasets/me/set", {"HF_HUB_OFFLINE": "1"}, "cannot be fetched from the hub (OfflineModeIsEnabled"),
    ("hf://datasets/me/set", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ": no connection to the hub)")])
def test_hub_mistakes(hub, source, env, message):
    run, files, *_ = hub
    files["me/set/data/a.jsonl"] = b'{"text": "x"}\n'
    done = run("-c", FETCH, source, **env)
    assert done.returncode and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    if "the hub" in message:
        assert "--source='DIR/*'" in done.stderr


@pytest.mark.parametrize("kind, text, wanted", [
    ("ConnectError", "[Errno -2] Name or service not known", "(ConnectError: no connection to the hub)"),  # httpx's
    ("ReadTimeout", "(MaxRetryError(" * 40, "(ReadTimeout: no connection to the hub)"),
    ("RemoteProtocolError", "a long story\n" * 40, "(RemoteProtocolError: a long story")])
def test_errors_of_any_http_library_are_one_short_line(monkeypatch, kind, text, wanted):
    """huggingface_hub 1.x raises httpx's, which are no OSErrors."""
    import huggingface_hub

    def fails(*_, **__):
        raise type(kind, (Exception,), {})(text)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fails)
    with pytest.raises(ValueError) as error:
        from_hub("hf://datasets/me/set", "source")
    message = str(error.value)
    assert wanted in message and "\n" not in message and len(message) < 480
