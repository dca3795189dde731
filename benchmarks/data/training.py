"""A training loop for the small nets here: one core will do, and a run that was killed goes on.

After every epoch a checkpoint holds model, optimiser, schedule and log; the images of an epoch are drawn by seed and
epoch alone. A killed run therefore goes on from its last whole epoch and ends with the same weights.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from benchmarks.data.cifar import Images, as_input, augmented
from ss_pruning.errors import InputError, ModelError

MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """How a net is trained.

    Attributes:
        epochs: Passes over the images.
        rate: The largest learning rate.
        batch: Images a step.
        weight_decay: On weights of layers, not on norms and biases.
        schedule: "one cycle": up over the first `warm_up` of all steps, then down to nothing; "steps": divided by 10
            at half and at three quarters.
        bf16: Compute in bfloat16; weights stay float32.
        seed: Draws and shifts the images.
        frozen_norms: Batch norms keep their statistics, and use them.
        optimiser: "sgd" with Nesterov momentum, or "adamw".
    """

    epochs: int
    rate: float = 0.1
    batch: int = 128
    weight_decay: float = 5e-4
    schedule: Literal["one cycle", "steps"] = "one cycle"
    warm_up: float = 0.25
    bf16: bool = False
    seed: int = 0
    frozen_norms: bool = False
    optimiser: Literal["sgd", "adamw"] = "sgd"


class Regulariser(Protocol):
    """What sparse training adds to a step."""

    def loss(self, step: int) -> Tensor | float:
        """Added to the loss of step `step`."""

    def after(self, step: int, rate: float) -> None:
        """Called after the optimiser's step, with its learning rate."""


def optimiser(model: nn.Module, recipe: Recipe, steps: int) -> tuple[Optimizer, LRScheduler]:
    """The recipe's optimiser, and the schedule of its rate over `steps`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    chosen: Optimizer
    if recipe.optimiser == "adamw":
        chosen = torch.optim.AdamW(groups, lr=recipe.rate)
    else:
        chosen = torch.optim.SGD(groups, lr=recipe.rate, momentum=MOMENTUM, nesterov=True)
    if recipe.schedule == "steps" or steps < 4:
        return chosen, MultiStepLR(chosen, [steps // 2, steps * 3 // 4])
    warm_up = max(recipe.warm_up, 2 / steps)  # a cycle has to rise for at least two steps
    return chosen, OneCycleLR(chosen, recipe.rate, total_steps=steps, pct_start=warm_up)


def train_epoch(
    model: nn.Module,
    images: Images,
    stepper: Optimizer,
    schedule: LRScheduler,
    recipe: Recipe,
    epoch: int = 0,
    regulariser: Regulariser | None = None,
) -> float:
    """One pass over the images; returns the mean loss, penalty aside.

    Raises:
        ModelError: The loss is NaN or infinite; nothing of that step was applied.
    """
    generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
    device = next(model.parameters()).device
    model.train()
    for module in model.modules() if recipe.frozen_norms else ():
        module.train(not isinstance(module, nn.modules.batchnorm._BatchNorm))
    total, steps = 0.0, 0
    for pixels, labels in augmented(images, recipe.batch, generator):
        step = schedule.last_epoch
        stepper.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            outputs = model(as_input(pixels).to(device))
        loss = F.cross_entropy(outputs.float(), labels.to(device))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the loss is {value} in epoch {epoch + 1}, step {steps + 1}: lower the learning rate or the penalty"
            )
        (loss + regulariser.loss(step) if regulariser else loss).backward()
        stepper.step()
        if regulariser:
            regulariser.after(step, stepper.param_groups[0]["lr"])
        schedule.step()
        total, steps = total + value, steps + 1
    return total / max(steps, 1)


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    checkpoint: Path,
    say: Callable[[str], None],
    regulariser: Regulariser | None = None,
) -> list[dict[str, float]]:
    """Train, or go on training, in place; returns the log by epoch.

    Raises:
        InputError: The checkpoint is of another recipe.
        ModelError: The loss is NaN or infinite.
    """
    steps = max(1, len(images[0]) // recipe.batch) * recipe.epochs
    stepper, schedule = optimiser(model, recipe, steps)
    log: list[dict[str, float]] = []
    parts: dict[str, Any] = {"model": model, "optimiser": stepper, "schedule": schedule}
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise InputError(f"'{checkpoint}' is of another recipe: delete it, or train in another folder")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log = saved["log"]
        say(f"going on after epoch {len(log)}")
    for epoch in range(len(log), recipe.epochs):
        started = time.process_time()
        loss = train_epoch(model, images, stepper, schedule, recipe, epoch, regulariser)
        log.append({"epoch": epoch + 1, "loss": loss, "cpu_seconds": time.process_time() - started})
        say(f"epoch {epoch + 1}/{recipe.epochs}: loss {loss:.3f}, {log[-1]['cpu_seconds']:.0f} CPU s")
        states = {name: part.state_dict() for name, part in parts.items()}
        save_atomically({**states, "log": log, "recipe": asdict(recipe)}, checkpoint)
    return log


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """A consumer never sees half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
