"""
Stage 1: text, prompt/response records or conversations -> token files that train.py memory-maps.

    python prepare_data.py --source=notes.txt --tokenizer=models/llama2 --out_dir=data/notes
    python prepare_data.py --kind=ift --source=gsm8k/train.jsonl --tokenizer=models/llama2 --out_dir=data/gsm8k \\
        --template='Question: {question}\\nAnswer:' --response_field=answer
    python prepare_data.py --preset=magicoder --tokenizer=models/llama2 --out_dir=data/magicoder   # fetched from the hub
    python prepare_data.py --inspect=data/magicoder                  # what is in it, with its checksums verified

out_dir then holds, for SPLIT in train and val (raw little-endian arrays without a header):
    SPLIT.bin        token ids [rows * seq_len]: uint16, or uint32 for a vocabulary above 65,536
    SPLIT.docs.bin   uint64, ascending: where in SPLIT.bin each document starts; a row's padding counts as a document
    SPLIT.mask.bin   ift only, uint8 a token: 1 where it is a target (response, EOS), 0 for BOS, prompt and padding
    meta.json        kind, dtype, seq_len, special ids, counts, every knob, and the sha256 of all that went in and out
A cpt row is a window of the stream BOS document EOS BOS document EOS ...; an ift row is whole examples, then padding.

The work is cut into blocks, and what becomes of a block is kept in out_dir.work until the whole is done: a run that was
killed goes on with the blocks that are missing, and neither that nor the number of workers changes a byte of the output.
"""
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from configurator import configure, knob_table
from records import (CHATS, eval_ngrams, expand, id_of, ngrams, parse, pystdlib, read_records, read_template,
                     toy_math, turns_of, unescape)
from runtime import fsync_folder, one_line_errors
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# what goes in
preset = ''                  # a dataset of the paper by name, see PRESETS below; knobs given beside it win over its own
source = ()                  # files (.parquet .jsonl .json .txt, the last three also .gz), globs, folders of source files,
                             # hf://datasets/OWNER/NAME@REVISION/GLOB, and toy_math and pystdlib, which are made here
val_source = ()              # the same for val; () = hold out a part of source
val_fraction = 0.05          # that part, by a hash of the text (ift: of the prompt), in whatever order; 0 = no val
kind = 'cpt'                 # 'cpt' = documents as one stream | 'ift' = prompts and responses, only responses learned
text_field = 'text'          # cpt: the field of a record that holds the document
prompt_field = 'prompt'      # ift: the field that holds the prompt
response_field = 'response'  # ift: the field that holds the response
messages_field = 'messages'  # ift with a chat template: the field that holds the turns, [{"role", "content"}]
template = 'none'            # none | alpaca | magicoder, around the prompt | tulu | llama2, for messages; or a text of yours
                             # with any fields of the record, 'Question: {question}\nAnswer:'
response_prefix = ''         # ift: stands before a response; ' ' for byte-level BPE, '' for sentencepiece (has its own)
suffixes = ('.py',)          # which files of a folder are documents
txt_split = ''               # what stands between the documents of a .txt file, such as '\n\n'; '' = it is one document
max_records = 0              # read at most so many records of each file; 0 = all
max_tokens = 0               # train: a sample of the documents, by hash, that just reaches so many tokens; 0 = all
decontaminate = ()           # files of eval sets: a document that shares 13 words in a row with a record of them is dropped
id_field = ''                # a field that no two records may have the same; '' = not checked
on_bad_record = 'error'      # 'error' = stop and name file:record | 'skip' = count it and go on
toy_records = 10000          # how many problems toy_math makes
toy_seed = 1                 # and from which seed
# how it becomes tokens
tokenizer = ''               # tokenizer.model or tokenizer.json, or the folder that holds it
seq_len = 1024               # tokens a row
add_bos = True               # BOS before each document or prompt
add_eos = True               # EOS after each document or response
train_on_prompt = False      # ift: prompts are targets as well
train_on_prompt_from = 0     # and then only those of so many tokens or more
train_on_turns = 'last'      # ift: 'last' = only the last response of a conversation is a target, as in the paper | 'all'
packing = 'best_fit'         # ift: 'best_fit' = fewest rows | 'paper' = llm-foundry's first-fit | 'none' = one example a row
packing_ratio = 0.0          # paper: examples packed into a row on average; 0 = llm-foundry's 'auto'
packing_seed = 17            # paper: of the order of the examples
paper_ranks = 32             # paper: GPUs, each of which packs its own share
paper_batch = 6              # paper: rows a GPU and step. Rows stand in the order of its steps: --shuffle=False in train.py
# where it goes
out_dir = ''                 # a new folder, such as data/gsm8k
overwrite = False            # replace the data that is there
keep_records = False         # also write the records of each split as SPLIT.jsonl: val.jsonl is a test set for an eval
inspect = ''                 # do nothing but show and verify the data of this folder
# how fast
workers = 0                  # processes that tokenize; 0 = one a core, but no more than there are blocks
block_mb = 8.0               # text a block; workers hold about two each
word_cache = True            # remember the ids of words where that is exact (sentencepiece): several times as fast
_choices = {'kind': ('cpt', 'ift'), 'on_bad_record': ('error', 'skip'), 'packing': ('best_fit', 'paper', 'none'),
            'train_on_turns': ('last', 'all')}
# knobs that change no byte of the output
_free = {'workers', 'block_mb', 'overwrite', 'inspect', 'word_cache'}

