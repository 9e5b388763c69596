#!/bin/sh
# Most would expect: decode(ids, skip_special_tokens=True) leaves special
# tokens out of the text.
# What happens: since 0.23 those marked `normalized` stay in it, and with a
# blank before them, where the file's normalizer changes their spelling (as
# Llama's does: it puts a mark at the front). 0.22.2 leaves them out.
# Whom it hurts: whoever decodes the answers of a model with such a file, as
# some converted Llama tokenizers are: "4 </s>" is compared with "4", stop
# strings and graders see the end token, and chats repeat it to the model.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
cat > "$tmp/try.py" <<'EOF'
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

for normalized in (False, True):
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "4": 3, "2": 4, "▁4": 5, "▁2": 6}
    merges = [("▁", "4"), ("▁", "2")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    front = normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([front, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=normalized)])
    text = tokenizer.decode([5, 6, 1], skip_special_tokens=True)
    print(f"tokenizers {tokenizers.__version__}, normalized={normalized}: {text!r}")
EOF
cat > "$tmp/expected" <<'EOF'
tokenizers 0.22.2, normalized=False: '4 2'
tokenizers 0.22.2, normalized=True: '4 2'
tokenizers 0.23.3, normalized=False: '4 2'
tokenizers 0.23.3, normalized=True: '4 2 </s>'
EOF
for version in 0.22.2 0.23.3; do
    python3 -m venv "$tmp/venv-$version"
    "$tmp/venv-$version/bin/pip" install -q --no-compile "tokenizers==$version"
    "$tmp/venv-$version/bin/python" "$tmp/try.py" >> "$tmp/found"
done
cat "$tmp/found"
diff "$tmp/expected" "$tmp/found" || { echo "this has changed"; exit 1; }
