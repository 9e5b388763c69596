"""
Tokenizer folders whose files add to or contradict each other: ids, BOS, EOS and the habit of a BOS
are those of transformers' AutoTokenizer for the same folder.

One deviation: the names of special tokens inside a text stay text.
"""
import importlib
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import transformers
from conftest import golden, need, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils import logging

from quickstart import toy_math
from model import LlamaConfig
from runtime import read_object
from text.encode import make_encoder
from text.tokenizer import load_tokenizer
from text.tokenizer_json import piece_types
from training.rows import check_ids, check_tokenizer, tokenizer_of

logging.set_verbosity_error()
only_4 = pytest.mark.skipif(transformers.__version__ >= "5", reason="the reference is transformers 4.57")
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

SPECIAL = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
LLAMA2 = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": None,
          "bos_token": {"__type": "AddedToken", "content": "<s>", **SPECIAL, "special": False},
          "eos_token": {"__type": "AddedToken", "content": "</s>", **SPECIAL, "special": False}}
LETTERS = [*"ab tThe o1 2.,'!?\n\t▁séЖ日\u0301\u00a0\U0001f600", "<think>", "<tool>", "  ", " once", "<|im_"]
TEXTS = st.lists(st.sampled_from(LETTERS), max_size=14).map("".join)
SENTENCES = ["Once upon a time", "", " ", "  a b", "\n a\n", "café 日本 \U0001f600", "a<think>b", "<think> a", " <think>",
             "a <think>  b", "x<|im_end", "ab\t\tc   d", "▁a ▁", "<think><think> c", "a\n<think>\nb ", "a<tool> b"]


def added(*tokens):
    """A tokenizer_config.json's added_tokens_decoder: of (id, content, what differs from special)."""
    return {str(i): {"content": content, **SPECIAL, **more} for i, content, more in tokens}


def chatml(first):
    """What ChatML finetunes of Llama-2 and TinyLlama have."""
    tokens = added((0, "<unk>", {}), (1, "<s>", {}), (2, "</s>", {}), (first, "<|im_end|>", {}),
                   (first + 1, "<|im_start|>", {}))
    return {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>",
            "added_tokens_decoder": tokens}


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """A tokenizer.model that takes texts as they are, as Llama-2's does (stories260k's does not)."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    corpus = ["Once upon a time the dog and the other dog ran to the tree.", "def add(a, b):\n    return a + b\n",
              "2 + 2 = 4 and café, 日本"] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(prefix), model_type="bpe", vocab_size=360, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        allow_whitespace_only_pieces=True, character_coverage=0.98)
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def unigram_file(tmp_path_factory):
    """The same of the other kind: each piece has the logarithm of a probability."""
    prefix = tmp_path_factory.mktemp("unigram") / "tokenizer"
    corpus = [record["question"] for record in toy_math(300, 0)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_prefix=str(prefix), model_type="unigram", vocab_size=360,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        minloglevel=2, allow_whitespace_only_pieces=True)
    return prefix.with_suffix(".model")


@pytest.fixture(autouse=True)
def without_protobuf(monkeypatch):
    """transformers converts a tokenizer.model by protobuf, which is not installed; here by sentencepiece."""
    if transformers.__version__ >= "5":
        return
    # transformers also exports a function of that name, which hides the module once it was used
    convert_slow_tokenizer = importlib.import_module("transformers.convert_slow_tokenizer")
    from transformers.models.llama.tokenization_llama import LlamaTokenizer

    def init(self, slow):
        self.original_tokenizer = slow
        sp = sentencepiece.SentencePieceProcessor(model_file=slow.vocab_file)
        types = [3 if sp.is_control(i) else 2 if sp.is_unknown(i) else 1 for i in range(sp.vocab_size())]
        pieces = [SimpleNamespace(piece=sp.id_to_piece(i), score=sp.get_score(i), type=types[i]) for i in range(len(types))]
        is_bpe = all(piece.score.is_integer() for piece in pieces)  # the others are logarithms
        self.proto = SimpleNamespace(pieces=pieces, trainer_spec=SimpleNamespace(model_type=2 if is_bpe else 1,
                                                                                 unk_piece="<unk>"))

    def load(self, from_slow=False):
        return sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)

    monkeypatch.setattr(convert_slow_tokenizer.SpmConverter, "__init__", init)
    monkeypatch.setattr(LlamaTokenizer, "get_spm_processor", load)


def make_folder(folder, model_file=None, spec=None, **files):
    """A folder with tokenizer.model, tokenizer.json (parsed) and other JSON files, and a config.json of a Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config": {"model_type": "llama"}, **files}
    if model_file:
        shutil.copy(model_file, folder / "tokenizer.model")
    if spec:
        files["tokenizer"] = spec
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def saved_json(folder, model_file, **files):
    """The tokenizer.json that transformers makes of a tokenizer.model, parsed."""
    tokenizer = AutoTokenizer.from_pretrained(make_folder(folder / "before", model_file, **files))
    tokenizer.save_pretrained(folder / "saved")
    return json.loads((folder / "saved/tokenizer.json").read_text())