# Datasets of the paper, each with its licence, size as published and tokens as in the paper. The time is an estimate from
# 3 bytes a token and 5 MB/s a core, which is what a core of a server does; a run prints its own. Revisions are pinned.
PRESETS = {
    # code cpt: gated (terms of The Stack, licences of the files), Python subset; the paper takes 20B tokens of it. 40 GB of
    # tokens, and as much again in out_dir.work while it runs; 3.5 hours of one core
    "starcoder_python": dict(
        source=("hf://datasets/bigcode/starcoderdata@9fc30b578cedaec69e47302df72cf00feed7c8c4/python/*.parquet",),
        text_field="content", kind="cpt", seq_len=4096, max_tokens=20_000_000_000, val_fraction=0.0005),
    # math cpt: ODC-By 1.0, 6,315,233 documents in 27 GB of parquet; 14.7B tokens, which training repeats to 20B; 2.5 hours
    "openwebmath": dict(
        source=("hf://datasets/open-web-math/open-web-math@fde8ef8de2300f5e778f56261843dab89f230815/data/*.parquet",),
        text_field="text", kind="cpt", seq_len=4096, val_fraction=0.0005),
    # code ift: Apache-2.0, 111,183 records; 72.97M tokens and 193 steps an epoch in the paper; a minute
    "magicoder": dict(
        source=("hf://datasets/ise-uiuc/Magicoder-Evol-Instruct-110K@b0079beaa0361d82412520b873715bee59cc7dd4/*.jsonl",),
        prompt_field="instruction", response_field="response", kind="ift", seq_len=4096, val_fraction=0.0),
    # math ift: MIT, 395,000 records; about 103M tokens an epoch in the paper, 24 rows a GPU; a minute
    "metamathqa": dict(
        source=("hf://datasets/meta-math/MetaMathQA@aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18/MetaMathQA-395K.json",),
        prompt_field="query", response_field="response", kind="ift", seq_len=1024, paper_batch=24, val_fraction=0.0),
    # chat ift: ODC-By, about 326,000 conversations, the tokens of which the paper does not say; some minutes
    "tulu_v2": dict(
        source=("hf://datasets/allenai/tulu-v2-sft-mixture@6248b175d2ccb5ec7c4aeb22e6d8ee3b21b2c752/data/*.parquet",),
        template="tulu", kind="ift", seq_len=4096, val_fraction=0.0)}

# -----------------------------------------------------------------------------
# Tokens

class WordCache:
    """The ids of words, with the blanks before them, as bytes. Those not met before are encoded together, a line each."""
    words = re.compile(r" *[^ \n]+|\n| +")

    def __init__(self, tok, dtype, most=4_000_000):
        self.tok, self.dtype, self.most = tok, dtype, most  # characters to keep: some 80 MB in each process
        self.newline, self.known, self.chars = tok.encode("\n")[-1], {}, 0

    def encode(self, text):
        words = self.words.findall(" " + text) if text else []
        if self.chars > self.most or not self.known:
            self.known, self.chars = {"\n": np.array([self.newline], self.dtype).tobytes()}, 0
        if new := list(set(words).difference(self.known)):
            ids = np.array(self.tok.encode("\n" + "\n".join(new)), self.dtype)  # a blank, which sentencepiece puts first, then
            borders = [*np.flatnonzero(ids == self.newline).tolist(), len(ids)]  # newline, word, newline, word, ...
            self.known.update((word, ids[a + 1:b].tobytes())
                              for word, (a, b) in zip(new, itertools.pairwise(borders), strict=True))
            self.chars += sum(map(len, new))
        return b"".join(map(self.known.__getitem__, words))


def word_by_word(tok):
    """Whether a tokenizer encodes words, with the blanks before them, and newlines each by itself: no token reaches from
    one into the next, so that BPE, which only ever joins neighbours to a token, cannot either."""
    if not tok.name.startswith("sentencepiece"):
        return False
    pieces = {tok.decode([i]) for i in range(tok.vocab_size)} - {" ⁇ "}  # the unknown token, which stands for no text
    probe = "a b  c\n d\n\n\te \n　é ﬁ ½\u00a0x  " * 2  # a normalizer that rewrites text shows here
    return (not any(re.search(r"[^ ] |.\n|\n.", piece) for piece in pieces) and len(tok.encode("\n")) == 2 and
            WordCache(tok, np.uint32).encode(probe) == np.array(tok.encode(probe), np.uint32).tobytes())


def make_encoder(tok, dtype, word_cache):
    """-> function: text -> its ids as bytes of dtype, without BOS and EOS."""
    cache, count = WordCache(tok, dtype) if word_cache and word_by_word(tok) else None, itertools.count()

    def encode(text):
        if cache is None or "▁" in text:  # sentencepiece's own blank
            return np.array(tok.encode(text), dtype).tobytes()
        ids = cache.encode(text)
        if next(count) % 64 == 0 and len(text) < 100_000 and ids != np.array(tok.encode(text), dtype).tobytes():
            raise ValueError(f"word_cache: this tokenizer ({tok.name}) does not work word by word; say --word_cache=False")
        return ids

    return encode


def key_of(digest):
    """The first 64 bits of a sha256."""
    return int.from_bytes(digest[:8], "big")


def goes_to_val(digest, fraction):
    """Whether a text is held out: a pure function of its sha256, so that the order of the records does not matter."""
    return key_of(digest) < fraction * 2**64


