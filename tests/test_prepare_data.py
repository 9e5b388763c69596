"""prepare_data.py: the original tools' tokens, masks and rows that lose nothing, and errors in one line."""
import gzip
import hashlib
import io
import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from conftest import ROOT, golden, need, run_here, run_stage, run_warm
from text.encode import make_encoder
from text.packing import pack_best_fit
from prepare_data import encode_turns, write_split
from quickstart import toy_math
from text.records import unescape
from text.shards import DOCUMENT
from text.templates import CHATS, read_template
from text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A sentencepiece model of 400 pieces, made as Llama-2's: BPE, bytes for what is unknown, blanks kept."""
    path, model = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", io.BytesIO()
    text = [prepare_data.__doc__, *(record["question"] for record in toy_math(200, 0))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def prepare(tokenizer_file, tmp_path, monkeypatch):
    """Runs the stage inside this process, as `python prepare_data.py --knob=value ...` in an empty folder would (anew: without
    the data of the run before); returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*config_files, anew=False, **knobs):
        if anew:
            shutil.rmtree("data", ignore_errors=True)
        knobs = {"tokenizer": tokenizer_file, "out_dir": "data", "seq_len": 32, "val_fraction": 0, **knobs}
        done = run_here("prepare_data.py", *config_files, *(f"--{name}={value}" for name, value in knobs.items()))
        return done.returncode, done.stdout, done.stderr
    return run


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_shards(folder, documents, dtype="<u2"):
    """Shards of three documents each, as blocks leave them: [{ids, mask, and fields of DOCUMENT}] -> the table of them all."""
    tables = []
    for at in range(0, len(documents), 3):
        part = documents[at:at + 3]
        tables.append(np.zeros(len(part), DOCUMENT))
        for row, document in zip(tables[-1], part):
            row["length"] = len(document["ids"])
            for name in {*document} & {*DOCUMENT.names}:
                row[name] = document[name]
        arrays = {"ids": np.array([i for d in part for i in d["ids"]], dtype), "documents": tables[-1],
                  "mask": np.array([bit for d in part for bit in d.get("mask", [])], np.uint8)}
        np.savez(folder / f"{len(tables):06d}.npz", **arrays)
    return np.concatenate(tables), len(tables)


def documents_of(folder, name="train"):
    """The documents of a split as train.py will see them: [(ids, mask or None)], padding included."""
    meta = json.loads((folder / "meta.json").read_text())
    ids = np.fromfile(folder / f"{name}.bin", "<u2" if meta["dtype"] == "uint16" else "<u4")
    starts = np.fromfile(folder / f"{name}.docs.bin", "<u8").astype(int).tolist()
    has_mask = (folder / f"{name}.mask.bin").exists()
    mask = np.fromfile(folder / f"{name}.mask.bin", np.uint8) if has_mask else None
    assert meta["splits"][name]["sha256"] == hashlib.sha256((folder / f"{name}.bin").read_bytes()).hexdigest()
    assert len(ids) == meta["splits"][name]["tokens"] and starts[0] == 0 and starts == sorted(set(starts))
    ends = starts[1:] + [len(ids)]
    return [(ids[a:b].tolist(), mask[a:b].tolist() if has_mask else None) for a, b in zip(starts, ends)]


# ---- the original tools' tokens

def labels(encode, turns, seq_len, **options):
    """What golden/finetune_tokens.json stores for an example: validity, ids, labels. The label of the first token is the
    one that no loss ever sees."""
    ids, mask, dropped = encode_turns(encode, turns, seq_len, b"\1\0", b"\2\0", **options)
    ids, mask = np.frombuffer(ids, "<u2")[:seq_len].tolist(), [*mask[:seq_len]]
    labels = [i if learned else -100 for i, learned in zip(ids, mask)]
    return {"valid": False} if dropped else {"valid": True, "length": len(ids), "input_ids": ids, "labels": labels}


@pytest.fixture(scope="module")
def llama2():
    """Llama-2's texts to ids."""
    return make_encoder(load_tokenizer(need("data/llama2-tokenizer")), "<u2")


def unseen(result):
    return {**result, "labels": [-100] + result["labels"][1:]} if result["valid"] else result


@pytest.mark.parametrize("seq_len", [64, 1024])
def test_pairs_equal_llm_foundry(llama2, seq_len):
    fixture = golden("finetune_tokens")
    assert len(fixture["pairs"]) == 30 and len(fixture["tricky_pairs"]) == 15
    spelt_out = []
    for pair in fixture["pairs"] + fixture["tricky_pairs"]:
        ours = labels(llama2, [(pair["prompt"], pair["response"])], seq_len)
        if re.search("</?s>", pair["prompt"] + pair["response"]):
            # Hugging Face reads "<s>" and "</s>" in a text as ids 1 and 2; for us they are text, as for sentencepiece
            spelt_out.append((pair["prompt"], pair["response"]))
            assert ours["input_ids"] != pair[f"at_{seq_len}"]["input_ids"]
            assert ours["input_ids"].count(1) == 1 and ours["input_ids"].count(2) == 1 and ours["input_ids"][-1] == 2
        else:
            assert ours == pair[f"at_{seq_len}"], pair
    assert spelt_out == [("Q: 1+1?\nA:", " 2</s>"), ("Q", "ends with </s>"), ("Q", "</s>"), ("<s> doubled bos", "x"),
                         ("mid </s> text here", "and <s> there")]


def test_target_settings_equal_llm_foundry(llama2):
    fixture = golden("finetune_tokens")
    pairs = {pair["train_index"]: (pair["prompt"], pair["response"]) for pair in fixture["pairs"]}
    assert len(fixture["target_settings"]) == 16
    for case in fixture["target_settings"]:
        prompts = {"none": None, "all": 0}.get(case["target_prompts"], case["target_prompts"][len("length>="):])
        ours = labels(llama2, [pairs[case["train_index"]]], case["max_seq_len"], learn_all=case["target_responses"] == "all",
                      prompt_from=None if prompts is None else int(prompts))
        assert ours == unseen(case["result"]), case["target_prompts"]


def test_chats_equal_llm_foundry(llama2):
    fixture = golden("finetune_tokens")
    assert len(fixture["chat"]) == 3
    for case in fixture["chat"]:
        turns = CHATS["llama2"]([(message["role"], message["content"]) for message in case["messages"]])
        for name, options in [("last", {}), ("all", {"learn_all": True}), ("prompts_all", {"learn_all": True, "prompt_from": 0})]:
            assert labels(llama2, turns, 4096, bos_each=True, **options) == unseen(case[name]), (name, case["messages"])


def test_padded_rows_equal_llm_foundry(prepare, tmp_path):
    fixture = golden("finetune_tokens")
    pairs, compared = {pair["train_index"]: pair for pair in fixture["pairs"]}, 0
    for batch in fixture["padded_batches"]:
        if batch["padding_side"] == "right":
            write_jsonl(tmp_path / "a.jsonl", [pairs[index] for index in batch["train_indices"]])
            status, out, err = prepare(source="a.jsonl", kind="ift", tokenizer=need("data/llama2-tokenizer"), packing="none",
                                       seq_len=batch["max_seq_len"], anew=True)
            assert status == 0, err
            ids, mask = np.fromfile("data/train.bin", "<u2"), np.fromfile("data/train.mask.bin", np.uint8)
            rows = len(batch["train_indices"])
            assert ids.reshape(rows, -1).tolist() == batch["input_ids"]
            assert np.where(mask, ids.astype(int), -100).reshape(rows, -1).tolist() == batch["labels"]
            compared += 1
    assert compared == 2


def test_stream_equals_llm_foundry(prepare, tmp_path):
    """Every run of ConcatTokensDataset: with and without EOS, BOS twice where bos_text adds to the tokenizer's, no_wrap."""
    fixture = json.loads(need("golden/finetune_tokens.json").read_text())["cpt"]
    write_jsonl(tmp_path / "docs.jsonl", [{"text": text} for text in fixture["documents"]])
    settings = set()
    for run in fixture["runs"]:
        status, out, err = prepare(anew=True, source="docs.jsonl", tokenizer=need("data/llama2-tokenizer"),
                                   seq_len=run["max_length"], add_eos=bool(run["eos_tokens"]),
                                   double_bos=bool(run["bos_tokens"]), no_wrap=run["no_wrap"])
        assert status == 0, err
        rows = np.fromfile("data/train.bin", "<u2").reshape(-1, run["max_length"]).tolist()
        assert len(rows) == run["num_samples"] and rows[:len(run["samples"])] == run["samples"]
        assert not (tmp_path / "data/train.mask.bin").exists()
        settings.add((run["max_length"], bool(run["eos_tokens"]), bool(run["bos_tokens"]), run["no_wrap"]))
    assert len(settings) == len(fixture["runs"]) == 8


# ---- CPT

AWKWARD = ["One.", " two  blanks ", "tabs\tand\r\nlines\n\n\nend\n", "é 你好 😀 \u0000 nul", "</s> is text <s>",
           "x" * 500, "a\nb"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "lines.json", "txt", "txt.gz"])
