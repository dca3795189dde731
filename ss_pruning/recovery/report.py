"""What a recovery did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ss_pruning.report.formatting import aligned, percent


@dataclass(frozen=True)
class HeldOutResult:
    """How close a pruned model is to the dense one on held-out images.

    Attributes:
        error: Relative squared error of the output, by which training is judged: as in `ImitationLoss`, against the
            variance of all its numbers (the pruning report's is against the variance over the inputs); of the feature
            maps where outputs have no common shape.
        agreement: Share of the images in which both models name the same class; None where the output is no
            `[images, classes]`.
    """

    error: float
    agreement: float | None = None

    def __str__(self) -> str:
        same = "" if self.agreement is None else f", same class {percent(self.agreement)}"
        return f"error {self.error:.4f}{same}"


@dataclass(frozen=True)
class Moment:
    """How far the training was at one moment.

    Attributes:
        step: Steps done.
        loss: Mean imitation loss since the last moment.
        fidelity: On the held-out images.
    """

    step: int
    loss: float
    fidelity: HeldOutResult


@dataclass(frozen=True)
class RecoveryReport:
    """What `recover_` did.

    Attributes:
        places: Paths of the modules whose outputs were compared; "" is the whole model.
        images: Images trained on.
        held_out: Images that the fidelity was measured on.
        before: Fidelity before, on the held-out images.
        after: Fidelity of the weights that the model has now; its error is no larger than before.
        history: The course of the training.
        best_step: Steps after which the model had the weights that it has now; 0: those it came with.
        steps: Steps done.
        seconds: Time taken, that of the runs before a resumption included.
        stopped: Why training ended: "done" as planned, "close enough" by `Recovery.until`, "diverged" with a loss that
            is no number, or "interrupted" from the keyboard.
        notes: What to know of the result.
    """

    places: tuple[str, ...]
    images: int
    held_out: int
    before: HeldOutResult
    after: HeldOutResult
    history: tuple[Moment, ...]
    best_step: int
    steps: int
    seconds: float
    stopped: Literal["done", "close enough", "diverged", "interrupted"]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("step", "loss", "held-out error", "same class"), _row("before", None, self.before)]
        rows += [_row(str(m.step), m.loss, m.fidelity) for m in self.history]
        rows += [_row(f"kept: {self.best_step}", None, self.after)]
        what = f"{self.steps} steps on {self.images} images in {self.seconds:.0f} s, {self.held_out} held out"
        return "\n".join([*aligned(rows), what, *self.notes])


def _row(name: str, loss: float | None, fidelity: HeldOutResult) -> tuple[str, ...]:
    agreement = "-" if fidelity.agreement is None else percent(fidelity.agreement)
    return name, "-" if loss is None else f"{loss:.4f}", f"{fidelity.error:.4f}", agreement
