r"""
Code IFT: Magicoder-Evol-Instruct-110K, 72.97M tokens an epoch. Learned: HumanEval. LoRA with --lora_rank=256.

    python prepare_data.py config/data/magicoder.py --packing=paper --paper_epochs=16 \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/magicoder
     1 GPU   python train.py config/code_ift.py --lora_rank=256
     8 GPUs  torchrun --nproc_per_node=8 train.py config/code_ift.py --max_epochs=8
    32 GPUs  torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 train.py config/code_ift.py

193 steps an epoch. --dry_run=True --gpus=8 --mfu=0.45 prints hours and memory; 4 epochs on 8 H100
at 45% of their peak (a prediction, not measured): 2.0 h and 26 GB a GPU in full, 1.6 h and 33 GB with r=256, and a third
more time for activation checkpointing.
Each duration is a run with its own schedule: --max_epochs=1, 2, 4, 8, 16.

Sweeps of the paper, each an option of the same command (give each its --out_dir):
    figure S1  --lora_rank=64 --lora_alpha=32 --lora_targets=q_proj,k_proj,v_proj,o_proj,up_proj,down_proj --max_epochs=2
               --learning_rate=1e-5 to 1e-3; best LoRA 5e-4, full 5e-5
    figure S3  --lora_rank=256 --lora_alpha=32, 256, 512: 512 is best at every learning rate
    figure 7   --lora_targets=attention, mlp, all with r = 16, 64, 256 and 1, 2, 4 epochs: attention < mlp = all
    figure 4   in full with --weight_decay=5e-5, 1e-4 or --attention_dropout=0.05, 0.1: learn and forget as without

The paper's values (its tables S5, S6; base HumanEval .138, forgetting .671):
    epochs            1     2     4     8     16
    HumanEval full    .302  .464  .470  .497  .416
           r=256      .299  .385  .498  .437  .466
           r=64       .249  .339  .417  .392  .405
           r=16       .197  .275  .358  .338  .324
    forget full       .595  .579  .512  .446  .414
           r=256      .655  .659  .631  .552  .517
           r=64       .652  .651  .632  .580  .510
           r=16       .653  .648  .652  .646  .609
"""

include('ift.py')            # what the instruction finetunings share; a line below it wins
data = data or 'data/magicoder'
data_rows = data_rows or 193 * 192  # for --dry_run before the data are there
seq_len = 4096
global_batch = 192
microbatch = 6

# what follows from other knobs: change those above this line
learning_rate = 5e-5 if not lora_rank else 1e-4 if lora_rank >= 256 else 2e-4  # r=256 spikes at 2e-4
max_epochs = max_epochs or (0.0 if max_steps or max_tokens else 4.0)
out_dir = out_dir or f'out/{_run_name()}'
