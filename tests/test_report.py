"""report.py: its page holds what the files hold, and in a real browser it filters, restores views, runs and loads nothing."""
import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import run_here

from paper.items import read_evaluations
from paper.report import knobs_table, names_of
from paper.results import problems, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

# what a model may write, and what would happen if it were not shown as text
CANARY = "http://127.0.0.1:9/canary"
EVIL = (f'<img src="{CANARY}"> </script><script>document.title = "ran"; fetch("{CANARY}")</script> '
        "<!--<script> {{ 7 * 7 }} & 'quoted' \u2028 \U0001f600")
CONFIG = {"base": "models/tiny", "data": "data/problems", "lora_rank": 0, "lora_alpha": None, "lora_targets": "all",
          "learning_rate": 1e-4, "seed": 1, "max_steps": 10}
RUNS = ("base", "full-10", "r16<b>-10")


# ----------------------------------------------------------------------------- a study on disk
def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def is_right(run, i):
    """Base solves nothing, full every second item, LoRA every third."""
    return run > 0 and i % (run + 1) == 0


def problem_record(run, i, shots=1):
    worked = "Question: What is 1 + 1?\nAnswer: 2 #### 2\n\n" * shots
    output = f" answer {i} of run {run}"
    if i == 7:
        output += EVIL
    right = is_right(run, i)
    return {"id": i, "prompt": f"{worked}Question: Item number {i}, how many?\nAnswer:", "output": output, "gold": str(i),
            "strict": str(i) if right else "[invalid]", "flexible": "3", "strict_match": int(right), "flexible_match": 0,
            "prompt_tokens": 9, "new_tokens": 4, "cut": 0, "truncated": int(i == 4)}


def write_study(root, items=12, shots=1):
    """Three runs: a base, full finetuning and LoRA, with problems, programs, choices, logs and results."""
    folders = []
    for run, name in enumerate(RUNS):
        folder = root / name
        answers = folder / "step_10" if run else folder
        write_lines(answers / "eval_gsm8k.jsonl", [problem_record(run, i, shots) for i in range(items)])
        write_lines(folder / "results.jsonl", [
            {"run": name, "step": 10 if run else 0, "metric": metric, "value": 0.1 + run / 10, "stderr": 0.01, "n": 9,
             "settings": {"model": "models/tiny", "adapter": ""}}
            for metric in ("gsm8k_strict_match", "forgetting", "<script>metric</script>")])
        folders.append(folder)
        if not run:
            continue
        config = CONFIG | {"lora_rank": (0, 0, 16)[run], "data": EVIL, "out_dir": name}
        (folder / "config.json").write_text(json.dumps({"config": config}))
        write_lines(folder / "log.jsonl", [{"step": step, "tokens": 10 * step, "loss": 3 - step / 10} for step in range(1, 11)])
        # an older checkpoint, which the newest one replaces
        write_lines(folder / "step_5" / "eval_gsm8k.jsonl", [problem_record(0, 0)])
        texts = ["    return 1\n", "    return 2\n", "    return 1\n"]
        write_lines(answers / "eval_humaneval.jsonl", [
            {"id": i, "task_id": f"Own/{i}", "completions": texts, "truncated": [0, 1, 0]} for i in range(2)])
        write_lines(answers / "eval_humaneval_run.jsonl", [
            {"id": 3 * i + j, "task_id": f"Own/{i}", "completion": text, "passed": i == 0 and j != 1,
             "result": "passed" if i == 0 and j != 1 else "timed out"} for i in range(2) for j, text in enumerate(texts)])
        write_lines(answers / "eval_forgetting_hellaswag.jsonl", [
            {"id": 0, "gold": 2, "gauntlet": {"per_token": 2 - run, "logprobs": [-1.0, -2.5, -3.0], "tokens": [1, 1, 1]}}])
    return folders


def page_of(root, out, **knobs):
    problems.clear()
    done = run_here("paper/report.py", f"--runs={root}/*", f"--out={out}", *(f"--{k}={v}" for k, v in knobs.items()))
    assert done.returncode == 0, done.stderr
    return out.read_text()


