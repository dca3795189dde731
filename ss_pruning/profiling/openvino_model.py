"""A model of OpenVINO's, `NAME.xml` with its weights in `NAME.bin`, as a module that OpenVINO runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ss_pruning.errors import FileFormatError, first_line, require
from ss_pruning.profiling.exported_model import ExportedModel


class OpenVinoModel(ExportedModel):
    """Runs a file in OpenVINO, see `ExportedModel`; in float32, also where the processor would round to bfloat16."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The network, and its weights beside it."""
        return self.path, self.path.with_suffix(".bin")

    def _open(self) -> dict[str, list[Any]]:
        require("OpenVINO", "openvino", "openvino")
        import openvino

        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the file may be removed while the model runs
        try:
            self._compiled = core.compile_model(str(self.path), "CPU", settings)
        except Exception as error:
            raise FileFormatError(f"OpenVINO cannot open {str(self.path)!r}: {first_line(error)}") from error
        return {
            f"input {number}": [
                size.get_length() if size.is_static else "free" for size in port.get_partial_shape()
            ]
            for number, port in enumerate(self._compiled.inputs)
        }

    def _outputs(self, arrays: dict[str, Any]) -> list[Any]:
        found = self._compiled(list(arrays.values()))
        return [found[port] for port in self._compiled.outputs]
