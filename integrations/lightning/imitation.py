"""Lightning: a callback that adds the imitation loss, so that a dense model teaches a pruned one.

    module.model = ss_pruning.load("pruned.safetensors", build)
    Trainer(max_epochs=10, callbacks=[Imitation(dense, torch.zeros(1, 3, 224, 224))]).fit(module, loader)

Works with one device and with DistributedDataParallel, alone or with `StrengthPruning`, which may prune on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ss_pruning.errors import InputError
from ss_pruning.integrations.lightning.modules import (
    Callback,
    LightningModule,
    Trainer,
    check_whole,
    moved_to,
    network_of,
)
from ss_pruning.recovery.imitation import ImitationLoss
from ss_pruning.surgery.plan import Plan, plan_of

__all__ = ["Imitation"]


class Imitation(Callback):  # type: ignore[misc]
    """Adds the distance to a dense model's feature maps to the loss that `training_step` returns.

    See `ss_pruning.ImitationLoss`. It counts as any other term of the loss does, under mixed precision and accumulated
    gradients, too, and is logged as "imitation". Where `training_step` runs the network several times, the last pass is
    compared.
    """

    def __init__(
        self, dense: nn.Module, example_inputs: Any, *, network: str = "model", weight: float = 1.0
    ) -> None:
        """Describe what is to be imitated.

        Args:
            dense: The model that was pruned, or will be, with its weights; not changed, and in no checkpoint.
            example_inputs: What the network's `forward` takes: a tensor, a tuple of positional or a dict of keyword
                arguments.
            network: Path of the network in the LightningModule; "" for the module itself.
            weight: Of the imitation loss, beside the loss of the task.
        """
        self.dense, self.example_inputs, self.network, self.weight = dense, example_inputs, network, weight
        self._loss: ImitationLoss | None = None
        self._plan = Plan()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the term added to what `training_step` returns.

        Raises:
            InputError: Gradients are the module's own affair, no process has the whole model, or there is no network.
        """
        check_whole(trainer, "cannot be compared with a dense one: recover it before (ss_pruning.recover_)")
        if not pl_module.automatic_optimization:
            raise InputError(
                f"{type(pl_module).__name__} optimises by hand: add ss_pruning.ImitationLoss to its loss there"
            )
        network_of(pl_module, self.network)
        if stage != "fit":
            return
        plain = pl_module.training_step

        @functools.wraps(plain)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            assert self._loss is not None
            with self._loss as imitation:
                output = plain(*args, **kwargs)
                return output if output is None else self._with(imitation, output, pl_module)

        pl_module.training_step = training_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo `setup`."""
        vars(pl_module).pop("training_step", None)
        self._loss = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find where to compare, at first and when the network was pruned."""
        network = network_of(pl_module, self.network)
        plan = plan_of(network)
        if self._loss is None or plan is not self._plan:
            inputs = moved_to(network, self.example_inputs)
            self._loss = ImitationLoss(network, self.dense, inputs, lambda x: _sum(trainer, x))
            self._plan = plan

    def _with(self, imitation: ImitationLoss, output: Any, pl_module: LightningModule) -> Any:
        """What `training_step` returned, with the term in its loss."""
        distance = imitation()
        pl_module.log("imitation", distance.detach())
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + self.weight * distance}
        return output + self.weight * distance


def _sum(trainer: Trainer, total: Tensor) -> Tensor:
    """A number, added up over all processes."""
    added: Tensor = trainer.strategy.reduce(total, reduce_op="sum")
    return added
