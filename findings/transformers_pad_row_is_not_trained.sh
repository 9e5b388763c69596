#!/bin/sh
# Most would expect: pad_token_id in a model's config tells which token fills
# up short rows, and matters only where rows are filled up and masked.
# What happens: Llama hands it to its embedding layer as the row that gets no
# gradient. Where the end token is also the pad token, as in many folders, the
# end tokens that stand inside the texts, unmasked, never train their own
# input row; and in a new model that row begins as zeros.
# Whom it hurts: whoever trains all weights on packed documents or on talks
# with several turns: the row that stands between them stays as it was. The
# same token under another pad id is trained. Only tied embeddings get a
# gradient for it, from the output side.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 tokenizers==0.23.3
cat > "$tmp/try.py" <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
END, WORD = 2, 7
ids = torch.tensor([[1, 5, 6, END, 1, 7, 8, END, 1, 9]])  # no padding in here


def gradients(pad, tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=END, pad_token_id=pad,
        tie_word_embeddings=tied))
    rows = model.model.embed_tokens.weight
    start = rows[END].norm().item()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    end, word = rows.grad[END].norm().item(), rows.grad[WORD].norm().item()
    print(f"pad {pad}, end {END}, tied {tied!s:5}: gradient of the end's row {end:.3f}, "
          f"of a word's {word:.3f}; the end's row began with norm {start:.3f}")
    return start, end, word


start, end, word = gradients(pad=END, tied=False)
assert start == 0 and end == 0 and word > 0.1
start, end, word = gradients(pad=15, tied=False)
assert start > 0 and end > 0.1 and word > 0.1
start, end, word = gradients(pad=END, tied=True)
assert start == 0 and end > 0.1
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" "$tmp/try.py"
