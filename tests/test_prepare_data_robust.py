"""prepare_data.py under stress: any number of workers, kills, damaged input, and data that repeats or leaks."""
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, need, run_here, run_stage, run_warm
from hypothesis import given, settings
from hypothesis import strategies as st
from warm import Warm
from samples import byte_tokenizer
from test_prepare_data import documents_of, prepare, tokenizer_file, write_jsonl  # noqa: F401 (fixtures)

from quickstart import pystdlib, toy_math
from runtime import join_ranks, pick_device
from text.encode import WordCache, make_encoder, word_by_word
from text.records import ngrams
from text.shards import DOCUMENT, WHY, leave_out_unsampled
from text.tokenizer import load_tokenizer

WORDS = "the a cat sat on mat def return x = 1 2024 é 😀 naïve </s> ▁ \t \n  \r\n".split(" ")


def write_corpus(folder, count=400, seed=0):
    """Documents of all lengths in three files; returns them in order."""
    rng, records = random.Random(seed), []
    for number in range(count):
        words = rng.choices(WORDS, k=rng.choice([0, 3, 30, 300]))
        records.append({"id": number, "text": " ".join(words), "prompt": f"p{number} " + " ".join(words[:9]),
                        "response": " ".join(words[9:])})
    write_jsonl(folder / "a.jsonl", records[:150])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records[150:300]).encode()))
    (folder / "c.json").write_text(json.dumps(records[300:]))
    return records


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def corpus(tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return {"source": "a.jsonl,b.jsonl.gz,c.json", "tokenizer": tokenizer_file, "seq_len": 64, "block_mb": 0.01,
            "val_fraction": 0.1, "out_dir": "data"}


def flags(**knobs):
    return [f"--{name}={value}" for name, value in knobs.items()]


def run_anew(**knobs):
    """A run in this process, without the data of the one before."""
    shutil.rmtree("data", ignore_errors=True)
    return run_here("prepare_data.py", *flags(**knobs))


# ---- the same bytes, whoever does the work and however often it is interrupted

@pytest.mark.parametrize("knobs", [{}, {"no_wrap": True, "id_field": "id"}, {"kind": "ift", "max_tokens": 9000}])
def test_workers_and_blocks_change_nothing(corpus, tmp_path, knobs):
    outputs = []
    for workers, block_mb in [(1, 100), (1, 0.01), (3, 0.01), (2, 0.03)]:
        done = run_anew(**{**corpus, **knobs, "workers": workers, "block_mb": block_mb})
        assert done.returncode == 0, done.stderr
        outputs.append(contents(tmp_path / "data"))
        assert not (tmp_path / "data.work").exists()
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3] and len(outputs[0]["train.bin"]) > 10000


def test_kill_and_go_on(corpus, tmp_path):
    """kill -9 at a random moment after the first trace on disk (DATA_KILLS=20 for more of them), then the same command."""
    knobs, rng, done_blocks = flags(**{**corpus, "workers": 2, "block_mb": 0.004, "kind": "ift"}), random.Random(7), []
    assert run_here("prepare_data.py", *knobs).returncode == 0
    wanted = contents(tmp_path / "data")
    for _ in range(int(os.environ.get("DATA_KILLS", 3))):
        shutil.rmtree(tmp_path / "data")
        run, delay = Warm([sys.executable, ROOT / "prepare_data.py", *knobs], cwd=tmp_path), rng.uniform(0, 0.3)
        while not (tmp_path / "data.work").exists() and run.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        run.kill()
        run.wait()
        done_blocks.append(len(list(tmp_path.glob("data.work/*.npz"))) if not (tmp_path / "data").exists() else "all")
        if not (tmp_path / "data").exists():
            again = run_here("prepare_data.py", *knobs)
            taken = re.search(r"resuming with (\d+) finished", again.stdout)  # a worker may have finished one more
            assert again.returncode == 0 and int(taken[1] if taken else 0) >= done_blocks[-1]
        assert contents(tmp_path / "data") == wanted and not (tmp_path / "data.work/new").exists()
        shutil.rmtree(tmp_path / "data.work", ignore_errors=True)  # of a kill between the last rename and its removal
    print("blocks that were done at each kill:", *done_blocks)


