"""Generation: each prompt is read once, then its samples run in a batch, one token per step.

    prompts  A, B, C with n=2, batch_size=3      queue: A0 A1 B0 B1 C0 C1      (prompt, sample)

    step        1   2   3   4   5   6
    row 0      A0  A0  A0  B1  B1  B1      A0 ended after 3 tokens: its place goes to B1
    row 1      A1  A1  A1  A1  A1  C0      C is read after step 5, when its first sample starts
    row 2      B0  B0  B0  B0  B0  B0

Earlier tokens are not computed again: their keys and values are in the cache (llama/kv_cache.py).
Functions take the model as an argument: this file lies below model.py.
"""
import contextlib
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

from llama.kv_cache import KVCache
from llama.products import can_pack

READ_AT_ONCE = 2048    # tokens of prompts in one forward pass, unless one prompt is longer
PACKED_TOKENS = 8      # for fewer new tokens packed weights take longer to pack than they save


class NotFinite(ValueError):
    """The logits behind some tokens of a prompt are not finite."""

    def __init__(self, prompt, position):
        super().__init__(f"the logits for new token {position} of prompt {prompt} are not finite")
        self.prompt = prompt
        self.position = position


# ----------------------------------------------------------------------------- drawing a token
def sample_ids(logits, temperature, top_p, uniform):
    """One id a row of logits [B, V], greedy at temperature 0; -1 where they are not finite.

    uniform [B, 2]: see draw_from."""
    if temperature == 0:
        best = logits.max(-1)  # argmax takes twice as long for bf16 on a CPU
        return best.indices.where(best.values.isfinite(), -1)
    # one NaN or +inf makes every probability of its row NaN
    probs = torch.softmax(logits.float() / temperature, -1)
    return draw_from(probs, top_p, uniform).where(probs[:, 0].isfinite(), -1)


def draw_from(probs, top_p, uniform):
    """One id a row in proportion to probs [B, V], by uniform [B, 2] fp64 in [0, 1) -> [B].

    top_p keeps the smallest set of likeliest tokens whose share reaches it, and with the last of
    them all that are as likely. An id drawn from all tokens stands if it is in that set, which
    takes no sorting; else it is drawn anew from the set. So each kept token, whose share of the set
    is s, gets P(kept) s + P(not kept) s = s."""
    ids = draw_from_all(probs, uniform[:, 0])
    if top_p >= 1:
        return ids

    # the share of what is likelier than the drawn ones; a mask of floats is faster than booleans
    drawn = probs.gather(1, ids[:, None])
    likelier = torch.gt(probs, drawn, out=torch.empty_like(probs))
    outside = sums_of_groups(likelier.mul_(probs)).sum(-1) >= top_p
    rows = outside.nonzero()[:, 0]

    # sorting a whole vocabulary is slow and hardly ever needed
    vocab = probs.shape[1]
    for count in (256, 8192, vocab):
        if not len(rows):
            break
        likeliest, order = probs[rows].topk(min(count, vocab), -1)
        share = likeliest.double().cumsum(-1)
        last = (share < top_p).sum(-1, keepdim=True).clamp(max=likeliest.shape[1] - 1)
        least = likeliest.gather(1, last)
        kept = likeliest.where(likeliest >= least, 0)
        # all that are kept are among these if one of these is not
        enough = (likeliest[:, -1:] < least)[:, 0] | (count >= vocab)
        ready = rows[enough]
        column, _ = pick(kept[enough], uniform[ready, 1])
        ids[ready] = order[enough].gather(1, column[:, None])[:, 0]
        rows = rows[~enough]
    return ids


GROUP = 256  # tokens whose probabilities are added up before one of them is looked for


def draw_from_all(probs, uniform):
    """An id [B] in proportion to probs [B, V]: first a group of tokens, then one of its tokens."""
    sums = sums_of_groups(probs)
    group, uniform = pick(sums, uniform)
    # a last group may be shorter
    column = group[:, None] * GROUP + torch.arange(GROUP, device=probs.device)
    exists = column < probs.shape[1]
    members = probs.gather(1, column.where(exists, 0)).where(exists, 0)
    member, _ = pick(members, uniform)
    ids = group * GROUP + member
    return ids.clamp(max=probs.shape[1] - 1)  # a row of NaN ends up anywhere


