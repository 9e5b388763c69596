"""
Text to token ids and back, with exactly the ids of the tool that the tokenizer file was made for.

    tokenizer = load_tokenizer("path/to/model-folder")
    ids = tokenizer.encode("Hello world", bos=True)     # Llama-2: [1, 15043, 3186]
    text = tokenizer.decode(ids)                        # "Hello world"

The content of the file decides which tool reads it:

    tokenizer.model of Llama-2   a protobuf                     sentencepiece
    tokenizer.model of Llama-3   lines of "base64-token rank"   tiktoken
    tokenizer.json               JSON                           tokenizers (Hugging Face)

Special tokens are ids, never text: "</s>" inside a text is four ordinary characters, with every
tool (by default Hugging Face makes it one id, so that a document can end itself), and special ids
decode to nothing. Added tokens that are not special, such as "<think>", are one id.
"""
import base64
import hashlib
import json
import os
import re
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

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
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}  # how Llama-2's vocabulary names a byte
HIDDEN = "\0special\0"  # stands before the names of special tokens that no text shall match


class Tokenizer:
    """
    What load_tokenizer returns.

    vocab_size   counts all ids, special ones too
    bos_id, eos_id   None where the file has none
    special_ids  {name of a special token: its id}
    silent       the ids that decode to nothing
    sha256       of the file
    name         for printing
    """

    def __init__(self, tool, kind, vocab_size, bos_id, eos_id, special_ids, silent):
        # tool: any object with encode(text) -> ids and decode(ids) -> text
        self.tool = tool
        self.name = f"{kind}, {vocab_size:,} ids"
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_ids = special_ids
        self.silent = silent

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
        The text of ids; bytes that are not UTF-8 become U+FFFD.

        ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids from {min(ids)} to {max(ids)} reach outside the "
                             f"vocabulary ({self.name})")
        return self.tool.decode(ids)

    def __reduce__(self):
        # pickled as the path: another process reads the file again
        return load_tokenizer, (self.path,)


def load_tokenizer(folder_or_file):
    """
    The Tokenizer of a file; in a folder, of its tokenizer.model or else its tokenizer.json.

    FileNotFoundError: there is none. ValueError: it is damaged, or the tool cannot read it.
    """
    path = find_file(Path(folder_or_file))
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: this is a git-lfs pointer and not the tokenizer; "
                         "run `git lfs pull` in its folder")
    if data.startswith(b"{"):
        tokenizer = read_huggingface(path, data)
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        tokenizer = read_llama3(path, data)
    else:
        tokenizer = read_sentencepiece(path, data)
    tokenizer.path = str(path)
    tokenizer.sha256 = hashlib.sha256(data).hexdigest()
    return tokenizer


def find_file(path):
    """The tokenizer file that a path names, itself or as its folder. FileNotFoundError."""
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        names = sorted(entry.name for entry in path.iterdir())
        held = ", ".join(names[:8]) or "nothing"
        if len(names) > 8:
            held += ", ..."
        raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this folder, "
                                f"which holds {held}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected tokenizer.model, tokenizer.json "
                                "or their folder")
    return path


# ------------------------------------------------------------------ tokenizer.model of Llama-2

def read_sentencepiece(path, data):
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data) if data else None
    except RuntimeError:
        model = None
    if model is None:
        raise ValueError(f"{path}: neither a sentencepiece model nor tiktoken ranks nor a "
                         f"tokenizer.json (cut short?): {len(data):,} bytes that begin with "
                         f"{data[:16]!r}")
    # unknown is no special token: it stands for text
    size = model.vocab_size()
    special_ids = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    # -1 stands for an id that the model does not have
    bos_id = model.bos_id() if model.bos_id() >= 0 else None
    eos_id = model.eos_id() if model.eos_id() >= 0 else None
    silent = set(special_ids.values())
    return Tokenizer(model, "sentencepiece", size, bos_id, eos_id, special_ids, silent)


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
    return Tokenizer(Llama3Ranks(ranks), "Llama-3 tiktoken", size + len(special_ids),
                     size, size + 1, special_ids, set(special_ids.values()))


# ------------------------------------------------------------------ tokenizer.json

