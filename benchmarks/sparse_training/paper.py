"""Sparse training on synaptic strength: train from scratch, prune synapses, fine-tune, compact, report.

    python -m benchmarks.sparse_training.paper                      # VGG-16-BN of a quarter of the width, one CPU core
    python -m benchmarks.sparse_training.paper --net resnet18 --width 0.125 --sparsity 0.6
    python -m benchmarks.sparse_training.paper --net vgg16bn --paper   # full width, 160 epochs: wants a GPU
    python -m benchmarks.sparse_training.paper --width 0.5 --epochs 30 --finetune-epochs 6 --note   # for docs/study.md

The method is that of Lin et al. (NeurIPS 2018). Their penalty weight, threshold and schedule are not known to us:
`--paper` takes those of Network Slimming (Liu et al. 2017; SGD at 0.1, divided by 10 at half and three quarters of 160
epochs, batches of 64, weight decay 1e-4, penalty 1e-4 for VGG and 1e-5 for the others), so the figures are ours, not
theirs.

Run from the root of the repository. CIFAR-10 is looked for in --data (torchvision's copy or cifar10-png.tar);
`--dataset fashion-mnist` reads the four idx.gz files of Fashion-MNIST there. A run that is killed, at any moment, goes
on from its last whole epoch when it is started again, and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import DATA, RESULTS, add_line, read_lines, versions
from benchmarks.data import models
from benchmarks.data.cifar import Images, as_input, draw, load_dataset, top1
from benchmarks.data.training import Recipe, train
from ss_pruning import compact_, errors, synaptic_strength
from ss_pruning._utils.files import write_text
from ss_pruning.importance.strength import kernel_powers
from ss_pruning.profiling.latency import measure_latency
from ss_pruning.sparsity.masks import mask_, merge_masks_, synapse_masks
from ss_pruning.sparsity.penalty import Form, StrengthPenalty, warm_up
from ss_pruning.sparsity.size import Compaction

#: What was run at a larger size than the study's own nets.
LARGER = RESULTS / "study_larger.jsonl"
Say = Callable[[str], None]
NETS = {
    "vgg16bn": models.vgg16bn,
    "vgg19bn": models.vgg19bn,
    "resnet18": models.resnet18,
    "resnet20": lambda width: models.cifar_resnet("resnet20"),
    "resnet56": lambda width: models.cifar_resnet("resnet56"),
    "densenet": lambda width: models.densenet(),
}
CRITERIA = ("strength", "share", "kernel norm", "gamma", "taylor", "random")
EXAMPLE = torch.zeros(1, 3, 32, 32)
LABELLED, TIMED_BATCH = 512, 64


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        weight: Of the penalty; 0 for a model trained without one.
        form: See `StrengthPenalty`.
        step: "gradient": the penalty is a term of the loss; "proximal": kernels shrink after each step.
        warm_up: Epochs over which the penalty's weight rises.
    """

    net: str = "vgg16bn"
    width: float = 0.25
    dataset: Literal["cifar10", "fashion-mnist"] = "cifar10"
    weight: float = 0.0
    form: Form = "strength"
    step: Literal["gradient", "proximal"] = "gradient"
    warm_up: int = 1
    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=10, bf16=True))

    @property
    def seed(self) -> int:
        return self.recipe.seed

    def folder(self, root: Path) -> Path:
        return root / f"{self.net}-{self.width:g}-{self.dataset}-seed{self.seed}"

    @property
    def tag(self) -> str:
        return f"{self.form}-{self.step}-{self.weight:g}" if self.weight else "dense"


@dataclass(frozen=True)
class Pruning:
    """Which share of the synapses goes, by which criterion (see `CRITERIA`), and how the rest is fine-tuned."""

    criterion: str
    sparsity: float
    tuning: Recipe

    def checkpoint(self, training: Training, root: Path) -> Path:
        return training.folder(root) / f"{training.tag}.{self.criterion}-{self.sparsity:g}.pt"


class Sparsify:
    """The regulariser of `benchmarks.data.training`: penalty or proximal step, with its warm-up."""

    def __init__(self, model: nn.Module, training: Training, steps_an_epoch: int) -> None:
        self.penalty = StrengthPenalty(model, EXAMPLE, form=training.form)
        self.training, self.rising = training, steps_an_epoch * training.warm_up

    def loss(self, step: int) -> Tensor | float:
        if self.training.step == "proximal":
            return 0.0
        return self.training.weight * warm_up(step, self.rising) * self.penalty()

    def after(self, step: int, rate: float) -> None:
        if self.training.step == "proximal":
            self.penalty.shrink_(self.training.weight * warm_up(step, self.rising) * rate)


