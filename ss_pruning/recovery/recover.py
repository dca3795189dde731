"""`recover_`: from a pruned model to one that does nearly what the dense one did, in minutes and without labels."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.copying import copied
from ss_pruning._utils.files import check_writable
from ss_pruning._utils.modules import device_of, parameters_of, tensors_of
from ss_pruning._utils.progress import Progress, reporter
from ss_pruning._utils.running import quiet_hooks, same_random_numbers
from ss_pruning.compensation.batch_sizes import sizes_that_run
from ss_pruning.compensation.synthetic_data import synthetic_images
from ss_pruning.config import SYNTHETIC, SyntheticImages, is_count, is_number
from ss_pruning.errors import InputError
from ss_pruning.graph.refusals import check_bare, check_finite, usable_inputs
from ss_pruning.importance.calibration import Batch, gather
from ss_pruning.recovery.checkpoint import Checkpoint
from ss_pruning.recovery.fidelity import HeldOut
from ss_pruning.recovery.imitation import ImitationLoss
from ss_pruning.recovery.report import RecoveryReport
from ss_pruning.recovery.settings import Recovery
from ss_pruning.recovery.training import MOST, SLOWER, Length, State, Training
from ss_pruning.recovery.views import another_view
from ss_pruning.surgery.plan import cut_like, plan_of

#: Trained for so many steps by default.
STEPS = 1000
# Of a data loader, whose images have to fit into memory, no more are taken.
_MOST = 4096
# Minutes of a year.
_LONGEST = 366 * 24 * 60
# With fewer images little is to be expected, and fidelity is measured on next to nothing.
_FEW = 100


def recover_(
    model: nn.Module,
    dense: nn.Module,
    images: Any,
    *,
    example_inputs: Any = None,
    steps: int | None = None,
    minutes: float | None = None,
    settings: Recovery | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> RecoveryReport:
    """Train a pruned model in place to have the dense model's feature maps, without labels.

    At the ends of blocks and stages of the network, which are found by running both models, the pruned model's feature
    maps are compared with the same channels of the dense ones, see `ImitationLoss`. What comes behind the last of them,
    such as a classifier, stays as it is, and so do the statistics of norms and parameters with `requires_grad=False`.
    Images are shifted and mirrored (`Recovery`). A part of the images is held out; the model ends with the weights that
    did best on them, the ones that it came with included: there it is never worse than before.

    With the same seed, images and `steps` the outcome is the same on the same machine. On an error the model is as it
    was; after Ctrl-C it has the best weights so far.

    Args:
        model: What `prune_` or `compact_` has made, of whatever compensation, or what `load` has read.
        dense: The model that was pruned, with its weights; not changed.
        images: Unlabelled inputs: a tensor, or an iterable of batches (a data loader), of which 4,096 images are taken.
            A few hundred are enough. Or "synthetic", or `SyntheticImages(...)`: images made from the dense model's
            batch norms.
        example_inputs: What `forward` takes; needed for synthetic images, and where that is not one tensor.
        steps: Of gradient descent; 1,000 by default.
        minutes: Time that they may take; together with `steps`, whichever ends first.
        settings: How to train.
        checkpoint: File in which the training is kept. The same call goes on from it after an interruption.
        progress: Called with ("recover", done, total).

    Returns:
        What was done, see `RecoveryReport`; print it.

    Raises:
        InputError: The dense model is another one, the images are not what the models take, or an argument is wrong.
        ModelError: A model holds NaN or Inf weights.

    Examples:
        >>> import copy, ss_pruning, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        ...     nn.Linear(128, 4))
        >>> dense, images = copy.deepcopy(net), torch.randn(16, 3, 8, 8)
        >>> report = ss_pruning.prune_(net, images[:1], macs=0.5)
        >>> recovered = ss_pruning.recover_(net, dense, images, steps=20)
        >>> recovered.after.error <= recovered.before.error
        True
    """
    length, settings, progress = _length(steps, minutes), settings or Recovery(), reporter(progress)
    if not isinstance(settings, Recovery):
        raise InputError(f"settings={settings!r:.80} are none; give Recovery(...)")
    _check(model, dense)
    if checkpoint is not None:
        check_writable(checkpoint)
    batch = _inputs(images, dense, example_inputs).mapped(lambda x: x.to(device_of(model)))
    example = batch[:1].inputs if example_inputs is None else usable_inputs(example_inputs)
    with (
        torch.inference_mode(False),
        quiet_hooks(model, example),
        quiet_hooks(dense, example),
        same_random_numbers(model),
    ):
        student = copied(model).eval()
        batch = batch.limited(*sizes_that_run(dense, example))
        shown, hidden = _parts(batch, settings)
        with ImitationLoss(student, dense, example) as imitation:
            held_out = HeldOut(imitation, hidden, settings.batch or MOST)
            _check_built(model, student)
            training = Training(imitation, shown, held_out, settings, length)
            stopped = _trained(training, checkpoint, progress)
    _adopt_(model, training.state)
    return _report(training, stopped, len(shown), len(hidden))


def _length(steps: int | None, minutes: float | None) -> Length:
    if steps is not None and not is_count(steps):
        raise InputError(f"steps={steps!r} must be a positive whole number")
    if minutes is not None and not (is_number(minutes) and 0 < minutes <= _LONGEST):
        raise InputError(f"minutes={minutes!r} must be a positive number, of at most a year")
    if steps is None and minutes is None:
        steps = STEPS
    return Length(None if steps is None else int(steps), None if minutes is None else 60 * float(minutes))


def _check(model: nn.Module, dense: nn.Module) -> None:
    """Refuse models of which one is not what the other was cut to."""
    for net in (model, dense):
        check_bare(net, "recover")
        check_finite(net)
    fresh = cut_like(model, dense)
    if not plan_of(model).cuts and all(
        torch.equal(a, b) for a, b in zip(tensors_of(model).values(), tensors_of(dense).values(), strict=True)
    ):
        raise InputError(
            "the model was not pruned: it is the same as dense, so that there is nothing to recover"
        )
    _check_trainable(model, fresh)


def _check_trainable(model: nn.Module, fresh: nn.Module) -> None:
    """Refuse number types that training fails in; `fresh` is the dense model, cut like `model`."""
    ours, theirs = parameters_of(model), parameters_of(fresh)
    odd = next((name for name, p in ours.items() if p.dtype != theirs[name].dtype), None)
    if odd is not None:
        raise InputError(
            f"'{odd}' is {ours[odd].dtype} in the model, {theirs[odd].dtype} in dense: bring both to one, such as "
            "model.float() and dense.float()"
        )
    trained = {name: p for name, p in ours.items() if p.requires_grad}
    if not trained:
        raise InputError("no parameter may be trained: model.requires_grad_(True) lets them")
    half = next((name for name, p in trained.items() if p.dtype == torch.float16), None)
    if half is not None:
        raise InputError(
            f"'{half}' is float16, in which Adam's steps vanish or overflow: recover model.float() with dense.float(), "
            "and take model.half() afterwards"
        )


def _check_built(model: nn.Module, student: nn.Module) -> None:
    """Refuse a model of which a copy has got new parameters by running."""
    new = sorted(parameters_of(student).keys() - parameters_of(model).keys())
    if new:
        raise InputError(
            f"'{new[0]}' is made in the first forward pass, by chance: run both models once, and load their weights, "
            "before recovery"
        )


def _inputs(images: Any, dense: nn.Module, example: Any) -> Batch:
    """All images as one batch."""
    example = None if example is None else usable_inputs(example)
    if isinstance(images, str):
        if images != SYNTHETIC:
            raise InputError(f"images={images!r} is unknown; give inputs, or {SYNTHETIC!r} to make some")
        images = SyntheticImages()
    if isinstance(images, SyntheticImages):
        if example is None:
            raise InputError("synthetic images need example_inputs=, which tell their size")
        return gather(synthetic_images(dense, example, images), example)
    most = len(images) if isinstance(images, Tensor) and images.dim() else _MOST
    return gather(images, example, most)


def _parts(batch: Batch, settings: Recovery) -> tuple[Batch, Batch]:
    """What to train on, and what is held out."""
    units = len(batch) // batch.unit
    if units < 2:
        raise InputError(
            f"there are {len(batch)} images, of which a part is held out; give at least {2 * batch.unit}. Expect "
            f"little of fewer than {_FEW}; a few hundred are enough"
        )
    order = torch.randperm(units, generator=torch.Generator().manual_seed(settings.seed))
    hidden = min(max(round(settings.held_out * units), 1), units - 1)
    shown, kept_back = (batch.of_units(part.sort().values) for part in (order[hidden:], order[:hidden]))
    # Compensation may have fitted the very images: views of them are new to it.
    generator = torch.Generator().manual_seed(settings.seed)
    return shown, another_view(kept_back, settings, generator)


def _trained(training: Training, checkpoint: str | os.PathLike[str] | None, progress: Progress) -> str:
    """Train to the end, or until Ctrl-C; why it ended."""
    length = training.length

    def tell(state: State) -> None:
        total = length.steps or round(length.seconds or 0)
        progress("recover", min(total, int(total * length.done(state.step, state.seconds))), total)

    file = None if checkpoint is None else Checkpoint(checkpoint, training)
    if file is not None:
        file.restore()
    try:
        training.run((lambda _: file.save()) if file else (lambda _: None), tell)
    except KeyboardInterrupt:
        return "interrupted"
    return training.state.stopped or "done"


@torch.no_grad()
def _adopt_(model: nn.Module, state: State) -> None:
    """Give the model the best weights, in one call between whose steps no interrupt comes."""
    weights = parameters_of(model)
    moved = {name: best for name, best in state.best.items() if not torch.equal(weights[name], best)}
    if moved:
        torch._foreach_copy_([weights[name] for name in moved], list(moved.values()))


def _report(training: Training, stopped: str, images: int, held_out: int) -> RecoveryReport:
    state, notes = training.state, []
    if images + held_out < _FEW:
        notes.append(
            f"{images + held_out} images are few: expect little, and more of a few hundred; fidelity on {held_out} "
            "held-out images is rough"
        )
    if stopped == "diverged":
        notes.append("the loss became NaN or Inf, and the best weights until then are kept: lower the rate")
    if state.turns:
        times = "once" if state.turns == 1 else f"{state.turns} times"
        notes.append(
            f"steps were too large {times}, and were taken back: the rate came down from "
            f"{training.settings.rate:.2g} to {training.settings.rate * SLOWER**state.turns:.2g}"
        )
    if stopped == "close enough" and not state.step:
        notes.append(
            f"the held-out error was no larger than {training.settings.until:g}: there was nothing to recover"
        )
    elif not state.best_step:
        notes.append("no weights did better on the held-out images than those that the model came with")
    return RecoveryReport(
        places=tuple(place.path for place in training.imitation.places),
        images=images,
        held_out=held_out,
        before=state.before,
        after=state.after,
        history=tuple(state.history),
        best_step=state.best_step,
        steps=state.step,
        seconds=state.seconds,
        stopped=stopped,  # type: ignore[arg-type]
        notes=tuple(notes),
    )
