"""Everything a forward pass may change about a model, noted so that it can be taken back."""

from __future__ import annotations

import contextlib
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import parameter as lazy
from torch.utils.weak import WeakTensorKeyDictionary

from ss_pruning._utils.objects import ATOMS, children, slots

# Of larger containers the entries are taken back, but not looked into: vocabularies, lists of files.
_MANY = 4096
_NO_CONTENT: tuple[Any, ...] = ()
_OURS = __name__.partition(".")[0]
_TABLES = (dict, OrderedDict)
# Containers that are cleared where they were empty.
_CLEARED = (*_TABLES, set)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)
# Types of values that hold nothing, looked up by the thousand.
_PLAIN = frozenset(
    (
        *(bool, int, float, complex, str, bytes, type(None), BuiltinFunctionType, ModuleType),
        *(torch.dtype, torch.device, torch.Size),
    )
)

# By parameter, whether a forward pass was seen to write into it: only then, or if none was seen, content is kept.
_WRITTEN = WeakTensorKeyDictionary()

#: By weight that code multiplies with, not calling the layer that holds it: a name, the same for all its copies.
READ_BY_CODE = WeakTensorKeyDictionary()

# Objects of these libraries hold the surroundings of a model (optimisers, loaders, trainers), not what it computes.
_SURROUNDINGS = {
    *("asyncio", "concurrent", "io", "logging", "multiprocessing", "threading", "weakref", "_thread"),
    *("accelerate", "lightning", "nni", "numpy", "pytorch_lightning", "tensorboard", "torch", "torchvision"),
    "wandb",
}

Undo = Callable[[], object]


class Memento:
    """A model's state: what its modules, their attributes and the objects behind those hold.

    Looked into are attributes of any kind, containers, helper objects, closures, generators of random numbers, and the
    attributes and module-level containers that the classes of modules and helpers rely on. Of tensors that are no
    parameters the content is kept, too, of parameters it is until a pass has left it alone. Left alone here are the
    tensors of the modules `but`, and optimisers, loaders and trainers that hang on a model. With `replaced`, other
    tensors stand in the place of parameters meanwhile. With `training`, content of parameters is kept in any case:
    averages of weights (EMA, MoCo) are moved in training only, of which passes in eval mode say nothing.
    """

    def __init__(
        self, model: nn.Module, but: Iterable[nn.Module] = (), replaced: bool = False, training: bool = False
    ) -> None:
        self.replaced, self.training = replaced, training
        tables = [table for module in but for table in (module._parameters, module._buffers)]
        self.seen: set[int] = {id(thing) for table in tables for thing in (table, *table.values())}
        self.alive: list[Any] = []  # so that no `id` is used twice
        self.undo: list[Undo] = []
        self.dicts: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = []
        self.empty: list[Any] = []  # tables of hooks, mostly, and sets of names
        self.kinds: list[tuple[Any, type]] = []
        self.tensors: list[_Kept] = []
        todo: list[Any] = [model]
        while todo:
            self._note(todo.pop(), todo)

    def restore(self) -> None:
        """Take back what has changed since; what has not is not touched."""
        for table, keys, values in self.dicts:
            _restore_mapping(table, keys, values)
        for table in self.empty:
            if table:
                table.clear()
        for thing, kind in self.kinds:
            if type(thing) is not kind:  # a lazy module becomes another
                thing.__class__ = kind
        for kept in self.tensors:
            kept.put_back(self.replaced)
        for undo in self.undo:
            undo()

    def _note(self, thing: Any, todo: list[Any]) -> None:
        if id(thing) in self.seen:
            return
        self.seen.add(id(thing))
        self.alive.append(thing)
        if type(thing) in _TABLES:  # most of all; the others are told apart one by one
            self._note_mapping(thing, todo)
        elif isinstance(thing, Tensor):
            self._note_tensor(thing, todo)
        elif isinstance(thing, nn.Module):
            self._note_instance(thing, todo)
        elif (undo := _undoing(thing)) is not None:
            self.undo.append(undo)
            self._follow(_held(thing), todo)
        elif isinstance(thing, (*ATOMS, ModuleType)) or is_surrounding(thing):
            return
        elif isinstance(thing, MutableMapping):
            self.replaced = self.replaced or _is_ours(thing)  # a table that gives other tensors than it holds
            self._note_mapping(thing, todo)
            self._follow(_own(thing), todo)
        elif _is_ours(thing):
            return
        elif isinstance(thing, type):
            self._note_class(thing, todo)
        elif isinstance(thing, (*_FUNCTIONS, tuple, frozenset)):
            self.undo += _cells_back(thing)
            self._follow([value for _, value in children(thing) or ()], todo)
        else:
            self._note_instance(thing, todo)

    def _follow(self, values: Iterable[Any], todo: list[Any]) -> None:
        values = list(values)
        if len(values) > _MANY:
            return
        for value in values:
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _CLEARED and not value:
                self.empty.append(value)
            elif kind is not tuple or not _PLAIN.issuperset(map(type, value)):
                todo.append(value)

    def _note_mapping(self, table: Any, todo: list[Any]) -> None:
        values = tuple(table.values()) if table else _NO_CONTENT
        self.dicts.append((table, tuple(table) if table else _NO_CONTENT, values))
        self._follow(values, todo)

    def _note_instance(self, thing: Any, todo: list[Any]) -> None:
        kind = type(thing)
        if isinstance(own := getattr(thing, "__dict__", None), dict):
            self._note_mapping(own, todo)
        if isinstance(thing, torch.jit.ScriptModule):  # what it holds lies in C++
            self.undo += [partial(setattr, part, "training", part.training) for part in thing.modules()]
            todo.extend(thing.buffers())
        for name in slots(cast(Hashable, kind)):
            if hasattr(thing, name):
                value = getattr(thing, name)
                self.undo.append(_slot_back(thing, name, value))
                todo.append(value)
        self.kinds.append((thing, kind))
        if not kind.__module__.startswith("torch."):
            todo.append(kind)

    def _note_class(self, kind: type, todo: list[Any]) -> None:
        """What methods may have put on their class, and containers of its module that they use by name."""
        for base in kind.__mro__:
            if base is object or base.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
                continue
            own = {k: v for k, v in vars(base).items() if not (k.startswith("__") or _is_code(v))}
            self.undo.append(lambda base=base, own=own: _class_attributes_back(base, own))  # type: ignore[misc]
            self._follow(own.values(), todo)
            todo.extend(_globals_of(base))

    def _note_tensor(self, tensor: Tensor, todo: list[Any]) -> None:
        if isinstance(tensor, (lazy.UninitializedParameter, lazy.UninitializedBuffer)):
            self.undo.append(_lazy_back(tensor, type(tensor)))
            return
        keep = not isinstance(tensor, nn.Parameter) or self.training or _WRITTEN.get(tensor, True)
        grad = tensor.grad if tensor.is_leaf else None
        content = _content(tensor) if keep else None
        self.tensors.append(_Kept(tensor, tensor.detach(), content, grad, tensor.requires_grad))
        if type(tensor) not in (Tensor, nn.Parameter) and getattr(tensor, "__dict__", None):
            self._note_mapping(vars(tensor), todo)


