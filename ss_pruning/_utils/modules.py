"""Modules and tensors of a model by path, found in one flat loop.

`named_modules` hands every module up through one generator a level; over the many looks that pruning takes at a
model that was a tenth of its time.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """What `dict(model.named_modules())` gives: each module once, under its first path."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        path, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        if module._modules:
            prefix = f"{path}." if path else ""
            children = reversed(module._modules.items())
            todo += [(prefix + name, child) for name, child in children if child is not None]
    return found


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """What `dict(model.named_parameters())` gives."""
    return _tensors_in(modules_of(model), "_parameters")


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """What `dict(model.named_buffers())` gives."""
    return _tensors_in(modules_of(model), "_buffers")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    modules = modules_of(model)
    return {**_tensors_in(modules, "_parameters"), **_tensors_in(modules, "_buffers")}


def _tensors_in(modules: Mapping[str, nn.Module], table: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, tensor in getattr(module, table).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}" if path else name] = tensor
    return found
