"""Which base an adapter or a run belongs to: recognised by its weights, not by its folder.

    model.norm.weight            all ---------------+--> sha256 of the bf16 bytes   base_fingerprint
    model.embed_tokens.weight    the first 64 rows -+--> 320 of them, bf16, in hex -+
    layers.0 q, k, v             the first 64 rows -+                               +-> base_sample
    every tensor                 4 rows ------------+--> 8 of each -----------------+
                                                    +--> sha256 of the bf16 bytes   base_digest

Equal digests mean the same base. A base that was stored in fp16 on the way has another digest,
because it was rounded twice; its sample still lies within one step of bf16. Older adapters know the
fingerprint and the first 320 numbers alone.
"""
import hashlib

import torch

from llama.weights import file_tensors, full_tensor, open_weights

FIRST_NUMBERS = 320     # of a sample: 64 of the norm, 128 of each matrix
ROWS = 4                # of a tensor that are in the digest, evenly spaced
NUMBERS = 8             # of a tensor's rows that are in the sample
BF16_STEP = 2.0 ** -7   # largest distance of neighbours in bf16, as a share of the number
FP16_STEP = 2.0 ** -24  # distance of the smallest numbers in fp16


# ----------------------------------------------------------------------------- of weights
def identity_of(model):
    """{"base_fingerprint", "base_sample", "base_digest"} of a model's weights.

    model.base_identity, if it is there, counts: train.py knows the base's folder, and has sharded
    the weights or changed frozen ones. Without it all ranks must call this under FSDP."""
    if hasattr(model, "base_identity"):
        return model.base_identity
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, parts in file_tensors(model).items():
        full = full_tensor(parameters[name])
        first = 0
        for published, rows in parts:
            tensors[published] = full[first:first + rows]
            first += rows
    return describe(tensors)


def identity_of_files(files):
    """The same of an opened model folder, {tensor name: open file}."""
    return describe({name: file.get_slice(name) for name, file in files.items()})


def identity_of_folder(folder):
    """The same of a model folder; None where there are no weights that could be read."""
    try:
        _, files = open_weights(folder)
        return identity_of_files(files)
    except (OSError, ValueError, KeyError):
        return None


def describe(tensors):
    """The identity of {published name: tensor, or slice of a file}."""
    # the embedding is tied and under the head's name in some folders, and under both in others
    tensors = dict(tensors)
    if "model.embed_tokens.weight" not in tensors:
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"]
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight")
    if head is not None and torch.equal(rows_of(head), rows_of(embedding)):
        del tensors["lm_head.weight"]

    # the beginning of the model
    q, k, v = (tensors[f"model.layers.0.self_attn.{part}.weight"][:64]
               for part in ("q_proj", "k_proj", "v_proj"))
    digest = hashlib.sha256()
    sample = b""
    for w, count in ((tensors["model.norm.weight"][:], 64), (embedding[:64], 128),
                     (torch.cat((q, k, v))[:64], 128)):
        rounded = rounded_numbers(w)
        digest.update(bytes_of(rounded))
        sample += bytes_of(rounded[places(len(rounded), count)])
    fingerprint = digest.hexdigest()

    # and something of all tensors
    for name in sorted(tensors):
        rounded = rounded_numbers(rows_of(tensors[name]))
        digest.update(bytes_of(rounded))
        sample += bytes_of(rounded[places(len(rounded), NUMBERS)])
    return {"base_fingerprint": fingerprint, "base_sample": sample.hex(),
            "base_digest": digest.hexdigest()}


def rows_of(w):
    """ROWS rows of a matrix, or all of a vector, which is a tensor or a slice of a file."""
    shape = w.get_shape() if hasattr(w, "get_shape") else w.shape
    if len(shape) == 1:
        return w[:]
    return torch.cat([w[row:row + 1] for row in places(shape[0], ROWS)])


def rounded_numbers(w):
    return w.detach().to("cpu", torch.bfloat16).flatten()


def places(length, count):
    """`count` indices below length, evenly spaced; some twice where there are fewer."""
    return [i * length // count for i in range(count)]


def bytes_of(tensor):
    return tensor.view(torch.uint8).numpy().tobytes()


# ----------------------------------------------------------------------------- comparing
def is_same_base(one, other):
    """Whether two identities are of the same weights, possibly stored in different dtypes.

    `one` may be an older adapter's; without a sample its fingerprint has to be equal."""
    begins_alike = one.get("base_fingerprint") == other["base_fingerprint"]
    a = read_sample(one)
    b = read_sample(other)
    if "base_digest" not in one:
        return begins_alike or a is not None and is_close(a[:FIRST_NUMBERS], b[:FIRST_NUMBERS])
    if one["base_digest"] == other["base_digest"]:
        return True
    if a is None or len(a) != len(b):
        return False
    # equal beginnings were not rounded twice, so the rest was not either
    return torch.allclose(a, b, rtol=0, atol=FP16_STEP) if begins_alike else is_close(a, b)


def is_close(a, b):
    """Whether samples can be of the same weights, one of them rounded to fp16 on the way.

    Each number must lie within one step of bf16 and seven in eight must be equal: of weights that
    went through fp16 one in sixteen is rounded to the other side."""
    # numbers smaller than fp16 has are no difference
    distance = (a - b).abs()
    within_a_step = distance <= b.abs() * BF16_STEP + FP16_STEP
    differing = (distance > FP16_STEP).sum().item()
    return bool(within_a_step.all()) and differing <= len(a) / 8


def read_sample(identity):
    """The numbers of an identity's sample, fp32; None where it has none or a broken one."""
    try:
        stored = bytearray.fromhex(identity.get("base_sample", ""))
    except (ValueError, TypeError):
        return None
    if len(stored) < 2 * FIRST_NUMBERS or len(stored) % 2:
        return None
    return torch.frombuffer(stored, dtype=torch.bfloat16).float()
