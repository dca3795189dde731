"""What a pruning run did: plain records, as a table for the terminal, as JSON, and as one HTML page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ss_pruning._utils.files import write_text
from ss_pruning.errors import FileFormatError, require
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.report.formatting import (
    aligned,
    count,
    jsonable,
    milliseconds,
    percent,
    plain,
    printable,
    rich_table,
)

if TYPE_CHECKING:
    from rich.table import Table

#: The setting that says how many calibration inputs were too few to be used.
UNUSED = "calibration inputs not used"
QUANTILES = (0.0, 0.01, *(step / 20 for step in range(1, 20)), 0.99, 1.0)
"""The quantiles in `LayerReport.strength`."""

TOO_NOISY = "too noisy to tell"
"""What is said in place of a share of time that may be more or less than all of it."""

FORMAT = "ss-pruning report 3"
"""How a report in JSON begins."""


@dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer, before and after.

    Attributes:
        path: module path in the model.
        kind: class of the layer, such as `"Conv2d"`.
        inputs_before: input channels of the dense layer.
        inputs_after: input channels that stay.
        outputs_before: output channels of the dense layer.
        outputs_after: output channels that stay.
        synapses_before: connections of the dense layer, `outputs * inputs / groups`.
        synapses_after: connections that live on.
        strength: quantiles (`QUANTILES`) of the dense layer's synaptic strengths; empty where unknown.
        share_cut: fraction of the synapses that was cut; computed from the two counts where not given.
        macs_before: multiply-accumulates of the dense layer on the example inputs; None where unknown, as for the next.
        macs_after: the same, pruned.
        params_before: parameters of the dense layer.
        params_after: the same, pruned; biases that a compensation added count.
    """

    path: str
    kind: str
    inputs_before: int
    inputs_after: int
    outputs_before: int
    outputs_after: int
    synapses_before: int
    synapses_after: int
    strength: tuple[float, ...] = ()
    share_cut: float = math.nan
    macs_before: int | None = None
    macs_after: int | None = None
    params_before: int | None = None
    params_after: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.share_cut):
            kept = self.synapses_after / self.synapses_before if self.synapses_before else 1.0
            object.__setattr__(self, "share_cut", 1.0 - kept)


@dataclass(frozen=True)
class Fidelity:
    """How near a small model is to the dense one, on inputs that nothing was fitted on.

    Attributes:
        inputs: on so many inputs.
        error: mean squared difference of the outputs, as a share of the dense outputs' variance over the inputs.
        error_deviation: standard error of that mean.
        agreement: share of the inputs on which both put the same class first; None where outputs are no class scores.
        synthetic: the inputs were made from the model's batch norms.
    """

    inputs: int
    error: float
    error_deviation: float
    agreement: float | None = None
    synthetic: bool = False

    @property
    def agreement_deviation(self) -> float | None:
        """Standard error of the agreement, with two more inputs on either side: even all of a few are not certain.

        Source: Agresti and Coull (1998), "Approximate is better than exact for interval estimation of binomials".
        """
        if self.agreement is None:
            return None
        count = self.inputs + 4
        share = (self.agreement * self.inputs + 2) / count
        return float((share * (1 - share) / count) ** 0.5)

    @property
    def on(self) -> str:
        """The inputs, in words."""
        return f"{self.inputs:,} {'synthetic' if self.synthetic else 'held-out'} inputs"


