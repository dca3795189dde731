"""How a program of `torch.export` becomes a file of each format, and how that is run."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.running import call
from ss_pruning.errors import ModelError, first_line
from ss_pruning.profiling.onnx_model import OnnxModel
from ss_pruning.profiling.openvino_model import OpenVinoModel

Format = Literal["onnx", "openvino", "pt2"]
#: Runs what was written.
Runner = Callable[[Any], list[Tensor]]


class Writer(NamedTuple):
    """One format.

    Attributes:
        endings: Of its files; the first is the one that is opened.
        needs: What needs packages, the extra that has them, and the packages.
        write: Called with the program and a path for each file.
    """

    endings: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[..., Runner]


def write_program(program: ExportedProgram, path: Path) -> nn.Module:
    """Write a program as it is; what is read back."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _write_pt2(program: ExportedProgram, path: Path) -> Runner:
    read = write_program(program, path)
    return lambda inputs: tensors_among(call(read, inputs))


def _write_onnx(program: ExportedProgram, path: Path) -> Runner:
    with _blaming_the_model("the model cannot be written as ONNX"):
        _save_onnx(program, path)
        model = OnnxModel(path)
    return lambda inputs: tensors_among(call(model, inputs))


def _write_openvino(program: ExportedProgram, path: Path, weights: Path) -> Runner:
    """By way of ONNX, which OpenVINO reads itself; it insists on names of its own."""
    import openvino

    with _blaming_the_model("the model cannot be written for OpenVINO"), TemporaryDirectory() as folder:
        source, target = Path(folder, "net.onnx"), Path(folder, "net.xml")
        _save_onnx(program, source)
        openvino.save_model(openvino.Core().read_model(source), target, compress_to_fp16=False)
        model = OpenVinoModel(target)
        for written, wanted in zip(model.files, (path, weights), strict=True):
            shutil.copyfile(written, wanted)
    return lambda inputs: tensors_among(call(model, inputs))


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    fused = torch.ops.aten.scaled_dot_product_attention.default
    calls = [node for node in program.graph.nodes if node.target is fused]
    if any(node.args[0].meta["val"].dim() != 4 for node in calls):  # torch writes no others
        program = program.run_decompositions({fused: attention})
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    assert written is not None
    _name_batch(written.model)
    written.save(path, external_data=False)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of an evaluated model from its definition, for any number of axes in front."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ value


def _name_batch(model: Any) -> None:
    """The one free axis is called "batch" in the file: `torch.export` numbers it, as s77, whatever it was called."""
    import onnx_ir

    graph = model.graph
    free = {str(axis) for value in graph.inputs for axis in value.shape or () if not isinstance(axis, int)}
    if len(free) != 1:
        return
    (number,) = free
    for value in {
        *graph.inputs,
        *graph.outputs,
        *(made for node in graph.all_nodes() for made in node.outputs),
    }:
        if value.shape is not None:
            axes = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
            value.shape = onnx_ir.Shape(
                [re.sub(rf"\b{number}\b", "batch", axis) if isinstance(axis, str) else axis for axis in axes]
            )


@contextlib.contextmanager
def _blaming_the_model(what: str) -> Iterator[None]:
    """Errors of an exporter are the model's, but for those of the disk.

    torch's exporter wraps an error again and again, and says what to do about the exporter: told is where it began.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"{what} ({first_line(cause)})") from error


WRITERS: Mapping[Format, Writer] = {
    "onnx": Writer((".onnx",), ("ONNX", "onnx", "onnxscript", "onnxruntime"), _write_onnx),
    "openvino": Writer((".xml", ".bin"), ("OpenVINO", "openvino", "onnxscript", "openvino"), _write_openvino),
    "pt2": Writer((".pt2",), (), _write_pt2),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the exporters say to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
