"""
What is in a data folder: documents as text, counts, and whether its files are as they were written.

    [<BOS>Question: 2+2?\\nAnswer:]« 4<EOS>»      [only read] «learned»
           16 to        31 tokens         12  ####
"""
import itertools
import os
from pathlib import Path

import numpy as np

from runtime import read_object
from text.mds import holds_ids
from text.shards import WHY, file_sha256
from text.templates import OWN

# what to do where a split's documents are all dropped, by the reason
AGAINST = {"empty": "see source and the fields", "no room": "give a larger seq_len",
           "contaminated": "see decontaminate", "repeated id": "see id_field",
           "not sampled": "give more max_tokens"}
# What knobs may be where documents are ids
FOR_IDS = {"kind": ("cpt",), "bos": (None, False), "double_bos": (False,), "template": ("none",),
           "decontaminate": ((),)}


def show_document(folder, name, meta, tok, which, most=4000, longest=800):
    """Document `which` of a split: only read text in [brackets], learned text in «angles».

    most: tokens of it that are read; longest: characters of a text, which loses its middle."""
    # its place in the split, and its first ids
    all_ids = np.memmap(f"{folder}/{name}.bin", meta["dtype"], "r")
    starts = np.memmap(f"{folder}/{name}.docs.bin", "<u8", "r")
    start = int(starts[which])
    end = int(starts[which + 1]) if which + 1 < len(starts) else len(all_ids)
    ids = all_ids[start:min(end, start + most)].tolist()
    mask_path = Path(folder, f"{name}.mask.bin")
    mask = np.ones(len(ids), np.int8)  # cpt: all is learned
    if mask_path.exists():
        mask = np.fromfile(mask_path, np.int8, len(ids), offset=start)

    # runs: of equal mask, and a special token by itself
    marks = {i: name for name, i in tok.special_ids.items()}
    marks |= {tok.bos_id: "<BOS>", tok.eos_id: "<EOS>"}  # one id for both is EOS, but in front
    borders = {0, len(ids), *(np.flatnonzero(np.diff(mask)) + 1).tolist()}
    for place, i in enumerate(ids):
        if i in marks:
            borders |= {place, place + 1}
    # the text of a run: what the ids up to its end add to the text before
    texts = []  # (learned, text)
    text_before = ""
    for first, end_of_run in itertools.pairwise(sorted(borders)):
        text = tok.decode([i for i in ids[:end_of_run] if i not in marks])
        piece = marks.get(ids[first], text[len(text_before):])
        if first == 0 and ids[0] == tok.bos_id:
            piece = "<BOS>"
        texts.append((mask[first], piece))
        text_before = text
    shown = ""
    for learned, runs in itertools.groupby(texts, key=lambda run: run[0]):
        piece = "".join(text for _, text in runs)
        if len(piece) > longest:
            left_out = len(piece) - longest
            piece = f"{piece[:longest // 2]} ({left_out} characters more) {piece[-longest // 2:]}"
        shown += f"«{piece}»" if learned else f"[{piece}]"
    if end > start + most:
        shown += f" and {end - start - most} tokens more"
    return shown


