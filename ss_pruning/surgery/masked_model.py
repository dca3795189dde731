"""The masked model: the dense one with the removed channels' contributions zeroed, the oracle of every cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.copying import shell
from ss_pruning._utils.hooks import given, hooked, replaced, replaced_forward
from ss_pruning._utils.modules import modules_of
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Selection
from ss_pruning.graph.layers import channel_axis, is_depthwise, mixes_channels
from ss_pruning.surgery.cut import Cut, cut_layer


@contextlib.contextmanager
def masked(model: nn.Module, selection: Selection, connectivity: Connectivity) -> Iterator[None]:
    """Zero what arrives on removed channels while a block runs; layers that mix channels run on the kept ones alone."""
    modules, removed = modules_of(model), dict[str, list[int]]()

    def zeroed(path: str, module: nn.Module, x: Tensor) -> Tensor:
        return x.index_fill(channel_axis(module, x), torch.tensor(removed[path], device=x.device), 0)

    with contextlib.ExitStack() as undo:
        for (path, side), kept in selection.items():
            layer = connectivity.layers.get(path)
            if layer is None:
                continue
            module = modules[path]
            cut = Cut(path, side, layer.inputs, kept)
            if side == "in" and not is_depthwise(module):
                if type(module).__module__.startswith("torch.nn."):
                    removed[path] = cut.removed
                else:  # may standardise its weights over what it reads
                    forward = _reading_kept_channels(module, cut, layer.in_axis)
                    undo.enter_context(replaced_forward(module, forward))
            elif side == "through" and (layer.kind == "positional" or mixes_channels(module)):
                forward = _on_kept_channels(module, cut, layer.in_axis)
                undo.enter_context(replaced_forward(module, forward))
        undo.enter_context(hooked({path: modules[path] for path in removed}, zeroed))
        yield


def _on_kept_channels(module: nn.Module, cut: Cut, axis: int) -> Callable[..., Tensor]:
    small = shell(module).eval()
    if not isinstance(module, _ConvNd):
        cut_layer(small, cut)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = given(module, args, kwargs)
        kept = torch.tensor(cut.kept, device=x.device)
        args, kwargs = replaced(module, args, kwargs, x.index_select(axis, kept))
        return torch.zeros_like(x).index_copy(axis, kept, small(*args, **kwargs))

    return forward


def _reading_kept_channels(module: nn.Module, cut: Cut, axis: int) -> Callable[..., Tensor]:
    plain = shell(module).eval()

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        small = shell(plain)  # not kept: its weights are its own
        cut_layer(small, cut)
        x: Tensor = given(module, args, kwargs)
        read = x.index_select(axis, torch.tensor(cut.kept, device=x.device))
        args, kwargs = replaced(module, args, kwargs, read)
        smaller: Tensor = small(*args, **kwargs)
        return smaller

    return forward