def assert_same_ids(theirs, ours):
    """BOS, EOS, the habit of a BOS, the added tokens, and the ids of some texts."""
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.adds_bos == (theirs.encode("a")[:1] == [theirs.bos_token_id])
    assert ours.vocab_size == len(theirs)
    assert theirs.convert_tokens_to_ids(list(ours.special_ids)) == list(ours.special_ids.values())
    for text in SENTENCES:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def assert_as_auto_tokenizer(folder, texts=TEXTS):
    """Returns our tokenizer, compared with transformers'."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert_same_ids(theirs, ours)

    @few
    @given(texts)
    def check(text):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()
    # the deviation
    for name, i in ours.special_ids.items():
        assert i not in ours.encode(f"a {name} b")
    return ours


# ------------------------------------------------------------------ tokenizer.model and JSON files

THINK = {"special": False}
FOLDERS = {
    "nothing": {},
    "Llama-2's configuration": {"tokenizer_config": {**LLAMA2, "legacy": True}},
    "ChatML": {"tokenizer_config": chatml(360)},
    "ChatML in added_tokens.json": {
        "tokenizer_config": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
        "added_tokens": {"<|im_start|>": 361, "<|im_end|>": 360}},
    "special_tokens_map.json": {"added_tokens": {"<|im_end|>": 360}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
    "both, of which the list counts": {"tokenizer_config": {**chatml(360), "eos_token": "</s>"},
                                       "special_tokens_map": {"eos_token": "<|im_start|>"}},
    "an EOS that is only named": {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}},
    "a pad": {"tokenizer_config": {"pad_token": {"__type": "AddedToken", "content": "[PAD]", **SPECIAL}}},
    "no BOS": {"tokenizer_config": {"add_bos_token": False}},
    "a token that is not special": {"tokenizer_config": {"added_tokens_decoder": added((360, "<think>", THINK))}},
    "two": {"tokenizer_config": {"added_tokens_decoder": added((361, "<think>", THINK), (360, "<tool>", THINK))}},
    "one in added_tokens.json": {"added_tokens": {"<think>": 360, "<tool>": 361}},
    "ids with a gap": {"added_tokens": {"<|im_end|>": 365, "<think>": 370}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
    "matched after normalizing": {
        "tokenizer_config": {"added_tokens_decoder": added((360, "<think>", {**THINK, "normalized": True}))}},
    "with blanks around": {
        "tokenizer_config": {"added_tokens_decoder": added((360, "<think>", {**THINK, "lstrip": True, "rstrip": True}))}},
    "a single word": {"tokenizer_config": {"added_tokens_decoder": added((360, "<think>", {**THINK, "single_word": True}))}},
    "ChatML and one": {"tokenizer_config": {**chatml(360), "added_tokens_decoder": {
        **chatml(360)["added_tokens_decoder"], **added((362, "<think>", THINK))}}},
    "not legacy": {"tokenizer_config": {"legacy": False}},
    "not legacy, with a token": {"tokenizer_config": {"legacy": False, "added_tokens_decoder": added((360, "<think>", THINK))}},
    "no blank in front": {"tokenizer_config": {"add_prefix_space": False}},
    "no blank, not legacy": {"tokenizer_config": {"legacy": False, "add_prefix_space": False}},
    "a blank in front": {"tokenizer_config": {"add_prefix_space": True}},
    "a piece as EOS": {"tokenizer_config": {"eos_token": "▁the"}},
    "a piece as an added token": {"tokenizer_config": {"added_tokens_decoder": added((280, "the", THINK))}},
}


@only_4
@pytest.mark.parametrize("name", FOLDERS)
def test_tokenizer_model_and_json_files(model_file, tmp_path, name):
    ours = assert_as_auto_tokenizer(make_folder(tmp_path / "folder", model_file, **FOLDERS[name]))
    assert ours.notes == []


@only_4
@pytest.mark.parametrize("name", FOLDERS)
def test_unigram_tokenizer_model_and_json_files(unigram_file, tmp_path, name):
    """Alone, beside the tokenizer.json that transformers makes of the folder, and that alone."""
    files = FOLDERS[name]
    ours = assert_as_auto_tokenizer(make_folder(tmp_path / "folder", unigram_file, **files))
    assert ours.notes == [] and ("Unigram" in ours.name or "sentencepiece" in ours.name)
    spec = saved_json(tmp_path, unigram_file, **files)
    assert_as_auto_tokenizer(make_folder(tmp_path / "both", unigram_file, spec, **files))
    if "add_prefix_space" not in files.get("tokenizer_config", {}):
        assert_as_auto_tokenizer(make_folder(tmp_path / "alone", None, spec, **files))


@only_4
@pytest.mark.parametrize("name", FOLDERS)
def test_all_files(model_file, tmp_path, name):
    """The same with the tokenizer.json that transformers saved of a bare tokenizer.model, and of the folder."""
    files = FOLDERS[name]
    bare = saved_json(tmp_path / "bare", model_file)
    whole = saved_json(tmp_path / "whole", model_file, **files)
    for number, spec in enumerate((bare, whole)):
        assert_as_auto_tokenizer(make_folder(tmp_path / str(number), model_file, spec, **files))
        if "add_prefix_space" not in files.get("tokenizer_config", {}):
            assert_as_auto_tokenizer(make_folder(tmp_path / f"{number} alone", None, spec, **files))


# ------------------------------------------------------------------ which file counts

@only_4
def test_files_that_agree_are_read_by_sentencepiece(tmp_path):
    """Llama-2's own folder: the ids, the hash and the speed of tokenizer.model."""
    model_file = need("data/llama2-tokenizer/tokenizer.model")
    spec = saved_json(tmp_path, model_file)
    folder = make_folder(tmp_path / "llama2", model_file, spec, tokenizer_config=LLAMA2,
                         generation_config={"bos_token_id": 1, "eos_token_id": 2})
    ours = assert_as_auto_tokenizer(folder)
    assert ours.name == "sentencepiece, 32,000 ids" and ours.notes == [] and ours.stop_ids == {2}
    assert ours.sha256 == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert load_tokenizer(folder / "tokenizer.json").sha256 in ours.same_sha256
    for item in golden("tokenizer")["strings"]:
        assert ours.encode(item["text"]) == item["ids"], item["text"]
    # ChatML adds special tokens only
    chat = assert_as_auto_tokenizer(make_folder(tmp_path / "chat", model_file, spec, tokenizer_config=chatml(32000)))
    assert (chat.name, chat.sha256, chat.eos_id) == ("sentencepiece, 32,002 ids", ours.sha256, 32000)


