"""Layer types that users add by decorator, see docs/own_layer.md; torch's own are described the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ss_pruning.errors import InputError

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class LayerType:
    """Where the channels of a layer lie that mixes channels: each of its outputs reads all of its inputs.

    Attributes:
        outputs: By name of a parameter or buffer, the axis on which output channels lie.
        inputs: The same for input channels.
        axis: Where channels lie in what the layer reads and puts out: 1 as in images, -1 as linear layers have it.
        sizes: By side, the name of the attribute that holds the number of channels.
    """

    outputs: Mapping[str, int]
    inputs: Mapping[str, int]
    axis: int
    sizes: Mapping[str, str]

    def axes(self, side: str) -> Mapping[str, int]:
        """By name of a tensor, the axis on which the channels of a side lie."""
        return self.inputs if side == "in" else self.outputs


_LAYER_TYPES: dict[type, LayerType] = {}


def register_layer(
    *,
    outputs: Mapping[str, int],
    inputs: Mapping[str, int],
    axis: int = 1,
    in_size: str | None = None,
    out_size: str | None = None,
) -> Callable[[Class], Class]:
    """Make a layer type of your own prunable; subclasses of it, too.

    Its `weight`, an attribute or a property `[out_channels, in_channels, ...]`, is what strengths are taken from.

    Args:
        outputs: By name of a parameter or buffer, the axis on which output channels lie.
        inputs: The same for input channels.
        axis: Where channels lie in what the layer reads and puts out: 1 as in images, -1 as linear layers have it.
        in_size: Name of the attribute that holds the number of input channels, if there is one.
        out_size: The same for output channels.

    Raises:
        InputError: A side has no tensor, so that its width cannot be told.

    Examples:
        >>> import torch
        >>> @register_layer(outputs={"weight": 0}, inputs={"weight": 1}, axis=-1)
        ... class Scaled(torch.nn.Module):
        ...     def __init__(self, inputs: int, outputs: int) -> None:
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(outputs, inputs))
        ...
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return x @ self.weight.T / len(self.weight)
    """
    if not outputs or not inputs:
        raise InputError("name at least one tensor on which output channels lie, and one for input channels")
    sizes = {side: name for side, name in (("in", in_size), ("out", out_size)) if name is not None}

    def register(cls: Class) -> Class:
        _LAYER_TYPES[cls] = LayerType(dict(outputs), dict(inputs), axis, sizes)
        return cls

    return register


def layer_type_of(module: Any) -> LayerType | None:
    """How a module's class, or the nearest that it inherits from, is registered; None where it is not."""
    if not _LAYER_TYPES:
        return None
    return next((_LAYER_TYPES[cls] for cls in type(module).__mro__ if cls in _LAYER_TYPES), None)
