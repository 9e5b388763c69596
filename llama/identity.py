"""Which base an adapter or a run belongs to: recognised by its weights, not by its folder.

    norm.weight            [D]         all of it -+-> sha256 of the bf16 bytes     base_fingerprint
    embed_tokens.weight    [64 rows]  ------------+-> 320 of them, bf16, in hex    base_sample
    layers.0 qkv_proj      [64 rows]  ------------+

Equal fingerprints mean the same base. A base that was stored in fp16 on the way has a different
fingerprint, because it was rounded twice; its sample still lies within one step of bf16.
"""
import hashlib

import torch

from llama.weights import full_tensor, open_weights

NUMBERS = 320           # of a sample: 64 of the norm, 128 of each matrix
BF16_STEP = 2.0 ** -7   # largest distance of neighbours in bf16, as a share of the number
FP16_STEP = 2.0 ** -24  # distance of the smallest numbers in fp16


def known_by(model):
    """The parameters that identify a base."""
    return model.norm.weight, model.embed_tokens.weight, model.layers[0].self_attn.qkv_proj.weight


def identity_of(model, get=full_tensor):
    """{"base_fingerprint", "base_sample"}; under FSDP all ranks must call it.

    model.base_identity, if it is there, counts: then training has changed frozen weights."""
    if hasattr(model, "base_identity"):
        return model.base_identity
    norm, embedding, qkv = known_by(model)
    return describe(get(norm), get(embedding), get(qkv))


def fingerprint(model, get=full_tensor):
    """The sha256 of base_fingerprint alone; under FSDP all ranks must call it."""
    return identity_of(model, get)["base_fingerprint"]


def identity_of_files(files):
    """The same of an opened model folder, {tensor name: open file}."""
    # the embedding is tied and under the head's name in some folders
    norm = files["model.norm.weight"].get_tensor("model.norm.weight")
    embedding = "model.embed_tokens.weight"
    if embedding not in files:
        embedding = "lm_head.weight"

    # q, k and v of the first block, as our model stores them together
    parts = []
    for module in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{module}.weight"
        parts.append(files[name].get_tensor(name))
    return describe(norm, files[embedding].get_slice(embedding), torch.cat(parts))


def identity_of_folder(folder):
    """The same of a model folder; None where there are no weights that could be read."""
    try:
        _, files = open_weights(folder)
        return identity_of_files(files)
    except (OSError, ValueError, KeyError):
        return None


def describe(norm, embedding, qkv):
    """Fingerprint and sample of the last norm and the first 64 rows of two matrices."""
    digest = hashlib.sha256()
    sample = b""
    for w, count in ((norm, 64), (embedding[:64], 128), (qkv[:64], 128)):
        rounded = w.detach().to("cpu", torch.bfloat16).flatten()
        digest.update(bytes_of(rounded))
        # `count` numbers, evenly spaced
        chosen = torch.arange(count) * len(rounded) // count
        sample += bytes_of(rounded[chosen])
    return {"base_fingerprint": digest.hexdigest(), "base_sample": sample.hex()}


def bytes_of(tensor):
    return tensor.view(torch.uint8).numpy().tobytes()


def is_same_base(one, other):
    """Whether two identities are of the same weights, possibly stored in different dtypes.

    Of the samples' numbers each must lie within one step of bf16 and seven in eight must be equal:
    of weights that went through fp16 one in sixteen is rounded to the other side. An identity
    without a sample, of an older adapter, has to be equal."""
    if one.get("base_fingerprint") == other["base_fingerprint"]:
        return True
    a = read_sample(one)
    b = read_sample(other)
    if a is None or b is None:
        return False
    # numbers smaller than fp16 has are no difference
    distance = (a - b).abs()
    is_close = distance <= b.abs() * BF16_STEP + FP16_STEP
    differing = (distance > FP16_STEP).sum().item()
    return bool(is_close.all()) and differing <= NUMBERS / 8


def read_sample(identity):
    """The numbers of an identity's sample, fp32; None where it has none or a broken one."""
    try:
        stored = bytearray.fromhex(identity.get("base_sample", ""))
    except (ValueError, TypeError):
        return None
    if len(stored) != 2 * NUMBERS:
        return None
    return torch.frombuffer(stored, dtype=torch.bfloat16).float()