def test_cpt_gives_the_documents_back(prepare, tokenizer_file, tmp_path, ending):
    if ending.startswith("txt"):
        text = "\n---\n".join(AWKWARD)
    elif ending == "json":
        text = json.dumps([{"text": text} for text in AWKWARD], indent=1)
    else:
        text = "\n".join(json.dumps({"text": text}) + "\n" for text in AWKWARD)  # with blank lines
    text = text.encode()
    (tmp_path / f"in.{ending}").write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    status, out, err = prepare(source=f"in.{ending}", txt_split=r"\n---\n")
    assert status == 0, err
    tok, documents = load_tokenizer(tokenizer_file), documents_of(tmp_path / "data")
    whole = [ids for ids, _ in documents if ids[-1] == tok.eos_id]
    assert all(ids[0] == tok.bos_id and tok.bos_id not in ids[1:] and tok.eos_id not in ids[:-1] for ids in whole)
    assert [tok.decode(ids[1:-1]).encode() for ids in whole] == [text.encode() for text in AWKWARD[:len(whole)]]
    total = sum(len(tok.encode(text, bos=True, eos=True)) for text in AWKWARD)
    stats = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert stats["lost"] == total % 32 and stats["tokens"] == total - total % 32 == stats["rows"] * 32
    assert stats["documents"] == len(documents) >= len(whole) > 4 and stats["padding"] == 0


