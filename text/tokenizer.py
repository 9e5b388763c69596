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

Special tokens are ids, not text: "</s>" inside a text is four ordinary characters (Hugging Face makes it one id, so
that a document can end itself), and special ids decode to nothing.
"""
import base64
import hashlib
import json
import re
import unicodedata
from functools import partial
from pathlib import Path

import regex
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
BYTE_OF_CHAR = {ord(char): b for b, char in CHAR_OF_BYTE.items()}
BYTE_TOKENS = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}  # how the other kind names a byte


class Tokenizer:
    """
    What load_tokenizer returns. vocab_size counts all ids, special ones too; bos_id and eos_id are None if there are
    none; special_ids maps names of special tokens to ids; silent is the set of ids that decode to nothing; sha256 is
    the file's; name is for printing.
    """

    def __init__(self, kind, encode_text, decode_ids, vocab_size, bos_id, eos_id, special_ids, silent):
        self.name = f"{kind}, {vocab_size:,} ids"
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id
        self.special_ids, self.silent = special_ids, silent
        self._encode_text, self._decode_ids = encode_text, decode_ids

    def encode(self, text, bos=False, eos=False):
        """The ids of a text, a list of int. ValueError: half a surrogate pair in it, or no such id as bos or eos."""
        for name, wanted, token_id in (("BOS", bos, self.bos_id), ("EOS", eos, self.eos_id)):
            if wanted and token_id is None:
                raise ValueError(f"this tokenizer has no {name} id ({self.name})")
        text.encode()  # raises on half a surrogate pair, with which each of the tools would do something else
        return [self.bos_id] * bool(bos) + self._encode_text(text) + [self.eos_id] * bool(eos)

    def decode(self, ids):
        """The text of ids; bytes that are not UTF-8 become U+FFFD. ValueError: an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids from {min(ids)} to {max(ids)} reach outside the vocabulary ({self.name})")
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
        raise FileNotFoundError(f"{path}: no such file; expected tokenizer.model, tokenizer.json or their folder")
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
        raise ValueError(f"{path}: neither a sentencepiece model nor tiktoken ranks nor a tokenizer.json (cut short?): "
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


def _tiktoken(words, ranks, dropped=b""):
    """text -> list of ranks: cuts the text into words by a regex and runs BPE over the bytes of each."""
    bpe = tiktoken.Encoding("bpe", pat_str=words, mergeable_ranks=ranks, special_tokens={})

    def encode(text):
        if dropped and len(code := text.encode()) > len(code.translate(None, dropped)):
            # bytes that the vocabulary lacks leave their words before BPE, which joins what was left and right of them
            kept = (word.encode().translate(None, dropped) for word in regex.findall(words, text))
            return [rank for word in kept if word for rank in bpe._encode_single_piece(word)]
        if len(text) <= MAX_BLANKS:
            return bpe.encode_ordinary(text)
        parts = re.split(rf"(\s{{{MAX_BLANKS}}})", text)  # cuts only where MAX_BLANKS blanks stand together
        return [rank for part in parts for rank in bpe.encode_ordinary(part)]

    return encode


def _decode_bytes(pieces, ids):
    return b"".join([pieces.get(i, b"") for i in ids]).decode("utf-8", "replace")


# ----------------------------------------------------------------- tokenizer.json

def _huggingface(path, data):
    """
    A Hugging Face BPE as changes to the text, a regex that cuts it into words, and a table for tiktoken, whose ranks
    are not the ids of the file: ids_of_rank translates.
    """
    def refuse(part, found):
        raise ValueError(f"{path}: {part} {json.dumps(found, ensure_ascii=False)[:300]} is not supported; supported "
                         "are byte-level BPE (as GPT-2, Llama-3, SmolLM2) and BPE with byte fallback (as Llama-2)")

    spec = _read_json(path, data)
    model, added = spec.get("model") or {}, spec.get("added_tokens") or []
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
        refuse("a model of type", model.get("type"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            refuse(f"model.{option}", model[option])
    vocab, added_ids = model["vocab"], {token["content"]: token["id"] for token in added}
    special_ids = {token["content"]: token["id"] for token in added if token.get("special")}

    steps, words, byte_level = _text_steps(spec, refuse)
    strip = _decoder_strips(spec, byte_level, refuse)
    ranks, ids_of_rank = (_byte_table if byte_level else _char_table)(model, refuse)
    tokens = [token for token in _merged_tokens(model, added_ids, byte_level, refuse) if token not in special_ids]
    for token in tokens:
        ranks[_token_bytes(token) if byte_level else token.encode()] = len(ids_of_rank)
        ids_of_rank.append([vocab[token]])
    if words is None:  # a word begins at a blank if no token reaches over one; else the whole text is one word
        words = ALL if any(SPACE in token.lstrip(SPACE) for token in tokens) else f"{SPACE}*[^{SPACE}]+|{SPACE}+"
    dropped = bytes(b for b in range(256) if byte_level and not ids_of_rank[b])
    try:
        split = _tiktoken(words, ranks, dropped)
    except ValueError as error:
        refuse(f"a regex that tiktoken cannot read ({error}):", words)
    fused = vocab.get(model.get("unk_token")) if model.get("fuse_unk") else None

    def encode_text(text):
        for step in steps:
            text = step(text)
        ids = [i for rank in split(text) for i in ids_of_rank[rank]]
        if fused is not None:  # unknown characters in a row are one unknown token
            ids = [i for i, before in zip(ids, [None, *ids]) if not i == before == fused]
        return ids

    pieces = {i: (_token_bytes if byte_level else _piece_bytes)(token) for token, i in vocab.items()}
    pieces |= {i: token.encode() for token, i in added_ids.items()} | {i: b"" for i in special_ids.values()}
    size = max(pieces) + 1
    bos_id, eos_id = (_named_id(path.parent, name, {**vocab, **added_ids}) for name in ("bos", "eos"))
    return Tokenizer("byte-level BPE" if byte_level else "BPE with byte fallback", encode_text,
                     partial(_decode_bytes, pieces) if byte_level else partial(_decode_chars, pieces, strip),
                     size, bos_id, eos_id, special_ids, {i for i in range(size) if not pieces.get(i)})


def _text_steps(spec, refuse):
    """normalizer and pre_tokenizer: a list of text -> text, the regex of words (or None), whether byte-level."""
    steps = []
    for node in _leaves(spec.get("normalizer"), "normalizers"):
        match node:
            case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
                steps.append(partial(unicodedata.normalize, form))
            case {"type": "Prepend", "prepend": prefix}:
                steps.append(lambda text, prefix=prefix: prefix + text if text else text)
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                steps.append(lambda text, old=old, new=new: text.replace(old, new))
            case _:
                refuse("normalizer", node)

    match _leaves(spec.get("pre_tokenizer"), "pretokenizers"):
        case []:
            return steps, None, False
        case [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            steps.append(lambda text: text.replace(" ", SPACE))
            if scheme != "never":
                steps.append(lambda text: text if text.startswith(SPACE) or not text else SPACE + text)
            return steps, None, False
        case [{"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": cut}]:
            if prefix:
                steps.append(lambda text: text if text.startswith(" ") or not text else " " + text)
            return steps, GPT2_WORDS if cut else ALL, True
        case [{"type": "Digits", "individual_digits": single},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            # two cuts in one regex: numbers stand alone, and blanks before one end as blanks at the end of a text do
            numbers = GPT2_WORDS.replace(r" ?\p{N}+", r"\p{N}" if single else r"\p{N}+")
            return steps, numbers.replace(r"(?!\S)", r"(?![^\s\p{N}])"), True
        case [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            if words != LLAMA3_WORDS:  # what a regex leaves out is a word as well; Llama-3's leaves nothing out
                words = f"(?:{words})|(?:(?!{words})(?s:.))+"
            return steps, words, True
    refuse("pre_tokenizer", spec["pre_tokenizer"])


def _decoder_strips(spec, byte_level, refuse):
    """Whether decoding drops one leading blank."""
    nodes = _leaves(spec.get("decoder"), "decoders")
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    chars = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
             {"type": "ByteFallback"}, {"type": "Fuse"}]
    known = [node.get("type") for node in nodes] == ["ByteLevel"] if byte_level else nodes in (chars, chars + strip)
    if not known:
        refuse("decoder", spec.get("decoder"))
    return nodes[3:] == strip


def _byte_table(model, refuse):
    """tiktoken's ranks before any merge, and the file's ids of each rank, where a text is bytes."""
    ids = [model["vocab"].get(CHAR_OF_BYTE[b], model["vocab"].get(model.get("unk_token"))) for b in range(256)]
    return {bytes([b]): b for b in range(256)}, [[] if i is None else [i] for i in ids]


def _char_table(model, refuse):
    """
    The same where a text is characters, and one that is not in the vocabulary is its bytes or unknown. tiktoken begins
    with bytes, so it is made to build the characters first, through parts of 2 and 3 bytes that are no tokens.
    """
    vocab, unk = model["vocab"], model.get("unk_token")
    byte_ids = [vocab[name] for name in BYTE_TOKENS if name in vocab] if model.get("byte_fallback") else []
    if len(byte_ids) not in (0, 256) or not byte_ids and unk not in vocab:
        refuse("a vocabulary with this unk_token and number of byte tokens:", [unk, len(byte_ids)])

    def unknown(part):
        if byte_ids:
            return [byte_ids[b] for b in part]
        return [] if 0x80 <= part[0] < 0xC0 else [vocab[unk]]  # once a character, at its first byte

    ids_of = {bytes([b]): unknown(bytes([b])) for b in range(256)}
    for char in (token for token in vocab if len(token) == 1):
        code = char.encode()
        ids_of |= {code[:n]: unknown(code[:n]) for n in range(2, len(code))}
        ids_of[code] = [vocab[char]]
    return {code: rank for rank, code in enumerate(ids_of)}, list(ids_of.values())


def _merged_tokens(model, added_ids, byte_level, refuse):
    """
    The tokens that merges form, in tiktoken's order of preference. Hugging Face ranks pairs, tiktoken the token that a
    pair forms. They agree if a token has the rank of the pair with which BPE over that token alone ends, for no other
    pair ever forms it: between two borders that stay uncrossed BPE runs as if nothing were outside. A token that BPE
    over it alone does not reach is reached nowhere (Llama-3's file lists all ways to halve a token: half are dead).
    """
    vocab = model["vocab"]
    rank = {tuple(pair.split(" ") if isinstance(pair, str) else pair): i for i, pair in enumerate(model["merges"], 1)}
    formed = {"".join(pair) for pair in rank}
    unknown = (formed | {part for pair in rank for part in pair}) - vocab.keys()
    if unknown:
        refuse("a merge of or into tokens that the vocabulary lacks", sorted(unknown)[:8])
    if not BYTE_TOKENS.keys().isdisjoint(part for pair in rank for part in pair):
        refuse("a merge of", "byte tokens")
    last = {token: _last_pair(token, rank) for token in formed}
    tokens = sorted((token for token in last if last[token] in rank), key=lambda token: rank[last[token]])
    if model.get("ignore_merges"):  # a word that is a token becomes it, even if no merges lead there
        whole = [token for token in vocab.keys() - set(tokens) - added_ids.keys() if len(token) > 1]
        if not byte_level or any(_last_pair(token, rank) for token in whole):  # tiktoken would form it inside words too
            refuse("model.ignore_merges with tokens that have no merge", whole[:8])
        tokens += whole
    return tokens


def _last_pair(token, rank):
    """The two parts of a token that BPE over its characters comes down to; None if it gets stuck with more."""
    parts = list(token)
    while len(parts) > 2:
        ranks = list(map(rank.get, zip(parts, parts[1:])))
        best = min(filter(None, ranks), default=None)
        if best is None:
            return None
        i = ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def _token_bytes(token):
    """The bytes of a token of a byte-level vocabulary (one that is not spelled in bytes is plain text)."""
    try:
        return token.translate(BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _piece_bytes(token):
    """The bytes of a token of a vocabulary of characters."""
    return BYTE_TOKENS.get(token) or token.replace(SPACE, " ").encode()


def _decode_chars(pieces, strip, ids):
    text = b"".join([pieces.get(i, b"") for i in ids]).decode("utf-8", "surrogateescape")
    text = re.sub("[\udc80-\udcff]", "\ufffd", text)  # one for each stray byte, as sentencepiece has it
    return text.removeprefix(" ") if strip else text


def _leaves(node, key):
    """A normalizer, pre_tokenizer or decoder as a list without Sequences."""
    if node and node.get("type") == "Sequence":
        return [leaf for child in node[key] for leaf in _leaves(child, key)]
    return [node] if node else []


def _named_id(folder, name, ids):
    """The id of 'bos' or 'eos' by the first file of the folder that knows it, or None."""
    for file, key in (("tokenizer_config.json", f"{name}_token"), ("config.json", f"{name}_token_id"),
                      ("generation_config.json", f"{name}_token_id")):
        if (folder / file).is_file():
            value = _read_json(folder / file, (folder / file).read_bytes()).get(key)
            value = value.get("content") if isinstance(value, dict) else value
            value = value[0] if isinstance(value, list) else value  # Llama-3.1 lists all that end a turn
            value = ids.get(value) if isinstance(value, str) else value
            if value is not None:
                return value
    return None


def _read_json(path, data):
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON (cut short?): {error}") from None


# ----------------------------------------------------------------- generation, id by id

def text_stopper(tokenizer, stop_strings, stop_ids=()):
    """
    A function stop(new_ids) -> bool for generation: whether the last id is a stop id or the text of new_ids contains a
    stop string. To be asked after every new id; decodes only the end, since what came earlier was asked about earlier.
    """
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    stop_ids = set(stop_ids)
    if "" in stop_strings:
        raise ValueError("an empty stop string would stop every text at once")
    # an id that is not silent is a byte at least; 4 more, since the first may lose a blank or be the end of a character
    count = max((len(string.encode()) for string in stop_strings), default=0) + 4

    def stop(new_ids):
        if new_ids and new_ids[-1] in stop_ids:
            return True
        text = tokenizer.decode(_end_of(new_ids, count, tokenizer.silent))
        return any(string in text for string in stop_strings)

    return stop


class StreamDecoder:
    """
    Text as its ids come: push(id) returns the new text that later ids cannot change (a character's first bytes wait for
    the others), finish() what is left. Joined they are decode(prompt_ids + ids)[len(decode(prompt_ids)):].
    """

    def __init__(self, tokenizer, prompt_ids=()):
        self.tokenizer = tokenizer
        self.ids = _end_of(list(prompt_ids), 8, tokenizer.silent)
        self.shown = len(tokenizer.decode(self.ids))

    def push(self, token_id):
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids)
        settled = text[:-3] + text[-3:].rstrip("\ufffd")  # a character's first 1 to 3 bytes, if they are that
        new, self.shown = settled[self.shown:], max(self.shown, len(settled))
        if len(self.ids) > 64 and self.shown == len(settled):  # a few ids are context enough: a short list decodes fast
            self.ids = _end_of(self.ids, 8, self.tokenizer.silent)
            self.shown = len(self.tokenizer.decode(self.ids)) - (len(text) - len(settled))
        return new

    def finish(self):
        return self.tokenizer.decode(self.ids)[self.shown:]


def _end_of(ids, count, silent):
    """The shortest end of ids in which `count` are not silent."""
    start = len(ids)
    while start and count:
        start -= 1
        count -= ids[start] not in silent
    return ids[start:]