def trained(training: Training, images: Images, root: Path, say: Say) -> nn.Module:
    """The trained model; what is done already is not done again."""
    torch.manual_seed(training.seed)
    model = NETS[training.net](training.width).to(memory_format=torch.channels_last)
    steps = max(1, len(images[0]) // training.recipe.batch)
    regulariser = Sparsify(model, training, steps) if training.weight else None
    checkpoint = training.folder(root) / f"{training.tag}.pt"
    train(model, images, training.recipe, checkpoint, say, regulariser)
    return model.eval()


def scores(model: nn.Module, criterion: str, labelled: Images, seed: int) -> dict[str, Tensor]:
    """By layer, `[out, in // groups]`; first layers and classifiers are not scored: they stay whole."""
    paths = StrengthPenalty(model, EXAMPLE).paths
    generator = torch.Generator().manual_seed(seed)
    strengths = synaptic_strength(model, EXAMPLE)
    found: dict[str, Tensor]
    if criterion == "strength":
        found = dict(strengths)
    elif criterion == "share":
        found = strengths.shares()
    elif criterion == "taylor":
        found = taylor(model, paths, labelled)
    else:
        norms = {path: kernel_powers(model.get_submodule(path)).detach().sqrt() for path in paths}
        if criterion == "gamma":
            found = {path: strengths[path] / norms[path].clamp_min(1e-30) for path in paths}
        elif criterion == "random":
            found = {path: torch.rand(norm.shape, generator=generator) for path, norm in norms.items()}
        else:
            found = norms
    return {path: found[path] for path in paths}


def taylor(model: nn.Module, paths: tuple[str, ...], labelled: Images) -> dict[str, Tensor]:
    """`(sum W * dL/dW)^2` of each kernel (Molchanov et al. 2019, eq. 8), on labelled training images."""
    twin = copy.deepcopy(model).eval()
    pixels, labels = labelled
    F.cross_entropy(twin(as_input(pixels)), labels).backward()
    found = {}
    for path in paths:
        weight = twin.get_parameter(f"{path}.weight")
        assert weight.grad is not None
        found[path] = (weight.detach() * weight.grad).flatten(2).sum(2).square()
    return found


def tuned(
    model: nn.Module, masks: Mapping[str, Tensor], images: Images, recipe: Recipe, checkpoint: Path, say: Say
) -> nn.Module:
    """A masked copy, fine-tuned; the model is left as it is."""
    masked = mask_(copy.deepcopy(model), masks)
    if recipe.epochs:
        train(masked, images, recipe, checkpoint, say)
    return masked.eval()


def compacted(masked: nn.Module) -> tuple[nn.Module, Compaction]:
    """The masked model, made small."""
    small = merge_masks_(copy.deepcopy(masked)).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return small, compact_(small, EXAMPLE)


def report(
    training: Training, pruning: Pruning, nets: Mapping[str, float], made: Compaction
) -> dict[str, Any]:
    """What was done and what came out, ready for JSON."""
    return {
        **asdict(training),
        "criterion": pruning.criterion,
        "sparsity": pruning.sparsity,
        "finetune_epochs": pruning.tuning.epochs,
        "top1": dict(nets),
        **json.loads(made.to_json()),
        "versions": versions(),
    }


def prune_and_tune(
    training: Training, pruning: Pruning, model: nn.Module, sets: tuple[Images, Images], root: Path, say: Say
) -> tuple[dict[str, float], nn.Module, Compaction]:
    """Top-1 on the test images by stage, the small model, and what was cut; the trained model is left as it is."""
    images, test = sets
    found = {"trained": top1(model, test)}
    say(f"trained: {found['trained']:.2f} % of the test images")
    labelled = draw(images, LABELLED, 10_000 + training.seed)
    found_scores = scores(model, pruning.criterion, labelled, training.seed)
    masks = synapse_masks(found_scores, fraction=pruning.sparsity)
    found["pruned"] = top1(mask_(copy.deepcopy(model), masks), test)
    say(f"without {pruning.sparsity:.0%} of the synapses, before fine-tuning: {found['pruned']:.2f} %")
    masked = tuned(model, masks, images, pruning.tuning, pruning.checkpoint(training, root), say)
    small, made = compacted(masked)
    found["fine-tuned"], found["compacted"] = top1(masked, test), top1(small, test)
    say(f"fine-tuned: {found['fine-tuned']:.2f} %; compacted: {found['compacted']:.2f} %")
    return found, small, made


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Train, prune, fine-tune, compact."""
    training, pruning = training_of(options)
    images, test = (load_dataset(training.dataset, options.data, split) for split in ("train", "test"))
    model = trained(training, images, options.out, say)
    found, small, made = prune_and_tune(training, pruning, model, (images, test), options.out, say)
    checkpoint = pruning.checkpoint(training, options.out)
    torch.save(small.state_dict(), checkpoint.with_suffix(".compact.pt"))
    seconds = timed(model, small)
    result = report(training, pruning, found, made) | {"seconds_a_batch": seconds}
    write_text(checkpoint.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    if options.note and result not in read_lines(LARGER):
        add_line(result, LARGER)
    show(found, made, seconds)
    say(f"written: {checkpoint.with_suffix('.json')}")
    return result


def timed(dense: nn.Module, small: nn.Module) -> dict[str, float]:
    """Median seconds that a batch takes here, measured in turns, and the ratio."""
    images = torch.zeros(TIMED_BATCH, *EXAMPLE.shape[1:])
    of_dense, of_small = measure_latency([dense, small], images, seconds=10)
    return {"dense": of_dense.median, "compacted": of_small.median, "ratio": of_small.over(of_dense)}


def show(top: Mapping[str, float], made: Compaction, seconds: Mapping[str, float]) -> None:
    """Accuracies, sizes and times."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Top-1 on the test images, %", title_justify="left")
    for name in top:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.2f}" for value in top.values()))
    console = Console()
    console.print(table)
    console.print(made.table())
    dead = sum(left.channels for left in made.excluded)
    console.print(
        f"{made.channels_removed} channels cut, {dead} dead ones had to stay; the outputs of masked and compacted net "
        f"differ by {made.max_error:.1e} ({made.precision}). A batch of {TIMED_BATCH} takes {seconds['ratio']:.2f} of "
        "the dense model's time here; zero kernels in what is left save none."
    )