@only_4
def test_files_that_disagree(model_file, tmp_path):
    spec = saved_json(tmp_path, model_file)
    for change in (lambda spec: spec["model"]["merges"].reverse(),
                   lambda spec: spec["model"]["merges"].pop(0),
                   lambda spec: spec.update(normalizer=None),
                   lambda spec: spec["added_tokens"].append({"id": 360, "content": "<think>", **SPECIAL, "special": False})):
        changed = json.loads(json.dumps(spec))
        change(changed)
        folder = make_folder(tmp_path / "both", model_file, changed)
        ours = assert_as_auto_tokenizer(folder)
        assert ours.notes == [f"{folder}: tokenizer.json counts, as in transformers, not tokenizer.model, which says "
                              "otherwise"]
        assert ours.same_sha256 == {hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()}


@only_4
def test_stories260k_as_transformers_saves_it(tmp_path):
    """Its tokenizer.model drops blanks and the tokenizer.json does not: in a folder of both, the JSON counts."""
    model_file = need("data/stories260k/tokenizer.model")
    spec = saved_json(tmp_path, model_file)
    ours = assert_as_auto_tokenizer(make_folder(tmp_path / "both", model_file, spec))
    assert len(ours.notes) == 1 and len(ours.encode("  a")) == 2 + len(ours.encode("a"))
    alone = load_tokenizer(make_folder(tmp_path / "alone", model_file))
    assert alone.encode("  a") == alone.encode("a") and alone.notes == []


