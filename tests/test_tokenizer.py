"""Tokenizer: ids and text against the original tools, on real files (../shared) and on small ones made here."""
import base64
import json
import pickle
import random

import pytest
import sentencepiece
import tiktoken
from conftest import need, run_stage, whole_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode, generate_merges

from text.tokenizer import LLAMA3_SPECIAL, LLAMA3_WORDS, StreamDecoder, load_tokenizer, text_stopper

CHAR_OF_BYTE = bytes_to_unicode()  # how byte-level files spell their tokens

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog's owner says: \"that's it\"!",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(i, 'is', i * i)\n",
    "In 2024 there were 365 days; 2 + 2 = 4, 12.5% of 2024 is 253.  Natalia sold 48/2 = <<48/2=24>>24 clips in 2024.",
    "Größe, naïve café, señor; Ελλάδα; русский текст; 日本語の文; \U0001f600\U0001f680; e\u0301 \u00a0 ½ Ⅷ.",
] * 4
LETTERS = [*"ab tThe o1 2.,'!?\n\t\r▁séßЖ日½\u0301\u00a0\u3000\U0001f600\x04\x16\u017f", "'s", "  ", "▁▁", "\r\n",
           "2024"]
TEXTS = st.one_of(st.lists(st.sampled_from(LETTERS), max_size=20).map("".join),
                  st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
few = settings(max_examples=80, deadline=None, derandomize=True, database=None)

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA2_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(" ", 1, 0)])
LLAMA2_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def save(folder, model, pre_tokenizer=None, normalizer=None, decoder=None, special=()):
    """Writes tokenizer.json with the `tokenizers` package; returns its own tokenizer and ours."""
    theirs = Tokenizer(model)
    theirs.normalizer, theirs.decoder = normalizer, decoder or decoders.ByteLevel()
    if pre_tokenizer is not None:
        theirs.pre_tokenizer = pre_tokenizer
    theirs.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    folder.mkdir(exist_ok=True, parents=True)
    theirs.save(str(folder / "tokenizer.json"))
    return theirs, load_tokenizer(folder)


def assert_same(theirs, ours, text):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    # tokenizers 0.22 leaves special tokens out of a text; 0.23.3 keeps those that are normalized
    special = {i for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert ours.decode(ids) == theirs.decode([i for i in ids if i not in special])


def llama2_json(folder, model_file, **pre):
    """A Llama-2 tokenizer.model as transformers converts it to tokenizer.json (its own way there needs protobuf)."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocab, [(piece, 0.0 if i < 3 else sp.get_score(i)) for i, piece in enumerate(pieces)])
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    pre = pre or {"normalizer": LLAMA2_NORMALIZER}
    return save(folder, model, decoder=LLAMA2_DECODER, special=["<unk>", "<s>", "</s>"], **pre)


@pytest.fixture(scope="session")
def tiny_sp(tmp_path_factory):
    """A sentencepiece model like Llama-2's: BPE, byte fallback, digits apart, unk/bos/eos = 0/1/2."""
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), model_type="bpe", vocab_size=420, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, character_coverage=0.98,
        allow_whitespace_only_pieces=True, minloglevel=2)
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def tiny_bpe():
    """vocab and merges of a byte-level BPE that knows all bytes; ids in another order than the merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(trained.to_str())["model"]
    ids = list(range(len(model["vocab"])))
    random.Random(0).shuffle(ids)
    return dict(zip(model["vocab"], ids)), [tuple(pair) for pair in model["merges"]]


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory, tiny_bpe):
    """A file as Llama-3's tokenizer.model, with three words that no merges lead to, as the real one has some too."""
    vocab, merges = tiny_bpe
    tokens = [bytes([b]) for b in range(256)] + [_spelled(left + right) for left, right in merges]
    tokens += [b"!?!?!", "ЖЖЖ".encode(), b" ?a?a"]
    file = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(dict.fromkeys(tokens))))
    return file


def _spelled(token):
    byte_of_char = {char: b for b, char in CHAR_OF_BYTE.items()}
    return bytes(byte_of_char[char] for char in token)


