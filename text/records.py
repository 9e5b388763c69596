r"""
Records, from files, folders of source files and datasets of the Hugging Face hub.

    'a.jsonl', 'src/', 'hf://datasets/OWNER/NAME/*.parquet'
        expand        -> [Source]
        read_records  -> (number, raw, bytes read so far), one a record, in order
        parse         -> the record, {"question": "2+2?", "answer": "4"}

Nothing is held in memory but the record at hand (a .txt without txt_split is one record).
"""
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import re
import textwrap
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from text.mds import mds_rows, shards_of

FORMATS = r"\.(parquet|mds|(txt|json|jsonl|ndjson)(\.gz)?)$"
CHUNK = 1 << 20  # bytes read at once
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# -----------------------------------------------------------------------------
# sources

@dataclass
class Source:
    """A file, or the files of a folder."""
    name: str              # what messages and meta.json say
    path: str              # where it lies
    files: tuple = ("",)   # of a folder: those that are documents, relative to it
    revision: str = ""     # the hub's commit

    def size(self):
        """In bytes."""
        return sum(Path(self.path, name).stat().st_size for name in self.files)

    def sha256(self, bar=None):
        """Of the bytes; of a folder, of its files' names and bytes. bar: a tqdm of bytes."""
        digest = hashlib.sha256()
        for name in self.files:
            digest.update(name.encode())
            with open(Path(self.path, name), "rb") as file:
                while True:
                    chunk = file.read(CHUNK)
                    if not chunk:
                        break
                    digest.update(chunk)
                    if bar is not None:
                        bar.update(len(chunk))
        return digest.hexdigest()


def expand(patterns, suffixes, knob="source"):
    """
    Files, folders, globs and hub datasets -> [Source], sorted within a pattern.

    A folder of MDS shards is what its index.json lists. Of another the files that end in one of
    `suffixes` count, unless they are hidden. Hub datasets are downloaded. ValueError, with the name
    of the knob, for what is not there.
    """
    found = []
    for pattern in patterns:
        # the name tells what it is
        if pattern.startswith("hf://"):
            found += from_hub(pattern, knob)
        elif os.path.isdir(pattern):
            shards = shards_of(pattern, knob)
            found += [Source(path, path) for path in shards]
            if not shards:
                found.append(from_folder(pattern, suffixes, knob))
        else:
            found += from_glob(pattern, knob)
    for path, count in Counter(source.path for source in found).items():
        if count > 1:
            raise ValueError(f"{knob}: {path} is named {count} times")
    return found


def from_folder(folder, suffixes, knob):
    """The Source of a folder's files."""
    files = []
    for path in Path(folder).rglob("*"):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.name.endswith(suffixes) and path.is_file() and not hidden:
            files.append(inside.as_posix())
    if not files and list(Path(folder).rglob("*.arrow")):
        raise ValueError(f"{knob}: {folder} was saved by datasets' save_to_disk; write it with "
                         f"load_from_disk({folder!r}).to_parquet('FILE.parquet')")
    if not files:
        raise ValueError(f"{knob}: the folder {folder} holds no {', '.join(suffixes)} file "
                         "(--suffixes says which count as documents); records are named by "
                         f"'{folder}/*.jsonl'")
    return Source(folder, folder, tuple(sorted(files)))


def from_glob(pattern, knob):
    """The Sources of a file's name or a glob."""
    # a file may have a name that reads like a glob
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"{knob}: expected a file, a folder, a glob or "
                         f"hf://datasets/OWNER/NAME; {pattern} is not there")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{knob}: expected a file, a folder, a glob or "
                             f"hf://datasets/OWNER/NAME; {path} is no file")
        check_format(path, knob)
    return [Source(path, path) for path in paths]


