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
    return ":" in field and field.rpartition(":")[2] in TYPES


def ids_encoder(vocab_size, dtype):
    """A function: ids as a text -> their bytes. ValueError for an id that the tokenizer lacks."""
    def encode(text):
        # eight bytes an id, see entry_of
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
    shards = []
    try:
        for shard in json.loads(Path(folder, "index.json").read_bytes())["shards"]:
            raw = shard["raw_data"]
            packed = (shard["zip_data"] or {}).get("basename")
            shards.append((Path(folder, raw["basename"]), int(raw["bytes"]), packed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    for path, size, packed in shards:
        if packed and not path.exists():
            raise ValueError(f"{knob}: {folder}/{packed} is compressed; unpack the shards beside "
                             "it (zstd -d, gzip -d, brotli -d by their names)")
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(f"{knob}: {path} is missing or not whole; index.json says {size} "
                             "bytes")
    return [str(path) for path, _, _ in shards]


def mds_rows(file, fields):
    """Yield (record, share of the shard that is read); ids only of `fields`. ValueError: no MDS."""
    # the types of ids that are asked for, by column
    asked = {}
    for field in fields or ():
        if holds_ids(field):
            name, _, dtype = field.rpartition(":")
            asked[name] = dtype
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        # where the samples are, and what is in them
        count = int.from_bytes(data[:4], "little")
        head = 4 * (count + 2)
        starts = np.frombuffer(data[4:head], "<u4").tolist()
        header = json.loads(data[head:starts[0]])
        columns = list(zip(header["column_names"], header["column_encodings"],
                           header["column_sizes"]))
        for number in range(count):
            sample = data[starts[number]:starts[number + 1]]
            yield record_of(sample, columns, asked), (number + 1) / count
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"no MDS shard, or cut short: {error!r}") from None


def record_of(sample, columns, asked):
    """A sample's bytes -> its record. columns: (name, encoding, size in bytes or None)."""
    # sizes that vary stand in front
    varying = [name for name, _, size in columns if size is None]
    at = 4 * len(varying)
    sizes = np.frombuffer(sample[:at], "<u4").tolist()
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
    """
    A column's value -> (key in the record, text as bytes, or ids as a text).

    asked: the type of ids that is asked for, or None. What is neither text nor asked for is None.
    """
    kind, *form = encoding.split(":")
    if kind == "str":
        return name, value
    if kind == "bytes":
        # they do not say what they are
        form = [asked or "|".join(TYPES), "no shape"]
    dtype = form[0] if form else kind
    if asked != dtype:
        return f"{name}:{dtype}", None
    # an array may begin with its shape: axes and bytes a number in one byte, then the numbers
    if len(form) == 1:
        axes, width = value[0] >> 2, 2 ** (value[0] & 3)
        value = value[1 + axes * width:]
    ids = np.frombuffer(value, dtype).astype("<i8")
    return f"{name}:{dtype}", ids.tobytes().hex()
