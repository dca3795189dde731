"""ONNX files in eight bits, by onnxruntime's static quantisation.

Weights have a scale for each output channel, activations one for each tensor (unsigned, which the kernels for x86 are
fastest with), as onnxruntime's documentation advises for CPUs
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Batch norms are folded before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ss_pruning.errors import ModelError, first_line
from ss_pruning.importance.calibration import Batch
from ss_pruning.io.writers import quiet

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: Calibration images that run at once.
AT_ONCE = 8
#: What is said of a model without layers.
NO_LAYER = (
    "the model has no layer with weights in float32, so that there is nothing to quantise; of one in half precision "
    "give model.float()"
)


def quantise_file(source: Path, target: Path, images: Batch) -> None:
    """Fold what can be folded of a file in float, and quantise the rest, with ranges from images.

    Raises:
        ModelError: onnxruntime cannot quantise the model.
    """
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
        raise ModelError(
            f"onnxruntime cannot quantise the model ({first_line(error)}); if sizes other than the batch "
            "are free in the file, export it with fixed ones"
        ) from error


class _Reader:
    """Calibration images, as onnxruntime asks for them."""

    def __init__(self, name: str, images: Batch) -> None:
        self.name = name
        self.parts: Iterator[Batch] = iter(images.split(AT_ONCE))

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
        raise ModelError(NO_LAYER)
    return names


def _is_mean(node: Any, made_by: dict[str, Any]) -> bool:
    """Whether it weighs the probabilities of a softmax, as detectors do to decode distances: no learned layer."""
    before = made_by.get(node.input[0])
    while before is not None and before.op_type in ("Reshape", "Transpose"):
        before = made_by.get(before.input[0])
    return before is not None and before.op_type == "Softmax"
