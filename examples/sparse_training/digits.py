"""Train the demo network on scikit-learn's digits; takes about a minute on one core.

An L1 penalty on the scales of the norms lets channels that are not needed fade, so that pruning finds some
to take away, which is the usual preparation where no fine-tuning follows. `--sparsity 0` trains without it.

python examples/sparse_training/digits.py            # writes digits_resnet.safetensors into the current folder

The weights that ship with the package were made by this script:
python examples/sparse_training/digits.py --out ss_pruning/sources/demo/digits_resnet.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning.sources.demo import digits_data, digits_resnet

BATCH = 64


def shifted(images: Tensor) -> Tensor:
    """Move each image by up to one pixel in each direction; the border repeats."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    top, left = torch.randint(0, 3, (2, len(images), 1, 1, 1))
    rows = top + torch.arange(8).view(1, 1, 8, 1)
    columns = left + torch.arange(8).view(1, 1, 1, 8)
    return padded[torch.arange(len(images)).view(-1, 1, 1, 1), 0, rows, columns]


def train(model: nn.Module, epochs: int, rate: float, sparsity: float) -> None:
    """Train `model` in place with SGD on a one-cycle schedule and a penalty on norm scales."""
    scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    images, labels = digits_data("train").tensors
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=2e-3, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(BATCH):
            if len(chosen) < BATCH:
                continue
            loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen], label_smoothing=0.05)
            penalty = torch.cat(scales).abs().sum()
            optimizer.zero_grad()
            (loss + sparsity * penalty).backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1:3d}: loss {total / (len(images) // BATCH):.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, split: str) -> float:
    """Return the share of images of `split` that `model` names rightly, in percent."""
    images, labels = digits_data(split).tensors
    hits = model.eval()(images).argmax(1) == labels
    return 100 * hits.float().mean().item()


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits_resnet.safetensors"))
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--rate", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--sparsity", type=float, default=3e-3, help="weight of the penalty on norm scales")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # One thread and a fixed seed: the sum order, and so the weights, repeat on the same machine.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = digits_resnet()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters")
    train(model, options.epochs, options.rate, options.sparsity)
    for split in ("train", "calibration", "test"):
        print(f"accuracy, {split}: {accuracy(model, split):.2f} %")
    save_file(model.state_dict(), options.out)
    print(f"saved {options.out}")


if __name__ == "__main__":
    main()
