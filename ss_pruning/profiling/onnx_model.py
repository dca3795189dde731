"""An ONNX file as a module that onnxruntime runs."""

from __future__ import annotations

from typing import Any

import torch

from ss_pruning.errors import FileFormatError, first_line, require
from ss_pruning.profiling.exported_model import ExportedModel


class OnnxModel(ExportedModel):
    """Runs a file in onnxruntime, see `ExportedModel`."""

    def _open(self) -> dict[str, list[Any]]:
        require("ONNX", "onnx", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise FileFormatError(
                f"onnxruntime cannot open {str(self.path)!r}: {first_line(error)}"
            ) from error
        return {entry.name: entry.shape for entry in self._session.get_inputs()}

    def _outputs(self, arrays: dict[str, Any]) -> list[Any]:
        outputs: list[Any] = self._session.run(None, arrays)
        return outputs
