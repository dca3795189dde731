"""The training itself: steps of imitation, measured on held-out images, the best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ss_pruning._utils.modules import parameters_of
from ss_pruning._utils.running import call
from ss_pruning.errors import InputError
from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.fidelity import HeldOut
from ss_pruning.recovery.imitation import ImitationLoss
from ss_pruning.recovery.report import HeldOutResult, Moment
from ss_pruning.recovery.settings import Recovery
from ss_pruning.recovery.views import another_view

#: So many times in a training fidelity is measured: fewer, down to the least, where that would take a larger share of
#: the time than this.
MOMENTS, FEWEST, MEASURING = 20, 4, 0.15
# The rate grows over this share of the training, from a little: Adam's first steps know little of the gradients.
_WARM, _FIRST = 0.05, 0.002
#: Steps are too large where a batch's loss, or the error on held-out images, is so many times what it was at first, or
#: that error in the last quarter no smaller: training goes back to the best weights, with so small a share of the rate.
LOSS_TOO_FAR, TOO_FAR, SLOWER = 2.0, 5.0, 1 / 4
#: Trainings of fewer steps have as much less of the rate: their last steps are to be as small beside the first.
FULL_RATE = 400
#: Images a step, unless told: fewer than the most, but no fewer than the least, where not as many steps would fit.
MOST, LEAST, WANTED = 64, 8, 200
# A tensor of nothing but zeros, such as a new bias, moves as one of this size.
_LEAST_SIZE = 1e-2


@dataclass(frozen=True)
class Length:
    """How long to train: whichever ends first.

    Attributes:
        steps: Number of steps.
        seconds: Time; the steps that fit into it are another number each time.
    """

    steps: int | None
    seconds: float | None

    def done(self, step: int, seconds: float) -> float:
        """What share of it is over, in [0, 1]."""
        return min(1.0, max(step / (self.steps or math.inf), seconds / (self.seconds or math.inf)))

    def in_all(self, step: int, seconds: float) -> float:
        """How many steps it will be, as it goes."""
        return step / done if (done := self.done(step, seconds)) else self.steps or math.inf

    def measurements(self, seconds: float) -> int:
        """How often fidelity is measured, if once takes so long."""
        if self.seconds is None:
            return MOMENTS
        return max(FEWEST, min(MOMENTS, int(MEASURING * self.seconds / seconds)))

    def batch(self, seconds: float) -> int:
        """Images a step, if one with the fewest takes so long."""
        if self.seconds is None:
            return MOST
        return max(LEAST, min(MOST, int(LEAST * self.seconds / WANTED / seconds)))


@dataclass
class State:
    """All that changes in training.

    Attributes:
        weights: The parameters that are trained, by name; those of the model.
        best_step: When that was.
        first_loss: Before the first step; None until then.
        stopped: Why training has ended; None while it has not.
        turns: How often it went back, and on with smaller steps.
    """

    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    before: HeldOutResult
    after: HeldOutResult
    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    first_loss: float | None = None
    history: list[Moment] = field(default_factory=list)
    stopped: str | None = None
    turns: int = 0


class Training:
    """Trains the pruned model of an imitation loss, whose hooks are in place."""

    def __init__(
        self, imitation: ImitationLoss, images: Batch, held_out: HeldOut, settings: Recovery, length: Length
    ) -> None:
        self.imitation, self.images, self.held_out = imitation, images, held_out
        self.settings, self.length = settings, length
        weights = {n: p for n, p in parameters_of(imitation.model).items() if p.requires_grad}
        begin = time.perf_counter()
        fidelity = held_out.measure()
        self.measurements = length.measurements(time.perf_counter() - begin)
        self.state = State(weights, _copies(weights), fidelity, fidelity)
        self.losses: list[Tensor] = []
        #: Images a step; None before a step of the fewest has told how many there is time for.
        self.batch = settings.batch or (MOST if length.seconds is None else None)
        self.sizes = list(map(_size, weights.values()))
        groups = [{"params": [weight]} for weight in weights.values()]
        self.optimizer = torch.optim.AdamW(groups, settings.rate, weight_decay=settings.weight_decay)

    def run(self, at_moment: Callable[[State], None], at_step: Callable[[State], None]) -> None:
        """Train to the end; tells how far it is after each measurement, and after each step."""
        state, begin = self.state, time.perf_counter() - self.state.seconds
        if state.stopped is None:
            self._end()
        warm = False  # the first step takes longer, on a GPU above all
        while state.stopped is None:
            moment, since = self._moment(), time.perf_counter()
            self._step()
            state.step += 1
            state.seconds = time.perf_counter() - begin
            if warm:
                self.batch = self.batch or self.length.batch(time.perf_counter() - since)
            warm = True
            at_step(state)
            if self._moment() > moment:
                self._measure()
                at_moment(state)

    def _moment(self) -> int:
        """How many measurements are due by now."""
        return int(self.measurements * self.length.done(self.state.step, self.state.seconds))

    def _step(self) -> None:
        state, settings = self.state, self.settings
        # Its own numbers in every step: training goes on after a kill as if nothing had been.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + state.step)
        batch = another_view(self._drawn(generator), settings, generator)
        self._set_rate()
        with (
            torch.enable_grad(),
            torch.autocast(_device(state), torch.bfloat16, enabled=bool(settings.dtype)),
        ):
            call(self.imitation.model, batch.inputs)
            loss = self.imitation()
        if not loss.requires_grad:
            raise InputError(
                "no parameter that may be trained reaches the feature maps: set requires_grad on those to recover, and "
                "let forward compute them without torch.no_grad"
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())
        if len(batch) < LEAST:  # losses of a few images differ by more than that anyway
            return
        if state.first_loss is None:
            state.first_loss = float(loss.detach())
        elif float(loss.detach()) > LOSS_TOO_FAR * state.first_loss:
            self._go_back()

    def _set_rate(self) -> None:
        """Each tensor moves in proportion to its size at the start, so that one rate suits wide and narrow layers."""
        now = self.state.step, self.state.seconds
        done = self.length.done(*now)
        warm = min(1.0, (done + _FIRST) / _WARM)
        whole = self.settings.rate * min(1.0, self.length.in_all(*now) / FULL_RATE)
        rate = whole * SLOWER**self.state.turns * warm * (1 + math.cos(math.pi * done)) / 2
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            group["lr"] = rate * size

    def _drawn(self, generator: torch.Generator) -> Batch:
        """A batch of the images, in units that the model runs on."""
        images, unit = self.images, self.images.unit
        most = self.batch or LEAST
        count = max(min(most, images.most or most, len(images)) // unit, 1)
        units = torch.randint(len(images) // unit, (count,), generator=generator)
        return images.of_units(units)

    def _measure(self) -> None:
        """Note fidelity, keep the weights if they are the best, and see whether to go on."""
        state = self.state
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        fidelity = self.held_out.measure()
        state.history.append(Moment(state.step, loss, fidelity))
        if fidelity.error < state.after.error:
            state.best, state.best_step, state.after = _copies(state.weights), state.step, fidelity
        else:
            last_quarter = self.length.done(state.step, state.seconds) >= 0.75
            if not fidelity.error < state.before.error * (1.0 if last_quarter else TOO_FAR):
                self._go_back()
        self._end(loss)

    @torch.no_grad()
    def _go_back(self) -> None:
        state = self.state
        for name, best in state.best.items():
            state.weights[name].copy_(best)
        self.optimizer.state.clear()
        state.turns += 1

    def _end(self, loss: float = 0.0) -> None:
        """See whether training has ended, and why."""
        state = self.state
        if not math.isfinite(loss):
            state.stopped = "diverged"
        elif state.after.error <= self.settings.until:
            state.stopped = "close enough"
        elif self.length.done(state.step, state.seconds) >= 1:
            state.stopped = "done"


def _size(weight: Tensor) -> float:
    """Root mean square."""
    return max(float(weight.detach().norm()) / math.sqrt(max(weight.numel(), 1)), _LEAST_SIZE)


def _copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _device(state: State) -> str:
    return next(iter(state.weights.values())).device.type