def test_a_finished_block_is_not_done_again(corpus, tmp_path):
    """A run that fails late keeps its blocks; with the bad record skipped the same blocks serve."""
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{\n")
    corpus["source"] = "b.jsonl.gz,c.json,a.jsonl"
    done = run_here("prepare_data.py", *flags(**{**corpus, "block_mb": 0.004}))
    assert done.returncode == 2 and "a.jsonl:151: not JSON" in done.stderr
    blocks = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data.work").glob("*.npz")}
    assert len(blocks) > 16
    done = run_here("prepare_data.py", *flags(**{**corpus, "block_mb": 0.004, "on_bad_record": "skip", "workers": 2}))
    assert done.returncode == 0 and f"resuming with {len(blocks)} finished blocks" in done.stdout, done.stderr
    resumed = contents(tmp_path / "data")
    run_anew(**{**corpus, "block_mb": 100, "on_bad_record": "skip"})
    assert contents(tmp_path / "data") == resumed


def test_other_input_is_not_mixed_in(corpus, tmp_path):
    """Blocks of another file, knob or tokenizer are thrown away."""
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{\n")
    bad = {**corpus, "source": "b.jsonl.gz,c.json,a.jsonl", "block_mb": 0.004}
    assert run_here("prepare_data.py", *flags(**bad)).returncode == 2 and (tmp_path / "data.work").exists()
    write_corpus(tmp_path, seed=1)
    done = run_here("prepare_data.py", *flags(**bad))
    assert done.returncode == 0 and "resuming" not in done.stdout
    first = contents(tmp_path / "data")
    assert run_anew(**bad).returncode == 0
    assert contents(tmp_path / "data") == first


def test_a_dead_worker_is_an_error(corpus, tmp_path, monkeypatch):
    """As when the machine runs out of memory: one line, and what is finished stays."""
    done = run_warm("-c", "import os, sys, runpy; from text import records; parse = records.parse\n"
                     "def dies(raw):\n    r = parse(raw)\n    return os._exit(9) if r['id'] == 390 else r\n"
                     "records.parse = dies; sys.argv[0] = 'prepare_data.py'\n"
                     "runpy.run_path(sys.argv.pop(1), run_name='__main__')", ROOT / "prepare_data.py",
                     *flags(**{**corpus, "workers": 2, "block_mb": 0.004}), cwd=tmp_path)
    assert done.returncode == 2 and "a worker process died" in done.stderr, done.stderr
    done = run_here("prepare_data.py", *flags(**{**corpus, "block_mb": 0.004}))
    assert done.returncode == 0 and "resuming with" in done.stdout


SLOW = ("import sys, runpy, time; from text import records; parse = records.parse\n"
        "records.parse = lambda raw: (time.sleep(0.1), parse(raw))[1]\n"
        "sys.argv[0] = 'prepare_data.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')")


def start_slowly(corpus, tmp_path):
    """A run with two workers that takes minutes; returns it once both are there, and their process ids."""
    run = Warm([sys.executable, "-c", SLOW, ROOT / "prepare_data.py", *flags(**{**corpus, "workers": 2})],
               cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
               env={**os.environ, "PYTHONPATH": str(ROOT)})
    children, until = [], time.time() + 300
    while len(children) < 2 and time.time() < until:
        time.sleep(0.05)
        children = open(f"/proc/{run.pid}/task/{run.pid}/children").read().split()
    assert len(children) == 2
    return run, children


def gone(children, seconds=120):
    until = time.time() + seconds
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.time() < until:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{child}") for child in children)


def test_workers_end_with_their_parent(corpus, tmp_path):
    """Killed by -9 the parent can say nothing; its workers see that it is gone."""
    run, children = start_slowly(corpus, tmp_path)
    second = run_here("prepare_data.py", *flags(**{**corpus, "seq_len": 32}))
    assert second.returncode == 2 and "another run is at work in data.work" in second.stderr, second.stderr
    run.kill()
    run.communicate()
    assert gone(children)


def test_ctrl_c(corpus, tmp_path):
    run, children = start_slowly({**corpus, "block_mb": 0.001}, tmp_path)
    until = time.time() + 300
    while not list(tmp_path.glob("data.work/*.npz")) and time.time() < until:  # both are at work when a block is there
        time.sleep(0.05)
    for pid in (run.pid, *map(int, children)):  # a terminal tells all of them
        os.kill(pid, signal.SIGINT)
    out, err = run.communicate(timeout=300)
    goes_on = "resumes" if (tmp_path / "data.work").exists() else "begins again"  # a few blocks are not kept
    assert run.returncode == 130 and out.endswith(f"stopped; the same command {goes_on}\n") and "Traceback" not in err, err
    assert gone(children) and not (tmp_path / "data").exists()


# ---- who reads the output
@pytest.mark.parametrize("code, status, said", [
    ("print('x' * 9, flush=True); input(); print('y' * 10**5)", 141, ""),      # as `| head -1` leaves it
    ("print('x' * 9, flush=True); input(); print('few')", 141, ""),            # written at the end alone
    ("print('x' * 9, flush=True); input(); raise BrokenPipeError(32, 'Broken pipe')", 141, ""),
    ("print('x' * 9, flush=True); input(); raise ValueError('a = 1')", 2, "-c: error: a = 1\n")])
def test_output_that_nobody_reads_ends_it_without_a_word(code, status, said):
    code = f"from runtime import one_line_errors\nwith one_line_errors():\n    {code}"
    with Warm([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "xxxxxxxxx\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == status and process.stderr.read() == said


def test_another_broken_pipe_is_an_error_where_the_output_is_read():
    code = "from runtime import one_line_errors\nwith one_line_errors():\n    raise BrokenPipeError(32, 'Broken pipe')"
    done = run_warm("-c", code)
    assert done.returncode == 2 and done.stderr == "-c: error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("error, said", [
    ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", "out of memory: try a smaller microbatch"),
    ("RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\")", "you tried to allocate 9 bytes"),
    ("RuntimeError('another')", "Traceback")])
def test_memory_that_does_not_suffice_is_one_line(error, said):
    done = run_warm("-c", f"import torch\nfrom runtime import one_line_errors\nwith one_line_errors():\n    raise {error}")
    assert said in done.stderr and (done.stderr.count("\n") == 1) == (said != "Traceback"), done.stderr
    assert done.returncode == (1 if said == "Traceback" else 2)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="no GPU 9; 2 visible, cuda:0 to cuda:1"):
        pick_device("cuda:9")
    # the third rank of a node with two
    monkeypatch.setattr("runtime.LOCAL_RANK", 2)
    with pytest.raises(ValueError, match="no GPU 2; 2 visible"):
        join_ranks(torch.device("cuda"))


# ---- inspect

def test_inspect_shows_the_run_again_and_finds_damage(corpus, tmp_path):
    done = run_here("prepare_data.py", *flags(**corpus))
    report = done.stdout[done.stdout.index("a.jsonl: "):done.stdout.index("tokenized")]
    again = run_here("prepare_data.py", "--inspect=data")
    assert again.returncode == 0 and again.stdout == report + "4 files as meta.json has them\n", again.stderr
    assert "64 to       127 tokens" in report and "«<BOS>" in report and "filled" in report
    content = bytearray((tmp_path / "data/train.bin").read_bytes())
    for damaged, message in [(content[:-2], "sha256 is"), (content[:99] + b"x" + content[100:], "sha256 is"), (None, "missing")]:
        (tmp_path / "data/train.bin").unlink()
        if damaged:
            (tmp_path / "data/train.bin").write_bytes(damaged)
        again = run_here("prepare_data.py", "--inspect=data")
        assert again.returncode == 2 and f"data/train.bin: {message}" in again.stderr and again.stderr.count("\n") == 1
    (tmp_path / "data/meta.json").write_text('{"kind": "cpt"}')
    assert "not a whole meta.json" in run_here("prepare_data.py", "--inspect=data").stderr
    assert "nowhere/meta.json: not found; not a data folder" in run_here("prepare_data.py", "--inspect=nowhere").stderr


# ---- what goes in twice, or should not go in

def test_ids_that_repeat(prepare, tmp_path):
    records = [{"id": i, "text": f"text number {i} and some more words"} for i in range(30)]
    write_jsonl(tmp_path / "a.jsonl", records)
    write_jsonl(tmp_path / "b.jsonl", [records[3], *({"id": str(i), "text": "other"} for i in range(28, 33))])
    status, out, err = prepare(source="a.jsonl,b.jsonl", id_field="id", block_mb=0.0005)
    assert status == 2 and "b.jsonl:1: id is the same as that of a.jsonl:4" in err
    status, out, err = prepare(source="a.jsonl,b.jsonl", id_field="id", block_mb=0.0005, on_bad_record="skip")
    stats = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert status == 0 and stats["dropped_why"] == {"repeated id": 3}, err
    assert sum(stats["lengths"]) == 33 and "3 repeated id" in out
    err = prepare(source="a.jsonl", id_field="uid", anew=True)[2]
    assert "expected a field 'uid', found only 'id', 'text'" in err


def test_decontamination(prepare, tmp_path):
    question = "A farmer has 12 cows and buys 7 more cows every week, so how many cows does he have after 5 weeks?"
    write_jsonl(tmp_path / "eval.jsonl", [{"question": question, "answer": ["x", {"y": "no"}]}, {"question": "What is 2 + 2?"}])
    clean = "A farmer has 12 cows and buys 7 more sheep every week, so how many cows does he have after?"
    leak = "Rephrased: a FARMER has 12 cows, and buys 7 more\ncows every week. So what?"
    texts = {"leak": leak, "clean": clean, "short": "What is 2 + 2?"}
    assert len(set(ngrams(texts["leak"])) & set(ngrams(question))) == 1  # 13 words in a row, no more
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": text} for text in texts.values()])
    status, out, err = prepare(source="a.jsonl", kind="ift", decontaminate="eval.jsonl", seq_len=128)
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    assert status == 0 and meta["splits"]["train"]["dropped_why"] == {"contaminated": 1}, err
    assert meta["decontaminated"] == [{"path": "eval.jsonl", "records": 2, "short": 1}]
    assert "1 contaminated" in out and "1 of them too short" in out
    assert "question" not in "".join(meta["examples"])


def test_decontamination_of_real_sets(prepare, tmp_path):
    """MetaMath's backward set is derived from GSM8K's test questions; GSM8K's train questions are not."""
    test = need("data/gsm8k/test.jsonl")
    knobs = {"kind": "ift", "tokenizer": need("data/llama2-tokenizer"), "decontaminate": test, "anew": True, "max_records": 300,
             "seq_len": 1024, "prompt_field": "question", "response_field": "answer"}
    assert prepare(source=need("data/gsm8k/train.jsonl"), **knobs)[0] == 0
    assert json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]["dropped"] < 10
    knobs["prompt_field"], knobs["response_field"] = "original_question", "original_answer"
    status, out, err = prepare(source=need("data/metamath/GSM8K_Backward.jsonl"), on_bad_record="skip", **knobs)
    assert status == 2 and "train: 0 documents" in err


