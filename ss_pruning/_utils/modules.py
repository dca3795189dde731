"""Modules and tensors of a model by path, found in one flat loop, and whether tensors have changed.

`named_modules` hands every module up through one generator a level; over the many looks that pruning takes at a
model that was a tenth of its time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


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


def device_of(held: Any) -> torch.device:
    """Where a model, or the first tensor of any inputs, lies; the CPU if there is no tensor."""
    leaves = tensors_of(held).values() if isinstance(held, nn.Module) else pytree.tree_leaves(held)
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, one number for each row of a tensor, which another value in the row changes; vectors as they are.

    PyTorch does not count what is written through `.data`. Reading all weights (25 million in 8 ms) takes less time and
    memory than keeping and comparing a copy.
    """
    return {name: _checksum(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if values.dim() < 2:
        return values.clone()
    rows = values.flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ _directions(rows.shape[1], rows.device, rows.dtype)


@lru_cache(maxsize=256)
def _directions(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype).to(device)


def unchanged(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> bool:
    """Whether no checksum has changed of those that both hold."""
    pairs = [(now[name], then[name]) for name in now if name in then]
    return all(x.device == y.device and x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def as_state_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name as a state of `model`: some modules, as torchvision's MNASNet, ask which version it is of."""
    state = OrderedDict(tensors)
    # None where a model makes its state itself.
    versions = getattr(model.state_dict(), "_metadata", None)
    if versions is not None:
        state._metadata = versions  # type: ignore[attr-defined]
    return state
