"""prepare_data.py: the original tools' tokens, masks and rows that lose nothing, and errors in one line."""
import gzip
import hashlib
import io
import json
import random
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from conftest import ROOT, golden, need, run_here, run_stage
from prepare_data import DOCUMENT, Split, encode_turns, finish_cpt, finish_ift, make_encoder, pack_best_fit
from records import CHATS, read_template, toy_math, unescape
from tokenizer import load_tokenizer


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
    """Runs the stage inside this process, as `python prepare_data.py --knob=value ...` in an empty folder would;
    returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(**knobs):
        knobs = {"tokenizer": tokenizer_file, "out_dir": "data", "seq_len": 32, "val_fraction": 0, **knobs}
        done = run_here("prepare_data.py", *(f"--{name}={value}" for name, value in knobs.items()))
        return done.returncode, done.stdout, done.stderr
    return run


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def shard_of(documents, masks=(), lost=0):
    """What a block of such documents becomes."""
    rows = np.zeros(len(documents), DOCUMENT)
    rows["length"], rows["lost"] = [len(ids) for ids in documents], lost
    return {"documents": rows, "ids": np.concatenate([np.array(ids, "<u2") for ids in documents]),
            "mask": np.array([bit for mask in masks for bit in mask], np.uint8)}


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

def labels(tok, turns, seq_len, **options):
    """What golden/finetune_tokens.json stores for an example: validity, ids, labels. The label of the first token is the
    one that no loss ever sees."""
    ids, mask, dropped = encode_turns(make_encoder(tok, "<u2", True), turns, seq_len, b"\1\0", b"\2\0", **options)
    ids, mask = np.frombuffer(ids, "<u2")[:seq_len].tolist(), [*mask[:seq_len]]
    labels = [i if learned else -100 for i, learned in zip(ids, mask)]
    return {"valid": False} if dropped else {"valid": True, "length": len(ids), "input_ids": ids, "labels": labels}


def unseen(result):
    return {**result, "labels": [-100] + result["labels"][1:]} if result["valid"] else result


@pytest.mark.parametrize("seq_len", [64, 1024])
def test_pairs_equal_llm_foundry(seq_len):
    tok = load_tokenizer(need("data/llama2-tokenizer"))
    fixture = golden("finetune_tokens")
    assert len(fixture["pairs"]) == 30 and len(fixture["tricky_pairs"]) == 15
    spelt_out = []
    for pair in fixture["pairs"] + fixture["tricky_pairs"]:
        ours = labels(tok, [(pair["prompt"], pair["response"])], seq_len)
        if re.search("</?s>", pair["prompt"] + pair["response"]):
            # Hugging Face reads "<s>" and "</s>" in a text as ids 1 and 2; for us they are text, as for sentencepiece
            spelt_out.append((pair["prompt"], pair["response"]))
            assert ours["input_ids"] != pair[f"at_{seq_len}"]["input_ids"]
            assert ours["input_ids"].count(1) == 1 and ours["input_ids"].count(2) == 1 and ours["input_ids"][-1] == 2
        else:
            assert ours == pair[f"at_{seq_len}"], pair
    assert spelt_out == [("Q: 1+1?\nA:", " 2</s>"), ("Q", "ends with </s>"), ("Q", "</s>"), ("<s> doubled bos", "x"),
                         ("mid </s> text here", "and <s> there")]


def test_target_settings_equal_llm_foundry():
    tok, fixture = load_tokenizer(need("data/llama2-tokenizer")), golden("finetune_tokens")
    pairs = {pair["train_index"]: (pair["prompt"], pair["response"]) for pair in fixture["pairs"]}
    assert len(fixture["target_settings"]) == 16
    for case in fixture["target_settings"]:
        prompts = {"none": None, "all": 0}.get(case["target_prompts"], case["target_prompts"][len("length>="):])
        ours = labels(tok, [pairs[case["train_index"]]], case["max_seq_len"], learn_all=case["target_responses"] == "all",
                      prompt_from=None if prompts is None else int(prompts))
        assert ours == unseen(case["result"]), case["target_prompts"]


def test_chats_equal_llm_foundry():
    tok, fixture = load_tokenizer(need("data/llama2-tokenizer")), golden("finetune_tokens")
    assert len(fixture["chat"]) == 3
    for case in fixture["chat"]:
        turns = CHATS["llama2"]([(message["role"], message["content"]) for message in case["messages"]])
        for name, options in [("last", {}), ("all", {"learn_all": True}), ("prompts_all", {"learn_all": True, "prompt_from": 0})]:
            assert labels(tok, turns, 4096, bos_each=True, **options) == unseen(case[name]), (name, case["messages"])


def test_padded_rows_equal_llm_foundry(prepare, tmp_path):
    fixture = golden("finetune_tokens")
    pairs, compared = {pair["train_index"]: pair for pair in fixture["pairs"]}, 0
    for batch in fixture["padded_batches"]:
        if batch["padding_side"] == "right":
            write_jsonl(tmp_path / "a.jsonl", [pairs[index] for index in batch["train_indices"]])
            status, out, err = prepare(source="a.jsonl", kind="ift", tokenizer=need("data/llama2-tokenizer"), packing="none",
                                       seq_len=batch["max_seq_len"], overwrite=True)
            assert status == 0, err
            ids, mask = np.fromfile("data/train.bin", "<u2"), np.fromfile("data/train.mask.bin", np.uint8)
            rows = len(batch["train_indices"])
            assert ids.reshape(rows, -1).tolist() == batch["input_ids"]
            assert np.where(mask, ids.astype(int), -100).reshape(rows, -1).tolist() == batch["labels"]
            compared += 1
    assert compared == 2


def test_stream_equals_llm_foundry(prepare, tmp_path):
    """Every run of ConcatTokensDataset that a CPT stream can be: one BOS (the tokenizer's own), wrapped."""
    fixture, compared = golden("finetune_tokens")["cpt"], 0
    write_jsonl(tmp_path / "docs.jsonl", [{"text": text} for text in fixture["documents"]])
    for run in fixture["runs"]:
        if run["no_wrap"] or run["bos_tokens"]:
            continue
        status, out, err = prepare(source="docs.jsonl", tokenizer=need("data/llama2-tokenizer"), overwrite=True,
                                   seq_len=run["max_length"], add_eos=bool(run["eos_tokens"]))
        assert status == 0, err
        rows = np.fromfile("data/train.bin", "<u2").reshape(-1, run["max_length"]).tolist()
        assert len(rows) == run["num_samples"] and rows[:len(run["samples"])] == run["samples"]
        compared += 1
    assert compared == 4


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


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.lists(st.integers(1, 15), min_size=1, max_size=20))
def test_stream_and_its_starts(tmp_path_factory, seq_len, lengths):
    """The stream is cut to whole rows, and exactly the documents that begin before the cut are listed."""
    folder = tmp_path_factory.mktemp("stream")
    split, stream, starts = Split(folder, "train", np.dtype("<u2"), False), [], []
    for number, length in enumerate(lengths):
        starts.append(len(stream))
        stream += [number] * length
        split.add(shard_of([[number] * length]), np.ones(1, bool))
    split.close()
    counts, kept = finish_cpt(split, seq_len), len(stream) // seq_len * seq_len
    assert np.fromfile(folder / "train.bin", "<u2").tolist() == stream[:kept] and counts["lost"] == len(stream) - kept
    assert np.fromfile(folder / "train.docs.bin", "<u8").tolist() == [start for start in starts if start < kept]


