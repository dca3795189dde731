"""Lightning: a callback that adds the penalty, prunes at an epoch and keeps masks. Needs the extra `lightning`.

    prune = StrengthPruning(torch.zeros(1, 3, 224, 224), weight=1e-4, epoch=20, sparsity=0.6, macs=0.7)
    Trainer(max_epochs=30, callbacks=[prune]).fit(module, loader)
    merge_masks_(module.model)

Works with one device and with DistributedDataParallel; all ranks cut the same channels, or all raise. Checkpoints hold
the plan and the masks: `trainer.fit(module, loader, ckpt_path=...)` goes on from any, before or after the cut.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ss_pruning.errors import InputError
from ss_pruning.integrations.lightning.modules import (
    Callback,
    DDPStrategy,
    LightningModule,
    Trainer,
    check_whole,
    moved_to,
    network_of,
)
from ss_pruning.io.distributed import sparsify_
from ss_pruning.pruning import plan
from ss_pruning.sparsity.masks import mask_, masks_of
from ss_pruning.sparsity.penalty import Form, StrengthPenalty, warm_up
from ss_pruning.surgery.plan import Plan

__all__ = ["StrengthPruning"]


class StrengthPruning(Callback):  # type: ignore[misc]
    """Sparse training, pruning and masked fine-tuning in one `Trainer.fit`.

    The gradient of the penalty is added once for each step of the optimiser, after gradients are accumulated and
    unscaled and before they are clipped, until the model is pruned. Pruning happens before the first batch of epoch
    `epoch`. It makes new parameters, so `configure_optimizers` is called again: momenta are lost, and schedules of the
    learning rate start anew (look at `self.trainer.current_epoch` there if they should not).

    Attributes:
        pruned: Whether the model has been pruned.
        plan: Which channels stayed.
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        network: str = "model",
        weight: float = 0.0,
        form: Form = "strength",
        warm_up_steps: int = 0,
        epoch: int | None = None,
        macs: float | None = None,
        sparsity: float | None = None,
        **options: Any,
    ) -> None:
        """Describe what is to be done.

        Args:
            example_inputs: What the network's `forward` takes: a tensor, a tuple of positional or a dict of keyword
                arguments.
            network: Path of the network in the LightningModule; "" for the module itself.
            weight: Of the penalty; 0 for none.
            form: See `StrengthPenalty`.
            warm_up_steps: Steps in which the weight rises.
            epoch: Prune before this epoch, counted from 0; None for never.
            macs: Share of the multiply-accumulates to keep: cuts channels.
            sparsity: Share of the synapses to mask, the weakest. They stay 0.
            options: More arguments of `prune_`, such as `ignore` and `round_to`.

        Raises:
            InputError: An epoch without anything to do then, or the other way round.
        """
        if (epoch is None) != (macs is None and sparsity is None):
            raise InputError(
                f"epoch={epoch}, macs={macs}, sparsity={sparsity}: give an epoch and what to prune then"
            )
        self.example_inputs, self.network = example_inputs, network
        self.weight, self.form, self.warm_up_steps = weight, form, warm_up_steps
        self.epoch, self.macs, self.sparsity, self.options = epoch, macs, sparsity, options
        self.pruned, self.plan = False, Plan()
        self._penalty: StrengthPenalty | None = None
        self._masks: dict[str, torch.Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded models, and see to it that a checkpoint finds the shapes that it was saved with."""
        check_whole(trainer, "cannot be pruned while it trains: prune it before (ss_pruning.prune_)")
        self._network(pl_module)
        if stage == "fit" and not self.pruned:
            self._warn_of(trainer)
        loads = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._reshape(pl_module, checkpoint)
            loads(checkpoint)

        # Lightning asks the module before it loads the tensors, but callbacks only after.
        pl_module.on_load_checkpoint = on_load_checkpoint

    def _warn_of(self, trainer: Trainer) -> None:
        """An epoch that does not come."""
        last = trainer.max_epochs
        if (
            self.epoch is not None
            and last is not None
            and 0 <= last <= self.epoch
            and not trainer.fast_dev_run
        ):
            warnings.warn(
                f"epoch={self.epoch} is never reached in max_epochs={last}: nothing is pruned here",
                stacklevel=2,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo `setup`."""
        vars(pl_module).pop("on_load_checkpoint", None)
        self._penalty = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if it is time."""
        if trainer.current_epoch == self.epoch and not self.pruned:
            self._prune(self._network(pl_module))
            _renew(trainer)
        self._penalty, network = None, self._network(pl_module)
        if self.weight and not self.pruned:
            inputs = moved_to(network, self.example_inputs)
            self._penalty = StrengthPenalty(network, inputs, form=self.form)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add the gradient of the penalty."""
        if self._penalty is not None:
            self._penalty.add_gradients_(self.weight * warm_up(trainer.global_step, self.warm_up_steps))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of this."""
        return {"pruned": self.pruned, "plan": self.plan.to_json(), "masks": self._masks}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the masks that the network has now."""
        checkpoint["callbacks"][self.state_key] = {
            **self.state_dict(),
            "masks": masks_of(self._network(pl_module)),
        }

    def _network(self, pl_module: LightningModule) -> nn.Module:
        return network_of(pl_module, self.network)

    def _reshape(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Cut and mask a module as the one was that the checkpoint is of."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is None or self.pruned:
            return
        network = self._network(pl_module)
        self.pruned, self.plan = saved["pruned"], Plan.from_json(saved["plan"])
        mask_(self.plan.apply_(network), saved["masks"])

    def _prune(self, network: nn.Module) -> None:
        """Mask the weakest synapses, cut channels; what is zero stays zero."""
        inputs = moved_to(network, self.example_inputs)

        def planned() -> Plan:
            return plan(network, inputs, macs=self.macs, **self.options)[0]

        self.plan = sparsify_(
            [network],
            inputs,
            sparsity=self.sparsity,
            planned=None if self.macs is None else planned,
            keep_zeros=bool(masks_of(network)),
        )
        self.pruned = True


def _renew(trainer: Trainer) -> None:
    """Let the strategy forget the old parameters."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)