def sums_of_groups(probs):
    """Sums [B, groups] in fp64 of each GROUP neighbours in probs [B, V]."""
    whole = probs.shape[1] // GROUP * GROUP
    sums = probs[:, :whole].unflatten(1, (-1, GROUP)).sum(-1)
    if whole < probs.shape[1]:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], 1)
    return sums.double()


def pick(weights, uniform):
    """A column [B] in proportion to weights [B, n], by uniform [B] (the inverse of their CDF).

    Also returns where in the column's interval it fell [B], which is uniform in [0, 1] as well."""
    weights = weights.double()
    ends = weights.cumsum(-1)
    total = ends[:, -1:].contiguous()
    point = uniform[:, None] * total
    # not beyond the last column that has a weight, where `point` is rounded up to the total;
    # of NaN nothing is found
    last = torch.searchsorted(ends, total).clamp(max=weights.shape[1] - 1)
    column = torch.searchsorted(ends, point, right=True).minimum(last)
    before = ends.gather(1, column) - weights.gather(1, column)
    inside = (point - before) / weights.gather(1, column)
    return column[:, 0], inside[:, 0].clamp(0, 1)


# ----------------------------------------------------------------------------- rows
@dataclass
class Row:
    """A running continuation."""
    prompt: int
    sample: int
    noise: np.ndarray  # uniform numbers, two for each token it may have
    ids: list          # its new ids
    ended: bool = False


def generate(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None, seed=0,
             batch_size=64, vocab_size=None):
    """n continuations of each prompt: list (prompts) of lists (n) of lists of new ids.

    For the arguments see generate_tokens."""
    out = [None] * len(prompts)
    complete = generate_each(model, prompts, max_new_tokens, temperature, top_p,
                             n, stop, seed, batch_size, vocab_size)
    for prompt, rows in complete:
        out[prompt] = rows
    return out


def generate_each(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None,
                  seed=0, batch_size=64, vocab_size=None):
    """Yield (index of a prompt, its n lists of new ids) as soon as the n are complete."""
    rows = []
    for _ in prompts:
        rows.append([[] for _ in range(n)])
    running = [n] * len(prompts)
    tokens = generate_tokens(model, prompts, max_new_tokens, temperature, top_p,
                             n, stop, seed, batch_size, vocab_size)
    for prompt, sample, token, ended in tokens:
        rows[prompt][sample].append(token)
        if ended:
            running[prompt] -= 1
        if running[prompt] == 0:
            yield prompt, rows[prompt]

    # no token comes for a prompt that may have none
    for prompt, most in enumerate(one_each(max_new_tokens, prompts)):
        if most == 0:
            yield prompt, rows[prompt]


