#!/bin/sh
# torch 2.13.0 on a CPU with AVX512, Linux with glibc: products in bf16 of ever new lengths take ever more memory.
#
# Most would expect: a product of two matrices leaves nothing behind once its result is freed, so training on texts of many
# lengths needs the memory of the longest. That convolutions keep something for every input size is known and documented;
# plain products in fp32 keep next to nothing.
#
# What happens: in bf16 each number of rows is a product that oneDNN compiles and keeps, and PyTorch's layer over it keeps
# another thousand. What is kept also splits the hole that the last result left, so glibc takes a new one from the end of the
# heap: 0.7 to 2 MB here for every new length, and so for every weight of a model, until a thousand are kept. oneDNN's
# documented setting, ONEDNN_PRIMITIVE_CACHE_CAPACITY, does not bound it alone: LRU_CACHE_CAPACITY, which we found in one
# answer to a bug report only, is needed as well.
#
# Whom it hurts: who finetunes in bf16 on a CPU with rows of many lengths, or with losses on answers alone, whose number of
# tokens changes with every batch. It looks like a leak of the training loop. SmolLM2-135M with LoRA: 2.0 to 2.6 GB in 24 steps.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat > "$work/lengths.py" <<'EOF'
import sys

import torch

torch.set_num_threads(1)


def megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) // 256


# the gradient of a weight [1024, 1024] from 2 to 500 tokens: 2 MB in bf16, 4 in fp32
dy = torch.ones(500, 1024, dtype=getattr(torch, sys.argv[1]))
dy[:1].T @ dy[:1]
before = megabytes()
for tokens in range(2, 501):
    dy[:tokens].T @ dy[:tokens]
print(megabytes() - before)
EOF
"$work/venv/bin/python" -c "import torch; print('torch', torch.__version__, torch.backends.cpu.get_cpu_capability())"
unset ONEDNN_PRIMITIVE_CACHE_CAPACITY LRU_CACHE_CAPACITY
fp32=$("$work/venv/bin/python" "$work/lengths.py" float32)
bf16=$("$work/venv/bin/python" "$work/lengths.py" bfloat16)
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=16
one=$("$work/venv/bin/python" "$work/lengths.py" bfloat16)
export LRU_CACHE_CAPACITY=16
both=$("$work/venv/bin/python" "$work/lengths.py" bfloat16)
echo "MB left behind by 499 lengths: fp32 $fp32; bf16 $bf16, with oneDNN's setting $one, with both $both"
test "$fp32" -lt 100
test "$bf16" -gt 200
test "$one" -gt 200
test "$both" -lt 120
echo "as described"
