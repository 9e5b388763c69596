#!/bin/sh
# Most would expect: Dataset.from_generator runs the generator that it is
# given, so that a changed source file gives the new rows. load_dataset of the
# same file does notice a change.
# What happens: rows are kept under a name made of the generator's code and its
# arguments. What the generator reads is not looked at: after the file was
# changed, the old rows come back and the generator is not even called.
# Whom it hurts: whoever mends a data file and prepares it again by the same
# script: training goes on with the rows from before, without a word.
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
from datasets import Dataset, load_dataset

datasets.disable_progress_bars()
path = sys.argv[1] + "/rows.jsonl"


def rows(path):
    print("  the generator reads the file")
    with open(path) as file:
        for line in file:
            yield json.loads(line)


generated = [row["text"] for row in Dataset.from_generator(rows, gen_kwargs={"path": path})]
loaded = load_dataset("json", data_files=path, split="train")["text"][:]
print("  from_generator", generated, "load_dataset", loaded)
assert loaded == sys.argv[2:]
assert generated == ["old"]
EOF
export HF_HUB_OFFLINE=1 HF_HOME="$tmp"
"$tmp/venv/bin/python" -c 'import datasets; print("datasets", datasets.__version__)'
echo 'first run:'
echo '{"text": "old"}' > "$tmp/rows.jsonl"
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp" old
echo 'second run, the file changed:'
printf '%s\n' '{"text": "new"}' '{"text": "newer"}' > "$tmp/rows.jsonl"
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp" new newer
