r"""
What several models answered to the same questions, side by side, for paper/report.py.

    out/base/eval_gsm8k.jsonl         Q, "72"   right  --.
    out/full/step_75/eval_gsm8k.jsonl Q, "#18"  wrong  --+-->  {Q, gold, [base's, full's, r16's]}
    out/r16/step_75/eval_gsm8k.jsonl  Q, "72"   right  --'

A question is known by what was asked, not by its number: models that were asked something else,
with other worked examples, or of other data, stand in rows of their own.

    item     {"title", "before", "prompt", "gold", "answers": [an answer for each run, or None]}
             title: one line for a list; before: the worked examples in front of the prompt
    answer   [[text, right, how it ended], ...]    several of HumanEval; right: True, False or None,
                                                   which is not judged
"""
from paper.results import problems, read_json, read_jsonl

# what a damaged or foreign record raises while it is read
UNREADABLE = (KeyError, TypeError, IndexError, AttributeError)


# ----------------------------------------------------------------------------- which files
def item_files(folder):
    """{evaluation: file} of a run's newest checkpoint that has it, or of a base's own folder."""
    steps = []
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdigit():
            steps.append((int(number), path))
    # later ones replace earlier ones
    files = {}
    for place in [folder, *(path for _, path in sorted(steps))]:
        for path in sorted(place.glob("eval_*.jsonl")):
            files[path.stem.removeprefix("eval_")] = path
    return files


def read_evaluations(folders, tasks):
    """[{"name", "items"}] of every evaluation whose answers can be shown; an answer a folder.

    folders: run folders, in the order of the answers; tasks {task_id: HumanEval's record}, {} if
    they are not known. What cannot be read is counted in paper.results.problems."""
    evaluations = {}  # {name: {key of an item: item}}
    for number, folder in enumerate(folders):
        files = item_files(folder)
        for name, path in files.items():
            # verdicts are read with their samples
            if name.endswith("_run") and name.removesuffix("_run") in files:
                continue
            shown = name.removesuffix("_run")
            items = evaluations.setdefault(shown, {})
            for key, item, answer in read_answers(path, files.get(f"{name}_run"), tasks):
                known = items.setdefault(key, {**item, "answers": [None] * len(folders)})
                known["answers"][number] = answer
    found = []
    for name, items in sorted(evaluations.items()):
        if items:
            found.append({"name": name, "items": list(items.values())})
    return found


def read_answers(path, verdicts_path, tasks):
    """Yield (key, item, answer) of a file of items, of whatever evaluation it is."""
    records = read_jsonl(path)
    first = records[0] if records else {}
    if "completions" in first or "completion" in first:
        yield from program_answers(path, records, verdicts_path, tasks)
        return
    # one answer a record
    made_with = path.with_suffix(".settings.json")
    settings = read_json(made_with) if made_with.is_file() else {}
    for record in records:
        try:
            if "strict_match" in first:
                yield solved_answer(record)
            elif "gold" in first:
                yield chosen_answer(record, settings.get("items"))
        except UNREADABLE as error:
            note_unreadable(path, error)


def note_unreadable(path, error):
    problems[f"items of {path} that lack what is shown ({type(error).__name__}: {error})"] += 1


def text_in(record, field):
    """A field that has to be text; KeyError or TypeError if it is none."""
    value = record[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} is no text")
    return value


# ----------------------------------------------------------------------------- GSM8K
def solved_answer(record):
    """(key, item, answer) of a record of eval_gsm8k.py; right is the strict match."""
    prompt = text_in(record, "prompt")
    gold = text_in(record, "gold")
    ending = f"strict: {record['strict']}, flexible: {record['flexible']}"
    if record.get("truncated"):
        ending += "; cut at the length limit"
    # the last question is the item's, those before it are worked examples
    begin = max(0, prompt.rfind("Question: "))
    question = prompt[begin:]
    item = {"title": one_line(question.removeprefix("Question: ").removesuffix("Answer:")),
            "before": prompt[:begin], "prompt": question, "gold": gold}
    right = bool(record["strict_match"])
    return (prompt, gold), item, [[text_in(record, "output"), right, ending]]


