"""Pruned models as files: safetensors, with the plan and the architecture's name in the metadata. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ss_pruning._atomic import replacing
from ss_pruning.errors import FileFormatError, InputError, PlanError
from ss_pruning.surgery import PLAN_ATTRIBUTE, Plan

_KEY = "ss_pruning"
_FORMAT = 1

Architecture = str | Callable[[], nn.Module]


def save(model: nn.Module, path: str | os.PathLike[str], architecture: str | None = None) -> None:
    """Write a (pruned) model's tensors, its plan, and how to build the dense architecture; atomically.

    Args:
        model: The model; if it was pruned here it carries its plan.
        path: File to write, usually `*.safetensors`.
        architecture: How `load` can build the dense model by itself, such as "timm:resnet18", "torchvision:resnet18"
            or "demo:digits"; None if `load` will be given a callable.

    Raises:
        InputError: The folder is missing or read-only.
    """
    plan = getattr(model, PLAN_ATTRIBUTE, Plan())
    note = {"format": _FORMAT, "architecture": architecture, "plan": plan.to_json()}
    # Cloned: safetensors refuses tensors that share memory, which tied weights do.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), metadata={_KEY: json.dumps(note)})


def load(path: str | os.PathLike[str], architecture: Architecture | None = None) -> nn.Module:
    """Rebuild a model written by `save`: build the dense architecture, apply the plan, load the tensors.

    Args:
        path: The file.
        architecture: A callable that builds the dense model, or a name such as "timm:resnet18"; may be left out
            where the file names one.

    Returns:
        The model in eval mode, on the CPU, with outputs equal bit for bit to the saved one's.

    Raises:
        InputError: The file does not exist, or it names no architecture and none is given.
        FileFormatError: The file is truncated, damaged, or not written by `save`.
        PlanError: The architecture is not the one that was pruned.
    """
    note, tensors = _read(path)
    model = _build(architecture if architecture is not None else note["architecture"], path)
    plan = Plan.from_json(note["plan"])
    plan.apply_(model)
    _fill(model, tensors, path)
    return model.eval()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise InputError(f"there is no file '{path}'")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"'{path}' is truncated or no safetensors file ({error})") from error
    try:
        note = json.loads(metadata[_KEY])
        if note["format"] != _FORMAT:
            raise FileFormatError(f"'{path}' has format {note['format']!r}; this version reads {_FORMAT}")
        return {"architecture": note["architecture"], "plan": note["plan"]}, tensors
    except (KeyError, ValueError, TypeError) as error:
        raise FileFormatError(
            f"'{path}' holds no plan of ours; write files with ss_pruning.save, or load plain weights yourself"
        ) from error


def _build(architecture: Any, path: str | os.PathLike[str]) -> nn.Module:
    if architecture is None:
        raise InputError(
            f"'{path}' does not name its architecture; pass a callable that builds the dense model: "
            "load(path, lambda: MyNet())"
        )
    if isinstance(architecture, str):
        from ss_pruning.models import build_model

        if architecture.partition(":")[0] not in ("timm", "torchvision", "demo"):
            raise InputError(
                f"'{path}' was made from '{architecture}', which runs code of a local file; build it yourself and "
                "pass a callable: load(path, factory)"
            )
        return build_model(architecture)
    model = architecture()
    if not isinstance(model, nn.Module):
        raise InputError("the architecture callable must return a torch.nn.Module")
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load by assignment of values, keeping dtypes as saved."""
    state = model.state_dict()
    if set(state) != set(tensors):
        odd = sorted(set(state) ^ set(tensors))
        raise PlanError(f"'{path}' and the architecture differ in {len(odd)} tensors, first '{odd[0]}'")
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise PlanError(
                f"'{name}' has shape {tuple(tensor.shape)} in '{path}', {tuple(state[name].shape)} in the architecture"
            )
    # Cloned: a file's tensors lie at any address, and kernels round differently on memory that is not aligned.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