def encode_turns(encode, turns, seq_len, bos=b"", eos=b"", itemsize=2, bos_each=False, learn_all=False, prompt_from=None):
    """Turns [(read, learned)] -> (ids as bytes, mask as bytes, why it is dropped or ''), not cut to seq_len.

    As llm-foundry 0.9 has it: each text is tokenized by itself; text never becomes a special id; the last response is
    learned, with its EOS (learn_all: every one), and prompts of at least prompt_from tokens (None: none). An example
    that has no target within seq_len, EOS aside, is dropped. Its first token has nothing before it to be told from.
    """
    ids, mask = b"", b""
    for number, (read, response) in enumerate(turns):
        head, body = (bos if bos_each or not number else b"") + encode(read), encode(response)
        learn_head = prompt_from is not None and len(head) // itemsize >= prompt_from
        learn_body = learn_all or number == len(turns) - 1
        mask += bytes([learn_head]) * (len(head) // itemsize) + bytes([learn_body]) * (len(body) // itemsize)
        reason = "" if b"\1" in mask[1:seq_len] else "no room" if body else "empty"
        ids, mask = ids + head + body + eos, mask + bytes([learn_body]) * bool(eos)
    return ids, b"\0" + mask[1:], reason


DOCUMENT = np.dtype([("length", "<u4"), ("lost", "<u4"), ("chars", "<u4"), ("number", "<u4"), ("key", "<u8"), ("id", "<u8"),
                     ("val", "?")])  # what a block knows of each of its documents; number is its record's


def encode_block(job, name, side, items):
    """The records of a block -> the arrays of its shard. Raises ValueError with file:record for a bad record."""
    ids, masks, documents, copies, bad, text_bytes = [], [], [], [], [], 0
    dropped, hits = {"train": Counter(), "val": Counter()}, set()
    for number, raw in items:
        try:
            record = parse(raw)
            turns, identity = turns_of(record, job), id_of(record, job.id_field) if job.id_field else b""
        except ValueError as error:
            bad.append(f"{name}{'/' if isinstance(number, str) else ':'}{number}: {error}")
            if job.on_bad_record == "error":
                raise ValueError(bad[0]) from None
            continue
        texts = [text for turn in turns for text in turn]
        digest = hashlib.sha256((texts[0] or texts[1]).encode()).digest()
        val = side == "val" or not side and goes_to_val(digest, job.val_fraction)
        if job.kind == "ift":
            encoded, mask, reason = encode_turns(
                job.encode, turns, job.seq_len, job.bos, job.eos, job.dtype.itemsize, job.template == "llama2",
                job.train_on_turns == "all", job.train_on_prompt_from if job.train_on_prompt else None)
        else:
            encoded, mask, reason = job.bos + job.encode(texts[1]) + job.eos, b"", "" if texts[1].strip() else "empty"
        if not reason and job.eval_ngrams:
            found = {job.eval_ngrams[gram] for text in texts for gram in ngrams(text) if gram in job.eval_ngrams}
            reason, hits = "contaminated" if found else "", hits | found
        if reason:
            dropped["val" if val else "train"][reason] += 1
            continue
        length = len(encoded) // job.dtype.itemsize
        kept = min(length, job.seq_len) if job.kind == "ift" else length
        ids.append(encoded[:kept * job.dtype.itemsize])
        masks.append(mask[:kept])
        copies += [json.dumps(record, default=str) + "\n"] if job.keep_records else []
        text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        documents.append((kept, length - kept, sum(map(len, texts)), number if isinstance(number, int) else 0,
                          key_of(digest[8:]), key_of(hashlib.sha256(identity).digest()), val))
    info = {"name": name, "source": name + side, "records": len(items), "bad": len(bad), "bad_first": bad[:5], "dropped": dropped,
            "hits": sorted(hits), "text_bytes": text_bytes}
    return {"documents": np.array(documents, DOCUMENT), "ids": np.frombuffer(b"".join(ids), job.dtype),
            "mask": np.frombuffer(b"".join(masks), np.uint8), "copies": np.frombuffer("".join(copies).encode(), np.uint8),
            "info": np.frombuffer(json.dumps(info).encode(), np.uint8)}

# -----------------------------------------------------------------------------
# Blocks, and the processes that encode them

def blocks(sources, job, bar_used):
    """Yield (name of the source, side, [(number, raw)]), a function of the input and block_mb alone; bar_used(n) hears
    of the bytes read."""
    for source, side in sources:
        items, weight, before = [], 0, 0
        records = read_records(source, job.text_field, job.txt_split, None if job.keep_records else job.fields)
        for number, raw, used in itertools.islice(records, job.max_records or None):
            items.append((number, raw))
            weight += len(raw) if isinstance(raw, bytes) else used - before
            bar_used(used - before)
            before = used
            if weight >= job.block_mb * 1e6:
                yield source.name, side, items
                items, weight = [], 0
        if items:
            yield source.name, side, items
        bar_used(source.size() - before)


def write_shard(job, path, *block):
    """Encode a block and store it under `path`, whole or not at all; returns (seconds that took, MB of text)."""
    started, (name, _, items) = time.perf_counter(), block
    try:
        shard = encode_block(job, *block)
    except MemoryError:
        raise OSError(f"{name}: memory ran out at the records from {items[0][0]} to {items[-1][0]}; lower --workers, or "
                      "--block_mb if these are many") from None
    part = f"{path}.{os.getpid()}.part"  # of a run that was killed a worker may still write for a moment
    with open(part, "wb") as file:
        np.savez(file, **shard)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    return np.array([time.perf_counter() - started, json.loads(shard["info"].tobytes())["text_bytes"] / 1e6])


def start_worker(job):
    """In each process: keep the job, leave Ctrl-C to the parent, and end when the parent is gone, even by kill -9."""
    global _job
    _job, parent = job, os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def write_shard_here(path, *block):
    return write_shard(_job, path, *block)


def encode_blocks(sources, job, work, workers):
    """Write the shards that are missing in `work`; returns (number of all shards, [seconds of work, MB of text] of these).
    The blocks are read here and encoded by the workers, at most two a worker at a time."""
    total, done, count = sum(source.size() for source, _ in sources), np.zeros(2), 0
    pool, waiting = None, deque()
    if workers > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker, (job,))
        pool.submit(int).result()  # all processes start now, before anything else runs here

    try:
        with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None, desc="tokenize") as bar:
            for count, block in enumerate(blocks(sources, job, bar.update), 1):
                path = f"{work}/{count:06d}.npz"
                if not os.path.exists(path):
                    if not pool:
                        done += write_shard(job, path, *block)
                        continue
                    waiting.append(pool.submit(write_shard_here, path, *block))
                    if len(waiting) > 2 * workers:
                        done += waiting.popleft().result()
            done += sum((future.result() for future in waiting), np.zeros(2))
    except BrokenProcessPool:
        raise OSError("a worker process died (was it killed for want of memory?); the same command goes on") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return count, done

