"""Detectors and other models straight from their constructors: pruned by default, and used afterwards.

No warm-up pass, no option but the budget. Each is then run at another image size, copied, written and read back,
trained a step, and compared with the masked model in float64, from outside: detectors by what their heads put out for
given boxes, since what they detect jumps.
"""

from __future__ import annotations

import copy
import importlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.worker import (
    MAX_RATIO,
    OutOfTimeError,
    limited,
    masked,
    mixers,
    params,
    tensors,
    trains,
)
from ss_pruning import load, prune_, save
from ss_pruning._utils.running import call
from ss_pruning.config import Allocation

WAYS: dict[str, dict[str, Any]] = {
    "default": {"macs": 0.7},
    "local": {"ratio": 0.5, "allocation": Allocation("local", MAX_RATIO)},
}
TOLERANCE = 1e-10
Line = dict[str, Any]


@dataclass(frozen=True)
class Fresh:
    """A model that can be built, with inputs of two sizes.

    Attributes:
        library: The distribution that it is from.
        family: Models of one are built alike.
        name: Its name there.
        make: Builds it; weights are random.
        inputs: What its `forward` takes, by the side of the image in pixels.
        sides: Of the image that it is pruned on, and of another.
        heads: What to compare in float64: the model's own outputs, or a detector's before it selects.
        step: A training step; empty, or the error.
    """

    library: str
    family: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sides: tuple[int, int]
    heads: Callable[[nn.Module, int, torch.dtype], list[Tensor]]
    step: Callable[[nn.Module, int], str]


def torchvision_detectors() -> Iterator[Fresh]:
    """All of torchvision's; images are small, and so are the numbers of boxes of those that work box by box."""
    small = {"min_size": 96, "max_size": 128}
    few = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 4}
    few |= {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20}
    nets: list[tuple[str, str, dict[str, Any]]] = [
        ("ssdlite", "ssdlite320_mobilenet_v3_large", {}),
        ("ssd", "ssd300_vgg16", {}),
        ("retinanet", "retinanet_resnet50_fpn", small),
        ("retinanet", "retinanet_resnet50_fpn_v2", small),
        ("fcos", "fcos_resnet50_fpn", small),
        ("fasterrcnn", "fasterrcnn_mobilenet_v3_large_320_fpn", small | few),
        ("fasterrcnn", "fasterrcnn_resnet50_fpn", small | few),
        ("fasterrcnn", "fasterrcnn_resnet50_fpn_v2", small | few),
        ("maskrcnn", "maskrcnn_resnet50_fpn", small | few),
        ("keypointrcnn", "keypointrcnn_resnet50_fpn", small | few),
    ]
    detection = importlib.import_module("torchvision.models.detection")
    for family, name, options in nets:
        classes = 2 if family == "keypointrcnn" else 5
        make = partial(
            getattr(detection, name), weights=None, weights_backbone=None, num_classes=classes, **options
        )
        yield Fresh(
            "torchvision", family, name, make, _list_of_images, (96, 128), _before_selection, _detector_step
        )


def _list_of_images(side: int) -> tuple[list[Tensor]]:
    return ([torch.rand(3, side, side)],)


def _before_selection(model: nn.Module, side: int, dtype: torch.dtype) -> list[Tensor]:
    """What a detector's heads put out, for given boxes where they look at boxes."""
    net: Any = model
    side = (net.transform.fixed_size or (side,))[0]  # SSD's, whatever image comes
    found = net.backbone(torch.rand(1, 3, side, side).to(dtype))
    features = list(found.values())
    if not hasattr(net, "roi_heads"):
        return [*features, *tensors(net.head(features))]
    boxes = torch.tensor([[8.0, 8.0, 0.9 * side, 0.8 * side], [0.0, 10.0, side / 2, side / 2]]).to(dtype)
    answers, roi = tensors(net.rpn.head(features)), net.roi_heads
    for kind in ("box", "mask", "keypoint"):
        pool = getattr(roi, f"{kind}_roi_pool", None)
        if pool is not None:
            pooled = pool(found, [boxes], [(side, side)])
            head, predictor = getattr(roi, f"{kind}_head"), getattr(roi, f"{kind}_predictor")
            answers += tensors(predictor(head(pooled)))
    return [*features, *answers]


