"""
What train.py reads: rows of the token files that prepare_data.py wrote, and their order.

    train.bin       12 53 7 | 9 88 41 6 | 17 3 ...     documents one after the other
    row 0           tokens  12 53  7  9 88 41          seq_len = 6; row 1 begins at the next token
                    targets 53  7  -  88 41  -         the next token; - is IGNORE
                    starts  3                          where documents begin inside the row

    step      0     1     2     3     4     10 rows, global_batch = 4: every epoch has a permutation
    rows   3805  9614  72|19  6083  4527    of its own; epochs follow each other without a gap
"""
import hashlib
import math
from pathlib import Path

import numpy as np
import torch

from model import IGNORE
from runtime import print0, read_object
from text.tokenizer import load_tokenizer


class TokenRows:
    """Rows of one split of a token folder, memory-mapped: tokens, targets, starts of documents.

    Its length is that of an epoch. `packed` is None, or (epochs, steps per epoch) of rows that must
    be read in their order. Raises FileNotFoundError or ValueError when files
    are missing or do not have the size that meta.json says."""

    def __init__(self, folder, split="train", seq_len=0, doc_mask=True):
        folder = Path(folder)
        self.meta, counts = read_meta(folder, split)
        packed_for = self.meta["seq_len"]
        is_ift = self.meta["kind"] == "ift"
        if is_ift and seq_len and seq_len != packed_for:
            raise ValueError(f"seq_len={seq_len}: the rows of {folder} are packed for {packed_for}")
        self.seq_len = seq_len or packed_for
        self.doc_mask = doc_mask

        # the files, mapped into memory; only ift has a mask of what is learned
        self.tokens = read_array(folder / f"{split}.bin", self.meta["dtype"], counts["tokens"])
        self.starts = read_array(folder / f"{split}.docs.bin", "uint64", None)
        self.mask = None
        if is_ift:
            self.mask = read_array(folder / f"{split}.mask.bin", "uint8", counts["tokens"])

        # an incomplete row at the end is left out
        rows = len(self.tokens) // self.seq_len
        if not rows:
            raise ValueError(f"{folder}/{split}.bin: {len(self.tokens)} tokens make no row of "
                             f"seq_len={self.seq_len}")
        self.packed = (counts["epochs"], counts["steps"]) if "epochs" in counts else None
        self.n = rows // counts.get("epochs", 1)
        self.sha256 = counts["sha256"]
        self.identity = self.hash_of_rows(split)

    def hash_of_rows(self, split):
        """A sha256 of all that decides what is learned: tokens, masks, documents, row length."""
        digest = hashlib.sha256(f"{self.sha256} {self.seq_len}".encode())
        of_files = self.meta.get("files", {})
        for name in (f"{split}.mask.bin", f"{split}.docs.bin"):
            digest.update(f" {of_files.get(name)}".encode())
        return digest.hexdigest()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        """Row i: tokens [T] int64, targets [T] int64 (IGNORE: nothing is learned), starts [n]."""
        begin = i * self.seq_len
        end = begin + self.seq_len
        tokens = self.tokens[begin:end].astype(np.int64)
        if tokens.max() >= self.meta["vocab_size"]:
            raise ValueError(f"{self.tokens.filename}, row {i}: token id {tokens.max()}, its "
                             f"vocabulary has {self.meta['vocab_size']}; the file is damaged")
        targets = np.append(tokens[1:], IGNORE)
        # the mask says which tokens are to be predicted
        if self.mask is not None:
            targets[:-1][self.mask[begin + 1:end] == 0] = IGNORE
        # documents that begin inside the row; no other document predicts their first token
        first, last = np.searchsorted(self.starts, [begin + 1, end])
        starts = self.starts[first:last].astype(np.int64) - begin
        if len(starts) and (starts.min() < 1 or starts.max() >= self.seq_len):
            raise ValueError(f"{self.starts.filename}, row {i}: the starts of documents do not "
                             "ascend; the file is damaged")
        if self.doc_mask:
            targets[starts - 1] = IGNORE
        return tokens, targets, starts


class PlannedRows:
    """Stands for data that is still to be made: n rows (0: not known), each one document."""

    packed = None

    def __init__(self, n, seq_len):
        self.n = n
        self.seq_len = seq_len

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        zeros = np.zeros(self.seq_len, np.int64)
        return zeros, zeros, np.zeros(0, np.int64)


