r"""
MetaMathQA as PEFT's method comparison trains on it, for config/peft_metamath.py: an example a row, its prompt learned too.

    python prepare_data.py config/data/metamath_peft.py --tokenizer=models/llama3.2-3b --out_dir=data/metamath_peft

Licence: MIT.
PEFT leaves out examples of more than 1,300 characters; here those are cut at 768 tokens, which few reach.
"""
source = ('hf://datasets/meta-math/MetaMathQA@aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18'
          '/MetaMathQA-395K.json',)
kind = 'ift'
template = r'Question: {query} Think step by step.\nAnswer:'
response_field = 'response'
packing = 'none'
train_on_prompt = True
seq_len = 768
val_fraction = 0.0
