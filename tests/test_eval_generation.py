"""What all evaluations that generate share: ids that are drawn, ids that stop, BOS, and logits that are no numbers."""
import json
import shutil

import pytest
import torch
from conftest import need, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import byte_tokenizer, choice_items, mtbench_questions, programs, word_problems

from evaluation.evals import read_done
from llama.generate import NotFinite
from model import Llama, LlamaConfig
from text.tokenizer import load_tokenizer

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=512)


def write_model(folder, vocab_size=1024, tokenizer="stories260k", head_scale=1.0):
    """A folder with random weights, untied; by default half its rows belong to no token."""
    model = Llama(LlamaConfig(vocab_size=vocab_size, initializer_range=0.5, **SHAPE)).init_weights(1).eval()
    with torch.no_grad():
        model.lm_head.weight *= head_scale
    model.save_pretrained(folder)
    if tokenizer == "bytes":
        byte_tokenizer(folder)
    else:
        shutil.copy(need(f"data/{tokenizer}") / "tokenizer.model", folder)
    return model


def command(script, model, out, *knobs):
    """The command line of a short run of a script on a model, with records beside its folder."""
    records = model.parent
    if script == "eval_gsm8k.py":
        file = word_problems(records / "problems.jsonl", 3)
        data = [f"--test_data={file}", "--shots=0", "--max_new_tokens=40", "--limit=3"]
    elif script == "eval_humaneval.py":
        file = programs(records / "programs.jsonl")
        data = [f"--data={file}", "--n_samples=1", "--temperature=0", "--max_length=400", "--limit=3"]
    elif script == "evaluation/answer_mtbench.py":
        file = mtbench_questions(records / "questions.jsonl")
        data = [f"--questions={file}", "--max_new_tokens=40", "--limit=3"]
    elif script == "eval_forgetting.py":
        file = choice_items(records, 3)["hellaswag"]
        data = ["--tasks=hellaswag", f"--hellaswag={file}", "--limit=3"]
    else:
        data = ["--prompt=Once upon a time", "--max_new_tokens=40"]
    out_dir = [] if script == "sample.py" else [f"--out_dir={out}"]
    given = {knob.split("=")[0] for knob in knobs}
    kept = [knob for knob in data if knob.split("=")[0] not in given]
    return [script, f"--model={model}", "--device=cpu", "--dtype=float32", *out_dir, *kept, *knobs]


GENERATING = ("sample.py", "eval_gsm8k.py", "eval_humaneval.py", "evaluation/answer_mtbench.py")


# ----------------------------------------------------------------------------- rows that no token has
PROMPTS = [[1, 5, 9], [1, 400], [1, 7, 7, 7, 7, 33], [1]]


@pytest.mark.parametrize("knobs", [{}, {"batch_size": 2}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "n": 4},
                                   {"temperature": 0.7, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("vocab_size", [512, 513, 900, 1023])
def test_ids_above_the_tokenizers_are_never_drawn(tmp_path, knobs, vocab_size):
    model = write_model(tmp_path)
    free = model.generate(PROMPTS, 30, **knobs)
    assert any(token >= vocab_size for rows in free for row in rows for token in row) or vocab_size > 900
    masked = model.generate(PROMPTS, 30, vocab_size=vocab_size, **knobs)
    assert max(token for rows in masked for row in rows for token in row) < vocab_size
    # as if the model had no such rows
    config = LlamaConfig(vocab_size=vocab_size, **SHAPE)
    cut = Llama(config).eval()
    state = model.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:vocab_size]
    cut.load_state_dict(state)
    assert masked == cut.generate(PROMPTS, 30, **knobs)


def test_greedy_ids_are_those_of_transformers_with_the_same_ids_suppressed(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = write_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
                              suppress_tokens=list(range(512, 1024)))[0, len(prompt):].tolist()
        assert model.generate([prompt], 30, vocab_size=512)[0][0] == ids


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model of 1,024 rows, here and in transformers."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("padded")
    model = write_model(folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(vocab_size=st.integers(2, 1023), new=st.integers(1, 12), data=st.data())
def test_any_number_of_rows_is_masked_as_transformers_suppresses_it(padded, vocab_size, new, data):
    ours, theirs = padded
    prompt = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=9))
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None,
                          suppress_tokens=list(range(vocab_size, 1024)))[0, len(prompt):].tolist()
    assert ours.generate([prompt], new, vocab_size=vocab_size)[0][0] == ids


