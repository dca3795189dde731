"""What the label probe finds: layers, and who feeds whom."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from ss_pruning.errors import InputError
from ss_pruning.graph.layers import Kind

#: Stands for the model's input in lists of sources.
INPUT = "<input>"


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

    Attributes:
        channels: `[heads, width]`, the consumer's channels by head.
        pairs: `[n, 2]`, source channel and number of the head.
    """

    channels: Tensor
    pairs: Tensor


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


def pattern(path: str) -> str:
    """A path without its numbers: alike layers of repeated blocks have the same."""
    return re.sub(r"\d+", "#", path)
