"""
For paper/study.py: the paper's own adapters and models (LoRA-TMLR-2024 on the hub) on HumanEval, GSM8K and forgetting.

    python -m paper.study config/published.py --only=base,metamath-r16
    python -m paper.study config/published.py --launch='torchrun --nproc_per_node=8'

meta-llama/Llama-2-7b-hf is gated: accept its licence there and set HF_TOKEN. 13.5 GB of base, 27 GB for each model that
was finetuned in full, up to 2.6 GB for an adapter. HumanEval runs programs that a model wrote; evaluation/sandbox.py says how.
Values are the paper's tables S1 to S8. Of the IFT sets the paper does not say how many epochs the main branch holds (others
are branches, NAME@BRANCH), so the values of 1 and of 16 epochs stand there, and the best one between.
"""
_hub = 'hf://LoRA-TMLR-2024/'
out_dir = 'out/published'
base = 'hf://meta-llama/Llama-2-7b-hf'
models = (
    'base',
    f'magicoder-r16 {_hub}magicoder-lora-rank-16-alpha-32',
    f'magicoder-r64 {_hub}magicoder-lora-rank-64-alpha-128',
    f'magicoder-r256 {_hub}magicoder-lora-rank-256-alpha-512',
    f'magicoder-full {_hub}magicoder-full-finetuning-lr-5e-05',
    f'metamath-r16 {_hub}metamath-lora-rank-16-alpha-32',
    f'metamath-r64 {_hub}metamath-lora-rank-64-alpha-128',
    f'metamath-r256 {_hub}metamath-lora-rank-256-alpha-512',
    f'metamath-full {_hub}metamath-full-finetuning-lr-1e-05',
    f'starcoder-r16 {_hub}starcoder-lora-rank-16-20B-tokens',
    f'starcoder-r64 {_hub}starcoder-lora-rank-64-20B-tokens',
    f'starcoder-r256 {_hub}starcoder-lora-rank-256-20B-tokens',
    f'starcoder-full {_hub}starcoder-full-finetuning-lr-1e-05-20B-tokens',
    f'openwebmath-r16 {_hub}openwebmath-lora-rank-16-20B-tokens',
    f'openwebmath-r64 {_hub}openwebmath-lora-rank-64-20B-tokens',
    f'openwebmath-r256 {_hub}openwebmath-lora-rank-256-20B-tokens',
    f'openwebmath-full {_hub}openwebmath-full-finetuning-lr-1e-05-20B-tokens',
)
evals = ('eval_gsm8k.py', 'eval_humaneval.py --allow_code_execution=True', 'eval_forgetting.py')
spectrum = 'none'
plot = 'none'
expected = (
    'base humaneval_pass@1=.138 gsm8k_strict_match=.145 forgetting=.671',
    'magicoder-r16 humaneval_pass@1=.197,.358,.324 forgetting=.653,.652,.609',
    'magicoder-r64 humaneval_pass@1=.249,.417,.405 forgetting=.652,.632,.510',
    'magicoder-r256 humaneval_pass@1=.299,.498,.466 forgetting=.655,.631,.517',
    'magicoder-full humaneval_pass@1=.302,.497,.416 forgetting=.595,.446,.414',
    'metamath-r16 gsm8k_strict_match=.447,.580,.569 forgetting=.628,.616,.596',
    'metamath-r64 gsm8k_strict_match=.527,.624,.595 forgetting=.617,.608,.568',
    'metamath-r256 gsm8k_strict_match=.557,.634,.594 forgetting=.613,.584,.567',
    'metamath-full gsm8k_strict_match=.604,.642,.599 forgetting=.598,.590,.559',
    'starcoder-r16 humaneval_pass@1=.162 forgetting=.635',
    'starcoder-r64 humaneval_pass@1=.196 forgetting=.626',
    'starcoder-r256 humaneval_pass@1=.224 forgetting=.617',
    'starcoder-full humaneval_pass@1=.263 forgetting=.545',
    'openwebmath-r16 gsm8k_strict_match=.158 forgetting=.637',
    'openwebmath-r64 gsm8k_strict_match=.163 forgetting=.627',
    'openwebmath-r256 gsm8k_strict_match=.202 forgetting=.616',
    'openwebmath-full gsm8k_strict_match=.293 forgetting=.618')
