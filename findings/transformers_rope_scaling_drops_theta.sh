#!/bin/sh
# Most would expect: adding "rope_scaling" to a model folder's config.json, as
# many model cards tell for longer texts, stretches the positions and leaves
# the rest of the rotary settings, above all their base (theta), as it was.
# What happens: transformers 5 saves theta inside "rope_parameters". A
# "rope_scaling" beside it replaces that whole block, and theta falls back to
# 10000 without a word. Only a second theta, written bare at the top level of
# the file, would survive; and there it even beats the one of rope_parameters,
# which without rope_scaling it does not.
# Whom it hurts: whoever saved a model of another theta (500000, 1000000) with
# transformers 5 and then lengthens its context: it loads, runs, and is broken.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 tokenizers==0.23.3
cat > "$tmp/try.py" <<'EOF'
import json
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.utils.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
folder = sys.argv[1] + "/model"
torch.manual_seed(0)
rope = {"rope_type": "default", "rope_theta": 500000.0}
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=256, initializer_range=0.3,
    rope_parameters=rope))
model.save_pretrained(folder)
saved = json.load(open(folder + "/config.json"))
ids = torch.arange(64)[None]


def load(**extra):
    json.dump(saved | extra, open(folder + "/config.json", "w"))
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(ids).logits, model.config.rope_parameters


def show(name, logits, rope):
    print(f"{name:36} theta {rope['rope_theta']:8.0f}  largest change of a logit "
          f"{(logits - plain).abs().max().item():.3f}")
    return rope["rope_theta"]


plain, rope = load()
scaling = {"rope_type": "linear", "factor": 1.0}  # a factor of 1 should change nothing
bare = {"rope_theta": 700000.0}
assert show("as saved", plain, rope) == 500000
assert show("with rope_scaling, factor 1", *load(rope_scaling=scaling)) == 10000
assert show("with a bare theta of 700000", *load(**bare)) == 500000
assert show("with both", *load(rope_scaling=scaling, **bare)) == 700000
assert (load(rope_scaling=scaling)[0] - plain).abs().max() > 0.1
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