@pytest.fixture(scope="session")
def kinds(tiny_sp, tiny_bpe, rank_file, tmp_path_factory):
    """One tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    byte_level = save(folder / "bytes", models.BPE(*tiny_bpe), GPT2_SPLIT, special=["<|a|>", "<|b|>"])[1]
    return {"sentencepiece": load_tokenizer(tiny_sp), "llama3": load_tokenizer(rank_file), "byte-level": byte_level,
            "llama2 json": llama2_json(folder / "llama2", tiny_sp)[1]}


@pytest.fixture(scope="session")
def bytes_as_ids(tiny_bpe):
    """A function (kind, text) -> ids, one for each byte."""
    def ids(kind, text):
        of_byte = {"llama3": lambda b: b, "byte-level": lambda b: tiny_bpe[0][CHAR_OF_BYTE[b]]}
        return [of_byte.get(kind, lambda b: 3 + b)(b) for b in text.encode()]
    return ids


# ------------------------------------------------------------------ sentencepiece

def test_golden_llama2():
    tokenizer, data = load_tokenizer(need("data/llama2-tokenizer")), whole_golden("tokenizer")
    for item in data["strings"]:
        assert tokenizer.encode(item["text"]) == item["ids"], item["text"]
        assert tokenizer.decode(item["ids"]) == item["decoded"], item["text"]
    for item in data["decode_only"]:
        assert tokenizer.decode(item["ids"]) == item["decoded"], item["ids"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.sha256 == "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
    assert tokenizer.encode("Hello world", bos=True, eos=True) == [1, 15043, 3186, 2]


def test_golden_small_vocabulary():
    tokenizer = load_tokenizer(need("data/stories260k"))
    for item in whole_golden("tokenizer")["small_vocab"]["strings"]:
        assert tokenizer.encode(item["text"]) == item["ids"], item["text"]
        assert tokenizer.decode(item["ids"]) == item["decoded"], item["text"]


def test_sentencepiece_is_the_original(tiny_sp):
    ours, theirs = load_tokenizer(tiny_sp), sentencepiece.SentencePieceProcessor(model_file=str(tiny_sp))
    for text in [*CORPUS, "", " ", "  a", "<s></s><unk>", "日", "\U0001f600"]:
        assert ours.encode(text) == theirs.encode(text)
    assert 1 not in ours.encode("<s>") and 2 not in ours.encode("</s>")
    assert ours.special_ids == {"<s>": 1, "</s>": 2} and ours.silent == {1, 2}


def test_sentencepiece_without_bos_and_eos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=150,
        bos_id=-1, eos_id=-1, minloglevel=2)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None and tokenizer.eos_id is None
    with pytest.raises(ValueError, match="has no BOS id"):
        tokenizer.encode("a", bos=True)
    with pytest.raises(ValueError, match="has no EOS id"):
        tokenizer.encode("a", eos=True)


# ------------------------------------------------------------------ Llama-3's rank file

def test_llama3_special_table():
    """Ids as published with the model, whose file has 128,000 ranks."""
    assert len(LLAMA3_SPECIAL) == len(set(LLAMA3_SPECIAL)) == 256
    assert {name: 128000 + i for i, name in enumerate(LLAMA3_SPECIAL)}.items() >= {
        "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
        "<|python_tag|>": 128010, "<|reserved_special_token_245|>": 128255}.items()


def test_llama3_ranks_and_their_conversion(rank_file, tmp_path):
    """The rank file, the tokenizer.json that transformers makes of it, and both tools themselves: all the same."""
    ours = load_tokenizer(rank_file)
    lines = rank_file.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    original = tiktoken.Encoding("llama3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special)
    # transformers 4 and 5 name this differently, and pass over the other's name
    named = dict(additional_special_tokens=LLAMA3_SPECIAL, extra_special_tokens=LLAMA3_SPECIAL)
    theirs = TikTokenConverter(vocab_file=str(rank_file), **named).converted()
    theirs.save(str(tmp_path / "tokenizer.json"))
    converted = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(ranks) + 256, len(ranks), len(ranks) + 1)
    assert converted.vocab_size == ours.vocab_size and converted.special_ids == ours.special_ids == special

    @few
    @given(st.one_of(TEXTS, st.lists(st.sampled_from(["!?!?!", "ЖЖЖ", " ?a?a", " ", "a"]), max_size=4).map("".join)))
    def check(text):
        ids = original.encode(text, disallowed_special=())
        assert ours.encode(text) == converted.encode(text) == ids
        assert ours.decode(ids) == converted.decode(ids) == text
        assert_same(theirs, converted, text)

    check()
    assert ours.encode("!?!?!") == [ranks[b"!?!?!"]] and len(ours.encode("!?!?!?")) > 1
    text = "<|eot_id|><|begin_of_text|>"  # text, not special tokens
    assert ours.encode(text) == converted.encode(text) == original.encode(text, disallowed_special=())
    assert not set(special.values()) & set(ours.encode(text))
    assert ours.encode("a", bos=True, eos=True) == [len(ranks), ranks[b"a"], len(ranks) + 1]


# ------------------------------------------------------------------ tokenizer.json against the `tokenizers` package

@pytest.mark.parametrize("folder", ["smollm2-135m-instruct", "tinystories-656k"])
def test_real_tokenizer_json(folder):
    file = need(f"data/{folder}/tokenizer.json")
    ours, theirs, data = load_tokenizer(file), Tokenizer.from_file(str(file)), whole_golden("tokenizer")
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, theirs.get_vocab_size())
    for item in data["strings"] + data["small_vocab"]["strings"]:
        if not any(name in item["text"] for name in ours.special_ids):
            assert_same(theirs, ours, item["text"])
    few(given(TEXTS)(lambda text: assert_same(theirs, ours, text)))()
    for name, i in ours.special_ids.items():
        assert i not in ours.encode(name) and ours.decode([i]) == ""


def test_llama2_json_equals_sentencepiece(tmp_path):
    """Most Llama-2 folders hold both files; they must be one tokenizer."""
    theirs, ours = llama2_json(tmp_path, need("data/llama2-tokenizer/tokenizer.model"))
    data = whole_golden("tokenizer")
    for item in data["strings"]:
        assert ours.encode(item["text"]) == item["ids"], item["text"]
        assert ours.decode(item["ids"]) == item["decoded"], item["text"]
        if "huggingface_ids" not in item:
            assert theirs.encode(item["text"], add_special_tokens=False).ids == item["ids"]
    for item in data["decode_only"]:
        if 0 not in item["ids"]:  # <unk>, special there, is shown by sentencepiece
            assert ours.decode(item["ids"]) == item["decoded"], item["ids"]
    assert ours.vocab_size == 32000


@pytest.mark.parametrize("scheme", ["normalizer", "first", "always", "never"])
def test_llama2_json_of_a_small_model(tiny_sp, tmp_path, scheme):
    pre = {}
    if scheme != "normalizer":
        pre = {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)}
    theirs, ours = llama2_json(tmp_path, tiny_sp, **pre)
    original = load_tokenizer(tiny_sp)

    @few
    @given(TEXTS)
    def check(text):
        assert_same(theirs, ours, text)
        if scheme == "normalizer":
            assert ours.encode(text) == original.encode(text)

    @few
    @given(random_ids(ours))
    def check_decoding(ids):
        ids = [i for i in ids if i not in (0, 3 + ord(" "))]  # the file drops <unk> and a first blank spelled as a byte
        assert ours.decode(ids) == original.decode(ids)

    check()
    check_decoding()


def test_merges_that_spell_a_special_token(tmp_path):
    """Llama-2's tokenizer.json has them; a text must not become the end of itself."""
    tokens = ["<s", "<s>", *CHAR_OF_BYTE.values()]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [("<", "s"), ("<s", ">")])
    theirs, ours = save(tmp_path, model, NO_SPLIT, special=["<s>"])
    assert theirs.encode("a<s>").ids == [tokens.index("a"), 1]
    assert ours.encode("a<s>") == [tokens.index("a"), 0, tokens.index(">")] and ours.special_ids == {"<s>": 1}


