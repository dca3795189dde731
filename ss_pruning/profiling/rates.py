"""What work costs on this machine: a moment of measuring, to say how long a long run will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ss_pruning._utils.running import checked_call, preserved
from ss_pruning.errors import ModelError
from ss_pruning.importance.calibration import Batch
from ss_pruning.profiling.latency import timed

# Inputs of the timed pass, more of small ones: as many as have so many numbers, up to a most. And how many times more
# are many, which cost more memory.
_FEW, _MOST_OF_FEW, _NUMBERS_OF_FEW, _TIMES = 8, 32, 2**16, 3
# Sides of the matrices that are timed, and numbers that are summed.
_SIDE, _NUMBERS = 512, 2**20


@dataclass(frozen=True)
class Rates:
    """Seconds that work costs here.

    Attributes:
        one: A forward pass of the dense model, an input.
        many: The same, of many at once.
        product: A multiply-accumulate of a matrix product in single precision.
        solve: One of a Cholesky factorisation in double precision.
        number: A number, summed in double precision.
    """

    one: float
    many: float
    product: float
    solve: float
    number: float

    @classmethod
    def measured(cls, model: nn.Module, inputs: Batch) -> Rates:
        """Time a few passes and some algebra; takes as long as some dozen inputs."""
        wanted = min(max(_FEW, _NUMBERS_OF_FEW // max(inputs.numbers, 1)), _MOST_OF_FEW)
        few = inputs.parts()[0].at_most(wanted)
        many = inputs.at_most(_TIMES * wanted) if len(few) else few
        place = next((p.device for p in model.parameters()), torch.device("cpu"))

        def seconds(batch: Batch) -> float:
            run = partial(checked_call, model, batch.inputs, "calibration inputs")
            return timed(run, place) / max(len(batch), 1)

        with preserved(model, training=False), torch.no_grad():
            _, one = seconds(few), seconds(few)  # the first time makes ready
            try:
                other = seconds(many) if len(many) > len(few) else one
            except ModelError:  # so many do not run, or not at once: it is no matter for an estimate
                other = one
        return cls(one, other, *_algebra(place, torch.get_num_threads()))


@cache
def _algebra(place: torch.device, threads: int) -> tuple[float, float, float]:
    """Seconds of a product, of a factorisation and of a sum, an operation; of so many threads, once in a process."""
    wide = torch.ones(4 * _SIDE, _SIDE, device=place)
    spread = torch.eye(_SIDE, device=place, dtype=torch.float64)
    numbers = torch.ones(_NUMBERS, device=place)

    def summed() -> None:
        double = numbers.double()
        double.sum()
        double.square().sum()

    works: tuple[Callable[[], Any], ...] = (
        lambda: wide.T @ wide, lambda: torch.linalg.cholesky(spread), summed
    )  # fmt: skip
    product, solve, number = (min(timed(work, place) for _ in range(2)) for work in works)
    return product / (4 * _SIDE**3), solve / (_SIDE**3 / 6), number / _NUMBERS
