"""How sparse training on synaptic strength behaves: the runs behind docs/study.md.

    python -m benchmarks.sparse_training.run --parts vgg resnet --seeds 0 1 2
    python -m benchmarks.sparse_training.page

A part trains nets as `benchmarks/sparse_training/paper.py` does, then prunes, fine-tunes and compacts copies of each.
Every result is a line of benchmarks/results/study.jsonl; what is there is not run again, and a training that was killed
goes on from its last epoch. Every comparison inside a part has the same budget: the same epochs, the same fine-tuning.
Test images are only measured on; the penalty's weight was chosen in the part "lambda", which holds out training images.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import DATA, RESULTS, add_line, read_lines, versions
from benchmarks.data.cifar import Images, draw, load_dataset, top1
from benchmarks.data.training import Recipe
from benchmarks.sparse_training.paper import CRITERIA, LABELLED, Training, compacted, scores, trained, tuned
from ss_pruning.errors import InputError
from ss_pruning.importance.strength import entropy
from ss_pruning.sparsity.masks import Scope, mask_, synapse_masks

LINES = RESULTS / "study.jsonl"
HELD_OUT = 5_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Point:
    """One way to prune a trained net.

    Attributes:
        criterion: Which synapses go, see `benchmarks.sparse_training.paper.CRITERIA`.
        sparsity: Which share of them goes.
        epochs: Of fine-tuning; 0 for none.
        scope: Whether all layers are ranked together, see `ss_pruning.sparsity.masks.synapse_masks`.
    """

    criterion: str
    sparsity: float
    epochs: int
    scope: Scope = "global"

    @property
    def words(self) -> str:
        return f"{self.criterion}{' by layer' * (self.scope == 'layer')} {self.sparsity:g}"


@dataclass(frozen=True)
class Job:
    """A net to train, and what to do with it."""

    part: str
    training: Training
    points: list[Point] = field(default_factory=list)
    held_out: bool = False


#: Widths and sparsities: the first sparsity is what rivals are run at, too.
NETS: dict[str, tuple[str, float, tuple[float, ...]]] = {
    "vgg": ("vgg16bn", 0.25, (0.9, 0.95)),
    "resnet": ("resnet18", 0.125, (0.6, 0.8)),
}
EPOCHS, TUNING_EPOCHS, TUNING_RATE = 10, 6, 0.05
#: Of the sweep in the part "lambda" the largest that costs no accuracy before pruning.
WEIGHT = 3e-4
#: The net of the smaller parts, and how long it is trained there.
SMALL: dict[str, Any] = {"net": "vgg16bn", "width": 0.125}
SMALL_EPOCHS = 3
SWEEP: tuple[dict[str, Any], ...] = (
    {},
    {"weight": 1e-4},
    {"weight": 3e-4},
    {"weight": 1e-3},
    {"weight": 1e-3, "step": "proximal"},
    {"weight": 1e-3, "form": "share"},
)


def jobs(part: str, seed: int) -> Iterator[Job]:
    """What belongs to a part."""
    if part in NETS:
        yield from _main(part, seed)
        return
    recipe = Recipe(epochs=SMALL_EPOCHS, bf16=True, seed=seed)
    if part == "lambda":
        for options in SWEEP:
            points = [Point(name, s, 0) for s in (0.5, 0.7, 0.9) for name in ("strength", "share")]
            points.append(Point("strength", 0.9, 1))
            yield Job(part, Training(recipe=recipe, **options, **SMALL), points, held_out=True)
    elif part == "criteria":
        points = [Point(name, 0.7, epochs) for name in CRITERIA for epochs in (0, 1)]
        yield Job(part, Training(recipe=recipe, **SMALL), points, held_out=True)
    elif part == "task":
        yield Job(part, Training(recipe=recipe, weight=WEIGHT, dataset="fashion-mnist", **SMALL))


def _main(part: str, seed: int) -> Iterator[Job]:
    """A net without and one with the penalty, pruned and fine-tuned, beside what other criteria make of the former."""
    net, width, (asked, *more) = NETS[part]
    recipe = Recipe(epochs=EPOCHS, bf16=True, seed=seed)
    untuned = [Point(name, asked, 0) for name in CRITERIA]
    rivals = [Point(name, asked, TUNING_EPOCHS) for name in ("kernel norm", "random")]
    if part == "vgg":  # ranked together, its last layers go as a whole
        rivals.append(Point("kernel norm", asked, TUNING_EPOCHS, "layer"))
    dense = [Point("strength", 0.0, TUNING_EPOCHS), *rivals, *untuned]
    tried = (asked, *more) if seed == 0 else (asked,)
    ours = [Point("strength", sparsity, TUNING_EPOCHS) for sparsity in tried]
    yield Job(part, Training(net, width, weight=WEIGHT, recipe=recipe), [*ours, *untuned])
    yield Job(part, Training(net, width, recipe=recipe), dense)


class Bench:
    """Trains, prunes and measures; holds the images."""

    def __init__(self, data: Path, fashion: Path, root: Path) -> None:
        self.folders = {"cifar10": data, "fashion-mnist": fashion}
        self.root = root
        self.images: dict[tuple[str, bool], tuple[Images, Images]] = {}

    def images_of(self, dataset: str, held_out: bool) -> tuple[Images, Images]:
        """Images to train and to measure on; with `held_out` both are training images."""
        key = (dataset, held_out)
        if key not in self.images:
            train = load_dataset(dataset, self.folders[dataset], "train")
            if held_out:
                order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(1)).split(
                    len(train[0]) - HELD_OUT
                )
                self.images[key] = tuple((train[0][part], train[1][part]) for part in order)  # type: ignore[assignment]
            else:
                self.images[key] = train, load_dataset(dataset, self.folders[dataset], "test")
        return self.images[key]

    def __call__(self, job: Job, done: set[str]) -> Iterator[dict[str, Any]]:
        """The lines of a job that are not there yet."""
        names = [name_of(job, point) for point in (None, *job.points)]
        if done.issuperset(names):
            return
        train, test = self.images_of(job.training.dataset, job.held_out)
        root = self.root / "held-out" if job.held_out else self.root
        model = trained(job.training, train, root, lambda text: print(f"  {names[0]}: {text}", flush=True))
        labelled = draw(train, LABELLED, 10_000 + job.training.seed)
        of_criterion = {name: scores(model, name, labelled, job.training.seed) for name in CRITERIA}
        if names[0] not in done:
            seen = draw(train, len(test[0]), 7)
            yield {
                **described(job),
                "name": names[0],
                "top1": top1(model, test),
                "top1_train": top1(model, seen),
                **anatomy(model, of_criterion),
            }
        for point, name in zip(job.points, names[1:], strict=True):
            if name not in done:
                yield {
                    **described(job),
                    **asdict(point),
                    "name": name,
                    **self.pruned(job, point, model, of_criterion, root),
                }

    def pruned(
        self, job: Job, point: Point, model: nn.Module, of_criterion: dict[str, dict[str, Tensor]], root: Path
    ) -> dict[str, Any]:
        """Accuracy before and after fine-tuning, and what compaction makes of it."""
        train, test = self.images_of(job.training.dataset, job.held_out)
        masks = synapse_masks(
            of_criterion[point.criterion], fraction=point.sparsity, scope=point.scope, allow_dead=True
        )
        result: dict[str, Any] = {
            "top1": top1(mask_(copy.deepcopy(model), masks), test),
            "kept_by_layer": {path: float(mask.double().mean()) for path, mask in masks.items()},
        }
        if point.epochs:
            recipe = replace(job.training.recipe, epochs=point.epochs, rate=TUNING_RATE)
            words = f"{point.words.replace(' ', '-')}-{point.epochs}"
            where = job.training.folder(root) / f"{job.training.tag}.{words}.pt"
            if not all(
                bool(mask.any()) for mask in masks.values()
            ):  # nothing gets through: nothing to learn from
                recipe = replace(recipe, epochs=0)
            masked = tuned(model, masks, train, recipe, where, lambda text: None)
            small, made = compacted(masked)
            result |= {
                "top1_tuned": top1(masked, test),
                "top1_compacted": top1(small, test),
                "before": asdict(made.before),
                "after": asdict(made.after),
                "channels_cut": made.channels_removed,
                "dead_left": sum(left.channels for left in made.excluded),
                "max_error": made.max_error,
            }
        return result


def anatomy(model: nn.Module, of_criterion: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """How strengths are spread over depth, and on which synapses the criteria agree."""
    q = torch.tensor(QUANTILES, dtype=torch.float64)
    strengths = {
        path: {
            "synapses": s.numel(),
            "quantiles": s.double().flatten().quantile(q).tolist(),
            "relative": (s / s.square().mean().sqrt()).double().flatten().quantile(q).tolist(),
            "mean": float(s.mean()),
        }
        for path, s in of_criterion["strength"].items()
    }
    return {
        "strengths": strengths,
        "overlap": {f"{f:g}": overlaps(of_criterion, f) for f in (0.5, 0.9)},
        "entropy_agreement": entropy_agreement(of_criterion["strength"]),
    }


def entropy_agreement(strengths: dict[str, Tensor]) -> dict[str, float]:
    """Rank correlation of variance and Gaussian entropy: of synapses, and of sums over those that read a channel."""
    single, summed = [], []
    for s in strengths.values():
        variance = s.double().square().clamp_min(1e-30)
        single.append(rank_correlation(variance.flatten(), entropy(variance).flatten()))
        summed.append(rank_correlation(variance.sum(0), entropy(variance).sum(0)))
    return {"synapses": sum(single) / len(single), "channels": sum(summed) / len(summed)}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def overlaps(of_criterion: dict[str, dict[str, Tensor]], fraction: float) -> dict[str, float]:
    """Of what "strength" keeps, the share that another criterion keeps too; by chance it would be `1 - fraction`."""
    kept = {
        name: torch.cat([m.flatten() for m in synapse_masks(s, fraction=fraction, allow_dead=True).values()])
        for name, s in of_criterion.items()
    }
    ours = kept["strength"]
    return {name: float((mask & ours).sum() / ours.sum()) for name, mask in kept.items()}


def described(job: Job) -> dict[str, Any]:
    return {"part": job.part, **asdict(job.training), "held_out": job.held_out, "versions": versions()}


def name_of(job: Job, point: Point | None) -> str:
    """Names a line: by it a result is known to be there."""
    training = job.training
    words = [f"{training.net}-{training.width:g}", training.dataset, training.tag, f"seed{training.seed}"]
    words += ["held out"] * job.held_out + [f"{training.recipe.epochs} epochs"]
    if point:
        words.append(f"{point.words} then {point.epochs} epochs")
    return f"{job.part}: {' '.join(words)}"


PARTS = (*NETS, "lambda", "criteria", "task")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar (or CIFAR-10)")
    parser.add_argument(
        "--fashion",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of idx.gz files",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=LINES, metavar="FILE")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    bench = Bench(options.data, options.fashion, options.runs)
    try:
        for seed in options.seeds:
            for job in (job for part in options.parts for job in jobs(part, seed)):
                done = {line["name"] for line in read_lines(options.results)}
                for line in bench(job, done):
                    add_line(line, options.results)
                    tuned_to = f", fine-tuned {line['top1_tuned']:.2f}" if "top1_tuned" in line else ""
                    print(f"{line['name']}: {line['top1']:.2f}{tuned_to}", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