def check_format(path, knob):
    """ValueError for a file name of a kind that read_records does not know."""
    if not re.search(FORMATS, path):
        remedy = "; unpack it first" if re.search(r"\.(zst|xz|bz2|zip|tar)$", path) else ""
        raise ValueError(f"{knob}: expected .parquet, .mds, .txt, .json or .jsonl (the last three "
                         f"also .gz), found {path}{remedy}")


def from_hub(url, knob):
    """
    hf://datasets/OWNER/NAME[@REVISION][/GLOB] -> [Source], downloaded to the hub's cache.

    huggingface_hub resumes what was begun. A branch becomes the commit it stands for. ValueError
    says what to do where it fails.
    """
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", url)
    if not match:
        raise ValueError(f"{knob}: expected hf://datasets/OWNER/NAME, then @REVISION and /FILES "
                         f"or not; found {url}")
    # half a second, for the hub alone
    from huggingface_hub import HfApi, hf_hub_download
    repo, revision, pattern = match.groups()
    pattern = pattern or "*"
    try:
        # the files at one commit that the pattern names; of '*' those that can be read
        info = HfApi().dataset_info(repo, revision=revision, timeout=30)
        held = [file.rfilename for file in info.siblings]
        names = sorted(fnmatch.filter(held, pattern))
        if pattern == "*":
            names = [name for name in names if re.search(FORMATS, name)]
        paths = []
        for name in names:
            paths.append(hf_hub_download(repo, name, repo_type="dataset", revision=info.sha))
    except Exception as error:  # requests', httpx's and the hub's own, by its version
        raise ValueError(f"{knob}: {url}: {why_not_fetched(error, 'dataset', repo)}; or fetch it "
                         f"elsewhere (hf download {repo} --repo-type dataset "
                         f"--include '{pattern}' --local-dir DIR) and say "
                         f"--{knob}='DIR/{pattern}'") from None
    if not names:
        raise ValueError(f"{knob}: {url}: no file matches {pattern!r}; the dataset holds "
                         f"{', '.join(held[:8]) or 'nothing'}")
    for name in names:
        check_format(name, knob)
    # named by the commit, so that meta.json says exactly what went in
    sources = []
    for name, path in zip(names, paths):
        sources.append(Source(f"hf://datasets/{repo}@{info.sha}/{name}", path, revision=info.sha))
    return sources


def why_not_fetched(error, what, repo):
    """An error of huggingface_hub as the end of a message; what: "dataset" or "model"."""
    from huggingface_hub import errors
    kind = type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        page = f"datasets/{repo}" if what == "dataset" else repo
        return (f"is gated: accept its terms at https://huggingface.co/{page} and set HF_TOKEN to "
                "a token of that account")
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return f"no such {what} or revision, or a private one without HF_TOKEN ({kind})"
    # requests nests the errors of a failed connection in each other; of a whole repository the hub
    # says only that there is none of it here
    no_connection = isinstance(error, errors.LocalEntryNotFoundError)
    if no_connection or "Connect" in kind or "Timeout" in kind:
        return f"cannot be fetched from the hub ({kind}: no connection to the hub)"
    text = textwrap.shorten(str(error), 160, placeholder=" ...")
    return f"cannot be fetched from the hub ({kind}: {text})"


def describe(sources):
    """What meta.json says of each source: where it lies, its checksum and size."""
    entries = []
    size = sum(found.size() for found in sources)
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None,
              desc="checksums") as bar:
        for found in sources:
            entry = {"path": found.name, "sha256": found.sha256(bar), "bytes": found.size()}
            if found.revision:
                entry["revision"] = found.revision
            entries.append(entry)
    return entries

# -----------------------------------------------------------------------------
# records