def test_special_tokens_in_a_text_are_text(tiny_bpe, tmp_path):
    """With every model, also where a special token stands in the vocabulary and one word is the whole text."""
    vocab, merges = tiny_bpe
    letters = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -1.0) for letter in "</s>ab")]
    pieces = {"<unk>": 0, "<s>": 1, **{mark + letter: 2 * i + two for i, letter in enumerate("</s>ab", 1)
                                       for two, mark in enumerate(["", "##"])}}
    cases = {"BPE": (models.BPE({**vocab, "<s>": 900}, merges, ignore_merges=True), NO_SPLIT, None),
             "Unigram": (models.Unigram(letters, 0), None, decoders.Fuse()),
             "WordPiece": (models.WordPiece(pieces, unk_token="<unk>"), None, decoders.WordPiece())}
    for name, (model, split, decoder) in cases.items():
        _, ours = save(tmp_path / name, model, split, decoder=decoder, special=["<s>", "</s>"])
        assert set(ours.special_ids) == {"<s>", "</s>"}
        for text in ["<s>", "</s>", "a<s>b</s>", "<s><s>a"]:
            ids = ours.encode(text)
            assert ids and not set(ids) & ours.silent and ours.decode(ids).replace(" ", "") == text, (name, text)
        assert ours.decode([*ours.special_ids.values(), *ours.encode("a")]) == "a"