@dataclass(repr=False)
class Report:
    """What a pruning run did; `prune_` returns it.

    Attributes:
        model: what the user calls the model.
        macs_before: multiply-accumulates of the dense model in a pass over the example inputs: of all images in their
            batch.
        macs_after: the same, pruned.
        params_before: parameters of the dense model.
        params_after: the same, pruned.
        layers: in the order in which they run.
        excluded: what was not pruned, and why.
        max_error: largest difference between the cut and the masked model's outputs, relative to the largest
            output.
        settings: the options in effect, by name.
        seconds: time by stage.
        seconds_expected: the same, as it was expected before the start; of the stages that take long.
        traded_for_time: what was given up to keep to `Allocation.budget_time`, in words.
        versions: package name to version.
        accuracy_before: fraction (0 to 1) of the images that the dense model gets right.
        accuracy_after: the same, pruned, with no training in between.
        images: how many images the accuracies were measured on.
        command: the command line that made the report.
        bytes_before: size of the dense model's tensors.
        bytes_after: the same, pruned.
        latency_before: seconds of a forward pass of the dense model, the median.
        latency_after: the same, pruned: `latency_ratio` of `latency_before`. Not the median of its own times, which
            were taken while the machine was as it was in other turns.
        latency_ratio: the median, over the turns, of the pruned model's time as a share of the dense model's in the
            same turn.
        latency_spread: the quartiles of that share over the turns; where they lie on both sides of 1, nobody can tell
            which model is faster.
        model_sha256: checksum in the model's file that was written with this report.
        by_decisions: nothing that the model returned on the example input could be compared (a detector that found
            nothing): what was compared, for `max_error`, too, is what the model's decisions looked at.
        precision: in which the two were compared for `max_error`: "float64", or "the model's own" where it runs in no
            other.
        sensitivity_not_measured: why it was not measured where it would have been by default.
        inexact_layers: paths of the layers where compensation is wrong at zero-padded borders.
        not_compensated: paths of the layers that could not be compensated, with the reason.
        fidelity: how near the pruned model is to the dense one on held-out calibration inputs; None without any.
        fidelity_uncompensated: the same of the cut alone.
        compensation_dropped: the compensation was not applied, since the cut alone is nearer to the dense model.
        random_weights: no weights were loaded, so that only sizes and times mean anything.
        file: where the pruned model was written.
    """

    model: str
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    layers: list[LayerReport]
    excluded: list[Excluded]
    max_error: float
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_expected: dict[str, float] = field(default_factory=dict)
    traded_for_time: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    images: int | None = None
    command: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    latency_ratio: float | None = None
    latency_spread: tuple[float, float] | None = None
    model_sha256: str | None = None
    by_decisions: bool = False
    sensitivity_not_measured: str | None = None
    inexact_layers: list[str] = field(default_factory=list)
    not_compensated: dict[str, str] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    fidelity_uncompensated: Fidelity | None = None
    compensation_dropped: bool = False
    random_weights: bool = False
    file: str | None = None
    precision: str = "float64"

    @property
    def too_noisy(self) -> bool:
        """Whether the quartiles of the latency's share lie on both sides of 1."""
        return crosses_one(self.latency_spread)

    @property
    def tried(self) -> str:
        """What was to repair the cut, in a word."""
        method = str(self.settings.get("compensation", "none"))
        return "recalibration" if method == "none" else method

    def __repr__(self) -> str:
        """Return one line: the model, and what is left of it."""
        kept = ", ".join(f"{name} {kept}" for name, _, _, kept in self.headline())
        return f"Report({printable(self.model)!r}: {kept})"

    def __str__(self) -> str:
        """Return the headline figures as a table of plain text."""
        rows = [("", "dense", "pruned", "kept"), *self.headline()]
        excluded = sum(entry.channels for entry in self.excluded)
        reasons = [f"{excluded:,} channels were excluded, see report.excluded"] if self.excluded else []
        return "\n".join([f"{printable(self.model)}, pruned", *aligned(rows), self.verification(), *reasons])

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        from ss_pruning.report.html import render_fragment

        title = f"{self.model}, pruned"
        return render_fragment(title, ("dense", "pruned", "kept"), self.headline(), [self.verification()])

    def table(self) -> Table:
        """Return the headline figures as a `rich` table.

        Raises:
            InputError: `rich` is not installed; `str` does without.
        """
        require("a table for the terminal", "cli", "rich")
        title, columns = f"{plain(self.model)}, pruned", ("", "dense", "pruned", "kept")
        return rich_table(title, columns, self.headline(), caption=self.verification())

    def headline(self) -> list[tuple[str, str, str, str]]:
        """Return the rows (name, dense, pruned, kept) of the headline table; unknown figures are left out."""
        rows = []
        if self.accuracy_before is not None and self.accuracy_after is not None:
            change = 100 * (self.accuracy_after - self.accuracy_before)
            name = f"top-1 ({self.images:,} images)" if self.images is not None else "top-1"
            before, after = (percent(value, 2) for value in (self.accuracy_before, self.accuracy_after))
            rows.append((name, before, after, f"{change:+.2f} points"))
        if self.fidelity is not None and self.fidelity.agreement is not None:
            kept = f"{percent(self.fidelity.agreement)} ± {percent(self.fidelity.agreement_deviation or 0.0)}"
            rows.append((f"same class as dense ({self.fidelity.on})", "", "", kept))
        for name, before_count, after_count, unit in (
            ("multiply-accumulates", self.macs_before, self.macs_after, ""),
            ("parameters", self.params_before, self.params_after, ""),
            ("weights", self.bytes_before, self.bytes_after, "B"),
        ):
            if before_count is not None and after_count is not None:
                kept = percent(after_count / before_count) if before_count else "-"
                rows.append((name, count(before_count, unit), count(after_count, unit), kept))
        times = self.latency_before, self.latency_after
        if self.latency_ratio is not None:
            before, after = (milliseconds(seconds) for seconds in times)
            batch = f" (batch {self.settings['batch']})" if "batch" in self.settings else ""
            kept = TOO_NOISY if self.too_noisy else percent(self.latency_ratio)
            rows.append((f"latency{batch}", before, after, kept))
        return rows

    def verification(self) -> str:
        """Return one sentence on whether the cut model computes what the masked dense model computes."""
        if not math.isfinite(self.max_error):
            return "The cut model was not compared with the masked one."
        method = self.settings.get("compensation", "none")
        after = "" if method == "none" else f" Then the remaining weights were compensated ({method})."
        if self.not_compensated:
            reasons = "; ".join(dict.fromkeys(self.not_compensated.values()))
            after += f" Layers not compensated, of those that lost inputs: {len(self.not_compensated)} ({reasons})."
        if self.compensation_dropped:
            after = f" The cut alone is nearer to the dense model than with {self.tried}, which was left out."
        elif self.settings.get("recalibrate"):
            after += " Batch norms behind the cut follow what is left."
        if self.by_decisions:
            return (
                "On the example input the model returned no real number to compare. The numbers by which it "
                f"selects are the masked model's, to within {self.max_error:.1e}.{after}"
            )
        where = "" if self.precision == "float64" else f", in {self.precision} precision"
        return (
            "Cut equals masked: the largest difference between their outputs is "
            f"{self.max_error:.1e} of the largest output{where}.{after}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values; `from_dict` reads it back."""
        return {"format": FORMAT, **{item.name: jsonable(getattr(self, item.name)) for item in fields(self)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Read what `to_dict` wrote.

        Raises:
            FileFormatError: a field is missing, unknown or of the wrong type.
        """
        from ss_pruning.report.reading import report_from

        return report_from(values)

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            InputError: the folder is missing or cannot be written to.
        """
        write_text(path, self.to_json())

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that `save_json` wrote.

        Raises:
            FileFormatError: the file is missing, truncated or no report.
        """
        # A FIFO would wait forever, /dev/zero fill the memory.
        if os.path.exists(path) and not os.path.isfile(path):
            raise FileFormatError(f"cannot read the report {str(path)!r}: it is no regular file.")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FileFormatError(
                f"cannot read the report {str(path)!r}: {error}. Give what `save_json` has written, or a folder of "
                "ss-prune prune --out."
            ) from error
        if not isinstance(values, dict):
            raise FileFormatError(f"{str(path)!r} holds no report but a {type(values).__name__}.")
        return cls.from_dict(values)

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page: no script, no network, figures as inline SVG."""
        from ss_pruning.report.html import render

        return render(self)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the HTML page, whole or not at all.

        Raises:
            InputError: the folder is missing or cannot be written to.
        """
        write_text(path, self.to_html())


def crosses_one(spread: tuple[float, float] | None) -> bool:
    """Whether quartiles of a share lie on both sides of 1: neither side can be called the smaller.

    >>> crosses_one((0.9, 1.2)), crosses_one((0.7, 0.9)), crosses_one((1.0, 1.0)), crosses_one(None)
    (True, False, False, False)
    """
    return spread is not None and spread[0] < 1 < spread[1]