def read_records(source, text_field="text", txt_split="", fields=None):
    """
    Yield (number, raw, bytes of the source used up).

    number  of the line in a .jsonl, else of the record, from 1; in a folder the file's name
    raw     for parse(), which turns it into the record: what is slow or can fail is left to parse,
            and so to another process. What cannot even be read comes as a ValueError in its place.
    fields  only these are read from a parquet file, and only these ids from an MDS shard
    """
    if os.path.isdir(source.path):
        yield from folder_records(source, text_field)
        return
    size = source.size()
    number = 0
    try:
        with open(source.path, "rb") as file:
            if source.name.endswith((".parquet", ".mds")):
                # bytes are not read in order: the share of rows stands for them
                rows = parquet_rows if source.name.endswith(".parquet") else mds_rows
                for number, (record, share) in enumerate(rows(file, fields), 1):
                    yield number, record, int(size * share)
            elif size:
                for number, raw in numbered_raws(file, source.name, text_field, txt_split):
                    yield number, raw, file.tell()
        if number == 0:
            yield 1, ValueError("the file holds no records"), size
    # damaged: a cut gzip file, bytes that are no UTF-8, an array that ends early; pyarrow's
    # errors are ValueErrors
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = " ".join(str(error).split())
        yield number + 1, ValueError(f"cannot be read from here on: {message}"), size


def folder_records(source, text_field):
    """Yield (name, record, bytes used up) of the files of a folder, each a document."""
    used = 0
    for name in source.files:
        content = Path(source.path, name).read_bytes()
        used += len(content)
        content = content.removeprefix(BYTE_ORDER_MARK)
        yield name, {text_field: content, "path": name}, used


def numbered_raws(file, name, text_field, txt_split):
    """Yield (number, raw) of an open .txt, .json or .jsonl, gzipped or not."""
    # number is of the line or record, also where blank lines are skipped
    stream = file
    if name.endswith(".gz"):
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file))
        name = name.removesuffix(".gz")
    if name.endswith(".txt"):
        for number, text in enumerate(split_text(stream, txt_split.encode()), 1):
            yield number, {text_field: text}
    elif name.endswith(".json") and starts_with_bracket(stream):
        for number, item in enumerate(array_items(stream), 1):
            yield number, [item]
    else:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, line


def starts_with_bracket(stream):
    """Whether a .json is an array; else it is read line by line."""
    return stream.peek(1).lstrip(BYTE_ORDER_MARK + b" \t\r\n")[:1] == b"["


def parse(raw):
    """What read_records yields -> the record, any JSON value; ValueError says why there is none."""
    # could not be read
    if isinstance(raw, ValueError):
        raise raw
    # an item of a .json array, parsed already
    if isinstance(raw, list):
        return raw[0]
    # a document or a row of a parquet file, its texts perhaps still bytes
    if isinstance(raw, dict):
        record = {}
        for key, value in raw.items():
            record[key] = value.decode() if isinstance(value, bytes) else value
        return record
    # a line of a .jsonl
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def parquet_rows(file, fields):
    """Yield (record, share of the file that is read), row group by row group."""
    # a fifth of a second, for these files alone
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.ParquetFile(file)
        # where a field is missing the message says which there are, not what they hold
        is_missing = not set(fields or ()) <= set(table.schema_arrow.names)
        columns = None if is_missing else fields
        done = 0
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(500, row_groups=[group], columns=columns,
                                            use_threads=False):
                done += len(batch)
                for record in batch.to_pylist():
                    if is_missing:
                        record = dict.fromkeys(record)
                    yield record, done / table.metadata.num_rows
    except OSError as error:
        if error.errno:
            raise
        # pyarrow's own, without errno: a page that is damaged or missing
        raise ValueError(error) from None


def split_text(stream, separator):
    r"""
    Yield a text's documents as bytes; without a separator it is one.

    A newline in the separator is \n or \r\n in the text, which itself stays as it is.
    """
    rest = stream.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    if not separator:
        yield rest + stream.read()
        return
    lines = [re.escape(line) for line in re.split(b"\r?\n", separator)]
    border = re.compile(b"\r?\n".join(lines))
    longest = 2 * len(separator)
    begun = []  # parts of a document that hold no border, each searched once
    while True:
        chunk = stream.read(CHUNK)
        if not chunk:
            break
        first, *others = border.split(rest + chunk)
        if others:
            yield b"".join([*begun, first])
            yield from others[:-1]
            begun = []
            first = others[-1]
        # a border may reach into the next chunk
        begun.append(first[:-longest])
        rest = first[-longest:]
    first, *others = border.split(rest)
    yield b"".join([*begun, first])
    yield from others


