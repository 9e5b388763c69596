"""
The quickstart's base pretrained with Lion instead of AdamW, for config/consistency.py; about four minutes on two CPU cores.

    make quickstart
    python train.py config/consistency_base.py
"""
base = base or 'out/quickstart/shape'
data = data or 'data/quickstart/pretrain'
scratch = True
val_data = ('source=data/quickstart/source', 'target=data/quickstart/target_test')
eval_rows = 100
optimizer = 'lionw'
learning_rate = 3e-4         # a tenth of what AdamW takes
global_batch = 8
microbatch = 8
max_steps = 700
log_interval = 50
save_interval = 200
keep_last = 1
out_dir = out_dir or 'out/lion_base'
device = 'cpu'
