r"""Stage 1: text, prompt/response records or conversations -> token files that train.py maps.

    python prepare_data.py --source=notes.txt --txt_split='\n\n' --tokenizer=models/llama2 \
        --out_dir=data/notes
    python prepare_data.py --kind=ift --source=gsm8k/train.jsonl --tokenizer=models/llama2 \
        --template='Question: {question}\nAnswer:' --response_field=answer --out_dir=data/gsm8k
    python prepare_data.py config/data/magicoder.py --tokenizer=models/llama2 --out_dir=data/code
    python prepare_data.py --inspect=data/code          # what is in it, its checksums verified

kind='cpt': documents end to end; a row is a window of seq_len tokens of that stream.

    {"text": "One."} {"text": "Two."}     BOS One . EOS BOS Two | . EOS BOS ...

    A document too long for a row continues in the next; an incomplete last row is left out.

kind='ift': whole examples, then padding; only the response is learned (mask 1).

    {"prompt": "2+2?", "response": "4"}   BOS 2 + 2 ? 4 EOS       ids
                                           0  0 0 0 0 1  1        mask

    An example longer than seq_len is cut there, and dropped if that leaves it no target.

Where to look: examples that are too long, encode_document; BOS, EOS and masks, encode_turns; the
choice of packing, pack; a new template, text/templates.py; a new dataset, config/data/; how a run
that was killed resumes, text/shards.py.

out_dir then holds, for SPLIT in train and val (raw little-endian arrays without a header):
    SPLIT.bin        token ids [rows * seq_len]: uint16, or uint32 for a vocabulary above 65,536
    SPLIT.docs.bin   uint64, ascending: where in SPLIT.bin each document starts; a row's padding
                     counts as a document
    SPLIT.mask.bin   ift only, uint8 a token: 1 where it is a target (response, EOS), else 0
    meta.json        kind, dtype, seq_len, special ids, counts, every knob, and the sha256 of all
                     that went in and out
With packing='paper' the rows of train are paper_epochs epochs, one after the other, in the order
in which they are to be read.
"""
import json
import math
import os
import platform
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from configurator import configure, knob_table
from runtime import ROOT, one_line_errors
from text.chat import OwnTemplate
from text.encode import make_encoder
from text.packing import pack_best_fit, pack_no_wrap, pack_paper, write_rows
from text.records import describe, eval_ngrams, expand, is_contaminated, parse, text_of, unescape
from text.report import (choose_bos_and_eos, examples_of, inspect_folder, print_report,
                         why_dropped, why_no_row)
from text.shards import (DOCUMENT, WHY, checksums, encode_blocks, file_sha256, hashes,
                         leave_out_repeated, leave_out_unsampled, place_of, processes_for,
                         read_tables, write_stream, written_whole)
from text.templates import OF_MESSAGES, OWN, fields_of, turns_of
from text.tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# what goes in
source = ()                  # files (.parquet .mds .jsonl .json .txt, the last three also .gz),
                             # globs, folders of source files or MDS shards,
                             # hf://datasets/OWNER/NAME@REVISION/GLOB
val_fraction = 0.05          # held out for val, by a hash of the text or prompt; 0 = none
kind = 'cpt'                 # 'cpt' = documents as one stream | 'ift' = prompts and responses
text_field = 'text'          # cpt: the document's field; 'tokens:int32' = a column of ids in MDS
prompt_field = 'prompt'      # ift: the field that holds the prompt
response_field = 'response'  # ift: the field that holds the response
messages_field = 'messages'  # ift, a chat: [{"role", "content"}]; '' = prompt_field, response_field
template = 'none'            # around the prompt: none | alpaca | magicoder, or your own text with
                             # {fields} of the record; '' = no prompt. Of a chat: chat_template =
                             # the one in the tokenizer's folder | tulu | llama2
