"""
Text to token ids and back, with exactly the ids of the tool that the tokenizer file was made for.

    tokenizer = load_tokenizer("path/to/model-folder")
    ids = tokenizer.encode("Hello world", bos=True)     # Llama-2: [1, 15043, 3186]
    text = tokenizer.decode(ids)                        # "Hello world"

The content of the file decides which tool reads it:

    tokenizer.model of Llama-2   a protobuf                     sentencepiece
    tokenizer.model of Llama-3   lines of "base64-token rank"   tiktoken
    tokenizer.json               JSON                           tokenizers (Hugging Face)

A folder gives the ids, BOS and EOS that transformers 4.57's AutoTokenizer gives for it:

    tokenizer.json counts, not tokenizer.model; where they are the same, sentencepiece reads.
    tokenizer_config.json and its like add tokens, name BOS and EOS: see text/tokenizer_folder.py.
    tokenizer.model with added tokens that texts can hold becomes a tokenizer.json in memory.

Two deviations. Special tokens are ids, never text: "</s>" inside a text is four ordinary
characters, with every tool (by default Hugging Face makes it one id, so that a document can end
itself), and special ids decode to nothing. And a tokenizer.model alone is read by sentencepiece
with its own rules for blanks, which transformers' conversion forgets. Added tokens that are not
special, such as "<think>", are one id.
"""
import base64
import hashlib
import json
import re
from pathlib import Path

import sentencepiece
import tiktoken

from runtime import named_below
from text.tokenizer_folder import id_named, read_settings
from text.tokenizer_json import (complete_model, describes, kind_of, model_kind, open_spec,
                                 parse_spec, piece_types, spec_of_model)

# Llama-3's words and special tokens; its tokenizer.model holds neither
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+")
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]  # 256 in all

MAX_BLANKS = 100_000  # blanks in a row that tiktoken gets: its regex stack ends near 1,000,000


class Tokenizer:
    """
    What load_tokenizer returns.

    vocab_size   counts all ids, special ones too
    bos_id, eos_id   None where there is none
    adds_bos     whether the tokenizer by itself puts BOS in front of a text
    stop_ids     {id} that end a generated text: EOS, and those of generation_config.json
    special_ids  {name of a special token: its id}
    silent       the ids that decode to nothing
    strips       {id of a special token: (it takes the blanks before it, those behind it)}
    sha256       of the file, and of what else decides the ids of a text
    same_sha256  the sha256 of all files that give the same ids, {sha256}
    notes        lines that say which file counts where two disagree
    name         for printing
    """

    def __init__(self, tool, kind, ids, vocab_size, special_ids, silent):
        # tool: any object with encode(text) -> ids and decode(ids) -> text; ids: {name: id}
        self.tool = tool
        self.name = f"{kind}, {vocab_size:,} ids"
        self.ids = ids
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.silent = silent
        self.strips = {}
        self.bos_id = None
        self.eos_id = None
        self.first_id = None  # what the file itself puts in front of a text
        self.notes = []

    def encode(self, text, bos=False, eos=False):
        """
        The ids of a text, a list of int, with BOS in front and EOS behind if asked for.

        ValueError: half a surrogate pair in the text, or no such id as BOS or EOS.
        """
        if bos and self.bos_id is None:
            raise ValueError(f"this tokenizer has no BOS id ({self.name})")
        if eos and self.eos_id is None:
            raise ValueError(f"this tokenizer has no EOS id ({self.name})")
        text.encode()  # raises on half a surrogate pair, which each tool would treat differently
        ids = self.tool.encode(text)
        if bos:
            ids = [self.bos_id] + ids
        if eos:
            ids = ids + [self.eos_id]
        return ids

    def decode(self, ids):
        """
        The text of ids; bytes that are not UTF-8 become U+FFFD. Ids above the vocabulary, which a
        model with padded rows can draw, have no text.

        ValueError: an id below 0.
        """
        ids = [int(i) for i in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is below 0")
        return self.tool.decode([i for i in ids if i < self.vocab_size])

    def byte_counts(self):
        """[bytes that each id adds to a text in UTF-8]; 0 for those that decode to nothing."""
        return [0 if self.is_silent(i) else self.tool.bytes_of(i) for i in range(self.vocab_size)]

    def is_silent(self, token_id):
        """Whether an id decodes to nothing, wherever it stands."""
        return token_id in self.silent or token_id >= self.vocab_size

    def __reduce__(self):
        # pickled as the path: another process reads the file again
        return load_tokenizer, (self.path,)


def load_tokenizer(folder_or_file):
    """
    The Tokenizer of a folder or a file, with what the JSON files beside it add.

    FileNotFoundError: there is none. ValueError: it is damaged, or the tool cannot read it.
    """
    model_file, json_file = find_files(Path(folder_or_file))
    folder = (model_file or json_file).parent
    settings = read_settings(folder, model_file is not None)
    # as transformers: tokenizer.json counts, unless the blank before a text is configured
    if json_file and not (model_file and settings.passes_json_over):
        tokenizer = read_huggingface(json_file, model_file, settings)
    else:
        tokenizer = read_model(model_file, settings)
        if json_file:
            tokenizer.notes.append(f"{folder}: tokenizer.model counts, not tokenizer.json: "
                                   "tokenizer_config.json has add_prefix_space")
    name_special_ids(tokenizer, settings)
    tokenizer.path = str(folder_or_file)
    return tokenizer


def find_files(path):
    """(tokenizer.model or None, tokenizer.json or None) that a path names. FileNotFoundError."""
    # a file: its content tells which it is
    if path.is_file():
        if read_whole(path).startswith(b"{"):
            return None, path
        return path, None
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file; expected tokenizer.model, tokenizer.json "
                                "or their folder")
    # a folder
    model_file = path / "tokenizer.model"
    json_file = path / "tokenizer.json"
    if not model_file.is_file():
        model_file = None
    if not json_file.is_file():
        json_file = None
    if not (model_file or json_file):
        raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this folder, "
                                f"{what_is_held(path)}")
    return model_file, json_file