# -----------------------------------------------------------------------------
# Shards to splits

def shards(work, count, desc):
    """Yield the shards, {name: array}, each array read when it is asked for."""
    for number in tqdm(range(1, count + 1), desc=desc, leave=False, disable=None):
        with np.load(f"{work}/{number:06d}.npz") as shard:
            yield shard


def sample_limit(work, count, most):
    """The key below which the train documents of all shards just reach `most` tokens; 2^64 if they do not. Keys are
    hashes, so this is a random sample that neither the order of the files nor of the records changes."""
    prefix, below = 0, 0  # the first bits of the last key that is in, and the tokens of all keys below them
    for shift in (48, 32, 16, 0):  # 16 bits more: count the tokens for each of their 65,536 values
        tokens = np.zeros(65536, np.int64)
        for shard in shards(work, count, "sample"):
            documents = shard["documents"][~shard["documents"]["val"]]
            high, bits = documents["key"] >> np.uint64(shift), documents["key"] >> np.uint64(shift) & np.uint64(0xFFFF)
            here = high >> np.uint64(16) == prefix
            tokens += np.bincount(bits[here].astype(np.int64), documents["length"][here], 65536).astype(np.int64)
        reached = below + np.cumsum(tokens)
        if reached[-1] < most:
            return 2**64
        last = int(np.searchsorted(reached, most))
        prefix, below = prefix << 16 | last, int(reached[last] - tokens[last])
    return prefix + 1


def repeated_ids(work, count, id_field, on_bad_record):
    """For each shard which of its documents have an id that was seen before; ValueError names the first, on 'error'."""
    seen, places = [], []
    for shard in shards(work, count, "ids"):
        seen.append(shard["documents"]["id"])
        name = json.loads(shard["info"].tobytes())["name"]
        places.append((name, shard["documents"]["number"]))
    keys = np.concatenate(seen)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    repeated = first[inverse] != np.arange(len(keys))
    if repeated.any() and on_bad_record == "error":
        flat = [f"{name}:{number}" for name, numbers in places for number in numbers]
        at = int(np.flatnonzero(repeated)[0])
        raise ValueError(f"{flat[at]}: {id_field} is the same as that of {flat[first[inverse[at]]]}")
    return np.split(repeated, np.cumsum([len(part) for part in seen])[:-1])


class Split:
    """Train or val in the making: its documents go to files as they come, end to end."""

    def __init__(self, folder, name, dtype, masked, copied=False):
        self.folder, self.name, self.dtype, self.total = folder, name, dtype, 0
        self.path = f"{folder}/{name}.{'stream' if masked else 'bin'}"
        self.ids, self.starts = open(self.path, "wb"), open(f"{folder}/{name}.docs.bin", "wb")
        self.mask = open(self.path + ".mask", "wb") if masked else None
        self.copies = open(f"{folder}/{name}.jsonl", "wb") if copied else None
        self.counts, self.dropped = Counter(documents=0, truncated=0, lost=0, chars=0), Counter()
        self.histogram = np.zeros(40, np.int64)  # documents of 2^k to 2^(k+1) - 1 tokens

    def add(self, shard, here):
        """Write those documents of a shard that the mask `here` names."""
        documents, tokens = shard["documents"][here], np.repeat(here, shard["documents"]["length"])
        lengths = documents["length"].astype(np.int64)
        ends = self.total + np.cumsum(lengths)
        self.starts.write((ends - lengths).astype("<u8").tobytes())
        self.ids.write(shard["ids"][tokens].tobytes())
        if self.mask:
            self.mask.write(shard["mask"][tokens].tobytes())
        if self.copies:
            lines = shard["copies"].tobytes().splitlines(True)
            self.copies.write(b"".join(itertools.compress(lines, here)))
        self.total += int(lengths.sum())
        self.histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=40)
        self.counts.update(documents=len(lengths), truncated=int((documents["lost"] > 0).sum()),
                           lost=int(documents["lost"].sum()), chars=int(documents["chars"].sum()))

    def close(self):
        for file in filter(None, (self.ids, self.starts, self.mask, self.copies)):
            file.close()

    def lengths(self):
        return np.diff(np.append(np.fromfile(self.starts.name, "<u8"), np.uint64(self.total))).tolist()

    def summary(self, **more):
        """The counts for meta.json."""
        last = int(np.flatnonzero(self.histogram)[-1]) + 1
        return {**self.counts, **more, "dropped": self.dropped.total(), "dropped_why": dict(+self.dropped),
                "lengths": self.histogram[:last].tolist(), "sha256": file_sha256(f"{self.folder}/{self.name}.bin")}