response_prefix = ''         # ift: before a response; ' ' for byte-level BPE, '' for sentencepiece
suffixes = ('.py',)          # which files of a folder are documents
txt_split = ''               # separates documents in a .txt, such as '\n\n'; '' = the file is one
max_records = 0              # read at most this many records of each file; 0 = all
max_tokens = 0               # train: sample documents until they have this many; 0 = all
decontaminate = ()           # eval sets: a document that shares 13 words in a row is dropped
id_field = ''                # a field that no two records may have the same; '' = not checked
on_bad_record = 'error'      # 'error' = stop and name file:record | 'skip' = count it
# how it becomes tokens
tokenizer = ''               # tokenizer.model or tokenizer.json, or the folder that holds it
seq_len = 1024               # tokens a row
bos = None                   # BOS before each document or prompt; None = as the tokenizer does
add_eos = True               # EOS after each document or response
double_bos = False           # cpt: BOS twice, as llm-foundry's bos_text and the tokenizer's own
no_wrap = False              # cpt, llm-foundry's: a row's last document is cut, not continued
train_on_prompt = False      # ift: prompts are targets as well
train_on_prompt_from = 0     # and then only prompts of this many tokens or more
train_on_turns = 'last'      # ift: which responses of a chat: 'last', as in the paper | 'all'
packing = 'best_fit'         # ift: 'best_fit' = fewest rows | 'paper' = llm-foundry's | 'none'
packing_ratio = 0.0          # paper: mean examples in a row; 0 = llm-foundry's 'auto'
packing_seed = 17            # paper: of the order of the examples
paper_ranks = 32             # paper: GPUs, each of which packs its own share
paper_batch = 6              # paper: rows a GPU and step; a step is paper_ranks * paper_batch rows
paper_epochs = 1             # paper: number of epochs, each with its own order and packing
# where it goes
out_dir = ''                 # a new folder, such as data/gsm8k
inspect = ''                 # only show and verify the data of this folder
# how fast
workers = 0                  # processes that tokenize; 0 = one per core, at most one per block
block_mb = 8.0               # text per block; a worker holds about two
_choices = {'kind': ('cpt', 'ift'), 'on_bad_record': ('error', 'skip'),
            'packing': ('best_fit', 'paper', 'none'), 'train_on_turns': ('last', 'all')}
_types = {'bos': bool}
_free = {'workers', 'block_mb', 'inspect'}  # knobs that change no byte of the output
# read only after records have been tokenized, whose blocks another start uses again
_later = {'val_fraction', 'max_tokens', 'no_wrap', 'packing', 'packing_ratio', 'packing_seed',
          'paper_ranks', 'paper_batch', 'paper_epochs'}

# ----------------------------------------------------------------------------- the knobs, checked
LEAST = {"seq_len": 2, "paper_ranks": 1, "paper_batch": 1, "paper_epochs": 1, "packing_seed": 0,
         "train_on_prompt_from": 0, "max_records": 0, "max_tokens": 0, "workers": 0}


