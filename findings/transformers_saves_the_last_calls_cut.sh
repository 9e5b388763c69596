#!/bin/sh
# Most would expect: truncation=True and padding="max_length" hold for the one
# call that they are given to. A tokenizer saved afterwards is as it was.
# What happens: they stay set inside the fast tokenizer and save_pretrained
# writes them into tokenizer.json. transformers itself resets them at each
# call, so its user sees nothing; whoever reads tokenizer.json with the
# tokenizers library gets every text cut, and every short one padded.
# Whom it hurts: other readers of the folder (servers, other languages, own
# training code): texts end after as many tokens as the saver's last call
# had, without an error, and padding stands in the prompts.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile transformers==5.24.0 tokenizers==0.23.3
cat > "$tmp/try.py" <<'EOF'
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
words = ["<unk>", "<pad>"] + list("abcdefghij")
inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


def lengths(name):
    folder = f"{sys.argv[1]}/{name}"
    tokenizer.save_pretrained(folder)
    plain = Tokenizer.from_file(folder + "/tokenizer.json")
    auto = AutoTokenizer.from_pretrained(folder)
    texts = "a b c d e f g h i j", "a"
    found = ([len(plain.encode(text).ids) for text in texts],
             [len(auto(text).input_ids) for text in texts])
    print(f"{name}: texts of 10 and 1 words are {found[0]} tokens by tokenizers, "
          f"{found[1]} by transformers")
    return found


assert lengths("before") == ([10, 1], [10, 1])
tokenizer(["a b c d e f"], truncation=True, max_length=4, padding="max_length")
assert lengths("after") == ([4, 4], [10, 1])
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