def test_the_tokenizer_s_eos_against_the_model_s(model_file, tmp_path):
    def load(**files):
        folder = make_folder(tmp_path / "folder", model_file, **files)
        tokenizer = load_tokenizer(folder)
        for name in files:
            (folder / f"{name}.json").unlink()
        return tokenizer.eos_id, tokenizer.stop_ids, len(tokenizer.notes)

    chat = chatml(360)
    assert load(tokenizer_config=chat) == (360, {360}, 0)
    assert load(tokenizer_config=chat, config={"model_type": "llama", "eos_token_id": 2}) == (360, {2, 360}, 1)
    assert load(tokenizer_config=chat, generation_config={"eos_token_id": [2, 360]},
                config={"eos_token_id": 7}) == (360, {2, 360}, 0)
    assert load(generation_config={"eos_token_id": [5, 6]}) == (2, {2, 5, 6}, 1)
    assert load(generation_config={"eos_token_id": None}, config={"eos_token_id": [2, 9]}) == (2, {2, 9}, 0)
    for wrong in ("</s>", [2, "x"], True, 2.0, {}, -1, [2, -10 ** 30]):
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id: expected an id or a list of ids"):
            load(generation_config={"eos_token_id": wrong})


def test_real_folders_have_their_habits():
    habits = {"stories260k": True, "smollm2-135m-instruct": False, "tinystories-656k": True, "llama2-tokenizer": True}
    for folder, adds_bos in habits.items():
        assert load_tokenizer(need(f"data/{folder}")).adds_bos is adds_bos, folder


def test_piece_types(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 9), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=290, byte_fallback=True, user_defined_symbols=["<tool>", "x" * 200], control_symbols=["<c>"],
        hard_vocab_limit=False, minloglevel=2)
    data = (tmp_path / "tokenizer.model").read_bytes()
    types, sp = piece_types(data), sentencepiece.SentencePieceProcessor(model_proto=data)
    assert len(types) == sp.vocab_size()
    for i, kind in enumerate(types):
        known = {2: sp.is_unknown(i), 3: sp.is_control(i), 5: sp.is_unused(i), 6: sp.is_byte(i),
                 4: sp.id_to_piece(i) in ("<tool>", "x" * 200)}
        assert known.get(kind, not any(known.values())), (i, sp.id_to_piece(i), kind)


# ------------------------------------------------------------------ other forms of tokenizer.json

def save(folder, tool, **files):
    spec = json.loads(tool.to_str())
    return make_folder(folder, None, spec, **{"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}, **files})


def bytes_bpe(pre_tokenizer, merges=(("h", "e"), ("Ġ", "t"), ("Ġt", "he"))):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tool = Tokenizer(models.BPE(vocab, list(merges)))
    tool.pre_tokenizer, tool.decoder = pre_tokenizer, decoders.ByteLevel()
    tool.add_special_tokens([AddedToken("<|bos|>", special=True, normalized=False)])
    tool.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tool


def test_byte_level_without_regex(tmp_path):
    tool = bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    assert_as_auto_tokenizer(save(tmp_path / "folder", tool))


@only_4  # 5.24 goes by the file alone
@pytest.mark.parametrize("config", [{}, {"add_prefix_space": True}, {"add_prefix_space": False}, {"add_prefix_space": None}])
@pytest.mark.parametrize("prefix", [True, False])
def test_the_blank_in_front_of_byte_level(tmp_path, config, prefix):
    tool = bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=prefix))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    assert_as_auto_tokenizer(save(tmp_path / "folder", tool, tokenizer_config=config))


def test_a_chain_of_splits(tmp_path):
    """As deepseek-llm's."""
    def split(pattern):
        from tokenizers import Regex
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    chain = pre_tokenizers.Sequence([
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert_as_auto_tokenizer(save(tmp_path / "folder", bytes_bpe(chain)))


def test_characters_with_byte_fallback(tmp_path):
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdehint", "▁a", "th"]
    tool = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a"), ("t", "h")], unk_token="<unk>",
                                fuse_unk=True, byte_fallback=True))
    tool.normalizer = normalizers.Replace(" ", "▁")
    tool.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert_as_auto_tokenizer(save(tmp_path / "folder", tool))


# ------------------------------------------------------------------ data and training

def prepare(folder, tokenizer, **knobs):
    (folder / "a.jsonl").write_text('{"prompt": "a<think>", "response": "b the dog"}\n' * 40)
    knobs = {"kind": "ift", "source": folder / "a.jsonl", "val_fraction": 0, "seq_len": 64, "workers": 1, **knobs}
    out = folder / f"data{len(list(folder.glob('data*')))}"
    done = run_here("prepare_data.py", f"--tokenizer={tokenizer}", f"--out_dir={out}",
                    *(f"--{knob}={value}" for knob, value in knobs.items()))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def check(folder, rows, vocab_size):
    """What train.py asks of data before it trains the model in a folder."""
    check_ids(rows, vocab_size, folder)
    check_tokenizer(folder, tokenizer_of(folder), rows.meta)


