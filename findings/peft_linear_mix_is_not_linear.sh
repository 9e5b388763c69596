#!/bin/sh
# Most would expect: add_weighted_adapter with combination_type="linear" gives
# the weighted sum of the adapters' updates; half an adapter and half of the
# same adapter is that adapter.
# What happens: the factors A and B are summed each for itself and multiplied
# afterwards, so that each A also meets the other's B. For two unrelated
# adapters the error is as large as the right update, and an adapter mixed
# half and half with itself comes out doubled. "cat" gives the true sum.
# Whom it hurts: whoever averages adapters (of several seeds, tasks or steps):
# what is scored is not the average, and no warning says so.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cat > "$tmp/try.py" <<'EOF'
import peft
import torch
from peft import LoraConfig, get_peft_model

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config, "one")
model.add_adapter("two", config)
layer = model.base_model.model[0]


def show(name, adapters, weights, how):
    model.add_weighted_adapter(adapters, weights, name, combination_type=how)
    want = sum(w * layer.get_delta_weight(a) for a, w in zip(adapters, weights))
    got = layer.get_delta_weight(name)
    error, size = ((got - want).norm() / want.norm()).item(), (got.norm() / want.norm()).item()
    print(f"{how:7}{weights} of {adapters}: {size:.2f} times as large as the sum, "
          f"error {error:.6f} of it")
    return error, size


error, _ = show("m1", ["one", "two"], [0.5, 0.5], "linear")
assert error > 0.5
error, _ = show("m2", ["one", "two"], [0.5, 0.5], "cat")
assert error < 1e-5
error, size = show("m3", ["one", "one"], [0.5, 0.5], "linear")
assert abs(size - 2) < 1e-5 and abs(error - 1) < 1e-5
error, size = show("m4", ["one", "one"], [0.5, 0.5], "cat")
assert abs(size - 1) < 1e-5 and error < 1e-5
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py"
