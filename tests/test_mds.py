"""MDS shards, written byte for byte as mosaicml-streaming 0.13.0 writes them, through prepare_data.py."""
import hashlib
import json
import shutil

import numpy as np
import pytest
from conftest import need, run_here
from hypothesis import given, settings
from hypothesis import strategies as st

from text.mds import entry_of
from text.tokenizer import load_tokenizer

CONFIG = {"version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 26}


def encoded(encoding, value):
    """A value's bytes in a column."""
    kind, *form = encoding.split(":")
    if kind == "str":
        return value.encode()
    if kind == "int":
        return np.int64(value).tobytes()
    if kind == "bytes" or len(form) == 2:
        return bytes(value)
    # without a fixed shape it comes first: axes * 4 + log2 of the bytes a number, then the numbers
    size = next(k for k in range(4) if max(value.shape) < 256 ** 2 ** k)
    shape = np.array(value.shape).astype(f"<u{2 ** size}")
    return bytes([value.ndim << 2 | size]) + shape.tobytes() + value.tobytes()


def fixed_size(encoding):
    kind, *form = encoding.split(":")
    if len(form) == 2:
        return int(form[1]) * np.dtype(form[0]).itemsize
    return 8 if kind == "int" else None


def write_mds(folder, columns, shards):
    """columns: {name: encoding}; shards: lists of samples {name: value}."""
    names = sorted(columns)
    layout = {"column_names": names, "column_encodings": [columns[name] for name in names],
              "column_sizes": [fixed_size(columns[name]) for name in names]}
    header = json.dumps({**CONFIG, **layout}, sort_keys=True).encode()
    folder.mkdir()
    listed = []
    for number, samples in enumerate(shards):
        blobs = []
        for sample in samples:
            data = [encoded(columns[name], sample[name]) for name in names]
            varying = [len(value) for value, size in zip(data, layout["column_sizes"]) if size is None]
            blobs.append(np.array(varying, "<u4").tobytes() + b"".join(data))
        starts = np.cumsum([0, *map(len, blobs)]) + 4 * (len(blobs) + 2) + len(header)
        content = np.uint32(len(blobs)).tobytes() + starts.astype("<u4").tobytes() + header + b"".join(blobs)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        listed.append({**CONFIG, **layout, "raw_data": raw, "samples": len(samples), "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"shards": listed, "version": 2}, sort_keys=True))
    return folder


ROWS = [np.arange(i, i + 16) * 7 % 500 + 3 for i in range(6)]


def write_ids(folder, encoding, type_of_bytes="int64"):
    """Six rows of 16 ids in two shards, in the column 'tokens'."""
    dtype = type_of_bytes if encoding == "bytes" else encoding.split(":")[1]
    samples = [{"tokens": row.astype(dtype)} for row in ROWS]
    return write_mds(folder, {"tokens": encoding}, [samples[:4], samples[4:]])


TEXTS = [{"prompt": f"{i} + é?", "response": f"{i} é", "number": i} for i in range(5)]
TEXT_COLUMNS = {"prompt": "str", "response": "str", "number": "int"}


def digest(folder):
    """Of the bytes of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Runs the stage in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(**knobs):
        knobs = {"tokenizer": need("data/stories260k"), "out_dir": "data", "seq_len": 16, "val_fraction": 0, **knobs}
        done = run_here("prepare_data.py", *(f"--{name}={value}" for name, value in knobs.items()))
        return done.returncode, done.stdout, done.stderr
    return run


# sha256 of what MDSWriter of mosaicml-streaming 0.13.0 makes of the same samples, (encoding, type of the ids) -> file
STREAMING = {("ndarray:int32", "int32"): "5a3e932d7725abf3", ("ndarray:int32:16", "int32"): "1a21fa6162e79f69",
             ("ndarray:uint16", "uint16"): "e904ddfd828125a9", ("ndarray:int64", "int64"): "4b6efb7dd78a141a",
             ("bytes", "int64"): "8849eeecdf9a8e97", ("bytes", "uint16"): "c1fddc2da1c4474d", ("bytes", "int32"): "16a94ed0eb95781c"}


def test_the_writer_of_these_tests_is_streaming_s(tmp_path):
    for number, ((encoding, dtype), wanted) in enumerate(STREAMING.items()):
        folder = write_mds(tmp_path / str(number), {"tokens": encoding}, [[{"tokens": row.astype(dtype)} for row in ROWS]])
        assert digest(folder) == wanted, (encoding, dtype)
    # columns of several kinds, and a shape that takes two bytes
    assert digest(write_mds(tmp_path / "texts", TEXT_COLUMNS, [TEXTS])) == "2487b3db948d4e23"
    wide = [{"tokens": np.arange(300 * i, 300 * (i + 1)).astype("int32") % 512} for i in range(3)]
    assert digest(write_mds(tmp_path / "wide", {"tokens": "ndarray:int32"}, [wide])) == "b04791dea8a92176"


@pytest.mark.parametrize("encoding, type_of_bytes", STREAMING)
@pytest.mark.parametrize("source", ["mds", "mds/*.mds"])
def test_ids_stay_as_they_are(prepare, tmp_path, encoding, type_of_bytes, source):
    write_ids(tmp_path / "mds", encoding, type_of_bytes)
    status, out, err = prepare(source=source, text_field=f"tokens:{type_of_bytes}")
    assert status == 0, err
    assert "no BOS or EOS is added" in out
    # every id in its place, each row a document of its own
    assert np.array_equal(np.fromfile("data/train.bin", "<u2"), np.concatenate(ROWS))
    assert np.fromfile("data/train.docs.bin", "<u8").tolist() == [0, 16, 32, 48, 64, 80]
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert [entry["path"] for entry in meta["source"]] == ["mds/shard.00000.mds", "mds/shard.00001.mds"]
    assert meta["settings"]["bos"] is False and meta["settings"]["add_eos"] is False


def test_texts_are_records(prepare, tmp_path):
    write_mds(tmp_path / "mds", TEXT_COLUMNS, [TEXTS[:2], TEXTS[2:]])
    status, _, err = prepare(source="mds", kind="ift")
    assert status == 0, err
    from_shards = (tmp_path / "data/train.bin").read_bytes()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    assert prepare(source="a.jsonl", kind="ift", out_dir="same")[0] == 0
    assert from_shards == (tmp_path / "same/train.bin").read_bytes()


@settings(deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=300), st.sampled_from(["uint16", "int32", "uint32", "int64"]),
       st.booleans())
def test_any_array(ids, dtype, fixed):
    try:
        array = np.array(ids, dtype)
    except OverflowError:
        return
    encoding = f"ndarray:{dtype}:{len(ids)}" if fixed else f"ndarray:{dtype}"
    key, text = entry_of("tokens", encoding, encoded(encoding, array), dtype)
    assert key == f"tokens:{dtype}"
    assert np.frombuffer(bytes.fromhex(text), "<i8").tolist() == ids


@pytest.mark.parametrize("knobs, message", [
    ({"text_field": "text"}, "mds/shard.00000.mds:1: expected a field 'text', found only 'tokens:int32'"),
    ({"text_field": "tokens:int64"}, "mds/shard.00000.mds:1: expected a field 'tokens:int64', found only 'tokens:int32'"),
    ({"bos": True}, "bos: a source of ids (tokens:int32) expects None, found True"),
    ({"kind": "ift"}, "text_field: expected kind=cpt, found 'tokens:int32'"),
    ({"template": "{text}"}, "template: a source of ids"),
    ({"decontaminate": "mds"}, "decontaminate: a source of ids"),
])
def test_mistakes_of_knobs(prepare, tmp_path, knobs, message):
    write_ids(tmp_path / "mds", "ndarray:int32")
    status, _, err = prepare(**{"source": "mds", "text_field": "tokens:int32", **knobs})
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "data").exists()


def test_bytes_need_a_type(prepare, tmp_path):
    write_ids(tmp_path / "mds", "bytes")
    assert "found only 'tokens:uint16|int32|uint32|int64'" in prepare(source="mds", text_field="text")[2]
    # of a wrong type: half a number, or ids that no tokenizer has
    shutil.rmtree(tmp_path / "mds")
    write_ids(tmp_path / "mds", "bytes", "uint16")
    assert "shard.00000.mds:1: id 6755472456155139 is not" in prepare(source="mds", text_field="tokens:int64")[2]


def test_damaged_shards(prepare, tmp_path):
    folder = write_ids(tmp_path / "mds", "ndarray:int32")
    first = folder / "shard.00000.mds"
    content = first.read_bytes()
    # cut short: the index knows, and the shard by itself does
    first.write_bytes(content[:-5])
    assert "mds/shard.00000.mds is missing or not whole" in prepare(source="mds", text_field="tokens:int32")[2]
    status, _, err = prepare(source="mds/*.mds", text_field="tokens:int32")
    assert status == 2 and "mds/shard.00000.mds:4: cannot be read from here on: " in err and err.count("\n") == 1, err
    for wrong in (b"", b"\1", b"\0" * 40, b"\xff" * 400, content[:30], b"PK\3\4" * 100):
        first.write_bytes(wrong)
        status, _, err = prepare(source="mds/*.mds", text_field="tokens:int32")
        assert status == 2 and "mds/shard.00000.mds:1: " in err and err.count("\n") == 1, err
    first.unlink()
    assert "mds/shard.00000.mds is missing or not whole" in prepare(source="mds", text_field="tokens:int32")[2]


def test_compressed_shards_are_refused_with_the_way_to_unpack_them(prepare, tmp_path):
    folder = write_ids(tmp_path / "mds", "ndarray:int32")
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"]
        (folder / name).rename(folder / f"{name}.zstd")
        shard["zip_data"] = {"basename": f"{name}.zstd", "bytes": 1, "hashes": {}}
    (folder / "index.json").write_text(json.dumps(index))
    status, _, err = prepare(source="mds", text_field="tokens:int32")
    assert status == 2 and "mds/shard.00000.mds.zstd is compressed; unpack the shards beside it (zstd -d" in err
    # what streaming leaves when it unpacked them itself
    for path in folder.glob("*.zstd"):
        path.with_suffix("").write_bytes(path.read_bytes())
    status, _, err = prepare(source="mds", text_field="tokens:int32")
    assert status == 0, err


def test_an_id_that_the_tokenizer_lacks_is_named(prepare, tmp_path):
    rows = [np.array([1, 5, 9] * 8), np.array([1, 512, 9]), np.array([1, -100, 9])]
    write_mds(tmp_path / "mds", {"tokens": "ndarray:int64"}, [[{"tokens": row} for row in rows]])
    status, _, err = prepare(source="mds", text_field="tokens:int64")
    assert status == 2 and "mds/shard.00000.mds:2: id 512 is not of this tokenizer, which has 512 ids" in err
    status, out, err = prepare(source="mds", text_field="tokens:int64", on_bad_record="skip")
    assert status == 0 and "2 bad records skipped" in out and "mds:3: id -100 is not" in out
    assert load_tokenizer(need("data/stories260k")).vocab_size == 512
