"""Models in eight bits: ONNX files whose convolutions compute in INT8, by onnxruntime's static quantisation.

Ranges come from calibration images; weights have a scale for each output channel, activations one for each tensor
(unsigned, which the kernels for x86 are fastest with), as onnxruntime's documentation advises for CPUs
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Batch norms are folded before.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ss_pruning._utils.files import check_apart, check_writable, replacing
from ss_pruning.compensation.fidelity import Reference, held_out
from ss_pruning.errors import InputError, ModelError, VerificationError
from ss_pruning.importance.calibration import Batch, gather
from ss_pruning.io.export import export, quiet
from ss_pruning.profiling.onnx_model import OnnxModel, require
from ss_pruning.report.formatting import percent
from ss_pruning.report.records import Fidelity

#: Fewer calibration images say too little of ranges; every fifth of them is held out.
LEAST_IMAGES = 10
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_AT_ONCE = 8


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
    model: nn.Module | str | os.PathLike[str], path: str | os.PathLike[str], calibration: Any
) -> Int8Exported:
    """Write a model as ONNX in INT8, whole or not at all, and compare the file with the model.

    What follows the last layers, such as the decoding of a detector's boxes, stays in float: pixels beside
    probabilities share no scale.

    Args:
        model: A model of one input, not changed, written with a free batch size; or an ONNX file in float, also of
            another exporter (its notes are kept).
        path: File to write, usually `*.onnx`.
        calibration: Unlabelled inputs as the model will see them, ten or more, some hundred as a rule: a tensor, or
            batches; labels beside them are ignored.

    Raises:
        InputError: onnxruntime or the images are missing, images have another size than the file takes, or the file
            cannot be written.
        ModelError: The model cannot be exported, or quantised.
        VerificationError: The file puts out NaN or Inf; it was not kept.

    Warns:
        UserWarning: The file's outputs say nothing of the model's.
    """
    require("onnx", "onnxruntime", *(["onnxscript"] if isinstance(model, nn.Module) else []))
    check_writable(path)
    images = gather(calibration, None)
    if len(images) < LEAST_IMAGES:
        raise InputError(
            f"{len(images)} calibration images say too little of the ranges of activations; give {LEAST_IMAGES} or "
            "more, some hundred as a rule"
        )
    with TemporaryDirectory() as folder:
        source = _as_file(model, images, Path(folder))
        check_apart(path, source)
        return _quantised(source, path, images)


def _as_file(model: nn.Module | str | os.PathLike[str], images: Batch, folder: Path) -> Path:
    """The model in float, as a file."""
    if not isinstance(model, nn.Module):
        return Path(model)
    device = next((tensor.device for tensor in model.parameters()), None)
    example = images[:1].mapped(lambda x: x.to(device)).inputs
    return export(model, folder / "float.onnx", example, "onnx").path


def _quantised(source: Path, path: str | os.PathLike[str], images: Batch) -> Int8Exported:
    in_float = OnnxModel(source)
    images = images.mapped(lambda x: x.cpu()).limited(in_float.batch or 1, in_float.batch)
    others, seen = held_out(images)
    reference = Reference(in_float, others)
    with replacing(path) as temporary:
        _quantise(source, temporary, seen)
        fidelity = reference.fidelity(OnnxModel(temporary))
        _check(fidelity)
    return Int8Exported(Path(path), Path(path).stat().st_size, len(seen), fidelity)


def _check(fidelity: Fidelity) -> None:
    if not math.isfinite(fidelity.error):
        raise VerificationError(
            "the INT8 file puts out NaN or Inf; it was not kept. Calibrate on images prepared as those that the model "
            "was trained on"
        )
    if fidelity.error >= 1:
        warnings.warn(
            f"the INT8 file's output error is {percent(fidelity.error)}, no better than a constant's: the model is "
            "untrained, or calibrated on too few images, or on others than it was trained on",
            stacklevel=4,
        )


def _quantise(source: Path, target: Path, images: Batch) -> None:
    """Fold what can be folded, and quantise the rest."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        with TemporaryDirectory() as folder, quiet():
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            network = onnx.load(prepared)
            for number, node in enumerate(network.graph.node):
                node.name = node.name or f"node_{number}"
            quantize_static(
                network,
                str(target),
                _Reader(network.graph.input[0].name, images),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_decoding(network.graph),
            )
    except (OSError, ModelError):
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"onnxruntime cannot quantise the model ({type(error).__name__}: {first}); if sizes other than the batch "
            "are free in the file, export it with fixed ones"
        ) from error


class _Reader:
    """Calibration images, as onnxruntime asks for them."""

    def __init__(self, name: str, images: Batch) -> None:
        self.name = name
        self.parts: Iterator[Batch] = iter(images.split(_AT_ONCE))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self.parts, None)
        return None if part is None else {self.name: _only(part.tensors()).numpy()}


def _only(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise ModelError(f"INT8 export takes models of one input; this one has {len(tensors)}")
    return tensors[0]


def _decoding(graph: Any) -> list[str]:
    """Names of the nodes that lead to no layer: pixels beside probabilities, say, which no common scale fits."""
    constants = {tensor.name for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    wanted: set[str] = set()
    names = []
    for node in reversed(graph.node):
        is_layer = node.op_type in _LAYERS and node.input[1] in constants and not _is_mean(node, made_by)
        if is_layer or wanted.intersection(node.output):
            wanted.update(node.input)
        else:
            names.append(node.name)
    if len(names) == len(graph.node):
        raise ModelError(
            "the model has no layer with weights in float32, so that there is nothing to quantise; of one in half "
            "precision give model.float()"
        )
    return names


def _is_mean(node: Any, made_by: dict[str, Any]) -> bool:
    """Whether it weighs the probabilities of a softmax, as detectors do to decode distances: no learned layer."""
    before = made_by.get(node.input[0])
    while before is not None and before.op_type in ("Reshape", "Transpose"):
        before = made_by.get(before.input[0])
    return before is not None and before.op_type == "Softmax"
