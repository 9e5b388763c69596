"""
Stage 1: text, or prompt/response records -> token files that train.py memory-maps.

    python prepare_data.py --source=notes.txt --tokenizer=models/llama2 --out_dir=data/notes
    python prepare_data.py --kind=ift --source=gsm8k/train.jsonl --tokenizer=models/llama2 --out_dir=data/gsm8k \\
        --template='Question: {question}\\nAnswer:' --response_field=answer

out_dir then holds, for SPLIT in train and val (raw little-endian arrays without a header):
    SPLIT.bin        token ids [rows * seq_len]: uint16, or uint32 for a vocabulary above 65,536
    SPLIT.docs.bin   uint64, ascending: where in SPLIT.bin each document starts; a row's padding counts as a document
    SPLIT.mask.bin   ift only, uint8 a token: 1 where it is a target (response, EOS), 0 for BOS, prompt and padding
    meta.json        kind, dtype, seq_len, special ids, counts, every knob, and the sha256 of all that went in and out
A cpt row is a window of the stream BOS document EOS BOS document EOS ...; an ift row is whole examples, then padding.
"""
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import platform
import random
import re
import string
import sysconfig
import tokenize
import zlib
from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import configure, knob_table
from runtime import fsync_folder, one_line_errors
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# what goes in
source = ()                  # files or globs, .txt .json .jsonl (or these .gz); 'toy_math' and 'pystdlib' are made here
val_source = ()              # the same for val; () = hold out a part of source
val_fraction = 0.05          # that part, by a hash of the text (ift: of the prompt), in whatever order; 0 = no val
kind = 'cpt'                 # 'cpt' = documents as one stream | 'ift' = prompts and responses, only responses learned
text_field = 'text'          # cpt: the field of a record that holds the document
prompt_field = 'prompt'      # ift: the field that holds the prompt
response_field = 'response'  # ift: the field that holds the response
template = ''                # makes document or prompt from any fields: 'Question: {question}\nAnswer:'; '' = as it is
response_prefix = ''         # ift: stands before a response; ' ' for byte-level BPE, '' for sentencepiece (has its own)
txt_split = ''               # what stands between the documents of a .txt file, such as '\n\n'; '' = it is one document
max_records = 0              # read at most so many records of each file; 0 = all
on_bad_record = 'error'      # 'error' = stop and name file:record | 'skip' = count it and go on
toy_records = 10000          # how many problems toy_math makes
toy_seed = 1                 # and from which seed
# how it becomes tokens
tokenizer = ''               # tokenizer.model or tokenizer.json, or the folder that holds it
seq_len = 1024               # tokens a row
add_bos = True               # BOS before each document or prompt
add_eos = True               # EOS after each document or response
packing = 'best_fit'         # ift: 'best_fit' = fewest rows | 'none' = one example a row
# where it goes
out_dir = ''                 # a new folder, such as data/gsm8k
overwrite = False            # replace the data that is there
keep_records = False         # also write the records of each split as SPLIT.jsonl: val.jsonl is a test set for an eval
_choices = {'kind': ('cpt', 'ift'), 'on_bad_record': ('error', 'skip'), 'packing': ('best_fit', 'none')}

# -----------------------------------------------------------------------------
# Sources

def toy_math(count, seed):
    """Yield `count` word problems in GSM8K's form, {"question", "answer"}: 1 to 3 steps, each with its
    <<expression=value>>, then '#### value'. A pure function of (count, seed)."""
    rng = random.Random(seed)
    names = "Ava Ben Chloe Dan Ella Finn Grace Hugo Iris Jack Kira Leo Mia Noah".split()
    things = "apples marbles stickers shells books coins pencils cookies stamps buttons".split()
    events = {"+": ("{friend} gives {name} {b} more.", "{name} buys {b} more.", "In the garden {name} finds {b} more."),
              "-": ("{name} gives {b} of them to {friend}.", "{b} of them get lost.", "{name} sells {b} of them."),
              "*": ("A week later {name} has {b} times as many.", "A machine turns each of them into {b}."),
              "/": ("{name} makes {b} equal piles and keeps one.", "{name} keeps one of {b} equal shares.")}
    for _ in range(count):
        name, friend = rng.sample(names, 2)
        thing, total, answer = rng.choice(things), rng.randint(4, 60), []
        question = [f"{name} {rng.choice(['has', 'picks up', 'starts with'])} {total} {thing}."]
        for _ in range(rng.randint(1, 3)):
            divisors = [d for d in range(2, 10) if total % d == 0]
            op = rng.choice("++" + "--" * (total > 1) + "*" * (total <= 60) + "/" * bool(divisors))
            b = rng.choice({"+": range(2, 31), "-": range(1, total), "*": range(2, 5), "/": divisors}[op])
            value = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}[op]
            question.append(rng.choice(events[op]).format(name=name, friend=friend, b=b))
            answer.append(f"{rng.choice(['That makes', 'Now there are', f'{name} then has'])} "
                          f"{total} {op} {b} = <<{total}{op}{b}={value}>>{value} {thing}.")
            total = value
        question.append(f"How many {thing} does {name} have {rng.choice(['now', 'in the end', 'after that'])}?")
        yield {"question": " ".join(question), "answer": "\n".join(answer + [f"#### {total}"])}


