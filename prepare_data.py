r"""
Stage 1: text, prompt/response records or conversations -> token files that train.py memory-maps.

    python prepare_data.py --source=notes.txt --tokenizer=models/llama2 --out_dir=data/notes
    python prepare_data.py --kind=ift --source=gsm8k/train.jsonl --tokenizer=models/llama2 --out_dir=data/gsm8k \
        --template='Question: {question}\nAnswer:' --response_field=answer
    python prepare_data.py config/data/magicoder.py --tokenizer=models/llama2 --out_dir=data/magicoder   # fetched from the hub
    python prepare_data.py --inspect=data/magicoder                  # what is in it, with its checksums verified

out_dir then holds, for SPLIT in train and val (raw little-endian arrays without a header):
    SPLIT.bin        token ids [rows * seq_len]: uint16, or uint32 for a vocabulary above 65,536
    SPLIT.docs.bin   uint64, ascending: where in SPLIT.bin each document starts; a row's padding counts as a document
    SPLIT.mask.bin   ift only, uint8 a token: 1 where it is a target (response, EOS), 0 for BOS, prompt and padding
    meta.json        kind, dtype, seq_len, special ids, counts, every knob, and the sha256 of all that went in and out
A cpt row is a window of the stream BOS document EOS BOS document EOS ...; an ift row is whole examples, then padding.
With packing='paper' the rows of train are paper_epochs epochs, one after the other, in the order in which they are to be read.

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
import shutil
import signal
import struct
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from configurator import configure, knob_table
from text.packing import pack_best_fit, pack_no_wrap, pack_paper
from text.records import eval_ngrams, expand, ngrams, parse, read_records, text_of, unescape
from text.templates import CHATS, read_template, turns_of
from runtime import ROOT, fsync_folder, one_line_errors
from text.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# what goes in
source = ()                  # files (.parquet .jsonl .json .txt, the last three also .gz), globs, folders of source files,
                             # hf://datasets/OWNER/NAME@REVISION/GLOB
val_fraction = 0.05          # held out for val, by a hash of the text (ift: of the prompt), in whatever order; 0 = no val
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
# how it becomes tokens
tokenizer = ''               # tokenizer.model or tokenizer.json, or the folder that holds it
seq_len = 1024               # tokens a row
add_bos = True               # BOS before each document or prompt
add_eos = True               # EOS after each document or response
double_bos = False           # cpt: BOS twice, as llm-foundry has it where bos_text adds to what the tokenizer puts there
no_wrap = False              # cpt, llm-foundry's: what a row leaves of its last document is lost, the next row starts a new one
train_on_prompt = False      # ift: prompts are targets as well
train_on_prompt_from = 0     # and then only those of so many tokens or more
train_on_turns = 'last'      # ift: 'last' = only the last response of a conversation is a target, as in the paper | 'all'
packing = 'best_fit'         # ift: 'best_fit' = fewest rows | 'paper' = llm-foundry's first-fit | 'none' = one example a row
packing_ratio = 0.0          # paper: examples packed into a row on average; 0 = llm-foundry's 'auto'
packing_seed = 17            # paper: of the order of the examples
paper_ranks = 32             # paper: GPUs, each of which packs its own share
paper_batch = 6              # paper: rows a GPU and step; train.py takes them in their order, paper_ranks * paper_batch a step
paper_epochs = 1             # paper: so many epochs one after the other, each with an order and a packing of its own
# where it goes
out_dir = ''                 # a new folder, such as data/gsm8k
inspect = ''                 # do nothing but show and verify the data of this folder
# how fast
workers = 0                  # processes that tokenize; 0 = one a core, but no more than there are blocks
block_mb = 8.0               # text a block; workers hold about two each
_choices = {'kind': ('cpt', 'ift'), 'on_bad_record': ('error', 'skip'), 'packing': ('best_fit', 'paper', 'none'),
            'train_on_turns': ('last', 'all')}
# knobs that change no byte of the output
_free = {'workers', 'block_mb', 'inspect'}

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


def make_encoder(tok, dtype):
    """-> function: text -> its ids as bytes of dtype, without BOS and EOS; from a WordCache where that is exact."""
    cache = WordCache(tok, dtype) if word_by_word(tok) else None

    def encode(text):
        if cache is None or "▁" in text:  # sentencepiece's own blank
            return np.array(tok.encode(text), dtype).tobytes()
        return cache.encode(text)
    return encode


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


# What is known of each document: its tokens, those cut off, the number of its record, two hashes, whether it is held out, and
# why it is left out
DOCUMENT = np.dtype([("length", "<u4"), ("lost", "<u4"), ("number", "<u4"), ("key", "<u8"), ("id", "<u8"), ("val", "?"),
                     ("why", "u1")])
WHY = ("", "empty", "no room", "contaminated", "repeated id", "not sampled")


def hashes(text):
    """Four numbers below 2^64 that are a text's sha256."""
    return struct.unpack(">4Q", hashlib.sha256(text.encode()).digest())


