#!/bin/sh
# Most would expect: a trained adapter that is saved, and loaded on the same
# base model, gives the outputs that it gave before it was saved.
# What happens: with init_lora_weights="pissa_niter_4" the base's weights are
# changed by what a random approximation finds. The saved adapter keeps that
# word, so loading draws a new approximation, takes another part out of the
# base and puts the old factors beside it. Only the exact form, "pissa", finds
# the same part again. Nothing is said.
# Whom it hurts: whoever trains with the fast start and keeps the adapter as
# it is: the loaded model can be off by more than what was learned.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cat > "$tmp/try.py" <<'EOF'
import copy
import sys
import warnings

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False))
x, target = torch.randn(64, 256), torch.randn(64, 256)


def show(kind):
    torch.manual_seed(1)
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=kind)
    model = get_peft_model(copy.deepcopy(base), config)
    step = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        loss = (model(x) - target).pow(2).mean()
        loss.backward()
        step.step()
        step.zero_grad()
    folder = f"{sys.argv[1]}/{kind}"
    model.save_pretrained(folder)
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as said:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with torch.no_grad():
        learned = (model(x) - base(x)).norm()
        error = ((loaded(x) - model(x)).norm() / learned).item()
    print(f"{kind}: after loading, off by {error:.4f} of what training changed; "
          f"warnings {len(said)}")
    return error


assert show("pissa") < 1e-4
assert show("pissa_niter_4") > 0.3
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py" "$tmp"