def examples_of(folder, name, meta, tok):
    """The first document of a split, one from the middle and the last one, as shown text."""
    starts = np.memmap(f"{folder}/{name}.docs.bin", "<u8", "r")
    # a set: a split may have fewer than three documents
    places = {0, len(starts) // 2, len(starts) - 1}
    if meta["kind"] == "ift":
        # padding is a document without a target: show what stands before it
        mask = np.memmap(f"{folder}/{name}.mask.bin", np.uint8, "r")
        borders = [*starts.tolist(), len(mask)]
        learned = set()
        for place in places:
            if mask[borders[place]:borders[place + 1]].any():
                learned.add(place)
            else:
                learned.add(place - 1)
        places = learned
    return [show_document(folder, name, meta, tok, place) for place in sorted(places)]


def print_report(meta):
    """All that meta.json says about its data, for reading."""
    # what went in
    for entry in meta["source"]:
        print(f"{entry['path']}: {entry['records']:,} records, {entry['bytes']:,} bytes, "
              f"sha256 {entry['sha256'][:12]}")
    print(f"{meta['skipped']:,} bad records skipped", *meta["skipped_first"], sep="\n  ")
    for entry in meta["decontaminated"]:
        print(f"decontamination: {entry['path']}: {entry['records']:,} records, "
              f"{entry['short']:,} of them too short to be found by 13 words")
    # what came out
    for name, counts in meta["splits"].items():
        print_split(name, counts, meta["seq_len"])
    print("documents of train, [read only] and «learned»:", *meta["examples"], sep="\n")


def print_split(name, counts, seq_len):
    """The counts of train or val, and how long its documents are."""
    reasons = [f"{count:,} {reason}" for reason, count in counts["dropped_why"].items()]
    filled = 1 - counts["padding"] / counts["tokens"]
    print(f"{name}: {counts['documents']:,} documents in {counts['rows']:,} rows of {seq_len}; "
          f"{counts['tokens']:,} tokens, {counts['targets']:,} of them targets, "
          f"{filled:.2%} filled; "
          f"{counts['dropped']:,} documents dropped ({', '.join(reasons) or 'none'}), "
          f"{counts['truncated']:,} truncated, {counts['lost']:,} tokens cut off")
    # packing='paper'
    if "steps" in counts:
        rows_a_step = counts["rows"] // counts["steps"] // counts["epochs"]
        print(f"{name}: packing_ratio {counts['packing_ratio']}: {counts['epochs']:,} epochs of "
              f"{counts['steps']:,} steps of {rows_a_step} rows; "
              f"{counts['unpacked']:,} documents left over")
    # documents of 2^k to 2^(k+1) - 1 tokens; the longest bar has 40 marks, the shortest 1
    most = max(counts["lengths"])
    for power, count in enumerate(counts["lengths"]):
        if count:
            bar = "#" * -(-40 * count // most)
            print(f"  {2 ** power:9,} to {2 ** (power + 1) - 1:9,} tokens {count:10,}  {bar}")


def choose_bos_and_eos(config, tok):
    """Set the knobs bos and add_eos as they hold for this tokenizer and source, and print them.

    ValueError for knobs that a source of ids has no use for."""
    for line in tok.notes:
        print(line)
    if holds_ids(config["text_field"]):
        # ids have theirs already
        for knob, expected in FOR_IDS.items():
            if config[knob] not in expected:
                raise ValueError(f"{knob}: a source of ids ({config['text_field']}) expects "
                                 f"{expected[0]!r}, found {config[knob]!r}")
        config["bos"] = config["add_eos"] = False
        print(f"tokenizer: {tok.name}; documents are ids that stay as they are: no BOS or EOS is "
              "added")
        return
    if config["template"] == OWN:
        if config["bos"]:
            raise ValueError(f"bos: --template={OWN} says itself where BOS stands, found True")
        config["bos"] = config["add_eos"] = False
        print(f"tokenizer: {tok.name}; special tokens are where its chat template puts them")
        return
    # as the knob says, or the tokenizer does
    if config["double_bos"]:
        config["bos"] = True
    elif config["bos"] is None:
        config["bos"] = tok.adds_bos
    habit = "puts one" if tok.adds_bos else "puts none"
    front = "with" if config["bos"] else "without"
    print(f"tokenizer: {tok.name}, BOS {tok.bos_id} (by itself it {habit}), EOS {tok.eos_id}; "
          f"documents begin {front} BOS")


def why_dropped(left_out):
    """{why: how many}, of the documents left out, which are counted by their place in WHY."""
    return {why: int(count) for why, count in zip(WHY, left_out) if count}


def why_no_row(documents, mine, left_out, kind):
    """
    The end of the message for a split without a row: what was dropped, and what to do.

    mine: which of the documents are of this split.
    """
    dropped = why_dropped(left_out)
    reasons = [f"{count} {why}" for why, count in dropped.items()]
    found = f"{left_out.sum()} dropped ({', '.join(reasons) or 'none'})"
    others = len(documents) - int(mine.sum())
    # all are dropped: what to do depends on why most are
    if dropped and left_out.sum() == mine.sum():
        return f"{found}; {AGAINST[max(dropped, key=dropped.get)]}"
    if not others:
        if mine.any():
            return f"{found}; give more text or a smaller seq_len"
        return f"{found}; see source and the fields"
    if kind == "ift":
        unit = "prompts"
        remedy = "give more prompts or --val_fraction=0"
    else:
        unit = "documents"
        remedy = ("give more of them (txt_split cuts .txt files), another --val_fraction, or "
                  "--val_fraction=0")
    return f"{found}; {unit} are held out whole, {others} went to the other split: {remedy}"


def inspect_folder(folder):
    """Print the report of a data folder and verify its files. Raises OSError or ValueError."""
    meta = read_object(Path(folder, "meta.json"), "not a data folder")
    try:
        print_report(meta)
        files = {str(name): str(digest) for name, digest in meta["files"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}/meta.json: not a whole meta.json of this script "
                         f"({error!r})") from None
    # the files
    for name, digest in files.items():
        path = f"{folder}/{name}"
        if not os.path.isfile(path):
            raise ValueError(f"{path}: missing")
        found = file_sha256(path)
        if found != digest:
            raise ValueError(f"{path}: sha256 is {found[:12]}, meta.json says {digest[:12]}; "
                             "damaged or cut short")
    print(f"{len(files)} files as meta.json has them")
