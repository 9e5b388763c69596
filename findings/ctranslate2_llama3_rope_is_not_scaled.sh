#!/bin/sh
# Most would expect: ctranslate2's converter takes a Llama with rope_type llama3
# (Llama 3.1, 3.2 and 3.3), which it lists as supported and whose factors it
# writes into the model, and gives the logits of transformers.
# What happens: on 200 tokens the converted model gives, to five digits, the
# logits of the same weights with no scaling of the rotary frequencies at all.
# Types that it does not support (yarn, dynamic) are refused. No warning.
# Whom it hurts: whoever serves or evaluates a Llama 3.1 or later, or a
# finetuned one, by ctranslate2: text stays fluent, but scores and greedy
# answers are those of another model, the more the farther words look back.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0 ctranslate2==4.8.5
cat > "$tmp/try.py" <<'EOF'
import sys

import ctranslate2
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
tmp = sys.argv[1]
words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
                                    unk_token="<unk>", bos_token="<s>", eos_token="</s>")
none = {"rope_type": "default", "rope_theta": 500000.0}
scaled = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # Llama-3.2-1B's


def llama(rope):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=131072, initializer_range=0.2,
                         rope_parameters=dict(rope))
    return LlamaForCausalLM(config).eval()


torch.manual_seed(1)
ids = torch.randint(3, 64, (1, 200))
words_in = tokenizer.convert_ids_to_tokens(ids[0].tolist())
with torch.no_grad():
    logits = {name: llama(rope)(ids).logits[0].numpy() for name, rope in
              (("no scaling", none), ("llama3", scaled))}


def converted(name, rope):
    folder = f"{tmp}/{name}"
    llama(rope).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ctranslate2.converters.TransformersConverter(folder).convert(folder + "-ct2")
    generator = ctranslate2.Generator(folder + "-ct2", compute_type="float32")
    return np.array(generator.forward_batch([words_in]))[0]


def show(label, got, want):
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{label:60} {error:.1e} of the largest logit")
    return error


plain, of_llama3 = converted("plain", none), converted("llama3", scaled)
assert show("without scaling: ctranslate2 from transformers", plain, logits["no scaling"]) < 1e-4
assert show("llama3:          ctranslate2 from transformers", of_llama3, logits["llama3"]) > 0.01
assert show("llama3:          ctranslate2 from transformers without scaling", of_llama3,
            logits["no scaling"]) < 1e-4
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py" "$tmp"
