"""NNI from config list to small model: mask synapses of a trained model, fine-tune under the masks, cut what is dead.

python examples/nni/config.py                      # the demo network on scikit-learn's digits
python examples/nni/config.py --ratio 0.9 --epochs 30

Needs NNI and scikit-learn: pip install 'ss-pruning[cli,nni,demo]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import ss_pruning
from ss_pruning.integrations.nni.pruner import SynapticStrengthPruner, compact
from ss_pruning.sources.demo import digits_data, digits_resnet, digits_weights


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Return the share of the test digits that the model gets right."""
    images, labels = digits_data("test").tensors
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def fine_tune(model: nn.Module, epochs: int) -> None:
    """Train in place; what NNI has masked stays masked, since its wrappers apply the masks in every forward pass."""
    images, labels = digits_data("train").tensors
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.8, help="share of the synapses' weights to mask")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of fine-tuning under the masks")
    parser.add_argument("--out", type=Path, default=Path("runs/nni_digits.safetensors"), help="file to save")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.manual_seed(0)
    model = digits_resnet()
    model.load_state_dict(load_file(digits_weights()))
    images = digits_data("calibration").tensors[0][:2]
    rows = [("dense", accuracy(model))]

    config_list = [
        {
            "op_types": ["Conv2d"],
            "exclude_op_names": ["conv1"],  # the first layer is small and matters most
            "granularity": [1, 1, -1, -1],  # one mask value a synapse: a 2-D kernel
            "sparse_ratio": chosen.ratio,
            "global_group_id": "all",  # all layers in one order
            "max_sparse_ratio": 0.98,
        }
    ]
    pruner = SynapticStrengthPruner(model, config_list, images)
    _, masks = pruner.compress()
    rows.append(("masked", accuracy(model)))
    fine_tune(model, chosen.epochs)
    rows.append(("fine-tuned", accuracy(model)))

    small, report = compact(model, masks, images)
    rows.append(("compacted", accuracy(small)))
    console = Console()
    console.print(report.table())
    table = Table("", "top-1 (500 test digits)")
    for name, share in rows:
        table.add_row(name, f"{100 * share:.1f} %")
    console.print(table)
    for left in report.excluded:
        print(f"stays: {left.channels} channels ({left.reason})")

    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    ss_pruning.save(small, chosen.out, architecture="demo:digits")
    same = ss_pruning.load(chosen.out)
    print(f"saved {chosen.out}; loaded again: top-1 {100 * accuracy(same):.1f} %")


if __name__ == "__main__":
    main()
