r"""
Chat IFT: the Tulu-v2 mixture, about 326,000 conversations. Learned: MT-bench, GSM8K, MMLU. LoRA with --lora_rank=256.

    python prepare_data.py config/data/tulu_v2.py --packing=paper --paper_epochs=6 \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/tulu_v2
     1 GPU   python train.py config/tulu_ift.py --lora_rank=256
     8 GPUs  torchrun --nproc_per_node=8 train.py config/tulu_ift.py
    32 GPUs  torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 train.py config/tulu_ift.py

The paper does not say the steps of an epoch. --dry_run=True --gpus=8 --mfu=0.45 prints hours and memory; 6 epochs on 8 H100
at 45% of their peak, if a guess at the rows is right: 10 h and 26 GB a GPU in full, 8 h and 33 GB with r=256, and a third
more time for activation checkpointing.
One run: the checkpoints after 2 and 4 epochs are from before the learning rate has come down, which it does over 6.

The paper's values (its tables S10 to S13; base MT-bench 2.74, GSM8K .145, forgetting .671), after 2, 4, 6 epochs:
              MT-bench             MMLU              GSM8K             forgetting
    full      5.825 5.838 5.862    .507 .504 .502    .324 .291 .303    .660 .652 .621
    r=256     5.788 5.834 5.894    .502 .496 .492    .296 .335 .301    .653 .649 .629
    r=64      5.597 5.725 5.944    .503 .509 .504    .285 .270 .295    .649 .655 .647
    r=16      5.681 5.997 5.712    .491 .502 .504    .251 .275 .280    .650 .657 .657
"""
import json
from pathlib import Path

include('ift.py')            # what the instruction finetunings share; a line below it wins
data = data or 'data/tulu_v2'
data_rows = data_rows or 120_000    # for --dry_run before the data are there: a guess
seq_len = 4096
global_batch = 192
microbatch = 6

# what follows from other knobs: change those above this line
learning_rate = 1e-4 if lora_rank else 5e-6
max_epochs = max_epochs or (0.0 if max_steps or max_tokens else 6.0)
if (Path(data) / 'meta.json').is_file():
    _train = json.loads((Path(data) / 'meta.json').read_text())['splits']['train']
    _rows = _train['rows'] // _train.get('epochs', 1)    # packed epochs lie one behind the other
    checkpoint_at = checkpoint_at or tuple(_epochs * _rows // global_batch for _epochs in (2, 4))  # those two are kept
out_dir = out_dir or f'out/{_run_name()}'
