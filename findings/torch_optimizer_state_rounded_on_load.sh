#!/bin/sh
# Most would expect: load_state_dict gives an optimizer the state that
# state_dict gave; a resumed run goes on as the first one would have.
# What happens: loading casts every floating state to its weight's type. An
# optimizer that keeps fp32 masters or sums for bf16 weights gets them back as
# bf16: what small steps had gathered below bf16's resolution is gone, and
# later steps of that size do nothing at all. Only a state named "step" is
# left alone. Nothing is said.
# Whom it hurts: whoever writes an optimizer with fp32 state for bf16 weights:
# a run without a break learns, the same run resumed does not.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$tmp/try.py" <<'EOF'
import torch

print("torch", torch.__version__)


class MasterSGD(torch.optim.Optimizer):
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["master"] = weight.detach().float()
                state["step"] += 1
                state["master"] -= group["lr"] * weight.grad
                weight.data.copy_(state["master"])


def run(resume_at):
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterSGD([weight], {"lr": 2**-10})
    for step in range(40):
        if step == resume_at:
            saved = optimizer.state_dict()
            optimizer = MasterSGD([weight], {"lr": 2**-10})
            optimizer.load_state_dict(saved)
            print("  resumed: saved", saved["state"][0]["master"].dtype,
                  "loaded", optimizer.state[weight]["master"].dtype,
                  "step", optimizer.state[weight]["step"].dtype)
            assert saved["state"][0]["master"].dtype == torch.float32
            assert optimizer.state[weight]["master"].dtype == torch.bfloat16
            assert optimizer.state[weight]["step"].dtype == torch.float32
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    print(f"resumed at {resume_at}: weight after 40 steps {weight.item()}")
    return weight.item()


assert run(None) == 0.9609375
assert run(1) == 1.0
EOF
"$tmp/venv/bin/python" "$tmp/try.py"
