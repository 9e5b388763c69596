"""
Which documents stand in which row, and the files of these rows.

    lengths [3, 6, 4] of documents 0, 1 and 2; seq_len 8

    pack_best_fit  [[0, 2], [1]]  0 0 0 2 2 2 2 .   1 1 1 1 1 1 . .   fewest rows, nothing lost
    pack_no_wrap   [[0, 1]]       0 0 0 1 1 1 1 1   lost: a token of 1, and 2, which fills no row
    pack_paper     as llm-foundry 0.9, which the paper used: shuffled, dealt to GPUs, first fit

All take lengths and return rows, lists of document numbers; write_rows makes the files.
"""
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm


def pack_best_fit(lengths, seq_len):
    """
    Every example once, in few rows; each row ascending, rows in the order of their first example.

    Best-fit decreasing: the longest example first, each into the fullest row that has room. Rows
    are filed under the space they have left, and the bits of one integer say which spaces exist,
    so no example ever searches.
    """
    rows = []
    by_space = [[] for _ in range(seq_len + 1)]
    exist = 0  # bit s is set where by_space[s] holds a row
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # ties stay in order
    for example in longest_first:
        length = lengths[example]
        fitting = exist >> length
        if fitting:
            # the lowest bit is the least space that is enough
            lowest = (fitting & -fitting).bit_length() - 1
            space = length + lowest
            row = by_space[space].pop()
            if not by_space[space]:
                exist ^= 1 << space
        else:
            space = seq_len
            row = []
            rows.append(row)
        # file the row under its new space
        row.append(example)
        by_space[space - length].append(row)
        exist |= 1 << (space - length)
    return sorted(sorted(row) for row in rows)


def pack_no_wrap(lengths, seq_len):
    """Documents in their order, a new row where one is full; a last one that is not is left out."""
    rows = []
    row = []
    size = 0
    for document, length in enumerate(lengths):
        row.append(document)
        size += length
        if size >= seq_len:
            rows.append(row)
            row = []
            size = 0
    return rows


# -----------------------------------------------------------------------------
# llm-foundry's

def pack_first_fit(examples, lengths, seq_len, batch, leftover=()):
    """
    One call of llm-foundry's packer: (the `batch` fullest rows, the others), [(tokens, [example])].

    Longest first, each into the first row that has room, which then moves to the end of the line;
    what the call before left over stands in that line. The last examples get rows of their own if
    rows would be missing otherwise.
    """
    rows = [(size, list(row)) for size, row in leftover]
    # longest first, ties in order
    examples = sorted(examples, key=lambda i: -lengths[i])
    for number, example in enumerate(examples):
        length = lengths[example]
        may_join = len(examples) - number > batch - len(rows)
        at = None
        if may_join:
            at = first_with_room(rows, seq_len - length)
        if at is None:
            rows.append((length, [example]))
        else:
            size, row = rows.pop(at)
            rows.append((size + length, row + [example]))
    rows.sort(key=lambda row: -row[0])  # ties stay in order
    return rows[:batch], rows[batch:]


def first_with_room(rows, most):
    """The number of the first row that holds at most `most` tokens, or None."""
    for number, (size, _) in enumerate(rows):
        if size <= most:
            return number
    return None


def packed_share(examples, lengths, seq_len, batch, ratio):
    """
    (rows, leftover) of packing a GPU's examples int(ratio * batch) at a time.

    A last group of fewer than `batch` is left out.
    """
    rows = []
    leftover = []
    group = int(ratio * batch)
    for at in range(0, len(examples), group):
        part = examples[at:at + group]
        if len(part) >= batch:
            full, leftover = pack_first_fit(part, lengths, seq_len, batch, leftover)
            rows += full
    return rows, leftover


def auto_ratio(examples, lengths, seq_len, batch):
    """
    llm-foundry's packing_ratio 'auto': the highest of 20 ratios from 1 to seq_len / 100 before the
    first that leaves anything over, tried on the first 100 groups' worth of examples.
    """
    ratios = [round(ratio, 1) for ratio in np.linspace(1, max(1, seq_len / 100), 20).tolist()]
    examples = examples[:100 * int(ratios[-1] * batch)]
    best = 1.0
    for ratio in ratios:
        _, leftover = packed_share(examples, lengths, seq_len, batch, ratio)
        if leftover:
            break
        best = ratio
    return best


def pack_paper(lengths, seq_len, ranks, batch, ratio, seed, epochs=1):
    """
    Epochs of the paper's stack -> (rows in the order of its steps, ranks * batch each; ratio).

    For each epoch examples are shuffled and dealt to the ranks, which drop a last one that not all
    get, and each rank packs int(ratio * batch) of its own a step; a last incomplete group is
    dropped. Ratio 0: 'auto', the least of all ranks in the first epoch.
    """
    rows = []
    for epoch in range(epochs):
        # shuffle and deal
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = rng.permutation(len(lengths)).tolist()
        a_rank = len(lengths) // ranks
        shares = [order[rank::ranks][:a_rank] for rank in range(ranks)]
        if not ratio:
            bar = tqdm(shares, desc="packing_ratio", leave=False, disable=None)
            ratio = min(auto_ratio(share, lengths, seq_len, batch) for share in bar)
        # each rank packs its whole steps
        group = int(ratio * batch)
        steps = a_rank // group
        packed = []
        for share in shares:
            packed.append(packed_share(share[:steps * group], lengths, seq_len, batch, ratio)[0])
        # a step is `batch` rows of each rank
        for step in range(steps):
            for rank_rows in packed:
                rows += [row for _, row in rank_rows[step * batch:(step + 1) * batch]]
    return rows, ratio


# -----------------------------------------------------------------------------
# rows to files

def write_rows(path, rows, borders, seq_len, dtype, pad, masked):
    """
    Write PATH.bin, PATH.docs.bin and, if masked, PATH.mask.bin from the documents in PATH.ids and
    PATH.mask, which are removed.

    rows: document numbers; borders: where documents begin in PATH.ids, and its end. Each row is
    cut or padded to seq_len. Returns the counts of rows, documents, targets and padding.
    """
    all_ids = np.memmap(f"{path}.ids", dtype, "r")
    all_mask = np.broadcast_to(np.uint8(1), len(all_ids))
    mask_name = os.devnull
    if masked:
        all_mask = np.memmap(f"{path}.mask", np.uint8, "r")
        mask_name = f"{path}.mask.bin"
    starts = []
    targets = 0
    padding = 0
    with open(f"{path}.bin", "wb") as ids_file, open(mask_name, "wb") as mask_file:
        for number, row in enumerate(tqdm(rows, desc="rows", leave=False, disable=None)):
            ids = np.full(seq_len, pad, dtype)
            mask = np.zeros(seq_len, np.uint8)
            at = 0
            for document in row:
                starts.append(number * seq_len + at)
                start = borders[document]
                # no_wrap: what does not fit is lost
                length = min(borders[document + 1] - start, seq_len - at)
                ids[at:at + length] = all_ids[start:start + length]
                mask[at:at + length] = all_mask[start:start + length]
                at += length
            if at < seq_len:
                starts.append(number * seq_len + at)  # padding counts as a document
                padding += seq_len - at
            targets += int(mask.sum())
            ids_file.write(ids.tobytes())
            mask_file.write(mask.tobytes())
    np.array(starts, "<u8").tofile(f"{path}.docs.bin")
    Path(f"{path}.ids").unlink()
    Path(f"{path}.mask").unlink(missing_ok=True)
    documents = sum(len(row) for row in rows)
    return {"rows": len(rows), "documents": documents, "targets": targets, "padding": padding}
