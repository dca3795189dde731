"""Numbers for every (layer side, channel), and what connects them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.connectivity import INPUT, Connectivity, Heads

Side = Literal["in", "out", "through", "tensor"]
Key = tuple[str, Side]


class Slots:
    """Numbers every (layer side, channel): side `key` has `numbers[key]`, from `start[key]` on.

    Channels arrive at a layer on its side `in_key`, and leave it on `out_key`.
    """

    def __init__(self, connectivity: Connectivity) -> None:
        self.widths: dict[Key, int] = {}
        self.in_key: dict[str, Key] = {}
        self.out_key: dict[str, Key] = {}
        for path, layer in connectivity.layers.items():
            if layer.kind in ("norm", "response", "positional"):
                self.widths[path, "through"] = layer.outputs
                self.in_key[path] = self.out_key[path] = (path, "through")
            else:
                self.widths[path, "in"], self.widths[path, "out"] = layer.inputs, layer.outputs
                self.in_key[path], self.out_key[path] = (path, "in"), (path, "out")
        for name, loose in connectivity.loose.items():
            self.widths[name, "tensor"] = loose.size
            self.out_key[name] = (name, "tensor")
        self.keys = list(self.widths)
        sizes = np.array([self.widths[key] for key in self.keys], dtype=np.int64)
        starts = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
        self.start: dict[Key, int] = dict(zip(self.keys, starts.tolist(), strict=False))
        self.total = int(starts[-1])
        self.numbers = dict(zip(self.keys, np.split(np.arange(self.total), starts[1:-1]), strict=False))
        self.side_of: Ints = np.repeat(np.arange(len(self.keys)), sizes)
        self.channel_of: Ints = np.arange(self.total) - np.repeat(starts[:-1], sizes)


def ties_of(connectivity: Connectivity, slots: Slots) -> Ints:
    """`[n, 2]`: slots that must be cut together."""
    ties: list[Ints] = [np.empty((0, 2), dtype=np.int64)]
    for path, edges in connectivity.edges.items():
        into = slots.start[slots.in_key[path]]
        for edge in edges:
            if edge.source == INPUT:
                continue
            pairs = edge.pairs.numpy()
            source = slots.start[slots.out_key[edge.source]]
            ties.append(np.stack([pairs[:, 0] + source, pairs[:, 1] + into], 1))
            if edge.heads is not None:
                ties += _head_ties(edge.heads, source, into)
    for path, layer in connectivity.layers.items():
        if layer.kind == "depthwise":
            out = slots.numbers[(path, "out")]
            multiplier = layer.outputs // layer.inputs
            ties.append(np.stack([slots.start[path, "in"] + np.arange(len(out)) // multiplier, out], 1))
    return np.concatenate(ties)


def _head_ties(heads: Heads, source: int, into: int) -> tuple[Ints, Ints]:
    """A head is one channel set: its channels at the consumer, and all that feeds them at once."""
    channels, pairs = heads.channels.numpy() + into, heads.pairs.numpy()
    within = np.stack([channels.ravel(), channels[:, 0].repeat(channels.shape[1])], 1)
    return within, np.stack([pairs[:, 0] + source, channels[pairs[:, 1], 0]], 1)


def components(total: int, ties: Ints) -> Ints:
    """Connected components by hooking to the smaller label and pointer jumping, as `[total]` labels."""
    label = np.arange(total)
    a, b = ties[:, 0], ties[:, 1]
    while True:
        before = label.copy()
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(before, label):
            return label
