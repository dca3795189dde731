"""The masked model: the dense one with the removed channels' contributions zeroed, the oracle of every cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.copying import shell
from ss_pruning._utils.hooks import given, hooked, replaced, replaced_forward
from ss_pruning._utils.modules import modules_of
from ss_pruning.graph.connectivity import Connectivity, Side
from ss_pruning.graph.groups import Selection
from ss_pruning.graph.layers import channel_axis, is_depthwise, is_linear_in_weight, mixes_channels
from ss_pruning.surgery.cut import Cut, cut_layer


@contextlib.contextmanager
def masked(model: nn.Module, selection: Selection, connectivity: Connectivity) -> Iterator[None]:
    """Zero what arrives on removed channels while a block runs; layers that mix channels run on the kept ones alone.

    Queries and keys arrive at no layer: of heads that stay in part, removed channels are zeroed where they are made.
    """
    modules, removed = modules_of(model), dict[str, list[int]]()
    unread = removed_unread(selection, connectivity)

    def zeroed(path: str, module: nn.Module, x: Tensor) -> Tensor:
        return x.index_fill(channel_axis(module, x), torch.tensor(removed[path], device=x.device), 0)

    def silenced(path: str, module: nn.Module, _: Tensor, y: Tensor) -> Tensor:
        return y.index_fill(channel_axis(module, y), torch.tensor(unread[path], device=y.device), 0)

    with contextlib.ExitStack() as undo:
        for (path, side), kept in selection.items():
            layer = connectivity.layers.get(path)
            if layer is None:
                continue
            module = modules[path]
            cut = Cut(path, side, layer.inputs, kept)
            if side == "in" and not is_depthwise(module):
                if is_linear_in_weight(module):
                    removed[path] = cut.removed
                else:  # may standardise its weights over what it reads
                    forward = _reading_kept_channels(module, cut, layer.in_axis)
                    undo.enter_context(replaced_forward(module, forward))
            elif side == "through" and (layer.kind == "positional" or mixes_channels(module)):
                forward = _on_kept_channels(module, cut, layer.in_axis)
                undo.enter_context(replaced_forward(module, forward))
        undo.enter_context(hooked({path: modules[path] for path in removed}, zeroed))
        undo.enter_context(hooked({path: modules[path] for path in unread}, after=silenced))
        yield


def removed_unread(selection: Selection, connectivity: Connectivity) -> dict[str, list[int]]:
    """By layer, the removed outputs that mix within heads of which a part stays."""
    found: dict[str, list[int]] = {}
    for edge in (edge for edges in connectivity.edges.values() for edge in edges if edge.heads is not None):
        layer = connectivity.layers.get(edge.source)
        side: Side = "out" if layer is not None and layer.kind in ("synaptic", "depthwise") else "through"
        if layer is None or edge.heads is None or (edge.source, side) not in selection:
            continue
        channels, heads = edge.heads.pairs.numpy().T
        stays = np.isin(channels, selection[edge.source, side])
        partly = np.isin(heads, heads[stays]) & ~stays
        found.setdefault(edge.source, []).extend(channels[partly].tolist())
    return {path: channels for path, channels in found.items() if channels}


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
