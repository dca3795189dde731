"""Cutting one layer: its tensors keep some channels, in any order, and the numbers that it stores follow.

Plain parameters, gradients, memory format and flags stay what they were. Norms have all their tensors gathered with one
index; subclasses also those that are theirs alone, such as the gain of a scaled convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.memento import parameter_like
from ss_pruning.graph.connectivity import Key, Side
from ss_pruning.graph.layers import (
    LayerType,
    groups_of,
    is_depthwise,
    layer_type_of,
    layout_of,
    long_axis,
    weight_of,
    width,
)


@dataclass(frozen=True)
class Cut:
    """The channels of one layer side that stay, in their new order.

    Attributes:
        path: Module path, or the name of a loose tensor.
        side: "in" or "out" of a convolution or linear layer, "through" a norm, or "tensor".
        width: Number of channels before.
        kept: The channels that stay.
        axis: Axis of a loose tensor; 0 otherwise.
    """

    path: str
    side: Side
    width: int
    kept: tuple[int, ...]
    axis: int = 0

    @property
    def key(self) -> Key:
        """Its layer side."""
        return self.path, self.side

    @property
    def removed(self) -> list[int]:
        """The channels that go, ascending."""
        stays = set(self.kept)
        return [channel for channel in range(self.width) if channel not in stays]


@torch.no_grad()
def cut_layer(module: nn.Module, cut: Cut) -> None:
    """Keep the channels `cut.kept` of one side of a layer, in that order."""
    if cut.side == "in" and is_depthwise(module):  # it is cut once, on its output side
        return
    before, layout = dict(_own_tensors(module)), layout_of(module)
    if layout is None:
        _cut_norm(module, cut)
    elif isinstance(module, _ConvNd) and _is_grouped(module, cut):
        _cut_grouped(module, cut)
    else:
        _cut_along(module, layout, cut)
    if cut.side != "in" and layer_type_of(module) is None:  # further tensors of a subclass
        for name, tensor in _own_tensors(module):
            if tensor is before.get(name) and tensor.dim() and tensor.shape[0] == cut.width:
                gather_(module, name, 0, cut.kept)


def _cut_along(module: nn.Module, layout: LayerType, cut: Cut) -> None:
    side = "in" if cut.side == "in" else "out"
    for name, axis in layout.axes[side].items():
        if getattr(module, name) is not None:
            gather_(module, name, axis, cut.kept)
    if side in layout.sizes:
        setattr(module, layout.sizes[side], len(cut.kept))


def _is_grouped(conv: _ConvNd, cut: Cut) -> bool:
    """Whether it has groups, or had some that went with their outputs, so that it reads less than the plan knows."""
    return groups_of(conv) > 1 or (cut.side == "in" and conv.in_channels != cut.width)


def _cut_grouped(conv: _ConvNd, cut: Cut) -> None:
    """A grouped convolution: each group keeps positions of its own. Groups without outputs go, inputs and all."""
    groups, axis = conv.groups, int((cut.side == "in") != conv.transposed)
    kept, alive = torch.tensor(cut.kept), torch.arange(groups)  # not where the weight is: it may hold no data
    if cut.side == "out":
        alive = (kept // (cut.width // groups)).unique()

    def select(weight: Tensor) -> Tensor:
        blocks = weight.unflatten(0, (groups, -1))[alive.to(weight.device)]  # [groups, rows, columns, ...]
        positions = (kept.reshape(len(blocks), -1) % blocks.shape[1 + axis]).to(weight.device)
        group = torch.arange(len(blocks), device=weight.device)[:, None]
        selected: Tensor = blocks.transpose(1, 1 + axis)[group, positions].transpose(1, 1 + axis)
        return selected.flatten(0, 1).contiguous()

    _replace(conv, "weight", select)
    if cut.side == "out" and conv.bias is not None:
        gather_(conv, "bias", 0, cut.kept)
    if len(alive) < groups:
        conv.in_channels, conv.groups = conv.in_channels // groups * len(alive), len(alive)
    setattr(conv, f"{cut.side}_channels", len(cut.kept))


def _cut_norm(module: nn.Module, cut: Cut) -> None:
    for name, tensor in list(_own_tensors(module)):
        axis = long_axis(tensor)
        if axis is not None and tensor.shape[axis] == cut.width:
            gather_(module, name, axis, cut.kept)
    n = len(cut.kept)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = (n,)
    elif isinstance(module, _NormBase):
        module.num_features = n
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = n
    elif isinstance(getattr(module, "num_features", None), int):
        setattr(module, "num_features", n)  # noqa: B010


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def gather_(module: nn.Module, name: str, axis: int, kept: tuple[int, ...]) -> None:
    """Replace a parameter or buffer (and its gradient) by its selected indices."""
    index = torch.tensor(kept)
    _replace(module, name, lambda tensor: tensor.index_select(axis, index.to(tensor.device)))


def scale_(module: nn.Module, name: str, axis: int, rows: list[int], by: float) -> None:
    """Replace a parameter or buffer by one in which some rows along `axis` are multiplied; its gradient by the inverse.

    A transposed convolution with groups is multiplied wrongly: its outputs lie in two axes.
    """

    def scaled(tensor: Tensor, number: float) -> Tensor:
        factors = torch.ones(tensor.shape[axis], dtype=tensor.dtype, device=tensor.device)
        factors[rows] = number
        return tensor * factors.reshape([-1 if a == axis else 1 for a in range(tensor.dim())])

    _replace(module, name, lambda tensor: scaled(tensor, by), lambda grad: scaled(grad, 1 / by))


def _replace(
    module: nn.Module,
    name: str,
    select: Callable[[Tensor], Tensor],
    of_gradient: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace a parameter or buffer (and its gradient) by a selection from it, in the same memory format."""
    tensor = getattr(module, name)
    selected = _formatted(select(tensor.detach()), tensor)
    if not isinstance(tensor, nn.Parameter):
        setattr(module, name, selected)
        return
    parameter = parameter_like(tensor, selected)
    if tensor.grad is not None:
        parameter.grad = _formatted((of_gradient or select)(tensor.grad), tensor.grad)
    setattr(module, name, parameter)
    if isinstance(module, nn.PReLU):
        module.num_parameters = parameter.numel()


def _formatted(selected: Tensor, tensor: Tensor) -> Tensor:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is None or tensor.is_contiguous():
        return selected
    return selected.contiguous(memory_format=channels_last)


def give_bias(module: nn.Module) -> nn.Parameter:
    """Register a bias of zeros on a convolution or linear layer without one."""
    weight = weight_of(module)
    bias = nn.Parameter(torch.zeros(width(module, "out"), dtype=weight.dtype, device=weight.device))
    module.bias = bias
    return bias
