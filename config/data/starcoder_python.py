r"""
Code CPT: the Python part of StarCoder's data, from the hub.

    python prepare_data.py config/data/starcoder_python.py \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/starcoder_python

Licence: gated; accept the terms of The Stack on the hub, set HF_TOKEN. Each file is under its own.
Size: 12,866,649 files, 60.5 GB, of which the paper takes 20B tokens (were there fewer, all).
Disk: 40 GB, and as much again in data/starcoder_python.work while it runs.
Time: 3.5 hours of one core, an estimate from 3 bytes a token and 5 MB/s; a run prints its own.
"""
source = ('hf://datasets/bigcode/starcoderdata@9fc30b578cedaec69e47302df72cf00feed7c8c4'
          '/python/*.parquet',)
kind = 'cpt'
text_field = 'content'
seq_len = 4096
max_tokens = 20_000_000_000
val_fraction = 0.0005
