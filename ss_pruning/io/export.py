"""Models for other runtimes: ONNX and `torch.export` programs, with any batch size, run and compared as written."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.copying import copied
from ss_pruning._utils.files import check_writable, replacing
from ss_pruning._utils.running import as_arguments, call, preserved, quiet_hooks
from ss_pruning.errors import InputError, ModelError, VerificationError
from ss_pruning.graph.refusals import check_module
from ss_pruning.profiling.onnx_model import OnnxModel, require

Format = Literal["onnx", "pt2"]
#: Largest difference between what the file and the model put out, relative to the largest output.
TOLERANCE = 1e-4
_BATCHES = 2, 3  # exported with the first, tried with both


@dataclass(frozen=True)
class Exported:
    """A file that was written and tried.

    Attributes:
        path: The file.
        format: "onnx" or "pt2".
        bytes: Its size.
        max_error: Largest difference between its outputs and the model's, relative to the largest output, at two
            batch sizes.
    """

    path: Path
    format: Format
    bytes: int
    max_error: float


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    format: Format | None = None,  # noqa: A002 - what everybody calls it
) -> Exported:
    """Write `model` in eval mode for other runtimes, whole or not at all, and check the file against the model.

    The first axis of every input is the batch and stays free; all other sizes are fixed. The check runs the file, ONNX
    in onnxruntime, on two batch sizes.

    Args:
        model: Any model that `torch.export` can follow; not changed.
        path: File to write, usually `*.onnx` or `*.pt2`.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        format: "onnx" or "pt2"; by default what the file's name ends in.

    Raises:
        InputError: The format is unknown, the file cannot be written, or ONNX is not installed.
        ModelError: `torch.export` cannot follow the model.
        VerificationError: The file puts out something else than the model; it was not kept.
    """
    check_module(model, "export")
    check_writable(path)
    chosen = _format(path, format)
    if chosen == "onnx":
        require("onnxruntime", "onnxscript")
        if any(tensor.dtype is torch.bfloat16 for tensor in tensors_among(example_inputs)):
            raise InputError("onnxruntime takes no bfloat16 inputs: export model.float(), with float inputs")
    small, large = (_with_batch(example_inputs, batch) for batch in _BATCHES)
    with quiet_hooks(model, example_inputs), preserved(model, training=False), quiet():
        program = _followed(model, small)
        with replacing(path) as temporary:
            run = _WRITERS[chosen](program, temporary)
            error = max(_difference(run, model, inputs) for inputs in (small, large))
            if not error <= TOLERANCE:  # NaN, too
                raise VerificationError(
                    f"the {chosen} file's outputs differ from the model's by {error:.1e} of the largest; it was not "
                    "kept"
                )
    written = Path(path)
    return Exported(written, chosen, written.stat().st_size, error)


def _format(path: str | os.PathLike[str], given: str | None) -> Format:
    chosen = given or Path(path).suffix.removeprefix(".")
    if chosen not in get_args(Format):
        raise InputError(
            f"format={chosen!r} is unknown; use 'onnx' or 'pt2', or name the file *.onnx or *.pt2"
        )
    return chosen  # type: ignore[return-value]


def _with_batch(inputs: Any, batch: int) -> Any:
    """The inputs repeated to another batch size, each sample a little different."""

    def repeat(tensor: Tensor) -> Tensor:
        if not tensor.dim():
            raise InputError("every input needs a batch axis to be exported")
        many = tensor[:1].repeat(batch, *[1] * (tensor.dim() - 1))
        if not many.is_floating_point():
            return many
        scale = torch.linspace(1.0, 0.5, batch, dtype=many.dtype, device=many.device)
        return many * scale.reshape(-1, *[1] * (tensor.dim() - 1))

    return pytree.tree_map_only(Tensor, repeat, inputs)


def _followed(model: nn.Module, inputs: Any) -> torch.export.ExportedProgram:
    """The model as a program with a free batch size."""
    args, kwargs = as_arguments(inputs)
    batch = torch.export.Dim("batch")
    free = pytree.tree_map_only(Tensor, lambda _: {0: batch}, inputs)
    shapes = free if isinstance(free, (dict, tuple)) and not isinstance(inputs, Tensor) else (free,)
    frozen = copied(model).eval().requires_grad_(False)
    try:
        return torch.export.export(frozen, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(
            f"torch.export cannot follow the model with a free batch size ({type(error).__name__}: {first}); see "
            "https://docs.pytorch.org/docs/stable/export.html for what it needs"
        ) from error


Runner = Callable[[Any], list[Tensor]]


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> Runner:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())
    read = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda inputs: tensors_among(call(read, inputs))


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> Runner:
    try:
        written = torch.onnx.export(program, dynamo=True, verbose=False)
        assert written is not None
        written.save(path, external_data=False)
        model = OnnxModel(path)
    except OSError:
        raise  # the disk is full, say: nothing is wrong with the model
    except Exception as error:
        cause = _innermost(error)
        first = str(cause).strip().split("\n")[0]
        raise ModelError(f"the model cannot be written as ONNX ({type(cause).__name__}: {first})") from error
    return lambda inputs: tensors_among(call(model, inputs))


def _innermost(error: BaseException) -> BaseException:
    """Where it began: torch's exporter wraps an error again and again, and says what to do about the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


_WRITERS: dict[Format, Callable[[torch.export.ExportedProgram, Path], Runner]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}


def _difference(run: Runner, model: nn.Module, inputs: Any) -> float:
    """Largest difference between the outputs, relative to the largest of each; infinite if they do not even match."""
    with torch.no_grad():
        right, found = tensors_among(call(model, inputs)), run(inputs)
    if [t.shape for t in right] != [t.shape for t in found]:
        return float("inf")
    errors = [
        float((a.cpu().double() - b.cpu().double()).abs().max() / a.abs().max().clamp_min(1e-12).cpu())
        for a, b in zip(right, found, strict=True)
        if a.numel()
    ]
    return max(errors, default=0.0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the exporters say to their own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