def encode_block(job, name, items):
    """The records of a block -> the arrays of its shard. Raises ValueError with file:record for a bad record."""
    ids, masks, documents, bad, text_bytes = [], [], [], [], 0
    for number, raw in items:
        try:
            record = parse(raw)
            turns, identity = turns_of(record, job), text_of(record, job.id_field, (str, int)) if job.id_field else ""
        except ValueError as error:
            bad.append(f"{name}{'/' if isinstance(number, str) else ':'}{number}: {error}")
            if job.on_bad_record == "error":
                raise ValueError(bad[0]) from None
            continue
        texts = [text for turn in turns for text in turn]
        side, key, *_ = hashes(texts[0] or texts[1])  # the prompt, or the document
        encoded, mask, why = encode_turns(
            job.encode, turns, job.seq_len, job.bos, job.eos, job.dtype.itemsize, job.template == "llama2",
            job.train_on_turns == "all", job.train_on_prompt_from if job.train_on_prompt else None)
        length = len(encoded) // job.dtype.itemsize
        if job.kind == "cpt":
            mask, why = b"", "" if length and texts[1].strip() else "empty"
        if not why and any(gram in job.eval_ngrams for text in texts * bool(job.eval_ngrams) for gram in ngrams(text)):
            why = "contaminated"
        kept = 0 if why else length if job.kind == "cpt" else min(length, job.seq_len)
        ids.append(encoded[:kept * job.dtype.itemsize])
        masks.append(mask[:kept])
        text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        documents.append((kept, length - kept, number if isinstance(number, int) else 0, key, hashes(identity)[0],
                          side < job.val_fraction * 2**64, WHY.index(why)))
    info = {"name": name, "records": len(items), "bad": len(bad), "bad_first": bad[:5], "text_mb": text_bytes / 1e6}
    return {"documents": np.array(documents, DOCUMENT), "ids": np.frombuffer(b"".join(ids), job.dtype),
            "mask": np.frombuffer(b"".join(masks), np.uint8), "info": json.dumps(info)}

# -----------------------------------------------------------------------------
# Blocks, and the processes that encode them

def blocks(sources, job, bar_used):
    """Yield (name of the source, [(number, raw)]), a function of the input and block_mb alone; bar_used(n) hears of the
    bytes read."""
    for source in sources:
        items, weight, before = [], 0, 0
        records = read_records(source, job.text_field, job.txt_split, job.fields)
        for number, raw, used in itertools.islice(records, job.max_records or None):
            items.append((number, raw))
            weight += len(raw) if isinstance(raw, bytes) else used - before
            bar_used(used - before)
            before = used
            if weight >= job.block_mb * 1e6:
                yield source.name, items
                items, weight = [], 0
        if items:
            yield source.name, items
        bar_used(source.size() - before)


def write_shard(path, *block):
    """Encode a block and store it under `path`, whole or not at all; returns the MB of its text."""
    shard = encode_block(_job, *block)
    part = f"{path}.{os.getpid()}.part"  # of a run that was killed a worker may still write for a moment
    with open(part, "wb") as file:
        np.savez(file, **shard)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    return json.loads(shard["info"])["text_mb"]


