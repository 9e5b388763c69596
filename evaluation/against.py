"""A tuned model beside its base: how far its predictions have moved, and the models between them.

    KL(base || tuned) of a position = sum over the vocabulary of p0 log(p0 / p), in nats

        p0   ########  ####   ##   #       what the base says comes next
        p    ####  ##########  #   #       what the tuned model says

    W(t) = W0 + t (W - W0)       t = 0: the base    .5: half way back    1: the tuned model
"""
import torch

from llama.functions import ChunkedCrossEntropy
from model import IGNORE, Llama, LlamaConfig
from training.checkpoint import read_state


# ----------------------------------------------------------------------------- divergence
@torch.inference_mode()
def kl_of_row(tuned, base, tokens, targets, docs=None):
    """(KL(base || tuned), KL(tuned || base)), each summed over the predicted positions, in nats.

    tokens, targets, docs as Llama.forward takes them. Exact over the vocabulary. The first is the
    "forward KL" of Shenfeld et al. 2025 (arXiv 2509.04259), which predicts forgetting when the
    tokens are those of the new task. Raises ValueError for other vocabularies."""
    if tuned.config.vocab_size != base.config.vocab_size:
        raise ValueError(f"against: the base's vocabulary has {base.config.vocab_size} ids, the "
                         f"model's {tuned.config.vocab_size}")
    # last hidden states where something is predicted
    predicted = (targets.flatten() != IGNORE).nonzero().squeeze(1)
    hidden = []
    for model in (tuned, base):
        hidden.append(model.hidden(tokens, docs).flatten(0, 1)[predicted])

    # a chunk of positions at a time: its logits and log-probabilities of both are four [n, V]
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    vocab = tuned.config.vocab_size
    rows = max(1, ChunkedCrossEntropy.chunk_bytes // (4 * vocab * dtype.itemsize))
    forward = torch.zeros((), device=tokens.device, dtype=torch.float64)
    backward = torch.zeros_like(forward)
    for h, h0 in zip(hidden[0].split(rows), hidden[1].split(rows)):
        logp = torch.log_softmax(tuned.head(h), -1, dtype=dtype)
        logp0 = torch.log_softmax(base.head(h0), -1, dtype=dtype)
        difference = logp0 - logp
        forward += (logp0.exp() * difference).sum(-1).double().sum()
        backward -= (logp.exp() * difference).sum(-1).double().sum()
    return forward.item(), backward.item()


# ----------------------------------------------------------------------------- interpolation
def base_of_full_run(folder):
    """The base of a model folder that train.py wrote in full finetuning.

    Raises ValueError when it names none, or began with random weights."""
    config = read_state(folder).get("config", {})
    if not config.get("base") or config.get("scratch"):
        raise ValueError(f"t: {folder} is no checkpoint of a run that finetuned a base, so there "
                         "is no W0 to go back to")
    return config["base"]


@torch.no_grad()
def interpolate(tuned, base, t):
    """Make W of a Llama W0 + t (W - W0), in place; base: the model folder of W0.

    Raises ValueError for t below 0, and for a base of other shapes."""
    if not 0 <= t < float("inf"):
        raise ValueError(f"t must be at least 0 (the base), found {t}")
    if LlamaConfig.from_json(base) != tuned.config:
        raise ValueError(f"t: {base} has another config.json than the model")
    before = Llama.from_pretrained(base, tuned.embed_tokens.weight.dtype, tuned.device)
    for p, p0 in zip(tuned.parameters(), before.parameters(), strict=True):
        p.copy_(p0 + t * (p - p0))
