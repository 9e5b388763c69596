#!/bin/sh
# Most would expect: save_file writes a file as other tools do: with the rights
# that the umask leaves, or those that the file had; through a link, into the
# file that the link leads to.
# What happens: it writes a new file of mode 0600 beside the old one and moves
# it into place. The owner alone can read it, whatever the umask or the old
# file's mode; a link is replaced by a file, and what it led to stays old.
# Whom it hurts: a group that shares models: config.json can be read by all,
# the weights beside it by their owner alone. And whoever keeps weights behind
# a link: other readers of the target go on with the old ones.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile safetensors==0.8.0 numpy==2.4.6
cat > "$tmp/try.py" <<'EOF'
import os
import sys

import numpy
import safetensors
from safetensors.numpy import load_file, save, save_file

print("safetensors", safetensors.__version__)
os.umask(0o022)
os.chdir(sys.argv[1])
old, new = {"w": numpy.zeros(2)}, {"w": numpy.ones(2)}


def mode(name):
    found = oct(os.stat(name).st_mode & 0o777)
    print(f"{name:34} {found}")
    return found


save_file(new, "by save_file")
assert mode("by save_file") == "0o600"
with open("by open", "wb") as file:
    file.write(save(new))
assert mode("by open") == "0o644"
save_file(new, "by open")
assert mode("by open") == "0o600"

with open("target", "wb") as file:
    file.write(save(old))
os.symlink("target", "link")
save_file(new, "link")
print("after a save to the link: link", load_file("link")["w"], "target",
      load_file("target")["w"], "still a link:", os.path.islink("link"))
assert load_file("target")["w"].tolist() == [0, 0] and not os.path.islink("link")
EOF
"$tmp/venv/bin/python" "$tmp/try.py" "$tmp"
