"""How each number of a report was come by, and how far it can be trusted: as rows of (number, what is known)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ss_pruning.config import LEAST_IMAGES
from ss_pruning.report.formatting import percent
from ss_pruning.report.records import UNUSED

if TYPE_CHECKING:
    from ss_pruning.report.records import Report

_VARIANCES = {
    "batchnorm": "from the scales of the norms alone, as in the paper",
    "gaussian": "from the network run on its own noise, without data",
    "data": "measured on images",
}
#: What a model whose means were not measured on inputs does without.
_ON_NOISE = (
    " Means are those on noise; a few hundred calibration inputs tell more, and so do those that 'synthetic' makes "
    "from batch norms."
)


def certainty(report: Report) -> list[tuple[str, str]]:
    """Return (number, how it was come by and how certain it is)."""
    timed = [("latency", _latency(report))] if report.latency_ratio is not None else []
    traded = report.traded_for_time
    return [
        ("top-1", _accuracy(report)),
        (
            "multiply-accumulates",
            "Counted while the model ran on the example inputs: exact for a batch of that size.",
        ),
        ("parameters", "Counted: exact."),
        *timed,
        ("cut equals masked", _cut(report)),
        ("compensation", _compensation(report)),
        *([] if report.fidelity is None else [("fidelity", _fidelity(report))]),
        *([("calibration", _unused(report))] if UNUSED in report.settings else []),
        ("strengths", _strengths(report)),
        *([("time", f"To save time: {'; '.join(traded)}.")] if traded else []),
    ]


def standard_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy measured on so many images drawn at random, `sqrt(p (1 - p) / n)`.

    >>> round(standard_error(0.9, 100), 6)
    0.03
    """
    return math.sqrt(accuracy * (1 - accuracy) / images)


def _accuracy(report: Report) -> str:
    before, after, images = report.accuracy_before, report.accuracy_after, report.images
    if before is None or after is None:
        return "Not measured: no labelled images were given."
    if not images:
        return "Measured, on a number of images that was not recorded."
    errors = [f"{100 * standard_error(value, images):.2f}" for value in (before, after)]
    return (
        f"Measured on {images:,} images, the same for both. As a statement on other images of the kind, the standard "
        f"error is {errors[0]} points (dense) and {errors[1]} points (pruned)."
    )


def _latency(report: Report) -> str:
    batch = report.settings.get("batch")
    on = "the inputs that were given" if batch is None else f"a batch of {batch}"
    spread = report.latency_spread
    middle = (
        ""
        if spread is None
        else f" In half of the turns it was between {percent(spread[0])} and {percent(spread[1])}."
    )
    noisy = " That is on both sides of 100 %: too noisy to tell which is faster." if report.too_noisy else ""
    share = percent(report.latency_ratio or 0.0)
    return (
        f"Measured on {on}, dense and pruned in turns. The dense time is the median, the share ({share}) the median "
        f"over the turns, and the pruned time that share of the dense one.{middle}{noisy} It holds for this machine, "
        "number of threads and batch."
    )


def _cut(report: Report) -> str:
    if not math.isfinite(report.max_error):
        return "Not verified."
    precision = "double" if report.precision == "float64" else report.precision
    if report.by_decisions:
        return (
            f"On the example input the model returned no real number to compare. Verified on a copy, in {precision} "
            f"precision, is that it selects by the same numbers as the masked model, to within {report.max_error:.1e}."
        )
    return (
        f"Verified on a copy in {precision} precision before the model was touched: the outputs of the cut and of the "
        f"masked model differ by {report.max_error:.1e} of the largest output at most, on the example input."
    )


def _compensation(report: Report) -> str:
    method = report.settings.get("compensation", "none")
    norms = " Batch norms behind the cut follow what is left." if report.settings.get("recalibrate") else ""
    if report.compensation_dropped:
        return (
            f"None: {report.tried} was tried; on held-out inputs the cut alone is nearer to the dense model."
        )
    if method == "none":
        return f"None.{norms}" if norms else "None: the pruned model computes what the masked one does."
    inexact = ", ".join(report.inexact_layers)
    border = f" At zero-padded borders it is inexact in {inexact}." if inexact else ""
    skipped = "; ".join(f"{path}: {why}" for path, why in report.not_compensated.items())
    without = f" Not compensated: {skipped}." if skipped else ""
    seen = "" if report.accuracy_after is None else " The accuracy is that of the model after it."
    guessed = _ON_NOISE if method == "mean" and report.settings.get("statistics") == "gaussian" else ""
    return (
        f"{method}: changes the outputs on purpose, after the check.{norms}{seen}{border}{without}{guessed}"
    )


def _fidelity(report: Report) -> str:
    assert report.fidelity is not None
    found, alone = report.fidelity, report.fidelity_uncompensated
    on = (
        "made from the model's batch norms"
        if found.synthetic
        else "of the calibration inputs that nothing was fitted on"
    )
    without = "" if alone is None else f", of the cut alone {percent(alone.error)}"
    agreement = (
        "" if found.agreement is None else f" On {percent(found.agreement)} both put the same class first."
    )
    return (
        f"Measured on {found.inputs:,} inputs {on}; no labels are needed. The pruned model's output is off by "
        f"{percent(found.error)} of the dense output's variance (standard error {percent(found.error_deviation)}"
        f"{without}).{agreement}"
    )


def _unused(report: Report) -> str:
    return (
        f"{report.settings[UNUSED]} calibration inputs were given and not used: with fewer than {LEAST_IMAGES} that "
        "differ, the model's own noise tells more."
    )


def _sensitivity(report: Report) -> str:
    if report.sensitivity_not_measured:
        why = report.sensitivity_not_measured.rstrip(".")
        return f" Layers compete by these scores, as no output error was measured: {why}."
    if report.settings.get("scope") != "sensitivity":
        return ""
    return " How much each layer gave was decided by the output error of shrinking it, measured on calibration inputs."


def _strengths(report: Report) -> str:
    if not any(layer.strength for layer in report.layers):
        return "Not recorded."
    scored = _VARIANCES.get(str(report.settings.get("statistics")))
    told = ", less what stronger channels tell already" if report.settings.get("conditional") else ""
    chosen = f" What went was chosen by variances {scored}{told}." if scored else ""
    chosen += _sensitivity(report)
    share = percent(sum(bool(layer.strength) for layer in report.layers) / len(report.layers), 0)
    return (
        f"Computed for {share} of the layers from the scales of the norms, as in the paper; an approximation behind "
        f"activations such as SiLU and where branches of a sum are correlated.{chosen}"
    )
