#!/bin/sh
# torch 2.13.0, pinned below.
#
# Most would expect: on the meta device, where a tensor has a shape and no memory, nothing is drawn, so building a model
# there is the cheapest way to build it. nn.Linear is: it takes a millisecond and imports nothing.
# What happens: the first nn.Embedding, whose weight is drawn from a normal distribution, imports torch._dynamo,
# and sympy: hundreds of modules, and seconds of time on a laptop's core. uniform_, which nn.Linear uses, does not.
# Whom it hurts: every command-line tool that builds a language model on meta before it loads the weights, as is usual: each
# start pays for a compiler that it never uses, unless the layer's reset_parameters leaves meta weights alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat > "$folder/try.py" <<'PY'
import sys

import torch

def modules_imported_by(work):
    before = set(sys.modules)
    work()
    return set(sys.modules) - before

print("torch", torch.__version__.split("+")[0])
with torch.device("meta"):
    linear = modules_imported_by(lambda: torch.nn.Linear(4, 4))
    embedding = modules_imported_by(lambda: torch.nn.Embedding(4, 4))
print("nn.Linear on meta imported", len(linear), "modules")
print("nn.Embedding on meta imported", len(embedding), "modules, among them",
      [name for name in ("torch._dynamo", "sympy") if name in embedding])
assert len(linear) < 20
assert {"torch._dynamo", "sympy"} <= embedding and len(embedding) > 500
PY
"$folder/venv/bin/python" "$folder/try.py"
