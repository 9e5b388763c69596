"""
tokenizer.json, read by Hugging Face's tokenizers package; and a tokenizer.model in that form.

    {"added_tokens": [{"id": 2, "content": "</s>", "special": true}, ...],
     "model": {"type": "BPE", "vocab": {"</s>": 2, ...}, "merges": ["< /", "</ s", "</s >", ...]}}

    "a</s>"     a </ s >     special tokens are hidden from texts: no merge may spell one
    "a<think>"  a <think>    other added tokens are one id
"""
import json
import os
import re

import tokenizers

from text.tokenizer_folder import add_tokens, full_token, read_json

BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}  # how Llama-2's vocabulary names a byte
HIDDEN = "\0special\0"  # stands before the names of special tokens that no text shall match
CONTROL = 3  # types of sentencepiece's pieces
USER_DEFINED = 4
UNIGRAM = 1  # kinds of sentencepiece models
BPE = 2
LLAMA2_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}


class HuggingFaceFile:
    """A tokenizer.json as parsed, whose special tokens are hidden: encode and decode."""

    def __init__(self, spec, path):
        self.path = path
        # no threads: worker processes share the work, and threads do not survive a fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.tool = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.tool.encode_special_tokens = True  # special tokens inside a text are text
        self.vocab = self.tool.get_vocab(with_added_tokens=True)
        self.ids = {name.removeprefix(HIDDEN): i for name, i in self.vocab.items()}
        self.size = max(self.ids.values(), default=-1) + 1
        # special ids, and those that no token has, decode to nothing
        self.special_ids = {}
        for token in spec.get("added_tokens") or []:
            if token["special"]:
                name = token["content"].removeprefix(HIDDEN)
                self.special_ids[name] = self.vocab[token["content"]]
        self.silent = set(range(self.size)).difference(self.ids.values())
        self.silent.update(self.special_ids.values())
        # for decoding bytes; only where the file has all of them
        self.byte_of_id = {}
        falls_back = "ByteFallback" in json.dumps(spec.get("decoder"))
        if falls_back and BYTE_TOKENS.keys() <= self.vocab.keys():
            self.byte_of_id = {self.vocab[name]: b for name, b in BYTE_TOKENS.items()}

        # whether names spell bytes, a character each; added tokens are texts
        self.is_byte_level = "ByteLevel" in json.dumps(spec.get("decoder"))
        self.added = {token["id"]: token["content"] for token in spec.get("added_tokens") or []}

        # the special id that the file's post-processor puts in front of a text
        first = self.tool.encode("a").ids[:1]
        self.first_id = first[0] if first and first[0] in self.silent else None

    def encode(self, text):
        # the fast one does not compute where in the text each token stands
        try:
            [encoding] = self.tool.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:  # the package raises no narrower class
            raise ValueError(f"{self.path}: the tokenizers package cannot encode a text: "
                             f"{error}") from None
        return encoding.ids

    def hides(self, ids):
        """Whether each of `ids` is a special token of the file, which can be written hidden."""
        return set(ids) <= set(self.special_ids.values())

    def encode_between(self, texts, special_ids):
        """The ids of texts with a special token between each two, in one go, since the tokens say
        which blanks around them belong to them."""
        name_of = {i: name for name, i in self.special_ids.items()}
        whole = without_hidden(texts[0])
        for text, i in zip(texts[1:], special_ids):
            whole += HIDDEN + name_of[i] + without_hidden(text)
        self.tool.encode_special_tokens = False
        try:
            return self.encode(whole)
        finally:
            self.tool.encode_special_tokens = True

    def decode(self, ids):
        ids = [i for i in ids if i not in self.silent]
        if not self.byte_of_id.keys().isdisjoint(ids):
            ids = self.mend_bytes(ids)
        return self.tool.decode(ids)

    def bytes_of(self, i):
        """Bytes that an id adds to a text in UTF-8."""
        if i in self.byte_of_id:
            return 1
        if i in self.added:
            return len(self.added[i].encode())
        name = self.tool.id_to_token(i)
        if self.is_byte_level:
            return len(name)
        return len(name.replace("▁", " ").encode())

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


