"""Which runtime takes an exported file, by the end of its name."""

from __future__ import annotations

from collections.abc import Mapping

from ss_pruning.profiling.exported_model import ExportedModel
from ss_pruning.profiling.onnx_model import OnnxModel
from ss_pruning.profiling.openvino_model import OpenVinoModel

RUNTIMES: Mapping[str, type[ExportedModel]] = {".onnx": OnnxModel, ".xml": OpenVinoModel}
