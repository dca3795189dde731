"""Which models of other libraries can be pruned: segmentation, medical imaging, detection, faces.

Torch-Pruning and ours side by side, as `benchmarks.coverage` does it: local ratio 0.5, random weights, both outputs
compared with the masked model's, a training step. Libraries that are not installed are left out, and the page says so.

    pip install --no-deps segmentation-models-pytorch monai ultralytics facenet-pytorch  # and what they import
    OMP_NUM_THREADS=1 python -m benchmarks.coverage_elsewhere
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import coverage_worker
from benchmarks.common import HERE, write
from ss_pruning.coupling import couple
from ss_pruning.provenance import trace
from ss_pruning.staying import OUTPUT_REASON

PAGE = HERE.parent / "docs" / "coverage_elsewhere.md"
TIMEOUT = 120.0

Made = tuple[nn.Module, Tensor]


def _smp() -> Iterator[tuple[str, Callable[[], Made]]]:
    smp = importlib.import_module("segmentation_models_pytorch")
    names = (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3",
        "DeepLabV3Plus",
        "PAN",
        "UPerNet",
    )
    nets = [(name, "resnet18", {}) for name in names]
    nets += [("Unet", encoder, {}) for encoder in ("efficientnet-b0", "mobilenet_v2")]
    nets += [("Unet", "resnet18", {"decoder_attention_type": "scse"})]
    for name, encoder, options in nets:
        make = partial(getattr(smp, name), encoder, encoder_weights=None, classes=2, **options)
        label = " ".join([name, encoder, *options.values()])
        yield label, lambda make=make: (make(), torch.randn(1, 3, 128, 128))  # type: ignore[misc]


def _monai() -> Iterator[tuple[str, Callable[[], Made]]]:
    nets = importlib.import_module("monai.networks.nets")
    volume, plane = (1, 1, 16, 16, 16), (1, 1, 32, 32)
    made: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
        ("UNet", {"channels": (8, 16, 32, 64), "strides": (2, 2, 2), "num_res_units": 2}, volume),
        ("BasicUNet", {"features": (16, 16, 32, 32, 64, 16)}, (1, 1, 64, 64)),
        ("SegResNet", {"init_filters": 8}, plane),
        ("DynUNet", {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}, plane),
        ("VNet", {}, plane),
        ("AttentionUnet", {"channels": (8, 16, 32), "strides": (2, 2)}, plane),
        ("HighResNet", {}, plane),
    ]
    for name, options, shape in made:
        make = partial(getattr(nets, name), len(shape) - 2, in_channels=1, out_channels=2, **options)
        yield f"{name} {len(shape) - 2}D", lambda make=make, shape=shape: (make(), torch.randn(*shape))  # type: ignore[misc]


def _ultralytics() -> Iterator[tuple[str, Callable[[], Made]]]:
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes its settings when imported
    tasks = importlib.import_module("ultralytics.nn.tasks")
    detectors = ["yolov3-tiny", "yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"]
    nets = [(name, tasks.DetectionModel) for name in detectors]
    nets += [("yolov8n-seg", tasks.SegmentationModel), ("yolov8n-cls", tasks.ClassificationModel)]
    for name, kind in nets:
        make = partial(kind, f"{name}.yaml", verbose=False)
        yield name, lambda make=make: (make(), torch.rand(1, 3, 64, 64))  # type: ignore[misc]


def _facenet() -> Iterator[tuple[str, Callable[[], Made]]]:
    facenet = importlib.import_module("facenet_pytorch")
    make = partial(facenet.InceptionResnetV1, pretrained=None, classify=False)
    yield "InceptionResnetV1", lambda: (make(), torch.randn(1, 3, 128, 128))


LIBRARIES = {
    "segmentation-models-pytorch": _smp,
    "monai": _monai,
    "ultralytics": _ultralytics,
    "facenet-pytorch": _facenet,
}


def installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def examined() -> Iterator[dict[str, Any]]:
    """One line a model and side."""
    for library, nets in LIBRARIES.items():
        if installed(library) is None:
            print(f"{library}: not installed, left out", flush=True)
            continue
        for name, make in nets():
            whole = output_layers(*make())
            for side in coverage_worker.SIDES:
                line = coverage_worker.examine(partial(_stirred, make), side, TIMEOUT, whole)
                yield {"library": library, "name": name, "side": side, **line}
                said = line.get("error", "")[:120]
                print(f"{library} {name} {side}: {line['status']} {line['seconds']:.1f} s {said}", flush=True)


def output_layers(model: nn.Module, x: Tensor) -> list[str]:
    """The layers whose width is the output's: Torch-Pruning has to be told, ours finds them."""
    left_whole = couple(trace(model.eval(), x), model).left_whole
    return [path for left in left_whole if left.reason == OUTPUT_REASON for path in left.paths]


def _stirred(make: Callable[[], Made]) -> Made:
    """A model with fixed random weights; constant tensors get noise, so that every branch counts."""
    torch.manual_seed(0)
    model, x = make()
    return coverage_worker.stirred(model), x


def page(lines: list[dict[str, Any]], libraries: dict[str, str | None]) -> str:
    """The result as Markdown."""
    by_side = {side: [x for x in lines if x["side"] == side] for side in coverage_worker.SIDES}
    works = {side: sum(x["status"] == "ok" for x in some) for side, some in by_side.items()}
    names = list(dict.fromkeys((x["library"], x["name"]) for x in lines))
    found = {(x["library"], x["name"], x["side"]): x for x in lines}
    errors = [x["masked_error"] for x in by_side["ours"] if "masked_error" in x and not x["mixers"]]
    missing = [library for library, known in libraries.items() if known is None]
    text = [
        "# Models of other libraries",
        "",
        "Made by `python -m benchmarks.coverage_elsewhere`: random weights, half of the channels of every layer, "
        "compared with the masked model in float64, then one training step. Torch-Pruning was told which layers "
        "make the output. "
        + ", ".join(f"{library} {known}" for library, known in libraries.items() if known)
        + f", torch {torch.__version__}, torch-pruning {version('torch-pruning')}."
        + f" Not installed, not run: {', '.join(missing)}." * bool(missing),
        "",
        f"**ss-pruning works on {works['ours']} of {len(names)}, Torch-Pruning's `BasePruner` on {works['tp']}.** "
        f"Largest difference to the masked model where zeroed and absent channels are the same: "
        f"{max(errors, default=0):.1e}.",
        "",
        "| library | model | ss-pruning | parameters removed | Torch-Pruning |",
        "|---|---|---|---:|---|",
    ]
    for library, name in names:
        ours, theirs = (found[library, name, side] for side in ("ours", "tp"))
        removed = f"{ours['removed']:.0%}" if "removed" in ours else ""
        text.append(f"| {library} | {name} | {_status(ours)} | {removed} | {_status(theirs)} |")
    return "\n".join(text) + "\n"


def _status(line: dict[str, Any]) -> str:
    first = line.get("error", "").split("\n")[0].replace("|", "/")[:100]
    return line["status"] + (f": {first}" if first else "")


def main() -> int:
    torch.set_num_threads(1)
    libraries = {library: installed(library) for library in LIBRARIES}
    lines = list(examined())
    if not lines:
        print("none of the libraries is installed", file=sys.stderr)
        return 2
    write("coverage_elsewhere", {"libraries": libraries, "lines": lines})
    PAGE.write_text(page(lines, libraries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