def _detector_step(model: nn.Module, side: int) -> str:
    """A step on two images with a box each."""
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, side, side, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    images = [torch.rand(3, side, side) for _ in range(2)]
    return _stepped(model, lambda: sum(model(images, [dict(target) for _ in images]).values()))


def _stepped(model: nn.Module, loss_of: Callable[[], Any]) -> str:
    try:
        model.train()
        loss_of().backward()
        graded = [p for p in model.parameters() if p.grad is not None]
        torch.optim.SGD(graded, 1e-4).step()
        return "" if graded else "no gradient"
    except Exception as error:
        return said(error)
    finally:
        model.eval()


def ultralytics_models() -> Iterator[Fresh]:
    """The smallest of every family and task."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes its settings when imported
    tasks = importlib.import_module("ultralytics.nn.tasks")
    for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n"):
        yield _yolo(tasks.DetectionModel, name)
    kinds = {
        "seg": tasks.SegmentationModel,
        "pose": tasks.PoseModel,
        "cls": tasks.ClassificationModel,
        "obb": tasks.OBBModel,
    }
    for name in ("yolov8n", "yolo11n"):
        for task, kind in kinds.items():
            yield _yolo(kind, f"{name}-{task}")


def _yolo(kind: Callable[..., nn.Module], name: str) -> Fresh:
    make = partial(kind, f"{name}.yaml", verbose=False)
    return Fresh("ultralytics", name, name, make, _one_image, (96, 160), _outputs, _plain_step)


def hugging_face_models() -> Iterator[Fresh]:
    """Built from a small config each: nothing is fetched."""
    lib = importlib.import_module("transformers")
    stages = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "num_labels": 10}
    attention = {"decoder_hidden_size": 64, "num_attention_heads": [1, 2, 4, 8]}
    nets = [
        ("resnet", lib.ResNetForImageClassification, lib.ResNetConfig(embedding_size=16, **stages)),
        ("convnextv2", lib.ConvNextV2ForImageClassification, lib.ConvNextV2Config(**stages)),
        ("segformer", lib.SegformerForSemanticSegmentation, lib.SegformerConfig(**stages, **attention)),
    ]
    for name, kind, config in nets:
        make = partial(kind, config)
        yield Fresh("transformers", name, name, make, _pixel_values, (64, 96), _outputs, _plain_step)


def _one_image(side: int) -> Tensor:
    return torch.rand(1, 3, side, side)


def _pixel_values(side: int) -> dict[str, Tensor]:
    return {"pixel_values": _one_image(side)}


def _outputs(model: nn.Module, side: int, dtype: torch.dtype) -> list[Tensor]:
    return tensors(model(_one_image(side).to(dtype)))


def _plain_step(model: nn.Module, side: int) -> str:
    return trains(model, _one_image(side))


FRESH: dict[str, Callable[[], Iterator[Fresh]]] = {
    "torchvision": torchvision_detectors,
    "ultralytics": ultralytics_models,
    "transformers": hugging_face_models,
}


# ----------------------------------------------------------------------------------------------------------
# Checks


def examine(fresh: Fresh, way: str, timeout: float) -> Line:
    """Everything about one model that is pruned in one of `WAYS`, as one line of results."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    dense, example = fresh.make().eval(), fresh.inputs(fresh.sides[0])
    model = _rebuilt(fresh, dense)
    line: Line = {"library": fresh.library, "name": fresh.name, "way": way, "pixels": fresh.sides[0]}
    started = time.process_time()
    try:
        with limited(timeout):
            report = prune_(model, example, **WAYS[way])
    except OutOfTimeError:
        return line | {
            "status": "timeout",
            "error": f"more than {timeout:g} s of CPU time",
            "seconds": timeout,
        }
    except Exception as error:
        return line | {"status": "error", "error": said(error), "seconds": time.process_time() - started}
    line |= {
        "seconds": time.process_time() - started,
        "params_kept": report.params_after / report.params_before,
        "macs_kept": report.macs_after / report.macs_before,
        "max_error": report.max_error,
        "by_decisions": report.by_decisions,
        "excluded": [
            {"paths": list(x.paths), "channels": x.channels, "reason": x.reason} for x in report.excluded
        ],
    }
    errors = [text for text in used(fresh, dense, model, line) if text]
    return line | {"status": "broken" if errors else "ok", "error": "; ".join(errors)}