def data_in(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_study(root / "runs")
    page_of(root / "runs", root / "report.html", title=f"A <b>study</b> {EVIL[:40]}")
    return root / "report.html"


# ----------------------------------------------------------------------------- what is read
def test_answers_stand_side_by_side_with_verdicts_and_endings(tmp_path):
    problems.clear()
    folders = write_study(tmp_path)
    found = {part["name"]: part["items"] for part in read_evaluations(folders, {"Own/1": {"prompt": "def f():\n"}})}
    assert list(found) == ["forgetting_hellaswag", "gsm8k", "humaneval"] and not problems

    fourth = found["gsm8k"][4]
    assert (fourth["title"], fourth["gold"]) == ("Item number 4, how many?", "4")
    assert fourth["prompt"] == "Question: Item number 4, how many?\nAnswer:"
    assert fourth["before"] + fourth["prompt"] == problem_record(0, 4)["prompt"]
    assert [answer[0][0] for answer in fourth["answers"]] == [f" answer 4 of run {run}" for run in range(3)]
    verdicts = [[item["answers"][run][0][1] for item in found["gsm8k"]] for run in range(3)]
    assert verdicts == [[is_right(run, i) for i in range(12)] for run in range(3)]
    assert fourth["answers"][1][0][2] == "strict: 4, flexible: 3; cut at the length limit"

    first, second = found["humaneval"]
    assert first["answers"] == [None] + 2 * [[["    return 1\n", True, "passed"],
                                              ["    return 2\n", False, "timed out; cut at the length limit"],
                                              ["    return 1\n", True, "passed"]]]
    assert (second["title"], second["prompt"]) == ("Own/1", "def f():\n")
    assert [answer[0][1] for answer in found["forgetting_hellaswag"][0]["answers"][1:]] == [False, False]


def test_other_prompts_are_other_items(tmp_path):
    """Another number of worked examples: the answers are not to be compared, so they stand apart."""
    folders = write_study(tmp_path)
    write_lines(folders[2] / "step_10" / "eval_gsm8k.jsonl", [problem_record(2, 3, shots=2), problem_record(2, 5)])
    items, = (part["items"] for part in read_evaluations(folders, {}) if part["name"] == "gsm8k")
    assert len(items) == 13
    assert [item["answers"][2] is not None for item in items] == 5 * [False] + [True] + 6 * [False] + [True]
    assert items[12]["answers"][:2] == [None, None]


def test_verdicts_alone_and_verdicts_of_other_samples(tmp_path):
    problems.clear()
    folders = write_study(tmp_path)
    (folders[1] / "step_10" / "eval_humaneval.jsonl").unlink()
    changed = [{"id": 0, "task_id": "Own/0", "completions": ["    return 1\n", "    return 9\n"]}]
    write_lines(folders[2] / "step_10" / "eval_humaneval.jsonl", changed)
    items, = (part["items"] for part in read_evaluations(folders, {}) if part["name"] == "humaneval")
    assert [sample[1] for sample in items[0]["answers"][1]] == [True, False, True]
    assert items[0]["answers"][2] == [["    return 1\n", True, "passed"], ["    return 9\n", None, "not run"]]
    assert any("other samples" in note for note in problems)


def test_damaged_items_are_noted(tmp_path):
    problems.clear()
    folders = write_study(tmp_path)
    path = folders[1] / "step_10" / "eval_gsm8k.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = '{"id": 2, "strict_match": 1}'
    lines[3] = lines[3][:20]
    path.write_text("\n".join(lines) + "\n")
    items, = (part["items"] for part in read_evaluations(folders, {}) if part["name"] == "gsm8k")
    assert [i for i, item in enumerate(items) if item["answers"][1] is None] == [2, 3]
    assert len(problems) == 2 and all(str(path) in note for note in problems)


def test_knobs_that_differ_and_names(tmp_path):
    found = {folder: read_run(folder) for folder in write_study(tmp_path / "a")}
    table = knobs_table(found, names_of(found))
    assert table == {"head": ["run", "lora_rank"], "rows": [["full-10", "0"], ["r16<b>-10", "16"]]}
    namesakes = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"]
    assert list(names_of(namesakes).values()) == ["a/x", "b/x", "y"]


def test_runs_stand_by_rank_and_the_pretraining_of_a_base_is_not_compared(tmp_path):
    """It has a row of results, but no knobs that could differ, and no column among the answers."""
    folders = write_study(tmp_path / "runs")
    for name, changed in (("r4-10", {"lora_rank": 4}), ("a-base-made", {"scratch": True, "max_steps": 99})):
        shutil.copytree(folders[1], tmp_path / "runs" / name)
        config = CONFIG | {"data": EVIL} | changed
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps({"config": config}))
    shutil.rmtree(tmp_path / "runs" / "a-base-made" / "step_10")
    shutil.rmtree(tmp_path / "runs" / "a-base-made" / "step_5")
    text = page_of(tmp_path / "runs", tmp_path / "report.html")
    assert [run["name"] for run in data_in(text)["runs"]] == ["base", "full-10", "r4-10", "r16<b>-10"]
    begins = re.findall(r'<tr><td class="number">([^<]*)</td>', text[text.index('id="results"'):text.index('id="items"')])
    names = ["base", "a-base-made", "full-10", "r4-10", "r16&lt;b&gt;-10"]
    assert begins == names + names[2:]  # the results, and the knobs
    assert "max_<wbr>steps" not in text and "5 runs." in text


