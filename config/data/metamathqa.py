r"""
Math IFT: MetaMathQA, from the hub.

    python prepare_data.py config/data/metamathqa.py --packing=paper --paper_epochs=16 \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/metamathqa

Licence: MIT.
Size: 395,000 records; about 103M tokens an epoch in the paper, 24 rows a GPU.
Time: a minute.
"""
source = ('hf://datasets/meta-math/MetaMathQA@aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18'
          '/MetaMathQA-395K.json',)
kind = 'ift'
prompt_field = 'query'
response_field = 'response'
seq_len = 1024
paper_batch = 24
val_fraction = 0.0
