r"""
Code IFT: Magicoder-Evol-Instruct-110K, from the hub.

    python prepare_data.py config/data/magicoder.py --packing=paper --paper_epochs=16 \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/magicoder

Licence: Apache-2.0.
Size: 111,183 records; 72.97M tokens and 193 steps an epoch in the paper, which packs as above.
Time: a minute.
"""
source = ('hf://datasets/ise-uiuc/Magicoder-Evol-Instruct-110K@b0079beaa0361d82412520b873715bee59cc7dd4'
          '/*.jsonl',)
kind = 'ift'
prompt_field = 'instruction'
response_field = 'response'
seq_len = 4096
val_fraction = 0.0
