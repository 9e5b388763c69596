"""
Work that survives a kill: blocks of records -> shards -> a data folder, whole or not at all.

    records  r r r r r r r r r r               read here, in order
    blocks   [r r r r] [r r r r] [r r]         of block_mb of text each, for worker processes
    shards   000001.npz 000002.npz 000003.npz  in out_dir.work, each renamed when it is whole
    splits   train.bin val.bin meta.json ...   in out_dir.work/new, which becomes out_dir at the end

A run that was killed makes only the shards that are missing. Neither that nor the number of
workers changes a byte of the output: blocks are cut by the input and block_mb alone.
"""
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import struct
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime import available_cores, fsync_folder
from text.records import read_records

# What a shard says of each document, beside its ids and mask
DOCUMENT = np.dtype([
    ("length", "<u4"),  # tokens that are kept
    ("lost", "<u4"),    # tokens that were cut off
    ("number", "<u4"),  # of its record in the file
    ("key", "<u8"),     # a hash of the prompt, or of the document
    ("id", "<u8"),      # a hash of the id_field
    ("side", "<u8"),    # a hash that says on which side of val_fraction it is
    ("val", "?"),       # whether it is held out
    ("why", "u1")])     # why it is left out, a number in WHY
WHY = ("", "empty", "no room", "contaminated", "repeated id", "not sampled")
FEW = 16  # so few finished shards are not worth keeping after an error


def hashes(text):
    """Four numbers below 2^64 that are a text's sha256."""
    return struct.unpack(">4Q", hashlib.sha256(text.encode()).digest())

# -----------------------------------------------------------------------------
# records to shards

def blocks(sources, job, bar):
    """Yield (name of the source, [(number, raw)]), each about job.block_mb of text."""
    for source in sources:
        items = []
        weight = 0
        before = 0  # bytes of the source that were read
        records = read_records(source, job.text_field, job.txt_split, job.fields)
        for number, raw, used in itertools.islice(records, job.max_records or None):
            items.append((number, raw))
            # a line weighs its bytes, other records what was read of the file for them
            weight += len(raw) if isinstance(raw, bytes) else used - before
            bar.update(used - before)
            before = used
            if weight >= job.block_mb * 1e6:
                yield source.name, items
                items = []
                weight = 0
        # a block never reaches into the next source
        if items:
            yield source.name, items
        bar.update(source.size() - before)


def encode_blocks(sources, encode_block, job, work, workers):
    """
    Write the shards that are missing in the folder `work`.

    encode_block(job, name, items) -> the arrays of a shard. Returns (number of all shards, MB of
    text in the new ones). Blocks are read here and encoded by the workers; at most two a worker
    are held in memory.
    """
    # the worker processes inherit these, since they are forks; job is not pickled for each block
    global _encode_block, _job
    _encode_block = encode_block
    _job = job
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker)
        pool.submit(int).result()  # all processes start now, before anything else runs here
    bar = tqdm(total=sum(source.size() for source in sources), desc="tokenize",
               unit="B", unit_scale=True, leave=False, disable=None)
    waiting = deque()
    count = 0
    text_mb = 0.0
    try:
        for count, (name, items) in enumerate(blocks(sources, job, bar), 1):
            path = f"{work}/{count:06d}.npz"
            # made by the run that was killed
            if os.path.exists(path):
                continue
            if pool is None:
                text_mb += write_shard(path, name, items)
                continue
            # without a limit the queue would hold the whole input
            waiting.append(pool.submit(write_shard, path, name, items))
            if len(waiting) > 2 * workers:
                text_mb += waiting.popleft().result()
        for future in waiting:
            text_mb += future.result()
    except BrokenProcessPool:
        raise OSError("a worker process died (was it killed for want of memory?); the same "
                      "command resumes") from None
    finally:
        bar.close()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return count, text_mb


def processes_for(sources, block_mb):
    """How many worker processes: one a core, but no more than there are blocks."""
    size = sum(source.size() for source in sources)
    return max(1, min(available_cores(), int(size / (block_mb * 1e6))))


def start_worker():
    """In each process: leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait for the end of the parent, which kill -9 does not let it announce."""
    multiprocessing.parent_process().join()
    os._exit(1)


def write_shard(path, name, items):
    """Encode a block and store it under `path`, whole or not at all; returns its MB of text."""
    shard = _encode_block(_job, name, items)
    # by process: a worker of a run that was killed may still be writing
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        np.savez(file, **shard)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    return json.loads(shard["info"])["text_mb"]

# -----------------------------------------------------------------------------
# shards to documents

def shards(work, count, desc):
    """Yield the shards in order, {name: array}; an array is read when it is asked for."""
    for number in tqdm(range(1, count + 1), desc=desc, leave=False, disable=None):
        with np.load(f"{work}/{number:06d}.npz") as shard:
            yield shard


def read_tables(work, count):
    """The documents of all shards, one table; and what each shard says of itself."""
    tables = []
    infos = []
    for shard in shards(work, count, "documents"):
        info = json.loads(str(shard["info"]))
        info["documents"] = len(shard["documents"])
        tables.append(shard["documents"])
        infos.append(info)
    return np.concatenate(tables), infos


