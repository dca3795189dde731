"""Synaptic strength in a Torch-Pruning script: only the importance changes.

python examples/torch_pruning/quickstart.py
"""

from __future__ import annotations

import torch
import torch_pruning as tp
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ss_pruning import SynapticImportance


def cost(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return millions of multiply-accumulates for `images`, and millions of parameters."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return counter.get_total_flops() / 2e6, parameters / 1e6


def main() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()  # your trained model goes here
    images = torch.randn(1, 3, 224, 224)
    macs_before, parameters_before = cost(model, images)

    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=SynapticImportance(),  # was: tp.importance.GroupMagnitudeImportance()
        global_pruning=True,
        pruning_ratio=0.3,
        ignored_layers=[model.fc],
        # The defaults of these four are dicts that all pruners of a process share and write to.
        pruning_ratio_dict={},
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()

    macs_after, parameters_after = cost(model, images)
    table = Table("", "before", "after", "kept", title="resnet18, random weights, 30 % of the channels cut")
    for name, before, after in (
        ("multiply-accumulates (M)", macs_before, macs_after),
        ("parameters (M)", parameters_before, parameters_after),
    ):
        table.add_row(name, f"{before:,.1f}", f"{after:,.1f}", f"{after / before:.0%}")
    Console().print(table)
    print("logits of the pruned model:", tuple(model(images).shape))


if __name__ == "__main__":
    main()
