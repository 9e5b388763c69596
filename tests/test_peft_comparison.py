"""GSM8K as PEFT's comparison judges it, and its plane: verdicts recorded from the original functions (2026-11)."""
import bz2
import json

import pytest
from conftest import need, run_here, run_stage
from samples import word_problems, write_lines

from eval_gsm8k import build_prompt, judge_answer
from evaluation.peft_comparison import extract_answer, is_right
from paper.plot_peft import ours_in_plane
from paper.results import read_run
from paper.wiki_articles import read_articles

# (output, gold, what parse_answer took, what get_accuracy said)
RECORDED = [
    ("She sells 18. The answer is: 18", "18", "18", True), ("The answer is 18.", "18", "18", True),
    ("The final answer is: $18.00.", "18", "18.00", True), ("#### 18", "18", "18", True), ("18", "18", None, False),
    ("The answer is: 36/2", "18", "36/2", True), ("The answer is: 1/2", "0.5", "1/2", True), ("The answer is: 1/0", "18", "1/0", False),
    ("The answer is: 2/3/4", "18", "2/3/4", False), ("The answer is: 18%", "18", "18", True),
    ("The answer is: 1,000", "1000", "1,000", False), ("The answer is: 1,000", "1,000", "1,000", True),
    ("The answer is: 18 dollars", "18", "18 dollars", False), ("The answer is: 1_000", "1000", "1_000", True),
    ("The answer is: 7\n\nQuestion: x\nThe answer is: 18", "18", "18", True),
    ("The answer is: 18\n\nQuestion: and 7?", "18", "18", True), ("#### 7 The answer is 18", "18", "18", True),
    ("The answer is: ", "18", None, False), ("The answer is: -3!", "-3", "-3", True), ("The answer is: 1e1", "10", "1e1", True)]


@pytest.mark.parametrize("output, gold, taken, right", RECORDED)
def test_verdicts_are_pefts(output, gold, taken, right):
    answer = f"So it is.\n#### {gold}"
    assert extract_answer(output) == taken and is_right(output, answer) is right
    record = judge_answer(output, answer, (), "peft")
    assert record["strict_match"] == int(right) and record["strict"] == (taken or "[invalid]")


def test_the_prompt_is_pefts_and_has_no_examples(tmp_path):
    assert build_prompt("Why {x}?", [], "peft") == "Question: Why {x}? Think step by step.\nAnswer:"
    test = word_problems(tmp_path / "test.jsonl", 3)
    argv = ["eval_gsm8k.py", f"--model={need('data/stories260k')}", "--harness=peft", f"--test_data={test}", f"--train_data={test}",
            "--max_new_tokens=8", f"--out_dir={tmp_path}/out", "--device=cpu"]
    refused = run_here(*argv)
    assert refused.returncode == 2 and "shots=5: harness='peft' has no worked examples" in refused.stderr
    result = run_here(*argv, "--shots=0")
    assert result.returncode == 0 and "Think step by step.\nAnswer:" in result.stdout, result.stderr
    # other prompts and verdicts than lm-eval's are other items
    again = run_here(*[word for word in argv if "harness" not in word], "--shots=0", "--bos=True")
    assert again.returncode == 2 and "harness='peft'" in again.stderr and "choose another --name" in again.stderr, again.stderr


