# %% [markdown]
# # 2 · A forward pass by hand
#
# A Llama is a loop over blocks. Each block adds two things to a stream of vectors, one vector a
# token: what attention brings from earlier tokens, and what the MLP makes of the token itself.
#
#     x = embedding of each token
#     each block:   x = x + attention(norm(x))       looks back
#                   x = x + mlp(norm(x))             looks at one token
#     logits = norm(x) times the head's weight
#
# You write it with plain tensor operations, compare with `model.py`, and count what it costs.

# %% The knobs: change them here, or say --seq_len=32768 on the command line
import torch
import torch.nn.functional as F
from start import BASE, read_knobs, show, plt

from lora import apply_lora
from model import Llama
from text.tokenizer import load_tokenizer
from training.plan import flops_of_batch, shape_of
from training.rows import PlannedRows

text = 'Once upon a time, there was a little'
shape = 'Llama-2-7b-hf'  # whose FLOPs are counted: a name in training/plan.py, or a model folder
seq_len = 4096           # tokens a row
lora_rank = 16
out_dir = 'out/lessons'
read_knobs(globals())

# %% [markdown]
# ## The pieces
# The norm divides a vector by its root mean square. The rotary embedding turns pairs of numbers of
# queries and keys by an angle that grows with the position, so that a score depends on how far two
# tokens are apart. Several query heads share one key head: here 8 share 4.

# %%
model = Llama.from_pretrained(BASE, dtype=torch.float64)
c = model.config
tok = load_tokenizer(BASE)
ids = torch.tensor(tok.encode(text, bos=True))
T = len(ids)

pairs = torch.arange(0, c.head_dim, 2, dtype=torch.float64)
angles = torch.arange(T)[:, None] * c.rope_theta ** (-pairs / c.head_dim)  # [T, head_dim / 2]


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()


def rotate(heads):
    """[heads, T, head_dim]: number i is paired with number i + head_dim / 2."""
    pair = torch.complex(*heads.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pair.real, pair.imag), -1)


def attention(x, part):
    # rows of the stacked weight: queries, keys, values
    heads = (part.qkv_proj.weight @ x.T).unflatten(0, (-1, c.head_dim)).mT
    q, k, v = heads.split((part.heads, part.kv_heads, part.kv_heads))
    # a key head for each query head
    sharing = part.heads // part.kv_heads
    k = rotate(k).repeat_interleave(sharing, 0)
    v = v.repeat_interleave(sharing, 0)
    # each token's mixture of the values up to its own
    scores = rotate(q) @ k.mT / c.head_dim ** 0.5
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return mixed.transpose(0, 1).flatten(1) @ part.o_proj.weight.T


def mlp(x, part):
    gate, up = (x @ part.gate_up_proj.weight.T).chunk(2, -1)
    return (F.silu(gate) * up) @ part.down_proj.weight.T


# %% [markdown]
# ## The loop
# In float64 the two agree to twelve digits, so the model is what the pieces say and nothing else.

# %%
with torch.no_grad():
    x = model.embed_tokens.weight[ids]
    for block in model.layers:
        x = x + attention(norm(x, block.input_layernorm.weight), block.self_attn)
        x = x + mlp(norm(x, block.post_attention_layernorm.weight), block.mlp)
    logits = norm(x, model.norm.weight) @ model.head_weight.T
    expected = model(ids[None])[0][0]
error = (logits - expected).abs().max() / expected.abs().max()
new = model.generate([ids.tolist()], max_new_tokens=12)[0][0]
print(f"by hand and by model.py the logits differ by {error:.0e} of the largest")
print(f"{text} ...{tok.decode(ids.tolist() + new)[len(text):]}")
assert error < 1e-12
assert logits[-1].argmax() == new[0]
assert (c.num_attention_heads, c.num_key_value_heads) == (8, 4)

# %% [markdown]
# ## Where the FLOPs go
# A weight costs two FLOPs a token: a product and a sum. Attention also compares each token with
# those before it, on average half the row: a score and a share of the value cost two FLOPs each for
# every number of the heads. That part alone grows with the row.
#
# For Llama-2-7B at 4,096 tokens, the MLP takes 61% of a forward pass, the projections of attention
# 30%, its scores and values 8%, and the head 2%.