def test_added_tokens_that_are_not_special_are_one_id(tiny_bpe, tmp_path):
    theirs, _ = save(tmp_path, models.BPE(*tiny_bpe), GPT2_SPLIT, special=["<|end|>"])
    theirs.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    ids = ours.encode("a<think>b<|end|>")
    assert ids[:3] == [ours.encode("a")[0], theirs.token_to_id("<think>"), ours.encode("b")[0]]
    assert ours.special_ids == {"<|end|>": theirs.token_to_id("<|end|>")} and not set(ids) & ours.silent
    assert ours.decode(ids) == "a<think>b<|end|>" and ours.vocab_size == theirs.get_vocab_size()


def test_a_file_that_cuts_or_pads_texts_does_not(tiny_bpe, tmp_path):
    """As sentence models publish it; neither may a dropout make two runs differ."""
    theirs, plain = save(tmp_path, models.BPE(*tiny_bpe, dropout=0.9), GPT2_SPLIT)
    whole = load_tokenizer(tmp_path).encode("the dog " * 50)
    theirs.enable_truncation(8)
    theirs.enable_padding(length=999)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("the dog " * 50) == whole and 50 <= len(whole) < 400


def test_a_missing_token_for_the_unknown_is_an_error_that_names_the_file(tmp_path):
    theirs, ours = save(tmp_path, models.BPE({"a": 0}, [], unk_token="<unk>"), decoder=decoders.Fuse())
    with pytest.raises(Exception, match="<unk>"):
        theirs.encode("ab")
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: the tokenizers package cannot encode a text: .*<unk>"):
        ours.encode("ab")


def test_a_stray_byte_leaves_the_characters_around_it(kinds, bytes_as_ids):
    """In a run of byte tokens the tokenizers package alone makes U+FFFD of all."""
    ids = bytes_as_ids("llama2 json", "\u00e9\U0001f600x")
    for tokenizer in (kinds["llama2 json"], kinds["sentencepiece"]):
        assert tokenizer.decode(ids[:-2]) == "\u00e9\ufffd\ufffd\ufffd" and tokenizer.decode(ids) == "\u00e9\U0001f600x"


