"""Whether two models return the same: all that they return, and where that says nothing, what they decide on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ss_pruning._utils.outputs import Value, tensors_in, values_in
from ss_pruning.errors import ModelError, VerificationError

if TYPE_CHECKING:
    from ss_pruning.surgery.equivalence.decisions import Decision, Holding

_NUMBERS = (Tensor, np.ndarray, bool, int, float, complex)
# From here on a number may be what a mask is filled with, if no other comes within a factor of it.
_FILLED, _GAP = 1e6, 1e3


@dataclass(frozen=True)
class Match:
    """Two outputs that are the same.

    Attributes:
        error: Largest difference, relative to the largest number of the tensor it is in.
        numbers: How many numbers other than 0 were compared that tell something about the model; whole ones do not
            count, nor do Python's.
        blind: Whether something was returned in which there is no such number.
    """

    error: float
    numbers: int
    blind: bool


def compare(masked: Any, cut: Any, tolerance: float, telling: Collection[str] | None = None) -> Match:
    """Compare all that two models return: numbers to within `tolerance`, all else exactly.

    Raises:
        VerificationError: Something differs; names the first.
        ModelError: An output cannot be looked into.
    """
    expected, found = values_in(masked), values_in(cut)
    if expected.keys() != found.keys():
        odd = next(iter(expected.keys() ^ found.keys()))
        raise VerificationError(f"only one of the cut and the masked model returns '{odd}'")
    worst, numbers, blind = 0.0, 0, False
    for name, value in expected.items():
        worst = max(worst, _difference_in(name, value, found[name], tolerance))
        counted = _numbers_in(value)
        blind = blind or not counted
        numbers += counted if telling is None or name in telling else 0
    return Match(worst, numbers, blind)


def _difference_in(name: str, expected: Value, found: Value, tolerance: float) -> float:
    """The difference in one thing that is returned."""
    if not isinstance(expected, _NUMBERS) or not isinstance(found, _NUMBERS):
        if expected != found:
            raise VerificationError(f"'{name}' is {found!r} in the cut model, not {expected!r}")
        return 0.0
    a, b = torch.as_tensor(expected), torch.as_tensor(found)
    if a.shape != b.shape:
        raise VerificationError(
            f"the cut model's output has shape {tuple(b.shape)}, not {tuple(a.shape)} ('{name}')"
        )
    error = difference(a, b)
    if error is None:
        raise VerificationError(f"the whole numbers in '{name}' differ in the cut and the masked model")
    if not error <= tolerance:
        raise VerificationError(
            f"the cut model differs from the masked one by {error:.2e} (relative, in '{name}')"
        )
    return error


def difference(a: Tensor, b: Tensor) -> float | None:
    """Largest difference of two tensors of one shape, relative to the largest number; None where it has no measure.

    Whole numbers must be equal. NaN where not the same numbers are finite. Numbers far above the others, with which
    masks are filled (-1e9, the smallest of a type), are compared apart: next to them nothing else would count.
    """
    if a.dtype != b.dtype or not (a.is_floating_point() or a.is_complex()):
        return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else None
    finite = a.isfinite()
    if not bool(finite.all()):
        if not torch.allclose(a[~finite], b[~finite], rtol=0, atol=0, equal_nan=True):
            return float("nan")
        a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    if a.dtype in (torch.float16, torch.bfloat16):  # in which next to nothing is small
        a, b = a.float(), b.float()
    return max(_relative(x, y) for x, y in _apart(a, b))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def _apart(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The numbers with which masks are filled and the others, if there is a gap between them; else all."""
    size = a.abs()
    if float(size.max()) < _FILLED:
        return [(a, b)]
    large = size >= _FILLED
    if bool(large.all()) or float(size[~large].max()) * _GAP > float(size[large].min()):
        return [(a, b)]
    return [(a[large], b[large]), (a[~large], b[~large])]


def that_tell(output: Any, other: Any) -> frozenset[str]:
    """Names of tensors that differ in what a model returned before and after its layers were changed."""
    before, after = tensors_in(output), tensors_in(other)
    return frozenset(name for name in before if name not in after or moved(before[name], after[name]))


def decisions_that_tell(decisions: Sequence[Decision], others: Sequence[Decision]) -> list[Decision]:
    """The same decisions; those that looked at the same after the model's layers were changed do not tell."""
    found = []
    for before, after in itertools.zip_longest(decisions, others[: len(decisions)]):
        same = after is not None and before.operation == after.operation
        pairs = zip(before.looked_at, after.looked_at, strict=False) if same else ()
        found.append(replace(before, tells=any(moved(a, b) for a, b in pairs)))
    return found


def moved(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are not the same."""
    return a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())


def _numbers_in(output: Any) -> int:
    """How many numbers other than 0, and finite, are in the tensors of an output."""
    tensors = [t for t in tensors_in(output).values() if t.is_floating_point() or t.is_complex()]
    return sum(int((t.isfinite() & (t != 0)).sum()) for t in tensors)


def check_comparable(
    output: Any, decisions: Sequence[Decision], telling: Collection[str] | None = None
) -> None:
    """Refuse a model of which no cut could be verified.

    Raises:
        ModelError: There is no number to compare.
    """
    told = {k: t for k, t in tensors_in(output).items() if telling is None or k in telling}
    if _numbers_in(told) or any(decision.numbers() for decision in decisions):
        return
    if any(not bool(t.isfinite().all()) for t in tensors_in(output).values()):
        raise ModelError("the model puts out NaN or Inf, so a smaller one cannot be compared with it")
    raise ModelError(
        "nothing that the model returns on the example inputs can be compared (no tensor with numbers other than 0 "
        "that come from its layers, and none that it selects by), so that no cut could be verified; give example "
        "inputs on which it returns something, or let forward return what the result is made from"
    )


def certified(match: Match, holding: Holding) -> bool:
    """Whether decisions have to speak for a match; they must where outputs are silent.

    Raises:
        VerificationError: Nothing was compared, or the cut model decides on other numbers.
    """
    if match.blind and holding.differs:
        raise VerificationError(
            f"the cut model decides on other numbers than the masked one ({holding.differs})"
        )
    if not match.numbers and not holding.compared:
        raise VerificationError("no number that the cut model returns or decides on could be compared")
    return not match.numbers