SPLITS = st.lists(st.tuples(st.integers(1, 15), st.booleans(), st.sampled_from([0, 0, 0, 1])), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), SPLITS, st.booleans())
def test_stream_and_its_starts(tmp_path_factory, seq_len, shapes, no_wrap):
    """Both splits get their own documents in order, cut to whole rows; exactly the documents that begin in them are listed."""
    folder = tmp_path_factory.mktemp("stream")
    table, count = write_shards(folder, [{"ids": [number] * (length * (not why)), "val": val, "why": why}
                                         for number, (length, val, why) in enumerate(shapes)])
    job = SimpleNamespace(kind="cpt", seq_len=seq_len, dtype=np.dtype("<u2"), no_wrap=no_wrap, pad=0)
    for name in ("train", "val"):
        buffer, rows, starts, total = [], [], [], 0
        for number, (length, val, why) in enumerate(shapes):
            if val == (name == "val") and not why:
                starts.append(len(rows) * seq_len + len(buffer))
                buffer, total = buffer + [number] * length, total + length
                while len(buffer) >= seq_len:
                    rows, buffer = rows + [buffer[:seq_len]], [] if no_wrap else buffer[seq_len:]
        if total < seq_len:
            with pytest.raises(ValueError, match="make no row"):
                write_split(name, table, folder, count, folder, job)
            continue
        counts = write_split(name, table, folder, count, folder, job)
        assert np.fromfile(folder / f"{name}.bin", "<u2").reshape(-1, seq_len).tolist() == rows
        kept = [start for start in starts if start < len(rows) * seq_len]
        assert np.fromfile(folder / f"{name}.docs.bin", "<u8").tolist() == kept and counts["documents"] == len(kept)
        assert counts["tokens"] == len(rows) * seq_len and counts["lost"] == total - counts["tokens"] and not counts["padding"]
        assert counts["dropped"] == sum(why and val == (name == "val") for _, val, why in shapes)
    assert {path.name.split(".", 1)[1] for path in folder.iterdir() if path.suffix != ".npz"} <= {"bin", "docs.bin"}


def test_a_text_file_is_one_document(prepare, tokenizer_file, tmp_path):
    text, tok = "\n\n first\r\n\n\nsecond \n", load_tokenizer(tokenizer_file)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert prepare(source="a.txt", seq_len=2)[0] == 0
    [(ids, mask)] = documents_of(tmp_path / "data")  # rows of 2 lose the EOS at most
    assert tok.decode(ids[1:-1] if ids[-1] == tok.eos_id else ids[1:]) == text


