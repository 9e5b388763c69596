"""
Texts to ids as bytes, without BOS and EOS; with sentencepiece each word is encoded only once.

    " a cat\\n a"  ->  " a" " cat" "\\n" " a"  ->  their ids, joined; " a" was known the second time

This is exact where no token reaches from one word into the next: BPE only ever joins neighbours
to a token. word_by_word checks that, for the vocabulary at hand.
"""
import re

import numpy as np

from text.mds import holds_ids, ids_encoder

SENTENCEPIECE_BLANK = "▁"


def make_encoder(tokenizer, dtype, field=""):
    """A function: text -> its ids as bytes of dtype; from a WordCache where that is exact.

    field: the text_field; where it names ids of an MDS shard, these are taken as they are."""
    if holds_ids(field):
        return ids_encoder(tokenizer.vocab_size, dtype)
    cache = None
    if word_by_word(tokenizer):
        cache = WordCache(tokenizer, dtype)

    def encode(text):
        # sentencepiece reads its own blank in a text as a blank
        if cache is None or SENTENCEPIECE_BLANK in text:
            return np.array(tokenizer.encode(text), dtype).tobytes()
        return cache.encode(text)

    return encode


class WordCache:
    """The ids of words, with the blanks before them, as bytes."""

    words = re.compile(r" *[^ \n]+|\n| +")

    def __init__(self, tokenizer, dtype, most=4_000_000):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.most = most  # characters to keep: some 80 MB in each process
        self.newline = tokenizer.encode("\n")[-1]
        self.forget()

    def forget(self):
        self.known = {"\n": np.array([self.newline], self.dtype).tobytes()}
        self.chars = 0

    def encode(self, text):
        if not text:
            return b""
        if self.chars > self.most:
            self.forget()
        # sentencepiece puts a blank before a text
        words = self.words.findall(" " + text)
        new = list(set(words).difference(self.known))
        if new:
            self.learn(new)
        return b"".join([self.known[word] for word in words])

    def learn(self, words):
        """Encode words together, a line each: that is faster than one by one."""
        ids = np.array(self.tokenizer.encode("\n" + "\n".join(words)), self.dtype)
        # a blank, which sentencepiece puts first, then newline, word, newline, word, ...
        newlines = np.flatnonzero(ids == self.newline).tolist()
        ends = newlines[1:] + [len(ids)]
        for word, newline, end in zip(words, newlines, ends, strict=True):
            self.known[word] = ids[newline + 1:end].tobytes()
            self.chars += len(word)


def word_by_word(tokenizer):
    """Whether a tokenizer encodes each word, with the blanks before it, and each newline alone."""
    if not tokenizer.name.startswith("sentencepiece"):
        return False
    # no piece holds a blank behind other text, or a newline beside other text
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.decode([i])
        if piece == " ⁇ ":  # the unknown token, which stands for no text
            continue
        if re.search(r"[^ ] |.\n|\n.", piece):
            return False
    if len(tokenizer.encode("\n")) != 2:  # the blank, and one id
        return False
    # a normalizer that rewrites text shows here
    probe = "a b  c\n d\n\n\te \n　é ﬁ ½\u00a0x  " * 2
    whole = np.array(tokenizer.encode(probe), np.uint32).tobytes()
    return WordCache(tokenizer, np.uint32).encode(probe) == whole
