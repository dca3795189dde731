"""Decisions: what a model makes of numbers that jumps: comparisons, top-k, suppression, rounding.

A difference in the last bit may turn one, and all that comes of it. Where two models are compared, the second is
therefore held to the decisions of the first as long as it decides on the same numbers: what is behind them can be
compared like the rest. If a decision ends all there is to compare (a detector that finds nothing), the numbers that it
looked at are the last that can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ss_pruning.surgery.equivalence.agreement import difference

_COMPARES = {
    *("eq", "ne", "gt", "ge", "lt", "le", "isclose", "isnan", "isinf", "isfinite"),
    *("signbit", "sign", "heaviside"),
}
_SELECTS = {
    *("argmax", "argmin", "argsort", "sort", "topk", "kthvalue", "median", "nanmedian", "mode", "max", "min"),
    "cummax",
}
_FINDS = {
    *("cummin", "nonzero", "nonzero_static", "searchsorted", "bucketize", "unique_dim", "unique_consecutive"),
}
_TELLS = {"_unique2", "_local_scalar_dense", "is_nonzero", "equal", "allclose"}
_ROUNDS = {"ceil", "floor", "round", "trunc", "fix", "frac", "floor_divide", "remainder", "fmod"}
_DECIDES = _COMPARES | _SELECTS | _FINDS | _TELLS | _ROUNDS
_WHOLE = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
# Bytes of what decisions looked at that are kept; beyond it a model decides by itself.
_MEMORY = 2**28
#: Whether an operation decides: by its name, for a whole dtype, if it puts out whole numbers, or never.
_Kind = Literal["always", "cast", "rounding", "foreign", "never"]


@dataclass(frozen=True)
class Decision:
    """One operation, what it looked at (nothing if there was no room), and what it made of that.

    Attributes:
        operation: Its name.
        looked_at: The tensors whose numbers it jumps at.
        terms: All else it was given: thresholds, how many to take, along which axis, whole numbers.
        result: What it made of them.
        tells: Whether what it looked at depends on the layers of the model.
    """

    operation: str
    looked_at: tuple[Tensor, ...]
    terms: tuple[Any, ...]
    result: Any
    tells: bool = True

    def numbers(self) -> int:
        """How many numbers other than 0 it looked at, if these tell something about the model."""
        return sum(int(t.count_nonzero()) for t in self.looked_at) if self.tells else 0


class _Deciding(TorchDispatchMode):
    """Sees every operation, and hands on those that decide."""

    kinds: dict[Any, _Kind]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spares importing torch's compiler, which would be told not to look at this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = self.kinds.get(func) or self.kinds.setdefault(func, _kind_of(func))
        if kind == "never" or (kind == "cast" and kwargs.get("dtype") not in _WHOLE):
            return func(*args, **kwargs)
        if kind == "rounding" and kwargs.get("rounding_mode") is None:
            return func(*args, **kwargs)
        given = pytree.tree_leaves((args, kwargs))
        if func._schema.is_mutable:  # it writes over what it looks at
            given = _cloned(given)
        result = func(*args, **kwargs)
        looked_at = tuple(thing for thing in given if _is_measured(thing))
        whole = any(isinstance(t, Tensor) and t.dtype in _WHOLE for t in pytree.tree_leaves(result))
        if not looked_at or (kind == "foreign" and not whole):
            return result
        terms = tuple(thing for thing in given if not _is_measured(thing))
        return self.decided(Decision(func._schema.name, looked_at, terms, result))

    def decided(self, decision: Decision) -> Any:
        """What to take for the result of an operation that decides."""
        raise NotImplementedError


class Recording(_Deciding):
    """Notes the decisions that are made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []
        self.bytes = 0

    def decided(self, decision: Decision) -> Any:
        """Note it."""
        self.bytes += sum(t.numel() * t.element_size() for t in decision.looked_at)
        looked_at, terms = (decision.looked_at, decision.terms) if self.bytes <= _MEMORY else ((), ())
        self.decisions.append(
            Decision(decision.operation, _cloned(looked_at), _cloned(terms), _cloned(decision.result))
        )
        return decision.result


class Holding(_Deciding):
    """Holds what runs while it is entered to decisions that were made before, on the same numbers.

    Attributes:
        compared: How many numbers other than 0 were the same, to within `tolerance`.
        error: Largest difference in these, as `difference` measures it.
        differs: The first operation that looked at others of the same shape; empty if none did.
    """

    def __init__(self, decisions: Sequence[Decision], tolerance: float) -> None:
        super().__init__()
        self.left, self.tolerance = list(reversed(decisions)), tolerance
        self.compared, self.error, self.differs = 0, 0.0, ""

    def decided(self, decision: Decision) -> Any:
        """What was decided before, if it was about the same numbers on the same terms; else what is decided now."""
        before = self.left.pop() if self.left else None
        if before is None:
            return decision.result
        if before.operation != decision.operation:
            # Another way through the code: nothing from here on belongs together.
            self.left, self.differs = [], self.differs or decision.operation
            return decision.result
        if [t.shape for t in before.looked_at] != [t.shape for t in decision.looked_at]:
            return decision.result  # on channels, of which there are fewer
        pairs = zip(before.looked_at, decision.looked_at, strict=True)
        errors = [difference(a, b) for a, b in pairs]
        alike = all(error is not None and error <= self.tolerance for error in errors)
        if not alike or not _same_terms(before.terms, decision.terms, self.tolerance):
            self.differs = self.differs or decision.operation
            return decision.result
        self.error = max([self.error, *(error for error in errors if error is not None)])
        self.compared += before.numbers()
        return _replaced(decision.result, before.result)


def _is_measured(thing: Any) -> bool:
    return isinstance(thing, Tensor) and (thing.is_floating_point() or thing.is_complex())


def _same_terms(before: Sequence[Any], now: Sequence[Any], tolerance: float) -> bool:
    """Whether two operations of one kind do the same: a number that is a width is another one in a cut model."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        if type(a) is float and type(b) is float:
            return math.isclose(a, b, rel_tol=tolerance) or (math.isnan(a) and math.isnan(b))
        return bool(a == b)

    return len(before) == len(now) and all(map(same, before, now))


def _kind_of(func: Any) -> _Kind:
    namespace, _, name = func._schema.name.partition("::")
    if namespace == "prim":
        return "never"
    if namespace != "aten":
        return "foreign"
    name = name.rstrip("_")
    if name in ("_to_copy", "to"):
        return "cast"
    return "rounding" if name == "div" else "always" if name in _DECIDES else "never"


def _cloned(result: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, result)


def _replaced(result: Any, before: Any) -> Any:
    """What was decided before; where an operation has written into its input, that holds it now."""
    if isinstance(result, Tensor) and isinstance(before, Tensor) and result.shape == before.shape:
        return result.copy_(before)
    return _cloned(before)
