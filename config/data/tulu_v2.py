r"""
Chat IFT: the Tulu-v2 mixture, from the hub.

    python prepare_data.py config/data/tulu_v2.py --packing=paper --paper_epochs=6 \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/tulu_v2

Licence: ODC-By 1.0 and the licences of its parts, some not for commerce.
Size: 326,154 conversations, 1.2 GB of text, so about 400M tokens (the paper does not say).
Time: 5 minutes.
"""
source = ('hf://datasets/allenai/tulu-v2-sft-mixture@6248b175d2ccb5ec7c4aeb22e6d8ee3b21b2c752'
          '/data/*.parquet',)
kind = 'ift'
template = 'tulu'
seq_len = 4096
val_fraction = 0.0
