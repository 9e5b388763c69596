"""
Tokenizer folders and forms of tokenizer.json drawn at random: ids and texts are those of transformers
and of the tokenizers package for the same files.
"""
import itertools
import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_tokenizer import LETTERS, save
from test_tokenizer_folders import SPECIAL, assert_same_ids, make_folder, only_4, saved_json
from test_tokenizer_folders import model_file, unigram_file, without_protobuf  # noqa: F401 (fixtures)
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from text.tokenizer import load_tokenizer

many = settings(max_examples=50, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
numbers = itertools.count()  # a new folder for each example

# ------------------------------------------------------------------ tokenizer.model, and files beside it
ENDS = ["</s>", "<|im_end|>", "<|eot|>", "[PAD]", "<s>"]
SWITCH = st.sampled_from([True, False])


@st.composite
def special_token(draw):
    """A name, or the object that transformers writes for it."""
    name = draw(st.sampled_from(ENDS))
    return draw(st.sampled_from([name, {"__type": "AddedToken", "content": name, **SPECIAL}]))


@st.composite
def named_tokens(draw):
    """{"eos_token": ..., ...} of tokenizer_config.json or special_tokens_map.json."""
    named = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        if draw(SWITCH):
            named[key] = draw(special_token())
    if draw(SWITCH):
        names = draw(st.lists(st.sampled_from(["<|user|>", "<|im_start|>"]), unique=True))
        named["additional_special_tokens"] = names
    return named


@st.composite
def plain_tokens(draw):
    """Added tokens that are not special: [{"content": "<think>", ...}]."""
    names = draw(st.lists(st.sampled_from(["<think>", "<tool>", "the", "日本", "a b", "##"]), min_size=1, unique=True))
    tokens = []
    for name in names:
        switches = {key: draw(SWITCH) for key in ("normalized", "lstrip", "rstrip", "single_word")}
        tokens.append({"content": name, "special": False, **switches})
    return tokens


@st.composite
def settings_of_folders(draw, plain):
    """The JSON files of a folder beside its tokenizer.model."""
    config = {}
    for key in ("legacy", "add_bos_token"):
        if draw(SWITCH):
            config[key] = draw(SWITCH)
    if draw(SWITCH):
        config["tokenizer_class"] = "LlamaTokenizer"
    named = draw(named_tokens())
    tokens = draw(plain) if plain is not None else []
    if draw(SWITCH):
        # older: the names in one file, the ids in another
        added = {token["content"]: 360 + i for i, token in enumerate(tokens)}
        return {"tokenizer_config": config, "special_tokens_map": named, "added_tokens": added}
    config |= named
    if tokens:
        config["added_tokens_decoder"] = {str(360 + i): token for i, token in enumerate(tokens)}
    return {"tokenizer_config": config}


def compare_folder(folder, model_file, spec, files):
    folder = make_folder(folder, model_file, spec, **files)
    assert_same_ids(AutoTokenizer.from_pretrained(folder), load_tokenizer(folder))


@only_4
@many
@given(files=settings_of_folders(None), unigram=SWITCH, saved=SWITCH)
def test_folders_that_name_special_tokens(model_file, unigram_file, tmp_path, files, unigram, saved):  # noqa: F811
    folder = tmp_path / str(next(numbers))
    file = unigram_file if unigram else model_file
    spec = saved_json(folder, file) if saved else None
    compare_folder(folder / "all", file, spec, files)


@only_4
@many
@given(files=settings_of_folders(plain_tokens()), unigram=SWITCH)
def test_folders_with_added_tokens_that_are_not_special(model_file, unigram_file, tmp_path, files, unigram):  # noqa: F811
    compare_folder(tmp_path / str(next(numbers)), unigram_file if unigram else model_file, None, files)


# ------------------------------------------------------------------ tokenizer.json
PIECES = ["▁", "a", "b", "t", "h", "e", "o", "1", "2", ".", ",", "'", "s", "é", "th", "▁a", "▁th", "the", "##b", "##e"]


def byte_bpe(draw):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("b", "b")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    return models.BPE(vocab, merges, ignore_merges=draw(SWITCH))


def character_bpe(draw):
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    merges = [("t", "h"), ("▁", "a"), ("▁", "th"), ("th", "e")]
    return models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>",
                      fuse_unk=draw(SWITCH), byte_fallback=draw(SWITCH))


def unigram(draw):
    pieces = [("<unk>", 0.0), *((piece, -1.0 - i / 8) for i, piece in enumerate(PIECES))]
    if draw(SWITCH):
        pieces += [(f"<0x{b:02X}>", -9.0) for b in range(256)]
    return models.Unigram(pieces, 0, byte_fallback=draw(SWITCH))


def word_piece(draw):
    return models.WordPiece({name: i for i, name in enumerate(["<unk>", *PIECES])}, unk_token="<unk>",
                            max_input_chars_per_word=draw(st.sampled_from([3, 100])))


def word_level(draw):
    return models.WordLevel({name: i for i, name in enumerate(["<unk>", *PIECES])}, unk_token="<unk>")


NORMALIZERS = [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents(),
               normalizers.Replace(" ", "▁"), normalizers.Prepend("▁"), normalizers.Strip(), normalizers.BertNormalizer(),
               normalizers.Replace(Regex(" {2,}"), " ")]
SPLITS = [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(add_prefix_space=True),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Metaspace(),
          pre_tokenizers.Metaspace(prepend_scheme="first", split=False), pre_tokenizers.Metaspace(prepend_scheme="never"),
          pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.BertPreTokenizer(),
          pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True),
          pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), pre_tokenizers.Split(" ", "merged_with_next"),
          pre_tokenizers.UnicodeScripts()]
DECODERS = [decoders.ByteLevel(), decoders.Metaspace(), decoders.Fuse(), decoders.WordPiece(), decoders.BPEDecoder(),
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                               decoders.Strip(" ", 1, 0)])]


@st.composite
def forms(draw):
    """What save() takes: a model, and what stands before and behind it."""
    model = draw(st.sampled_from([byte_bpe, character_bpe, unigram, word_piece, word_level]))(draw)
    before = draw(st.lists(st.sampled_from(NORMALIZERS), max_size=2))
    split = draw(st.lists(st.sampled_from(SPLITS), max_size=2))
    return {"model": model, "normalizer": normalizers.Sequence(before) if before else None,
            "pre_tokenizer": pre_tokenizers.Sequence(split) if split else None,
            "decoder": draw(st.sampled_from(DECODERS)), "special": draw(st.sampled_from([[], ["<s>"], ["<unk>", "<s>"]]))}


@settings(many, max_examples=150)
@given(form=forms(), plain=st.lists(st.sampled_from(["<think>", "the", "a b"]), unique=True), data=st.data())
def test_forms_of_tokenizer_json(tmp_path, form, plain, data):
    folder = tmp_path / str(next(numbers))
    theirs, _ = save(folder, **form)
    theirs.add_tokens([AddedToken(name, special=False, normalized=data.draw(SWITCH)) for name in plain])
    if "<s>" in form["special"]:
        theirs.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", theirs.token_to_id("<s>"))])
    theirs.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.special_ids == {name: theirs.token_to_id(name) for name in form["special"]}
    for _ in range(6):
        text = "".join(data.draw(st.lists(st.sampled_from([*LETTERS, *plain]), max_size=12)))
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
