#!/bin/sh
# Most would expect: training a tokenizer twice on the same lines with the same
# settings gives the same file, as it does for BPE.
# What happens: a WordPiece tokenizer numbers its ##letters in another order in
# every training, even twice in one process, as if in the order of a hash table
# with a random seed. Ties between merges may then fall otherwise, and some
# pieces differ too. There is no seed to set.
# Whom it hurts: whoever trains the tokenizer in each rank, or anew from a
# recorded command: token files and embeddings of one training are read with
# the ids of another, and only the loss is worse.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile tokenizers==0.23.3
cat > "$tmp/try.py" <<'EOF'
import random

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

print("tokenizers", tokenizers.__version__)
rng = random.Random(0)
words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(400)]
lines = [" ".join(rng.choices(words, k=12)) for _ in range(300)]


def train(model, trainer):
    tokenizer = Tokenizer(model(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(lines, trainer(vocab_size=300, special_tokens=["<unk>"],
                                                 show_progress=False))
    return tokenizer


def compare(model, trainer):
    """How many different results six trainings have: vocabularies, ids of the lines."""
    trained = [train(model, trainer) for _ in range(6)]
    vocabularies = {tuple(sorted(one.get_vocab().items())) for one in trained}
    pieces = {tuple(sorted(one.get_vocab())) for one in trained}
    ids = {str([one.encode(line).ids for line in lines]) for one in trained}
    print(f"{model.__name__:9} six trainings, different: {len(vocabularies)} vocabularies, "
          f"{len(pieces)} sets of pieces, {len(ids)} lists of ids")
    return len(vocabularies), len(ids)


assert compare(models.BPE, trainers.BpeTrainer) == (1, 1)
vocabularies, ids = compare(models.WordPiece, trainers.WordPieceTrainer)
assert vocabularies > 1 and ids > 1
EOF
"$tmp/venv/bin/python" "$tmp/try.py"