BEFORE_ITEM = re.compile(r"\s*[\[,]\s*")
AFTER_ITEM = re.compile(r"\s*[,\]]")
END_OF_ARRAY = re.compile(r"\s*\[?\s*\]\s*")


def array_items(stream):
    """Yield the items of a JSON array of any size; ValueError where it is none."""
    stream = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    decoder = json.JSONDecoder()
    text = ""
    at = 0  # behind the last item in text
    size = CHUNK
    chunk = " "
    while chunk:
        # read on; for an item that is not whole yet twice as much each time
        chunk = stream.read(size)
        text = text[at:] + chunk
        at = 0
        size = 2 * size
        wrong = "more after the array's end"
        # all items that are whole
        while True:
            mark = BEFORE_ITEM.match(text, at)
            if not mark:
                break
            try:
                item, stop = decoder.raw_decode(text, mark.end())
            except (ValueError, RecursionError) as error:  # perhaps its end is not read yet
                wrong = error
                break
            if not AFTER_ITEM.match(text, stop):
                found = text[stop:].lstrip()[:1] or "the end of the file"
                wrong = f"expected ',' or ']', found {found!r}"
                break
            yield item
            at = stop
            size = CHUNK
            wrong = "more after the array's end"
    # nothing is left to read
    if not END_OF_ARRAY.fullmatch(text, at):
        raise ValueError(f"not JSON: {wrong}")

# -----------------------------------------------------------------------------
# texts

def text_of(record, name, kinds=(str,)):
    """The text (or number, as text) in one field of a record; ValueError says what is there."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if name not in record:
        found = ", ".join(map(repr, record)) or "an empty record"
        raise ValueError(f"expected a field {name!r}, found only {found}")
    if not isinstance(record[name], kinds):
        raise ValueError(f"expected text in field {name!r}, found {type(record[name]).__name__}")
    text = str(record[name])
    # JSON can spell half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    text.encode()
    return text


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text):
    r"""
    Text as typed in a shell -> the text that is meant: \n newline, \t tab, \r carriage return,
    \\ backslash. A backslash before anything else stays, as in \sqrt.
    """
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def ngrams(text, n=13):
    """Every n words of a text in a row; case, punctuation and white space do not count."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i:i + n]) for i in range(len(words) - n + 1))


def eval_ngrams(sources):
    """
    Every 13 words in a row of eval sets, a set; and what meta.json says of each of them: short
    counts the records that have no text of 13 words and so cannot be found.
    """
    found = set()
    counts = []
    for source in sources:
        records = 0
        short = 0
        for number, raw, _ in read_records(source):
            try:
                record = parse(raw)
            except ValueError as error:
                raise ValueError(f"decontaminate: {source.name}:{number}: {error}") from None
            grams = set()
            for text in texts_in(record):
                grams.update(ngrams(text))
            found |= grams
            records += 1
            if not grams:
                short += 1
        counts.append({"path": source.name, "records": records, "short": short})
    return found, counts


def is_contaminated(turns, found_in_evals):
    """Whether a text of turns [(read, learned)] shares 13 words in a row with an eval set."""
    if not found_in_evals:
        return False
    for read, learned in turns:
        if not found_in_evals.isdisjoint(ngrams(read)):
            return True
        if not found_in_evals.isdisjoint(ngrams(learned)):
            return True
    return False


def texts_in(record):
    """All texts in a JSON value, however deep they lie."""
    values = [record]
    texts = []
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str):
            texts.append(value)
    return texts
