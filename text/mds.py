"""
MDS shards of mosaicml-streaming, in which llm-foundry keeps texts and token ids.

    shard.00000.mds = number of samples, where each begins and the last ends (uint32), columns as
                      JSON, samples; a sample = sizes of the columns that vary (uint32), columns

    column      encoding          in the record        knob
    text        str               "text": "One."       --text_field=text
    tokens      ndarray:int32     "tokens:int32": ids  --text_field=tokens:int32
    tokens      bytes             "tokens:int64": ids  --text_field=tokens:int64, or what they are

Ids travel as a text, their bytes in hexadecimal digits, which ids_encoder turns back. They get no
BOS or EOS, and a sample is a document.
"""
import json
import mmap
from pathlib import Path

import numpy as np

TYPES = ("uint16", "int32", "uint32", "int64")


def holds_ids(field):
    """Whether a text_field names a column of ids: 'tokens:int32'."""
    return field.rpartition(":")[2] in TYPES and ":" in field


def ids_encoder(vocab_size, dtype):
    """A function: ids as a text -> their bytes. ValueError for an id that the tokenizer lacks."""
    def encode(text):
        ids = np.frombuffer(bytes.fromhex(text), "<i8")
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise ValueError(f"id {wrong[0]} is not of this tokenizer, which has "
                             f"{vocab_size:,} ids")
        return ids.astype(dtype).tobytes()

    return encode


def shards_of(folder, knob):
    """The shards that a folder's index.json lists, as paths; [] without one of MDS.

    ValueError for one that is compressed, missing or not whole."""
    try:
        index = json.loads(Path(folder, "index.json").read_bytes())
        shards = [(shard["raw_data"], shard["zip_data"]) for shard in index["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    paths = []
    for raw, packed in shards:
        path = Path(folder, raw["basename"])
        if packed and not path.exists():
            raise ValueError(f"{knob}: {folder}/{packed['basename']} is compressed; unpack the "
                             "shards beside it (zstd -d, gzip -d, brotli -d by their names)")
        if not path.exists() or path.stat().st_size != raw["bytes"]:
            raise ValueError(f"{knob}: {path} is missing or not whole; index.json says "
                             f"{raw['bytes']:,} bytes")
        paths.append(str(path))
    return paths


def mds_rows(file, fields):
    """Yield (record, share of the shard that is read); ids only of `fields`. ValueError: no MDS."""
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    asked = dict(field.rsplit(":", 1) for field in fields or () if holds_ids(field))
    try:
        count = int.from_bytes(data[:4], "little")
        starts = np.frombuffer(data[4:4 * (count + 2)], "<u4").tolist()
        header = json.loads(data[4 * (count + 2):starts[0]])
        columns = [header[f"column_{key}"] for key in ("names", "encodings", "sizes")]
        for number in range(count):
            sample = data[starts[number]:starts[number + 1]]
            yield record_of(sample, list(zip(*columns)), asked), (number + 1) / count
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"no MDS shard, or cut short: {error!r}") from None


def record_of(sample, columns, asked):
    """A sample's bytes -> its record. columns: (name, encoding, size in bytes or None)."""
    varying = 4 * sum(size is None for _, _, size in columns)
    sizes = np.frombuffer(sample[:varying], "<u4").tolist()
    at = varying
    record = {}
    for name, encoding, size in columns:
        end = at + (sizes.pop(0) if size is None else size)
        key, value = entry_of(name, encoding, sample[at:end], asked.get(name))
        record[key] = value
        at = end
    if at != len(sample):
        raise ValueError(f"a sample of {len(sample)} bytes, expected {at}")
    return record


def entry_of(name, encoding, value, asked):
    """(key, text as bytes, or ids if that type is asked for) of a column; None for what is else."""
    kind, *form = encoding.split(":")
    if kind == "str":
        return name, value
    if kind == "bytes":
        # they do not say what they are
        form = [asked or "|".join(TYPES), "no shape"]
    key = ":".join([name, *(form[:1] or [kind])])
    if asked is None or form[:1] != [asked]:
        return key, None
    if len(form) == 1:
        # an array that begins with its shape: axes and bytes a number, then the numbers
        value = value[1 + (value[0] >> 2) * 2 ** (value[0] & 3):]
    return key, np.frombuffer(value, asked).astype("<i8").tobytes().hex()
