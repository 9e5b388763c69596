"""sample.py: escapes in a prompt and in stop texts mean what they mean in prepare_data's templates."""
import pytest
from conftest import need, run_here

from text.templates import read_template


def sample(*knobs):
    """What sample.py prints for a tiny model, on standard output."""
    done = run_here("sample.py", f"--model={need('data/stories260k')}", "--device=cpu", "--dtype=float32", *knobs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("prompt", [r"a\tb", r"a\\b", r"a\\nb", r"one\ntwo\\three\tfour"])
def test_a_prompt_reads_as_the_template_it_was_trained_with(prompt):
    template, _ = read_template(prompt + "{question}", "prompt")
    text = template.format(question="")
    assert "\\" in text or "\t" in text
    assert sample(f"--prompt={prompt}", "--max_new_tokens=1").startswith(text)


def test_stop_texts_are_read_like_the_prompt():
    """A story has paragraphs: with the newline as a stop text it ends at the first."""
    story = sample("--prompt=Once upon a time", "--max_new_tokens=250").rstrip("\n")
    assert "\n" in story
    stopped = sample("--prompt=Once upon a time", "--max_new_tokens=250", r"--stop=never\t,\n").rstrip("\n")
    assert story.startswith(stopped) and "\n" not in stopped
