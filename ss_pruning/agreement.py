"""Whether two models return the same: all that they return, and where that says nothing, what they decide on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ss_pruning.decisions import Decision, Holding
from ss_pruning.errors import ModelError, VerificationError
from ss_pruning.outputs import tensors_in, values_in


@dataclass(frozen=True)
class Match:
    """Two outputs that are the same.

    Attributes:
        error: Largest difference, relative to the largest number of the tensor it is in.
        numbers: How many numbers other than 0 were compared; whole ones do not count, nor do Python's.
        blind: Whether something was returned in which there is no such number.
    """

    error: float
    numbers: int
    blind: bool


def compare(masked: Any, cut: Any, tolerance: float) -> Match:
    """Compare all that two models return: numbers to within `tolerance`, whole numbers exactly.

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
        a, b = torch.as_tensor(value), torch.as_tensor(found[name])
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
        worst = max(worst, error)
        counted = _numbers_in(value)
        numbers, blind = numbers + counted, blind or not counted
    return Match(worst, numbers, blind)


def difference(a: Tensor, b: Tensor) -> float | None:
    """Largest difference of two tensors of one shape, relative to the largest number; None where it has no measure.

    Whole numbers must be equal. NaN where not the same numbers are finite.
    """
    if a.dtype != b.dtype or not (a.is_floating_point() or a.is_complex()):
        return 0.0 if a.dtype == b.dtype and torch.equal(a, b) else None
    finite = a.isfinite()
    if not bool(finite.all()):
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return float("nan")
        a, b = a[finite], b[finite]
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _numbers_in(output: Any) -> int:
    """How many numbers other than 0, and finite, are in the tensors of an output."""
    tensors = [t for t in tensors_in(output).values() if t.is_floating_point() or t.is_complex()]
    return sum(int((t.isfinite() & (t != 0)).sum()) for t in tensors)


def check_comparable(output: Any, decisions: Sequence[Decision]) -> None:
    """Refuse a model of which no cut could be verified.

    Raises:
        ModelError: There is no number to compare.
    """
    if _numbers_in(output) or any(decision.numbers() for decision in decisions):
        return
    if any(not bool(t.isfinite().all()) for t in tensors_in(output).values()):
        raise ModelError("the model puts out NaN or Inf, so a smaller one cannot be compared with it")
    raise ModelError(
        "nothing that the model returns on the example inputs can be compared (no tensor with numbers other than 0, "
        "and none that it selects by), so that no cut could be verified; give example inputs on which it returns "
        "something, or let forward return what the result is made from"
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