@pytest.mark.parametrize("kind", ["sentencepiece", "llama3", "byte-level", "llama2 json"])
def test_other_processes_have_the_same_tokenizer(kinds, kind):
    """Pickled, and after a fork without a word from the tokenizers package, which warns there of its threads."""
    ours = pickle.loads(pickle.dumps(kinds[kind]))
    assert ours.encode("a b 2024") == kinds[kind].encode("a b 2024") and ours.sha256 == kinds[kind].sha256
    code = ("import multiprocessing, sys; from text.tokenizer import load_tokenizer; tok = load_tokenizer(sys.argv[1])\n"
            "pool = multiprocessing.get_context('fork').Pool(2); tok.encode('a b')\n"
            "print(*pool.map(tok.encode, ['a b 2024'] * 9)[8])")
    done = run_stage("-c", code, kinds[kind].path)
    assert (done.stdout.split(), done.stderr) == ([str(i) for i in ours.encode("a b 2024")], "")


def test_ids_of_bos_and_eos(tiny_bpe, tmp_path):
    def load(**files):
        for name in ("tokenizer_config", "config", "generation_config"):
            (tmp_path / f"{name}.json").write_text(json.dumps(files.get(name, {})))
        tokenizer = load_tokenizer(tmp_path)
        return tokenizer.bos_id, tokenizer.eos_id

    _, ours = save(tmp_path, models.BPE(*tiny_bpe), GPT2_SPLIT, special=["<|a|>", "<|b|>"])
    a, b = ours.special_ids["<|a|>"], ours.special_ids["<|b|>"]
    assert (ours.bos_id, ours.eos_id) == (None, None)
    named = {"bos_token": "<|a|>", "eos_token": {"content": "<|b|>"}}
    assert load(tokenizer_config=named, config={"eos_token_id": a}) == (a, b)
    assert load(tokenizer_config={"bos_token": None}, config={"bos_token_id": b, "eos_token_id": [a, b]}) == (b, a)
    assert load(generation_config={"eos_token_id": b}) == (None, b)


# ------------------------------------------------------------------ all kinds