def start_worker():
    """In each process: leave Ctrl-C to the parent, and end when the parent is gone, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def encode_blocks(sources, job, work, workers):
    """Write the shards that are missing in `work`; returns (number of all shards, MB of text in these). The blocks are read
    here and encoded by the workers, at most two a worker at a time."""
    global _job  # which the processes inherit
    _job, pool, waiting, count, text_mb = job, None, deque(), 0, 0.0
    if workers > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker)
        pool.submit(int).result()  # all processes start now, before anything else runs here
    try:
        with tqdm(total=sum(source.size() for source in sources), unit="B", unit_scale=True, leave=False, disable=None,
                  desc="tokenize") as bar:
            for count, block in enumerate(blocks(sources, job, bar.update), 1):
                path = f"{work}/{count:06d}.npz"
                if os.path.exists(path):
                    continue
                if pool:
                    waiting.append(pool.submit(write_shard, path, *block))
                else:
                    text_mb += write_shard(path, *block)
                if len(waiting) > 2 * workers:
                    text_mb += waiting.popleft().result()
            text_mb += sum(future.result() for future in waiting)
    except BrokenProcessPool:
        raise OSError("a worker process died (was it killed for want of memory?); the same command goes on") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return count, text_mb

# -----------------------------------------------------------------------------
# Shards to splits

def shards(work, count, desc):
    """Yield the shards, {name: array}, each array read when it is asked for."""
    for number in tqdm(range(1, count + 1), desc=desc, leave=False, disable=None):
        with np.load(f"{work}/{number:06d}.npz") as shard:
            yield shard


def leave_out_repeated(documents, place_of, id_field, on_bad_record):
    """Mark the documents whose id was seen before; on 'error' a ValueError names the first, by place_of(document)."""
    kept = np.flatnonzero(documents["why"] == 0)
    _, first, inverse = np.unique(documents["id"][kept], return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(kept)))
    if len(repeated) and on_bad_record == "error":
        again, before = repeated[0], first[inverse[repeated[0]]]
        raise ValueError(f"{place_of(kept[again])}: {id_field} is the same as that of {place_of(kept[before])}")
    documents["why"][kept[repeated]] = WHY.index("repeated id")


def leave_out_unsampled(documents, most):
    """Mark the train documents beyond those of the lowest keys that reach `most` tokens. Keys are hashes, so what is left is
    a random sample that neither the order of the files nor of the records changes."""
    train = np.flatnonzero((documents["why"] == 0) & ~documents["val"])
    keys = documents["key"][train]
    order = np.argsort(keys)
    last = np.searchsorted(np.cumsum(documents["length"][train][order], dtype=np.int64), most)
    if last < len(train):
        documents["why"][train[keys > keys[order[last]]]] = WHY.index("not sampled")


def write_stream(path, kept, work, count, masked):
    """The tokens of the documents that `kept` names, end to end; masked: their masks as PATH.mask."""
    at = 0
    with open(path, "wb") as ids_file, open(f"{path}.mask" if masked else os.devnull, "wb") as mask_file:
        for shard in shards(work, count, "write"):
            lengths = shard["documents"]["length"]
            chosen = np.repeat(kept[at:at + len(lengths)], lengths)
            at += len(lengths)
            if chosen.any():
                ids_file.write(shard["ids"][chosen].tobytes())
                mask_file.write(shard["mask"][chosen].tobytes() if masked else b"")


def write_split(name, documents, work, count, folder, job):
    """Write the files of train or val; returns the counts for meta.json. ValueError if they make no row."""
    mine = documents["val"] == (name == "val")
    kept = mine & (documents["why"] == 0)
    lengths, whys = documents["length"][kept].astype(np.int64), np.bincount(documents["why"][mine & ~kept], minlength=len(WHY))
    total, starts, path = int(lengths.sum()), np.cumsum(lengths) - lengths, f"{folder}/{name}"
    if not total or job.kind == "cpt" and total < job.seq_len:
        remedy = {"train": "see source and the fields",
                  "val": "documents are held out whole: give txt_split or --val_fraction=0"}[name]
        raise ValueError(f"{name}: {len(lengths)} documents, {total} tokens make no row of {job.seq_len} ({whys.sum()} dropped); "
                         f"{remedy}")
    lost = documents["lost"][kept]
    counts = {"truncated": int((lost > 0).sum()), "lost": int(lost.sum()),
              "dropped": int(whys.sum()), "dropped_why": {why: int(n) for why, n in zip(WHY, whys) if n},
              "lengths": np.bincount(np.frexp(lengths)[1] - 1).tolist()}  # documents of 2^k to 2^(k+1) - 1 tokens
    if job.kind == "cpt" and not job.no_wrap:
        write_stream(f"{path}.bin", kept, work, count, masked=False)
        n_rows, tail = divmod(total, job.seq_len)
        os.truncate(f"{path}.bin", (total - tail) * job.dtype.itemsize)
        starts = starts[starts < total - tail]
        starts.astype("<u8").tofile(f"{path}.docs.bin")
        counts |= {"rows": n_rows, "documents": len(starts), "targets": total - tail, "padding": 0, "lost": tail}
    else:
        rows, more = pack(name, lengths.tolist(), job)
        write_stream(f"{path}.stream", kept, work, count, job.kind == "ift")
        counts |= write_rows(path, rows, [*starts.tolist(), total], job) | more
        counts["lost"] += (total - counts["rows"] * job.seq_len) * (job.kind == "cpt")
    return {"tokens": counts["rows"] * job.seq_len, **counts, "sha256": file_sha256(f"{path}.bin")}


def write_rows(path, rows, borders, job):
    """Write PATH.bin, .docs.bin and .mask.bin: rows of documents of PATH.stream, which goes, each cut or padded to seq_len;
    borders: where documents begin in the stream, and its end. Returns counts."""
    ids_of, docs, targets, padding = np.memmap(f"{path}.stream", job.dtype, "r"), [], 0, 0
    masked = job.kind == "ift"
    mask_of = np.memmap(f"{path}.stream.mask", np.uint8, "r") if masked else np.broadcast_to(np.uint8(1), len(ids_of))
    with open(f"{path}.bin", "wb") as ids_file, open(f"{path}.mask.bin" if masked else os.devnull, "wb") as mask_file:
        for number, row in enumerate(tqdm(rows, desc="rows", leave=False, disable=None)):
            ids, mask, at = np.full(job.seq_len, job.pad, job.dtype), np.zeros(job.seq_len, np.uint8), 0
            for document in row:
                docs.append(number * job.seq_len + at)
                start, stop = borders[document:document + 2]
                stop = min(stop, start + job.seq_len - at)
                ids[at:at + stop - start], mask[at:at + stop - start] = ids_of[start:stop], mask_of[start:stop]
                at += stop - start
            if at < job.seq_len:
                docs.append(number * job.seq_len + at)
            targets, padding = targets + int(mask.sum()), padding + job.seq_len - at
            ids_file.write(ids.tobytes())
            mask_file.write(mask.tobytes())
    np.array(docs, "<u8").tofile(f"{path}.docs.bin")
    for stream in Path(path).parent.glob("*.stream*"):
        stream.unlink()
    return {"rows": len(rows), "documents": sum(map(len, rows)), "targets": targets, "padding": padding}


def pack(name, lengths, job):
    """The documents in each row of a split, and what meta.json says of that. ValueError if paper_ranks is too high."""
    if job.kind == "cpt":
        return pack_no_wrap(lengths, job.seq_len), {}
    if job.packing == "none":
        return [[example] for example in range(len(lengths))], {}
    if job.packing == "best_fit" or name == "val":  # of val no steps are made
        return pack_best_fit(lengths, job.seq_len), {}
    rows, ratio = pack_paper(lengths, job.seq_len, job.paper_ranks, job.paper_batch, job.packing_ratio, job.packing_seed,
                             job.paper_epochs)
    if not rows:
        raise ValueError(f"packing: {len(lengths)} examples make no step of {job.paper_ranks} GPUs with "
                         f"{int(ratio * job.paper_batch)} each; lower --paper_ranks")
    return rows, {"packing_ratio": ratio, "epochs": job.paper_epochs,
                  "steps": len(rows) // (job.paper_ranks * job.paper_batch * job.paper_epochs),
                  "unpacked": len(lengths) * job.paper_epochs - sum(map(len, rows))}

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
    for name, counts in meta["splits"].items():
        why = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped_why"].items()) or "none"
        print(f"{name}: {counts['documents']:,} documents in {counts['rows']:,} rows of {meta['seq_len']}; "
              f"{counts['tokens']:,} tokens, {counts['targets']:,} of them targets, "
              f"{1 - counts['padding'] / counts['tokens']:.2%} filled; {counts['dropped']:,} documents dropped ({why}), "
              f"{counts['truncated']:,} truncated, {counts['lost']:,} tokens cut off")
        if "steps" in counts:
            print(f"{name}: packing_ratio {counts['packing_ratio']}: {counts['epochs']:,} epochs of {counts['steps']:,} steps of "
                  f"{counts['rows'] // counts['steps'] // counts['epochs']} rows; {counts['unpacked']:,} documents left over")
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

@contextmanager
def written_whole(out, plan):
    """Yield (a folder out.work/new to write into, the folder out.work for shards). The first gets the name `out` only when
    the block has ended well; the second outlives an error or a kill, and is used again by a run of the same plan, but by no
    two at once. Raises OSError, also for a full disk."""
    work, plan = f"{out}.work", json.dumps(plan, indent=1)
    if os.path.exists(work) and os.listdir(work) and not os.path.exists(f"{work}/plan.json"):
        raise FileExistsError(f"out_dir: {work} is not of this script, which needs that name")
    os.makedirs(work, exist_ok=True)
    with open(f"{work}/plan.json", "a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, and its workers do not inherit it
        except OSError:
            raise FileExistsError(f"out_dir: another run is at work in {work}") from None
        lock.seek(0)
        done = list(Path(work).glob("*.npz"))
        if lock.read() != plan:
            for path in Path(work).glob("*.npz*"):
                path.unlink()
            lock.truncate(0)
            print(plan, end="", file=lock, flush=True)
        elif done:
            print(f"going on with {len(done)} finished blocks of {work}")
        try:
            shutil.rmtree(f"{work}/new", ignore_errors=True)
            os.makedirs(f"{work}/new")
            yield f"{work}/new", work
            fsync_folder(f"{work}/new")
            os.rename(f"{work}/new", out)  # in place of an empty folder, if there is one
            shutil.rmtree(work)
        except BaseException as error:
            if len(list(Path(work).glob("*.npz"))) < 16:  # soon made again, so no litter after a mistake
                shutil.rmtree(work)
            if isinstance(error, KeyboardInterrupt):
                print("stopped; the same command goes on")
                raise SystemExit(130) from None
            if isinstance(error, OSError) and error.errno and not error.filename:  # a failed write does not say where
                raise OSError(error.errno, error.strerror, f"{work}/new") from None
            raise

# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        if inspect:
            inspect_folder(inspect)
            raise SystemExit(0)
        print(knob_table(globals()))
        for knob, least in {"seq_len": 2, "workers": 0, "max_records": 0, "max_tokens": 0, "packing_seed": 0, "paper_ranks": 1,
                            "paper_batch": 1, "paper_epochs": 1, "train_on_prompt_from": 0}.items():
            if config[knob] < least:
                raise ValueError(f"{knob}: expected {least} or more, found {config[knob]}")
        for knob, fine, expected in [("source", source, "at least one file"), ("out_dir", out_dir, "a folder's name"),
                                     ("tokenizer", tokenizer, "a tokenizer file or its folder"),
                                     ("block_mb", block_mb > 0, "more than 0"), ("suffixes", suffixes, "such as .py"),
                                     ("packing_ratio", packing_ratio == 0 or packing_ratio >= 1, "0 or from 1 up"),
                                     ("double_bos", kind == "cpt" and add_bos or not double_bos, "kind=cpt with add_bos"),
                                     ("no_wrap", kind == "cpt" or not no_wrap, "kind=cpt"),
                                     ("template", kind == "ift" or template not in CHATS, "kind=ift with messages"),
                                     ("val_fraction", 0 <= val_fraction < 1, "0 <= fraction < 1")]:
            if not fine:
                raise ValueError(f"{knob}: expected {expected}, found {config[knob]!r}")
        tok = load_tokenizer(tokenizer)
        for knob, wanted, special in [("add_bos", add_bos, tok.bos_id), ("add_eos", add_eos, tok.eos_id)]:
            if wanted and special is None:
                raise ValueError(f"{knob}: {tokenizer} has no such token; say --{knob}=False")
        out = os.path.normpath(out_dir)
        if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise FileExistsError(f"out_dir: {out} is there already; delete it or name another")

        # 1: what is asked for, and of what
        dtype = np.dtype("<u2" if tok.vocab_size <= 65536 else "<u4")
        bos, eos = (np.array([special] * times, dtype).tobytes()
                    for special, times in ((tok.bos_id, add_bos + double_bos), (tok.eos_id, add_eos)))
        knobs = {**config, "response_prefix": unescape(response_prefix), "txt_split": unescape(txt_split)}
        job = SimpleNamespace(**knobs, dtype=dtype, bos=bos, eos=eos, pad=tok.eos_id or 0, encode=make_encoder(tok, dtype))
        job.fields = [messages_field] if template in CHATS else [response_field] * (kind == "ift")  # and those of the template
        if template not in CHATS:
            job.template_text, job.template_fields = read_template(template, text_field if kind == "cpt" else prompt_field)
            job.fields += job.template_fields.values()
        job.fields += [id_field] * bool(id_field)
        sources = expand(source, suffixes)
        size = sum(found.size() for found in sources)
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None, desc="checksums") as bar:
            entries = [{"path": found.name, "sha256": found.sha256(bar), "bytes": found.size(),
                        **({"revision": found.revision} if found.revision else {})} for found in sources]
        evals = expand(decontaminate, suffixes, "decontaminate")
        job.eval_ngrams, eval_counts = eval_ngrams(evals)
        versions = {"python": platform.python_version(),
                    **{name: version(name) for name in ("numpy", "sentencepiece", "tiktoken", "tokenizers")}}
        settings = {name: value for name, value in config.items() if name not in _free}
        plan = {"settings": {**settings, "on_bad_record": "", "block_mb": block_mb}, "source": entries, "versions": versions,
                "tokenizer": tok.sha256, "evals": [found.sha256() for found in evals],
                "code": [file_sha256(ROOT / f"{name}.py")
                         for name in ("prepare_data", "text/records", "text/tokenizer")]}

        with written_whole(out, plan) as (folder, work):
            # 2: records to shards, by as many processes as are wanted
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            processes = workers or max(1, min(cores, int(size / (block_mb * 1e6))))
            started = time.perf_counter()
            count, text_mb = encode_blocks(sources, job, work, processes)
            seconds = time.perf_counter() - started

            # 3: what of them goes in
            tables, infos = zip(*((shard["documents"], json.loads(str(shard["info"])))
                                  for shard in shards(work, count, "documents")))
            documents, ends = np.concatenate(tables), np.cumsum([len(table) for table in tables])
            if id_field:
                leave_out_repeated(documents, lambda i: f"{infos[np.searchsorted(ends, i, 'right')]['name']}:"
                                                        f"{documents['number'][i]}", id_field, on_bad_record)
            if max_tokens:
                leave_out_unsampled(documents, max_tokens)
            for entry in entries:
                entry["records"] = sum(info["records"] for info in infos if info["name"] == entry["path"])

            # 4: shards to the rows of each split
            meta = {"format": 1, "kind": kind, "dtype": dtype.name, "seq_len": seq_len, "vocab_size": tok.vocab_size,
                    "bos_id": tok.bos_id, "eos_id": tok.eos_id, "tokenizer_sha256": tok.sha256, "tokenizer_name": tok.name,
                    "source": entries,
                    "skipped": sum(info["bad"] for info in infos),
                    "skipped_first": [line for info in infos for line in info["bad_first"]][:5],
                    "decontaminated": [{"path": path, "records": n, "short": short} for path, n, short in eval_counts],
                    "settings": settings, "versions": versions,
                    "splits": {name: write_split(name, documents, work, count, folder, job)
                               for name in ["train"] + ["val"] * (val_fraction > 0)}}
            hashed = {f"{name}.bin": counts["sha256"] for name, counts in meta["splits"].items()}  # tokens: read once
            meta["files"] = {name: hashed.get(name) or file_sha256(f"{folder}/{name}") for name in sorted(os.listdir(folder))}
            meta["examples"] = examples_of(folder, "train", meta, tok)
            Path(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")

        print_report(meta)
        print(f"tokenized {text_mb:,.1f} MB of text in {seconds:,.1f} s with {processes} processes: {text_mb / seconds:.1f} MB/s")
        print(f"-> {out_dir}")