# ----------------------------------------------------------------------------- the page's text
def test_page_holds_the_items_figures_tables_and_notes(page):
    text = page.read_text()
    items = {part["name"]: part["items"] for part in data_in(text)["evaluations"]}
    assert items["gsm8k"][7]["answers"][1][0][0] == f" answer 7 of run 1{EVIL}"
    assert data_in(text)["paragraphs"] == ["Question: What is 1 + 1?\nAnswer: 2 #### 2"]
    assert text.count('src="data:image/svg+xml;base64,') == 4  # learning, forgetting, both, the loss
    assert "C1 Full finetuning learns more than LoRA" in text and "-0.100 ± 0.028 (n=1)" in text
    assert "0.200 ± 0.020" in text  # 1.96 standard errors


def test_page_names_nothing_outside_itself(page):
    """Its own elements have no address but data: ones; what the answers hold is no element."""
    text = re.sub(r'<script type="application/json".*?</script>', "", page.read_text(), flags=re.S)
    addresses = re.findall(r"<[a-z][^>]*?\b(?:src|href|action|data)=\"?([^\">]*)", text)
    assert addresses and {address.split(":")[0] for address in addresses if not address.startswith("#")} == {"data"}
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text


def test_claims_that_cannot_be_checked_and_no_runs_at_all(tmp_path):
    write_study(tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "base")
    text = page_of(tmp_path / "runs", tmp_path / "sub" / "report.html")
    assert "They cannot be checked:" in text and "of the base" in text
    done = run_here("paper/report.py", f"--runs={tmp_path}/none*", f"--out={tmp_path}/x.html")
    assert done.returncode == 2 and done.stderr.startswith("report.py: error: runs: no folder")
    assert not (tmp_path / "x.html").exists()


# ----------------------------------------------------------------------------- in a browser
def open_page(page, folder, link="", script="", probe="null"):
    """The page as a browser has it, at a link; runs `script` in it; returns (DOM, what `probe` is, addresses asked for)."""
    tried = folder / "tried.html"
    ends = f"<script>{script}; document.body.dataset.probe = JSON.stringify({probe});</script></body>"
    tried.write_text(page.read_text().replace("</body>", ends))
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
                           f"--log-net-log={folder / 'net.json'}", "--dump-dom", f"{tried.as_uri()}#{link}"],
                          capture_output=True, text=True, timeout=120)
    dom = done.stdout
    assert "data-probe" in dom, done.stderr[-2000:]
    found = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
    return dom, found, (folder / "net.json").read_text()


SHOWN = "[...document.querySelectorAll('#list li')].map((row) => Number(row.id.slice(5)))"
CHOSEN = "document.querySelector('#list [aria-selected=true]').id"
KEY = """const press = (key) => (document.activeElement || document.body).dispatchEvent(
    new KeyboardEvent("keydown", {key: key, bubbles: true, cancelable: true}));"""


@browser
def test_a_link_restores_its_view(page, tmp_path):
    """full right, r16 wrong, a word, one item: list, controls and item are those of the link, and so is the address."""
    link = "evaluation=gsm8k&q=of+RUN+1&differ=1&run.full-10=right&run.r16%3Cb%3E-10=wrong&run.base=hidden&item=8"
    view = """{shown: %s, chosen: %s, query: document.getElementById("query").value,
               choices: [...document.querySelectorAll("#runs select")].map((select) => select.value),
               differ: document.getElementById("differ").checked, hash: location.hash,
               heads: [...document.querySelectorAll("#item h4")].map((head) => head.textContent)}""" % (SHOWN, CHOSEN)
    _, found, _ = open_page(page, tmp_path, link, "change()", view)
    assert found["shown"] == [i for i in range(12) if is_right(1, i) and not is_right(2, i)] == [2, 4, 8, 10]
    assert (found["chosen"], found["query"], found["differ"]) == ("item-8", "of RUN 1", True)
    assert found["choices"] == ["hidden", "right", "wrong"] and found["heads"] == ["full-10", "r16<b>-10"]

    # the address that the page writes restores the same
    _, again, _ = open_page(page, tmp_path, found["hash"][1:], "", view)
    assert again == found