KINDS = ["sentencepiece", "llama3", "byte-level", "llama2 json"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_ids_are_those_of_the_text(kinds, kind):
    tokenizer = kinds[kind]
    counts = tokenizer.byte_counts()
    blank = sum(counts[i] for i in tokenizer.encode("a")) - 1  # sentencepiece's own
    assert len(counts) == tokenizer.vocab_size and blank == (kind in ("sentencepiece", "llama2 json"))
    for text in [*CORPUS, "日", "\U0001f600", " a", "a\n\n b"]:
        assert sum(counts[i] for i in tokenizer.encode(text)) == len(text.encode()) + blank
    assert all(counts[i] == 0 for i in tokenizer.special_ids.values())


def test_bytes_of_an_added_token_are_those_of_its_name(tiny_bpe, tmp_path):
    save(tmp_path, models.BPE(*tiny_bpe), GPT2_SPLIT)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    token = {"id": len(tiny_bpe[0]), "content": "<é>", "special": False, "normalized": False}
    spec["added_tokens"] = [{"single_word": False, "lstrip": False, "rstrip": False, **token}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<é>") == [tokenizer.encode("a")[0], token["id"]] and tokenizer.byte_counts()[token["id"]] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_long_runs(kinds, kind):
    """tiktoken's regex engine dies of a million blanks when they are given to it at once."""
    for text in ["a" * 10**6, " \n" * 600_000 + "x"]:
        ids = kinds[kind].encode(text)
        assert kinds[kind].decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_text_and_ids(kinds, kind):
    tokenizer = kinds[kind]
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(ValueError, match="token id -1 is below 0"):
        tokenizer.decode([0, -1])
    # what a model with padded rows can draw
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([10**12, ids[0], tokenizer.vocab_size, *ids[1:]]) == tokenizer.decode(ids)
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode(list(tokenizer.silent)) == ""
    assert f"{tokenizer.vocab_size:,} ids" in tokenizer.name
    cut = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"]
    assert len(cut) >= 128  # the bytes that are no character alone


def random_ids(tokenizer, max_size=40):
    """Lists of ids: any ones; or hard ones: blanks, single letters, parts of characters, and ids without text."""
    ids, silent = range(tokenizer.vocab_size), sorted(tokenizer.silent)[:3]
    hard = [i for i in ids if tokenizer.decode([i]) in ("", " ", "a", "\n")]
    hard += [i for char in "é\U0001f600" for i in tokenizer.encode(char)]
    return st.one_of(st.lists(st.sampled_from(ids), max_size=max_size),
                     st.lists(st.sampled_from([*hard, *silent]), max_size=max_size))


@pytest.mark.parametrize("kind", KINDS)
def test_text_stopper_equals_decoding_everything(kinds, kind):
    tokenizer = kinds[kind]

    @few
    @given(random_ids(tokenizer), st.integers(0, 40), st.integers(1, 8), st.sets(st.integers(0, 10), max_size=1))
    def check(ids, start, length, stop_ids):
        text = tokenizer.decode(ids)
        strings = [string for string in (text[start:start + length], "\n a") if string and "\ufffd" not in string]
        stop = text_stopper(tokenizer, strings, stop_ids)
        for n in range(len(ids) + 1):
            told, decoded = stop(ids[:n]), tokenizer.decode(ids[:n])
            assert told == (n > 0 and ids[n - 1] in stop_ids or any(string in decoded for string in strings))
            if told:
                return

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_stopper_with_one_byte_an_id(kinds, bytes_as_ids, kind):
    """A stop string over as many ids as it has bytes, perhaps with ids without text between them, after a long text."""
    tokenizer = kinds[kind]
    for string, silent in [(" é日\n", []), (" a z\n", sorted(tokenizer.silent)[:2] * 9)]:
        ids = bytes_as_ids(kind, "日" * 30) + [i for one in bytes_as_ids(kind, string) for i in [one, *silent]]
        stop, end = text_stopper(tokenizer, string), len(ids) - len(silent)
        assert tokenizer.decode(ids).endswith(string)
        assert [stop(ids[:n]) for n in range(end - 30, end + 1)] == [False] * 30 + [True]


def test_text_stopper_when_the_end_begins_with_a_blank(kinds):
    """Decoding ids from the middle of a text loses a blank there."""
    for kind in ("sentencepiece", "llama2 json"):
        blank = next(i for i in range(260, 420) if kinds[kind].decode([i, i]) == " ")
        a = kinds[kind].encode("日a")[-1]
        assert text_stopper(kinds[kind], " a")([a, a, a, blank, a])


def test_text_stopper_arguments(kinds):
    tokenizer = kinds["llama3"]
    ids = tokenizer.encode("one\ntwo")
    assert text_stopper(tokenizer, "\ntwo")(ids) and not text_stopper(tokenizer, "xo")(ids)
    stop = text_stopper(tokenizer, [], iter([tokenizer.eos_id, None]))  # None: a tokenizer without EOS
    assert not stop([5]) and stop([5, tokenizer.eos_id])
    assert not text_stopper(tokenizer, [], [tokenizer.eos_id])([])
    with pytest.raises(ValueError, match="empty stop string"):
        text_stopper(tokenizer, ["a", ""])


def test_text_stopper_decodes_only_the_end(kinds, monkeypatch):
    tokenizer, lengths = kinds["byte-level"], []
    stop = text_stopper(tokenizer, ["\nclass"])
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    assert not stop(tokenizer.encode("a b " * 1000))
    assert lengths and max(lengths) < 20


@pytest.mark.parametrize("kind", KINDS)
def test_stream_decoder_joins_to_the_whole(kinds, kind):
    tokenizer = kinds[kind]

    filler = tokenizer.encode("the dog " * 9)[:50]  # brings the stream near the length at which it forgets

    @few
    @given(TEXTS.filter(lambda text: not text.endswith("\ufffd")), st.integers(0, 50), random_ids(tokenizer))
    def check(prompt, fill, ids):
        prompt_ids, ids = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None), filler[:fill] + ids
        stream, before, shown = StreamDecoder(tokenizer, prompt_ids), len(tokenizer.decode(prompt_ids)), ""
        whole = tokenizer.decode(prompt_ids + ids)[before:]
        for n, i in enumerate(ids, 1):
            shown += stream.push(i)
            assert whole.startswith(shown)
            assert len(tokenizer.decode(prompt_ids + ids[:n])) - before - len(shown) <= 3
        assert shown + stream.finish() == whole

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_stream_decoder_at_the_length_at_which_it_forgets(kinds, bytes_as_ids, kind):
    for fill in range(50, 70):
        text, stream = "a" * fill + "\U0001f600a", StreamDecoder(kinds[kind])
        assert "".join(stream.push(i) for i in bytes_as_ids(kind, text)) == text
    for i in bytes_as_ids(kind, "a" * 1000):
        stream.push(i)
        assert len(stream.ids) < 80


def test_stream_decoder_of_plain_text(kinds):
    for tokenizer in kinds.values():
        text = "Größe 日本\U0001f600 is\n  it"
        ids = tokenizer.encode("Say: " + text)
        stream = StreamDecoder(tokenizer, ids[:2])
        parts = [stream.push(i) for i in ids[2:]]
        assert "".join(parts) + stream.finish() == ("Say: " + text)[len(tokenizer.decode(ids[:2])):]
        assert "\ufffd" not in "".join(parts) and len([part for part in parts if part]) > 8


# ------------------------------------------------------------------ files

def test_folder_and_file(tiny_sp, tmp_path):
    llama2_json(tmp_path, tiny_sp)
    assert load_tokenizer(tmp_path).name.startswith("BPE with byte fallback")
    (tmp_path / "tokenizer.model").write_bytes(tiny_sp.read_bytes())
    assert load_tokenizer(str(tmp_path)).name == "sentencepiece, 420 ids"
    assert load_tokenizer(tmp_path / "tokenizer.json").name.startswith("BPE with byte fallback")
    assert load_tokenizer(tmp_path).sha256 != load_tokenizer(tmp_path / "tokenizer.json").sha256


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json.*nothing; give --tokenizer=FILE"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds config.json"):
        load_tokenizer(tmp_path)