def test_our_points_stand_in_pefts_plane(tmp_path):
    """A run with both metrics beside its base; without one there is no figure."""
    for name, config, accuracy, loss in (("base", None, 0.1, 1.586), ("full-s1", {}, 0.47, 1.616), ("r32", {"lora_rank": 32}, 0.48, 1.63)):
        folder = tmp_path / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(json.dumps({"config": {"base": "b", "seed": 1, "data": "d", **config}}))
        with open(folder / "results.jsonl", "w") as lines:
            for metric, value in (("gsm8k_strict_match", accuracy), ("loss wiki", loss)):
                step = 0 if config is None else 5
                lines.write(json.dumps({"metric": metric, "value": value, "stderr": 0.01, "step": step,
                                        "settings": {"model": "x/b"}}) + "\n")
    # articles differ by 0.5, and each by 0.03 to 0.05 from itself before: the interval is of these
    for name, step, losses in (("base", 0, (1.0, 1.5, 2.258)), ("r32", 5, (1.05, 1.54, 2.3))):
        (tmp_path / name / "values.jsonl").write_text(json.dumps({"metric": "loss wiki", "step": step, "values": losses}))
    found = {tmp_path / name: read_run(tmp_path / name) for name in ("base", "full-s1", "r32")}
    plane = {setting.rank: point for setting, point in ours_in_plane(found, "gsm8k_strict_match", "loss wiki").items()}
    assert plane[0] == (pytest.approx((0.47, 0.0196)), pytest.approx((0.03, 0.0196)))  # the items are not known
    assert plane[32] == (pytest.approx((0.48, 0.0196)), pytest.approx((0.044, 1.96 * 0.005292 / 3 ** 0.5), rel=1e-3))
    argv = ["paper/plot.py", "--figures=peft", "--formats=svg", f"--out_dir={tmp_path}/figures"]
    metrics = ["--learning=gsm8k_strict_match", "--forgetting=loss wiki"]
    drawn = run_here(*argv, f"--runs={tmp_path}/*", *metrics)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "figures/peft.svg").is_file()
    nothing = run_here(*argv, f"--runs={tmp_path}/r32", *metrics)
    assert nothing.returncode == 2 and "nothing to draw" in nothing.stderr


def test_loss_on_articles_is_the_mean_over_their_tokens_cut_at_so_many(tmp_path):
    """As calculate_mean_per_token_loss has it since its targets are shifted: every article by itself, up to seq_len tokens."""
    import torch
    from transformers import LlamaForCausalLM

    from text.tokenizer import load_tokenizer
    base = need("data/stories260k")
    texts = [f"Once upon a time there was a dog named {name}. " * n for name, n in (("Tim", 1), ("Lily", 30), ("Max", 5))]
    write_lines(tmp_path / "wiki.jsonl", [{"text": text} for text in texts])
    made = run_here("prepare_data.py", f"--source={tmp_path}/wiki.jsonl", "--kind=ift", "--template=", "--response_field=text",
                    "--packing=none", "--seq_len=96", "--add_eos=False", "--val_fraction=0", f"--tokenizer={base}", f"--out_dir={tmp_path}/wiki")
    assert made.returncode == 0, made.stderr
    result = run_here("eval_loss.py", f"--model={base}", f"--data=wiki={tmp_path}/wiki", "--rows=0", f"--out_dir={tmp_path}/out", "--device=cpu")
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    value, = (line["value"] for line in lines if line["metric"] == "loss wiki")
    model, tok = LlamaForCausalLM.from_pretrained(base), load_tokenizer(base)
    losses = []
    for text in texts:
        ids = torch.tensor([tok.encode(text, bos=True)[:96]])
        logits = model(ids).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    assert value == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_articles_of_wikipedia_without_marks_redirects_and_empty_pages(tmp_path):
    """gensim reads pages and takes the markup away; what it leaves in is ours to take."""
    dump = tmp_path / "dump.xml.bz2"
    dump.write_bytes(bz2.compress(b"'''Anarchism''' is\n#redirect [[Anarchism]]\n\n''An'' apple's"))
    pages = lambda file, filter_namespaces: (("title", line.decode(), 1) for line in file)
    assert list(read_articles(dump, pages, lambda text: text)) == ["Anarchism is", "An apple's"]
    result = run_stage("paper/wiki_articles.py", tmp_path / "wiki.jsonl")
    assert result.returncode == 2 and "No module named 'gensim'; pip install gensim" in result.stderr and not (tmp_path / "wiki.jsonl").exists()
