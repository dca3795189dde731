"""What objects hold: the one walk that looks into containers, instances, functions and classes."""

from __future__ import annotations

import enum
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

#: Values that hold nothing else.
ATOMS = (
    *(bool, int, float, complex, str, bytes, range, slice, type(None), type(...), enum.Enum),
    *(np.generic, np.ndarray, Tensor, torch.Generator),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
#: Containers of values by place.
SEQUENCES = (list, tuple, deque)
SETS = (set, frozenset)
_BUILT_IN = frozenset((dict, OrderedDict, *SEQUENCES, *SETS))


def children(thing: Any) -> Iterator[tuple[str, Any]] | None:
    """What `thing` holds, each with how it is written behind the name of `thing`; None where that cannot be seen.

    A function holds what it closes over and its defaults, a method its object; containers of a kind of their own hold
    their attributes, too. Sets are gone through in an order that does not depend on where things lie. Modules of
    Python, classes and what iterates are not looked into.
    """
    if isinstance(thing, (*ATOMS, type, types.ModuleType, types.BuiltinFunctionType)):
        return iter(())
    if isinstance(thing, (Mapping, *SEQUENCES, *SETS)):
        return chain(_items(thing), _beside_items(thing))
    if isinstance(thing, types.FunctionType):
        return ((f"<{name}>", value) for name, value in _closed_over(thing))
    if isinstance(thing, types.MethodType):
        return iter(((".__self__", thing.__self__),))
    if isinstance(thing, functools.partial):
        return iter(((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords)))
    return attributes(thing)


def _items(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, Mapping):
        return ((f"[{key!r}]", value) for key, value in list(thing.items()))
    if isinstance(thing, SETS):
        return (("{...}", value) for value in sorted(thing, key=rank))
    fields = getattr(thing, "_fields", None)  # of a named tuple
    names = fields if isinstance(fields, tuple) and len(fields) == len(thing) else None
    return ((f".{names[i]}" if names else f"[{i}]", value) for i, value in enumerate(thing))


def _beside_items(thing: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of a container that are none of its items."""
    if type(thing) in _BUILT_IN:
        return
    items = {id(value) for _, value in _items(thing)}
    for name, value in attributes(thing) or ():
        if id(value) not in items:
            yield name, value


def rank(thing: Any) -> tuple[str, str]:
    """By what a set is gone through."""
    kind = type(thing).__name__
    if isinstance(thing, Tensor):
        return kind, str((tuple(thing.shape), thing.dtype))
    return kind, repr(thing) if isinstance(thing, ATOMS) else ""


def attributes(thing: Any) -> Iterator[tuple[str, Any]] | None:
    """The attributes of an instance, in its `__dict__` and in slots; None where it has neither."""
    names = slots(cast(Hashable, type(thing)))
    if not hasattr(thing, "__dict__") and not names:
        return None
    own = list(getattr(thing, "__dict__", {}).items())
    own += [(name, getattr(thing, name)) for name in names if hasattr(thing, name)]
    return ((f".{name}", value) for name, value in own)


@functools.cache
def slots(kind: Hashable) -> tuple[str, ...]:
    """Names of the attributes that a class keeps in slots."""
    found: list[str] = []
    for base in getattr(kind, "__mro__", ()):
        own = vars(base).get("__slots__", ())
        own = (own,) if isinstance(own, str) else own
        private = f"_{base.__name__.lstrip('_')}"
        found += [private + n if n.startswith("__") and not n.endswith("__") else n for n in own]
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    yield from vars(function).items()
    yield from ((f"default {i}", value) for i, value in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
