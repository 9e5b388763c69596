#!/bin/sh
# Most would expect: Dataset.from_list of rows of which some have a further
# field gives a column for it, empty where a row lacks it, as load_dataset
# does for the same rows in a file of JSON lines.
# What happens: only the first row's fields become columns. What other rows
# have beside them is dropped without a word. Inside a field it is otherwise:
# there a later row's further key is kept.
# Whom it hurts: whoever collects rows from several sources and hands them on
# as a list: system texts, scores or tool calls that the first row happens to
# lack are not trained on.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile datasets==5.2.0 pyarrow==26.0.1
cat > "$tmp/try.py" <<'EOF'
import json
import sys

import datasets
import pyarrow
from datasets import Dataset, load_dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
rows = [{"prompt": "a", "answer": "b"},
        {"prompt": "c", "answer": "d", "system": "be brief"}]
path = sys.argv[1] + "/rows.jsonl"
with open(path, "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
listed = Dataset.from_list(rows)
turned = Dataset.from_list(rows[::-1])
loaded = load_dataset("json", data_files=path, split="train")
nested = Dataset.from_list([{"chat": row} for row in rows])
for name, data in (("from_list", listed), ("from_list, rows turned round", turned),
                   ("load_dataset of the same rows", loaded),
                   ("from_list, rows inside a field", nested)):
    print(f"{name:31} {data.column_names} {data.to_list()}")
assert listed.column_names == ["prompt", "answer"]
assert set(turned.column_names) == set(loaded.column_names) == {"prompt", "answer", "system"}
assert nested[1]["chat"]["system"] == "be brief"
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