def test_max_tokens_takes_a_sample_whatever_the_order(prepare, tokenizer_file, tmp_path):
    records, samples = [{"text": f"document number {i} " + "and words " * (i % 7)} for i in range(500)], []
    tok = load_tokenizer(tokenizer_file)
    for order in range(2):
        random.Random(order).shuffle(records)
        write_jsonl(tmp_path / "a.jsonl", records)
        status, out, err = prepare(source="a.jsonl", max_tokens=3000, anew=True, block_mb=0.003, seq_len=2)
        assert status == 0, err
        samples.append(sorted(tok.decode([i for i in ids if i not in (1, 2)]) for ids, _ in documents_of(tmp_path / "data")))
    stats = json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]
    assert samples[0] == samples[1] and 3000 <= stats["tokens"] + stats["lost"] < 3000 + 64
    assert len(samples[0]) + stats["dropped_why"]["not sampled"] == 500
    assert prepare(source="a.jsonl", max_tokens=10**9, anew=True)[0] == 0  # more than there is: all
    assert json.loads((tmp_path / "data/meta.json").read_text())["splits"]["train"]["dropped"] == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 9), st.integers(1, 50), st.sampled_from([0, 0, 1]),
                          st.booleans()), min_size=1, max_size=40), st.integers(1, 600))
