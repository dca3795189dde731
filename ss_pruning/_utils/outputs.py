"""What a model returns, looked into: every tensor and number, by name, whatever they are wrapped in."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ss_pruning._utils.objects import ATOMS, SETS, children, rank
from ss_pruning.errors import ModelError

#: A tensor, a Python number that was taken from one, or what else a width may have got into.
Value = Tensor | bool | int | float | complex | str | bytes | range | slice | enum.Enum | torch.dtype
_SAYING = (str, bytes, range, slice, enum.Enum, torch.dtype)


def values_in(output: Any) -> dict[str, Value]:
    """Tensors and numbers by name, such as `output.features[0]`, in the order in which they lie.

    Containers, dataclasses, instances with attributes (distributions among them) and what functions close over are
    opened; what hangs in two places is found in the first.

    Raises:
        ModelError: Something cannot be looked into; names it.
    """
    found: dict[str, Value] = {}
    seen: dict[int, Any] = {}
    todo: list[tuple[str, Any]] = [("output", output)]
    while todo:
        name, thing = todo.pop()
        while name in found:  # keys that look alike
            name += "'"
        if isinstance(thing, Tensor):
            found |= _dense(name, thing)
            if (own := getattr(thing, "__dict__", None)) and id(thing) not in seen:
                seen[id(thing)] = thing
                todo += [(f"{name}.{key}", value) for key, value in own.items()]
        elif isinstance(thing, (bool, int, float, complex, np.generic, np.ndarray)):
            found[name] = _number(name, thing)
        elif isinstance(thing, _SAYING):
            found[name] = thing
        elif not isinstance(thing, ATOMS) and id(thing) not in seen:
            seen[id(thing)] = thing
            # Nobody could tell apart in two models what stands in a set under one rank.
            mingled = isinstance(thing, SETS) and len(set(map(rank, thing))) < len(thing)
            inside = None if isinstance(thing, nn.Module) or mingled else children(thing)
            if inside is None:
                raise ModelError(_closed(name, thing))
            todo += reversed([(name + place, value) for place, value in inside])
    return found


def tensors_in(output: Any) -> dict[str, Tensor]:
    """The tensors alone, see `values_in`."""
    return {name: value for name, value in values_in(output).items() if isinstance(value, Tensor)}


def _dense(name: str, tensor: Tensor) -> dict[str, Value]:
    if tensor.is_nested:
        return {f"{name}[{i}]": part for i, part in enumerate(tensor.unbind())}
    return {name: tensor if tensor.layout is torch.strided else tensor.to_dense()}


def _number(name: str, value: Any) -> Value:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise ModelError(_closed(name, value))
        return torch.from_numpy(value)
    number: Value = value.item() if isinstance(value, np.generic) else value
    return number


def _closed(name: str, thing: Any) -> str:
    return (
        f"the model returns a {type(thing).__name__} ({name}), which cannot be looked into, so that nobody could say "
        "whether a smaller model returns the same; let forward return tensors, or containers and plain objects that "
        "hold them"
    )