def read_meta(folder, split):
    """meta.json of a token folder, and the counts of one split in it."""
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no meta.json; make the folder with prepare_data.py")
    meta = read_object(path)
    try:
        counts = meta["splits"][split]
        check_meta(meta, counts)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not a whole meta.json of prepare_data.py ({e!r})") from None
    return meta, counts


def check_meta(meta, counts):
    """Raise KeyError, TypeError or ValueError unless all that is used of a meta.json can be."""
    for name, known in (("kind", ("cpt", "ift")), ("dtype", ("uint16", "uint32"))):
        if meta[name] not in known:
            raise ValueError(f"{name}: found {meta[name]!r}, expected {' or '.join(known)}")
    # only packing='paper' counts epochs, and the steps of one
    wanted = [(meta, "seq_len"), (meta, "vocab_size"), (counts, "tokens")]
    if "epochs" in counts:
        wanted += [(counts, "epochs"), (counts, "steps")]
    for content, name in wanted:
        if type(content[name]) is not int or content[name] < 0:
            raise ValueError(f"{name}: found {content[name]!r}, expected a whole number")
    if not meta["seq_len"] or not counts.get("epochs", 1):
        raise ValueError("seq_len or epochs is 0")
    for content, name in ((meta, "tokenizer_sha256"), (meta, "tokenizer_name"), (counts, "sha256")):
        if not isinstance(content[name], str):
            raise ValueError(f"{name}: found {content[name]!r}, expected text")
    for name in ("settings", "files"):
        if not isinstance(meta.get(name, {}), dict):
            raise ValueError(f"{name}: found {meta[name]!r}, expected an object")
    if meta["eos_id"] is not None and type(meta["eos_id"]) is not int:
        raise ValueError(f"eos_id: found {meta['eos_id']!r}, expected a token id")


def read_array(path, dtype, count):
    """A file as a read-only array of `count` items (None: whatever it holds), mapped, not read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    # an empty file cannot be mapped
    if path.stat().st_size:
        array = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    else:
        array = np.zeros(0, dtype)
    if count is not None and len(array) != count:
        raise ValueError(f"{path}: holds {len(array)} items, meta.json says {count}; truncated?")
    return array


def held_out(entries, seq_len=0, doc_mask=True):
    """{name: TokenRows} of NAME=FOLDER or FOLDER entries: their val split, else the train split.

    Raises as TokenRows does, and ValueError where two have one name."""
    folders = {}
    for entry in entries:
        name, equals, folder = entry.partition("=")
        if not equals:
            folder = entry
            name = Path(folder).name
        if name in folders:
            raise ValueError(f"{', '.join(entries)}: two of one name; say NAME=FOLDER")
        folders[name] = folder
    sets = {}
    for name, folder in folders.items():
        # data without a val split is a set to watch as a whole
        split = "val" if (Path(folder) / "val.bin").exists() else "train"
        sets[name] = TokenRows(folder, split, seq_len, doc_mask)
    return sets


def open_sets(knobs, shape):
    """The rows to train on, and {name: rows} of the sets to watch; of the knobs data and val_data.

    shape: LlamaConfig of the model in knobs.base. Raises as TokenRows does, and ValueError
    for data of another tokenizer and for rows that are too long."""
    train_rows = TokenRows(knobs.data, "train", knobs.seq_len, knobs.doc_mask)
    # the data's own val split, if it has one, comes first
    entries = list(knobs.val_data)
    if "val" in train_rows.meta["splits"]:
        entries.insert(0, f"val={knobs.data}")
    watched = held_out(entries, knobs.seq_len, knobs.doc_mask)
    tokenizer = tokenizer_of(knobs.base)
    for rows in (train_rows, *watched.values()):
        check_ids(rows, shape.vocab_size, knobs.base)
        if tokenizer is not None:
            check_tokenizer(knobs.base, tokenizer, rows.meta)
    check_length(train_rows, shape)
    return train_rows, watched


def tokenizer_of(folder):
    """The tokenizer of a model's folder, or None; says which of its files counts."""
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        print0(f"note: {folder} has no tokenizer, so only the size of the data's vocabulary "
               "could be checked; its checkpoints will need --tokenizer")
        return None
    for line in tokenizer.notes:
        print0(line)
    return tokenizer


def check_ids(rows, vocab_size, folder):
    """Raise ValueError for rows with an id that the model in `folder` has no embedding for."""
    if rows.meta["vocab_size"] <= vocab_size:
        return
    # a tokenizer may have more ids (an added pad) so long as no text uses them
    highest = int(rows.tokens.max())
    if highest >= vocab_size:
        raise ValueError(f"data has token id {highest}, the model a vocabulary of {vocab_size}; "
                         f"prepare the data again with --tokenizer={folder}")