def test_sampling(documents, most):
    rows = np.array([(length, 0, 0, key, 0, 0, val, why) for key, length, why, val in documents], DOCUMENT)
    leave_out_unsampled(rows, most)
    out = rows["why"] == WHY.index("not sampled")
    free = [i for i, (_, _, why, val) in enumerate(documents) if not why and not val]
    sampled = [documents[i][:2] for i in free if not out[i]]
    assert set(np.flatnonzero(out)) <= set(free)
    if sum(documents[i][1] for i in free) < most:
        assert not out.any()
    else:  # without the documents of the highest key it would be too few
        top = max(key for key, _ in sampled)
        assert sum(n for _, n in sampled) >= most > sum(n for key, n in sampled if key < top)
        assert all(documents[i][0] > top for i in np.flatnonzero(out))


# ---- bad input

def test_a_line_of_fifty_megabytes(tokenizer_file, tmp_path):
    """Sentencepiece alone takes several GB for it; cut at blanks it takes little more than the line itself."""
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write(json.dumps({"text": "some words of a long, long line 2024\n" * 1_350_000}) + "\n" + '{"text": "short"}\n')
    assert (tmp_path / "a.jsonl").stat().st_size > 50e6
    # 2.3 GB beside what the imports take, which differs by the build of torch
    limited = ("import resource, runpy, sys, prepare_data; "
               "used = int(open('/proc/self/status').read().split('VmData:')[1].split()[0]) * 1024; "
               "resource.setrlimit(resource.RLIMIT_DATA, (used + 2_300_000_000,) * 2); "
               "sys.argv[0] = 'prepare_data.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    done = run_stage("-c", limited, ROOT / "prepare_data.py", *flags(source="a.jsonl", tokenizer=tokenizer_file, out_dir="d",
                                                                     val_fraction=0, seq_len=4096), cwd=tmp_path)
    assert done.returncode == 0 and "2 records" in done.stdout, done.stderr