def check_knobs(config):
    """Raise ValueError for a knob that is invalid, alone or in combination."""
    def refuse(knob, expected):
        raise ValueError(f"{knob}: expected {expected}, found {config[knob]!r}")

    k = SimpleNamespace(**config)
    # alone
    for knob, least in LEAST.items():
        if config[knob] < least:
            refuse(knob, f"{least} or more")
    if not k.source:
        refuse("source", "at least one file")
    if not k.out_dir:
        refuse("out_dir", "a folder's name")
    if not k.tokenizer:
        refuse("tokenizer", "a tokenizer file or its folder")
    if k.block_mb <= 0:
        refuse("block_mb", "more than 0")
    if not k.suffixes:
        refuse("suffixes", "such as .py")
    if k.packing_ratio != 0 and k.packing_ratio < 1:
        refuse("packing_ratio", "0 or from 1 up")
    if not 0 <= k.val_fraction < 1:
        refuse("val_fraction", "0 <= fraction < 1")
    # in combination
    if k.double_bos and (k.kind != "cpt" or k.bos is False):
        refuse("double_bos", "kind=cpt with --bos=True")
    if k.no_wrap and k.kind != "cpt":
        refuse("no_wrap", "kind=cpt")
    of_responses = k.response_prefix or k.train_on_prompt or k.packing == "paper"
    if k.kind == "cpt" and (of_responses or k.response_field != "response"):
        refuse("kind", "ift, for response_field, response_prefix, train_on_prompt, packing=paper")
    if k.kind == "cpt" and k.prompt_field != "prompt":
        refuse("prompt_field", "kind=ift")
    if k.kind == "ift" and k.text_field != "text":
        refuse("text_field", "kind=cpt")
    of_chats = k.template in OF_MESSAGES
    if of_chats and k.response_prefix:
        refuse("response_prefix", f"none with --template={k.template}, which has its own")
    if not of_chats and (k.messages_field, k.train_on_turns) != ("messages", "last"):
        refuse("template", f"{' or '.join(OF_MESSAGES)}, for messages_field and train_on_turns")
    of_pairs = (k.prompt_field, k.response_field) != ("prompt", "response")
    if of_chats and of_pairs and k.messages_field:
        refuse("messages_field", "'' with prompt_field or response_field")
    if k.paper_epochs > 1 and k.packing != "paper":
        refuse("paper_epochs", "packing=paper, or 1")
    if k.train_on_prompt_from and not k.train_on_prompt:
        refuse("train_on_prompt_from", "--train_on_prompt=True, or 0")
    if of_chats and k.kind != "ift":
        refuse("template", "kind=ift with messages")
    if k.template == "" and (k.kind != "ift" or k.val_fraction):
        refuse("template", "one; none at all needs kind=ift and --val_fraction=0")


def plan_job(config, tok):
    """The knobs and what is derived from them: all that encode_block and write_split need."""
    job = SimpleNamespace(**config)
    job.response_prefix = unescape(job.response_prefix)
    job.txt_split = unescape(job.txt_split)

    # BOS and EOS as bytes: ids stay bytes until rows are written
    if job.bos and tok.bos_id is None:
        raise ValueError(f"bos: {job.tokenizer} has no such token; say --bos=False")
    if job.add_eos and tok.eos_id is None:
        raise ValueError(f"add_eos: {job.tokenizer} has no such token; say --add_eos=False")
    job.dtype = np.dtype("<u2" if tok.vocab_size <= 65536 else "<u4")
    job.encode = make_encoder(tok, job.dtype, job.text_field)
    job.bos_bytes = np.array(tok.bos_id, job.dtype).tobytes() if job.bos else b""
    if job.double_bos:
        job.bos_bytes = job.bos_bytes + job.bos_bytes
    job.eos_bytes = np.array(tok.eos_id, job.dtype).tobytes() if job.add_eos else b""
    job.pad = tok.eos_id or 0

    # a model's own chat template; the fields of a record that are read
    job.chat = None
    if job.template == OWN:
        job.chat = OwnTemplate(tok, [job.tokenizer], with_date=False)
        job.encode = bytes  # it makes ids itself
    job.fields = fields_of(job)
    if job.id_field:
        job.fields.append(job.id_field)
    return job