def pystdlib():
    """Yield the modules of the running Python's standard library, {"path", "text"}, by path; without tests, bundled
    applications, tables, and the one module that differs between machines."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not left_out & {*path.split("/")} and "_sysconfigdata" not in path:
            with tokenize.open(root / path) as file:
                yield {"path": path, "text": file.read()}


def expand(patterns, made):
    """Files and globs -> the list of files, sorted within a glob; names in `made` stay. Raises ValueError."""
    found = []
    for pattern in patterns:
        paths = [pattern] if pattern in made or os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for path in paths or [pattern]:
            if path not in made and not os.path.isfile(path):
                raise ValueError(f"source: expected a file, '{path}/*.jsonl' or one of {', '.join(made)}; "
                                 f"{path} is {'a folder' if paths else 'not there'}")
            if path not in made and not re.search(r"\.(txt|json|jsonl)(\.gz)?$", path):
                raise ValueError(f"source: expected .txt, .json or .jsonl (or these .gz), found {path}")
        found += paths
    return found


def parse(line):
    """JSON as bytes -> its value, or the ValueError that says why not."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def read_records(file, name, text_field, txt_split):
    """Yield (number from 1, record, bytes of the file used up) from an open binary file whose format its name tells.
    What cannot be read comes as a ValueError in the record's place: the caller decides what becomes of it."""
    size, number, suffix = file.seek(0, io.SEEK_END), 0, name.removesuffix(".gz").rpartition(".")[2]
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
    try:
        if suffix == "txt":
            text = stream.read().decode("utf-8-sig")
            records = [{text_field: document} for document in (text.split(txt_split) if txt_split else [text])]
        elif suffix == "json" and stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            records = parse(stream.read())
            records = records if isinstance(records, list) else [records]
        else:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    yield number, parse(line), file.tell()
            return
        for number, record in enumerate(records, 1):
            yield number, record, size * number // len(records)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield number + 1, ValueError(f"cannot be read: {error}"), size


def read_sources(paths, blobs, text_field, txt_split, most, sources):
    """Yield (path:number, side, record) over paths [(path, side)], and append what each file is to `sources`. Reads
    at most `most` records a file (0: all). `blobs` are the bytes of the sources that are made here."""
    sizes = [len(blobs[path]) if path in blobs else os.path.getsize(path) for path, _ in paths]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for (path, side), size in zip(paths, sizes):
            before = bar.n
            with io.BufferedReader(io.BytesIO(blobs[path])) if path in blobs else open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                sources.append({"path": path, "sha256": sha256, "bytes": size, "records": 0})
                records = read_records(file, path + ".jsonl" * (path in blobs), text_field, txt_split)
                for number, record, used in itertools.islice(records, most or None):
                    sources[-1]["records"] += 1
                    yield f"{path}:{number}", side, record
                    bar.update(before + used - bar.n)