def _rebuilt(fresh: Fresh, like: nn.Module) -> nn.Module:
    """Another of the same weights that is as fresh: not a copy of one that may have run."""
    model = fresh.make().eval()
    model.load_state_dict(like.state_dict())
    return model


def used(fresh: Fresh, dense: nn.Module, model: nn.Module, line: Line) -> Iterator[str]:
    """What goes wrong when a pruned model is used; empty texts where nothing does."""
    if params(model) >= params(dense):
        yield "no parameter was removed"
    for side in fresh.sides:
        yield _tried(f"at {side} pixels", lambda side=side: _run(model, fresh, side))  # type: ignore[misc]
    yield _tried("copied", lambda: _same_output(fresh, model, copy.deepcopy(model)))
    yield _tried("written and read", lambda: _same_output(fresh, model, _written_and_read(fresh, model)))
    yield _tried("masked", lambda: _compare(fresh, dense, model, line))
    if (error := fresh.step(model, fresh.sides[0])) and not fresh.step(
        _rebuilt(fresh, dense), fresh.sides[0]
    ):
        yield f"in training: {error}"


def _tried(what: str, check: Callable[[], str]) -> str:
    try:
        error = check()
    except Exception as problem:
        error = said(problem)
    return f"{what}: {error}" if error else ""


def _run(model: nn.Module, fresh: Fresh, side: int) -> str:
    with torch.no_grad():
        call(model, fresh.inputs(side))
    return ""


def _same_output(fresh: Fresh, model: nn.Module, other: nn.Module) -> str:
    example = fresh.inputs(fresh.sides[0])
    with torch.no_grad():
        pairs = zip(tensors(call(model, example)), tensors(call(other, example)), strict=True)
        return "" if all(torch.equal(a, b) for a, b in pairs) else "puts out something else"


def _written_and_read(fresh: Fresh, model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "pruned.safetensors")
        return load(Path(folder) / "pruned.safetensors", fresh.make)


def _compare(fresh: Fresh, dense: nn.Module, model: nn.Module, line: Line) -> str:
    """Compare with the masked model in float64, unless layers mix channels."""
    if mixers(dense):
        return ""
    removed = {c.path: set(c.removed) for c in vars(model)["ss_pruning_plan"].cuts if c.side == "in"}
    with torch.no_grad(), _same_noise():
        expected = fresh.heads(masked(dense, removed), fresh.sides[0], torch.float64)
    with torch.no_grad(), _same_noise():
        found = fresh.heads(copy.deepcopy(model).double(), fresh.sides[0], torch.float64)
    kept = [(a, b) for a, b in zip(expected, found, strict=True) if a.shape == b.shape]
    if len(kept) < len(expected) and fresh.heads is _outputs:
        return "shapes of outputs differ"
    line["masked_error"] = max(float((a - b).abs().max() / a.abs().max()) for a, b in kept)
    wrong = not line["masked_error"] <= TOLERANCE
    return f"differs from the masked model by {line['masked_error']:.1e}" if wrong else ""


@contextmanager
def _same_noise() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
