"""
Text to token ids and back, with exactly the ids of the tool that the tokenizer file was made for.

    tokenizer = load_tokenizer("path/to/model-folder")
    ids = tokenizer.encode("Hello world", bos=True)
    text = tokenizer.decode(ids)

Three kinds of file, told apart by content:
  - Llama-2's tokenizer.model is a sentencepiece model; sentencepiece runs it.
  - Llama-3's tokenizer.model is a list of "base64-token rank"; tiktoken runs it.
  - A tokenizer.json of Hugging Face is rewritten as a tiktoken table if it is a byte-level BPE (GPT-2, Llama-3,
    SmolLM2) or a BPE over characters with byte fallback (Llama-2). Any other is refused by the name of the part that is
    not supported, because a tokenizer that is almost right trains an almost right model.

Special tokens are ids, not text: "</s>" inside a text is four ordinary characters (Hugging Face makes it one id, so that
a document can end itself), and special ids decode to nothing.
"""
import base64
import hashlib
import json
import re
import unicodedata
from functools import partial
from math import inf
from pathlib import Path

import sentencepiece
import tiktoken

SPACE = "▁"  # sentencepiece's spelling of a blank
ALL = r"(?s:.+)"
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]  # 256 in all
MAX_BLANKS = 100_000  # whitespace characters in a row that tiktoken is given: its regex stack ends near 1,000,000

# GPT-2's printable character for each of the 256 bytes, in which byte-level tokenizer.json files spell their tokens
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHAR_OF_BYTE = {b: chr(b) for b in _printable}
CHAR_OF_BYTE |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in CHAR_OF_BYTE)}
BYTE_OF_CHAR = {char: b for b, char in CHAR_OF_BYTE.items()}


class Tokenizer:
    """
    What load_tokenizer returns. vocab_size counts all ids, special ones too; bos_id and eos_id are None where there are
    none; special_ids maps names of special tokens to ids; silent is the set of ids that decode to nothing.
    """

    def __init__(self, kind, encode_text, decode_ids, vocab_size, bos_id, eos_id, special_ids, silent):
        self.name = f"{kind}, {vocab_size:,} ids"
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self.special_ids, self.silent = special_ids, silent
        self._encode_text, self._decode_ids = encode_text, decode_ids

    def encode(self, text, bos=False, eos=False):
        """The list of ids of a text. ValueError: half a surrogate pair in the text, a bos or eos that does not exist."""
        for name, wanted, token_id in (("BOS", bos, self.bos_id), ("EOS", eos, self.eos_id)):
            if wanted and token_id is None:
                raise ValueError(f"this tokenizer has no {name} id ({self.name})")
        text.encode()  # raises on half a surrogate pair, with which each of the tools would do something else
        return [self.bos_id] * bool(bos) + self._encode_text(text) + [self.eos_id] * bool(eos)

    def decode(self, ids):
        """The text of a list of ids; bytes that are not UTF-8 become U+FFFD. ValueError: an id outside the vocabulary."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary ({self.name})")
        return self._decode_ids(ids)


def load_tokenizer(folder_or_file):
    """
    The Tokenizer of a file; of a folder, the one of its tokenizer.model or else of its tokenizer.json.
    FileNotFoundError: there is none. ValueError: it is damaged, or of a kind that cannot be followed exactly.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            names = sorted(p.name for p in path.iterdir())
            raise FileNotFoundError(f"{path}: no tokenizer.model and no tokenizer.json in this folder, which holds "
                                    f"{', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder with tokenizer.model or tokenizer.json, or one of them")
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: this is a git-lfs pointer and not the tokenizer; run `git lfs pull` in its folder")
    if data.startswith(b"{"):
        tokenizer = _huggingface(path, data)
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        tokenizer = _llama3(path, data)
    else:
        tokenizer = _sentencepiece(path, data)
    tokenizer.sha256 = hashlib.sha256(data).hexdigest()
    return tokenizer


# ----------------------------------------------------------------- tokenizer.model

def _sentencepiece(path, data):
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data) if data else None
    except RuntimeError:
        model = None
    if model is None:
        raise ValueError(f"{path}: neither a sentencepiece model, nor tiktoken ranks, nor a tokenizer.json (cut short?): "
                         f"{len(data):,} bytes that begin with {data[:16]!r}")
    size = model.vocab_size()
    special_ids = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    bos_id, eos_id = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
    return Tokenizer("sentencepiece", model.encode, model.decode, size, bos_id, eos_id, special_ids,
                     set(special_ids.values()))


def _llama3(path, data):
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected 'base64-token rank', found {line[:40]!r}") from None
    size = len(ranks)
    if sorted(ranks.values()) != list(range(size)) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path}: expected tokens of rank 0, 1, 2, ..., all 256 single bytes among them; "
                         f"found {size:,} tokens that are not so (cut short?)")
    special_ids = {name: size + i for i, name in enumerate(LLAMA3_SPECIAL)}
    decode = partial(_decode_bytes, {rank: token for token, rank in ranks.items()})
    return Tokenizer("Llama-3 tiktoken", _tiktoken(LLAMA3_WORDS, ranks), decode, size + len(special_ids),
                     size, size + 1, special_ids, set(special_ids.values()))


def _tiktoken(words, ranks):
    """text -> list of ranks: cuts the text into words by a regex and runs BPE over the UTF-8 bytes of each."""
    encode = tiktoken.Encoding("bpe", pat_str=words, mergeable_ranks=ranks, special_tokens={}).encode_ordinary

    def encode_text(text):
        if len(text) <= MAX_BLANKS:
            return encode(text)
        parts = re.split(rf"(\s{{{MAX_BLANKS}}})", text)  # cuts only where MAX_BLANKS blanks stand together
        return [rank for part in parts for rank in encode(part)]

    return encode_text


def _decode_bytes(pieces, ids):
    return b"".join([pieces.get(i, b"") for i in ids]).decode("utf-8", "replace")


# ----------------------------------------------------------------- tokenizer.json

def _huggingface(path, data):
    def refuse(part, found):
        raise ValueError(f"{path}: {part} {json.dumps(found, ensure_ascii=False)[:300]} is not supported; supported are "
                         "byte-level BPE (as GPT-2, Llama-3, SmolLM2) and BPE with byte fallback (as Llama-2)")

    spec = _read_json(path, data)
    model = spec.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        refuse("a model of type", model.get("type"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            refuse(f"model.{option}", model[option])
    steps, words, byte_level = _text_steps(spec, refuse)
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    special_ids = {token["content"]: token["id"] for token in spec.get("added_tokens") or [] if token.get("special")}
    ...