# ----------------------------------------------------------------------------- records -> shards
def encode_block(job, name, items):
    """A block of records -> the arrays of its shard, in a worker. ValueError names a bad record."""
    documents = []
    ids = []
    masks = []
    bad = []
    text_bytes = 0
    for number, raw in items:
        # the record, its texts, its id and its tokens
        identity = ""
        try:
            record = parse(raw)
            turns = turns_of(record, job)
            if job.id_field:
                identity = text_of(record, job.id_field, (str, int))
            document_ids, mask, lost, why = encode_document(job, turns)
        except ValueError as error:
            separator = "/" if isinstance(number, str) else ":"  # a folder's file, or a record
            message = f"{name}{separator}{number}: {error}"
            if job.on_bad_record == "error":
                raise ValueError(message) from None
            bad.append(message)
            continue
        ids.append(document_ids)
        masks.append(mask)
        length = len(document_ids) // job.dtype.itemsize
        for read, learned in turns:
            text_bytes += len(read.encode()) + len(learned.encode())

        # train or val: by a hash of the prompt or the document, so that order does not matter
        prompt, response = turns[0]
        side, key = hashes(prompt or response)[:2]
        id_hash = hashes(identity)[0]
        record_number = number if isinstance(number, int) else 0
        documents.append((length, lost, record_number, key, id_hash, side, False, WHY.index(why)))
    info = {"name": name, "records": len(items), "bad": len(bad), "bad_first": bad[:5],
            "text_mb": text_bytes / 1e6}
    return {"documents": np.array(documents, DOCUMENT), "info": json.dumps(info),
            "ids": np.frombuffer(b"".join(ids), job.dtype),
            "mask": np.frombuffer(b"".join(masks), np.uint8)}


def encode_document(job, turns):
    """Turns [(read, learned)] -> (ids as bytes, mask as bytes, tokens cut off, why dropped or '').

    This is where an example that is too long is cut to seq_len; a cpt document never is."""
    itemsize = job.dtype.itemsize
    bos_each = job.template == "llama2"
    learn_all = job.train_on_turns == "all"
    prompt_from = job.train_on_prompt_from if job.train_on_prompt else None
    # a model's own template is encoded as a whole: its parts are ids already
    parts = job.chat.encode_learned(turns, job.dtype) if job.chat else turns
    ids, mask, why = encode_turns(job.encode, parts, job.seq_len, job.bos_bytes, job.eos_bytes,
                                  itemsize, bos_each, learn_all, prompt_from)
    length = len(ids) // itemsize
    if job.kind == "ift":
        kept = min(length, job.seq_len)
    else:
        # all of a document is learned, which needs no mask
        kept = length
        mask = b""
        document = turns[0][1]
        why = "" if length and document.strip() else "empty"
    if not why and is_contaminated(turns, job.eval_ngrams):
        why = "contaminated"
    if why:
        kept = 0
    return ids[:kept * itemsize], mask[:kept], length - kept, why


def encode_turns(encode, turns, seq_len, bos=b"", eos=b"", itemsize=2, bos_each=False,
                 learn_all=False, prompt_from=None):
    """Turns [(read, learned)] -> (ids as bytes, mask as bytes, why it is dropped or ''), not cut.

    As in llm-foundry 0.9: each text is tokenized separately; text never becomes a special id; the
    targets are the last response with its EOS (learn_all: every response), and prompts of at least
    prompt_from tokens (None: no prompts). An example is dropped if a response is empty, or if no
    target but EOS lies within seq_len."""
    ids = b""
    mask = b""
    empty = False
    for number, (read, response) in enumerate(turns):
        # BOS before the first text, or before each turn
        head = encode(read)
        if number == 0 or bos_each:
            head = bos + head
        body = encode(response)
        head_length = len(head) // itemsize
        body_length = len(body) // itemsize
        empty = empty or not body
        learn_head = prompt_from is not None and head_length >= prompt_from
        learn_body = learn_all or number == len(turns) - 1
        mask += bytes([learn_head]) * head_length + bytes([learn_body]) * body_length
        has_target = b"\1" in mask[1:seq_len]
        # EOS after each response
        ids += head + body + eos
        if eos:
            mask += bytes([learn_body])
    why = ""
    if empty:
        why = "empty"
    elif not has_target:
        why = "no room"
    # nothing precedes the first token, so it cannot be predicted
    return ids, b"\0" + mask[1:], why


