"""Pruned, in INT8, and both: file size, time and what the outputs are worth, of ONNX files in onnxruntime.

    python -m benchmarks.latency.int8 --nets all                       # adds to results/int8.json
    python -m benchmarks.latency.int8 --nets none --yolo runs/yolo     # the folder of examples/yolo/prune.py
    python -m benchmarks.latency.int8_page                             # docs/int8.md

One thread, one image at a time, the files in turns; time is that of the processor, whatever else the machine does.
Pruned is `prune_` to half of the multiply-accumulates, widths multiples of ROUND_TO (8 in the narrow net for CIFAR-10),
without training; nets that come with trained weights are reconstructed on the calibration images, of the others (random
weights, batch norms set on noise) only sizes and times mean something. INT8 is `export_int8`. Trained are CIFAR-10's
ResNet-56, EfficientNet-Lite0 (packages: see `benchmarks.accuracy.lite0`) and the YOLOv8n that the example trains.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.accuracy.lite0 import Material, dense_net, stream_layers
from benchmarks.common import DATA, RESULTS, write
from benchmarks.data import cifar
from benchmarks.data.models import load_checkpoint
from benchmarks.latency.practical import NETS, pictures
from ss_pruning import Allocation, export, export_int8, prune_
from ss_pruning.compensation.fidelity import Reference
from ss_pruning.importance.calibration import gather
from ss_pruning.profiling.latency import Timing, machine
from ss_pruning.profiling.onnx_model import OnnxModel

MACS, ROUND_TO, SIDE = 0.5, 16, 224
CALIBRATED_ON, MEASURED_ON = 256, 1000
WARM_UP, ROUNDS = 10, 100
WIDTHS = (48, 50, 52, 56, 58, 60, 62, 64)
VARIANTS = ("dense", "pruned", "INT8", "pruned, INT8")
Files = dict[str, Path]


class Case(NamedTuple):
    """A net and its images.

    Attributes:
        model: Dense.
        calibration: Images without labels.
        others: To compare outputs on; none of those.
        labels: Theirs, where the net is trained.
        ignore: What is not pruned.
        round_to: Widths are multiples of it.
    """

    model: nn.Module
    calibration: Tensor
    others: Tensor
    labels: Tensor | None = None
    ignore: tuple[str, ...] = ()
    round_to: int = ROUND_TO


def random_case(name: str) -> Case:
    """Random weights; batch norms with the statistics of noise, so that activations have a size."""
    torch.manual_seed(0)
    model = NETS[name].build() if name in NETS else _torchvision(name)
    noise = pictures(SIDE)
    model.train()
    with torch.no_grad():
        for part in noise[:96].split(32):
            model(part)
    return Case(model.eval(), noise[:128], noise[128:192])


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    made: nn.Module = models.get_model(name, weights=None)
    return made


def cifar_case() -> Case:
    others, labels = cifar.draw(cifar.load(DATA, "test"), MEASURED_ON, 0)
    calibration, _ = cifar.draw(cifar.load(DATA, "train"), CALIBRATED_ON, 0)
    model = load_checkpoint("resnet56", DATA / "pretrained").eval()
    return Case(model, cifar.as_input(calibration), cifar.as_input(others), labels, round_to=8)


def lite0_case() -> Case:
    model, material = dense_net(), Material(0, SIDE, CALIBRATED_ON // 2, 200, DATA)
    _, photos, labels = material.imagenet
    return Case(model, material.mixed[0], photos, labels, tuple(stream_layers(model)))


CASES: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: random_case("resnet18"),
    "mobilenetv3_large_100": lambda: random_case("mobilenetv3_large_100"),
    "efficientnet_lite0": lite0_case,
    "cifar_resnet56": cifar_case,
}


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Write the four files of a classifier, and measure them."""
    dense, compensation = case.model, "none" if case.labels is None else "reconstruct"
    files = {"dense": folder / "dense.onnx", "INT8": folder / "int8.onnx"}
    export(dense, files["dense"], case.calibration[:1])
    report = prune_(
        dense,
        case.calibration[:1],
        macs=MACS,
        allocation=Allocation(round_to=case.round_to),
        compensation=compensation,  # type: ignore[arg-type]
        calibration=None if case.labels is None else case.calibration,
        ignore=case.ignore,
    )
    files["pruned"] = export(dense, folder / "pruned.onnx", case.calibration[:1]).path
    quantised(files, case.calibration)
    result = {**timed(files, case.others[:1]), "macs": report.macs_after / report.macs_before}
    models = {name: OnnxModel(files[name]) for name in VARIANTS}
    reference = Reference(models["dense"], gather(case.others, None))
    result["trained"] = case.labels is not None
    for name, model in models.items():
        line = result["variants"][name]
        fidelity = reference.fidelity(model)
        line |= {"error": fidelity.error, "agreement": fidelity.agreement}
        if case.labels is not None:
            found = torch.cat([model(part) for part in case.others.split(100)])
            line["worth"] = float((found.argmax(1) == case.labels).float().mean())
    return {
        **result,
        "measure": "top-1",
        "side": case.others.shape[-1],
        "images": len(case.others),
        "round_to": case.round_to,
    }