class HuggingFaceFile:
    """A tokenizer.json, read by Hugging Face's tokenizers package."""

    def __init__(self, spec):
        # no threads: worker processes share the work, and threads do not survive a fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tool = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.tool.encode_special_tokens = True  # special tokens inside a text are text
        self.vocab = self.tool.get_vocab(with_added_tokens=True)
        self.silent = set()
        # for decoding bytes; only where the file has all of them
        self.byte_of_id = {}
        falls_back = "ByteFallback" in json.dumps(spec.get("decoder"))
        if falls_back and BYTE_TOKENS.keys() <= self.vocab.keys():
            self.byte_of_id = {self.vocab[name]: b for name, b in BYTE_TOKENS.items()}

    def encode(self, text):
        # the fast one does not compute where in the text each token stands
        [encoding] = self.tool.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def decode(self, ids):
        ids = [i for i in ids if i not in self.silent]
        if not self.byte_of_id.keys().isdisjoint(ids):
            ids = self.mend_bytes(ids)
        return self.tool.decode(ids)

    def mend_bytes(self, ids):
        """
        Ids in which each stray byte (no part of a character) is U+FFFD, spelled in bytes.

        The package makes every byte of a run U+FFFD if one of them is stray. Here the characters
        around it stay, as with sentencepiece: what was already generated never changes.
        """
        mended = []
        run = b""
        for i in [*ids, None]:
            if i in self.byte_of_id:
                run += bytes([self.byte_of_id[i]])
                continue
            # a run of bytes ends here: undecodable ones come out as lone surrogates
            characters = run.decode("utf-8", "surrogateescape")
            characters = re.sub("[\udc80-\udcff]", "\ufffd", characters)
            mended += [self.vocab[f"<0x{b:02X}>"] for b in characters.encode()]
            run = b""
            if i is not None:
                mended.append(i)
        return mended


def read_huggingface(path, data):
    spec = read_json(path, data)
    special_ids = hide_special_tokens(spec)
    # what would cut a text, pad it, or encode it differently each time
    spec["truncation"] = None
    spec["padding"] = None
    model = spec.get("model") or {}
    if "dropout" in model:
        model["dropout"] = None
    try:
        tool = HuggingFaceFile(spec)
    except Exception as error:  # the package raises no narrower class
        raise ValueError(f"{path}: not readable by the tokenizers package "
                         f"{tokenizers.__version__}: {error}") from None

    # the ids: those that no token has are silent as well
    ids = {name.removeprefix(HIDDEN): i for name, i in tool.vocab.items()}
    size = max(ids.values(), default=-1) + 1
    tool.silent = set(special_ids.values()) | set(range(size)).difference(ids.values())
    bos_id = id_from_configs(path.parent, "bos", ids)
    eos_id = id_from_configs(path.parent, "eos", ids)

    # for printing, and for meta.json
    kind = model.get("type") or "BPE"
    if "ByteLevel" in json.dumps(spec.get("pre_tokenizer")):
        kind = f"byte-level {kind}"
    elif model.get("byte_fallback"):
        kind = f"{kind} with byte fallback"
    return Tokenizer(tool, kind, size, bos_id, eos_id, special_ids, tool.silent)


def hide_special_tokens(spec):
    """
    Rename the special tokens in a tokenizer.json, as read; returns {their own name: id}.

    A model may spell one from pieces (Llama-2's file has merges that end in "</s>"), and then a
    text would become the end of itself.
    """
    special_ids = {}
    for token in spec.get("added_tokens") or []:
        if token.get("special"):
            special_ids[token["content"]] = token["id"]
            token["content"] = HIDDEN + token["content"]

    def hidden(name):
        return HIDDEN + name if name in special_ids else name

    # wherever the model names one
    model = spec.get("model") or {}
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {hidden(name): i for name, i in vocab.items()}
    if isinstance(vocab, list):  # Unigram: [[piece, score]]
        model["vocab"] = [[hidden(name), score] for name, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = hidden(model["unk_token"])
    if model.get("merges"):
        model["merges"] = merges_without(model["merges"], special_ids)
    return special_ids


def merges_without(merges, names):
    """The merges that neither form nor use one of `names`; a merge is "a b" or ["a", "b"]."""
    kept = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if names.keys().isdisjoint((left, right, left + right)):
            kept.append(merge)
    return kept


def id_from_configs(folder, name, ids):
    """The id of 'bos' or 'eos' by the first file of the folder that knows it, or None."""
    places = (("tokenizer_config.json", f"{name}_token"),
              ("config.json", f"{name}_token_id"),
              ("generation_config.json", f"{name}_token_id"))
    for file, key in places:
        if not (folder / file).is_file():
            continue
        value = read_json(folder / file, (folder / file).read_bytes()).get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, list):  # Llama-3.1 lists all ids that end a turn
            value = value[0]
        if isinstance(value, str):
            value = ids.get(value)
        if value is not None:
            return value
    return None


def read_json(path, data):
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON (cut short?): {error}") from None


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
        text = tokenizer.decode(end_of(new_ids, longest + 4, tokenizer.silent))
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
        self.ids = end_of(list(prompt_ids), 8, tokenizer.silent)
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
            self.ids = end_of(self.ids, 8, self.tokenizer.silent)
            self.shown = len(self.tokenizer.decode(self.ids)) - unsettled
        return new

    def finish(self):
        return self.tokenizer.decode(self.ids)[self.shown:]


def end_of(ids, count, silent):
    """The shortest end of ids in which `count` are not silent."""
    start = len(ids)
    while start and count:
        start -= 1
        if ids[start] not in silent:
            count -= 1
    return ids[start:]