def test_bytes_of_zero(prepare, tmp_path, tokenizer_file):
    """What a crash leaves at a file's end is a bad record; in a text they are characters."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "words and more words"}\n' * 9 + b"\0" * 500)
    status, out, err = prepare(source="a.jsonl")
    assert status == 2 and "a.jsonl:10: not JSON" in err
    (tmp_path / "a.txt").write_bytes(b"a\0\0b " * 30)
    assert prepare(source="a.txt", seq_len=2)[0] == 0
    [(ids, _)] = documents_of(tmp_path / "data")
    assert load_tokenizer(tokenizer_file).decode(ids[1:-1] if ids[-1] == 2 else ids[1:]) == "a\0\0b " * 30


def test_bad_records_are_named_in_order_by_any_worker(corpus, tmp_path):
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[40], lines[100] = '{"text": 5}', "nonsense"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 3):
        knobs = {**corpus, "workers": workers, "block_mb": 0.002}
        done = run_anew(**knobs)
        assert done.returncode == 2 and "a.jsonl:41: expected text in field 'text', found int" in done.stderr, done.stderr
        done = run_anew(**{**knobs, "on_bad_record": "skip"})
        meta = json.loads((tmp_path / "data/meta.json").read_text())
        assert meta["skipped"] == 2 and [line[:12] for line in meta["skipped_first"]] == ["a.jsonl:41: ", "a.jsonl:101:"]
        assert sum(entry["records"] for entry in meta["source"]) == 400


# runs the command that follows, and kills it when all blocks are done
KILLED_BEFORE_ROWS = """
import os, runpy, signal, sys
import text.shards