@torch.inference_mode()
def generate_tokens(model, prompts, max_new_tokens, temperature=0.0, top_p=1.0, n=1, stop=None,
                    seed=0, batch_size=64, vocab_size=None):
    """Yield (prompt, sample, new id, whether the row ends with it), n samples of each prompt.

    temperature 0 is greedy; top_p keeps the likeliest tokens up to that share. stop is a collection
    of ids, or a function of a row's new ids that says whether it ends there; the id that ends a row
    is part of it. Up to batch_size rows run at once and a finished row leaves its place to the next
    in the queue. A prompt is read once for all its samples. max_new_tokens and seed are one number,
    or one a prompt. Random numbers depend on (seed, prompt, sample, position) alone, so a text
    does not depend on its batch; a prompt with its own seed draws what it would draw alone.
    On a CPU the weights are in memory twice meanwhile (packed_weights).
    vocab_size: only ids below it are drawn, for models with more rows than the tokenizer has ids.
    Raises ValueError for impossible numbers and prompts, and NotFinite for logits that are not."""
    most = one_each(max_new_tokens, prompts)
    keys = random_keys(seed, len(prompts))
    check_numbers(batch_size, temperature, top_p, n, most)
    length = check_prompts(model.config, prompts, most, keys)
    stops = stop if callable(stop) else frozenset(stop or ())

    # samples that wait, the next one last
    queue = []
    for prompt in reversed(range(len(prompts))):
        if most[prompt]:
            queue += [(prompt, sample) for sample in reversed(range(n))]
    places = min(batch_size, len(queue))
    cache = KVCache(model.config, places, length, model.device, model.compute_dtype)
    logits = torch.empty(0, model.config.vocab_size, device=cache.k.device, dtype=cache.k.dtype)
    rows = []  # that run, in the order of the cache
    read = {}  # prompt -> its keys, values and last logits, while it has samples to start

    packs = max(most, default=0) >= PACKED_TOKENS
    with packed_weights(model) if packs else contextlib.nullcontext():
        while rows or queue:
            # samples from the queue take the free places
            free = min(batch_size - len(rows), len(queue))
            admitted = [queue.pop() for _ in range(free)]
            if admitted:
                read = read_for(model, prompts, admitted, queue, read)
                first_logits = start_rows(rows, admitted, read, cache, keys, most)
                logits = torch.cat([logits, first_logits])

            # a token for each row
            noise = np.stack([row.noise[len(row.ids)] for row in rows])
            uniform = torch.from_numpy(noise).to(model.device)
            ids = sample_ids(logits[:, :vocab_size], temperature, top_p, uniform).tolist()
            # a greedy id of NaN looks like any other
            if -1 in ids:
                bad = rows[ids.index(-1)]
                raise NotFinite(bad.prompt, len(bad.ids))
            for row, token in zip(rows, ids):
                row.ids.append(token)
                row.ended = len(row.ids) == most[row.prompt] or stops_at(stops, row.ids)
                yield row.prompt, row.sample, token, row.ended

            # rows that ended leave, the others read their token
            drop_ended(rows, cache)
            logits = logits[:0]
            if rows:
                logits = next_logits(model, cache, [row.ids[-1] for row in rows])


def one_each(value, prompts):
    """A number for all prompts, or a list with one for each -> such a list."""
    return [value] * len(prompts) if isinstance(value, Integral) else value


def random_keys(seed, count):
    """(seed, number) of each prompt's random numbers; a prompt with its own seed is number 0."""
    if isinstance(seed, Integral):
        keys = [(int(seed), prompt) for prompt in range(count)]
    else:
        keys = [(int(own), 0) for own in seed]
    for own, _ in keys:
        if abs(own) >= 2 ** 63:
            raise ValueError(f"seed={own}: expected below 2^63")
    return keys


def check_numbers(batch_size, temperature, top_p, n, most):
    """Raises ValueError for numbers that cannot be; most: max_new_tokens of each prompt."""
    fewest = min(most, default=0)
    for name, value, least in (("batch_size", batch_size, 1), ("temperature", temperature, 0),
                               ("n", n, 1), ("max_new_tokens", fewest, 0)):
        if not value >= least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected from 0 to 1")


def check_prompts(config, prompts, most, keys):
    """Tokens of the longest prompt with its continuation; raises ValueError as generate_tokens."""
    if not len(prompts) == len(most) == len(keys):
        raise ValueError(f"{len(prompts)} prompts, but {len(most)} max_new_tokens "
                         f"and {len(keys)} seeds")
    longest = 0
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} has an id outside the vocabulary of "
                             f"{config.vocab_size:,}")
        longest = max(longest, len(prompt) + most[i])
    if longest > config.max_position_embeddings:
        raise ValueError(f"longest prompt + max_new_tokens = {longest}, more than the model's "
                         f"max_position_embeddings={config.max_position_embeddings}")
    return longest


