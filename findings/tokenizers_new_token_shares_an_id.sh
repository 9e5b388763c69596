#!/bin/sh
# Most would expect: add_tokens gives a new token an id that no other token
# has, above the highest one.
# What happens: the new id is the count of the vocabulary's tokens. Where ids
# have a gap, as after taking out a token, that is an id in use: two tokens
# then share it, the older one decodes as the new one, and saving and loading
# keeps it so. Nothing is said.
# Whom it hurts: whoever prunes a vocabulary, or has one with unused ids, and
# then adds a pad, end or role token: the text's own token ends an answer or
# is masked as padding, and one row of the embeddings is trained as both.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile tokenizers==0.23.3
cat > "$tmp/try.py" <<'EOF'
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

print("tokenizers", tokenizers.__version__)
vocabulary = {"<unk>": 0, "red": 1, "green": 2, "blue": 4}  # 3 was taken out
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
print("before:", tokenizer.encode("red green blue").ids)
added = tokenizer.add_special_tokens(["<end>"])
tokenizer.save(sys.argv[1] + "/tokenizer.json")
for name in "at once", "loaded":
    blue, end = tokenizer.token_to_id("blue"), tokenizer.token_to_id("<end>")
    text = tokenizer.decode([1, 2, 4], skip_special_tokens=False)
    shown = tokenizer.decode([1, 2, 4])
    print(f"{name}: added {added}, blue is {blue}, <end> is {end}; 1, 2, 4 decode as "
          f"{text!r}, without special tokens {shown!r}")
    assert blue == end == 4
    assert text == "red green <end>" and shown == "red green"
    tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
EOF
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
