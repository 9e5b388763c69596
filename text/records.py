"""
Records, and the texts in them: from files, folders of source files and datasets of the Hugging Face hub. Nothing is held in
memory but the record at hand (a .txt without txt_split is one).
"""
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

FORMATS = r"\.(parquet|(txt|json|jsonl)(\.gz)?)$"
CHUNK = 1 << 20  # bytes read at once

# -----------------------------------------------------------------------------
# what is there

@dataclass
class Source:
    """A file, or the files of a folder: `name` is what messages and meta.json say, `path` is where it lies."""
    name: str
    path: str
    files: tuple = ("",)   # of a folder: those that are documents, relative to it
    revision: str = ""     # the hub's commit

    def size(self):
        return sum(Path(self.path, name).stat().st_size for name in self.files)

    def sha256(self, tell):
        """Of the bytes; of a folder, of its files' names and bytes. tell(n) is called after every n bytes."""
        digest = hashlib.sha256()
        for name in self.files:
            digest.update(name.encode())
            with open(Path(self.path, name), "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    tell(len(chunk))
        return digest.hexdigest()


def expand(patterns, suffixes, knob="source"):
    """Files, folders, globs and hub datasets -> [Source], sorted within a pattern; of a folder the files that end in one of
    `suffixes` count, unless they are hidden. Hub datasets are downloaded. Raises ValueError."""
    found = []
    for pattern in patterns:
        if pattern.startswith("hf://"):
            found += from_hub(pattern, knob)
        elif os.path.isdir(pattern):
            paths = [path.relative_to(pattern) for path in Path(pattern).rglob("*")
                     if path.name.endswith(suffixes) and path.is_file()]
            files = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
            if not files:
                raise ValueError(f"{knob}: the folder {pattern} holds no {', '.join(suffixes)} file (--suffixes says which "
                                 f"count as documents); records are named by '{pattern}/*.jsonl'")
            found.append(Source(pattern, pattern, tuple(files)))
        else:
            paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            for path in paths or [pattern]:
                if not os.path.isfile(path):
                    raise ValueError(f"{knob}: expected a file, a folder, a glob or hf://datasets/OWNER/NAME; "
                                     f"{path} is {'no file' if paths else 'not there'}")
                check_format(path, knob)
                found.append(Source(path, path))
    return found


def check_format(path, knob):
    if not re.search(FORMATS, path):
        raise ValueError(f"{knob}: expected .parquet, .txt, .json or .jsonl (the last three also .gz), found {path}")


def from_hub(url, knob):
    """hf://datasets/OWNER/NAME[@REVISION][/GLOB] -> [Source], downloaded to the hub's cache, where huggingface_hub goes
    on with what was begun. A branch becomes the commit it stands for. Raises ValueError with the way round."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", url)
    if not match:
        raise ValueError(f"{knob}: expected hf://datasets/OWNER/NAME, then @REVISION and /FILES or not; found {url}")
    from huggingface_hub import HfApi, errors, hf_hub_download  # half a second, which only these sources cost
    repo, revision, pattern = match.groups()
    pattern = pattern or "*"
    by_hand = (f"; or fetch it elsewhere (hf download {repo} --repo-type dataset --include '{pattern}' --local-dir DIR) "
               f"and say --{knob}='DIR/{pattern}'")
    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=30)
        names = sorted(file.rfilename for file in info.siblings if fnmatch.fnmatchcase(file.rfilename, pattern)
                       and (pattern != "*" or re.search(FORMATS, file.rfilename)))
        paths = [hf_hub_download(repo, name, repo_type="dataset", revision=info.sha) for name in names]
    except (OSError, errors.HfHubHTTPError) as error:  # ConnectionError and HF_HUB_OFFLINE's error are OSErrors
        why = f"cannot be fetched from the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if isinstance(error, errors.GatedRepoError):
            why = (f"is gated: accept its terms at https://huggingface.co/datasets/{repo} and set HF_TOKEN to a token of that "
                   "account")
        elif isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
            why = f"no such dataset or revision, or a private one without HF_TOKEN ({type(error).__name__})"
        raise ValueError(f"{knob}: {url}: {why}{by_hand}") from None
    if not names:
        held = ", ".join(file.rfilename for file in info.siblings[:8])
        raise ValueError(f"{knob}: {url}: no file matches {pattern!r}; the dataset holds {held or 'nothing'}")
    for name in names:
        check_format(name, knob)
    return [Source(f"hf://datasets/{repo}@{info.sha}/{name}", path, revision=info.sha) for name, path in zip(names, paths)]

# -----------------------------------------------------------------------------
# records

def read_records(source, text_field="text", txt_split="", fields=None):
    """Yield (number, raw, bytes of the source used up). `number` counts lines of .jsonl, else records, from 1; of a folder it
    is the file's name. `raw` is for parse(), which turns it into the record: what is costly or can fail is left to it, and
    so to another process. What cannot even be read comes as a ValueError in the record's place. Of a parquet file only
    `fields` are read."""
    number, used, size, name = 0, 0, source.size(), source.name.removesuffix(".gz")
    try:
        if os.path.isdir(source.path):
            for number in source.files:
                content = Path(source.path, number).read_bytes()
                used += len(content)
                yield number, {text_field: content, "path": number}, used
            return
        with open(source.path, "rb") as file:
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file)) if source.name.endswith(".gz") else file
            if name.endswith(".parquet"):
                for number, (record, share) in enumerate(parquet_rows(file, fields), 1):
                    yield number, record, int(size * share)
            elif size:
                if name.endswith(".txt"):
                    raws = ({text_field: text} for text in split_text(stream, txt_split.encode()))
                elif name.endswith(".json") and stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                    raws = ([item] for item in array_items(stream))
                else:
                    raws = stream  # line by line
                for place, raw in enumerate(raws, 1):
                    if not (isinstance(raw, bytes) and raw.isspace()):
                        number = place
                        yield number, raw, file.tell()
        if not number:
            yield 1, ValueError("the file holds no records"), size
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # pyarrow's are ValueErrors
        number = number + 1 if isinstance(number, int) else number
        yield number, ValueError(f"cannot be read from here on: {' '.join(str(error).split())}"), size


def parse(raw):
    """What read_records yields -> the record, any JSON value; ValueError says why there is none."""
    if isinstance(raw, ValueError):
        raise raw
    if isinstance(raw, list):
        return raw[0]
    if isinstance(raw, dict):
        return {key: value.decode() if isinstance(value, bytes) else value for key, value in raw.items()}
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def parquet_rows(file, fields):
    """Yield (record, share of the file that is read), row group by row group."""
    import pyarrow.parquet  # a fifth of a second, which only these files cost
    try:
        table = pyarrow.parquet.ParquetFile(file)
        done, columns = 0, fields if set(fields or ()) <= {*table.schema_arrow.names} else None  # None: all, for the message
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(500, row_groups=[group], columns=columns, use_threads=False):
                done += len(batch)
                for record in batch.to_pylist():
                    yield record, done / table.metadata.num_rows
    except OSError as error:  # a page that is damaged or missing; pyarrow's own message
        if error.errno:
            raise
        raise ValueError(error) from None


def split_text(stream, separator):
    """Yield a text's documents as bytes; without a separator it is one."""
    rest = stream.read(3).removeprefix(b"\xef\xbb\xbf")
    while chunk := stream.read(CHUNK if separator else -1):
        *whole, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        yield from whole
    yield from rest.split(separator) if separator else [rest]


def array_items(stream):
    """Yield the items of a JSON array of any size; raises ValueError where it is none."""
    stream, decoder = io.TextIOWrapper(stream, "utf-8-sig", newline=""), json.JSONDecoder()
    before, after, end = map(re.compile, (r"\s*[\[,]\s*", r"\s*[,\]]", r"\s*\[?\s*\]\s*"))
    text, at, size, chunk = "", 0, CHUNK, " "
    while chunk:
        chunk = stream.read(size)
        text, at, size, wrong = text[at:] + chunk, 0, 2 * size, "more after the array's end"
        while mark := before.match(text, at):  # in front of each item; `at` is behind the last one
            try:
                item, stop = decoder.raw_decode(text, mark.end())
            except (ValueError, RecursionError) as error:  # it may go on beyond what is there
                wrong = error
                break
            if not after.match(text, stop):
                wrong = f"expected ',' or ']', found {text[stop:].lstrip()[:1] or 'the end of the file'!r}"
                break
            yield item
            at, size, wrong = stop, CHUNK, "more after the array's end"
    if not end.fullmatch(text, at):
        raise ValueError(f"not JSON: {wrong}")

# -----------------------------------------------------------------------------
# texts

# What the authors of these datasets put around {prompt}; which one the paper trained with is not known, its evals have none.
TEMPLATES = {
    "none": "{prompt}",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request."
              "\n\n### Instruction:\n{prompt}\n\n### Response:",
    "magicoder": "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
                 "responses to user instructions.\n\n@@ Instruction\n{prompt}\n\n@@ Response\n"}


def tulu_turns(messages):
    """Messages [(role, content)] -> [(what is read, response)] in Tulu's form; each response ends with EOS."""
    turns, read = [], ""
    for role, content in messages:
        if role == "assistant":
            turns.append((read + "<|assistant|>\n", content.strip()))
            read = "\n"
        else:
            read += f"<|{role}|>\n{content.strip()}\n"
    return turns


def llama2_turns(messages):
    """The same in the form of Llama-2-chat, where each turn begins with BOS and blanks stand around a response."""
    turns, read, system = [], "", ""
    for role, content in messages:
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            read, system = read + f"[INST] {(system + content).strip()} [/INST]", ""
        else:
            turns.append((read, f" {content.strip()} "))
            read = ""
    return turns


CHATS = {"tulu": tulu_turns, "llama2": llama2_turns}


def text_of(record, name, kinds=(str,)):
    """The text (or number, as text) in one field of a record; ValueError says what is there instead."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if name not in record:
        raise ValueError(f"expected a field {name!r}, found only {', '.join(map(repr, record)) or 'an empty record'}")
    if not isinstance(record[name], kinds):
        raise ValueError(f"expected text in field {name!r}, found {type(record[name]).__name__}")
    text = str(record[name])
    text.encode()  # JSON can spell half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    return text


def messages_of(record, name):
    """The conversation in one field of a record, [(role, content)]; ValueError if it is none or ends without a response."""
    if isinstance(record, dict) and isinstance(record.get(name), list):
        messages = [(text_of(message, "role"), text_of(message, "content")) for message in record[name]]
        roles = [role for role, _ in messages]
        if {*roles} - {"system", "user", "assistant"} or roles[-1:] != ["assistant"]:
            raise ValueError(f"expected roles system, user and assistant, the last one assistant; found {roles[-8:]}")
        return messages
    text_of(record, name)  # names what is wrong
    raise ValueError(f"expected a list of messages in field {name!r}, found text")


def unescape(text):
    r"""Backslash-n, backslash-t and double backslash, as typed in a shell -> newline, tab, backslash."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def read_template(template, prompt_field):
    """A template's name, or a text of the user's -> (format string, {name in it: field of a record}). ValueError if it is
    not one over named fields."""
    if template in TEMPLATES:
        return TEMPLATES[template], {"prompt": prompt_field}
    text = unescape(template)
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        text.format_map(dict.fromkeys(fields, ""))
    except (ValueError, LookupError, AttributeError, TypeError):
        fields = []
    if not all(fields or [""]):
        raise ValueError(f"template: expected {', '.join([*TEMPLATES, *CHATS])}, or a text with fields such as {{question}} "
                         f"and other braces doubled; found {template!r}")
    return text, dict(zip(fields, fields))


def turns_of(record, job):
    """A record -> [(what is only read, what is learned)], one pair or one a response; of cpt [("", document)]."""
    if job.template in CHATS:
        return CHATS[job.template](messages_of(record, job.messages_field))
    text = job.template_text.format_map({name: text_of(record, field) for name, field in job.template_fields.items()})
    if job.kind == "cpt":
        return [("", text)]
    response = text_of(record, job.response_field)
    return [(text, response and job.response_prefix + response)]


def ngrams(text, n=13):
    """Every n words of a text in a row; case, punctuation and white space do not count."""
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i:i + n]) for i in range(len(words) - n + 1))


def eval_ngrams(sources):
    """Every 13 words in a row of eval sets, and for each source (name, records, how many of them have no text of 13 words
    and so cannot be found)."""
    found, counts = set(), []
    for source in sources:
        records = short = 0
        for place, raw, _ in read_records(source):
            try:
                values, grams = [parse(raw)], set()
            except ValueError as error:
                raise ValueError(f"decontaminate: {source.name}:{place}: {error}") from None
            while values:  # all texts, however deep they lie
                value = values.pop()
                values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
                grams.update(ngrams(value) if isinstance(value, str) else ())
            found |= grams
            records, short = records + 1, short + (not grams)
        counts.append((source.name, records, short))
    return found, counts