def start_rows(rows, admitted, read, cache, keys, most):
    """Append a Row for each sample, its prompt in the cache; returns their logits [samples, V]."""
    first_logits = []
    for prompt, sample in admitted:
        k, v, logits = read[prompt]
        cache.put(len(rows), k, v)
        noise = noise_of(*keys[prompt], sample, most[prompt])
        rows.append(Row(prompt, sample, noise, ids=[]))
        first_logits.append(logits)
    return torch.cat(first_logits)


def noise_of(seed, number, sample, count):
    """Uniform numbers in [0, 1), [count, 2], of this sample of prompt `number` alone."""
    # a counter-based generator: each key is a stream of its own
    philox = np.random.Philox(key=[seed, number << 32 | sample])
    return np.random.Generator(philox).random((count, 2))


def stops_at(stops, ids):
    """Whether a row ends with its last id; stops: a function of the row's ids, or a set of ids."""
    if callable(stops):
        return bool(stops(ids))
    return ids[-1] in stops


def drop_ended(rows, cache):
    """Remove the rows that ended; the last row moves into a free place."""
    # from the end, so that the last row has not ended itself
    for i in reversed(range(len(rows))):
        if not rows[i].ended:
            continue
        last = rows.pop()
        if i < len(rows):
            k, v = cache.row(len(rows))
            cache.put(i, k, v)
            rows[i] = last


# ----------------------------------------------------------------------------- the model's part
def next_logits(model, cache, ids):
    """Logits [rows, V] after one more token in each of the cache's first rows."""
    cache.open_step(len(ids))
    tokens = torch.tensor(ids, device=model.device)[:, None]
    hidden = model.hidden(tokens, cache=cache, start=cache.write_at)
    logits = model.head(hidden)[:, 0]
    cache.close_step()
    return logits


def read_for(model, prompts, admitted, queue, read):
    """What read_prompts returns, for the samples admitted now; `read`: that of earlier steps."""
    starting = {prompt for prompt, _ in admitted}
    # a prompt in hand stays while it has samples to start, now or next
    needed = starting | {prompt for prompt, _ in queue[-1:]}
    kept = {prompt: read[prompt] for prompt in read if prompt in needed}
    missing = sorted(starting - kept.keys())
    return kept | read_prompts(model, prompts, missing)


def read_prompts(model, prompts, which):
    """Run prompts through the model, one behind the other without padding.

    -> {prompt: (keys, values [layers, KV, T, hd], logits [1, V] after its last token)}"""
    # as many prompts at once as fit READ_AT_ONCE
    batches = []
    size = 0
    for p in which:
        if not batches or size + len(prompts[p]) > READ_AT_ONCE:
            batches.append([])
            size = 0
        batches[-1].append(p)
        size += len(prompts[p])

    read = {}
    for batch in batches:
        tokens = []
        borders = [0]
        for p in batch:
            tokens += prompts[p]
            borders.append(len(tokens))

        # one row, whose documents are the prompts; the head sees their last tokens alone
        cache = KVCache(model.config, 1, len(tokens), model.device, model.compute_dtype)
        docs = torch.tensor(borders, device=model.device)
        tokens = torch.tensor([tokens], device=model.device)
        hidden = model.hidden(tokens, docs, cache)
        last = hidden[:, docs[1:] - 1]
        logits = model.head(last)[0]
        for i, p in enumerate(batch):
            inside = slice(borders[i], borders[i + 1])
            k = cache.k[:, 0, :, inside]
            v = cache.v[:, 0, :, inside]
            read[p] = k, v, logits[i:i + 1]
    return read


@contextlib.contextmanager
def packed_weights(model):
    """Inside, products on a CPU read the weights in the order that oneDNN computes in.

    Products of 16 rows take half as long by it in fp32, of 100 rows a third less. The copy takes
    the memory of the weights once more; it is dropped at the end, as they may change then."""
    modules = []
    if can_pack(model.device, model.compute_dtype):
        # projections, and the model itself for its head
        modules = [module for module in model.modules() if hasattr(module, "packed")]
    try:
        for module in modules:
            weight = module.head_weight if module is model else module.weight
            weight = weight.to(model.compute_dtype)
            module.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        yield
    finally:
        for module in modules:
            module.packed = None