def fill_splits(splits, work, count, limit=2**64, repeated=None):
    """Deal the documents of all shards to the splits, in their order: those of train whose key is below `limit`, and none
    that `repeated` names. Returns what the blocks counted."""
    total = {"records": Counter(), "bad": 0, "bad_first": [], "hits": set()}
    for number, shard in enumerate(map(dict, shards(work, count, "write"))):  # dict: each array is read once
        documents, info = shard["documents"], json.loads(shard["info"].tobytes())
        total["records"][info["source"]] += info["records"]
        total["bad"] += info["bad"]
        total["bad_first"] = (total["bad_first"] + info["bad_first"])[:5]
        total["hits"] |= {*info["hits"]}
        again = repeated[number] if repeated else np.zeros(len(documents), bool)
        sampled = documents["val"] | (documents["key"] < limit)
        for name, split in splits.items():
            here = documents["val"] == (name == "val")
            split.dropped.update(info["dropped"][name])
            split.dropped.update({"repeated id": int((here & again).sum()), "not sampled": int((here & ~again & ~sampled).sum())})
            split.add(shard, here & sampled & ~again)
    for split in splits.values():
        split.close()
    return total


def finish_cpt(split, seq_len):
    """Cut the stream to whole rows; returns the counts for meta.json."""
    rows, lost = divmod(split.total, seq_len)
    os.truncate(split.path, rows * seq_len * split.dtype.itemsize)
    documents = int(np.searchsorted(np.memmap(split.starts.name, "<u8", "r"), rows * seq_len))
    os.truncate(split.starts.name, 8 * documents)
    return split.summary(tokens=rows * seq_len, rows=rows, documents=documents, targets=rows * seq_len, padding=0, lost=lost)


def finish_ift(split, rows, seq_len, pad, **more):
    """Write the examples of each row, then padding, with their masks; returns the counts for meta.json."""
    starts = np.append(np.fromfile(split.starts.name, "<u8"), np.uint64(split.total)).tolist()
    stream, stream_mask = np.memmap(split.path, split.dtype, "r"), np.memmap(split.path + ".mask", np.uint8, "r")
    docs, targets, filled = [], 0, 0
    with open(f"{split.folder}/{split.name}.bin", "wb") as ids_file, \
            open(f"{split.folder}/{split.name}.mask.bin", "wb") as mask_file:
        for number, row in enumerate(tqdm(rows, desc="rows", leave=False, disable=None)):
            ids, mask, at = np.full(seq_len, pad, split.dtype), np.zeros(seq_len, np.uint8), 0
            for example in row:
                docs.append(number * seq_len + at)
                start, stop = starts[example:example + 2]
                end = at + stop - start
                ids[at:end], mask[at:end] = stream[start:stop], stream_mask[start:stop]
                at = end
            if at < seq_len:
                docs.append(number * seq_len + at)
            targets, filled = targets + int(mask.sum()), filled + at
            ids_file.write(ids.tobytes())
            mask_file.write(mask.tobytes())
    np.array(docs, "<u8").tofile(split.starts.name)
    os.unlink(split.path)
    os.unlink(split.path + ".mask")
    packed = sum(map(len, rows))
    return split.summary(tokens=len(rows) * seq_len, rows=len(rows), documents=packed, targets=targets,
                         padding=len(rows) * seq_len - filled, unpacked=split.counts["documents"] - packed, **more)

# -----------------------------------------------------------------------------
# Packing: lengths in [1, seq_len] -> rows, each a list of examples

def pack_best_fit(lengths, seq_len):
    """Every example once, in few rows; each row ascending, rows in the order of their first example.

    Best-fit decreasing: the longest example first, each into the fullest row that has room. Rows are filed under the
    space they have left, and the bits of one integer say which spaces exist, so no example ever searches.
    """
    rows, by_space, exist = [], [[] for _ in range(seq_len + 1)], 0
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # ties stay in order
        length = lengths[example]
        fitting = exist >> length
        space = length + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
        if fitting:
            row = by_space[space].pop()
            exist ^= (not by_space[space]) << space
        else:
            rows.append(row := [])
        row.append(example)
        by_space[space - length].append(row)
        exist |= 1 << (space - length)
    return sorted(map(sorted, rows))


def pack_first_fit(examples, lengths, seq_len, batch, leftover=()):
    """One call of llm-foundry 0.9's packer: (the `batch` fullest rows, the others), as [(tokens, [example])].

    Longest first, each into the first row that has room, which then moves to the end of the line; what is left over from
    the call before stands in that line. The last examples get rows of their own if rows would be missing otherwise.
    """
    rows = [(size, list(row)) for size, row in leftover]
    examples = sorted(examples, key=lambda i: -lengths[i])
    for number, example in enumerate(examples):
        may_join = len(examples) - number > batch - len(rows)
        at = next((i for i, (size, _) in enumerate(rows) if size + lengths[example] <= seq_len), None) if may_join else None
        size, row = (0, []) if at is None else rows.pop(at)
        rows.append((size + lengths[example], row + [example]))
    rows.sort(key=lambda row: -row[0])
    return rows[:batch], rows[batch:]


def packed_share(examples, lengths, seq_len, batch, ratio):
    """(rows, leftover) of packing examples int(ratio * batch) at a time; a last group of fewer than `batch` is left out."""
    rows, leftover, group = [], [], int(ratio * batch)
    for at in range(0, len(examples), group):
        if len(part := examples[at:at + group]) >= batch:
            full, leftover = pack_first_fit(part, lengths, seq_len, batch, leftover)
            rows += full
    return rows, leftover


