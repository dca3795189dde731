"""Which importance keeps a trained CIFAR-10 ResNet alive? One shot, no fine-tuning, all at the same budget of MACs.

A budget is met from below to within one step. With `--residual` a step of the stream is large, so what is left differs
between criteria: the MACs column says by how much, the stream column whether a criterion touched the stream at all.

Every criterion prunes through the same call, `prune_(model, x, macs=..., importance=...)`: the same groups,
the same search for the budget, the same cut. Only the scores differ. The residual stream stays whole for all
of them unless `--residual` is given.

    python -m benchmarks.cifar_criteria
    python -m benchmarks.cifar_criteria --model resnet20 --residual
    python -m benchmarks.cifar_criteria --compensation reconstruct --only SynapticImportance
    python -m benchmarks.cifar_criteria --options --images 2000 --macs 0.85

With `--options` the options of our own importance are compared, on *training* images: defaults are chosen by it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch_pruning as tp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks.cifar_data import MEAN, STD
from benchmarks.cifar_models import CHECKPOINTS, load_checkpoint, stream_layers
from benchmarks.common import DATA, write
from ss_pruning import SynapticImportance, prune_
from ss_pruning.compensation import METHODS
from ss_pruning.data import cifar10, normalise
from ss_pruning.errors import InputError

CALIBRATION = 512
Images = tuple[Tensor, Tensor]
Criterion = Callable[[], Any]


@dataclass
class Row:
    """What one criterion left; several values where it is random."""

    criterion: str
    top1: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    params: list[float] = field(default_factory=list)
    stream: list[float] = field(default_factory=list)
    left_whole: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def criteria() -> dict[str, Criterion]:
    """Ours and Torch-Pruning's, each with its own defaults."""
    return {
        "SynapticImportance": SynapticImportance,
        "GroupMagnitude (L2)": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "BNScale": tp.importance.BNScaleImportance,
        "LAMP": lambda: tp.importance.LAMPImportance(p=2),
        "Random": tp.importance.RandomImportance,
    }


def our_options() -> dict[str, Criterion]:
    """Every combination of the options of `SynapticImportance` that need no data."""

    def option(moments: str, score: str, reduce: str, normalizer: str | None) -> Criterion:
        return lambda: SynapticImportance(moments=moments, score=score, reduce=reduce, normalizer=normalizer)

    scores, reductions = ("share", "strength", "entropy"), ("sum", "mean", "max")
    choices = itertools.product(("batchnorm", "gaussian"), scores, reductions, (None,))
    return {" ".join(str(part) for part in choice): option(*choice) for choice in choices}


@torch.inference_mode()
def top1(model: nn.Module, images: Images, batch: int = 500) -> float:
    """Top-1 accuracy in percent."""
    pixels, labels = images
    model.eval()
    right = 0
    for start in range(0, len(pixels), batch):
        chosen = slice(start, start + batch)
        right += int((model(normalise(pixels[chosen], MEAN, STD)).argmax(1) == labels[chosen]).sum())
    return 100 * right / len(pixels)


def stream_width(model: nn.Module) -> int:
    """Channels of the residual stream, summed over the layers that write it."""
    return sum(model.get_submodule(path).out_channels for path in stream_layers(model))


def measure(name: str, criterion: Criterion, options: argparse.Namespace, images: Images) -> Row:
    """Prune a fresh net by a criterion, once for each seed where chance plays a part, and measure what is left."""
    row = Row(name)
    by_chance = name == "Random" or options.compensation in ("linear", "reconstruct")
    for seed in range(options.seeds if by_chance else 1):
        torch.manual_seed(seed)
        model = load_checkpoint(options.model, options.data / "pretrained")
        dense_stream = stream_width(model)
        ignore = () if options.residual else stream_layers(model)
        started = time.perf_counter()
        report = prune_(
            model,
            torch.randn(1, 3, 32, 32),
            macs=options.macs,
            importance=criterion(),
            ignore=ignore,
            compensation=options.compensation,
            calibration=calibration(options, seed),
        )
        row.seconds.append(time.perf_counter() - started)
        row.macs.append(report.macs_after / report.macs_before)
        row.params.append(report.params_after / report.params_before)
        row.stream.append(stream_width(model) / dense_stream)
        row.left_whole += [left.reason for left in report.left_whole if "relies on" in left.reason]
        row.top1.append(top1(model, images))
    return row