def what_is_held(folder):
    """The end of a message about a folder without a tokenizer."""
    below = named_below(folder, "tokenizer.*")
    if below:
        return below
    names = sorted(entry.name for entry in folder.iterdir())
    held = ", ".join(names[:8]) or "nothing"
    if len(names) > 8:
        held += ", ..."
    return f"which holds {held}; give --tokenizer=FILE"


def read_whole(path):
    """The bytes of a tokenizer file. ValueError: git-lfs left a pointer in its place."""
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: this is a git-lfs pointer and not the tokenizer; "
                         "run `git lfs pull` in its folder")
    return data


def name_special_ids(tokenizer, settings):
    """BOS, EOS and the ids that stop a text, by the files of the folder or the tokenizer's own."""
    tokenizer.bos_id = id_named(settings, "bos", tokenizer.ids, tokenizer.bos_id)
    tokenizer.eos_id = id_named(settings, "eos", tokenizer.ids, tokenizer.eos_id)
    # Llama's tokenizer has a switch for BOS, every other one a post-processor in its file
    if settings.add_bos is not None:
        tokenizer.adds_bos = bool(settings.add_bos)
    else:
        tokenizer.adds_bos = tokenizer.first_id == tokenizer.bos_id
    if tokenizer.bos_id is None:
        tokenizer.adds_bos = False

    # a model may end a text at more ids than the tokenizer names
    listed = settings.ids["eos"]
    tokenizer.stop_ids = set(listed)
    if tokenizer.eos_id is not None:
        tokenizer.stop_ids.add(tokenizer.eos_id)
    if listed and tokenizer.eos_id not in listed:
        tokenizer.notes.append(
            f"EOS is id {tokenizer.eos_id}, the tokenizer's, which counts in data; generation "
            f"stops there and at the model's eos_token_id {', '.join(map(str, listed))}")


def fingerprint(data, extra):
    """sha256 of a tokenizer file, and of what beside it decides the ids of a text, if anything."""
    digest = hashlib.sha256(data).hexdigest()
    if extra:
        digest = hashlib.sha256((digest + json.dumps(extra)).encode()).hexdigest()
    return digest


# ------------------------------------------------------------------ tokenizer.json