def is_surrounding(thing: Any) -> bool:
    """Whether it belongs to what is around a model: an optimiser, a loader, a trainer, a lock."""
    return type(thing).__module__.partition(".")[0] in _SURROUNDINGS and not isinstance(
        thing, (nn.Module, torch.distributions.Distribution)
    )


def _is_ours(thing: Any) -> bool:
    """Hooks of this package, and what they note down."""
    function = thing.func if isinstance(thing, partial) else thing
    named = function if isinstance(function, (FunctionType, MethodType)) else type(function)
    return str(named.__module__).partition(".")[0] == _OURS


def _undoing(thing: Any) -> Undo | None:
    """What brings a mutable value other than a mapping, an instance or a tensor back; None for other values."""
    if isinstance(thing, list):
        items = list(thing)
        return lambda: None if _same(thing, items) else list.__setitem__(thing, slice(None), items)
    if isinstance(thing, deque):
        entries = list(thing)
        return lambda: None if _same(thing, entries) else _refill(thing, deque, entries)
    if isinstance(thing, set):
        members = set(thing)
        return lambda: None if set(thing) == members else _refill(thing, set, members)
    if isinstance(thing, bytearray):
        content = bytes(thing)
        return lambda: thing.__setitem__(slice(None), content)
    if isinstance(thing, array):
        numbers = thing[:]
        return lambda: thing.__setitem__(slice(None), numbers)
    if isinstance(thing, np.ndarray):
        values = thing.copy()
        return lambda: (
            np.copyto(thing, values) if thing.shape == values.shape and thing.flags.writeable else None
        )
    return _drawing(thing)


def _drawing(thing: Any) -> Undo | None:
    """What brings back the state of what draws random numbers; None for other values."""
    if isinstance(thing, torch.Generator):
        drawn = thing.get_state()
        return lambda: thing.set_state(drawn)
    if isinstance(thing, random.Random):
        state = thing.getstate()
        return lambda: thing.setstate(state)
    if isinstance(thing, np.random.RandomState):
        legacy = thing.get_state()
        return lambda: thing.set_state(legacy)
    if isinstance(thing, (np.random.Generator, np.random.BitGenerator)):
        bits: Any = getattr(thing, "bit_generator", thing)
        numbers = bits.state
        return lambda: setattr(bits, "state", numbers)
    return None


def _held(thing: Any) -> list[Any]:
    """What a mutable value of this kind holds."""
    if isinstance(thing, np.ndarray):
        return list(thing.flat) if thing.dtype == object else []
    return [*thing, *_own(thing)] if isinstance(thing, (list, deque, set)) else []