def parse_spec(path, data, settings):
    """
    A tokenizer.json and what the folder's files add -> (what it holds, changed so that texts are
    encoded whole and always the same way; what settings change in how a text is encoded).
    """
    spec = read_json(path, data)
    try:
        model = spec["model"]
        # what would cut a text, pad it, or encode it differently each time
        spec["truncation"] = None
        spec["padding"] = None
        if "dropout" in model:
            model["dropout"] = None
        # the blank before a text is the configuration's, where the pre-tokenizer has that switch
        extra = []
        pre_tokenizer = spec.get("pre_tokenizer") or {}
        prefix = settings.add_prefix_space
        if prefix is not None and pre_tokenizer.get("add_prefix_space", prefix) != prefix:
            pre_tokenizer["add_prefix_space"] = prefix
            extra.append(pre_tokenizer)
        # the folder's tokens
        added = [dict(token) for token in spec.get("added_tokens") or []]
        spec["added_tokens"] = added
        vocab = model["vocab"]
        if isinstance(vocab, list):  # Unigram: [[piece, score]]
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        # a token that no text can hold changes no text's ids
        new = add_tokens(added, vocab, settings)
        extra += [token for token in new if not token["special"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(path, repr(error)) from None
    return spec, extra


def unreadable(path, why):
    """The error for a tokenizer.json that the package cannot read."""
    why = " ".join(str(why).split())
    return ValueError(f"{path}: not readable by the tokenizers package "
                      f"{tokenizers.__version__}: {why}")


def open_spec(path, spec):
    """What parse_spec returned -> HuggingFaceFile. ValueError: the package cannot read it."""
    try:
        hide_special_tokens(spec)
        return HuggingFaceFile(spec, path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the package is no Exception
        raise unreadable(path, error) from None


def kind_of(spec):
    """For printing, and for meta.json: "byte-level BPE", "BPE with byte fallback", ..."""
    model = spec["model"]
    kind = model.get("type") or "BPE"
    if "ByteLevel" in json.dumps(spec.get("pre_tokenizer")):
        return f"byte-level {kind}"
    if model.get("byte_fallback"):
        return f"{kind} with byte fallback"
    return kind


def hide_special_tokens(spec):
    """
    Rename the special tokens in a tokenizer.json, as parsed.

    A model may spell one from pieces (Llama-2's file has merges that end in "</s>"), and then a
    text would become the end of itself.
    """
    names = set()
    for token in spec["added_tokens"]:
        if token["special"]:
            names.add(token["content"])
            token["content"] = HIDDEN + token["content"]

    def hidden(name):
        return HIDDEN + name if name in names else name

    # wherever the model names one
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden(name): i for name, i in vocab.items()}
    if isinstance(vocab, list):  # Unigram: [[piece, score]]
        model["vocab"] = [[hidden(name), score] for name, score in vocab]
    if model.get("unk_token"):
        model["unk_token"] = hidden(model["unk_token"])
    if model.get("merges"):
        model["merges"] = merges_without(model["merges"], names)


def without_hidden(text):
    """A text that spells no hidden name: HIDDEN is taken out, until what is left has none."""
    while HIDDEN in text:
        text = text.replace(HIDDEN, "")
    return text


def merges_without(merges, names):
    """The merges that neither form nor use one of `names`; a merge is "a b" or ["a", "b"]."""
    kept = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if names.isdisjoint((left, right, left + right)):
            kept.append(merge)
    return kept


# ------------------------------------------------------------------ tokenizer.model in that form

def spec_of_model(model, types, settings):
    """
    A sentencepiece model of Llama's kind as transformers 4.57 converts it to a tokenizer.json, with
    what settings add -> (all but what complete_model adds, what of it sentencepiece alone would
    not do).

    types: of its pieces, by id. settings: legacy and add_prefix_space say where a blank is put: in
    front of each text between added tokens (legacy, as sentencepiece does), of the first alone, or
    nowhere.
    """
    # the pieces, and which of them stand for themselves
    names = [model.id_to_piece(i) for i in range(model.vocab_size())]
    for i, name in settings.renamed.items():
        names[i] = name
    vocab = {name: i for i, name in enumerate(names)}
    added = []
    for i, name in enumerate(names):
        if types[i] in (CONTROL, USER_DEFINED):
            token = {"content": name, "special": types[i] == CONTROL, "normalized": False}
            added.append({"id": i, **full_token(token)})
    # what texts can hold of the tokens that settings add
    extra = []
    for token in add_tokens(added, vocab, settings):
        is_unknown = token["id"] == model.unk_id()
        above = token["id"] >= len(names)
        if not (is_unknown or above and token["special"]):
            extra.append(token)

    # where the blank comes from
    prefix = settings.add_prefix_space is not False
    normalizer = None
    pre_tokenizer = None
    if settings.legacy is False:
        scheme = "first" if prefix else "never"
        pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
                         "split": False}
    else:
        steps = LLAMA2_NORMALIZER["normalizers"]
        normalizer = {"type": "Sequence", "normalizers": steps if prefix else steps[1:]}
    if normalizer != LLAMA2_NORMALIZER:
        extra.append([normalizer, pre_tokenizer])

    # the way back, and the model
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
             {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})

    spec = {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "decoder": {"type": "Sequence", "decoders": steps}, "model": {"vocab": vocab}}
    return spec, extra


