#!/bin/sh
# Most would expect: a kernel that runs under TRITON_INTERPRET=1 computes with
# bf16 as a GPU does, up to rounding, or says that it cannot.
# What happens: the interpreter keeps bf16 as 16-bit whole numbers, and a dot
# counts with the bits as such: its results are wrong by factors of millions,
# with no error. Conversions do see the type: a kernel that casts to fp32 first
# is right. A cast back to bf16 cuts off instead of rounding to the nearest:
# errors up to twice as large, and all of them towards zero.
# Whom it hurts: whoever tests kernels without a GPU: bf16 cases fail though
# the kernel is right, or are taken out of the tests altogether.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 triton==3.7.1
cat > "$tmp/try.py" <<'EOF'
import torch
import triton
import triton.language as tl

print("triton", triton.__version__, "torch", torch.__version__)


@triton.jit
def product(a, b, c, N: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(c + at, tl.dot(x, y))


@triton.jit
def narrow(a, c, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(c + i, tl.load(a + i).to(tl.bfloat16))


torch.manual_seed(0)
a, b = torch.randn(2, 16, 16).bfloat16()
want = a.float() @ b.float()
errors = {}
for wide in False, True:
    got = torch.zeros(16, 16)
    product[(1,)](a, b, got, 16, wide)
    errors[wide] = ((got - want).norm() / want.norm()).item()
    print(f"dot of bf16{', cast to fp32 first' if wide else ''}: relative error {errors[wide]:.2g}")
x = torch.linspace(-2, 2, 1024)
cut = torch.zeros(1024, dtype=torch.bfloat16)
narrow[(1,)](x, cut, 1024)
other = (cut != x.bfloat16()).float().mean().item()
larger = (cut.float().abs() > x.abs()).sum().item()
print(f"fp32 to bf16: {other:.0%} of the values differ from torch's, "
      f"{larger} are larger than the input")
assert errors[False] > 1e6 and errors[True] < 1e-6
assert other > 0.4 and larger == 0
EOF
TRITON_INTERPRET=1 "$tmp/venv/bin/python" "$tmp/try.py"
