#!/bin/sh
# torch 2.13.0 on Linux with glibc: every step of training on a CPU gets its memory from the system anew.
#
# Most would expect: after some steps of the same shapes, tensors live where those of the step before did, as they do on a
# GPU, where PyTorch keeps freed memory.
#
# What happens: PyTorch frees CPU tensors to the C library, and glibc gives the end of its heap and every block beyond 32 MB,
# as the logits of 1,024 tokens are, back to the system at once. So each step faults its pages in again, each filled with
# zeros by the kernel, for as long as the training runs. With MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ set high
# there are hardly any.
#
# Whom it hurts: who trains or measures small models on CPUs; the system's time counts as the model's: 3 to 7% of a step of a
# Llama with 128 columns (AMD EPYC, one thread). Beware: blocks beyond 32 MB that glibc keeps do not fit again where they
# were, and a loop over tensors of 64 MB grew from 0.3 to 1.1 GB.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$work/step.py" <<'EOF'
import resource

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Embedding(32000, 256), nn.TransformerEncoder(layer, 2), nn.Linear(256, 32000))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
tokens = torch.randint(32000, (4, 256))


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


counts = []
for _ in range(12):
    before = faults()
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    counts.append(faults() - before)
print(sum(counts[6:]) // 6)
EOF
"$work/venv/bin/python" -c "import torch; print('torch', torch.__version__)"
usual=$(env -u MALLOC_TRIM_THRESHOLD_ -u MALLOC_MMAP_THRESHOLD_ "$work/venv/bin/python" "$work/step.py")
kept=$(MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 "$work/venv/bin/python" "$work/step.py")
echo "page faults a step, mean of steps 7 to 12: $usual as it comes, $kept where glibc keeps what is freed"
test "$usual" -gt 50000
test "$kept" -lt 2000
echo "as described"
