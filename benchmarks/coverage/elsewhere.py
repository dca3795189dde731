"""Which models of other libraries can be pruned: segmentation, medical imaging, detection, faces.

Torch-Pruning and ours side by side, as `benchmarks.coverage.run` does it: local ratio 0.5, random weights, both outputs
compared with the masked model's, a training step. Then detectors and others fresh from the constructor, by default and
by local 0.5 (`benchmarks.coverage.fresh`). Libraries that are not installed are left out, and the page says so.

    pip install --no-deps segmentation-models-pytorch monai ultralytics facenet-pytorch  # and what they import
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.elsewhere
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.elsewhere --fresh  # the second part alone, what is not there yet
    python -m benchmarks.coverage.elsewhere_page  # docs/coverage_elsewhere.md
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, versions, write
from benchmarks.coverage import fresh as coverage_fresh
from benchmarks.coverage import run, worker
from ss_pruning.graph.exclusions import OUTPUT_REASON
from ss_pruning.graph.groups import couple
from ss_pruning.graph.tracing import trace

NAME = "coverage_elsewhere"
TIMEOUT = 120.0
Line = dict[str, Any]

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
            for side in worker.SIDES:
                line = worker.examine(partial(_stirred, make), side, TIMEOUT, whole)
                yield {"library": library, "name": name, "side": side, **line}
                said = line.get("error", "")[:120]
                print(f"{library} {name} {side}: {line['status']} {line['seconds']:.1f} s {said}", flush=True)


def output_layers(model: nn.Module, x: Tensor) -> list[str]:
    """The layers whose width is the output's: Torch-Pruning has to be told, ours finds them."""
    excluded = couple(trace(model.eval(), x), model).excluded
    return [path for left in excluded if left.reason == OUTPUT_REASON for path in left.paths]


def _stirred(make: Callable[[], Made]) -> Made:
    """A model with fixed random weights; constant tensors get noise, so that every branch counts."""
    torch.manual_seed(0)
    model, x = make()
    return worker.stirred(model), x


def fresh_lines(before: list[Line]) -> Iterator[list[Line]]:
    """The lines of the second part, whenever there is one more; those of the same code are not run again."""
    known = {(x["library"], x["name"], x["way"]): x for x in before}
    digest = hashlib.sha256(Path(coverage_fresh.__file__).read_bytes()).hexdigest()[:12]
    for library, models in coverage_fresh.FRESH.items():
        if (installed_version := installed(library)) is None:
            print(f"{library}: not installed, left out", flush=True)
            continue
        code = f"{run.code_version('ours')} {library} {installed_version} {digest}"
        for fresh, way in ((fresh, way) for fresh in models() for way in coverage_fresh.WAYS):
            key = (library, fresh.name, way)
            if known.get(key, {}).get("code") != code:
                line = coverage_fresh.examine(fresh, way, TIMEOUT)
                known[key] = {**line, "code": code, "version": installed_version, "torch": torch.__version__}
                print(*key, f"{line['status']} {line['seconds']:.1f} s {line['error'][:120]}", flush=True)
                yield list(known.values())
    yield list(known.values())


def read() -> dict[str, Any]:
    """The results so far."""
    path = RESULTS / f"{NAME}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {"made_with": result.get("versions"), **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="run the second part alone, and keep the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = read()
    if not options.fresh:
        libraries = {library: installed(library) for library in LIBRARIES}
        lines = list(examined())
        if not lines:
            print("none of the libraries is installed", file=sys.stderr)
            return 2
        code = run.code_version("ours").split()[0]
        result |= {"libraries": libraries, "lines": lines, "made_with": versions(), "code": code}
    for fresh in fresh_lines(result.get("fresh", [])):
        result["fresh"] = fresh
        write(NAME, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
