"""Slow twins of the package's mathematics, written from the definitions with plain loops.

Nothing is imported from the package under test. Everything runs in float64 and in Python numbers where that
is feasible; the nets are tiny.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
)
LAYERS = (*CONVOLUTIONS, nn.Linear)
INPUT = "<input>"

Sources = list[set[tuple[str, int]]]


# ----------------------------------------------------------------------------------------------------------
# Who feeds whom, channel by channel, by autograd


@dataclass(frozen=True)
class Leaf:
    """A tensor that stands in for a layer's output, with the axis of its channels."""

    path: str
    tensor: Tensor
    axis: int


@dataclass(frozen=True)
class Arrival:
    """What one call of a layer received, and all the leaves that it may depend on."""

    path: str
    tensor: Tensor
    axis: int
    leaves: list[Leaf]

    @property
    def width(self) -> int:
        """Its number of channels."""
        return self.tensor.shape[self.axis]


def channel_axis(module: nn.Module, value: Tensor) -> int:
    """The axis of the channels: 1; the last for linear layers, layer norms, convolutions along channels."""
    along = isinstance(module, nn.Conv1d) and module.in_channels == module.out_channels == 1
    last = value.shape[-1] == module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else along
    return value.dim() - 1 if last or isinstance(module, nn.Linear) else 1


def arrivals(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Arrival]:
    """Runs a copy of a model, in float64, with every layer's output replaced by a positive random leaf."""
    twin = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(3)
    leaves: list[Leaf] = []
    found: list[Arrival] = []

    def leaf(path: str, value: Tensor, axis: int) -> Tensor:
        fresh = torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.1
        leaves.append(Leaf(path, fresh.requires_grad_(), axis))
        return fresh * 1.0  # in-place operations may not touch a leaf

    def cut(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> Tensor:
            if isinstance(module, LAYERS):
                found.append(Arrival(path, args[0], channel_axis(module, args[0]), leaves))
            return leaf(path, value, channel_axis(module, value))

        return hook

    for path, module in twin.named_modules():
        if isinstance(module, (*LAYERS, *NORMS)):
            module.register_forward_hook(cut(path))
    twin(*(leaf(INPUT, x, 1) for x in inputs))
    return found


def feeders(arrival: Arrival, channel: int) -> set[tuple[str, int]]:
    """The output channels of all layers that one channel of an arrival depends on."""
    value = arrival.tensor.select(arrival.axis, channel)
    weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    tensors = [leaf.tensor for leaf in arrival.leaves]
    grads = torch.autograd.grad((value * weights).sum(), tensors, retain_graph=True, allow_unused=True)
    found = set()
    for leaf, grad in zip(arrival.leaves, grads, strict=True):
        if grad is not None:
            strong = grad.abs().amax([d for d in range(grad.dim()) if d != leaf.axis]) > 1e-14
            found |= {(leaf.path, int(c)) for c in strong.nonzero().flatten()}
    return found


# ----------------------------------------------------------------------------------------------------------
# Strength


def groups_of(layer: nn.Module) -> int:
    """The number of groups; a linear layer has one."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def widths(layer: nn.Module) -> tuple[int, int]:
    """`(outputs, inputs)` of a convolution or linear layer."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features


def input_of(layer: nn.Module, k: int, j: int) -> int:
    """The absolute input channel of output `k`'s synapse number `j`."""
    outputs, inputs = widths(layer)
    groups = groups_of(layer)
    return (k // (outputs // groups)) * (inputs // groups) + j


def kernel(layer: nn.Module, k: int, j: int) -> Tensor:
    """The weights of the synapse from input `input_of(layer, k, j)` to output `k`, flat, in float64."""
    if isinstance(layer, TRANSPOSED):
        outputs, _ = widths(layer)
        per_group = outputs // groups_of(layer)
        return layer.weight[input_of(layer, k, j), k % per_group].detach().double().flatten()
    return layer.weight[k, j].detach().double().flatten()


def variance(model: nn.Module, sources: set[tuple[str, int]]) -> float:
    """The variance of one input channel: the sum of `gamma^2` over its norm sources, or 1 where it has none.

    Sources without a norm (a gate, the image) beside ones with a norm are left out of the sum.
    """
    total, found = 0.0, False
    for path, channel in sources:
        module = None if path == "<input>" else model.get_submodule(path)
        if isinstance(module, NORMS):
            found = True
            total += 1.0 if module.weight is None else float(module.weight.detach()[channel]) ** 2
    return total if found else 1.0


def variances(model: nn.Module, calls: Sequence[Sources]) -> list[float]:
    """The variance of every input channel of a layer: the mean over the layer's calls."""
    return [sum(variance(model, call[c]) for call in calls) / len(calls) for c in range(len(calls[0]))]


def strength(layer: nn.Module, scales: Sequence[float]) -> list[list[float]]:
    """`s[k][j] = sqrt(v_c) * ||W[k, c]||` for the synapses of every output; `scales[c]` is `v_c`."""
    outputs, inputs = widths(layer)
    table = []
    for k in range(outputs):
        row = []
        for j in range(inputs // groups_of(layer)):
            energy = sum(float(w) ** 2 for w in kernel(layer, k, j))
            row.append(math.sqrt(scales[input_of(layer, k, j)] * energy))
        table.append(row)
    return table


def shares(table: list[list[float]]) -> list[list[float]]:
    """`s^2 / sum s^2` per output; all zero for an output that receives nothing."""
    result = []
    for row in table:
        total = sum(s * s for s in row)
        result.append([s * s / total if total > 0 else 0.0 for s in row])
    return result


def entropy(table: list[list[float]]) -> list[list[float]]:
    """The entropy of a Gaussian with standard deviation `s`, in nats; minus infinity at zero."""
    return [
        [0.5 * math.log(2 * math.pi * math.e * s * s) if s > 0 else -math.inf for s in row] for row in table
    ]


def masked(model: nn.Module, removed: dict[str, set[int]]) -> nn.Module:
    """A float64 copy in which the removed input channels of every consumer carry nothing.

    Args:
        model: The dense model.
        removed: Path of each consumer (convolution or linear layer) to its removed absolute input channels.
    """
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for path, channels in removed.items():
            layer = twin.get_submodule(path)
            outputs, inputs = widths(layer)
            for k in range(outputs):
                for j in range(inputs // groups_of(layer)):
                    if input_of(layer, k, j) not in channels:
                        continue
                    if isinstance(layer, TRANSPOSED):
                        per_group = outputs // groups_of(layer)
                        layer.weight[input_of(layer, k, j), k % per_group] = 0
                    else:
                        layer.weight[k, j] = 0
    return twin


def masked_output(model: nn.Module, inputs: tuple[Tensor, ...], removed: dict[str, set[int]]) -> list[Tensor]:
    """All tensors that the masked model returns, in order, in float64."""
    with torch.no_grad():
        return tensors(masked(model, removed)(*(x.double() for x in inputs)))


def tensors(value: object) -> list[Tensor]:
    """The tensors of a nested output, depth first."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)]
