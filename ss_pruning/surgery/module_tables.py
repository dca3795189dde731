"""The tables in which modules hold tensors: tied, filled and compared between a model and a copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.memento import parameter_like
from ss_pruning._utils.modules import modules_of


def tie_(small: nn.Module, model: nn.Module) -> None:
    """Where a tensor that was cut stands in another place, too, let it do so in the cut model."""
    theirs = modules_of(small)
    places = [(tensor, vars(theirs[path])[table], name) for path, table, name, tensor in _held(model)]
    cut = {id(tensor): table[name] for tensor, table, name in places if table[name] is not tensor}
    for tensor, table, name in places:
        table[name] = cut.get(id(tensor), table[name])


def take_values_(model: nn.Module, values: nn.Module) -> None:
    """Give a model the tensors of another one, of the same shapes, where they differ."""
    theirs = modules_of(values)
    made: dict[int, Tensor] = {}  # by what it was made for: tied tensors stay tied
    ours = modules_of(model)
    for path, table, name, tensor in list(_held(model)):
        value = vars(theirs[path])[table].get(name)
        if value is not None:
            vars(ours[path])[table][name] = made.setdefault(id(tensor), _with_values(tensor, value))


def _held(model: nn.Module) -> Iterator[tuple[str, str, str, Tensor]]:
    """Module path, table, name and tensor, each as often as it is held; those of TorchScript cannot be reached."""
    for path, module in modules_of(model).items():
        if not isinstance(module, torch.jit.ScriptModule):
            for table in ("_parameters", "_buffers"):
                for name, tensor in vars(module)[table].items():
                    if tensor is not None:
                        yield path, table, name, tensor


def _with_values(tensor: Tensor, values: Any) -> Any:
    """A tensor of the same kind, type and place with other values; itself where they are its own."""
    values = values.detach().to(tensor)
    if torch.equal(tensor, values):
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return values
    parameter = parameter_like(tensor, values)
    parameter.grad = tensor.grad
    return parameter


def differing(
    module: nn.Module, other: nn.Module, names: Iterable[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Tables of a module, and what of them is something else in the other module."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    sizes = {name: vars(other)[name] for name in names if name in vars(other)}
    layers = {} if type(module) is type(other) else other._modules
    pairs = (
        (module._parameters, other._parameters),
        (module._buffers, other._buffers),
        (vars(module), sizes),
        (module._modules, {name: layer for name, layer in layers.items() if name not in module._modules}),
    )
    for table, now in pairs:
        changed = {name: value for name, value in now.items() if table.get(name, ...) is not value}
        if changed:
            yield table, changed
