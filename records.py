"""
Records for prepare_data.py, and the texts in them: from files, folders of source files, datasets of the Hugging Face hub,
and two sources that are made here. Nothing is held in memory but the record at hand (a .txt without txt_split is one).
"""
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import random
import re
import string
import sysconfig
import tokenize
import zlib
from dataclasses import dataclass
from pathlib import Path

FORMATS = r"\.(parquet|(txt|json|jsonl)(\.gz)?)$"
CHUNK = 1 << 20  # bytes read at once

# -----------------------------------------------------------------------------
# made here

def toy_math(count, seed):
    """Yield `count` word problems in GSM8K's form, {"question", "answer"}: 1 to 3 steps, each with its
    <<expression=value>>, then '#### value'. A pure function of (count, seed)."""
    rng = random.Random(seed)
    names = "Ava Ben Chloe Dan Ella Finn Grace Hugo Iris Jack Kira Leo Mia Noah".split()
    things = "apples marbles stickers shells books coins pencils cookies stamps buttons".split()
    events = {"+": ("{friend} gives {name} {b} more.", "{name} buys {b} more.", "In the garden {name} finds {b} more."),
              "-": ("{name} gives {b} of them to {friend}.", "{b} of them get lost.", "{name} sells {b} of them."),
              "*": ("A week later {name} has {b} times as many.", "A machine turns each of them into {b}."),
              "/": ("{name} makes {b} equal piles and keeps one.", "{name} keeps one of {b} equal shares.")}
    for _ in range(count):
        name, friend = rng.sample(names, 2)
        thing, total, answer = rng.choice(things), rng.randint(4, 60), []
        question = [f"{name} {rng.choice(['has', 'picks up', 'starts with'])} {total} {thing}."]
        for _ in range(rng.randint(1, 3)):
            divisors = [d for d in range(2, 10) if total % d == 0]
            op = rng.choice("++" + "--" * (total > 1) + "*" * (total <= 60) + "/" * bool(divisors))
            b = rng.choice({"+": range(2, 31), "-": range(1, total), "*": range(2, 5), "/": divisors}[op])
            value = {"+": total + b, "-": total - b, "*": total * b, "/": total // b}[op]
            question.append(rng.choice(events[op]).format(name=name, friend=friend, b=b))
            answer.append(f"{rng.choice(['That makes', 'Now there are', f'{name} then has'])} "
                          f"{total} {op} {b} = <<{total}{op}{b}={value}>>{value} {thing}.")
            total = value
        question.append(f"How many {thing} does {name} have {rng.choice(['now', 'in the end', 'after that'])}?")
        yield {"question": " ".join(question), "answer": "\n".join(answer + [f"#### {total}"])}


def pystdlib():
    """Yield the modules of the running Python's standard library, {"path", "text"}, by path; without tests, bundled
    applications, tables, and the one module that differs between machines."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py")):
        if not left_out & {*path.split("/")} and "_sysconfigdata" not in path:
            with tokenize.open(root / path) as file:
                yield {"path": path, "text": file.read()}

# -----------------------------------------------------------------------------
# what is there

@dataclass
class Source:
    """A file, a folder or a made source: `name` is what messages and meta.json say, `path` is where it lies."""
    name: str
    path: str
    blob: bytes = b""      # the JSON lines of a made source
    suffixes: tuple = ()   # of the files of a folder that count
    revision: str = ""     # the hub's commit

    def files(self):
        """A folder's files, by path; hidden ones and those in hidden folders left out."""
        found = [path.relative_to(self.path) for path in Path(self.path).rglob("*")
                 if path.name.endswith(self.suffixes) and path.is_file()]
        return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))

    def parts(self):
        """[(what it is called, how to open it)] of all bytes that count."""
        if self.blob:
            return [("", lambda: io.BytesIO(self.blob))]
        if os.path.isdir(self.path):
            return [(name, lambda name=name: open(Path(self.path, name), "rb")) for name in self.files()]
        return [("", lambda: open(self.path, "rb"))]

    def size(self):
        if os.path.isdir(self.path):
            return sum(os.path.getsize(Path(self.path, name)) for name in self.files())
        return len(self.blob) or os.path.getsize(self.path)

    def sha256(self, tell):
        """Of the bytes; of a folder, of its files' names and bytes. tell(n) is called after every n bytes."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        for name, opened in self.parts():
            with opened() as file:
                digest.update(name.encode())
                while n := file.readinto(buffer):
                    digest.update(buffer[:n])
                    tell(n)
        return digest.hexdigest()


def expand(patterns, made, suffixes, knob="source"):
    """Files, folders, globs, hub datasets and names in `made` ({name: function that yields records}) -> [Source],
    sorted within a pattern. Hub datasets are downloaded. Raises ValueError."""
    found = []
    for pattern in patterns:
        if pattern in made:
            found.append(Source(pattern, pattern, b"".join(json.dumps(r).encode() + b"\n" for r in made[pattern]())))
        elif pattern.startswith("hf://"):
            found += from_hub(pattern, knob)
        elif os.path.isdir(pattern):
            found.append(folder := Source(pattern, pattern, suffixes=suffixes))
            if not folder.files():
                raise ValueError(f"{knob}: the folder {pattern} holds no {', '.join(suffixes)} file (--suffixes says which "
                                 f"count as documents); records are named by '{pattern}/*.jsonl'")
        else:
            paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            for path in paths or [pattern]:
                if not os.path.isfile(path):
                    raise ValueError(f"{knob}: expected a file, a folder, a glob, hf://datasets/OWNER/NAME or one of "
                                     f"{', '.join(made)}; {path} is {'no file' if paths else 'not there'}")
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
               f"and say --source='DIR/{pattern}'")
    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=30)
        names = sorted(file.rfilename for file in info.siblings if fnmatch.fnmatchcase(file.rfilename, pattern)
                       and (pattern != "*" or re.search(FORMATS, file.rfilename)))
        paths = [hf_hub_download(repo, name, repo_type="dataset", revision=info.sha) for name in names]
    except errors.GatedRepoError:
        raise ValueError(f"{knob}: {repo} is gated: accept its terms at https://huggingface.co/datasets/{repo} and set "
                         f"HF_TOKEN to a token of that account{by_hand}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(f"{knob}: {url}: no such dataset or revision, or a private one without HF_TOKEN "
                         f"({type(error).__name__}){by_hand}") from None
    except (OSError, errors.HfHubHTTPError) as error:  # ConnectionError and HF_HUB_OFFLINE's error are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{knob}: {url}: the hub cannot be reached ({type(error).__name__}: {reason}){by_hand}") from None
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
    size, number, name = source.size(), 0, source.name.removesuffix(".gz")
    try:
        if os.path.isdir(source.path):
            used = 0
            for number, opened in source.parts():
                with opened() as file:
                    content = file.read()
                used += len(content)
                yield number, {text_field: content, "path": number}, used
            return
        with source.parts()[0][1]() as file:
            if name.endswith(".parquet"):
                for number, (record, row) in enumerate(parquet_rows(file, fields), 1):
                    yield number, record, int(size * row)
            else:
                stream = gzip.GzipFile(fileobj=file) if source.name.endswith(".gz") else file
                stream = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
                if name.endswith(".txt") and size:
                    for number, text in enumerate(split_text(stream, txt_split.encode()), 1):
                        yield number, {text_field: text}, file.tell()
                elif name.endswith(".json") and stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                    for number, record in enumerate(array_items(stream), 1):
                        yield number, [record], file.tell()
                else:
                    for line_number, line in enumerate(stream, 1):
                        if not line.isspace():
                            number = line_number
                            yield number, line, file.tell()
        if not number or not size:
            yield 1, ValueError("the file holds no records"), size
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # pyarrow's are ValueErrors
        number = number + 1 if isinstance(number, int) else number
        yield number, ValueError(f"cannot be read: {' '.join(str(error).split())}"), size


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
    if not separator:
        yield stream.read().removeprefix(b"\xef\xbb\xbf")
        return
    rest, first = b"", True
    while chunk := stream.read(CHUNK):
        *whole, rest = ((rest + chunk).removeprefix(b"\xef\xbb\xbf") if first else rest + chunk).split(separator)
        first = False
        yield from whole
    yield rest


def array_items(stream):
    """Yield the items of a JSON array of any size; raises ValueError where it is none."""
    decoder, text, at, stream = json.JSONDecoder(), "", 0, io.TextIOWrapper(stream, "utf-8-sig", newline="")
    space, ended, wanted = re.compile(r"[ \t\r\n]*"), False, CHUNK

    def more():
        nonlocal text, at, ended, wanted
        chunk = stream.read(wanted)
        text, at, ended = text[at:] + chunk, 0, not chunk
        wanted *= 2  # an item longer than what is there is parsed again from its start

    def mark():
        """The next character that is no white space, or '' at the end."""
        nonlocal at
        while (at := space.match(text, at).end()) == len(text) and not ended:
            more()
        return text[at:at + 1]

    mark()
    at += 1  # the bracket
    first = True
    while mark() != "]":
        if not first:
            if mark() != ",":
                raise ValueError(f"not JSON: expected ',' or ']', found {mark() or 'the end of the file'!r}")
            at += 1
            mark()
        while True:
            try:
                item, end = decoder.raw_decode(text, at)
                if ended or end < len(text) and text[end] not in "0123456789.eE+-":  # a number may go on
                    break
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError):
                    raise ValueError(f"not JSON: {error}") from None
            more()
        at, first, wanted = end, False, CHUNK
        yield item
    at += 1
    if mark():
        raise ValueError(f"not JSON: {mark()!r} after the array's end")

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


def text_of(record, name):
    """The text in one field of a record; ValueError says what is there instead."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if name not in record:
        raise ValueError(f"expected a field {name!r}, found only {', '.join(map(repr, record)) or 'an empty record'}")
    if not isinstance(record[name], str):
        raise ValueError(f"expected text in field {name!r}, found {type(record[name]).__name__}")
    record[name].encode()  # JSON can spell half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    return record[name]


def id_of(record, name):
    """What a record has as its id, as bytes; ValueError if that is neither text nor a number."""
    if not isinstance(record, dict) or not isinstance(record.get(name), (str, int)):
        raise ValueError(f"expected text or a number in field {name!r}, found "
                         f"{'no such field' if name not in record else type(record[name]).__name__}")
    return str(record[name]).encode()


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
    """{13 words: number of the eval record they are first in}, and for each source (name, records, how many of them have
    no text of 13 words and so cannot be found)."""
    found, counts, number = {}, [], 0
    for source in sources:
        records = short = 0
        for place, raw, _ in read_records(source):
            try:
                values, grams = [parse(raw)], []
            except ValueError as error:
                raise ValueError(f"decontaminate: {source.name}:{place}: {error}") from None
            while values:  # all texts, however deep they lie
                value = values.pop()
                values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
                grams += ngrams(value) if isinstance(value, str) else []
            found.update({gram: number for gram in grams if gram not in found})
            records, short, number = records + 1, short + (not grams), number + 1
        counts.append((source.name, records, short))
    return found, counts
