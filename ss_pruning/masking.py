"""The masked model: the dense one with the removed channels' contributions zeroed, the oracle of every cut."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning.layers import groups_of, is_depthwise, mixes_channels
from ss_pruning.planning import Selection
from ss_pruning.surgery import Cut, cut_layer
from ss_pruning.wiring import Wiring


def mask_(twin: nn.Module, selection: Selection, wiring: Wiring) -> None:
    """Zero what reads removed channels; layers that mix channels run on the kept ones alone."""
    for (path, side), kept in selection.items():
        layer = wiring.layers.get(path)
        if layer is None:
            continue
        module = twin.get_submodule(path)
        if side == "in" and not is_depthwise(module):
            if type(module).__module__.startswith("torch.nn."):
                gone = torch.ones(layer.inputs, dtype=torch.bool)
                gone[list(kept)] = False
                _zero_inputs(module, gone)
            else:  # may standardise its weights over what it reads
                module.forward = _reading_kept_channels(
                    module, Cut(path, side, layer.inputs, kept), layer.in_axis
                )
        elif side == "through" and (layer.kind == "positional" or mixes_channels(module)):
            module.forward = _on_kept_channels(module, Cut(path, side, layer.inputs, kept), layer.in_axis)


def _zero_inputs(module: nn.Module, gone: Tensor) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    gone = gone.to(weight.device)
    if isinstance(module, _ConvNd) and module.transposed:
        weight.data[gone] = 0
    elif groups_of(module) == 1:
        weight.data[:, gone] = 0
    else:
        rows = gone.reshape(groups_of(module), -1).repeat_interleave(len(weight) // groups_of(module), 0)
        weight.data[rows] = 0


def _on_kept_channels(module: nn.Module, cut: Cut, axis: int) -> Callable[[Tensor], Tensor]:
    small = copy.deepcopy(module).eval()
    if not isinstance(module, _ConvNd):
        cut_layer(small, cut)

    def forward(x: Tensor) -> Tensor:
        kept = torch.tensor(cut.kept, device=x.device)
        return torch.zeros_like(x).index_copy(axis, kept, small(x.index_select(axis, kept)))

    return forward


def _reading_kept_channels(module: nn.Module, cut: Cut, axis: int) -> Callable[[Tensor], Tensor]:
    small = copy.deepcopy(module).eval()
    cut_layer(small, cut)
    return lambda x: small(x.index_select(axis, torch.tensor(cut.kept, device=x.device)))
