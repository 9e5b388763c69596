#!/bin/sh
# Most would expect: a training loop inside one autocast block learns just as
# one that opens the block in each step; it is the same arithmetic.
# What happens: autocast keeps the bf16 copies of the weights until the block
# ends, and does not look whether a weight has changed since. The optimizer
# steps the fp32 weights, but every forward in the block still uses the copies
# of the first one: the loss stands still and the gradients are those of the
# old weights, while the weights run on.
# Whom it hurts: whoever wraps a whole epoch, or several small steps, in the
# block: it runs without a warning, and trains with ever staler gradients.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > "$tmp/try.py" <<'EOF'
import contextlib

import torch

print("torch", torch.__version__)
torch.manual_seed(0)
x, target = torch.randn(32, 8), torch.randn(32, 1)


def cast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def train(whole, each):
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 1, bias=False)
    before = model.weight.detach().clone()
    step, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    with whole():
        for _ in range(5):
            with each():
                loss = (model(x).float() - target).pow(2).mean()
            loss.backward()
            step.step()
            step.zero_grad()
            losses.append(round(loss.item(), 4))
    return losses, (model.weight - before).norm().item()


names = ("one block around all steps", "one block in each step")
ways = ((cast, contextlib.nullcontext), (contextlib.nullcontext, cast))
results = [train(*way) for way in ways]
for name, (losses, moved) in zip(names, results):
    print(f"{name:27} losses {losses}, weights moved by {moved:.3f}")
(frozen, moved), (falling, _) = results
assert len(set(frozen)) == 1 and moved > 0.1
assert falling == sorted(falling, reverse=True) and falling[-1] < falling[0]
EOF
"$tmp/venv/bin/python" "$tmp/try.py"