def training_of(options: argparse.Namespace) -> tuple[Training, Pruning]:
    """What the options ask for, with the paper's stand-in where it was asked for."""
    recipe = Recipe(epochs=options.epochs, rate=options.rate, bf16=options.bf16, seed=options.seed)
    tuning = replace(recipe, epochs=options.finetune_epochs, rate=options.finetune_rate)
    weight, width = options.weight, options.width
    if options.paper:
        recipe = replace(recipe, epochs=160, rate=0.1, batch=64, weight_decay=1e-4, schedule="steps")
        weight, width = 1e-4 if options.net.startswith("vgg") else 1e-5, 1.0
        tuning = recipe
    training = Training(
        options.net, width, options.dataset, weight, options.form, options.step, recipe=recipe
    )
    return training, Pruning(options.criterion, options.sparsity, tuning)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--net", choices=sorted(NETS), default="vgg16bn")
    parser.add_argument(
        "--width", type=float, default=0.25, help="of VGG and ResNet-18: the usual width is 1"
    )
    parser.add_argument("--dataset", choices=("cifar10", "fashion-mnist"), default="cifar10")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="checkpoints and reports")
    parser.add_argument("--weight", type=float, default=3e-4, help="of the penalty in the loss")
    parser.add_argument("--form", choices=("strength", "share"), default="strength", help="what is penalised")
    parser.add_argument("--step", choices=("gradient", "proximal"), default="gradient")
    parser.add_argument("--criterion", choices=CRITERIA, default="strength", help="which synapses go")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the synapses that goes")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.1, help="the largest learning rate")
    parser.add_argument("--finetune-epochs", type=int, default=3)
    parser.add_argument("--finetune-rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16"
    )
    parser.add_argument("--note", action="store_true", help="add the result to those of docs/study.md")
    parser.add_argument(
        "--paper", action="store_true", help="full width, 160 epochs (see the top of this file)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    try:
        run(arguments(argv), lambda text: print(text, flush=True))
    except errors.SSPruningError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