# ----------------------------------------------------------------------------- shards -> rows
def write_split(name, documents, work, count, folder, job):
    """Write the files of train or val; returns counts for meta.json. ValueError without a row."""
    path = f"{folder}/{name}"
    # this split's documents: which are kept, why others are left out, the lengths of those kept
    mine = documents["val"] == (name == "val")
    kept = mine & (documents["why"] == 0)
    left_out = np.bincount(documents["why"][mine & ~kept], minlength=len(WHY))
    lengths = documents["length"][kept].astype(np.int64)
    starts = np.cumsum(lengths) - lengths  # in the stream of all that are kept
    total = int(lengths.sum())
    if total == 0 or (job.kind == "cpt" and total < job.seq_len):
        raise ValueError(f"{name}: {len(lengths)} documents, {total} tokens make no row of "
                         f"{job.seq_len}; {why_no_row(documents, mine, left_out, job.kind)}")

    lost = documents["lost"][kept]
    powers = np.frexp(lengths)[1] - 1  # k for documents of 2^k to 2^(k+1) - 1 tokens
    counts = {"truncated": int((lost > 0).sum()), "lost": int(lost.sum()),
              "dropped": int(left_out.sum()), "dropped_why": why_dropped(left_out),
              "lengths": np.bincount(powers).tolist()}
    if job.kind == "cpt" and not job.no_wrap:
        # the rows are the stream itself, cut to whole rows
        n_rows = total // job.seq_len
        tokens = n_rows * job.seq_len
        write_stream(f"{path}.bin", "ids", kept, work, count)
        os.truncate(f"{path}.bin", tokens * job.dtype.itemsize)
        starts = starts[starts < tokens]
        starts.astype("<u8").tofile(f"{path}.docs.bin")
        counts |= {"rows": n_rows, "documents": len(starts), "targets": tokens, "padding": 0}
        counts["lost"] = total - tokens
    else:
        # each row is a list of documents, whose tokens are copied from the stream
        rows, packed = pack(name, lengths.tolist(), job)
        tokens = len(rows) * job.seq_len
        masked = job.kind == "ift"
        write_stream(f"{path}.ids", "ids", kept, work, count)
        if masked:
            write_stream(f"{path}.mask", "mask", kept, work, count)
        borders = [*starts.tolist(), total]
        counts |= write_rows(path, rows, borders, job.seq_len, job.dtype, job.pad, masked)
        counts |= packed
        if job.no_wrap:
            counts["truncated"] = sum(int(lengths[row].sum()) > job.seq_len for row in rows)
            counts["lost"] = total - tokens
    return {"tokens": tokens, **counts, "sha256": file_sha256(f"{path}.bin")}


def pack(name, lengths, job):
    """(documents of each row of a split, packing counts for meta.json).

    ValueError if paper_ranks is too high."""
    if job.no_wrap:
        return pack_no_wrap(lengths, job.seq_len), {}
    if job.packing == "none":
        return [[example] for example in range(len(lengths))], {}
    # val rows are in no training step, so packing='paper' does not apply to them
    if job.packing == "best_fit" or name == "val":
        return pack_best_fit(lengths, job.seq_len), {}
    rows, ratio = pack_paper(lengths, job.seq_len, job.paper_ranks, job.paper_batch,
                             job.packing_ratio, job.packing_seed, job.paper_epochs)
    rows_a_step = job.paper_ranks * job.paper_batch
    if not rows:
        raise ValueError(f"packing: {len(lengths)} examples make no step of {job.paper_ranks} GPUs "
                         f"with {int(ratio * job.paper_batch)} each; lower --paper_ranks")
    used = sum(len(row) for row in rows)
    packed = {"packing_ratio": ratio, "epochs": job.paper_epochs,
              "steps": len(rows) // (rows_a_step * job.paper_epochs),
              "unpacked": len(lengths) * job.paper_epochs - used}
    return rows, packed