def test_a_text_file_is_one_document(prepare, tokenizer_file, tmp_path):
    text, tok = "\n\n first\r\n\n\nsecond \n", load_tokenizer(tokenizer_file)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert prepare(source="a.txt", seq_len=2)[0] == 0
    [(ids, mask)] = documents_of(tmp_path / "data")  # rows of 2 lose the EOS at most
    assert tok.decode(ids[1:-1] if ids[-1] == tok.eos_id else ids[1:]) == text


def test_meta(prepare, tokenizer_file, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"story": "word " * 50}, {"story": "  \n"}, {"story": "more words " * 20}])
    write_jsonl(tmp_path / "held.jsonl", [{"story": "held out " * 40}])
    status, out, err = prepare(source="*a.jsonl", val_source="held.jsonl", template="Story:\\n{story}", add_bos=False)
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    content, tok = (tmp_path / "a.jsonl").read_bytes(), load_tokenizer(tokenizer_file)
    assert (status, err) == (0, "") and "«Story:\nword word" in out
    assert meta["source"][0] == {"path": "a.jsonl", "sha256": hashlib.sha256(content).hexdigest(),
                                 "bytes": len(content), "records": 3}
    assert meta["splits"]["train"]["dropped"] == 0  # the template makes the blank story a document
    assert meta["settings"]["template"] == "Story:\\n{story}" and meta["settings"]["val_source"] == ["held.jsonl"]
    assert (meta["format"], meta["kind"], meta["dtype"], meta["seq_len"]) == (1, "cpt", "uint16", 32)
    assert (meta["vocab_size"], meta["bos_id"], meta["eos_id"]) == (400, tok.bos_id, tok.eos_id)
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    assert set(meta["versions"]) == {"python", "numpy", "sentencepiece", "tiktoken"}
    held = np.fromfile(tmp_path / "data/val.bin", "<u2").tolist()
    assert held == tok.encode("Story:\n" + "held out " * 40, eos=True)[:len(held)] and len(held) % 32 == 0