def rows_of(data):
    meta = json.loads((data / "meta.json").read_text())
    return SimpleNamespace(meta=meta, tokens=np.fromfile(data / "train.bin", meta["dtype"]))


def test_data_end_with_the_folder_s_eos(model_file, tmp_path):
    plain = make_folder(tmp_path / "plain", model_file)
    chat = make_folder(tmp_path / "chat", model_file, tokenizer_config=chatml(360), generation_config={"eos_token_id": 2})
    data, out = prepare(tmp_path, chat)
    rows = rows_of(data)
    assert 360 in rows.tokens and 2 not in rows.tokens and "EOS is id 360, the tokenizer's" in out
    check(chat, rows, 362)
    with pytest.raises(ValueError, match="EOS id 360; the EOS of .* is 2"):
        check(plain, rows, 362)
    # data made by tokenizer.model alone
    with pytest.raises(ValueError, match="EOS id 2; the EOS of .* is 360"):
        check(chat, rows_of(prepare(tmp_path, plain)[0]), 362)
    check(chat, rows_of(prepare(tmp_path, plain, add_eos=False)[0]), 362)


def test_data_of_another_vocabulary_are_refused(model_file, tmp_path):
    plain = make_folder(tmp_path / "plain", model_file)
    think = make_folder(tmp_path / "think", model_file, added_tokens={"<think>": 360})
    data = rows_of(prepare(tmp_path, think)[0])
    check(think, data, 361)
    with pytest.raises(ValueError, match="another tokenizer"):
        check(plain, data, 361)
    with pytest.raises(ValueError, match="another tokenizer"):
        check(think, rows_of(prepare(tmp_path, plain)[0]), 361)


def test_an_id_that_the_model_has_no_row_for(model_file, tmp_path):
    """An added pad: 361 ids over 360 rows; no text uses it."""
    pad = make_folder(tmp_path / "pad", model_file, tokenizer_config={"pad_token": "[PAD]"})
    rows = rows_of(prepare(tmp_path, pad)[0])
    assert rows.meta["vocab_size"] == 361
    check(pad, rows, 360)
    rows.tokens[5] = 360
    with pytest.raises(ValueError, match="data has token id 360, the model a vocabulary of 360"):
        check(pad, rows, 360)


def test_bos_is_the_tokenizer_s_habit(model_file, tmp_path):
    plain = make_folder(tmp_path / "plain", model_file)
    none = make_folder(tmp_path / "none", model_file, tokenizer_config={"add_bos_token": False})
    for folder, knob, wanted in [(plain, None, True), (none, None, False), (plain, False, False), (none, True, True)]:
        data, out = prepare(tmp_path, folder, bos=knob)
        rows = rows_of(data)
        assert (rows.tokens[0] == 1) == wanted and rows.meta["settings"]["bos"] is wanted
        assert f"documents begin {'with' if wanted else 'without'} BOS" in out


def test_a_folder_of_checkpoints(model_file, tmp_path):
    """What TRL's and transformers' trainers write into."""
    for step in (5, 10):
        make_folder(tmp_path / f"out/checkpoint-{step}", model_file)
    with pytest.raises(FileNotFoundError, match="but in checkpoint-10, checkpoint-5 below it; name one of these"):
        load_tokenizer(tmp_path / "out")
    for read in (LlamaConfig.from_json, lambda folder: read_object(folder / "config.json", "a hint")):
        with pytest.raises(FileNotFoundError, match="config.json: not found, but in checkpoint-10, checkpoint-5 below it; name one"):
            read(tmp_path / "out")


@only_4
def test_blocks_of_text_have_the_same_ids(model_file, tmp_path):
    """The words that prepare_data remembers are words of the folder's tokenizer."""
    for number, files in enumerate(FOLDERS.values()):
        folder = make_folder(tmp_path / str(number), model_file, **files)
        tokenizer = load_tokenizer(folder)
        encode = make_encoder(tokenizer, np.dtype("<u2"))
        for text in SENTENCES:
            assert np.frombuffer(encode(text), "<u2").tolist() == tokenizer.encode(text)
