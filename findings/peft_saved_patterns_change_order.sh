#!/bin/sh
# Most would expect: an adapter that is saved and loaded again gives the same
# outputs.
# What happens: where several keys of alpha_pattern (or rank_pattern) fit a
# layer, the first one counts. adapter_config.json is written with the keys in
# alphabetical order, so after loading another key comes first and a layer's
# update has another factor. Ranks that differ show up as an error about
# shapes; alphas alone change the outputs in silence.
# Whom it hurts: whoever writes a general pattern and then an exception, or the
# other way round: the adapter served or merged is not the one that was scored.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cat > "$tmp/try.py" <<'EOF'
import copy
import json
import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"query": nn.Linear(16, 16)})
        self.second = nn.ModuleDict({"query": nn.Linear(16, 16)})

    def forward(self, x):
        return self.second["query"](self.first["query"](x))


def scales(model):
    return {name: model.base_model.model.get_submodule(name).scaling["default"]
            for name in ("first.query", "second.query")}


net = Net()
config = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False,
                    alpha_pattern={"query": 4, "first.query": 40})
model = get_peft_model(copy.deepcopy(net), config)
model.save_pretrained(sys.argv[1] + "/adapter")
written = json.load(open(sys.argv[1] + "/adapter/adapter_config.json"))["alpha_pattern"]
loaded = PeftModel.from_pretrained(copy.deepcopy(net), sys.argv[1] + "/adapter")
x = torch.randn(8, 16)
with torch.no_grad():
    change = ((loaded(x) - model(x)).norm() / model(x).norm()).item()
print("given  ", {"query": 4, "first.query": 40}, "factors", scales(model))
print("written", written, "factors after loading", scales(loaded))
print(f"outputs changed by {change:.0%}")
assert scales(model) == {"first.query": 1.0, "second.query": 1.0}
assert scales(loaded) == {"first.query": 10.0, "second.query": 1.0}
assert change > 0.1
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py" "$tmp"
