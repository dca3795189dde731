"""Train with a penalty on synaptic strengths, prune synapses, fine-tune, compact: on scikit-learn's digits, one minute.

    python examples/sparse_training/synapses.py
    python examples/sparse_training/synapses.py --penalty 0     # as a comparison

The method is that of Lin et al. (NeurIPS 2018). On CIFAR-10, with nets of their kind, resumable, it is
`python -m benchmarks.sparse_training.paper`. Needs `pip install 'ss-pruning[demo]'`.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from ss_pruning import StrengthPenalty, compact_, synaptic_strength
from ss_pruning.sources.demo import digits_data, digits_resnet
from ss_pruning.sparsity.masks import mask_, merge_masks_, synapse_masks

BATCH = 64


def train(model: nn.Module, epochs: int, rate: float, penalty: StrengthPenalty | None, weight: float) -> None:
    """Train in place; each step of the penalty shrinks all kernels, the weakest to nothing."""
    images, labels = digits_data("train").tensors
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-3, nesterov=True)
    steps = epochs * (len(images) // BATCH + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for chosen in (part for _ in range(epochs) for part in torch.randperm(len(images)).split(BATCH)):
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if penalty is not None:
            penalty.shrink_(weight * optimizer.param_groups[0]["lr"])
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images whose digit is told, in %."""
    images, labels = digits_data("test").tensors
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--penalty", type=float, default=1e-3, help="weight of the penalty in training")
    parser.add_argument("--sparsity", type=float, default=0.6, help="share of the synapses that goes")
    parser.add_argument("--epochs", type=int, default=15, help="of training; a third as many of fine-tuning")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    model, example = digits_resnet(), digits_data("test").tensors[0][:1]
    train(model, chosen.epochs, 0.1, StrengthPenalty(model, example), chosen.penalty)
    print(f"trained: {accuracy(model):.1f} %")
    inner = StrengthPenalty(model, example).paths  # neither the first layer nor the classifier
    strengths = synaptic_strength(model, example)
    mask_(model, synapse_masks({path: strengths[path] for path in inner}, fraction=chosen.sparsity))
    print(f"{chosen.sparsity:.0%} of the synapses masked: {accuracy(model):.1f} %")
    train(model, chosen.epochs // 3, 0.02, None, 0.0)
    print(f"fine-tuned: {accuracy(model):.1f} %")
    merge_masks_(model)
    made = compact_(model.eval(), example)
    shares = made.after.params / made.before.params, made.after.macs / made.before.macs
    print(
        f"compacted: {accuracy(model):.1f} %, with {shares[0]:.0%} of the parameters, {shares[1]:.0%} of the MACs"
    )


if __name__ == "__main__":
    main()
