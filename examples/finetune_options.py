"""The command line of examples.finetune_timm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

Options = argparse.Namespace
#: What may change between a run and its continuation.
ELSEWHERE = ("out", "workers", "cpu", "data")


def recipe(options: Options) -> dict[str, Any]:
    """The options that decide what comes out."""
    kept = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def arguments(argv: list[str] | None, about: str | None) -> Options:
    parser = argparse.ArgumentParser(
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODEL --data FOLDER ...",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="name of a timm model, or a spec such as torchvision:resnet18"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument(
        "--weights", type=Path, help="where to start: weights, or a file of ss-prune; else random"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/finetune"), help="checkpoints and results [%(default)s]"
    )
    parser.add_argument("--size", type=int, help="side of the images [what the model was made for]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=4, help="loading processes, for each process [%(default)s]"
    )
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    add_training(parser.add_argument_group("training"))
    add_pruning(parser.add_argument_group("sparse training and pruning"))
    options = parser.parse_args(argv)
    prunes = options.macs or options.sparsity
    if options.prune_epoch is None:
        options.prune_epoch = 0 if prunes else -1
    elif not prunes:
        parser.error("--prune-epoch needs --macs, --sparsity or both")
    if options.distill and not (prunes or options.teacher):
        parser.error(
            "--distill needs a dense model: prune in this run (--macs, --sparsity), or give --teacher WEIGHTS"
        )
    return options


def add_training(group: Any) -> None:
    group.add_argument("--epochs", type=int, default=30)
    group.add_argument(
        "--batch", type=int, default=128, help="images a step, of all processes together [%(default)s]"
    )
    group.add_argument(
        "--opt", default="sgd", help="any optimiser of timm: sgd, adamw, lamb, ... [%(default)s]"
    )
    group.add_argument("--rate", type=float, default=0.01, help="largest learning rate [%(default)s]")
    group.add_argument(
        "--warm-up", type=int, default=0, help="epochs in which the rate rises; then half a cosine"
    )
    group.add_argument(
        "--weight-decay", type=float, default=1e-4, help="not on norms and biases [%(default)s]"
    )
    group.add_argument("--smoothing", type=float, default=0.0, help="of the labels [%(default)s]")
    group.add_argument("--crop", type=float, default=0.35, help="smallest area that is cropped [%(default)s]")
    group.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights [%(default)s]")
    group.add_argument(
        "--freeze-norms", action="store_true", help="leave statistics of batch norms as they are"
    )
    group.add_argument(
        "--amp", choices=("no", "bf16", "fp16"), help="mixed precision [what accelerate is told]"
    )


def add_pruning(group: Any) -> None:
    group.add_argument(
        "--penalty", type=float, default=0.0, help="weight of the strengths in the loss, until pruned"
    )
    group.add_argument(
        "--form", choices=("strength", "share"), default="strength", help="see StrengthPenalty"
    )
    group.add_argument(
        "--penalty-warm-up", type=int, default=1, help="epochs in which it rises [%(default)s]"
    )
    group.add_argument("--prune-epoch", type=int, help="prune after so many epochs [0]")
    group.add_argument(
        "--sparsity", type=float, default=0.0, help="share of the synapses to mask; they stay 0"
    )
    group.add_argument(
        "--macs", type=float, default=0.0, help="share of the multiply-accumulates to keep: cuts channels"
    )
    group.add_argument("--round-to", type=int, help="widths are multiples of this")
    group.add_argument("--keep-zeros", action="store_true", help="kernels that are 0 in --weights stay 0")
    group.add_argument(
        "--distill", type=float, default=0.0, help="share of the loss that is distance to the dense model"
    )
    group.add_argument("--teacher", type=Path, help="its weights [the model as it is before it is pruned]")
