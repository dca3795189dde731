"""Slow twins of the package's mathematics, written from the definitions with plain loops.

Nothing is imported from the package under test. Everything runs in float64 and in Python numbers where that is
feasible; the nets are tiny.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

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

Sources = list[set[tuple[str, int]]]


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
            total += 1.0 if module.weight is None else float(module.weight[channel]) ** 2
    return total if found else 1.0


def variances(model: nn.Module, calls: Sequence[Sources]) -> list[float]:
    """The variance of every input channel of a layer: the mean over the layer's calls."""
    return [sum(variance(model, call[c]) for call in calls) / len(calls) for c in range(len(calls[0]))]


def strength(layer: nn.Module, scales: Sequence[float]) -> list[list[float]]:
    """`s[k][j] = sqrt(v_c) * ||W[k, c]||` for the synapses of every output; `scales` are the variances `v_c`."""
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