def test_damaged_model_files(tiny_sp, rank_file, tmp_path):
    file, whole, ranks = tmp_path / "tokenizer.model", tiny_sp.read_bytes(), rank_file.read_bytes()
    for data, message in [
        (b"", "0 bytes"),
        (b"garbage", "neither a sentencepiece model"),
        (whole[:-7], "neither a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (ranks + b"!? 7\n", "expected 'base64-token rank', found b'!\\? 7'"),
        (ranks.replace(b" 300\n", b" 299\n"), "rank 0, 1, 2"),
        (ranks[:ranks.index(b" 200\n")] + b" 200\n", "256 single bytes"),
        (b"{\"a\": ", "not valid JSON"),
    ]:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    lambda spec: spec.update(model=None),
    lambda spec: spec["model"].update(type="Markov"),
    lambda spec: spec["model"].update(merges=[["a", "nothere"]]),
    lambda spec: spec.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}),
    lambda spec: spec.update(decoder={"type": "Shuffle"}),
])
def test_unreadable_tokenizer_json(tiny_bpe, tmp_path, change):
    save(tmp_path, models.BPE(*tiny_bpe), GPT2_SPLIT)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="not readable by the tokenizers package 0") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_no_token_has(kinds, kind):
    """A model with padded rows can draw them: they have no text, and hide none."""
    tokenizer = kinds[kind]
    above = [tokenizer.vocab_size, tokenizer.vocab_size + 7]
    a, b = tokenizer.encode("a\n")[-1], tokenizer.encode("ab")[-1]
    assert tokenizer.decode(above) == "" and tokenizer.decode([b, *above, b]) == tokenizer.decode([b, b])
    stop = text_stopper(tokenizer, tokenizer.decode([b, a, b]))
    assert stop([b, *above * 9, a, *above * 9, b])
    stream = StreamDecoder(tokenizer, [*above, b])
    shown = "".join(stream.push(i) for i in [a, *above * 50, b])
    assert shown + stream.finish() == tokenizer.decode([b, a, b])[len(tokenizer.decode([b])):]
