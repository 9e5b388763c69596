"""The KV cache: keys and values of running sequences, so that a new token is computed alone.

    k and v: [layers, rows, KV heads, length, hd], one row for each sequence that runs

        position    0   1   2   3   4   5   6
        row 0       k   k   k   k   +   .   .      lengths[0] = 4       k: stored
        row 1       k   +   .   .   .   .   .      lengths[1] = 1       +: this step's token
        row 2       k   k   k   k   k   k   +      lengths[2] = 6       .: not used, masked

A step is open_step, then in each layer attend (Attention in model.py calls it), then close_step.
"""
import math

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values [layers, rows, KV, length, hd] of sequences, and how long each one is."""

    def __init__(self, config, rows, length, device, dtype):
        layers = config.num_hidden_layers
        heads = config.num_key_value_heads
        shape = (layers, rows, heads, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * rows
        # until open_step whole prompts are stored, then one token a row
        self.decoding = False

    # ------------------------------------------------------------------------- whole sequences
    def prefill(self, layer, k, v):
        """Store whole prompts: k and v [rows, T, KV, hd]."""
        T = k.shape[1]
        self.k[layer, :, :, :T] = k.transpose(1, 2)
        self.v[layer, :, :, :T] = v.transpose(1, 2)

    def row(self, row):
        """Keys and values of one sequence, [layers, KV, its length, hd] each."""
        n = self.lengths[row]
        return self.k[:, row, :, :n], self.v[:, row, :, :n]

    def put(self, row, k, v):
        """Let `row` continue what k and v [layers, KV, n, hd] hold."""
        n = k.shape[2]
        self.k[:, row, :, :n] = k
        self.v[:, row, :, :n] = v
        self.lengths[row] = n

    # ------------------------------------------------------------------------- one token a row
    def open_step(self, rows):
        """Before a step of the first `rows` rows: where each one writes and what it may see."""
        self.decoding = True
        device = self.k.device
        heads, length = self.k.shape[2:4]
        self.write_at = torch.tensor(self.lengths[:rows], device=device)
        longest = max(self.lengths[:rows]) + 1

        # a layer's cache as [rows * KV * length, hd], and the slot of each new key in it
        self.k_places = self.k.flatten(1, 3).unbind()
        self.v_places = self.v.flatten(1, 3).unbind()
        first = torch.arange(rows * heads, device=device) * length  # of a row's key head
        self.slots = first + self.write_at.repeat_interleave(heads)

        # what attention reads of a layer, [rows * KV, longest, hd]
        k = self.k[:, :rows, :, :longest]
        v = self.v[:, :rows, :, :longest]
        self.k_held = k.flatten(1, 2).unbind()
        self.v_held = v.flatten(1, 2).unbind()

        # added to its scores: -inf where a row has no key yet
        seen = torch.arange(longest, device=device) <= self.write_at[:, None]
        bias = torch.zeros(seen.shape, device=device, dtype=self.k.dtype)
        bias.masked_fill_(~seen, -math.inf)
        self.bias = bias.repeat_interleave(heads, 0)[:, None]

    def attend(self, layer, q, k, v):
        """Store one token of each row, attend to all up to it; q [rows, 1, H, hd] -> same shape."""
        self.k_places[layer].index_copy_(0, self.slots, k.flatten(0, 2))
        self.v_places[layer].index_copy_(0, self.slots, v.flatten(0, 2))
        k = self.k_held[layer]
        v = self.v_held[layer]
        # query heads that share a key head stand where a longer sequence's queries would stand
        grouped = q.reshape(k.shape[0], -1, q.shape[-1])
        if q.device.type != "cpu":
            # the fused kernels want four dimensions
            out = F.scaled_dot_product_attention(grouped[None], k[None], v[None],
                                                 attn_mask=self.bias[None])
            return out.view(q.shape)
        # for one query plain products take half of the fused kernel's time, and half of that again
        # with the keys on the left
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(self.bias.mT, k, grouped.mT, alpha=scale)
        probs = scores.mT.softmax(-1)
        return torch.bmm(probs, v).view(q.shape)

    def close_step(self):
        """After a decoding step: each of its rows is one token longer."""
        for row in range(len(self.write_at)):
            self.lengths[row] += 1
