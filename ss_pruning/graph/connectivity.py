"""What the label probe finds: layers, and who feeds whom; and numbers for their channels, with what ties them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ss_pruning._utils.arrays import Ints
from ss_pruning.errors import InputError
from ss_pruning.graph.layers import Kind

#: Stands for the model's input in lists of sources.
INPUT = "<input>"
Side = Literal["in", "out", "through", "tensor"]
Key = tuple[str, Side]


@dataclass(frozen=True)
class Layer:
    """One layer of the channel graph.

    Attributes:
        path: Module path.
        kind: Its role, see `ss_pruning.graph.layers.Kind`.
        inputs: Number of input channels (for a positional layer: of positions).
        outputs: Number of output channels.
        in_axis: Axis of its input tensor that holds the channels.
    """

    path: str
    kind: Kind
    inputs: int
    outputs: int
    in_axis: int


@dataclass(frozen=True)
class Heads:
    """Source channels that feed the channels of one head of a consumer and no other, as queries and keys do.

    Where there is one head alone it cannot go, and its values are channels like others.

    Attributes:
        channels: `[heads, width]`, the consumer's channels by head.
        pairs: `[n, 2]`, source channel and number of the head.
    """

    channels: Tensor
    pairs: Tensor

    @property
    def several(self) -> bool:
        """Whether there are others, so that each can go."""
        return len(self.channels) > 1


@dataclass(frozen=True)
class Edge:
    """What one source hands to one call of one layer.

    Attributes:
        source: Path of the source layer, name of a loose tensor, or `INPUT`.
        call: Which call of the consumer this is (a module may run several times).
        pairs: `[n, 2]`, source channel and consumer channel.
        broadcast: Source channels of which one element feeds several channels at once.
        heads: Of those, the ones that feed the channels of one head only.
    """

    source: str
    call: int
    pairs: Tensor
    broadcast: Tensor
    heads: Heads | None = None

    def same_as(self, other: Edge) -> bool:
        """Whether it ties the same channels in the same way."""
        if (self.source, self.call, self.heads is None) != (other.source, other.call, other.heads is None):
            return False
        ours, theirs = ([edge.pairs, edge.broadcast] for edge in (self, other))
        if self.heads is not None and other.heads is not None:
            ours += [self.heads.channels, self.heads.pairs]
            theirs += [other.heads.channels, other.heads.pairs]
        return all(map(torch.equal, ours, theirs))


@dataclass(frozen=True)
class LooseTensor:
    """A parameter or buffer that no layer owns (layer scale, PReLU slope, learned affine) and its channel axis."""

    name: str
    axis: int
    size: int


@dataclass
class Connectivity:
    """Everything the label probe found.

    Attributes:
        layers: By path, in the order in which they run.
        edges: By consumer path.
        loose: Loose tensors whose elements lie along channels, by name.
        reaches_output: By source: the numbers of its channels from which the model's output is reached without another
            layer.
        uncalled: Paths of layers that the forward pass never ran.
        single: Paths of norms that were given one position of one image: a group of one channel is refused there.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    edges: dict[str, list[Edge]] = field(default_factory=dict)
    loose: dict[str, LooseTensor] = field(default_factory=dict)
    reaches_output: dict[str, Tensor] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    single: set[str] = field(default_factory=set)

    @property
    def weighted(self) -> list[str]:
        """Paths of the convolutions (depthwise ones included) and linear layers, in the order in which they run."""
        return [path for path, layer in self.layers.items() if layer.kind in ("synaptic", "depthwise")]

    def add_(self, other: Connectivity) -> None:
        """Add what another pass has found: what either ties is tied."""
        for path, layer in other.layers.items():
            self.layers.setdefault(path, layer)
        self.loose = other.loose | self.loose
        self.single |= other.single
        for path, edges in other.edges.items():
            ours = self.edges.setdefault(path, [])
            ours += [edge for edge in edges if not any(map(edge.same_as, ours))]
        for source, reached in other.reaches_output.items():
            ours_reached = self.reaches_output.get(source, reached)
            self.reaches_output[source] = torch.cat([ours_reached, reached]).unique()

    def sources(self, path: str) -> list[list[tuple[str, int]]]:
        """The (layer path, output channel) pairs that feed each input channel of the layer `path`.

        A channel of the model's input appears as `(INPUT, channel)`; a channel that nothing feeds (padding) has an
        empty list. Gates count: they feed what they multiply.

        Raises:
            InputError: `path` names no layer that ran.
        """
        if path not in self.layers:
            raise InputError(
                f"no layer '{path}' ran in the traced model; see Connectivity.layers for the paths"
            )
        found: list[set[tuple[str, int]]] = [set() for _ in range(self.layers[path].inputs)]
        for edge in self.edges[path]:
            if edge.source in self.layers or edge.source == INPUT:
                for source_channel, channel in edge.pairs.tolist():
                    found[channel].add((edge.source, source_channel))
        return [sorted(pairs) for pairs in found]


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


def ties_of(connectivity: Connectivity, slots: Slots, *, whole_heads: bool = True) -> Ints:
    """`[n, 2]`: slots that must be cut together; those of a head only with `whole_heads`."""
    ties: list[Ints] = [np.empty((0, 2), dtype=np.int64)]
    for path, edges in connectivity.edges.items():
        into = slots.start[slots.in_key[path]]
        for edge in edges:
            if edge.source == INPUT:
                continue
            pairs = edge.pairs.numpy()
            source = slots.start[slots.out_key[edge.source]]
            ties.append(np.stack([pairs[:, 0] + source, pairs[:, 1] + into], 1))
            if edge.heads is not None and edge.heads.several and whole_heads:
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