def read_huggingface(path, model_file, settings):
    """Of tokenizer.json; by sentencepiece, which is faster, where tokenizer.model says the same."""
    data = read_whole(path)
    spec, extra = parse_spec(path, data, settings)
    model = None
    is_form = False
    if model_file:
        model_data = model_file.read_bytes()
        model = open_sentencepiece(model_data)
    if model:
        is_form = describes(spec, model, piece_types(model_data))
    # opening hides the names of special tokens
    added = [dict(token) for token in spec["added_tokens"]]
    kind = kind_of(spec)
    tool = open_spec(path, spec)
    sha256 = fingerprint(data, extra)

    if is_form and same_ids(model, tool):
        tokenizer = by_sentencepiece(model, added)
        tokenizer.sha256 = fingerprint(model_data, extra)
    else:
        tokenizer = by_huggingface(tool, kind)
        tokenizer.sha256 = sha256
        if model_file:
            tokenizer.notes.append(f"{path.parent}: tokenizer.json counts, as in transformers, not "
                                   "tokenizer.model, which says otherwise")
    tokenizer.same_sha256 = {tokenizer.sha256, sha256}
    tokenizer.first_id = tool.first_id
    return tokenizer


def by_huggingface(tool, kind):
    """The Tokenizer of a HuggingFaceFile."""
    return Tokenizer(tool, kind, tool.ids, tool.size, tool.special_ids, tool.silent)


def same_ids(model, tool):
    """Whether two tools encode all pieces, next to each other, and blanks alike."""
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    probes = ["  a\n\n b\t日\U0001f600"]
    # a longer text takes either tool more than its share of time
    for start in range(0, len(pieces), 1000):
        probes.append(" ".join(pieces[start:start + 1000]))
    return all(model.encode(probe) == tool.encode(probe) for probe in probes)


# ------------------------------------------------------------------ tokenizer.model

def read_model(path, settings):
    """Of tokenizer.model, whichever tool made it."""
    data = read_whole(path)
    if data.startswith(b"{"):
        return read_huggingface(path, None, settings)
    extra = []
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        tokenizer = read_llama3(path, data)
    else:
        tokenizer, extra = read_sentencepiece(path, data, settings)
    tokenizer.sha256 = fingerprint(data, extra)
    tokenizer.same_sha256 = {tokenizer.sha256}
    return tokenizer


# ------------------------------------------------------------------ tokenizer.model of Llama-2

class SentencePieceModel:
    """A sentencepiece model; special ids added above its own have no text."""

    def __init__(self, model):
        self.model = model
        self.size = model.vocab_size()
        self.encode = model.encode

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < self.size])

    def bytes_of(self, i):
        if self.model.is_byte(i):
            return 1
        return len(self.model.id_to_piece(i).replace("▁", " ").encode())


