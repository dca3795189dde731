"""Copies of models to try things on: new modules around the same tensors, which costs no memory and next to no time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ss_pruning._utils.memento import is_surrounding, parameter_like
from ss_pruning._utils.modules import modules_of, tensors_of
from ss_pruning._utils.objects import children
from ss_pruning.errors import ModelError

# What a class may define to be copied in a way of its own.
_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__")
_PLAIN = frozenset((int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size, type))
_TABLES = ("_parameters", "_buffers")
_TABLE_KINDS = frozenset((dict, OrderedDict, set))


def shell(model: nn.Module) -> nn.Module:
    """A copy whose modules are new and whose parameters and buffers are those of `model` itself.

    Replacing a tensor or a number of the copy leaves `model` alone; writing into a tensor does not.

    Raises:
        ModelError: The model cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in tensors_of(model).values()}
    modules = list(modules_of(model).values())
    try:
        try:
            return _shell(model, modules, dict(memo))
        except RuntimeError:  # it keeps a tensor with a history, such as features for a loss
            return _shell(model, modules, memo | _without_history(model))
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied, because of {_culprit(model)} ({type(error).__name__}: {error}); take that "
            "off it until it is pruned"
        ) from error


def _culprit(model: nn.Module) -> str:
    """The module that refuses to be copied by itself, and which of its attributes does."""
    modules = modules_of(model)
    known = {id(held): held for held in (*modules.values(), *tensors_of(model).values())}
    known |= _without_history(model)
    for path, module in modules.items():
        if not _copies(module, {key: held for key, held in known.items() if key != id(module)}):
            names = [name for name, value in vars(module).items() if not _copies(value, known)]
            return repr(".".join([path, *names[:1]]).strip(".") or type(module).__name__)
    return f"its {type(model).__name__}"


def _copies(thing: Any, memo: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(thing, dict(memo))
    except Exception:  # whatever a class of the user's raises
        return False
    return True


def _shell(model: nn.Module, modules: Sequence[nn.Module], memo: dict[int, Any]) -> nn.Module:
    if not all(map(_is_ordinary, {type(module) for module in modules})):
        return _deep(model, memo)
    shells = [object.__new__(type(module)) for module in modules]
    memo.update({id(module): new for module, new in zip(modules, shells, strict=True)})
    for module, new in zip(modules, shells, strict=True):
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _PLAIN:
                new.__dict__[name] = value
            elif kind in _TABLE_KINDS and not value and name.startswith("_"):  # of hooks, mostly
                new.__dict__[name] = kind()
            else:
                new.__dict__[name] = _copied(name, value, memo)
    return shells[0]


def _deep(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    twin = copy.deepcopy(model, memo)
    if isinstance(model, GraphModule):  # leaves behind what its code does not use, such as the plan of a cut
        left = {name: value for name, value in vars(model).items() if name not in vars(twin)}
        vars(twin).update(copy.deepcopy(left, memo))
    return twin


def _without_history(model: nn.Module) -> dict[int, Any]:
    """By `id`, what stands in a copy for each tensor that hangs on an attribute and was computed: its values."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    todo: list[Any] = [model]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            found |= {} if thing.is_leaf else {id(thing): thing.detach().clone()}
        elif not is_surrounding(thing):
            todo += [value for _, value in children(thing) or ()]
    return found


def retyped(
    model: nn.Module, change: Callable[[Tensor], Tensor], tables: Sequence[str] = _TABLES
) -> nn.Module:
    """A copy whose parameters and buffers are `change` of those of `model`; tensors of other tables are shared with it.

    `change` must not write into what it is given.
    """
    twin = shell(model)
    made: dict[int, Any] = {}
    for module in modules_of(twin).values():
        for table in (vars(module)[name] for name in tables):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor, change(tensor.detach()))
                table[name] = made[id(tensor)]
    return twin


def read_as(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy that gives `change` of a parameter of `model`, a tensor of its own, whenever one is read, as passes do.

    Nothing of it is kept: a pass in float64 through a float32 model takes the memory of one layer at a time. Buffers,
    which modules may write into, are changed once and for all. Whoever goes through the tables of a module rather than
    asking for an attribute sees the parameters of `model` themselves.
    """
    twin = retyped(model, change, ("_buffers",))
    for module in modules_of(twin).values():
        vars(module)["_parameters"] = _Changing(module._parameters, change)
    return twin


class _Changing(dict[str, Any]):
    """Parameters that are changed whenever one is looked up."""

    def __init__(self, items: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(items)
        self.change = change

    def __getitem__(self, name: str) -> Any:
        tensor = super().__getitem__(name)
        return None if tensor is None else _like(tensor, self.change(tensor.detach()))

    def __copy__(self) -> _Changing:
        return _Changing(self, self.change)


def copied(model: nn.Module) -> nn.Module:
    """A copy with tensors of its own."""
    return retyped(model, Tensor.clone)


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    """Data as the same kind of tensor: a parameter for a parameter."""
    if type(tensor) is nn.Parameter:
        return parameter_like(tensor, data)
    if type(tensor) is Tensor:
        return data
    raise ModelError(f"the model cannot be copied: it holds a {type(tensor).__name__}")


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """True for a class that is copied by copying its attributes (torch's own only restore what old files lack)."""
    own = [
        getattr(kind, n, None) for n in _COPYING if getattr(kind, n, None) is not getattr(nn.Module, n, None)
    ]
    foreign = [
        method for method in own if not str(getattr(method, "__module__", "")).startswith("torch.nn.modules.")
    ]
    return not foreign and not issubclass(kind, torch.jit.ScriptModule)


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if name in _TABLES and isinstance(value, dict):
        return copy.copy(value)
    if name == "_modules" and kind in _TABLE_KINDS and all(id(module) in memo for module in value.values()):
        return kind({child: memo[id(module)] for child, module in value.items()})
    if kind is tuple and all(type(item) in _PLAIN for item in value):
        return value
    return copy.deepcopy(value, memo)
