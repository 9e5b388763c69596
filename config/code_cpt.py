"""
Code CPT: continued pretraining on 20B tokens of StarCoder Python. Learned: HumanEval. LoRA with --lora_rank=256.

    python prepare_data.py config/data/starcoder_python.py --tokenizer=models/Llama-2-7b-hf --out_dir=data/starcoder_python
     1 GPU   python train.py config/code_cpt.py --lora_rank=256
     8 GPUs  torchrun --nproc_per_node=8 train.py config/code_cpt.py
    32 GPUs  torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 train.py config/code_cpt.py

25,431 steps of 786,432 tokens. --dry_run=True --gpus=8 --mfu=0.45 prints hours and memory; on 8 H100 at 45% of
their peak (a prediction, not measured): 67 h and 49 GB a GPU in full, 52 h and 57 GB with r=256, 47 h with r=16.

Shorter durations branch from this run: config/cpt_durations.py, named after this file, says how.

The paper's values (its tables S1, S2; base HumanEval .138, forgetting .671):
    tokens            .25B  .5B   1B    2B    4B    8B    16B   20B
    HumanEval full    .152  .153  .172  .181  .218  .258  .255  .263
           r=256      .144  .142  .143  .159  .159  .208  .211  .224
           r=64       .142  .146  .141  .153  .157  .176  .194  .196
           r=16       .143  .144  .141  .141  .154  .159  .162  .162
    forget full       .625  .624  .625  .616  .599  .583  .551  .545
           r=256      .644  .645  .643  .639  .636  .630  .618  .617
           r=64       .646  .644  .646  .646  .639  .634  .626  .626
           r=16       .645  .642  .645  .642  .644  .640  .638  .635
"""

include('cpt.py')            # what both continued pretrainings share; a line below it wins
data = data or 'data/starcoder_python'
weight_decay = 1e-6

# what follows from other knobs: change those above this line
learning_rate = 1e-5         # of full finetuning and of LoRA
max_tokens = max_tokens or (0.0 if max_steps or max_epochs else 20e9)
out_dir = out_dir or f'out/{_run_name()}'
