"""How long a run will take, said before it starts, and what is given up where it has to take less.

What is to be done is counted, what that costs here is measured.
Passes of the model are counted in inputs that run through all of it, the matrix algebra in multiply-accumulates, what
statistics read in numbers. A timed pass over a few calibration inputs, a matrix product, a factorisation and a sum tell
what these cost on this machine at this moment (`ss_pruning.profiling.rates`).

To save time sensitivity is measured with less work first, on fewer images and at fewer widths; then there are fewer
calibration inputs for statistics and fits; at last layers compete by their scores, if nobody asked for sensitivity.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.progress import time_in_words
from ss_pruning._utils.running import output_of
from ss_pruning.compensation.apply import LEAST_HELD_OUT
from ss_pruning.compensation.fidelity import HELD_OUT
from ss_pruning.compensation.reconstruction import rows_wanted
from ss_pruning.config import Config, NoCompensation, Synaptic
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.activation_stats.observed import positions_of as product_positions
from ss_pruning.importance.calibration import BATCH, Batch
from ss_pruning.importance.regression import weights_by_group
from ss_pruning.importance.sensitivity import Effort, at_a_time, effort_for
from ss_pruning.planning.costs import Costs
from ss_pruning.planning.ranking import EXPONENTS
from ss_pruning.profiling.rates import Rates

# Passes over the example inputs: noise for strengths, and a verification, in double precision.
_NOISE_INPUTS, _VERIFIED = 8, 6
# Allocations that compete, see `Ranker`: three sensitivities and the scores, by each power.
_RIVALS = 4 * len(EXPONENTS)
# Ridges that are tried for a layer, the final one included; columns of a Gram matrix that are made at a time.
_RIDGES, _COLUMNS = 4, 256
# Ways to measure sensitivity, the better ones first.
_WAYS = (Effort(16, (0.5, 1.0)), Effort(8, (0.5, 1.0)), Effort(8, (1.0,)))
# No fewer calibration inputs than these are left to save time.
_LEAST_INPUTS = 32


@dataclass(frozen=True)
class LayerWork:
    """What a layer has to do with one input.

    Attributes:
        begin: Share of a forward pass that is over when it begins.
        reads: Numbers that it reads.
        positions: At which it puts out.
        outputs: Channels.
        inputs: Channels of a group.
        columns: Inputs of an output, taps included.
        groups: Of the layer.
        calls: In a forward pass; the numbers above are of the first.
    """

    begin: float
    reads: int
    positions: float
    outputs: int
    inputs: int
    columns: int
    groups: int
    calls: int


def layers_of(traced: TracedModel, macs: Mapping[str, int]) -> dict[str, LayerWork]:
    """By path, the layers with weights, in the order in which they run."""
    found: dict[str, tuple[int, float]] = {}
    calls = Counter[str]()
    weighted = {path: traced.modules[path] for path in traced.connectivity.weighted}
    count = max(len(Batch.of(traced.example_inputs)), 1)

    def note(path: str, _: nn.Module, x: Any, y: Any) -> None:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            channels = traced.connectivity.layers[path].outputs
            calls[path] += 1
            found.setdefault(path, (x.numel() // count, y.numel() / (count * channels)))

    output_of(traced.model, traced.example_inputs, hooked(weighted, None, note))
    layers, over, total = {}, 0.0, max(sum(macs.values()), 1)
    for path, (reads, positions) in found.items():
        weight = weights_by_group(weighted[path])
        groups, columns = len(weight), weight[0, 0].numel()
        inputs = max(traced.connectivity.layers[path].inputs // groups, 1)
        layers[path] = LayerWork(
            over / total, reads, positions, weight.shape[:2].numel(), inputs, columns, groups, calls[path]
        )
        over += macs.get(path, 0)
    return layers


@dataclass(frozen=True)
class Duration:
    """Counts the work of a run by these settings."""

    traced: TracedModel
    config: Config
    layers: dict[str, LayerWork]
    rates: Rates

    def seconds(self, fitted: int, held_out: int, effort: Effort) -> dict[str, float]:
        """By stage, what it will take.

        Statistics and fits are of `fitted` inputs, of noise if that is 0; on those held out models are compared.
        """
        sensitivity = self.config.allocation.scope == "sensitivity"
        # As `Ranker` leaves them to scores that sensitivity takes covariances of.
        left = fitted - effort.images
        ordered = self._is_ordered(fitted)
        shared = ordered and sensitivity and left >= BATCH
        return {
            "score": self._scored(left if shared else fitted, ordered) + held_out * self.rates.one,
            "measure": self._measured(effort, fitted, shared) if sensitivity else 0.0,
            "verify": _VERIFIED * self.rates.one * max(len(Batch.of(self.traced.example_inputs)), 1),
            "cut": self._cut(fitted) + self._compared(held_out),
        }

    @property
    def _kept(self) -> float:
        """Share of the operations that stay, by the budget."""
        budget = self.config.budget
        return (1 - budget.value) ** 2 if budget.kind == "ratio" else budget.value

    def _is_ordered(self, fitted: int) -> bool:
        """Whether scores need covariances: of channels, each counts for what stronger ones do not tell."""
        importance = self.config.importance
        return bool(fitted and isinstance(importance, Synaptic) and (importance.conditional or 0.0) > 0)

    def _statistics(self, inputs: int, covariance: bool) -> float:
        numbers = sum(layer.reads for layer in self.layers.values())
        found = inputs * (self.rates.one + numbers * self.rates.number)
        if covariance:
            found += self.rates.product * product_positions(inputs, BATCH) * sum(self._wide(2))
        return found

    def _wide(self, power: int) -> list[float]:
        return [
            layer.groups * float(layer.inputs) ** power for layer in self.layers.values() if layer.inputs > 1
        ]

    def _scored(self, fitted: int, covariance: bool) -> float:
        """Strengths are of noise; importances that are no `Synaptic` cost next to nothing."""
        strengths = self._statistics(_NOISE_INPUTS, False)
        if not isinstance(self.config.importance, Synaptic):
            return strengths
        if not fitted:
            return 2 * strengths
        ordered = self.rates.solve * sum(self._wide(3)) / 6 if covariance else 0.0
        return strengths + self._statistics(fitted, covariance) + ordered

    def _measured(self, effort: Effort, fitted: int, known: bool) -> float:
        """Copies, each from where the first of those that run beside it begins; regressions, and what they leave."""
        refitted = self.config.compensation.method == "reconstruct"
        # A check runs three copies; without refits the dense model and what competes run whole.
        copies = 3.0 if refitted else 4.0 + _RIVALS
        for widths, beside in ((0, 1),) if refitted else ((0, 0), (1, 0)):
            copies += self._copies(len(effort.widths) + widths, beside, effort)
        algebra = 2 * self.rates.solve * sum(self._wide(3))
        statistics = 0.0 if known else self._statistics(fitted, True)
        return effort.images * copies * self.rates.many + algebra + statistics

    def _copies(self, each: int, beside: int, effort: Effort) -> float:
        """Whole passes: of so many copies a group, and so many beside those that run at a time."""
        begins, size = sorted(self._begins()), at_a_time(effort.images, len(effort.widths))
        parts = [begins[at : at + size] for at in range(0, len(begins), size)]
        return sum((each * len(part) + beside) * (1 - part[0]) + part[0] for part in parts)

    def _begins(self) -> list[float]:
        """By group, where the first layer that reads it begins."""
        found = []
        for group in self.traced.coupling.groups:
            read = [m.path for m in group.members if m.side == "in" and m.path in self.layers]
            if read:
                found.append(min(self.layers[path].begin for path in read))
        return found

    def _cut(self, fitted: int) -> float:
        method, recalibrate = self.config.compensation.method, self.config.compensation.recalibrate
        inputs = fitted or _NOISE_INPUTS
        seconds = 0.0
        if method == "reconstruct":
            seconds += self._reconstructed(fitted)
        elif method in ("mean", "linear"):
            seconds += self._statistics(inputs, method == "linear")
        if recalibrate:
            seconds += (1 + self._kept) * inputs * self.rates.one
        return seconds

    def _compared(self, held_out: int) -> float:
        """The cut alone, and what a compensation makes of it."""
        models = 1 if self.config.compensation == NoCompensation() else 2
        return models * self._kept * held_out * self.rates.one

    def _reconstructed(self, fitted: int) -> float:
        """Both models as far as each layer, on so many inputs as that needs; and the normal equations."""
        share = math.sqrt(self._kept)  # of the channels of a layer
        layers = list(self.layers.values())
        needed = [rows_wanted(layer.columns + 1, layer.positions, fitted) for layer in layers]
        seconds, furthest = 0.0, 0
        ends = [*(layer.begin for layer in layers[1:]), 1.0]
        for layer, end, (rows, inputs) in reversed(list(zip(layers, ends, needed, strict=True))):
            furthest = max(furthest, inputs)
            passes = furthest * (end - layer.begin)
            if layer.calls > 1:  # to see the others, both models go on to their ends
                passes += inputs * (1 - layer.begin)
            seconds += (1 + self._kept) * passes * self.rates.one
            seconds += self._solved(
                rows, max(share * layer.columns, 1.0) + 1, share * layer.outputs, layer.groups
            )
        return seconds

    def _solved(self, rows: float, columns: float, outputs: float, groups: int) -> float:
        """Of one layer whose groups each have so many columns.

        Half of a Gram matrix is made, the rest mirrored. Each ridge takes a factorisation and a solution, all but the
        last are judged, and what the old weights leave takes two products more.
        """
        products = rows * columns * groups * ((columns + min(columns, _COLUMNS)) / 2 + outputs / groups)
        solving = groups * _RIDGES * columns**3 / 6 + (2 * _RIDGES + 1) * columns**2 * outputs
        gathered = rows * (columns * groups + 3 * outputs)
        return products * self.rates.product + solving * self.rates.solve + gathered * self.rates.number


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
        return images.of_units(units)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


def work_within(
    traced: TracedModel, config: Config, costs: Costs, images: Batch | None, seconds: float | None
) -> Work:
    """The first way to do it within so many `seconds`, or the last one; without a limit all that is asked."""
    inputs = 0 if images is None else len(images)
    seen = _whole(traced.example_inputs) if images is None else images
    effort = effort_for(config.compensation.method, seen)
    rates, layers = Rates.measured(traced.model, seen), layers_of(traced, costs.layer_macs)

    def work(config: Config, inputs: int, effort: Effort, traded: Sequence[str] = ()) -> Work:
        duration = Duration(traced, config.resolve(inputs), layers, rates)
        held_out = inputs // HELD_OUT if inputs >= LEAST_HELD_OUT else 0
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
        found,
        traded=(*found.traded, f"no more could be given up, and {time_in_words(found.total)} were expected"),
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
    less = [way for way in _WAYS if way.images * len(way.widths) < effort.images * len(effort.widths)]
    for way in less if sensitivity else ():
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