@browser
def test_filters_and_search_and_keys(page, tmp_path):
    script = KEY + """
        const seen = [];
        const see = () => seen.push([%s, %s]);
        document.getElementById("evaluation").selectedIndex = 1;
        document.getElementById("evaluation").dispatchEvent(new Event("change"));
        see();
        press("j"); press("j"); press("k"); see();
        press("/");
        const query = document.activeElement;
        press("j");
        query.value = "number 11"; query.dispatchEvent(new Event("input")); see();
        press("Escape");
        const left = document.activeElement !== query;
        document.getElementById("clear").click();
        const choice = document.querySelectorAll("#runs select")[2];
        choice.value = "right"; choice.dispatchEvent(new Event("change")); see();
        document.getElementById("list").focus();
        press("End"); see(); press("ArrowUp"); see();
    """ % (SHOWN, CHOSEN)
    _, found, _ = open_page(page, tmp_path, "", script, "{seen: seen, query: query.id, left: left}")
    everything = list(range(12))
    assert found["query"] == "query" and found["left"]
    assert found["seen"] == [[everything, "item-0"], [everything, "item-1"], [[11], "item-11"],
                             [[0, 3, 6, 9], "item-0"], [[0, 3, 6, 9], "item-9"], [[0, 3, 6, 9], "item-6"]]


@browser
def test_what_a_model_wrote_is_shown_as_text_and_asks_for_nothing(page, tmp_path):
    probe = """{texts: [...document.querySelectorAll("#item pre")].map((block) => block.textContent),
                made: document.querySelectorAll("#item img, #item script, #items b, header b, td img, td script").length,
                title: document.title, heading: document.querySelector("h1").textContent,
                loaded: performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 5))}"""
    _, found, asked = open_page(page, tmp_path, "evaluation=gsm8k&item=7", "", probe)
    assert f" answer 7 of run 1{EVIL}" in found["texts"] and f" answer 7 of run 2{EVIL}" in found["texts"]
    assert found["made"] == 0 and found["title"] == found["heading"] == f"A <b>study</b> {EVIL[:40]}"
    assert "canary" not in asked and "tried.html" in asked
    assert set(found["loaded"]) <= {"data:"}


@browser
def test_it_opens_with_the_first_evaluation_that_can_be_read(page, tmp_path):
    """Without a link: multiple choice comes first, but its texts are not beside the results."""
    probe = "document.getElementById('evaluation').selectedOptions[0].textContent"
    _, found, _ = open_page(page, tmp_path, "", "", probe)
    assert found == "gsm8k (12)"


@browser
def test_samples_of_programs_and_how_they_ended(page, tmp_path):
    probe = """{boxes: [...document.querySelectorAll("#item .answer")].map((box) => box.className + "|" +
                       [...box.querySelectorAll("summary, p, .right, .wrong")].map((part) => part.textContent).join("|"))}"""
    _, found, _ = open_page(page, tmp_path, "evaluation=humaneval&item=0", "", probe)
    words = ("answer is-right|✓ right: 2 of 3 samples, 2 different|✓ ×2 passed|"
             "✗ timed out; cut at the length limit")
    assert found["boxes"] == ["answer is-absent|· not asked", words, words]


@browser
def test_of_ten_thousand_items_one_page_is_in_the_document(tmp_path):
    write_study(tmp_path / "runs", items=10_000)
    page_of(tmp_path / "runs", tmp_path / "report.html")
    probe = f"[document.querySelectorAll('#items *').length, {SHOWN}, document.getElementById('count').textContent]"
    _, (elements, shown, words), _ = open_page(tmp_path / "report.html", tmp_path, "evaluation=gsm8k&item=9990", "", probe)
    assert shown == list(range(9950, 10_000)) and elements < 600
    assert words.startswith("10000 of 10000 items; right of these: base 0, full-10 5000, ")


@browser
def test_a_study_without_items_says_so(tmp_path):
    for folder in write_study(tmp_path / "runs"):
        for path in folder.rglob("eval_*.jsonl"):
            path.unlink()
    page_of(tmp_path / "runs", tmp_path / "report.html")
    _, found, _ = open_page(tmp_path / "report.html", tmp_path, "", "", """[document.getElementById("no-items").hidden,
        document.getElementById("with-items").hidden]""")
    assert found == [False, True]


def test_metrics_that_no_run_has_and_empty_files_are_no_reason_to_stop(tmp_path):
    folders = write_study(tmp_path / "runs")
    write_lines(folders[1] / "results.jsonl", [])
    text = page_of(tmp_path / "runs", tmp_path / "report.html", learning="other")
    assert "No run has a metric of what was learned" in text
    assert "1 × empty files, such as" in text
