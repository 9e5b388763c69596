#!/bin/sh
# Most would expect: create_loraplus_optimizer hands its further keyword
# arguments to the optimizer, as its docstring says, so weight_decay=0.1 decays
# the adapters as it does with AdamW(parameters, weight_decay=0.1).
# What happens: every group that it makes has a weight_decay of its own, 0.0
# unless loraplus_weight_decay is given, a name that the docstring lacks; a
# group's value wins over the optimizer's. Decay is off and nothing says so,
# though optimizer.defaults shows 0.1.
# Whom it hurts: whoever compares LoRA+ with LoRA or full finetuning at equal
# decay, or looks what regularisation does to forgetting: one side has none.
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
from peft.optimizers import create_loraplus_optimizer

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config)
lora_a = model.base_model.model[0].lora_A["default"].weight


def shrunk(**knobs):
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16,
                                          **knobs)
    before = lora_a.norm().item()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # so that a step is decay alone
    optimizer.step()
    share = lora_a.norm().item() / before
    print(knobs, "default", optimizer.defaults["weight_decay"], "groups",
          sorted({group["weight_decay"] for group in optimizer.param_groups}),
          f"a step leaves {share:.4f} of lora_A")
    return share


assert shrunk(weight_decay=0.1) == 1
assert abs(shrunk(loraplus_weight_decay=0.1) - 0.99) < 1e-5
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py"