def auto_ratio(examples, lengths, seq_len, batch):
    """llm-foundry's packing_ratio 'auto': the highest of 20 ratios from 1 to seq_len / 100 before the first that leaves
    anything over, tried on the first 100 groups' worth of examples."""
    ratios = [round(ratio, 1) for ratio in np.linspace(1, max(1, seq_len / 100), 20).tolist()]
    examples, best = examples[:100 * int(ratios[-1] * batch)], 1.0
    for ratio in ratios:
        if packed_share(examples, lengths, seq_len, batch, ratio)[1]:
            break
        best = ratio
    return best


def pack_paper(lengths, seq_len, ranks, batch, ratio, seed):
    """An epoch of the paper's stack -> (rows in the order of its steps, ranks * batch each; ratio).

    Examples are shuffled and dealt to the ranks, which drop a last one that not all get, and each rank packs
    int(ratio * batch) of its own a step; a last incomplete group is dropped. Ratio 0: 'auto', the least of all ranks."""
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(lengths)).tolist()
    shares = [order[rank::ranks][:len(lengths) // ranks] for rank in range(ranks)]
    ratio = ratio or min(auto_ratio(share, lengths, seq_len, batch)
                         for share in tqdm(shares, desc="packing_ratio", leave=False, disable=None))
    group = int(ratio * batch)
    steps = len(shares[0]) // group
    packed = [packed_share(share[:steps * group], lengths, seq_len, batch, ratio)[0] for share in shares]
    rows = [row for step in range(steps) for rows in packed for _, row in rows[step * batch:(step + 1) * batch]]
    return rows, ratio


def finish(split, job, pad):
    """A filled split -> its final files; returns the counts for meta.json. ValueError if it makes no row."""
    if not split.total or job.kind == "cpt" and split.total < job.seq_len:
        remedy = {"train": "see source and the fields", "val": "documents are held out whole: give val_source, txt_split or "
                  "--val_fraction=0"}[split.name]
        raise ValueError(f"{split.name}: {split.counts['documents']} documents, {split.total} tokens make no row of "
                         f"{job.seq_len} ({split.dropped.total()} dropped); {remedy}")
    if job.kind == "cpt":
        return finish_cpt(split, job.seq_len)
    lengths = split.lengths()
    if job.packing == "none":
        return finish_ift(split, [[example] for example in range(len(lengths))], job.seq_len, pad)
    if job.packing == "best_fit" or split.name == "val":  # of val no steps are made
        return finish_ift(split, pack_best_fit(lengths, job.seq_len), job.seq_len, pad)
    rows, ratio = pack_paper(lengths, job.seq_len, job.paper_ranks, job.paper_batch, job.packing_ratio, job.packing_seed)
    if not rows:
        raise ValueError(f"packing: {len(lengths)} examples make no step of {job.paper_ranks} GPUs with "
                         f"{int(ratio * job.paper_batch)} each; lower --paper_ranks")
    return finish_ift(split, rows, job.seq_len, pad, packing_ratio=ratio, steps=len(rows) // (job.paper_ranks * job.paper_batch))

# -----------------------------------------------------------------------------
# What is in a folder

def show_document(folder, name, meta, tok, which, most=400):
    """Document `which` of a split as the files have it: what is only read in [brackets], what is learned in «angles»."""
    ids, mask_path = np.memmap(f"{folder}/{name}.bin", meta["dtype"], "r"), Path(folder, f"{name}.mask.bin")
    starts = np.memmap(f"{folder}/{name}.docs.bin", "<u8", "r")
    start, end = [*starts[which:which + 2].tolist(), len(ids)][:2]
    ids, left_out = ids[start:min(end, start + most)].tolist(), max(0, end - start - most)
    mask = np.fromfile(mask_path, np.int8, len(ids), offset=start) if mask_path.exists() else np.ones(len(ids))
    shown, before = "", ""
    for a, b in itertools.pairwise([0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]):
        text = tok.decode([i for i in ids[:b] if i not in (tok.bos_id, tok.eos_id)])
        piece = "<BOS>" * (ids[a] == tok.bos_id) + text[len(before):] + "<EOS>" * (ids[b - 1] == tok.eos_id)
        shown, before = shown + (f"«{piece}»" if mask[a] else f"[{piece}]"), text
    return shown + f" and {left_out} tokens more" * bool(left_out)


def examples_of(folder, name, meta, tok):
    """The first document of a split, one from the middle and the last one, as shown text; padding, which is a document
    without a target, gives way to what stands before it."""
    starts = np.memmap(f"{folder}/{name}.docs.bin", "<u8", "r")
    places = {0, len(starts) // 2, len(starts) - 1}
    if meta["kind"] == "ift":
        mask, borders = np.memmap(f"{folder}/{name}.mask.bin", np.uint8, "r"), [*starts.tolist(), None]
        places = {place - (not mask[borders[place]:borders[place + 1]].any()) for place in places}
    return [show_document(folder, name, meta, tok, place) for place in sorted(places)]


def print_report(meta):
    """All that meta.json says about its data, for reading."""
    for entry in meta["source"]:
        print(f"{entry['path']}: {entry['records']:,} records, {entry['bytes']:,} bytes, sha256 {entry['sha256'][:12]}")
    print(f"{meta['skipped']:,} bad records skipped", *meta["skipped_first"], sep="\n  ")
    for entry in meta["decontaminated"]:
        print(f"decontamination: {entry['path']}: {entry['records']:,} records, {entry['short']:,} of them too short to be "
              "found by 13 words")
    if meta["decontaminated"]:
        print(f"decontamination: {meta['eval_records_found']:,} eval records were found in the data")
    for name, counts in meta["splits"].items():
        used = counts["tokens"] - counts["padding"]
        why = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped_why"].items()) or "none"
        print(f"{name}: {counts['documents']:,} documents in {counts['rows']:,} rows of {meta['seq_len']}; "
              f"{counts['tokens']:,} tokens, {counts['targets']:,} of them targets, {used / counts['tokens']:.2%} filled, "
              f"{counts['chars'] / (used + counts['lost']):.2f} chars a token; {counts['dropped']:,} documents dropped ({why}), "
              f"{counts['truncated']:,} truncated, {counts['lost']:,} tokens cut off")
        if "steps" in counts:
            print(f"{name}: packing_ratio {counts['packing_ratio']}: {counts['steps']:,} steps of "
                  f"{counts['rows'] // counts['steps']} rows an epoch; {counts['unpacked']:,} documents left over")
        most = max(counts["lengths"])
        for power, count in enumerate(counts["lengths"]):
            if count:
                print(f"  {2 ** power:9,} to {2 ** (power + 1) - 1:9,} tokens {count:10,}  {'#' * -(-40 * count // most)}")
    print("documents of train, [read only] and «learned»:", *meta["examples"], sep="\n")


def inspect_folder(folder):
    """Print the report of a data folder and verify its files. Raises OSError or ValueError."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        print_report(meta)
        files = meta["files"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}/meta.json: not a whole meta.json of this script ({error!r})") from None
    for name, digest in files.items():
        if not os.path.isfile(f"{folder}/{name}"):
            raise ValueError(f"{folder}/{name}: missing")
        if (found := file_sha256(f"{folder}/{name}")) != digest:
            raise ValueError(f"{folder}/{name}: sha256 is {found[:12]}, meta.json says {digest[:12]}; damaged or cut short")
    print(f"{len(files)} files as meta.json has them")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

# -----------------------------------------------------------------------------
# The folder

_ours = re.compile(r"(train|val)\.(bin|docs\.bin|mask\.bin|jsonl|stream|stream\.mask)|(meta|plan)\.json|\d+\.npz(\.\d+\.part)?")


def remove(folder):
    """Delete a folder of ours if it is there; OSError, and nothing is deleted, if it holds a file that is not ours."""
    if os.path.isdir(folder):
        check_ours(folder)
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def check_ours(folder):
    if foreign := [name for name in os.listdir(folder) if not _ours.fullmatch(name)]:
        raise FileExistsError(f"out_dir: {folder} holds {min(foreign)}, which is not of this script; not replaced")


def check_free(out, overwrite):
    """Refuse an out_dir that is there already; a kill between the two renames below left out.old, which comes back."""
    if os.path.exists(out + ".old") and not os.path.exists(out):
        os.rename(out + ".old", out)
    if os.path.exists(out) and os.listdir(out) and not overwrite:
        raise FileExistsError(f"out_dir: {out} is there already; --overwrite=True replaces it")
    if os.path.exists(out):
        check_ours(out)


def open_work(work, plan):
    """Make or enter the folder for shards, throw away those of another plan, and keep a second run out of it: returns a file
    that must stay open. Raises OSError if there is another run."""
    os.makedirs(work, exist_ok=True)
    check_ours(work)
    lock = open(f"{work}/plan.json", "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, and its workers do not inherit it
    except OSError:
        raise FileExistsError(f"out_dir: another run is at work in {work}") from None
    lock.seek(0)
    found = list(Path(work).glob("*.npz"))
    if lock.read() != plan:
        for path in Path(work).glob("*.npz*"):
            path.unlink()
        lock.truncate(0)
        print(plan, end="", file=lock, flush=True)
    elif found:
        print(f"going on with {len(found)} finished blocks of {work}")
    return lock


@contextmanager
def written_whole(out, plan):
    """Yield (a folder out.tmp to write into, a folder out.work for shards). The first gets the name `out`, in place of
    what was there, only when the block has ended well; the second outlives an error or a kill, and is used again by
    a run of the same plan. Raises OSError, also for a full disk."""
    tmp, old, work = out + ".tmp", out + ".old", out + ".work"
    lock = open_work(work, json.dumps(plan, indent=1))
    try:
        remove(old)
        remove(tmp)
        os.makedirs(tmp)
        yield tmp, work
        fsync_folder(tmp)
        if os.path.exists(out):
            os.rename(out, old)
        os.rename(tmp, out)
        remove(old)
        remove(work)
    except BaseException as error:
        if os.path.exists(old) and not os.path.exists(out):
            os.rename(old, out)
        remove(tmp)
        if len(list(Path(work).glob("*.npz"))) < 16:  # soon made again, so no litter after a mistake
            remove(work)
        if isinstance(error, KeyboardInterrupt):
            print("stopped; the same command goes on")
            raise SystemExit(130) from None
        if isinstance(error, OSError) and error.errno and not error.filename:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, tmp) from None
        raise
    finally:
        lock.close()

# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        globals().update(PRESETS.get(configure({**globals()})["preset"], {}))
        config = configure(globals())
        if inspect:
            inspect_folder(inspect)
            raise SystemExit(0)
        print(knob_table(globals()))
        for knob, fine, expected in [("preset", preset in ("", *PRESETS), f"one of {', '.join(PRESETS)}"),
                                     ("source", source, "at least one file"), ("out_dir", out_dir, "a folder's name"),
                                     ("tokenizer", tokenizer, "a tokenizer file or its folder"),
                                     ("seq_len", seq_len >= 2, "2 or more"), ("workers", workers >= 0, "0 or more"),
                                     ("block_mb", block_mb > 0, "more than 0"), ("suffixes", suffixes, "such as .py"),
                                     ("max_records", max_records >= 0, "0 or more"),
                                     ("max_tokens", max_tokens >= 0, "0 or more"),
                                     ("packing_ratio", packing_ratio == 0 or packing_ratio >= 1, "0 or from 1 up"),
                                     ("paper_ranks", paper_ranks >= 1, "1 or more"),
                                     ("paper_batch", paper_batch >= 1, "1 or more"),
                                     ("packing_seed", packing_seed >= 0, "0 or more"),
                                     ("train_on_prompt_from", train_on_prompt_from >= 0, "0 or more"),
                                     ("template", kind == "ift" or template not in CHATS, "kind=ift with messages"),
                                     ("val_fraction", 0 <= val_fraction < 1, "0 <= fraction < 1")]:
            if not fine:
                raise ValueError(f"{knob}: expected {expected}, found {config[knob]!r}")
        tok = load_tokenizer(tokenizer)
        for knob, wanted, special in [("add_bos", add_bos, tok.bos_id), ("add_eos", add_eos, tok.eos_id)]:
            if wanted and special is None:
                raise ValueError(f"{knob}: {tokenizer} has no such token; say --{knob}=False")
        out = os.path.normpath(out_dir)
        check_free(out, overwrite)

        # 1: what is asked for, and of what
        dtype = np.dtype("<u2" if tok.vocab_size <= 65536 else "<u4")
        bos, eos = (np.array([special] * wanted, dtype).tobytes()
                    for special, wanted in ((tok.bos_id, add_bos), (tok.eos_id, add_eos)))
        knobs = {**config, "response_prefix": unescape(response_prefix), "txt_split": unescape(txt_split)}
        job = SimpleNamespace(**knobs, dtype=dtype, bos=bos, eos=eos, encode=make_encoder(tok, dtype, word_cache))
        job.fields = [messages_field] if template in CHATS else [response_field] * (kind == "ift")  # and those of the template
        if template not in CHATS:
            job.template_text, job.template_fields = read_template(template, text_field if kind == "cpt" else prompt_field)
            job.fields += job.template_fields.values()
        job.fields += [id_field] * bool(id_field)
        made = {"toy_math": lambda: toy_math(toy_records, toy_seed), "pystdlib": pystdlib}
        sources = [(found, "train" if val_source else "") for found in expand(source, made, suffixes)]
        sources += [(found, "val") for found in expand(val_source, made, suffixes, "val_source")]
        size = sum(found.size() for found, _ in sources)
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None, desc="checksums") as bar:
            entries = [{"path": found.name, "sha256": found.sha256(bar.update), "bytes": found.size(), "records": 0,
                        **({"revision": found.revision} if found.revision else {})} for found, _ in sources]
        evals = expand(decontaminate, {}, suffixes, "decontaminate")
        job.eval_ngrams, eval_counts = eval_ngrams(evals)
        versions = {"python": platform.python_version(),
                    **{name: version(name) for name in ("numpy", "sentencepiece", "tiktoken")}}
        settings = {name: value for name, value in config.items() if name not in _free}
        plan = {"settings": {**settings, "on_bad_record": "", "block_mb": block_mb}, "source": entries, "versions": versions,
                "tokenizer": tok.sha256, "evals": [found.sha256(int) for found in evals],
                "code": [file_sha256(Path(__file__).with_name(f"{name}.py"))
                         for name in ("prepare_data", "records", "tokenizer")]}

        with written_whole(out, plan) as (folder, work):
            # 2: records to shards, by as many processes as are wanted
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            processes = workers or max(1, min(cores, int(size / (block_mb * 1e6))))
            started = time.perf_counter()
            count, (busy, text_mb) = encode_blocks(sources, job, work, processes)
            seconds = time.perf_counter() - started

            # 3: shards to the rows of each split
            splits = {name: Split(folder, name, dtype, kind == "ift", keep_records)
                      for name in (["train", "val"] if val_source or val_fraction else ["train"])}
            total = fill_splits(splits, work, count, sample_limit(work, count, max_tokens) if max_tokens else 2**64,
                                repeated_ids(work, count, id_field, on_bad_record) if id_field else None)
            pad = 0 if tok.eos_id is None else tok.eos_id
            meta = {"format": 1, "kind": kind, "dtype": dtype.name, "seq_len": seq_len, "vocab_size": tok.vocab_size,
                    "bos_id": tok.bos_id, "eos_id": tok.eos_id, "tokenizer_sha256": tok.sha256, "tokenizer_name": tok.name,
                    "source": [{**entry, "records": total["records"][entry["path"] + side]}
                               for entry, (_, side) in zip(entries, sources)],
                    "skipped": total["bad"], "skipped_first": total["bad_first"],
                    "decontaminated": [{"path": path, "records": n, "short": short} for path, n, short in eval_counts],
                    "eval_records_found": len(total["hits"]), "settings": settings, "versions": versions,
                    "splits": {name: finish(split, job, pad) for name, split in splits.items()}}
            hashed = {f"{name}.bin": counts["sha256"] for name, counts in meta["splits"].items()}  # tokens: read once
            meta["files"] = {name: hashed.get(name) or file_sha256(f"{folder}/{name}") for name in sorted(os.listdir(folder))}
            meta["examples"] = examples_of(folder, "train", meta, tok)
            Path(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")

        print_report(meta)
        print(f"tokenized {text_mb:,.1f} MB of text in {seconds:,.1f} s with {processes} processes: "
              f"{text_mb / seconds:.1f} MB/s, {text_mb / busy if busy else 0:.1f} MB/s of each while it worked\n-> {out_dir}")
