#!/bin/sh
# Most would expect: a kernel compiled without `maxnreg` may use all 255
# registers of a thread and spills only beyond them; a limit can only take
# registers away, and so add spills.
# What happens: for sm_100 (B200) a product of 64 x 64 tiles that adds to its
# output is given 72 registers and spills to the stack. With maxnreg=224, a
# limit three times as high, the same kernel gets more registers and spills
# nothing. On sm_90 (H100) it spills in neither case.
# Whom it hurts: whoever looks for spills ahead of time or lets autotuning
# choose among configs: a config looks as if it wanted too many registers, and
# is given up or made smaller, where a limit mends it.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile triton==3.7.1
cat > "$tmp/try.py" <<'EOF'
import re
import subprocess
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.knobs import nvidia


@triton.jit
def add_product(a, b, out, M, N, K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        left = tl.load(a + rows[:, None] * K + k[None, :], mask=(rows < M)[:, None], other=0.0)
        right = tl.load(b + cols[:, None] * K + k[None, :], mask=(cols < N)[:, None], other=0.0)
        total = tl.dot(left, right.T, total)
    at = out + rows[:, None] * N + cols[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(tl.bfloat16), mask=inside)


sizes = {"K": 192, "TILE": 64, "STEP": 64}
types = {}
aligned = {}
for i, name in enumerate(add_product.arg_names):
    types[name] = "constexpr" if name in sizes else "i32" if name in "MN" else "*bf16"
    if name not in sizes:
        aligned[(i,)] = [["tt.divisibility", 16]]
print("triton", triton.__version__)
found = {}
for arch in (90, 100):
    for limit in (None, 224):
        options = {"num_warps": 4, "num_stages": 2}
        if limit:
            options["maxnreg"] = limit
        kernel = compile(ASTSource(add_product, types, sizes, aligned),
                         target=GPUTarget("cuda", arch, 32), options=options)
        with open(sys.argv[1], "wb") as file:
            file.write(kernel.asm["cubin"])
        said = subprocess.run([nvidia.cuobjdump.path, "-res-usage", sys.argv[1]], text=True,
                              check=True, capture_output=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
        found[arch, limit] = registers, stack
        print(f"sm_{arch}, maxnreg={limit}: {registers} registers, {stack} bytes of stack")
assert found[100, None][0] < 128 and found[100, None][1] > 0
assert found[100, 224][0] > found[100, None][0] and found[100, 224][1] == 0
assert found[90, None][1] == found[90, 224][1] == 0
EOF
TRITON_CACHE_DIR="$tmp/cache" "$tmp/venv/bin/python" "$tmp/try.py" "$tmp/kernel.cubin"
