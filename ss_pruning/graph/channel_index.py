"""Numbers for every (layer side, channel), and what connects them."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.connectivity import Connectivity

Side = Literal["in", "out", "through", "tensor"]
Key = tuple[str, Side]


class Slots:
    """Numbers every (layer side, channel): side `key` has the numbers `start[key] ... start[key] + widths[key]`."""

    def __init__(self, connectivity: Connectivity) -> None:
        self.widths: dict[Key, int] = {}
        self.out_key: dict[str, Key] = {}
        for path, layer in connectivity.layers.items():
            if layer.kind in ("norm", "response", "positional"):
                self.widths[path, "through"] = layer.outputs
                self.out_key[path] = (path, "through")
            else:
                self.widths[path, "in"], self.widths[path, "out"] = layer.inputs, layer.outputs
                self.out_key[path] = (path, "out")
        for name, loose in connectivity.loose.items():
            self.widths[name, "tensor"] = loose.size
            self.out_key[name] = (name, "tensor")
        self.keys = list(self.widths)
        sizes = np.array([self.widths[key] for key in self.keys], dtype=np.int64)
        starts = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
        self.start: dict[Key, int] = dict(zip(self.keys, starts.tolist(), strict=False))
        self.total = int(starts[-1])
        self.side_of: Ints = np.repeat(np.arange(len(self.keys)), sizes)
        self.channel_of: Ints = np.arange(self.total) - np.repeat(starts[:-1], sizes)

    def in_key(self, path: str) -> Key:
        """The side of a layer on which channels arrive."""
        return (path, "in") if (path, "in") in self.widths else (path, "through")

    def numbers(self, key: Key) -> Ints:
        """The numbers of a side's channels."""
        return np.arange(self.start[key], self.start[key] + self.widths[key])


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
