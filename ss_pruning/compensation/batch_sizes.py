"""On how many inputs at once a model runs, and in which layout: found by running it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ss_pruning._utils.running import output_of
from ss_pruning.importance.calibration import Batch


def sizes_that_run(model: nn.Module, example: Any) -> tuple[int, int | None]:
    """How many samples the model runs on at once: a unit, of which only multiples run, and the most (None: any).

    Asked with one sample (or two where the example is one), and with twice as many as the example has.
    """
    batch = Batch.of(example)
    if not len(batch) or _runs(model, batch.resized(1 if len(batch) > 1 else 2)):
        return 1, None
    more = len(batch) > 1 and _runs(model, batch.repeated(2))
    return len(batch), None if more else len(batch)


def channels_last(model: nn.Module, batch: Batch) -> Batch:
    """The same, laid out channels last if the model runs on that, which is faster on a CPU.

    A model that calls `view` on what convolutions put out may not run.
    """
    made = replace(batch, channels_last=True)
    return made if _runs(model, made[: made.unit]) else batch


def _runs(model: nn.Module, batch: Batch) -> bool:
    try:
        output_of(model, batch.inputs)
    except Exception:  # whatever the model's own code raises for a size or layout that it was not written for
        return False
    return True