text.shards.read_tables = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_blocks_that_skipped_a_bad_record_do_not_serve_where_it_is_an_error(corpus, tmp_path):
    """A run that skips is killed late; then one that does not skip, and one that does."""
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[7] = '{"text": 12}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sources = ",".join(str(tmp_path / name) for name in corpus["source"].split(","))
    knobs = {**corpus, "source": sources, "out_dir": tmp_path / "data", "workers": 1, "block_mb": 0.004}
    killed = run_warm("-c", KILLED_BEFORE_ROWS, ROOT / "prepare_data.py", *flags(**knobs, on_bad_record="skip"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "data.work").glob("*.npz"))) > 16
    done = run_here("prepare_data.py", *flags(**knobs))
    assert done.returncode == 2 and "a.jsonl:8: expected text in field 'text', found int" in done.stderr, done.stderr
    done = run_here("prepare_data.py", *flags(**knobs, on_bad_record="skip"))
    assert done.returncode == 0 and "finished blocks" in done.stdout and "1 bad records skipped" in done.stdout, done.stdout


# ---- words

TEXTS = st.lists(st.sampled_from([*WORDS, "", " ", "  ", "\n", "\n\n", " \n ", "▁", "a b", "\u3000", "\x00", "\u2028"]),
                 max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS | st.text(max_size=30))
def test_words_are_encoded_as_in_their_text(tokenizer_file, text):
    tok = load_tokenizer(tokenizer_file)
    assert word_by_word(tok)
    try:
        want = tok.encode(text)
    except ValueError:
        return  # half a surrogate pair
    assert np.frombuffer(make_encoder(tok, np.dtype("<u2"))(text), "<u2").tolist() == want


def test_words_of_llama2_on_real_text():
    tok = load_tokenizer(need("data/llama2-tokenizer"))
    assert word_by_word(tok)
    cache = WordCache(tok, "<u2", most=500)  # so small that it is emptied again and again
    texts = [json.loads(line)["text"] for line in need("data/arxiv-sample/arxiv.jsonl").read_text().splitlines()][:4]
    texts += [(ROOT / name).read_text() for name in ("train.py", "model.py")]
    for text in texts:
        assert np.frombuffer(cache.encode(text), "<u2").tolist() == tok.encode(text)


def test_words_are_left_alone_where_tokens_reach_over_them(tmp_path):
    """A sentencepiece model whose pieces cross blanks, and a byte-level tokenizer: no cache, the same ids."""
    import io

    import sentencepiece
    model, text = io.BytesIO(), [record["question"] for record in toy_math(300, 0)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, vocab_size=420, model_type="bpe",
                                             split_by_whitespace=False, byte_fallback=True, minloglevel=2,
                                             normalization_rule_name="identity", remove_extra_whitespaces=False)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tok = load_tokenizer(tmp_path)
    assert not word_by_word(tok)
    assert np.frombuffer(make_encoder(tok, "<u2")(text[0]), "<u2").tolist() == tok.encode(text[0])
    byte_tokenizer(tmp_path)
    assert not word_by_word(load_tokenizer(tmp_path / "tokenizer.json"))


def test_real_texts_have_the_ids_of_huggingface_tokenizers(tmp_path):
    """Whole texts of three kinds, through the cache of words, against transformers' conversion of the same model."""
    from test_tokenizer import llama2_json
    path = need("data/llama2-tokenizer/tokenizer.model")
    theirs, _ = llama2_json(tmp_path, path)
    ours = make_encoder(load_tokenizer(path), np.dtype("<u2"))
    texts = [json.loads(line)["answer"] for line in open(need("data/gsm8k/train.jsonl"))][:1000]
    texts += [json.loads(line)["text"] for line in open(need("data/arxiv-sample/arxiv.jsonl"))][:5]
    texts += [record["text"] for record in pystdlib()][:20]
    for text in texts:
        assert np.frombuffer(ours(text), "<u2").tolist() == theirs.encode(text, add_special_tokens=False).ids


def test_a_word_is_encoded_once(tokenizer_file):
    """What makes it fast: the tokenizer sees each word of a corpus once, whatever the number of texts."""
    tok = load_tokenizer(tokenizer_file)
    cache, seen = WordCache(tok, "<u2"), []
    learn = cache.learn
    cache.learn = lambda words: seen.extend(words) or learn(words)
    texts = [record["question"] for record in toy_math(300, 0)]
    for text in texts + texts:
        assert np.frombuffer(cache.encode(text), "<u2").tolist() == tok.encode(text)
    assert len(seen) == len(set(seen))
    assert len(seen) * 10 < sum(len(text.split()) for text in texts)
