#!/bin/sh
# Most would expect: a Llama folder saved by transformers 5 is either read or
# refused by transformers 4.57; the weights and the model's type are the same.
# What happens: transformers 5 writes the base of the rotary positions (theta)
# only inside "rope_parameters", which 4.57 carries along without using it. It
# looks for "rope_theta", finds none, and takes 10000. Nothing is said.
# Whom it hurts: whoever trains with 5 and serves, merges or scores with a tool
# that still has 4.57 inside (or reads config.json the same way): a model with
# a theta of 500000 loads and is broken.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
for version in 5.24.0 4.57.6; do
    python3 -m venv "$tmp/$version"
    "$tmp/$version/bin/pip" install -q --no-compile transformers==$version
done
cat > "$tmp/save.py" <<'EOF'
import sys

import transformers
from transformers import LlamaConfig

rope = {"rope_type": "default", "rope_theta": 500000.0}
LlamaConfig(rope_parameters=rope).save_pretrained(sys.argv[1])
print("transformers", transformers.__version__, "saves theta", rope["rope_theta"])
EOF
cat > "$tmp/read.py" <<'EOF'
import sys

import transformers
from transformers import AutoConfig

config = AutoConfig.from_pretrained(sys.argv[1])
if transformers.__version__.startswith("5."):
    theta, wanted = config.rope_parameters["rope_theta"], 500000
else:
    theta, wanted = config.rope_theta, 10000
print("transformers", transformers.__version__, "reads theta", theta,
      "beside", config.rope_parameters)
assert theta == wanted
EOF
export HF_HUB_OFFLINE=1 HF_HOME="$tmp"
"$tmp/5.24.0/bin/python" "$tmp/save.py" "$tmp/model"
"$tmp/5.24.0/bin/python" "$tmp/read.py" "$tmp/model"
"$tmp/4.57.6/bin/python" "$tmp/read.py" "$tmp/model"