def open_sentencepiece(data):
    """A sentencepiece model of a file's bytes, or None where it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data) if data else None
    except RuntimeError:
        return None


def read_sentencepiece(path, data, settings):
    """Returns the Tokenizer, and what the folder's files change in how a text is encoded."""
    model = open_sentencepiece(data)
    if model is None:
        raise ValueError(f"{path}: neither a sentencepiece model nor tiktoken ranks nor a "
                         f"tokenizer.json (cut short?): {len(data):,} bytes that begin with "
                         f"{data[:16]!r}")
    spec, extra = spec_of_model(model, piece_types(data), settings)
    if not extra:
        return by_sentencepiece(model, spec["added_tokens"]), extra
    # tokens or blanks that sentencepiece does not know: the tokenizers package does
    try:
        complete_model(spec, model, model_kind(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kind = f"{kind_of(spec)} of tokenizer.model"
    tokenizer = by_huggingface(open_spec(path, spec), kind)
    own_ids(tokenizer, model)
    return tokenizer, extra


def by_sentencepiece(model, added):
    """The Tokenizer of a sentencepiece model and special tokens, as tokenizer.json lists them."""
    ids = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special_ids = {}
    for token in added:
        # unknown is no special token here: it stands for text
        if token["special"] and token["id"] != model.unk_id():
            special_ids[token["content"]] = token["id"]
    ids |= special_ids
    tokenizer = Tokenizer(SentencePieceModel(model), "sentencepiece", ids, max(ids.values()) + 1,
                          special_ids, set(special_ids.values()))
    tokenizer.strips = {token["id"]: (token["lstrip"], token["rstrip"]) for token in added}
    own_ids(tokenizer, model)
    return tokenizer


def own_ids(tokenizer, model):
    """BOS and EOS of a sentencepiece model, which says -1 where it has none."""
    if model.bos_id() >= 0:
        tokenizer.bos_id = model.bos_id()
    if model.eos_id() >= 0:
        tokenizer.eos_id = model.eos_id()


# ------------------------------------------------------------------ tokenizer.model of Llama-3

class Llama3Ranks:
    """{token as bytes: rank}: tiktoken cuts a text into words and runs BPE over their bytes."""

    def __init__(self, ranks):
        self.bpe = tiktoken.Encoding("Llama-3", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks,
                                     special_tokens={})
        self.bytes_of_id = {rank: token for token, rank in ranks.items()}

    def encode(self, text):
        if len(text) <= MAX_BLANKS:
            return self.bpe.encode_ordinary(text)
        # cut a long text, but only where MAX_BLANKS blanks stand together
        ids = []
        for part in re.split(rf"(\s{{{MAX_BLANKS}}})", text):
            ids += self.bpe.encode_ordinary(part)
        return ids

    def decode(self, ids):
        # special ids are not among the ranks
        return b"".join([self.bytes_of_id.get(i, b"") for i in ids]).decode("utf-8", "replace")

    def bytes_of(self, i):
        return len(self.bytes_of_id[i])


def read_llama3(path, data):
    # the file: one token and its rank a line
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected 'base64-token rank', "
                             f"found {line[:40]!r}") from None
    size = len(ranks)
    complete = sorted(ranks.values()) == list(range(size))
    every_byte = all(bytes([b]) in ranks for b in range(256))
    if not (complete and every_byte):
        raise ValueError(f"{path}: expected tokens of rank 0, 1, 2, ..., all 256 single bytes "
                         f"among them; found {size:,} tokens that are not so (cut short?)")
    # special tokens follow the ranks, BOS and EOS first
    special_ids = {name: size + i for i, name in enumerate(LLAMA3_SPECIAL)}
    tokenizer = Tokenizer(Llama3Ranks(ranks), "Llama-3 tiktoken", special_ids,
                          size + len(special_ids), special_ids, set(special_ids.values()))
    tokenizer.bos_id = tokenizer.first_id = size
    tokenizer.eos_id = size + 1
    return tokenizer


# ------------------------------------------------------------------ generation, id by id

def text_stopper(tokenizer, stop_strings, stop_ids=()):
    """
    A function stop(new_ids) -> bool for generation: whether the last id is a stop id or the text of
    new_ids contains a stop string.

    To be asked after every new id: it decodes only the end, since the rest was checked before.
    """
    if isinstance(stop_strings, str):
        stop_strings = [stop_strings]
    stop_strings = list(stop_strings)
    stop_ids = set(stop_ids)
    if "" in stop_strings:
        raise ValueError("an empty stop string would stop every text at once")
    # an id that is not silent is a byte at least;
    # 4 more, since the first may lose a blank or be the end of a character
    longest = max((len(string.encode()) for string in stop_strings), default=0)

    def stop(new_ids):
        if new_ids and new_ids[-1] in stop_ids:
            return True
        text = tokenizer.decode(end_of(new_ids, longest + 4, tokenizer))
        return any(string in text for string in stop_strings)

    return stop


class StreamDecoder:
    """
    Text as its ids come: push(id) returns the new text that later ids cannot change (the first
    bytes of a character wait for the others), finish() returns what is left. Joined, they are
    decode(prompt_ids + ids)[len(decode(prompt_ids)):].
    """

    def __init__(self, tokenizer, prompt_ids=()):
        self.tokenizer = tokenizer
        self.ids = end_of(list(prompt_ids), 8, tokenizer)
        self.shown = len(tokenizer.decode(self.ids))  # characters of the ids' text

    def push(self, token_id):
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids)
        # up to 3 U+FFFD at the end may be the first bytes of a character
        settled = text[:-3] + text[-3:].rstrip("\ufffd")
        new = settled[self.shown:]
        self.shown = max(self.shown, len(settled))
        # a few ids are context enough, and a short list decodes fast
        if len(self.ids) > 64 and self.shown == len(settled):
            unsettled = len(text) - len(settled)
            self.ids = end_of(self.ids, 8, self.tokenizer)
            self.shown = len(self.tokenizer.decode(self.ids)) - unsettled
        return new

    def finish(self):
        return self.tokenizer.decode(self.ids)[self.shown:]


def end_of(ids, count, tokenizer):
    """The shortest end of ids in which `count` are not silent."""
    start = len(ids)
    while start and count:
        start -= 1
        if not tokenizer.is_silent(ids[start]):
            count -= 1
    return ids[start:]