def check_tokenizer(folder, tokenizer, meta):
    """Raise ValueError for data made with another tokenizer, or EOS, than the model folder's."""
    if meta["tokenizer_sha256"] not in tokenizer.same_sha256:
        ours = f"{meta['tokenizer_name']}, sha256 {meta['tokenizer_sha256'][:12]}"
        raise ValueError(f"data was made with another tokenizer than the model's: {ours}; {folder} "
                         f"has {tokenizer.name}, sha256 {tokenizer.sha256[:12]}; prepare the data "
                         f"again with --tokenizer={folder}")
    has_eos = meta.get("settings", {}).get("add_eos", True)
    if has_eos and meta["eos_id"] != tokenizer.eos_id:
        raise ValueError(f"data ends its documents with EOS id {meta['eos_id']}; the EOS of "
                         f"{folder} is {tokenizer.eos_id}")


def check_length(rows, shape):
    """Raise ValueError for rows that are longer than the model can read."""
    if rows.seq_len > shape.max_position_embeddings:
        raise ValueError(f"seq_len={rows.seq_len} is longer than the model's "
                         f"max_position_embeddings={shape.max_position_embeddings}; lower "
                         "--seq_len (cpt) or prepare the data again with it (ift)")


def evenly_spaced(n, limit):
    """Indices of at most `limit` of n rows (0 = all), evenly spaced.

    Spaced, because neighbouring rows may be of one document."""
    most = min(limit or n, n)
    return [i * n // most for i in range(most)]


def rows_of_step(step, batch, n_rows, seed, shuffle=True, packed=None):
    """Indices of the `batch` rows of a step: a pure function of its arguments.

    Every row comes once an epoch; epochs are permutations of their own and follow each other
    without a gap. Data `packed` in an order of its own is read in that order; ValueError if it has
    other batches or not so many steps."""
    # positions in the endless sequence of epochs
    positions = np.arange(step * batch, (step + 1) * batch)
    if packed:
        check_packed(step, batch, n_rows, *packed)
        return positions
    rows = positions % n_rows
    # a batch may hold the end of one epoch and the beginning of the next
    if shuffle:
        for epoch in np.unique(positions // n_rows):
            # the epoch's permutation depends on nothing else, so any step can be read first
            in_epoch = positions // n_rows == epoch
            generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            order = generator.permutation(n_rows)
            rows[in_epoch] = order[rows[in_epoch]]
    return rows


def check_packed(step, batch, n_rows, epochs, steps):
    """Raise ValueError unless data with packing='paper' has this step, in batches of this size."""
    rows_a_step = n_rows // steps
    if batch != rows_a_step:
        raise ValueError(f"global_batch={batch}: the data has packing='paper', in steps of "
                         f"{rows_a_step} rows; say --global_batch={rows_a_step}")
    if step >= epochs * steps:
        raise ValueError(f"step {step + 1}: the data has packing='paper' for {epochs} epochs of "
                         f"{steps} steps; prepare it with --paper_epochs={step // steps + 1}")


def without_padding(rows, compiled=False):
    """The rows of a microbatch, cut to one length that holds all their targets.

    The length is a multiple of 16 (at most that of the rows); what follows, such as padding,
    changes no loss. A compiled model takes whole rows: it would be compiled again for every other
    length."""
    if compiled:
        return rows
    needed = 1
    for _, targets, _ in rows:
        places = np.flatnonzero(targets != IGNORE)
        needed = max(needed, places.max(initial=0) + 1)
    length = math.ceil(needed / 16) * 16
    return [(tokens[:length], targets[:length], starts[starts < length])
            for tokens, targets, starts in rows]


def stack(rows, device, compiled=False):
    """Rows of TokenRows as tokens [B, T], targets [B, T] and borders of documents [n + 1].

    T is that of without_padding. The borders are positions in the flattened B * T; a row's border
    is one of a document, too."""
    tokens, targets, starts = zip(*without_padding(rows, compiled))
    length = len(tokens[0])
    # the beginning of each row, the documents inside it, and at last the end
    borders = []
    for i, inside in enumerate(starts):
        borders += [i * length, *(inside + i * length)]
    borders.append(len(rows) * length)
    tokens = torch.from_numpy(np.stack(tokens))
    targets = torch.from_numpy(np.stack(targets))
    borders = torch.tensor(borders, dtype=torch.int64)
    return tokens.to(device), targets.to(device), borders.to(device)
