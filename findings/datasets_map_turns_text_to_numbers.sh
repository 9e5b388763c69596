#!/bin/sh
# Most would expect: Dataset.map stores what the function returns. A function
# that makes texts of a column of numbers gives a column of texts.
# What happens: if every new text in a batch can be read as a number, the
# column stays a column of numbers: "007" comes back as 7 and "2.50" as 2.5.
# Yes and no become 1 and 0. One text that is no number in the batch, or a new
# column's name, and all of them stay texts. Nothing is said in either case.
# Whom it hurts: whoever makes answers, labels or prompts of numbers under the
# column's old name: zeros in front, places behind the point and true or false
# are gone, and the type depends on the rows that happen to be in the data.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile datasets==5.2.0 pyarrow==26.0.1
cat > "$tmp/try.py" <<'EOF'
import datasets
import pyarrow
from datasets import Dataset

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
data = Dataset.from_dict({"n": [7, 12]})


def show(name, function, rows=data):
    column = rows.map(function)
    values = [list(row.values())[-1] for row in column]
    print(f"{name:34} returned {[list(function(r).values())[-1] for r in rows]}, "
          f"stored {values}")
    return values


assert show("texts of digits", lambda row: {"n": f"{row['n']:03d}"}) == [7, 12]
assert show("the same in a new column",
            lambda row: {"text": f"{row['n']:03d}"}) == ["007", "012"]
assert show("one more text that is no number",
            lambda row: {"n": f"{row['n']:03d}" if row["n"] < 99 else "many"},
            Dataset.from_dict({"n": [7, 12, 100]})) == ["007", "012", "many"]
assert show("texts of prices", lambda row: {"n": f"{row['n']:.2f}"},
            Dataset.from_dict({"n": [2.5, 10.0]})) == [2.5, 10.0]
stored = show("yes or no", lambda row: {"n": row["n"] > 8})
assert stored == [0, 1] and not any(isinstance(value, bool) for value in stored)
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py"