def _own(thing: Any) -> list[Any]:
    """The attributes of a container of a kind of its own."""
    own = getattr(thing, "__dict__", None)
    return [own] if own is not None and type(thing) not in _TABLES else []


def _cells_back(function: Any) -> list[Undo]:
    """What a function counts in variables of the one around it."""
    found: list[Undo] = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # not bound yet
            found.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
    return found


def _refill(thing: Any, kind: Any, values: Iterable[Any]) -> None:
    """By the built-in methods: those of a subclass may refuse, or do more."""
    kind.clear(thing)
    (kind.update if kind is set else kind.extend)(thing, values)


def _same(now: Iterable[Any], before: list[Any]) -> bool:
    values = list(now)
    return len(values) == len(before) and all(a is b for a, b in zip(values, before, strict=True))


def _restore_mapping(table: Any, keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    if len(table) == len(keys):
        pairs = zip(table.items(), keys, values, strict=True)
        if all(k is key and v is value for (k, v), key, value in pairs):
            return
    for kind in (OrderedDict, dict):
        if isinstance(table, kind):  # by its own methods: those of a subclass may refuse, or do more
            kind.clear(table)
            for key, value in zip(keys, values, strict=True):
                kind.__setitem__(table, key, value)
            return
    known = set(map(id, keys))
    for key in [key for key in table if id(key) not in known]:
        del table[key]
    for key, value in zip(keys, values, strict=True):
        table[key] = value


def _slot_back(thing: Any, name: str, value: Any) -> Undo:
    return lambda: None if getattr(thing, name, None) is value else object.__setattr__(thing, name, value)


def _class_attributes_back(kind: type, own: Mapping[str, Any]) -> None:
    now = {k: v for k, v in vars(kind).items() if not (k.startswith("__") or _is_code(v))}
    for name in now.keys() - own.keys():
        delattr(kind, name)
    for name, value in own.items():
        if name not in now or now[name] is not value:
            setattr(kind, name, value)


def _is_code(value: Any) -> bool:
    """Functions, properties and other descriptors: no pass changes them."""
    return isinstance(value, (type, BuiltinFunctionType)) or hasattr(type(value), "__get__")


_USED: WeakKeyDictionary[type, list[tuple[dict[str, Any], str]]] = WeakKeyDictionary()


def _globals_of(kind: type) -> list[Any]:
    """Containers at the level of its Python module that a class's methods use by name: caches."""
    if kind not in _USED:
        used: set[str] = set()
        where: dict[str, Any] = {}
        for value in vars(kind).values():
            function = getattr(value, "__wrapped__", getattr(value, "__func__", value))
            if code := getattr(function, "__code__", None):
                used.update(code.co_names)
                where = function.__globals__
        _USED[kind] = [(where, name) for name in sorted(used) if isinstance(where.get(name), _CACHES)]
    return [where[name] for where, name in _USED[kind] if name in where]


_CACHES = (dict, list, set, deque)


def _lazy_back(tensor: Any, kind: type) -> Undo:
    def undo() -> None:
        if type(tensor) is not kind:
            tensor.data, tensor.__class__ = torch.empty(0, dtype=tensor.dtype, device=tensor.device), kind

    return undo


def _content(tensor: Tensor) -> Tensor | None:
    """A copy of the values, where they can be put back."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    with torch.no_grad(), contextlib.suppress(RuntimeError, ValueError):  # not materialised yet
        return tensor.detach().clone()
    return None


def like(made: Tensor, tensor: Tensor) -> Tensor:
    """Note of a copy of a parameter what is known of the parameter."""
    for known in (_WRITTEN, READ_BY_CODE):
        if tensor in known:
            known[made] = known[tensor]
    return made


def parameter_like(parameter: Tensor, data: Tensor) -> nn.Parameter:
    """A parameter of other data, of which is known what is known of the first."""
    made = nn.Parameter(data, requires_grad=parameter.requires_grad)
    like(made, parameter)
    return made


class _Kept(NamedTuple):
    """A tensor: what it looked at, its content if that is kept, its gradient and its flag."""

    tensor: Tensor
    alias: Tensor
    content: Tensor | None
    grad: Tensor | None
    requires_grad: bool

    def put_back(self, replaced: bool) -> None:
        """Make it what it was. Where another tensor may have stood in its place, nothing is learnt of a parameter."""
        tensor, alias, content = self.tensor, self.alias, self.content
        moved = (tensor.shape, tensor.dtype, tensor.device) != (alias.shape, alias.dtype, alias.device)
        if moved or tensor.data_ptr() != alias.data_ptr():
            tensor.data = alias
        written = content is not None and not _equal(alias, content)
        if isinstance(tensor, nn.Parameter) and content is not None and (written or not replaced):
            _WRITTEN[tensor] = written
        if content is not None and written:
            with torch.no_grad(), torch.inference_mode(alias.is_inference()):
                alias.copy_(content)
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if tensor.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit but for the bits of NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))
