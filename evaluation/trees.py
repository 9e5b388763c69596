r"""Likelihoods of the ends of many sequences, where a beginning that they share is computed once.

    sequences (scored: after |)          their tree, without last tokens, which predict nothing
      the cat sat on | a mat             0:the - 1:cat - 2:sat - 3:on - 4:a
      the cat sat on | a hat                                \
      the cat sat by | us                                    5:by

    5 + 5 + 4 = 14 input tokens become 6 nodes, and a node sees itself and its ancestors:

             the cat sat on  a  by
      3 on    x   x   x   x             predicts "a", for both sequences: one row of logits
      4 a     x   x   x   x  x          predicts "mat" and "hat": one row of logits
      5 by    x   x   x         x       predicts "us"

A pass takes a batch of trees as a flat list of nodes; only its attention is padded, a row a tree.
The choices of a question share its text, the questions after the same shots share the shots.
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

LOGITS = 2 ** 24         # numbers that one softmax over the vocabulary makes


# ----------------------------------------------------------------------------- trees
class Tree(NamedTuple):
    """Sequences with each distinct beginning once: node i has tokens[i] and follows parents[i]."""
    tokens: list
    parents: list        # -1: first of a sequence
    paths: list          # of each sequence, its nodes in order


def make_tree(sequences, nodes=None):
    """The Tree of some lists of ids. nodes: {(parent, token): node} of a tree to add them to."""
    if nodes is None:
        nodes = {}
    paths = []
    for ids in sequences:
        path = []
        node = -1
        for token in ids:
            node = nodes.setdefault((node, token), len(nodes))
            path.append(node)
        paths.append(path)
    # a dict keeps its order, so that node i is its i-th key
    tokens = [token for _, token in nodes]
    parents = [parent for parent, _ in nodes]
    return Tree(tokens, parents, paths)


def inputs_of(sequences):
    """The ids that go into the model: the last one is only predicted."""
    return [ids[:-1] for ids, _ in sequences]


# ----------------------------------------------------------------------------- batches
@dataclass
class Bundle:
    """Questions that share one tree."""
    members: list        # (id, sequences) of each
    size: int            # nodes of the tree


def bundle(questions, batch_tokens):
    """The Bundles of (id, sequences): a question joins the last one's tree if that spares a third
    of its own nodes, up to batch_tokens nodes."""
    bundles = []
    nodes = {}
    for i, sequences in questions:
        inputs = inputs_of(sequences)
        alone = len(make_tree(inputs).tokens)
        before = len(nodes)
        make_tree(inputs, nodes)
        added = len(nodes) - before
        spared = alone - added
        if not bundles or 3 * spared < alone or len(nodes) > batch_tokens:
            # it begins a tree of its own
            nodes = {}
            make_tree(inputs, nodes)
            bundles.append(Bundle([], 0))
        bundles[-1].members.append((i, sequences))
        bundles[-1].size = len(nodes)
    return bundles


def batches(bundles, batch_tokens):
    """Yield lists of bundles, of about batch_tokens nodes with their padding, for one pass each.

    The largest come first: if the memory does not suffice, it fails at once."""
    waiting = sorted(bundles, key=lambda waits: waits.size)
    while waiting:
        width = waiting[-1].size
        batch = [waiting.pop()]
        while waiting and (len(batch) + 1) * width <= batch_tokens:
            batch.append(waiting.pop())
        yield batch


# ----------------------------------------------------------------------------- attention
class TreeAttention:
    """What the model takes for a cache of keys: each node is a sequence of one token to it, and
    attends to its ancestors. A tree is a row of one masked attention, padded to the widest."""
    decoding = True

    def __init__(self, trees, device):
        width = max(len(tree.tokens) for tree in trees)
        # seen[row, node, other]: whether a node sees another; padding sees itself too, so that no
        # softmax is empty
        seen = np.zeros((len(trees), width, width), bool)
        itself = range(width)
        seen[:, itself, itself] = True
        depth = []
        place = []
        for row, tree in enumerate(trees):
            # a parent comes before its children, so that all that it sees is known
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    seen[row, node] |= seen[row, parent]
            count = len(tree.tokens)
            ancestors = seen[row, :count].sum(1) - 1
            depth.append(ancestors)
            place.append(row * width + np.arange(count))
        depth = np.concatenate(depth)
        place = np.concatenate(place)
        self.seen = torch.from_numpy(seen)[:, None].to(device)
        self.depth = torch.from_numpy(depth).to(device)  # position of each node in its sequence
        self.place = torch.from_numpy(place).to(device)  # and among the padded ones

    def attend(self, layer, q, k, v):
        """q [nodes, 1, H, hd], k and v [nodes, 1, KV, hd] -> as q."""
        if q.is_cuda:  # the kernels that take a mask there want a key for each query
            groups = q.shape[2] // k.shape[2]
            k = k.repeat_interleave(groups, 2)
            v = v.repeat_interleave(groups, 2)
        share_keys = k.shape[2] < q.shape[2]
        q = self.pad(q)
        k = self.pad(k)
        v = self.pad(v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen, enable_gqa=share_keys)
        out = out.transpose(1, 2).flatten(0, 1)
        return out[self.place][:, None]

    def pad(self, x):
        """[nodes, 1, heads, hd] -> [trees, heads, width, hd], zeros where there is no node."""
        trees, _, width, _ = self.seen.shape
        padded = x.new_zeros(trees * width, *x.shape[2:])
        padded.index_copy_(0, self.place, x[:, 0])
        return padded.view(trees, width, *x.shape[2:]).transpose(1, 2)


# ----------------------------------------------------------------------------- scores
@torch.inference_mode()
def score_sequences(llama, groups):
    """Log-probabilities of the ends of sequences, in one pass.

    groups: lists of (ids, how many at their end are scored); each group is one tree. Returns the
    same lists, of lists of floats: the fp32 (or better) log-softmax of the model's logits."""
    trees = [make_tree(inputs_of(group)) for group in groups]

    # the hidden states of all nodes [nodes, D]
    attention = TreeAttention(trees, llama.device)
    tokens = [token for tree in trees for token in tree.tokens]
    tokens = torch.tensor(tokens, device=llama.device)[:, None]
    hidden = llama.hidden(tokens, cache=attention, start=attention.depth)
    hidden = hidden[:, 0]

    # the scored tokens, and the node before each
    nodes = []
    targets = []
    start = 0            # of the tree's nodes among all
    for tree, group in zip(trees, groups):
        for path, (ids, scored) in zip(tree.paths, group):
            nodes += [start + node for node in path[-scored:]]
            targets += ids[-scored:]
        start += len(tree.tokens)
    nodes = torch.tensor(nodes)
    targets = torch.tensor(targets)
    values = log_probabilities(llama, hidden, nodes, targets)

    # back to groups and sequences
    values = iter(values.tolist())
    result = []
    for group in groups:
        of_group = []
        for _, scored in group:
            of_group.append([next(values) for _ in range(scored)])
        result.append(of_group)
    return result


def log_probabilities(llama, hidden, nodes, targets):
    """log p(targets[j] | hidden[nodes[j]]) [n] in float64.

    Choices that differ in one token share a node: its logits are made once, and some nodes' at a
    time, so that no more than LOGITS of them exist."""
    nodes, which = nodes.unique(return_inverse=True)
    values = torch.empty(len(targets), dtype=torch.float64)
    step = max(1, LOGITS // llama.config.vocab_size)
    for first in range(0, len(nodes), step):
        some = nodes[first:first + step].to(llama.device)
        logits = llama.head(hidden[some])
        precise = torch.promote_types(logits.dtype, torch.float32)
        logp = torch.log_softmax(logits, -1, dtype=precise)
        # those of the targets that follow one of these nodes
        is_here = (which >= first) & (which < first + step)
        here = is_here.nonzero()[:, 0]
        rows = which[here] - first
        values[here] = logp[rows, targets[here]].double().cpu()
    return values
