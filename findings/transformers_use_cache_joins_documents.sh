#!/bin/sh
# Most would expect: position_ids that begin again at each document keep packed
# documents apart in a Llama of transformers, as its documentation of packing
# says; use_cache only saves time and never moves a logit.
# What happens: boundaries are looked for in position_ids only if attention_mask
# is None and there is no cache. use_cache is True by default, and the cache is
# made inside the call, so a plain model(ids, position_ids=...) lets each
# document read those before it. An attention_mask of all ones, as tokenizers
# and collators return it, does the same. Nothing is printed.
# Whom it hurts: whoever evaluates or trains on packed rows in a loop of their
# own (Trainer turns use_cache off in 5, and with checkpointing in 4): losses
# and gradients are of other text than meant.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat > "$tmp/try.py" <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(config).eval()
first, second = torch.randint(64, (1, 5)), torch.randint(64, (1, 6))
packed = torch.cat([first, second], dim=1)
positions = torch.tensor([[*range(5), *range(6)]])
ones = torch.ones_like(packed)


@torch.no_grad()
def moved(label, **knobs):
    alone = model(second).logits
    behind_another = model(packed, position_ids=positions, **knobs).logits[:, 5:]
    largest = (behind_another - alone).abs().max().item()
    print(f"{label:33} logits of the second document move by {largest:.2g}")
    return largest


assert moved("use_cache=False", use_cache=False) < 1e-5
assert moved("nothing given") > 0.05
assert moved("use_cache=False, a mask of ones", use_cache=False, attention_mask=ones) > 0.05
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py"