def test_large_vocabulary_takes_four_bytes(prepare, tmp_path, monkeypatch):
    """Ids above 65,535 survive; the vocabulary is a stub, since a real one of that size takes long to train."""
    class Wide:
        vocab_size, bos_id, eos_id, sha256, name = 70000, 69998, 69999, "0" * 64, "wide"
        decode = staticmethod(lambda ids: "".join(chr(i - 66000) for i in ids))

        @staticmethod
        def encode(text, bos=False, eos=False):
            return [69998] * bos + [66000 + ord(char) for char in text] + [69999] * eos
    monkeypatch.setattr("tokenizer.load_tokenizer", lambda path: Wide)
    (tmp_path / "a.txt").write_text("wide" * 20)
    assert prepare(source="a.txt")[0] == 0
    assert documents_of(tmp_path / "data")[0][0] == Wide.encode("wide" * 20, bos=True, eos=True)[:64]


# ---- the split

def test_split_is_stable_under_reordering(prepare, tmp_path):
    records, held = list(toy_math(300, 5)), []
    knobs = {"kind": "ift", "prompt_field": "question", "response_field": "answer", "seq_len": 256}
    for order in (0, 1):
        random.Random(order).shuffle(records)
        write_jsonl(tmp_path / "a.jsonl", records[:100 + order])
        write_jsonl(tmp_path / "b.jsonl", records[100 + order:])
        status, out, err = prepare(source="b.jsonl,a.jsonl", val_fraction=0.2, keep_records=1, overwrite=1, **knobs)
        assert status == 0, err
        sides = [{line for line in open(f"data/{name}.jsonl")} for name in ("train", "val")]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300 and 30 < len(sides[1]) < 90
        held.append(sides[1])
    assert held[0] == held[1]