def test_rows_that_never_win_change_nothing():
    """stories260k and the same with 64 rows of zeros: greedy ids are equal, with the mask and without."""
    model = Llama.from_pretrained(need("data/stories260k")).eval()
    ids = model.generate(PROMPTS, 40)
    assert model.generate(PROMPTS, 40, vocab_size=512) == ids
    assert model.generate(PROMPTS, 40, vocab_size=10 ** 6) == ids


@pytest.mark.parametrize("script", GENERATING)
def test_scripts_run_on_a_model_with_padded_rows(tmp_path, script):
    write_model(tmp_path / "model")
    done = run_here(*command(script, tmp_path / "model", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    knobs = {"sample.py": ["--temperature=1"], "eval_humaneval.py": ["--temperature=1", "--n_samples=3", "--name=x"]}
    if script in knobs:
        done = run_here(*command(script, tmp_path / "model", tmp_path / "out", *knobs[script]))
        assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------- ids that stop
@pytest.fixture
def two_ends(tmp_path):
    """write(file): stories260k whose `file` lists a second EOS, an id that its greedy story has; returns (folder, id)."""
    def write(file, place=7):
        folder = tmp_path / "ends"
        shutil.copytree(need("data/stories260k"), folder)
        tok = load_tokenizer(folder)
        prompt = tok.encode("Once upon a time", bos=True)
        story = Llama.from_pretrained(folder).generate([prompt], 40)[0][0]
        end = next(token for token in story[place:] if story.index(token) >= place)
        path = folder / file
        config = json.loads(path.read_text()) if path.is_file() else {}
        config["eos_token_id"] = [2, end]
        path.write_text(json.dumps(config))
        return folder, end, prompt, story
    return write


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_sample_stops_at_each_eos(two_ends, file):
    folder, end, prompt, story = two_ends(file)
    tok = load_tokenizer(folder)
    before = story[:story.index(end)]
    done = run_here(*command("sample.py", folder, None))
    assert done.returncode == 0, done.stderr
    text = tok.decode(prompt + before)
    assert done.stdout.rstrip("\n") == text.rstrip("\n")
    assert f"(id {end})" in done.stderr and "</s> (id 2)" in done.stderr
    # transformers ends there too
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt):].tolist()
    assert ids == before + [end]


@pytest.mark.parametrize("script", GENERATING[1:])
def test_evaluations_stop_at_each_eos(two_ends, tmp_path, script):
    folder, end, _, _ = two_ends("generation_config.json")
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "generation_config.json").unlink()
    made = {}
    for name, model in (("two", folder), ("one", plain)):
        done = run_here(*command(script, model, tmp_path / name))
        assert done.returncode == 0, done.stderr
        made[name] = done.stdout, read_done(next((tmp_path / name).glob("eval_*.jsonl")))
    printed, records = made["two"]
    assert f"(id {end})" in printed and f"(id {end})" not in made["one"][0]
    # an answer of one EOS has the id's text in it; with two EOS it ends before it
    piece = load_tokenizer(folder).decode([end]).strip()
    key = {"eval_gsm8k.py": "output", "eval_humaneval.py": "completions"}.get(script, "turns")
    for i, record in records.items():
        whole = made["one"][1][i][key]
        pairs = zip([record[key]], [whole]) if isinstance(whole, str) else zip(record[key][:1], whole[:1])
        for ours, other in pairs:
            assert other.startswith(ours) and len(ours) <= len(other)
    shorter = [i for i in records if records[i][key] != made["one"][1][i][key]]
    assert shorter, piece


# ----------------------------------------------------------------------------- BOS
def begins_with_bos(script, printed):
    """{style or '': whether BOS stands in front} by what a script prints."""
    if script == "eval_forgetting.py":
        return {"gauntlet": "gauntlet True" in printed, "lm_eval": "lm_eval True" in printed}
    assert ("BOS (id 1) in front" in printed) != ("no BOS in front" in printed)
    return {"": "BOS (id 1) in front" in printed}