def calibration(options: argparse.Namespace, seed: int) -> Tensor | None:
    """Unlabelled training images, another draw for each seed; `mean` does without."""
    if options.compensation in ("none", "mean"):
        return None
    pixels, _ = images_of(options.data, "train", CALIBRATION, seed)
    return normalise(pixels, MEAN, STD)


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and standard deviation where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(dense: float, rows: list[Row], title: str) -> Table:
    """The result for people."""
    result = Table(
        title=title,
        caption=f"dense: {dense:.2f} %; MACs, params, residual stream: share kept; ±: standard deviation over seeds",
    )
    for column in ("criterion", "top-1 %", "MACs", "params", "stream", "s"):
        result.add_column(column, justify="left" if column == "criterion" else "right")
    for row in rows:
        result.add_row(
            *(row.criterion, spread(row.top1), spread(row.macs, 3), spread(row.params, 3)),
            *(spread(row.stream, 3), spread(row.seconds)),
        )
    return result


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(CHECKPOINTS), default="resnet56")
    parser.add_argument(
        "--macs", type=float, default=0.7, help="fraction of the multiply-accumulates to keep"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how often what depends on chance is repeated")
    parser.add_argument("--compensation", choices=METHODS, default="none", help="see ss_pruning.compensation")
    parser.add_argument("--only", nargs="+", default=[], metavar="CRITERION", help="leave the others out")
    parser.add_argument("--residual", action="store_true", help="prune the residual stream, too")
    parser.add_argument(
        "--options",
        action="store_true",
        help="compare our own options, on training images",
    )
    parser.add_argument("--images", type=int, default=10_000, help="how many images, from a fixed shuffle")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with cifar10-png.tar (or CIFAR-10) and pretrained/"
    )
    return parser.parse_args()


def images_of(folder: Path, split: Literal["train", "test"], count: int, seed: int = 0) -> Images:
    """Images as they are stored, `count` of them drawn by `seed`.

    Raises:
        InputError: They are not there.
    """
    tar = folder / "cifar10-png.tar"
    pixels, labels = cifar10(tar if tar.is_file() else folder, split).tensors
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return pixels[chosen], labels[chosen]


def main() -> int:
    """Run the comparison."""
    options, console = arguments(), Console()
    try:
        split: Literal["train", "test"] = "train" if options.options else "test"
        images = images_of(options.data, split, options.images)
        model = load_checkpoint(options.model, options.data / "pretrained")
    except (InputError, FileNotFoundError) as error:
        Console(stderr=True).print(
            f"[red]{error}[/red]\nSay where the data is with --data FOLDER.", markup=True
        )
        return 2
    compared = our_options() if options.options else criteria()
    compared = {name: make for name, make in compared.items() if name in options.only or not options.only}
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("dense", total=len(compared) + 1)
        dense = top1(model, images)
        for name, criterion in compared.items():
            progress.update(task, advance=1, description=name)
            rows.append(measure(name, criterion, options, images))
    rows.sort(key=lambda row: -statistics.mean(row.top1))
    stream = "with the residual stream" if options.residual else "residual stream whole"
    title = (
        f"CIFAR-10 {options.model} at {options.macs:g} of its MACs, {stream}, compensation {options.compensation}, "
        f"{len(images[0])} {split} images"
    )
    console.print(table(dense, rows, title))
    for row in rows:
        for reason in row.left_whole:
            console.print(f"[yellow]{row.criterion} wanted more, but it was left whole[/yellow]: {reason}")
    settings = {key: value for key, value in vars(options).items() if key != "data"}
    name = f"cifar_{'options' if options.options else 'criteria'}_{options.model}_{options.macs:g}"
    name += "_residual" if options.residual else ""
    name += "" if options.compensation == "none" else f"_{options.compensation}"
    path = write(name, {"settings": settings, "dense": dense, "rows": [asdict(row) for row in rows]})
    console.print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