# ----------------------------------------------------------------------------- the run
if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        if inspect:
            inspect_folder(inspect)
            raise SystemExit(0)
        print(knob_table(globals()))
        check_knobs(config)
        tok = load_tokenizer(tokenizer)
        choose_bos_and_eos(config, tok)
        job = plan_job(config, tok)
        out = os.path.normpath(out_dir)
        if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise FileExistsError(f"out_dir: {out} already exists; delete it or name another")

        # ---- 1: the inputs, and the code that reads them
        sources = expand(source, suffixes)
        entries = describe(sources)
        evals = expand(decontaminate, suffixes, "decontaminate")
        job.eval_ngrams, decontaminated = eval_ngrams(evals)
        settings = {knob: value for knob, value in config.items() if knob not in _free}
        chat_template = job.chat.source if job.chat else ""
        versions = {"python": platform.python_version()}
        for package in ("numpy", "sentencepiece", "tiktoken", "tokenizers"):
            versions[package] = version(package)
        code = [ROOT / "prepare_data.py", *sorted((ROOT / "text").glob("*.py"))]
        # shards are reused only under the same plan; on_bad_record changes no good record
        of_blocks = {knob: value for knob, value in settings.items() if knob not in _later}
        plan = {
            "settings": {**of_blocks, "on_bad_record": "", "block_mb": block_mb},
            "source": entries,
            "evals": [found.sha256() for found in evals],
            "tokenizer": tok.sha256, "chat_template": chat_template,
            "versions": versions,
            "code": [file_sha256(path) for path in code]}

        with written_whole(out, plan) as (folder, work):
            # ---- 2: records to shards, by worker processes
            processes = workers or processes_for(sources, block_mb)
            started = time.perf_counter()
            count, text_mb = encode_blocks(sources, encode_block, job, work, processes)
            seconds = time.perf_counter() - started

            # ---- 3: which documents stay, and which are held out
            documents, infos = read_tables(work, count)
            documents["val"] = documents["side"] < math.ceil(val_fraction * 2**64)
            # shards may be of an earlier start, which skipped bad records
            skipped = [message for info in infos for message in info["bad_first"]]
            if skipped and on_bad_record == "error":
                raise ValueError(skipped[0])
            if skipped and not len(documents):
                raise ValueError(f"all records were skipped, first {skipped[0]}")
            if id_field:
                pair = leave_out_repeated(documents)
                if pair and on_bad_record == "error":
                    again, before = [place_of(number, documents, infos) for number in pair]
                    raise ValueError(f"{again}: {id_field} is the same as that of {before}")
            if max_tokens:
                leave_out_unsampled(documents, max_tokens)

            # ---- 4: shards to the rows of each split
            splits = {"train": write_split("train", documents, work, count, folder, job)}
            if val_fraction > 0:
                splits["val"] = write_split("val", documents, work, count, folder, job)

            # ---- 5: meta.json
            records = Counter()
            for info in infos:
                records[info["name"]] += info["records"]
            for entry in entries:
                entry["records"] = records[entry["path"]]
            meta = {
                "format": 1, "kind": kind, "dtype": job.dtype.name, "seq_len": seq_len,
                "vocab_size": tok.vocab_size, "bos_id": tok.bos_id, "eos_id": tok.eos_id,
                "tokenizer_sha256": tok.sha256, "tokenizer_name": tok.name,
                "chat_template": chat_template, "source": entries,
                "skipped": sum(info["bad"] for info in infos), "skipped_first": skipped[:5],
                "decontaminated": decontaminated,
                "settings": settings, "versions": versions,
                "splits": splits, "files": checksums(folder, splits)}
            meta["examples"] = examples_of(folder, "train", meta, tok)
            Path(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")

        print_report(meta)
        print(f"tokenized {text_mb:,.1f} MB of text in {seconds:,.1f} s with {processes} "
              f"processes: {text_mb / seconds:.1f} MB/s\n-> {out_dir}")
