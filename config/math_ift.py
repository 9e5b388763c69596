r"""
Math IFT: MetaMathQA, 395,000 pairs, about 103M tokens an epoch. Learned: GSM8K. LoRA with --lora_rank=256.

    python prepare_data.py config/data/metamathqa.py --packing=paper --paper_epochs=16 \
        --tokenizer=models/Llama-2-7b-hf --out_dir=data/metamathqa
     1 GPU   python train.py config/math_ift.py --lora_rank=256
     8 GPUs  torchrun --nproc_per_node=8 train.py config/math_ift.py --max_epochs=8
    32 GPUs  torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 train.py config/math_ift.py

The paper does not say the steps of an epoch. --dry_run=True --gpus=8 --mfu=0.45 prints hours and memory; 4 epochs on 8 H100
at 45% of their peak (a prediction, not measured): 2.2 h and 26 GB a GPU in full, 1.7 h and 33 GB with r=256, and a third
more time for activation checkpointing.
Each duration is a run with its own schedule: --max_epochs=1, 2, 4, 8, 16.

Sweep of the paper, figure S1, options of the same command (give each its --out_dir):
    --lora_rank=64 --lora_alpha=32 --lora_targets=q_proj,k_proj,v_proj,o_proj,up_proj,down_proj --max_epochs=2
    --learning_rate=1e-5 to 1e-3; best LoRA 2e-4, full 1e-5

The paper's values (its tables S7, S8; base GSM8K .145, forgetting .671):
    epochs            1     2     4     8     16
    GSM8K  full       .604  .641  .642  .619  .599
           r=256      .557  .607  .625  .634  .594
           r=64       .527  .588  .624  .624  .595
           r=16       .447  .528  .580  .578  .569
    forget full       .598  .599  .590  .572  .559
           r=256      .613  .607  .599  .584  .567
           r=64       .617  .609  .608  .586  .568
           r=16       .628  .617  .616  .616  .596
"""

include('ift.py')            # what the instruction finetunings share; a line below it wins
data = data or 'data/metamathqa'
data_rows = data_rows or 172_000    # for --dry_run before the data are there: an estimate, 2.3 examples a row
seq_len = 1024
global_batch = 768
microbatch = 24

# what follows from other knobs: change those above this line
learning_rate = 1e-5 if not lora_rank else 5e-5 if lora_rank >= 256 else 1e-4  # r=256 is unstable at 1e-4
max_epochs = max_epochs or (0.0 if max_steps or max_tokens else 4.0)
out_dir = out_dir or f'out/{_run_name()}'
