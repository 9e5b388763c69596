#!/bin/sh
# Most would expect: after save_pretrained into a folder, from_pretrained of
# that folder gives back what was saved last.
# What happens: a save in one piece removes the pieces of an earlier save, but
# a save in pieces leaves an earlier model.safetensors where it is, and the
# loader takes that file first. The new pieces and their index are never read,
# and nothing is said.
# Whom it hurts: whoever saves again into the same folder when the model has
# grown past the limit of a piece, or with a smaller one: the model that comes
# back is the old one, and so is everything that is measured on it.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 safetensors==0.8.0
cat > "$tmp/try.py" <<'EOF'
import os
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2))


def save(folder, value, **how):
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    model.save_pretrained(folder, **how)
    back = LlamaForCausalLM.from_pretrained(folder).model.norm.weight[0].item()
    weights = sorted(n for n in os.listdir(folder) if n.startswith("model"))
    print(f"saved {value}, read back {back}; files: {', '.join(weights)}")
    return back


first, second = sys.argv[1] + "/first", sys.argv[1] + "/second"
print("in pieces, then in one:")
assert save(first, 1.0, max_shard_size="100KB") == 1.0
assert save(first, 2.0) == 2.0
print("in one, then in pieces:")
assert save(second, 1.0) == 1.0
assert save(second, 2.0, max_shard_size="100KB") == 1.0
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
