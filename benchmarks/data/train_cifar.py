"""Train the benchmarks' VGG-16-BN or DenseNet-BC on CIFAR-10, on one CPU core in less than an hour.

    python -m benchmarks.data.train_cifar vgg16bn --epochs 30
    python -m benchmarks.data.train_cifar densenet --epochs 16

See `benchmarks.data.training` for the loop: a run that was stopped goes on and ends with the same weights. `--bf16`
computes in bfloat16, where the processor multiplies it faster. The weights go to `--out`, recipe and log to
benchmarks/results.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import DATA, write
from benchmarks.data.cifar import load, top1
from benchmarks.data.models import TRAINED_HERE
from benchmarks.data.training import Recipe, train


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
    recipe = Recipe(
        epochs=options.epochs,
        batch=options.batch,
        rate=options.rate,
        seed=options.seed,
        bf16=options.bf16,
    )
    torch.manual_seed(options.seed)
    model = TRAINED_HERE[options.net]().to(memory_format=torch.channels_last)
    log = train(
        model,
        load(options.data, "train"),
        recipe,
        options.out / f"{options.net}.checkpoint.pt",
        lambda text: print(text, flush=True),
    )
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, options.out / f"{options.net}.safetensors")
    result = {
        "recipe": {"net": options.net, **asdict(recipe)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": log,
        "top1": top1(model, load(options.data, "test")),
    }
    print(f"top-1 {result['top1']:.2f} %; written: {write(f'train_{options.net}', result).name}")


if __name__ == "__main__":
    main()