def test_meta(prepare, tokenizer_file, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"story": "word " * 50}, {"story": "  \n"}, {"story": "more words " * 20}])
    status, out, err = prepare(source="*.jsonl", template="Story:\\n{story}", bos=False)
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    content, tok = (tmp_path / "a.jsonl").read_bytes(), load_tokenizer(tokenizer_file)
    assert (status, err) == (0, "") and "«Story:\nword word" in out
    assert meta["source"] == [{"path": "a.jsonl", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
                               "records": 3}]
    assert meta["splits"]["train"]["dropped"] == 0  # the template makes the blank story a document
    assert meta["settings"]["template"] == "Story:\\n{story}" and meta["settings"]["source"] == ["*.jsonl"]
    assert (meta["format"], meta["kind"], meta["dtype"], meta["seq_len"]) == (1, "cpt", "uint16", 32)
    assert (meta["vocab_size"], meta["bos_id"], meta["eos_id"]) == (400, tok.bos_id, tok.eos_id)
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    assert set(meta["versions"]) == {"python", "numpy", "sentencepiece", "tiktoken", "tokenizers"}
    first = np.fromfile(tmp_path / "data/train.bin", "<u2").tolist()
    assert first[:50] == tok.encode("Story:\n" + "word " * 50, eos=True)[:50]


def test_large_vocabulary_takes_four_bytes(prepare, tmp_path, monkeypatch):
    """Ids above 65,535 survive; the vocabulary is a stub, since a real one of that size takes long to train."""
    class Wide:
        vocab_size, bos_id, eos_id, sha256, name = 70000, 69998, 69999, "0" * 64, "wide"
        adds_bos, notes, special_ids = True, [], {}
        decode = staticmethod(lambda ids: "".join(chr(i - 66000) for i in ids))

        @staticmethod
        def encode(text, bos=False, eos=False):
            return [69998] * bos + [66000 + ord(char) for char in text] + [69999] * eos
    monkeypatch.setattr("text.tokenizer.load_tokenizer", lambda path: Wide)
    (tmp_path / "a.txt").write_text("wide" * 20)
    assert prepare(source="a.txt")[0] == 0
    assert documents_of(tmp_path / "data")[0][0] == Wide.encode("wide" * 20, bos=True, eos=True)[:64]


# ---- the split

def sides_of(folder, tok):
    """The texts of the documents of each split, special tokens and padding left out."""
    texts = [[tok.decode([i for i in ids if i not in (tok.bos_id, tok.eos_id)]) for ids, _ in documents_of(folder, name)]
             for name in ("train", "val")]
    return [{text for text in side if text} for side in texts]


def test_split_is_stable_under_reordering(prepare, tokenizer_file, tmp_path):
    records, held = list(toy_math(300, 5)), []
    for order in (0, 1):
        random.Random(order).shuffle(records)
        write_jsonl(tmp_path / "a.jsonl", records[:100 + order])
        write_jsonl(tmp_path / "b.jsonl", records[100 + order:])
        status, out, err = prepare(source="b.jsonl,a.jsonl", val_fraction=0.2, anew=True, kind="ift", prompt_field="question",
                                   response_field="answer", seq_len=256)
        assert status == 0, err
        sides = sides_of(tmp_path / "data", load_tokenizer(tokenizer_file))
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300 and 30 < len(sides[1]) < 90
        held.append(sides[1])
    assert held[0] == held[1]


def test_one_prompt_never_stands_on_both_sides(prepare, tokenizer_file, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"question {i // 4}", "response": f"answer {i}"} for i in range(200)])
    assert prepare(source="a.jsonl", kind="ift", val_fraction=0.3)[0] == 0
    sides = [{text.split("answer")[0] for text in side} for side in sides_of(tmp_path / "data", load_tokenizer(tokenizer_file))]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 50


# ---- packing and masks

LENGTHS = st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60)))


@settings(max_examples=200, deadline=None)
@given(LENGTHS)
def test_packer(case):
    seq_len, lengths = case
    rows = pack_best_fit(lengths, seq_len)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    fill = sorted(sum(lengths[example] for example in row) for row in rows)
    assert all(used <= seq_len for used in fill)
    assert len(fill) < 2 or fill[0] + fill[1] > seq_len  # no two rows could be one
    assert rows == sorted(map(sorted, rows)) == pack_best_fit(list(lengths), seq_len)


