"""
Math CPT: continued pretraining on OpenWebMath, 14.7B tokens repeated to 20B. Learned: GSM8K. LoRA with --lora_rank=256.

    python prepare_data.py config/data/openwebmath.py --tokenizer=models/Llama-2-7b-hf --out_dir=data/openwebmath
     1 GPU   python train.py config/math_cpt.py --lora_rank=256
     8 GPUs  torchrun --nproc_per_node=8 train.py config/math_cpt.py
    32 GPUs  torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=NODE0:29500 train.py config/math_cpt.py

25,431 steps of 786,432 tokens. --dry_run=True --gpus=8 --mfu=0.45 prints hours and memory; on 8 H100 at 45% of
their peak (a prediction, not measured): 67 h and 49 GB a GPU in full, 52 h and 57 GB with r=256, 47 h with r=16.

Shorter durations branch from this run: config/cpt_durations.py, named after this file, says how.

The paper's values (its tables S3, S4; base GSM8K .145, forgetting .671):
    tokens            .25B  .5B   1B    2B    4B    8B    16B   20B
    GSM8K  full       .155  .152  .165  .158  .224  .238  .283  .293
           r=256      .162  .161  .140  .170  .193  .196  .203  .202
           r=64       .163  .167  .150  .166  .164  .168  .179  .163
           r=16       .162  .157  .161  .155  .165  .156  .152  .158
    forget full       .634  .634  .640  .630  .629  .619  .613  .618
           r=256      .638  .638  .637  .634  .633  .620  .620  .616
           r=64       .640  .640  .638  .637  .643  .634  .634  .627
           r=16       .640  .641  .646  .641  .643  .641  .636  .637
"""

include('cpt.py')            # what both continued pretrainings share; a line below it wins
data = data or 'data/openwebmath'
weight_decay = 0.0

# what follows from other knobs: change those above this line
learning_rate = 4e-5 if lora_rank else 1e-5
max_tokens = max_tokens or (0.0 if max_steps or max_epochs else 20e9)
out_dir = out_dir or f'out/{_run_name()}'