def leave_out_repeated(documents):
    """Mark the documents whose id was seen before; returns the first and its double, or None."""
    # of each document that is still in: the first one with the same id
    kept = np.flatnonzero(documents["why"] == 0)
    _, first, inverse = np.unique(documents["id"][kept], return_index=True, return_inverse=True)
    first_of_each = first[inverse]
    repeated = np.flatnonzero(first_of_each != np.arange(len(kept)))
    documents["why"][kept[repeated]] = WHY.index("repeated id")
    if len(repeated) == 0:
        return None
    return kept[repeated[0]], kept[first_of_each[repeated[0]]]


def place_of(number, documents, infos):
    """file:record of a document in the table of all."""
    ends = np.cumsum([info["documents"] for info in infos])
    info = infos[np.searchsorted(ends, number, "right")]
    return f"{info['name']}:{documents['number'][number]}"


def leave_out_unsampled(documents, most):
    """
    Mark the train documents beyond those of the lowest keys that reach `most` tokens.

    Keys are hashes: what is left is a random sample, whatever the order of files and records.
    """
    train = np.flatnonzero((documents["why"] == 0) & ~documents["val"])
    # in the order of keys: where the sum of tokens reaches `most`
    keys = documents["key"][train]
    order = np.argsort(keys)
    tokens = np.cumsum(documents["length"][train][order], dtype=np.int64)
    last = np.searchsorted(tokens, most)
    # documents of the same key stay together
    if last < len(train):
        highest = keys[order[last]]
        documents["why"][train[keys > highest]] = WHY.index("not sampled")


def write_stream(path, name, kept, work, count):
    """Write the array `name` ("ids" or "mask") of the documents that `kept` names, end to end."""
    at = 0  # the number of the shard's first document
    with open(path, "wb") as file:
        for shard in shards(work, count, f"write {name}"):
            # which of the shard's tokens: a truth value for each document, repeated for each token
            lengths = shard["documents"]["length"]
            chosen = np.repeat(kept[at:at + len(lengths)], lengths)
            at += len(lengths)
            if chosen.any():
                file.write(shard[name][chosen].tobytes())


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder, splits):
    """{file: sha256} of what was written; the tokens, which may be many GB, were read already."""
    found = {}
    for name in sorted(os.listdir(folder)):
        split = name.removesuffix(".bin")
        if split in splits:
            found[name] = splits[split]["sha256"]
        else:
            found[name] = file_sha256(f"{folder}/{name}")
    return found


# -----------------------------------------------------------------------------
# the folder

@contextmanager
def written_whole(out, plan):
    """
    Yield (the folder out.work/new to write into, the folder out.work for shards).

    The first is renamed to `out` when the block has ended well. The second outlives an error or a
    kill and serves a later run of the same plan, but never two at once. Raises OSError, also for a
    full disk.
    """
    work = f"{out}.work"
    new = f"{work}/new"
    if os.path.exists(work) and os.listdir(work) and not os.path.exists(f"{work}/plan.json"):
        raise FileExistsError(f"out_dir: {work} is not of this script, which needs that name")
    os.makedirs(work, exist_ok=True)
    # one run at a time, and only shards of the same plan
    with open(f"{work}/plan.json", "a+") as plan_file:
        try:
            # the lock ends with this process; its workers do not inherit it
            fcntl.lockf(plan_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"out_dir: another run is at work in {work}") from None
        keep_shards_of_plan(work, plan_file, json.dumps(plan, indent=1))
        try:
            shutil.rmtree(new, ignore_errors=True)  # what a kill left half done
            os.makedirs(new)
            yield new, work
            # all is written: give it its name
            fsync_folder(new)
            os.rename(new, out)  # in place of an empty folder, if there is one
            shutil.rmtree(work)
        except BaseException as error:
            goes_on = "resumes"
            if len(finished_shards(work)) < FEW:
                shutil.rmtree(work)
                goes_on = "begins again"
            if isinstance(error, KeyboardInterrupt):
                print(f"stopped; the same command {goes_on}")
                raise SystemExit(130) from None
            if isinstance(error, OSError) and error.errno and not error.filename:
                # a failed write does not say where
                raise OSError(error.errno, error.strerror, new) from None
            raise


def keep_shards_of_plan(work, plan_file, plan):
    """Keep the shards in `work` if they were made by the same plan, else delete them."""
    plan_file.seek(0)
    if plan_file.read() == plan:
        done = finished_shards(work)
        if done:
            print(f"resuming with {len(done)} finished blocks of {work}")
        return
    # of another plan
    others = list(Path(work).glob("*.npz*"))
    if others:
        print(f"deleting {len(others)} blocks of {work}, made with other knobs, data or code")
    for path in others:
        path.unlink()
    plan_file.truncate(0)
    plan_file.write(plan)
    plan_file.flush()


def finished_shards(work):
    return list(Path(work).glob("*.npz"))
