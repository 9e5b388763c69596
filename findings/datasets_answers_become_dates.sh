#!/bin/sh
# Most would expect: what stands between quotes in a file of JSON lines is
# loaded as a text, and comes out as the same text when it is written again.
# What happens: where all texts of a field look like dates, load_dataset makes
# times of them: "1969-07-20" is a time of day 0:00, an hour's zone is counted
# away, and to_json writes a number of milliseconds. With one other text among
# them all stay texts, so a part of a file has other types than the whole.
# Whom it hurts: whoever trains on or is scored by answers that are dates: the
# expected "1969-07-20" is compared or trained as another text or a number.
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
from datasets import load_dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)


def trip(name, answers):
    before, after = f"{sys.argv[1]}/{name}.jsonl", f"{sys.argv[1]}/{name}_again.jsonl"
    with open(before, "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    data = load_dataset("json", data_files=before, split="train")
    data.to_json(after)
    written = [json.loads(line)["answer"] for line in open(after)]
    print(f"{name}: {answers}\n  type {data.features['answer'].dtype}, as text "
          f"{[str(answer) for answer in data['answer']]}, written again {written}")
    return data, written


dates = ["1969-07-20", "2000-01-01"]
data, written = trip("dates", dates)
assert data.features["answer"].dtype == "timestamp[s]"
assert str(data[0]["answer"]) == "1969-07-20 00:00:00"
assert written == [-14256000000, 946684800000]
data, written = trip("zones", ["2000-01-01T00:30:00+02:00", "2000-01-01T12:00:00Z"])
assert str(data[0]["answer"]) == "1999-12-31 22:30:00"
data, written = trip("mixed", dates + ["never"])
assert written == dates + ["never"]
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
