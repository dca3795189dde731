"""What a run is going to do: all that is asked for, or as much of it as fits into the time that is given.

Sensitivity is measured with less work first, on fewer images and at fewer widths; then there are fewer calibration
inputs for statistics and fits; at last layers compete by their scores, if nobody asked for sensitivity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ss_pruning._utils.progress import in_words
from ss_pruning.compensation.selection import LEAST_HELD_OUT
from ss_pruning.config import Config
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.importance.sensitivity import Effort, effort_for
from ss_pruning.planning.costs import Costs
from ss_pruning.planning.duration import Duration, layers_of
from ss_pruning.profiling.rates import Rates

# Ways to measure sensitivity, the better ones first.
_WAYS = (Effort(16, (0.5, 1.0)), Effort(8, (0.5, 1.0)), Effort(8, (1.0,)))
# No fewer calibration inputs than these are left to save time.
_LEAST_INPUTS = 32


@dataclass(frozen=True)
class Work:
    """What will be done.

    Attributes:
        config: What was asked for, or less.
        inputs: Number of calibration inputs.
        effort: How output error is measured.
        seconds: By stage, what it is expected to take.
        traded: What was given up to save time, in words.
    """

    config: Config
    inputs: int
    effort: Effort
    seconds: dict[str, float]
    traded: tuple[str, ...] = ()

    def of(self, images: Batch | None) -> Batch | None:
        """The calibration inputs that are used: spread over all of them."""
        if images is None or self.inputs == len(images):
            return images
        units = torch.linspace(0, len(images) // images.unit - 1, max(self.inputs // images.unit, 1)).long()
        return images[(units[:, None] * images.unit + torch.arange(images.unit)).flatten()]

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def work_within(
    traced: TracedModel, config: Config, costs: Costs, images: Batch | None, seconds: float | None
) -> Work:
    """The first way to do it that takes no longer than `seconds`, or the last one; without a limit all that is asked.

    Args:
        traced: The model.
        config: What is asked for.
        costs: Of the model.
        images: Calibration inputs, or None.
        seconds: What is left of the time.
    """
    inputs = 0 if images is None else len(images)
    seen = _whole(traced.example_inputs) if images is None else images
    effort = effort_for(config.compensation.method, seen)
    rates, layers = Rates.measured(traced.model, seen), layers_of(traced, costs.layer_macs)

    def work(config: Config, inputs: int, effort: Effort, traded: Sequence[str] = ()) -> Work:
        duration = Duration(traced, config.resolve(inputs), layers, rates)
        held_out = inputs // 5 if inputs >= LEAST_HELD_OUT else 0
        expected = duration.seconds(inputs - held_out, held_out, effort)
        return Work(config, inputs, effort, expected, tuple(traded))

    found = work(config, inputs, effort)
    for way in _ways(config, inputs, effort) if seconds is not None else ():
        if found.total <= (seconds or 0.0):
            return found
        found = work(*way)
    if seconds is None or found.total <= seconds:
        return found
    return replace(
        found, traded=(*found.traded, f"no more could be given up, and {in_words(found.total)} were expected")
    )


def _whole(example_inputs: Any) -> Batch:
    """Of which nothing is known but that it runs as it is."""
    batch = Batch.of(example_inputs)
    count = max(len(batch), 1)
    return batch.limited(count, count)


def _ways(config: Config, inputs: int, effort: Effort) -> Iterator[tuple[Config, int, Effort, list[str]]]:
    """Less and less work, and what was given up."""
    sensitivity = config.resolve(inputs).allocation.scope == "sensitivity"
    measured, fewer = list[str](), list[str]()
    for way in _less_than(effort) if sensitivity else ():
        effort = way
        widths = "two widths" if len(way.widths) == 2 else "one width"
        measured = [f"sensitivity was measured on {way.images} inputs at {widths}"]
        yield config, inputs, effort, measured
    count = inputs
    while count // 2 >= _LEAST_INPUTS:
        count //= 2
        fewer = [f"{count} of {inputs} calibration inputs were used"]
        yield config, count, effort, [*measured, *fewer]
    if sensitivity and config.allocation.scope is None:
        allocation = replace(config.allocation, scope="global")
        yield replace(config, allocation=allocation), count, effort, ["sensitivity was not measured", *fewer]


def _less_than(effort: Effort) -> list[Effort]:
    return [way for way in _WAYS if way.images * len(way.widths) < effort.images * len(effort.widths)]