def test_one_prompt_never_stands_on_both_sides(prepare, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"question {i // 4}", "response": f"answer {i}"} for i in range(200)])
    assert prepare(source="a.jsonl", kind="ift", val_fraction=0.3, keep_records=True)[0] == 0
    sides = [{json.loads(line)["prompt"] for line in open(f"data/{name}.jsonl")} for name in ("train", "val")]
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
    packing = data.draw(st.sampled_from(["best_fit", "none"]))
    split, examples = Split(folder, "train", np.dtype("<u2"), True), []
    for number, (n, n_prompt) in enumerate(shapes):
        ids, mask = [100 + number] * min(n, seq_len), ([0] * n_prompt + [1] * n)[:min(n, seq_len)]
        split.add(shard_of([ids], [mask], lost=n - len(ids)), np.ones(1, bool))
        examples.append((ids, mask))
    split.close()
    rows = pack_best_fit(split.lengths(), seq_len) if packing == "best_fit" else [[i] for i in range(len(shapes))]
    counts = finish_ift(split, rows, seq_len, pad)
    (folder / "meta.json").write_text(json.dumps({"dtype": "uint16", "splits": {"train": {
        **counts}}}))
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
    assert not list(folder.glob("*stream*"))


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
    assert prepare(**knobs, seq_len=40, overwrite=True, packing="none")[0] == 0
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
    encode = make_encoder(tok, "<u2", True)
    n = len(tok.encode("long word"))
    assert encode_turns(encode, [("", "long word")], 16)[1:] == (b"\0" + b"\1" * (n - 1), "")
    assert encode_turns(encode, [("", "long word")], 16, b"\1\0", b"\2\0")[1] == b"\0" + b"\1" * (n + 1)


# ---- sources that need no file

def test_toy_math_is_right():
    records = list(toy_math(400, 3))
    assert records == list(toy_math(400, 3)) != list(toy_math(400, 4)) and records[:50] == list(toy_math(50, 3))
    steps = []
    for record in records:
        *lines, last = record["answer"].split("\n")
        values = [re.fullmatch(r".* <<([\d+*/-]+)=(\d+)>>(\d+) \w+\.", line).groups() for line in lines]
        assert all(eval(expression) == int(value) == int(shown) > 0 for expression, value, shown in values)
        assert last == f"#### {values[-1][2]}" and record["question"].endswith("?")
        assert re.findall(r"\d+", record["question"]) == [re.match(r"\d+", values[0][0])[0],
                                                          *(re.split(r"\D", value[0])[-1] for value in values)]
        steps.append(len(values))
    assert set(steps) == {1, 2, 3} and len({record["question"] for record in records}) > 390


def test_pystdlib_is_the_library():
    records = list(prepare_data.pystdlib())
    paths = [record["path"] for record in records]
    assert paths == sorted(paths) and {"json/decoder.py", "random.py"} <= {*paths}
    assert not [path for path in paths if re.search("(^|/)(tests?|site-packages)/", path)]
    assert sum(len(record["text"]) for record in records) > 3e6