def text_of(record, name):
    """The text in one field of a record; ValueError says what is there instead."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if name not in record:
        raise ValueError(f"expected a field {name!r}, found only {', '.join(map(repr, record)) or 'an empty record'}")
    if not isinstance(record[name], str):
        raise ValueError(f"expected text in field {name!r}, found {type(record[name]).__name__}")
    record[name].encode()  # JSON can spell half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    return record[name]


def unescape(text):
    r"""Backslash-n, backslash-t and double backslash, as typed in a shell -> newline, tab, backslash."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def template_fields(template):
    """The fields that a format string names; ValueError if it is not one over named fields."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        template.format_map(dict.fromkeys(fields, ""))
    except (ValueError, LookupError, AttributeError, TypeError):
        fields = []
    if template and not all(fields or [""]):
        raise ValueError(f"template: expected fields such as {{question}} and doubled other braces, found {template!r}")
    return fields


def goes_to_val(text, fraction):
    """Whether a text is held out: a pure function of the text, so that the order of the records does not matter."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < fraction * 2**64

# -----------------------------------------------------------------------------
# Tokens

@dataclass
class Split:
    """Train or val in the making: the ids of its documents stream to a file, end to end, the rest stays in memory."""
    file: io.BufferedWriter
    dtype: np.dtype
    starts: array = field(default_factory=lambda: array("Q", [0]))  # of each document in the file, and the file's end
    prompts: array = field(default_factory=lambda: array("I"))      # how many ids at a document's start are no targets
    counts: Counter = field(default_factory=lambda: Counter(truncated=0, dropped=0, lost=0, chars=0))

    def add(self, ids, n_prompt, most):
        """Write at most `most` ids of a document that begins with `n_prompt` ids which are no targets."""
        kept = np.array(ids[:most], self.dtype)
        self.file.write(kept.tobytes())
        self.starts.append(self.starts[-1] + len(kept))
        self.prompts.append(n_prompt)
        self.counts.update(truncated=len(ids) > len(kept), lost=len(ids) - len(kept))


def encode_pair(tok, prompt, response, seq_len, add_bos=True, add_eos=True):
    """-> (ids of the whole example, how many of them are prompt), or None if seq_len leaves no target.

    As llm-foundry has it: prompt and response are tokenized apart, and EOS alone is no response. Text never becomes
    a special id, so BOS and EOS occur once; and something stands before the response, so that all of it is predicted.
    """
    head, body = tok.encode(prompt, bos=add_bos), tok.encode(response)
    return (head + body + [tok.eos_id] * add_eos, len(head)) if body and 0 < len(head) < seq_len else None


