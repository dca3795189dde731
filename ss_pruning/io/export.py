"""Models for other runtimes, ONNX, OpenVINO and `torch.export`, with any batch size, run and compared as written."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.copying import copied
from ss_pruning._utils.files import check_writable, replacing
from ss_pruning._utils.running import as_arguments, call, preserved, quiet_hooks
from ss_pruning.errors import InputError, ModelError, VerificationError, first_line, require
from ss_pruning.graph.refusals import check_module
from ss_pruning.io.writers import WRITERS, Format, Runner, quiet

#: Largest difference between what the file and the model put out, relative to the largest output.
TOLERANCE = 1e-4
_BATCHES = 2, 3  # exported with the first, tried with both


@dataclass(frozen=True)
class Exported:
    """A file that was written and tried.

    Attributes:
        path: The file.
        format: "onnx", "openvino" or "pt2".
        bytes: Its size; with OpenVINO's, that of the weights beside it, too.
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

    The first axis of every input is the batch and stays free; all other sizes are fixed. The check runs the file, in
    onnxruntime, OpenVINO or torch, on two batch sizes.

    Args:
        model: Any model that `torch.export` can follow; not changed.
        path: File to write: `*.onnx`, `*.pt2`, or `*.xml` for OpenVINO, with the weights in `*.bin` beside it.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        format: "onnx", "openvino" or "pt2"; by default what the file's name ends in.

    Raises:
        InputError: The format is unknown, the file cannot be written, or what the format needs is not installed.
        ModelError: `torch.export` cannot follow the model.
        VerificationError: The file puts out something else than the model; it was not kept.
    """
    check_module(model, "export")
    check_writable(path)
    chosen = _format(path, format)
    files = _files(path, chosen)
    for file in files[1:]:
        check_writable(file)
    if WRITERS[chosen].needs:
        require(*WRITERS[chosen].needs)
        if any(tensor.dtype is torch.bfloat16 for tensor in tensors_among(example_inputs)):
            raise InputError(f"{chosen} takes no bfloat16 inputs: export model.float(), with float inputs")
    small, large = (_with_batch(example_inputs, batch) for batch in _BATCHES)
    with quiet_hooks(model, example_inputs), preserved(model, training=False), quiet():
        program = followed(copied(model).eval().requires_grad_(False), small)
        with contextlib.ExitStack() as stack:
            # The last takes its place first: what will be opened comes when all else is there.
            run = WRITERS[chosen].write(program, *(stack.enter_context(replacing(file)) for file in files))
            error = max(_difference(run, model, inputs) for inputs in (small, large))
            if not error <= TOLERANCE:  # NaN, too
                raise VerificationError(
                    f"the {chosen} file's outputs differ from the model's by {error:.1e} of the largest; it was not "
                    "kept"
                )
    return Exported(files[0], chosen, sum(file.stat().st_size for file in files), error)


def _format(path: str | os.PathLike[str], given: str | None) -> Format:
    by_name = _by_name(path)
    chosen = given or by_name
    if chosen not in WRITERS:
        raise InputError(
            f"format={chosen!r} is unknown; use 'onnx', 'openvino' or 'pt2', or name the file *.onnx, *.xml or *.pt2"
        )
    if chosen == "openvino" != by_name:
        raise InputError(
            f"OpenVINO reads *.xml, with the weights in *.bin beside it: {str(path)!r} ends otherwise"
        )
    check_ending(path, chosen)  # type: ignore[arg-type]
    return chosen  # type: ignore[return-value]


def _by_name(path: str | os.PathLike[str]) -> str:
    ending = Path(path).suffix
    return next((known for known, writer in WRITERS.items() if writer.endings[0] == ending), ending[1:])


def check_ending(path: str | os.PathLike[str], chosen: Format) -> None:
    """Refuse a name that would mislead whoever opens the file by its ending."""
    by_name = _by_name(path)
    if by_name in WRITERS and chosen != by_name:
        ending = WRITERS[chosen].endings[0]
        raise InputError(
            f"format={chosen!r}, but {str(path)!r} ends as a file of {by_name} does: name it "
            f"{str(Path(path).with_suffix(ending))!r}, or leave the format out"
        )


def _files(path: str | os.PathLike[str], chosen: Format) -> list[Path]:
    """All that is written."""
    return [Path(path), *(Path(path).with_suffix(ending) for ending in WRITERS[chosen].endings[1:])]


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


def followed(model: nn.Module, inputs: Any, strict: bool = False) -> torch.export.ExportedProgram:
    """The model as a program with a free batch size, of two inputs or more; `strict` follows its Python code, too.

    Raises:
        ModelError: `torch.export` cannot follow the model.
    """
    args, kwargs = as_arguments(inputs)
    batch = torch.export.Dim("batch")
    free = pytree.tree_map_only(Tensor, lambda _: {0: batch}, inputs)
    shapes = free if isinstance(free, (dict, tuple)) and not isinstance(inputs, Tensor) else (free,)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    except Exception as error:
        raise ModelError(
            f"torch.export cannot follow the model with a free batch size ({first_line(error)}); see "
            "https://docs.pytorch.org/docs/stable/export.html for what it needs"
        ) from error


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
