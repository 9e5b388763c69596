r"""
Math CPT: OpenWebMath, from the hub.

    python prepare_data.py config/data/openwebmath.py \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/openwebmath

Licence: ODC-By 1.0.
Size: 6,315,233 documents in 27 GB of parquet; 14.7B tokens, which training repeats to 20B
(max_tokens=20e9 in train.py).
Time: 2.5 hours of one core, an estimate from 3 bytes a token and 5 MB/s; a run prints its own.
"""
source = ('hf://datasets/open-web-math/open-web-math@fde8ef8de2300f5e778f56261843dab89f230815'
          '/data/*.parquet',)
kind = 'cpt'
text_field = 'text'
seq_len = 4096
val_fraction = 0.0005
