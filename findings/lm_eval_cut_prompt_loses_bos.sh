#!/bin/sh
# Most would expect: if the harness puts the begin token before prompts, it
# does so before all of them; a prompt that is too long loses words.
# What happens: the begin token is counted as the first of the prompt's tokens,
# and a prompt that is too long is cut on the left, so it is the first to go.
# Within one task the short prompts have it and the long ones do not, both
# where choices are scored and where text is generated. The harness tells
# that tokens were cut, not which; add_bos_token=True changes nothing.
# Whom it hurts: whoever scores models that rely on the token with many
# examples in the prompt or a short context: the fall of the score on long
# prompts may come from the missing token.
set -eu
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 \
    transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 datasets==5.2.0 lm-eval==0.4.13
cat > "$tmp/try.py" <<'EOF'
import string
from importlib.metadata import version

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm-eval", version("lm-eval"), "transformers", version("transformers"))
words = ["<unk>", "<s>", "</s>", *string.ascii_lowercase]
inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
inner.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>",
                                    bos_token="<s>", eos_token="</s>", pad_token="</s>")
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=16))


class Watched(HFLM):
    def _model_call(self, inps, *args, **kwargs):
        self.seen = inps[0].tolist()
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context, *args, **kwargs):
        self.seen = context[0].tolist()
        return super()._model_generate(context, *args, **kwargs)


how = {"until": ["!"], "max_gen_toks": 4, "do_sample": False}
for extra in {}, {"add_bos_token": True}:
    harness = Watched(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=16, **extra)
    for count in 5, 20:
        prompt = " ".join(string.ascii_lowercase[:count])
        for kind, rest in ("loglikelihood", " y z"), ("generate_until", how):
            request = Instance(kind, {}, (prompt, rest), 0)
            getattr(harness, kind)([request], disable_tqdm=True)
            begin = tokenizer.convert_ids_to_tokens(harness.seen)[0]
            print(f"{extra} {count:2} words, {kind}: {len(harness.seen)} tokens, first {begin}")
            assert (begin == "<s>") == (count == 5)
EOF
HF_HUB_OFFLINE=1 HF_HOME="$tmp" "$tmp/venv/bin/python" -W ignore "$tmp/try.py"