HARNESS = {"eval_gsm8k.py": {"": False}, "eval_forgetting.py": {"gauntlet": "habit", "lm_eval": False}}


@pytest.mark.parametrize("tokenizer, vocab_size, habit", [("stories260k", 512, True), ("bytes", 262, False)])
@pytest.mark.parametrize("script", (*GENERATING, "eval_forgetting.py"))
def test_bos_is_the_harness_habit_unless_asked_for(tmp_path, script, tokenizer, vocab_size, habit):
    write_model(tmp_path / "model", vocab_size, tokenizer)
    expected = HARNESS.get(script, {"": "habit"})
    expected = {style: habit if value == "habit" else value for style, value in expected.items()}
    for knobs, found in (([], expected), (["--bos=True"], dict.fromkeys(expected, True)),
                         (["--bos=False"], dict.fromkeys(expected, False))):
        out = tmp_path / f"out{knobs}"
        short = [] if script == "eval_forgetting.py" else ["--max_new_tokens=2"]
        if script == "eval_humaneval.py":
            short = ["--max_length=100"]
        done = run_here(*command(script, tmp_path / "model", out, "--limit=1", *short, *knobs)
                        if script != "sample.py" else command(script, tmp_path / "model", out, *short, *knobs))
        assert done.returncode == 0, done.stderr
        assert begins_with_bos(script, done.stderr if script == "sample.py" else done.stdout) == found
        if script != "sample.py":
            settings = json.loads(next(out.glob("*.settings.json")).read_text())
            styles = [("bos", "" if "" in found else "gauntlet"), ("lm_eval_bos", "lm_eval")]
            assert [settings[key] for key, style in styles if style in found] == list(found.values())


# ----------------------------------------------------------------------------- NaN
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_generation_ends_at_logits_that_are_no_numbers(value, temperature):
    model = Llama(LlamaConfig(vocab_size=64, **SHAPE)).init_weights(1).eval()
    with torch.no_grad():
        model.embed_tokens.weight[7] = value
    with pytest.raises(NotFinite, match="new token 0 of prompt 1 ") as caught:
        model.generate([[1, 2], [1, 7], [1, 3]], 4, temperature=temperature, top_p=0.9)
    assert caught.value.prompt == 1


@pytest.mark.parametrize("script", (*GENERATING, "eval_forgetting.py"))
def test_scripts_end_in_one_line_that_names_model_and_item(tmp_path, script):
    """Finite weights whose logits overflow."""
    write_model(tmp_path / "model", 512, head_scale=1e38)
    done = run_here(*command(script, tmp_path / "model", tmp_path / "out"))
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    if script != "sample.py":
        assert f"{tmp_path / 'model'}, item " in errors[0] and "NaN or infinite" in errors[0]
        assert not (tmp_path / "out/results.jsonl").exists()
        assert all(path.read_text() == "" for path in (tmp_path / "out").glob("eval_*.jsonl.part*"))


# ----------------------------------------------------------------------------- ids that the model has no row for
def write_with_pad(folder, special=True):
    """A model of 512 rows, whose tokenizer has id 512 as well."""
    write_model(folder, 512)
    name = "[PAD]" if special else "<think>"
    added = {"512": {"content": name, "special": special, "lstrip": False, "rstrip": False, "normalized": False,
                     "single_word": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "added_tokens_decoder": added}))
    assert load_tokenizer(folder).vocab_size == 513


@pytest.mark.parametrize("script", (*GENERATING, "eval_forgetting.py"))
def test_an_added_pad_without_a_row_harms_nothing(tmp_path, script):
    write_with_pad(tmp_path / "model")
    done = run_here(*command(script, tmp_path / "model", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "the model has no row for [PAD]" in done.stderr


def test_an_added_id_of_text_without_a_row_is_refused(tmp_path):
    write_with_pad(tmp_path / "model", special=False)
    done = run_here(*command("sample.py", tmp_path / "model", None))
    assert done.returncode == 2 and "tokenizer has 513 ids, the model 512: not its own" in done.stderr