def quantised(files: Files, images: Tensor) -> None:
    """Add the two files in INT8."""
    for name, source in (("INT8", "dense"), ("pruned, INT8", "pruned")):
        files[name] = export_int8(
            files[source], files[source].with_suffix(".int8.onnx"), images.contiguous()
        ).path


def timed(files: Files, image: Tensor) -> dict[str, Any]:
    """Sizes, times in turns, and the last one's time as a share of each."""
    timings = in_turns([OnnxModel(files[name]) for name in VARIANTS], image)
    both, dense = timings[-1], timings[0]
    lines = {}
    for name, timing in zip(VARIANTS, timings, strict=True):
        lines[name] = {"bytes": files[name].stat().st_size, **_shares(timing, dense, both)}
    return {"variants": lines, "rounds": len(dense.seconds)}


def in_turns(models: Sequence[OnnxModel], image: Tensor) -> list[Timing]:
    """Seconds of this thread, forwards and backwards; what runs beside it on the machine does not count."""
    times: list[list[float]] = [[] for _ in models]
    for done in range(WARM_UP + ROUNDS):
        for i in range(len(models))[:: 1 if done % 2 else -1]:
            began = time.thread_time()
            models[i](image)
            times[i].append(time.thread_time() - began)
    return [Timing(tuple(found[WARM_UP:])) for found in times]


def _shares(timing: Timing, dense: Timing, both: Timing) -> dict[str, Any]:
    return {
        "seconds": (timing if timing is dense else timing.levelled(dense)).median,
        "of_dense": timing.over(dense),
        "of_dense_spread": timing.spread_over(dense),
        "both_of_this_spread": both.spread_over(timing),
    }


def yolo(run: Path, folder: Path) -> dict[str, Any]:
    """The same of the detector that `examples/yolo/prune.py` has trained, exported and validated by Ultralytics."""
    from ultralytics import YOLO

    from ss_pruning.integrations.ultralytics import calibration_images, prune_yolo

    shutil.copy(run / "dense" / "weights" / "best.pt", folder / "dense.pt")
    dense, data = YOLO(folder / "dense.pt"), run / "data" / "data.yaml"
    side = int(dense.overrides["imgsz"])
    images = calibration_images(data, side, count=CALIBRATED_ON)
    options = {"allocation": Allocation(round_to=ROUND_TO), "compensation": "reconstruct"}
    pruned, report = prune_yolo(dense, macs=MACS, calibration=images, **options)
    pruned.save(folder / "pruned.pt")
    files = {
        name: Path(net.export(format="onnx", imgsz=side, simplify=False))
        for name, net in (("dense", dense), ("pruned", YOLO(folder / "pruned.pt")))
    }
    quantised(files, images)
    result = timed(files, images[:1])
    validation = {"data": str(data), "imgsz": side, "single_cls": True, "project": str(folder)}
    for name, file in files.items():
        box = YOLO(file, task="detect").val(
            **validation, batch=1, rect=False, workers=0, plots=False, verbose=False, device="cpu"
        )
        result["variants"][name]["worth"] = float(box.box.map)
    return {
        **result,
        "macs": report.macs_after / report.macs_before,
        "trained": True,
        "round_to": ROUND_TO,
        "measure": "mAP50-95",
        "side": side,
        "images": len(list((run / "data" / "images" / "val").iterdir())),
    }


def by_width(folder: Path) -> dict[str, Any]:
    """Time of three convolutions in INT8, width by width, as a share of the last width's."""
    models = []
    for width in WIDTHS:
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        layers = [
            layer for conv in (nn.Conv2d(3, width, 3, padding=1), *convs) for layer in (conv, nn.ReLU())
        ]
        path = folder / f"{width}.onnx"
        models.append(OnnxModel(export_int8(nn.Sequential(*layers).eval(), path, pictures(56)[:20]).path))
    timings = in_turns(models, pictures(56)[:1])
    last = timings[-1]
    found = {
        width: {"of_last": t.over(last), "spread": t.spread_over(last)}
        for width, t in zip(WIDTHS, timings, strict=True)
    }
    return {"widths": found, "rounds": len(last.seconds)}


def chosen(nets: list[str], run: Path | None) -> Iterator[tuple[str, Callable[[Path], dict[str, Any]]]]:
    """What was asked for, by name."""
    for name in [*CASES, "widths"] if "all" in nets else nets:
        if name in CASES:
            make = CASES[name]
            yield name, lambda folder, make=make: measured(make(), folder)  # type: ignore[misc]
        if name == "widths":
            yield name, by_width
    if run is not None:
        yield "yolov8n", lambda folder: yolo(run, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=[*CASES, "widths", "all", "none"], default=["all"])
    parser.add_argument("--yolo", type=Path, help="folder of examples/yolo/prune.py")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, work in chosen(options.nets, options.yolo):
        file = options.results / "int8.json"
        known = json.loads(file.read_text()) if file.is_file() else {"nets": {}}
        with tempfile.TemporaryDirectory() as folder:
            found = work(Path(folder))
        if name == "widths":
            known["widths"] = found
        else:
            known["nets"][name] = {**found, "machine": machine(torch.device("cpu"))}
        write("int8", {**known, "macs": MACS, "onnxruntime": version("onnxruntime")}, options.results)
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