def pack_best_fit(lengths, seq_len):
    """Lengths in [1, seq_len] -> rows, each the ascending list of its examples, in the order of their first example.

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


def finish_cpt(folder, name, split, seq_len):
    """Cut the stream to whole rows; returns the counts for meta.json."""
    rows, lost = divmod(split.starts[-1], seq_len)
    os.truncate(f"{folder}/{name}.bin", rows * seq_len * split.dtype.itemsize)
    starts = np.array(split.starts[:-1], "<u8")
    starts = starts[starts < rows * seq_len]
    starts.tofile(f"{folder}/{name}.docs.bin")
    return {**split.counts, "tokens": rows * seq_len, "rows": rows, "documents": len(starts), "targets": rows * seq_len,
            "padding": 0, "lost": lost}


def finish_ift(folder, name, split, seq_len, packing, pad):
    """Pack the stream into rows with their masks; returns the counts for meta.json."""
    lengths = np.diff(np.array(split.starts, np.int64)).tolist()
    rows = pack_best_fit(lengths, seq_len) if packing == "best_fit" else [[example] for example in range(len(lengths))]
    stream, docs, targets = np.memmap(split.file.name, split.dtype, "r"), array("Q"), 0
    with open(f"{folder}/{name}.bin", "wb") as ids_file, open(f"{folder}/{name}.mask.bin", "wb") as mask_file:
        for number, row in enumerate(rows):
            ids, mask, at = np.full(seq_len, pad, split.dtype), np.zeros(seq_len, np.uint8), 0
            for example in row:
                docs.append(number * seq_len + at)
                start, end = split.starts[example], at + lengths[example]
                ids[at:end] = stream[start:start + lengths[example]]
                mask[at + split.prompts[example]:end] = 1
                at = end
            if at < seq_len:
                docs.append(number * seq_len + at)
            targets += int(mask.sum())
            ids_file.write(ids.tobytes())
            mask_file.write(mask.tobytes())
    np.array(docs, "<u8").tofile(f"{folder}/{name}.docs.bin")
    os.unlink(split.file.name)
    return {**split.counts, "tokens": len(rows) * seq_len, "rows": len(rows), "documents": len(lengths),
            "targets": targets, "padding": len(rows) * seq_len - sum(lengths)}


def show_first(folder, name, dtype, tok, most=600):
    """The first document as the files have it: what is only read in [brackets], what is learned in «angles»."""
    ids, mask_path = np.memmap(f"{folder}/{name}.bin", dtype, "r"), Path(folder, f"{name}.mask.bin")
    start, end = [*np.fromfile(f"{folder}/{name}.docs.bin", "<u8", 2).tolist(), len(ids)][:2]
    ids, left_out = ids[start:min(end, start + most)].tolist(), max(0, end - start - most)
    mask = np.fromfile(mask_path, np.int8, len(ids)) if mask_path.exists() else np.ones(len(ids))
    shown, before = "", ""
    for a, b in itertools.pairwise([0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]):
        text = tok.decode([i for i in ids[:b] if i not in (tok.bos_id, tok.eos_id)])
        piece = "<BOS>" * (ids[a] == tok.bos_id) + text[len(before):] + "<EOS>" * (ids[b - 1] == tok.eos_id)
        shown, before = shown + (f"«{piece}»" if mask[a] else f"[{piece}]"), text
    return shown + f" and {left_out} tokens more" * bool(left_out)

# -----------------------------------------------------------------------------
# The folder

_files = [f"{name}.{end}" for name in ("train", "val") for end in ("bin", "docs.bin", "mask.bin", "jsonl", "stream")]


def remove(folder):
    """Delete a folder of ours if it is there; a file in it that is not ours stays, with an OSError."""
    if os.path.isdir(folder):
        for name in [*_files, "meta.json"]:
            Path(folder, name).unlink(missing_ok=True)
        os.rmdir(folder)


@contextmanager
def written_whole(out, overwrite):
    """Yield a folder out.tmp to write into; it gets the name `out` only when the block has ended well. What was there
    is refused, or with `overwrite` replaced at that moment; a kill in that moment leaves out.old, which the next run
    puts back. Raises OSError, also for a full disk, after removing out.tmp."""
    tmp, old = out + ".tmp", out + ".old"
    if os.path.exists(old) and not os.path.exists(out):
        os.rename(old, out)
    there = set(os.listdir(out)) if os.path.exists(out) else set()
    if there and not overwrite:
        raise FileExistsError(f"out_dir: {out} is there already; --overwrite=True replaces it")
    if foreign := there - {*_files, "meta.json"}:
        raise FileExistsError(f"out_dir: {out} holds {min(foreign)}, which is not of this script; not replaced")
    try:
        remove(old)
        remove(tmp)
        os.makedirs(tmp)
        yield tmp
        fsync_folder(tmp)
        if os.path.exists(out):
            os.rename(out, old)
        os.rename(tmp, out)
        remove(old)
    except BaseException as error:
        if os.path.exists(old) and not os.path.exists(out):
            os.rename(old, out)
        remove(tmp)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, tmp) from None
        raise

# -----------------------------------------------------------------------------
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print(knob_table(globals()))
        for knob, fine, expected in [("source", source, "at least one file"), ("out_dir", out_dir, "a folder's name"),
                                     ("tokenizer", tokenizer, "a tokenizer file or its folder"),
                                     ("seq_len", seq_len >= 2, "2 or more"),
                                     ("max_records", max_records >= 0, "0 or more"),
                                     ("val_fraction", 0 <= val_fraction < 1, "0 <= fraction < 1")]:
            if not fine:
                raise ValueError(f"{knob}: expected {expected}, found {config[knob]!r}")
        template, response_prefix, txt_split = map(unescape, (template, response_prefix, txt_split))
        fields = template_fields(template) or [text_field if kind == "cpt" else prompt_field]
        made = {"toy_math": lambda: toy_math(toy_records, toy_seed), "pystdlib": pystdlib}
        paths = [(path, "train" if val_source else "") for path in expand(source, made)]
        paths += [(path, "val") for path in expand(val_source, made)]
        names = ["train", "val"] if val_source or val_fraction else ["train"]
        tok = load_tokenizer(tokenizer)
        for knob, wanted, special in [("add_bos", add_bos, tok.bos_id), ("add_eos", add_eos, tok.eos_id)]:
            if wanted and special is None:
                raise ValueError(f"{knob}: {tokenizer} has no such token; say --{knob}=False")
        dtype = np.dtype("<u2" if tok.vocab_size <= 65536 else "<u4")
        blobs = {path: b"".join(json.dumps(record).encode() + b"\n" for record in made[path]())
                 for path, _ in paths if path in made}

        with written_whole(os.path.normpath(out_dir), overwrite) as folder:
            ending = "bin" if kind == "cpt" else "stream"
            splits = {name: Split(open(f"{folder}/{name}.{ending}", "wb"), dtype) for name in names}
            copies = {name: open(f"{folder}/{name}.jsonl", "w") for name in names if keep_records}
            sources, skipped, summary = [], [], {}
            for where, side, record in read_sources(paths, blobs, text_field, txt_split, max_records, sources):
                try:
                    texts = {field: text_of(record, field) for field in fields}
                    text = template.format_map(texts) if template else texts[fields[0]]
                    response = text_of(record, response_field) if kind == "ift" else ""
                except ValueError as error:
                    if on_bad_record == "error":
                        raise ValueError(f"{where}: {error}") from None
                    skipped.append(f"{where}: {error}")
                    continue
                split = splits[side := side or ("val" if goes_to_val(text or response, val_fraction) else "train")]
                if kind == "cpt":
                    encoded = (tok.encode(text, bos=add_bos, eos=add_eos), 0) if text.strip() else None
                else:
                    encoded = encode_pair(tok, text, response and response_prefix + response, seq_len, add_bos, add_eos)
                if encoded is None:
                    split.counts["dropped"] += 1
                    continue
                split.add(*encoded, most=None if kind == "cpt" else seq_len)
                split.counts["chars"] += len(text) + len(response)
                if keep_records:
                    copies[side].write(json.dumps(record) + "\n")
            for file in [*copies.values(), *(split.file for split in splits.values())]:
                file.close()

            for name, split in splits.items():
                if not split.prompts or kind == "cpt" and split.starts[-1] < seq_len:
                    remedy = {"train": "see source and the fields", "val": "documents are held out whole: "
                              "give val_source, txt_split or --val_fraction=0"}[name]
                    raise ValueError(f"{name}: {len(split.prompts)} documents, {split.starts[-1]} tokens make no row "
                                     f"of {seq_len} ({split.counts['dropped']} dropped, {len(skipped)} bad); {remedy}")
                counts = (finish_cpt(folder, name, split, seq_len) if kind == "cpt" else
                          finish_ift(folder, name, split, seq_len, packing, 0 if tok.eos_id is None else tok.eos_id))
                with open(f"{folder}/{name}.bin", "rb") as file:
                    summary[name] = {**counts, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            meta = {"format": 1, "kind": kind, "dtype": dtype.name, "seq_len": seq_len, "vocab_size": tok.vocab_size,
                    "bos_id": tok.bos_id, "eos_id": tok.eos_id, "tokenizer_sha256": tok.sha256,
                    "tokenizer_name": tok.name, "source": sources, "skipped": len(skipped), "settings": config,
                    "versions": {"python": platform.python_version(),
                                 **{name: version(name) for name in ("numpy", "sentencepiece", "tiktoken")}},
                    "splits": summary}
            Path(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            example = show_first(folder, "train", dtype, tok)

        for entry in sources:
            print(f"{entry['path']}: {entry['records']:,} records, {entry['bytes']:,} bytes")
        print(f"{len(skipped):,} bad records skipped", *skipped[:5], sep="\n  ")
        for name, counts in summary.items():
            tokens = counts["tokens"] - counts["padding"] + counts["lost"]
            print(f"{name}: {counts['documents']:,} documents in {counts['rows']:,} rows of {seq_len}; "
                  f"{counts['tokens']:,} tokens, {counts['targets']:,} of them targets, "
                  f"{counts['padding'] / counts['tokens']:.2%} padding, {counts['chars'] / tokens:.2f} chars a token; "
                  f"{counts['dropped']:,} documents dropped (empty, or seq_len leaves no target), "
                  f"{counts['truncated']:,} truncated, {counts['lost']:,} tokens cut off")
        print(f"the first document of train, [read only] and «learned»:\n{example}\n-> {out_dir}")