def complete_model(spec, model, kind):
    """
    Add to what spec_of_model returned how a word becomes pieces: merges, or a score for each.

    kind: the file's, as model_kind tells it. ValueError: neither BPE nor unigram.
    """
    vocab = spec["model"]["vocab"]
    names = list(vocab)
    size = model.vocab_size()
    if len(names) < size:
        raise ValueError("two pieces have one name, with what the files beside it say")
    scores = [0.0 if i < 3 else model.get_score(i) for i in range(size)]
    if kind == BPE:
        spec["model"] |= {"type": "BPE", "unk_token": names[0], "fuse_unk": True,
                          "byte_fallback": True, "merges": merges_of_model(scores, vocab)}
    elif kind == UNIGRAM:
        pieces = [[name, score] for name, score in zip(names, scores)]
        spec["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": pieces}
    else:
        raise ValueError("neither a BPE nor a unigram model; with added tokens or other blanks it "
                         "needs a tokenizer.json")


def merges_of_model(scores, vocab):
    """The merges [left, right] of a sentencepiece BPE model, best first."""
    merges = []
    for name, i in vocab.items():
        # all ways to put the piece together from two others
        pairs = []
        for at in range(1, len(name)):
            left = name[:at]
            right = name[at:]
            if left in vocab and right in vocab:
                pairs.append((vocab[left], vocab[right], left, right))
        for _, _, left, right in sorted(pairs):
            merges.append((scores[i], len(left), len(right), left, right))
    # by score; of equal ones the longer parts first, and then as they stand
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for _, _, _, left, right in merges]


def piece_types(proto):
    """
    The type of each piece of a sentencepiece file, which the package does not tell: 1 normal,
    2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.

    A file is a protobuf whose field 1 (key 0x0A) is a piece: text (0x0A), score (0x15) and, unless
    it is normal, type (0x18).
    """
    types = []
    for key, piece in fields_of(proto):
        if key == 0x0A:
            types.append(dict(fields_of(piece)).get(0x18, 1))
    return types


def model_kind(proto):
    """UNIGRAM, BPE or another number: field 3 (0x18) of the trainer's settings, field 2 (0x12)."""
    kind = UNIGRAM
    for key, settings in fields_of(proto):
        if key == 0x12:
            kind = dict(fields_of(settings)).get(0x18, kind)
    return kind


def fields_of(proto):
    """Yield (key, number or bytes) of each field of a protobuf; a key's last bits say how long."""
    at = 0
    while at < len(proto):
        key, at = read_varint(proto, at)
        width = key & 7
        if width == 0:
            value, at = read_varint(proto, at)
        else:
            size = {1: 8, 5: 4}.get(width)
            if size is None:
                size, at = read_varint(proto, at)
            value = proto[at:at + size]
            at += size
        yield key, value


def read_varint(data, at):
    """A protobuf's number, seven bits a byte -> (number, where it ends)."""
    number = 0
    shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
        if byte < 0x80:
            return number, at


def describes(spec, model, types):
    """
    Whether a tokenizer.json, as parsed, is a form of this sentencepiece model: the same pieces and
    blanks, and no token that cuts texts. Its merges are not looked at: compare what it encodes.
    """
    bpe = spec["model"]
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    if bpe["vocab"] != pieces or USER_DEFINED in types:
        return False
    # blanks as sentencepiece puts them: one in front of the text
    if spec.get("normalizer") != LLAMA2_NORMALIZER or spec.get("pre_tokenizer"):
        return False
    for token in spec["added_tokens"]:
        if not token["special"]:
            return False
    return bool(bpe.get("byte_fallback") and bpe.get("fuse_unk") and not bpe.get("ignore_merges"))
