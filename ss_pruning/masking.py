"""The masked model: the dense one with the removed channels' contributions zeroed, the oracle of every cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning.cloning import shell
from ss_pruning.layers import channel_axis, is_depthwise, mixes_channels
from ss_pruning.planning import Selection
from ss_pruning.surgery import Cut, cut_layer
from ss_pruning.walking import modules_of
from ss_pruning.wiring import Wiring


@contextlib.contextmanager
def masked(model: nn.Module, selection: Selection, wiring: Wiring) -> Iterator[None]:
    """Zero what arrives on removed channels while a block runs; layers that mix channels run on the kept ones alone."""
    undo, modules = contextlib.ExitStack(), modules_of(model)
    with undo:
        for (path, side), kept in selection.items():
            layer = wiring.layers.get(path)
            if layer is None:
                continue
            module = modules[path]
            cut = Cut(path, side, layer.inputs, kept)
            if side == "in" and not is_depthwise(module):
                if type(module).__module__.startswith("torch.nn."):
                    undo.callback(
                        module.register_forward_pre_hook(_without(cut.removed), with_kwargs=True).remove
                    )
                else:  # may standardise its weights over what it reads
                    _patch(undo, module, _reading_kept_channels(module, cut, layer.in_axis))
            elif side == "through" and (layer.kind == "positional" or mixes_channels(module)):
                _patch(undo, module, _on_kept_channels(module, cut, layer.in_axis))
        yield


def _patch(undo: contextlib.ExitStack, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    undo.callback(vars(module).pop, "forward") if before is None else undo.callback(
        vars(module).update, forward=before
    )


def _without(removed: list[int]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook that zeroes channels of what a layer reads."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (x, *rest), names = (args, kwargs) if args else (tuple(kwargs.values()), {})
        gone = torch.tensor(removed, device=x.device)
        return (x.index_fill(channel_axis(module, x), gone, 0), *rest), names

    return hook


def _on_kept_channels(module: nn.Module, cut: Cut, axis: int) -> Callable[[Tensor], Tensor]:
    small = shell(module).eval()
    if not isinstance(module, _ConvNd):
        cut_layer(small, cut)

    def forward(x: Tensor) -> Tensor:
        kept = torch.tensor(cut.kept, device=x.device)
        return torch.zeros_like(x).index_copy(axis, kept, small(x.index_select(axis, kept)))

    return forward


def _reading_kept_channels(module: nn.Module, cut: Cut, axis: int) -> Callable[[Tensor], Tensor]:
    plain = shell(module).eval()

    def forward(x: Tensor) -> Tensor:
        small = shell(plain)  # not kept: its weights are its own
        cut_layer(small, cut)
        smaller: Tensor = small(x.index_select(axis, torch.tensor(cut.kept, device=x.device)))
        return smaller

    return forward