# %%
def forward_flops(config, seq_len):
    """{part: FLOPs a token of a forward pass}, the mean over a row of seq_len tokens."""
    sizes = {name: rows * columns for name, (rows, columns) in config.projection_shapes.items()}
    in_mlp = sum(sizes[name] for name in ("gate_proj", "up_proj", "down_proj"))
    in_attention = sum(sizes.values()) - in_mlp
    width = config.num_attention_heads * config.head_dim
    layers = config.num_hidden_layers
    return {"MLP": 2 * layers * in_mlp,
            "attention's projections": 2 * layers * in_attention,
            "scores and values": layers * 2 * 2 * width * seq_len / 2,
            "head": 2 * config.vocab_size * config.hidden_size}


config = shape_of(shape)
parts = forward_flops(config, seq_len)
total = sum(parts.values())
for name, flops in parts.items():
    print(f"{name:24} {flops / 1e9:8.3f} GFLOP a token, {flops / total:4.0%}")
print(f"{'together':24} {total / 1e9:8.3f} GFLOP a token forward")
shares = [round(100 * flops / total) for flops in parts.values()]
if (shape, seq_len) == ("Llama-2-7b-hf", 4096):
    assert shares == [61, 30, 8, 2]

# %% [markdown]
# ## The backward pass
# It takes twice as much as the forward pass: for each product once for the gradient of its input
# and once for that of its weight. `train.py` prints FLOP/s by this count. LoRA needs no gradient of
# the frozen weights, which spares a third, and adds the adapters' own: at rank 16, 70% is left.

# %%
row = PlannedRows(1, seq_len)[0]
with torch.device("meta"):  # shapes without memory
    planned = Llama(config).to(torch.bfloat16)
full_step = flops_of_batch(planned, [row])
lora_step = flops_of_batch(apply_lora(planned, lora_rank, 2 * lora_rank), [row])
print(f"with LoRA, rank {lora_rank}, a step takes {lora_step / full_step:.1%} of the FLOPs")
assert abs(full_step / (3 * total * seq_len) - 1) < 1e-9
if (shape, seq_len, lora_rank) == ("Llama-2-7b-hf", 4096, 16):
    assert 2 / 3 < lora_step / full_step and round(lora_step / full_step, 2) == 0.70

# %% [markdown]
# ## The picture
# As rows grow, scores and values take over. They cost as much as the MLP when a row has three times
# as many tokens as the MLP has inner numbers: 3 x 11,008 = 33,024 for Llama-2-7B.

# %%
crossing = 3 * config.intermediate_size
at_crossing = forward_flops(config, crossing)
if shape == "Llama-2-7b-hf":  # where the heads together are as wide as the stream
    assert crossing == 33024 and at_crossing["scores and values"] == at_crossing["MLP"]

figure, ax = plt.subplots(figsize=(6.5, 3.2))
lengths = [2 ** power for power in range(9, 18)]
bands = {name: [] for name in parts}
for length in lengths:
    at_length = forward_flops(config, length)
    for name, flops in at_length.items():
        bands[name].append(100 * flops / sum(at_length.values()))
colours = ("#0072B2", "#56B4E9", "#E69F00", "#999999")
ax.stackplot(lengths, bands.values(), labels=bands, colors=colours)
ax.axvline(seq_len, color="black", ls=":", lw=1)
ax.annotate(f" {seq_len:,} tokens", (seq_len, 102), fontsize=7, annotation_clip=False)
ax.set_xscale("log", base=2)
ax.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
ax.set(xlim=(lengths[0], lengths[-1]), ylim=(0, 100))
ax.set_xlabel("tokens a row")
ax.set_ylabel("share of a forward pass's FLOPs, %")
ax.set_title(f"Where the FLOPs of {shape.rpartition('/')[2]} go", pad=14)
ax.legend(reverse=True, loc="upper left", bbox_to_anchor=(1.01, 1.02))
show(figure, out_dir, "2_forward")

# %% [markdown]
# ## Questions
# Each is answered by changing a knob and reading what the lesson prints.
#
# 1. `seq_len = 33024`: which share do scores and values have? And at 131072?
# 2. `shape = 'Llama-3.1-8B'`: which share does its head have, and why? Then try
#    `shape = 'tests/golden/data/stories260k'` with `seq_len = 512`.
# 3. `lora_rank`: at which rank does a step of LoRA cost as much as full finetuning?
