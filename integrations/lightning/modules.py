"""What the callbacks for Lightning have in common: Lightning itself, and the network inside a LightningModule."""

from __future__ import annotations

from typing import Any

import torch

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "this needs Lightning 2: pip install 'ss-pruning[lightning]'", name="pytorch_lightning"
    ) from error
from torch import nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.modules import device_of
from ss_pruning.errors import InputError

__all__ = ["Callback", "DDPStrategy", "LightningModule", "Trainer", "check_whole", "moved_to", "network_of"]


def network_of(pl_module: LightningModule, path: str) -> nn.Module:
    """The network at a path in a module.

    Raises:
        InputError: There is none.
    """
    try:
        network: nn.Module = pl_module.get_submodule(path)
        return network
    except AttributeError as error:
        raise InputError(
            f"network='{path}' is no module of {type(pl_module).__name__}; name the attribute that holds the network"
        ) from error


def check_whole(trainer: Trainer, otherwise: str) -> None:
    """Refuse models of which no process has all parameters; `otherwise` says what cannot be done then, and what can.

    Raises:
        InputError: The strategy may shard or transform the parameters.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InputError(f"a model under {type(strategy).__name__} {otherwise}, or train with strategy='ddp'")


def moved_to(network: nn.Module, example_inputs: Any) -> Any:
    """Example inputs on the network's device."""
    device = device_of(network)
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), example_inputs)