def one_line(text):
    """The beginning of a text, for a list, whose column shows some fifty letters."""
    return " ".join(text.split())[:80]


# ----------------------------------------------------------------------------- multiple choice
def chosen_answer(record, data):
    """(key, item, answer) of a record of eval_forgetting.py, which holds no texts.

    data: the digest of the questions, so that those of two files are not taken for the same."""
    number = record["id"]
    gold = record["gold"]
    lines = []
    right = None
    ending = ""
    for style in ("gauntlet", "lm_eval"):
        judged = record.get(style)
        if not judged:
            continue
        if "refused" in judged:
            lines.append(f"{style}: not judged, {judged['refused']}")
            continue
        # the kind of score that eval_forgetting.py takes for its accuracy
        kind = "per_token" if style == "gauntlet" else "sum"
        chosen = judged[kind]
        logprobs = ", ".join(f"{value:.2f}" for value in judged["logprobs"])
        lines.append(f"{style}: choice {chosen} by {kind}; log probabilities {logprobs}")
        if right is None:
            right = chosen == gold
            ending = f"choice {chosen}"
    title = f"item {number}"
    if record.get("subject"):
        title += f", {record['subject']}"
    item = {"title": title, "before": "", "prompt": "", "gold": f"choice {gold}"}
    return (data, number), item, [["\n".join(lines), right, ending]]


# ----------------------------------------------------------------------------- HumanEval
def program_answers(path, records, verdicts_path, tasks):
    """Yield (key, item, answer) of each problem, with its samples and what became of them.

    records: eval_humaneval.py's samples, or, where only these are left, its verdicts."""
    samples = samples_of(path, records)
    verdicts = {}  # {(task, number of its sample): record}
    if verdicts_path:
        verdicts = verdicts_of(verdicts_path)
    for task_id, of_task in samples.items():
        answer = []
        for number, (text, record) in enumerate(of_task):
            judged = verdicts.get((task_id, number), record)
            # samples that were made anew since leave verdicts of others
            if judged.get("completion", text) != text:
                problems[f"verdicts of {verdicts_path} that are of other samples"] += 1
                judged = {}
            answer.append([text, judged.get("passed"), ending_of(judged, record, number)])
        task = tasks.get(task_id, {})
        item = {"title": task_id,
                "before": "",
                "prompt": str(task.get("prompt", "")),
                "gold": str(task.get("canonical_solution", ""))}
        yield task_id, item, answer


def samples_of(path, records):
    """{task_id: [(text, the record that it stands in)]} of samples, or of verdicts."""
    samples = {}
    for record in records:
        try:
            texts = record["completions"] if "completions" in record else [record["completion"]]
            of_task = samples.setdefault(text_in(record, "task_id"), [])
            for text in texts:
                of_task.append((str(text), record))
        except UNREADABLE as error:
            note_unreadable(path, error)
    return samples


def verdicts_of(path):
    """{(task_id, number of its sample): record} of eval_humaneval_run.jsonl."""
    verdicts = {}
    count = {}
    for record in read_jsonl(path):
        task_id = record.get("task_id")
        number = count.get(task_id, 0)
        verdicts[task_id, number] = record
        count[task_id] = number + 1
    return verdicts


def ending_of(judged, record, number):
    """How a sample ended, in words."""
    ending = str(judged.get("result", "not run"))
    truncated = record.get("truncated")
    if isinstance(truncated, list) and truncated[number:number + 1] == [1]:
        ending += "; cut at the length limit"
    return ending


def share_paragraphs(evaluations):
    """Replace the worked examples of all items by numbers of paragraphs; returns the paragraphs.

    Many items have the same examples: ten thousand prompts of five become a quarter as long."""
    numbers = {}  # {paragraph: its number}
    for evaluation in evaluations:
        for item in evaluation["items"]:
            shared = []
            for paragraph in item["before"].split("\n\n"):
                if paragraph:
                    shared.append(numbers.setdefault(paragraph, len(numbers)))
            item["before"] = shared
    return list(numbers)
