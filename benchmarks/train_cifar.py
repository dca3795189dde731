"""Train the benchmarks' VGG-16-BN or DenseNet-BC on CIFAR-10, on one CPU core in less than an hour.

    python -m benchmarks.train_cifar vgg16bn --epochs 30
    python -m benchmarks.train_cifar densenet --epochs 16

SGD with Nesterov momentum, one cycle of the learning rate, shifts and flips; bfloat16 where the processor multiplies it
faster (`--bf16`). A run that was stopped goes on from its last whole epoch and ends with the same weights. The
weights go to `--out`, recipe and log to benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.cifar_data import Images, as_input, augmented, load, top1
from benchmarks.cifar_models import TRAINED_HERE
from benchmarks.common import DATA, write

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


def optimiser(model: nn.Module, rate: float, steps: int, *, warm_up: float = 0.25) -> tuple[Any, OneCycleLR]:
    """SGD whose rate rises to `rate` over the first `warm_up` of `steps`, then falls to nothing."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    return sgd, OneCycleLR(sgd, rate, total_steps=steps, pct_start=warm_up)


def train_epoch(
    model: nn.Module,
    images: Images,
    sgd: Any,
    schedule: OneCycleLR,
    *,
    batch: int,
    generator: torch.Generator,
    bf16: bool = False,
) -> float:
    """One pass over the images; returns the mean loss."""
    model.train()
    total, steps = 0.0, 0
    for pixels, labels in augmented(images, batch, generator):
        sgd.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(as_input(pixels))
        loss = F.cross_entropy(outputs.float(), labels)
        loss.backward()
        sgd.step()
        schedule.step()
        total, steps = total + float(loss.detach()), steps + 1
    return total / max(steps, 1)


def train(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, or go on training, and return recipe and log."""
    torch.manual_seed(options.seed)
    model = TRAINED_HERE[options.net]().to(memory_format=torch.channels_last)
    images, test = load(options.data, "train"), load(options.data, "test")
    steps = len(images[0]) // options.batch * options.epochs
    sgd, schedule = optimiser(model, options.rate, steps)
    checkpoint = options.out / f"{options.net}.checkpoint.pt"
    log: list[dict[str, float]] = []
    parts = {"model": model, "sgd": sgd, "schedule": schedule}
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log = saved["log"]
        say(f"going on after epoch {len(log)}")
    for epoch in range(len(log), options.epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * options.seed + epoch)
        loss = train_epoch(
            model, images, sgd, schedule, batch=options.batch, generator=generator, bf16=options.bf16
        )
        log.append({"epoch": epoch + 1, "loss": loss, "seconds": time.perf_counter() - started})
        say(f"epoch {epoch + 1}/{options.epochs}: loss {loss:.3f}, {log[-1]['seconds']:.0f} s")
        save_atomically({**{name: part.state_dict() for name, part in parts.items()}, "log": log}, checkpoint)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, options.out / f"{options.net}.safetensors")
    recipe = {key: value for key, value in vars(options).items() if key not in ("data", "out")}
    recipe |= {"momentum": MOMENTUM, "weight decay": WEIGHT_DECAY, "schedule": "one cycle"}
    return {"recipe": recipe, "parameters": sum(p.numel() for p in model.parameters()), "log": log,
            "top1": top1(model, test)}  # fmt: skip


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """A reader never sees half a checkpoint."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("net", choices=sorted(TRAINED_HERE))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.2, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (weights stay float32)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for weights and checkpoint")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar (or CIFAR-10)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    result = train(options, lambda text: print(text, flush=True))
    print(f"top-1 {result['top1']:.2f} %; written: {write(f'train_{options.net}', result).name}")


if __name__ == "__main__":
    main()