def test_made_sources_run(prepare):
    status, out, err = prepare(source="toy_math", kind="ift", prompt_field="question", response_field="answer",
                               seq_len=300, toy_records=60, val_fraction=0.3)
    assert status == 0 and "toy_math: 60 records" in out, err
    assert prepare(source="pystdlib", max_records=3, overwrite=True)[0] == 0
    assert json.loads(open("data/meta.json").read())["source"][0]["records"] == 3


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
    "gzip cut short": ("a.jsonl.gz", CUT_SHORT, None, "cannot be read: Compressed file ended"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record(prepare, tmp_path, name):
    file, content, number, message = BAD_RECORDS[name]
    (tmp_path / file).write_bytes(content)
    status, out, err = prepare(source=file, seq_len=16)
    assert status == 2 and err.count("\n") == 1 and err.startswith("prepare_data.py: error: ") and message in err, err
    assert re.search(rf": {file}:{number or '[0-9]+'}: ", err) and not (tmp_path / "data").exists()
    if name != "gzip cut short":  # deflate may give back nothing at all of a small file
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
    "missing val file": ({"source": "a.txt", "val_source": "b.txt"}, "val_source: expected a file"),
    "missing eval file": ({"source": "a.txt", "decontaminate": "b.csv"}, "decontaminate: expected a file"),
    "glob of nothing": ({"source": "a.txt,*.gz"}, "*.gz is not there"),
    "folder": ({"source": "sub"}, "holds no .py file"),
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
    "template field": ({"source": "a.jsonl", "template": "{question}"}, "a.jsonl:1: expected a field 'question'"),
    "tokenizer": ({"source": "a.txt", "tokenizer": "nowhere"}, "nowhere"),
    "no out_dir": ({"source": "a.txt", "out_dir": ""}, "out_dir: expected a folder's name"),
    "out_dir under a file": ({"source": "a.txt", "out_dir": "a.txt/data"}, "a.txt"),
    "out_dir is a file": ({"source": "a.txt", "out_dir": "a.txt", "overwrite": True}, "a.txt"),
    "out_dir of others": ({"source": "a.txt", "out_dir": "sub", "overwrite": True}, "holds mine.txt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(prepare, tmp_path, name):
    knobs, message = MISTAKES[name]
    for file, content in {"a.txt": GOOD, "a.jsonl": GOOD, "a.csv": b"x", "empty.jsonl": b"", "empty.txt": b"",
                          "blank.txt": b" \n", "latin.txt": b"\xe9t\xe9",
                          "ift.jsonl": b'{"prompt": "p", "response": "r"}'}.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine.txt").write_text("mine")
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
    """A limit on the size of files fails a write as a full disk does; the data that was there stays."""
    (tmp_path / "a.txt").write_text("some words " * 20000)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/meta.json").write_text("what was there")
    limited = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
               "sys.argv[0] = 'prepare_data.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    done = run_stage("-c", limited, ROOT / "prepare_data.py", "--source=a.txt", f"--tokenizer={tokenizer_file}",
                     "--out_dir=d", "--val_fraction=0", "--overwrite=True", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "File too large: 'd.tmp'" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "d"]
    assert (tmp_path / "d/meta.json").read_text() == "what was there"


# ---- the folder

def test_overwrite(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("first words " * 30)
    assert prepare(source="a.txt")[0] == 0
    first = (tmp_path / "data/train.bin").read_bytes()
    assert prepare(source="a.txt", overwrite=True)[0] == 0
    assert (tmp_path / "data/train.bin").read_bytes() == first  # and it is deterministic
    (tmp_path / "a.txt").write_text("second words " * 30)
    status, out, err = prepare(source="a.txt")
    assert status == 2 and "--overwrite=True" in err and (tmp_path / "data/train.bin").read_bytes() == first
    assert prepare(source="a.txt", overwrite=True)[0] == 0
    assert (tmp_path / "data/train.bin").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data"]


def test_a_killed_run_heals(prepare, tmp_path):
    """What a kill can leave: a part of data.tmp, or data.old without data, between the two renames."""
    (tmp_path / "a.txt").write_text("some words " * 30)
    assert prepare(source="a.txt")[0] == 0
    (tmp_path / "data").rename(tmp_path / "data.old")
    (tmp_path / "data.tmp").mkdir()
    (tmp_path / "data.tmp/train.stream").write_text("half")
    assert "is there already" in prepare(source="a.txt")[2] and (tmp_path / "data/meta.json").exists()
    assert prepare(source="a.txt", overwrite=True)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data"]


def test_templates():
    assert unescape(r"a\nb\tc\\nd") == "a\nb\tc\\nd" and unescape("a\nb") == "a\nb"
    assert read_template(r"Q: {q}\n{{x}} {a}", "p") == ("Q: {q}\n{{x}} {a}", {"q": "q", "a": "a"})
    assert read_template("none", "p") == ("{prompt}", {"prompt": "p"})
    for wrong in ("no field", "", "{}", "{0}", "{q.x}", "{q[0]}", "{q", "{q:d}", "alpacca"):
        with pytest.raises(ValueError, match="template: expected none, alpaca, magicoder, tulu, llama2, or a text"):
            read_template(wrong, "p")