def brute_best_fit(lengths, seq_len):
    """The definition of best-fit decreasing, with a search: the fill of each row."""
    fill = []
    for length in sorted(lengths, reverse=True):
        best = max((used for used in fill if used + length <= seq_len), default=None)
        if best is None:
            fill.append(length)
        else:
            fill[fill.index(best)] += length
    return sorted(fill)


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_packer_is_best_fit(case):
    seq_len, lengths = case
    rows = pack_best_fit(lengths, seq_len)
    assert sorted(sum(lengths[example] for example in row) for row in rows) == brute_best_fit(lengths, seq_len)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_masks_and_starts_agree(tmp_path_factory, data):
    """Rows written from random examples: each is found once at a start, with its own mask; the rest is padding."""
    seq_len, pad, folder = data.draw(st.integers(3, 30)), 7, tmp_path_factory.mktemp("rows")
    shape = st.integers(2, seq_len + 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))
    shapes = data.draw(st.lists(shape, min_size=1, max_size=30))
    shapes = [(n, min(n_prompt, seq_len - 1)) for n, n_prompt in shapes]
    job = SimpleNamespace(kind="ift", seq_len=seq_len, dtype=np.dtype("<u2"), pad=pad, no_wrap=False,
                          packing=data.draw(st.sampled_from(["best_fit", "none"])))
    examples = []
    for number, (n, n_prompt) in enumerate(shapes):
        examples.append(([100 + number] * min(n, seq_len), ([0] * n_prompt + [1] * n)[:min(n, seq_len)]))
    table, count = write_shards(folder, [{"ids": ids, "mask": mask, "lost": n - len(ids)}
                                         for (ids, mask), (n, _) in zip(examples, shapes)])
    counts = write_split("train", table, folder, count, folder, job)
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "splits": {"train": counts}}))
    found = documents_of(folder)
    padding = [(ids, mask) for ids, mask in found if ids[0] == pad]
    assert sorted(document for document in found if document[0][0] != pad) == sorted(examples)
    assert all(set(ids) == {pad} and not any(mask) for ids, mask in padding)
    ends = np.cumsum([len(ids) for ids, _ in found])
    assert {*range(seq_len, ends[-1] + 1, seq_len)} <= {*ends.tolist()}  # no document crosses a row
    assert counts["padding"] == sum(len(ids) for ids, _ in padding) and len(padding) <= counts["rows"]
    assert counts["targets"] == sum(sum(mask) for _, mask in examples) and counts["documents"] == len(examples)
    assert counts["truncated"] == sum(n > seq_len for n, _ in shapes)
    assert counts["lost"] == sum(max(0, n - seq_len) for n, _ in shapes)
    assert {path.name.split(".", 1)[1] for path in folder.iterdir()} == {"npz", "bin", "docs.bin", "mask.bin", "json"}


def test_ift_run_decodes_to_its_records(prepare, tokenizer_file, tmp_path):
    records = [{"question": f"{i}?", "answer": "yes " * (i % 12)} for i in range(40)]
    records.append({"question": "long " * 40, "answer": "x"})
    write_jsonl(tmp_path / "a.jsonl", records)
    knobs = {"source": "a.jsonl", "kind": "ift", "template": r"Q: {question}\nA:", "response_field": "answer"}
    status, out, err = prepare(**knobs, seq_len=40)
    assert status == 0, err
    tok, seen = load_tokenizer(tokenizer_file), []
    for ids, mask in documents_of(tmp_path / "data"):
        if ids[0] != tok.eos_id:  # not padding
            n_prompt = mask.index(1)
            assert mask == [0] * n_prompt + [1] * (len(ids) - n_prompt) and ids[0] == tok.bos_id
            assert ids[n_prompt:] == (tok.encode(tok.decode(ids[n_prompt:])) + [tok.eos_id])[:40 - n_prompt]
            seen.append((tok.decode(ids[1:n_prompt]), tok.decode(ids[n_prompt:])))
    kept = [(f"Q: {r['question']}\nA:", r["answer"]) for r in records if r["answer"] and "long" not in r["question"]]
    assert len(seen) == len(kept) and {prompt for prompt, _ in seen} == {prompt for prompt, _ in kept}
    assert all(answer.startswith(response) for (_, answer), (_, response) in zip(sorted(kept), sorted(seen)))
    stats = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert stats["dropped"] == 5 and stats["documents"] == 36
    assert re.search(r"\[<BOS>Q: 1\?\nA:\]« yes <EOS>»", out), out
    first = (tmp_path / "data/train.bin").read_bytes()
    assert prepare(**knobs, seq_len=40, anew=True, packing="none")[0] == 0
    assert len((tmp_path / "data/train.bin").read_bytes()) == 36 * 40 * 2 > len(first)


