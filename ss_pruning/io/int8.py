"""Models in eight bits, whose convolutions compute in INT8: ONNX by onnxruntime, programs of `torch.export` by torchao.

Ranges come from calibration images; the file is compared with the model on others.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from ss_pruning._utils.copying import copied
from ss_pruning._utils.files import check_apart, check_writable, replacing
from ss_pruning._utils.running import preserved, quiet_hooks
from ss_pruning.compensation.fidelity import Reference, held_out
from ss_pruning.errors import InputError, VerificationError, require
from ss_pruning.graph.refusals import check_module
from ss_pruning.importance.calibration import Batch, gather
from ss_pruning.io.export import check_ending, export
from ss_pruning.io.int8_onnx import quantise_file
from ss_pruning.io.int8_program import quantised_program
from ss_pruning.io.writers import quiet, write_program
from ss_pruning.profiling.onnx_model import OnnxModel
from ss_pruning.report.formatting import percent
from ss_pruning.report.records import Fidelity

#: Fewer calibration images say too little of ranges; every fifth of them is held out.
LEAST_IMAGES = 10


@dataclass(frozen=True)
class Int8Exported:
    """A file that was written and tried.

    Attributes:
        path: The file.
        bytes: Its size.
        images: So many were calibrated on.
        fidelity: How near its outputs are to those of the same network in float, on images that were held out.
    """

    path: Path
    bytes: int
    images: int
    fidelity: Fidelity

    def __str__(self) -> str:
        """One line for people."""
        found = self.fidelity
        same = "" if found.agreement is None else f", top-1 agreement {percent(found.agreement)}"
        return (
            f"{self.path} ({self.bytes / 1e6:.1f} MB): INT8, ranges from {self.images} images; on {found.inputs} "
            f"others the output error is {percent(found.error, 2)}{same}"
        )


def export_int8(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    calibration: Any,
    format: Literal["onnx", "pt2"] | None = None,  # noqa: A002 - as in export
) -> Int8Exported:
    """Write a model in INT8, whole or not at all, and compare the file with the model.

    What follows the last layers, such as the decoding of a detector's boxes, stays in float: pixels beside
    probabilities share no scale.

    Args:
        model: A model of one input, not changed, written with a free batch size; or, for ONNX, a file in float, also of
            another exporter (its notes are kept).
        path: File to write, usually `*.onnx` or `*.pt2`.
        calibration: Unlabelled inputs as the model will see them, ten or more, some hundred as a rule: a tensor, or
            batches; labels beside them are ignored.
        format: "onnx", or "pt2" for a program of `torch.export`; by default "pt2" if the file's name ends so.

    Raises:
        InputError: What the format needs is not installed, images are missing or have another size than the file takes,
            or the file cannot be written.
        ModelError: The model cannot be exported, or quantised.
        VerificationError: The file puts out NaN or Inf; it was not kept.

    Warns:
        UserWarning: The file's outputs say nothing of the model's.
    """
    check_writable(path)
    chosen = format or {".pt2": "pt2", ".xml": "openvino"}.get(Path(path).suffix, "onnx")
    if chosen not in _WAYS:
        raise InputError(
            f"format={chosen!r} is unknown for INT8; use 'onnx', which OpenVINO reads as well, or 'pt2'"
        )
    check_ending(path, chosen)  # type: ignore[arg-type]
    with quiet():
        _check_packages(chosen, model)
    images = gather(calibration, None)
    if len(images) < LEAST_IMAGES:
        raise InputError(
            f"{len(images)} calibration images say too little of the ranges of activations; give {LEAST_IMAGES} or "
            "more, some hundred as a rule"
        )
    found = _WAYS[chosen](model, path, images)
    if found.fidelity.error >= 1:
        warnings.warn(
            f"the INT8 file's output error is {percent(found.fidelity.error)}, no better than a constant's: the model "
            "is untrained, or calibrated on too few images, or on others than it was trained on",
            stacklevel=2,
        )
    return found


def _check_packages(chosen: str, model: Any) -> None:
    if chosen == "pt2":
        require("INT8 as a program of torch.export", "torchao", "torchao")
    else:
        require("INT8 as ONNX", "onnx", "onnx", "onnxruntime", *["onnxscript"] * isinstance(model, nn.Module))


def _as_onnx(model: Any, path: str | os.PathLike[str], images: Batch) -> Int8Exported:
    with TemporaryDirectory() as folder:
        source = _in_float(model, images, Path(folder))
        check_apart(path, source)
        in_float = OnnxModel(source)
        images = images.mapped(lambda x: x.cpu()).limited(in_float.batch or 1, in_float.batch)
        others, seen = held_out(images)

        def write(temporary: Path) -> nn.Module:
            quantise_file(source, temporary, seen)
            return OnnxModel(temporary)

        return _compared(path, len(seen), Reference(in_float, others), write)


def _in_float(model: nn.Module | str | os.PathLike[str], images: Batch, folder: Path) -> Path:
    """The model in float, as a file."""
    if not isinstance(model, nn.Module):
        return Path(model)
    device = next((tensor.device for tensor in model.parameters()), None)
    example = images[:1].mapped(lambda x: x.to(device)).inputs
    return export(model, folder / "float.onnx", example, "onnx").path


def _as_program(model: Any, path: str | os.PathLike[str], images: Batch) -> Int8Exported:
    if isinstance(model, (str, os.PathLike)):
        raise InputError(
            f"a program is made of a model, not of the file {str(model)!r}: give the module, or write ONNX"
        )
    check_module(model, "export")
    images = images.mapped(lambda x: x.cpu())
    others, seen = held_out(images)
    with quiet_hooks(model, images[:1].inputs), preserved(model, training=False), quiet():
        on_cpu = copied(model).cpu().requires_grad_(False)
        reference, program = Reference(on_cpu, others), quantised_program(on_cpu, seen)
        return _compared(path, len(seen), reference, lambda temporary: write_program(program, temporary))


_WAYS: dict[str, Callable[..., Int8Exported]] = {"onnx": _as_onnx, "pt2": _as_program}


def _compared(
    path: str | os.PathLike[str], images: int, reference: Reference, write: Callable[[Path], nn.Module]
) -> Int8Exported:
    """Write a file, and keep it if it puts out numbers."""
    with replacing(path) as temporary:
        fidelity = reference.fidelity(write(temporary))
        if not math.isfinite(fidelity.error):
            raise VerificationError(
                "the INT8 file puts out NaN or Inf; it was not kept. Calibrate on images prepared as those that the "
                "model was trained on"
            )
    return Int8Exported(Path(path), Path(path).stat().st_size, images, fidelity)
