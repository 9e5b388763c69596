"""
How prepare_data.py puts documents into rows: lists of lengths -> rows, each a list of document numbers. Best fit leaves least
padding; the others are those of llm-foundry 0.9, which the paper used.
"""
import numpy as np
from tqdm import tqdm


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


def pack_paper(lengths, seq_len, ranks, batch, ratio, seed, epochs=1):
    """Epochs of the paper's stack -> (rows in the order of its steps, ranks * batch each; ratio).

    For each epoch examples are shuffled and dealt to the ranks, which drop a last one that not all get, and each rank packs
    int(ratio * batch) of its own a step; a last incomplete group is dropped. Ratio 0: 'auto', the least of all ranks."""
    rows = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(lengths)).tolist()
        shares = [order[rank::ranks][:len(lengths) // ranks] for rank in range(ranks)]
        ratio = ratio or min(auto_ratio(share, lengths, seq_len, batch)
                             for share in tqdm(shares, desc="packing_ratio", leave=False, disable=None))
        group = int(ratio * batch)
        steps = len(shares[0]) // group
        packed = [packed_share(share[:steps * group], lengths, seq_len, batch, ratio)[0] for share in shares]
        rows += [row for step in range(steps) for part in packed for _, row in part[step * batch:(step + 1) * batch]]
    return rows, ratio


def pack_no_wrap(lengths, seq_len):
    """Documents in their order, a new row where one is full; a last row that is not full is left out."""
    rows, row, size = [], [], 0
    for document, length in enumerate(lengths):
        row.append(document)
        size += length
        if size >= seq_len:
            rows.append(row)
            row, size = [], 0
    return rows