def test_response_prefix_stands_before_responses_only(prepare, tokenizer_file, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "response": "R"}, {"prompt": "Q", "response": ""}])
    assert prepare(source="a.jsonl", kind="ift", response_prefix=r"\t ", seq_len=16)[0] == 0
    tok = load_tokenizer(tokenizer_file)
    assert documents_of(tmp_path / "data")[0][0] == tok.encode("Q", bos=True) + tok.encode("\t R") + [tok.eos_id]
    assert json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]["dropped"] == 1


def test_no_target_at_the_start_of_an_example(tokenizer_file):
    """Without BOS an empty prompt would leave the first response token to be predicted from another example."""
    tok = load_tokenizer(tokenizer_file)
    encode = make_encoder(tok, "<u2")
    n = len(tok.encode("long word"))
    assert encode_turns(encode, [("", "long word")], 16)[1:] == (b"\0" + b"\1" * (n - 1), "")
    assert encode_turns(encode, [("", "long word")], 16, b"\1\0", b"\2\0")[1] == b"\0" + b"\1" * (n + 1)


# ---- mistakes

GOOD = b'{"text": "a good record with a few words in it, and then some more of them, to make a row of tokens"}\n'
CUT_SHORT = gzip.compress(GOOD + b"".join(b'{"text": "%d"}\n' % i for i in range(9)))[:-20]
BAD_RECORDS = {  # name: (file, content, the record, what the message says)
    "malformed": ("a.jsonl", GOOD + b'\n{"text": "x"\n', 3, "not JSON"),
    "null": ("a.jsonl", GOOD + b"null\n", 2, "expected a JSON object, found NoneType"),
    "no field": ("a.jsonl", GOOD + b'{"txt": "x"}\n', 2, "expected a field 'text', found only 'txt'"),
    "wrong type": ("a.jsonl", GOOD + b'{"text": ["x"]}\n', 2, "expected text in field 'text', found list"),
    "invalid UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', 2, "codec can't decode"),
    "half a surrogate pair": ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', 2, "surrogates not allowed"),
    "deep": ("a.jsonl", GOOD + b"[" * 100000 + b"\n", 2, "not JSON"),
    "wrong in a list": ("a.json", b"[" + GOOD + b", 5]", 2, "expected a JSON object, found int"),
    "invalid UTF-8 in a list": ("a.json", b"[" + GOOD + b', {"text": "\xff"}]', 1, "cannot be read from here on: 'utf-8' codec"),
    "list cut short": ("a.json", b"[" + GOOD + b', {"text": "x', 2, "cannot be read from here on: not JSON: Unterminated"),
    "gzip cut short": ("a.jsonl.gz", CUT_SHORT, None, "cannot be read from here on: Compressed file ended"),
    "not gzip": ("a.jsonl.gz", GOOD, None, "cannot be read from here on: Not a gzipped file"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record(prepare, tmp_path, name):
    file, content, number, message = BAD_RECORDS[name]
    (tmp_path / file).write_bytes(content)
    status, out, err = prepare(source=file, seq_len=16)
    assert status == 2 and err.count("\n") == 1 and err.startswith("prepare_data.py: error: ") and message in err, err
    assert re.search(rf": {file}:{number or '[0-9]+'}: ", err) and not (tmp_path / "data").exists()
    if number and number > 1:  # of a small file deflate may give back nothing at all, and a list is read in large pieces
        status, out, err = prepare(source=file, seq_len=16, on_bad_record="skip")
        assert status == 0 and "1 bad records skipped" in out and f"{file}:{number}: " in out, out + err
        assert json.loads((tmp_path / "data/meta.json").read_text())["skipped"] == 1


def test_gzip_cut_short_keeps_what_came_before_when_skipping(prepare, tmp_path):
    lines = [json.dumps({"text": hashlib.sha256(str(i).encode()).hexdigest()}).encode() + b"\n" for i in range(3000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines))[:-5000])
    status, out, err = prepare(source="a.jsonl.gz", on_bad_record="skip")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert status == 0 and meta["skipped"] == 1 and 2000 < meta["source"][0]["records"] < 3000


MISTAKES = {  # name: (knobs, what the message says)
    "no source": ({"source": ""}, "source: expected at least one file"),
    "missing file": ({"source": "b.txt"}, "source: expected a file"),
    "missing eval file": ({"source": "a.txt", "decontaminate": "b.csv"}, "decontaminate: expected a file"),
    "glob of nothing": ({"source": "a.txt,*.gz"}, "*.gz is not there"),
    "folder": ({"source": "sub"}, "holds no .py file"),
    "saved by datasets": ({"source": "saved"}, "write it with load_from_disk('saved').to_parquet("),
    "format": ({"source": "a.csv"}, "found a.csv"),
    "empty file": ({"source": "a.txt,empty.jsonl"}, "empty.jsonl:1: the file holds no records"),
    "empty text": ({"source": "empty.txt"}, "empty.txt:1: the file holds no records"),
    "blank text": ({"source": "blank.txt"}, "1 dropped"),
    "text not UTF-8": ({"source": "latin.txt"}, "latin.txt:1: 'utf-8' codec can't decode"),
    "too short": ({"source": "a.txt", "seq_len": 4096}, "no row of 4096"),
    "nothing for val": ({"source": "a.txt", "val_fraction": 0.0001}, "--val_fraction=0"),
    "all targets cut": ({"source": "ift.jsonl", "kind": "ift", "seq_len": 2}, "1 dropped"),
    "no response": ({"source": "a.jsonl", "kind": "ift", "prompt_field": "text"}, "1: expected a field 'response'"),
    "choice": ({"source": "a.txt", "kind": "sft"}, "'cpt', 'ift'"),
    "knob": ({"sauce": "a.txt"}, "source"),
    "seq_len": ({"source": "a.txt", "seq_len": 1}, "seq_len: expected 2 or more, found 1"),
    "fraction": ({"source": "a.txt", "val_fraction": 1.5}, "val_fraction: expected 0 <= fraction < 1, found 1.5"),
    "template": ({"source": "a.txt", "template": "{"}, "template: expected none, alpaca"),
    "no template": ({"source": "a.jsonl", "kind": "ift", "template": "", "val_fraction": 0.1}, "template: expected one; none at all"),
    "template field": ({"source": "a.jsonl", "template": "{question}"}, "a.jsonl:1: expected a field 'question'"),
    "tokenizer": ({"source": "a.txt", "tokenizer": "nowhere"}, "nowhere"),
    "no out_dir": ({"source": "a.txt", "out_dir": ""}, "out_dir: expected a folder's name"),
    "out_dir under a file": ({"source": "a.txt", "out_dir": "a.txt/data"}, "a.txt"),
    "out_dir is a file": ({"source": "a.txt", "out_dir": "a.txt"}, "out_dir: a.txt already exists"),
    "out_dir of others": ({"source": "a.txt", "out_dir": "sub"}, "out_dir: sub already exists; delete it or name another"),
    "work folder of others": ({"source": "a.txt", "out_dir": "other"}, "other.work is not of this script"),
    "BOS twice": ({"source": "a.txt", "double_bos": True, "bos": False}, "double_bos: expected kind=cpt with --bos=True"),
    "no wrapping of ift": ({"source": "ift.jsonl", "kind": "ift", "no_wrap": True}, "no_wrap: expected kind=cpt"),
    "responses of documents": ({"source": "a.jsonl", "response_field": "answer"}, "kind: expected ift, for response_field"),
    "masks of documents": ({"source": "a.txt", "packing": "paper"}, "kind: expected ift, for response_field"),
    "epochs of rows once": ({"source": "ift.jsonl", "kind": "ift", "paper_epochs": 2}, "paper_epochs: expected packing=paper"),
    "prompts from where": ({"source": "ift.jsonl", "kind": "ift", "train_on_prompt_from": 2}, "expected --train_on_prompt=True"),
    "response in the prompt": ({"source": "ift.jsonl", "kind": "ift", "template": "{prompt} {response}"},
                               "template: it holds {response}, the response_field"),
    "twice": ({"source": "a.txt,*.txt"}, "source: a.txt is named 2 times"),
    "packed": ({"source": "a.jsonl.zst"}, "found a.jsonl.zst; unpack it first"),
    "all are bad": ({"source": "a.jsonl", "text_field": "txt", "on_bad_record": "skip"},
                    "all records were skipped, first a.jsonl:1: expected a field 'txt'"),
    "no text for a row": ({"source": "a.txt", "seq_len": 4096}, "give more text or a smaller seq_len"),
    "prompts of documents": ({"source": "a.jsonl", "prompt_field": "question"}, "prompt_field: expected kind=ift"),
    "documents of prompts": ({"source": "ift.jsonl", "kind": "ift", "text_field": "prompt"}, "text_field: expected kind=cpt"),
    "prefix of messages": ({"source": "ift.jsonl", "kind": "ift", "template": "tulu", "response_prefix": "x"},
                           "response_prefix: expected none with --template=tulu"),
    "messages of prompts": ({"source": "ift.jsonl", "kind": "ift", "messages_field": "turns"}, "template: expected chat_template or tulu or llama2"),
    "turns of prompts": ({"source": "ift.jsonl", "kind": "ift", "train_on_turns": "all"}, "template: expected chat_template or tulu or llama2"),
    "prompt nowhere": ({"source": "ift.jsonl", "kind": "ift", "template": "{question}", "prompt_field": "q"},
                       "prompt_field: no {prompt} in template="),
    "a chat": ({"source": "chat.jsonl", "kind": "ift"}, "for the chat in 'messages' say --template=chat_template or tulu or llama2"),
    "no epochs": ({"source": "a.txt", "paper_epochs": 0}, "paper_epochs: expected 1 or more, found 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(prepare, tmp_path, name):
    knobs, message = MISTAKES[name]
    for file, content in {"a.txt": GOOD, "a.jsonl": GOOD, "a.csv": b"x", "empty.jsonl": b"", "empty.txt": b"",
                          "blank.txt": b" \n", "a.jsonl.zst": b"x", "chat.jsonl": b'{"messages": []}', "latin.txt": b"\xe9t\xe9",
                          "ift.jsonl": b'{"prompt": "p", "response": "r"}'}.items():
        (tmp_path / file).write_bytes(content)
    for folder in ("sub", "other.work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text("mine")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/data-00000-of-00001.arrow").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = prepare(**{"seq_len": 16, **knobs})
    assert status == 2 and err.count("\n") == 1 and err.startswith("prepare_data.py: error: ") and message in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_as_a_user_runs_it(tokenizer_file, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n")
    done = run_stage(ROOT / "prepare_data.py", "--source=a.jsonl", f"--tokenizer={tokenizer_file}", "--out_dir=d",
                     cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("prepare_data.py: error: a.jsonl:2: not JSON"), done.stderr
    assert done.stderr.count("\n") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_full_disk(tokenizer_file, tmp_path):
    """A limit on the size of files fails a write as a full disk does."""
    (tmp_path / "a.txt").write_text("some words " * 20000)
    limited = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
               "sys.argv[0] = 'prepare_data.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    done = run_warm("-c", limited, ROOT / "prepare_data.py", "--source=a.txt", f"--tokenizer={tokenizer_file}",
                    "--out_dir=d", "--val_fraction=0", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large: 'd.work/new'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# ---- the folder

def test_data_that_is_there_stays(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("first words " * 30)
    (tmp_path / "data").mkdir()  # an empty folder is no data
    assert prepare(source="a.txt")[0] == 0
    first = (tmp_path / "data/train.bin").read_bytes()
    status, out, err = prepare(source="a.txt")
    assert status == 2 and "data already exists; delete it or name another" in err
    assert (tmp_path / "data/train.bin").read_bytes() == first
    assert prepare(source="a.txt", anew=True)[0] == 0
    assert (tmp_path / "data/train.bin").read_bytes() == first  # and it is deterministic
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data"]


def test_a_killed_run_heals(prepare, tmp_path):
    """What a kill can leave: half of the new files, half a block, blocks of another plan."""
    (tmp_path / "a.txt").write_text("some words " * 30)
    (tmp_path / "data.work/new").mkdir(parents=True)
    for name in ("plan.json", "new/train.stream", "000001.npz", "000002.npz.17.part"):
        (tmp_path / "data.work" / name).write_text("half")
    assert prepare(source="a.txt")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["meta.json", "train.bin", "train.docs.bin"]


def test_backslash_escapes():
    """Four of them, and all else stays: what a shell cannot type easily, and LaTeX in a template."""
    assert unescape(r"a\nb\tc\rd\\e") == "a\nb\tc\rd\\e"
    assert unescape(r"\\n \\\n") == "\\n \\\n"  # from left to right, each backslash once
    assert unescape("\\sqrt{2} \\x41 \\") == "\\sqrt{2} \\x41 \\"
    assert unescape("a\nb") == "a\nb" and unescape("") == ""


def test_templates():
    assert read_template(r"Q: {q}\n{{x}} {a}", "p") == ("Q: {q}\n{{x}} {a}", {"q": "q", "a": "a"})
    assert read_template("none", "p") == ("{prompt}", {"prompt": "p"}) and read_template("", "p") == ("", {})
    for wrong in ("no field", " ", "{}", "{0}", "{q.x}", "{q[0]}", "{q", "{q:d}", "alpacca"):
        with pytest.raises(ValueError, match="template: expected none, alpaca, magicoder, chat_template, tulu, llama2, or a text"):
            read_template(wrong, "p")
