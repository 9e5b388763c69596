"""What train.py reads: rows of the token files that prepare_data.py wrote, and their order."""
import json
from pathlib import Path

import numpy as np
import torch

from model import IGNORE


class TokenRows:
    """Rows of one split of a token folder, memory-mapped: tokens, targets, and where documents begin. Its length is that of
    an epoch; `packed` is None, or (epochs, steps an epoch) of rows that stand in the order in which they are to be read.

    Raises FileNotFoundError or ValueError when files are missing or do not have the size meta.json says."""

    def __init__(self, folder, split="train", seq_len=0, doc_mask=True):
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"{folder}: no meta.json; make the folder with prepare_data.py")
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            counts = self.meta["splits"][split]
        except (ValueError, KeyError) as e:
            raise ValueError(f"{folder}/meta.json: not a whole meta.json of prepare_data.py ({e!r})") from None
        if seq_len and seq_len != self.meta["seq_len"] and self.meta["kind"] == "ift":
            raise ValueError(f"seq_len={seq_len}: the rows of {folder} are packed for {self.meta['seq_len']}")
        self.seq_len, self.doc_mask = seq_len or self.meta["seq_len"], doc_mask
        read = lambda name, kind, n: read_array(folder / f"{split}.{name}", kind, n)
        self.tokens = read("bin", self.meta["dtype"], counts["tokens"])
        self.starts = read("docs.bin", "uint64", None)
        self.mask = read("mask.bin", "uint8", counts["tokens"]) if self.meta["kind"] == "ift" else None
        if not (n := len(self.tokens) // self.seq_len):
            raise ValueError(f"{folder}/{split}.bin: {len(self.tokens)} tokens make no row of seq_len={self.seq_len}")
        self.packed = (counts["epochs"], counts["steps"]) if "epochs" in counts else None
        self.n = n // counts.get("epochs", 1)
        self.sha256 = counts["sha256"]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        """Row i: tokens [T] int64, targets [T] int64 (IGNORE where nothing is learned), document starts in it."""
        span = slice(i * self.seq_len, (i + 1) * self.seq_len)
        tokens = self.tokens[span].astype(np.int64)
        targets = np.append(tokens[1:], IGNORE)
        if self.mask is not None:
            targets[:-1][self.mask[span][1:] == 0] = IGNORE
        inside = self.starts[slice(*np.searchsorted(self.starts, [span.start + 1, span.stop]))].astype(np.int64)
        starts = inside - span.start
        if self.doc_mask:
            targets[starts - 1] = IGNORE  # a document's first token cannot be told from another document
        return tokens, targets, starts


def held_out(entries, seq_len=0, doc_mask=True):
    """{name: TokenRows} of NAME=FOLDER or FOLDER entries: their val split, else the train split. Raises as TokenRows does,
    and ValueError where two have one name."""
    named = dict(entry.split("=", 1) if "=" in entry else (Path(entry).name, entry) for entry in entries)
    if len(named) < len(entries):
        raise ValueError(f"{', '.join(entries)}: two of one name; say NAME=FOLDER")
    return {name: TokenRows(folder, "val" if (Path(folder) / "val.bin").exists() else "train", seq_len, doc_mask)
            for name, folder in named.items()}


def evenly_spaced(n, limit):
    """Indices of at most `limit` of n rows (0 = all), evenly spaced: neighbours may be of one document."""
    most = min(limit or n, n)
    return [i * n // most for i in range(most)]


class PlannedRows:
    """Stands for data that is still to be made: n rows (0: not known) of seq_len targets, one document each."""

    packed = None

    def __init__(self, n, seq_len):
        self.n, self.seq_len = n, seq_len

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.zeros(self.seq_len, np.int64), np.zeros(self.seq_len, np.int64), np.zeros(0, np.int64)


def read_array(path, dtype, count):
    """A file as a read-only array of `count` items (None: whatever it holds), mapped, not read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    array = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r") if path.stat().st_size else np.zeros(0, dtype)
    if count is not None and len(array) != count:
        raise ValueError(f"{path}: holds {len(array)} items, meta.json says {count}; truncated?")
    return array


def rows_of_step(step, batch, n_rows, seed, shuffle=True, packed=None):
    """Indices of the `batch` rows of a step: a pure function of its arguments. Every row comes once an epoch;
    epochs are permutations of their own and follow each other without a gap. Where the data is `packed` in an order of its
    own, that order; ValueError if it has other batches or not so many steps."""
    if packed:
        epochs, steps = packed
        if batch != n_rows // steps:
            raise ValueError(f"global_batch={batch}: the data has packing='paper', in steps of {n_rows // steps} rows; "
                             f"say --global_batch={n_rows // steps}")
        if step >= epochs * steps:
            raise ValueError(f"step {step + 1}: the data has packing='paper' for {epochs} epochs of {steps} steps; prepare it "
                             f"with --paper_epochs={step // steps + 1}")
        return np.arange(step * batch, (step + 1) * batch)
    positions = np.arange(step * batch, (step + 1) * batch)
    rows = positions % n_rows
    if shuffle:
        for epoch in np.unique(positions // n_rows):
            order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n_rows)
            rows[positions // n_rows == epoch] = order[rows[positions // n_rows == epoch]]
    return rows


def stack(rows, device):
    """Rows of TokenRows as tokens [B, T], targets [B, T] and document borders [n + 1] in the flattened B * T."""
    tokens, targets, starts = zip(*rows)
    T = len(tokens[0])
    borders = np.concatenate([np.append(0, s) + i * T for i, s in enumerate(starts)] + [[len(rows) * T]])
    return (*(torch.from_numpy(np.stack(x)).to(device) for x in (tokens, targets)),
            torch.from_numpy(borders.astype(np.int64)).to(device))
