#!/bin/sh
# Most would expect, as the docstring of reduce_intruder_dimension says, that
# mitigation_lambda is the share of the intruder dimensions that is subtracted,
# the higher the more.
# What happens: it is the share that stays. 0.9 removes a tenth, 1 removes
# nothing, 0 removes all of it.
# Whom it hurts: whoever sets it near 1 to win back what the base knew: the new
# adapter is almost the old one, its forgetting too, and a sweep over lambda is
# read from the wrong end.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$tmp/try.py" <<'EOF'
import warnings

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension

warnings.filterwarnings("ignore")
print("torch", torch.__version__.split("+")[0], "peft", peft.__version__)
# W0 has no direction like the one that the adapter brings
rows, columns = 12, 4
base = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
base[0].weight.data = torch.eye(rows, columns)
model = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
layer = model.base_model.model[0]
layer.lora_A["default"].weight.data = torch.tensor([[0.0, 0.0, 0.0, 9.0]])
layer.lora_B["default"].weight.data = torch.eye(rows)[:, 11:]
before = layer.get_delta_weight("default").norm()
left = []
for share in (0.0, 0.25, 0.9, 1.0):
    name = f"softened_{share}".replace(".", "_")
    reduce_intruder_dimension(model, new_adapter_name=name, mitigation_lambda=share,
                              logging_sink=None)
    after = layer.get_delta_weight(name).norm()
    left.append(float(after / before))
    print(f"mitigation_lambda={share}: {after / before:.0%} of the adapter's change is left")
assert left[0] < 0.2 and abs(left[1] - 0.25) < 0.1
assert left[2] > 0.85 and left[3] > 0.99
assert "The relative portion of the intruder dimensions that is subtracted" in (
    reduce_intruder_dimension.__doc__)
EOF
"$tmp/venv/bin/python" "$tmp/try.py"
