"""Pruning histories of Torch-Pruning as plans, so that its checkpoints load like ours.

A history only names the layers that cuts began at; the rest is up to Torch-Pruning's graph. It is therefore replayed by
Torch-Pruning, on a copy whose tensors hold their own indices: what is left of them says what stayed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.copying import retyped
from ss_pruning.errors import FileFormatError, InputError, PlanError
from ss_pruning.graph.layers import is_depthwise, kind_of, width
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.plan import Plan

#: Where checkpoints keep a history, and where the weights.
_HISTORIES = ("pruning", "pruning_history", "history")
_WEIGHTS = ("model", "state_dict", "weights")

History = Sequence[Sequence[Any]]


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], History]:
    """Read weights and history; only tensors and plain values are unpickled.

    Raises:
        FileFormatError: The file is damaged, or holds something else.
    """
    wanted = "torch.save({'model': model.state_dict(), 'pruning': pruner.pruning_history()}, path)"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle it may raise anything
        raise FileFormatError(
            f"'{path}' is damaged, or holds more than tensors and plain values (a whole model, or what "
            f"torch_pruning.state_dict returns), which is not unpickled: that could run code. Write {wanted}"
        ) from error
    entries = found if isinstance(found, Mapping) else {}
    history = next((entries[key] for key in _HISTORIES if key in entries), None)
    weights = next((entries[key] for key in _WEIGHTS if key in entries), None)
    if not isinstance(history, (list, tuple)) or not isinstance(weights, Mapping):
        raise FileFormatError(f"'{path}' holds no weights beside a pruning history; write {wanted}")
    return {str(name): tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}, history


def plan_of(history: History, model: nn.Module, example_inputs: Any) -> Plan:
    """The plan that a history of Torch-Pruning's pruners or of `GraphPruner` comes to, for the dense model.

    One of `GraphPruner` holds plans, and needs no example inputs.

    Raises:
        InputError: Example inputs are needed.
        PlanError: The history does not fit the model.
    """
    if not all(isinstance(entry, (list, tuple)) and len(entry) == 3 for entry in history):
        raise PlanError("a pruning history is a list of (layer, whether outputs, channels)")
    if all(isinstance(what, str) for _, _, what in history):
        whole = Plan()
        for _, _, what in history:
            whole = whole.then(Plan.from_json(what))
        return whole
    if example_inputs is None:
        raise InputError(
            "a history of Torch-Pruning's is replayed by running the model: pass example_inputs="
        )
    small = retyped(model, Tensor.clone)
    _replay(history, small, example_inputs)
    return Plan(tuple(_cuts(model, small)))


def _replay(history: History, model: nn.Module, example_inputs: Any) -> None:
    """Let Torch-Pruning redo the cuts on tensors that hold their own indices."""
    import torch_pruning as tp

    inputs = list(example_inputs) if isinstance(example_inputs, tuple) else example_inputs
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                model.requires_grad_(True), inputs, customized_pruners={}
            )
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        graph.load_pruning_history([[str(name), bool(out), list(idxs)] for name, out, idxs in history])
    except Exception as error:
        raise PlanError(
            f"Torch-Pruning cannot redo this history ({type(error).__name__}: {error}); it belongs to another model, "
            "or to other example inputs"
        ) from error


def _cuts(model: nn.Module, small: nn.Module) -> Iterator[Cut]:
    shapes = {name: t.shape for name, t in (*model.named_parameters(), *model.named_buffers())}
    left = dict((*small.named_parameters(), *small.named_buffers()))
    modules, of_layers = dict(model.named_modules()), set()
    for path, module in modules.items():
        kind = kind_of(module)
        own = {f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
        own |= {f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)}
        if kind is None or not own:
            continue
        of_layers |= own
        if kind in ("synaptic", "depthwise"):
            yield from _cuts_of_weight(path, module, left[f"{path}.weight".lstrip(".")])
        else:
            first = next(name for name in sorted(own) if len(shapes[name]))
            if left[first].numel() < shapes[first].numel():
                yield Cut(path, "through", shapes[first].numel(), _kept(left[first], shapes[first], 0))
    for name in shapes.keys() - of_layers:
        for axis, (before, after) in enumerate(zip(shapes[name], left[name].shape, strict=True)):
            if after < before:
                yield Cut(name, "tensor", before, _kept(left[name], shapes[name], axis), axis)


def _cuts_of_weight(path: str, module: nn.Module, weight: Tensor) -> Iterator[Cut]:
    """The two sides of a convolution or linear layer."""
    shape = module.weight.shape
    assert isinstance(shape, torch.Size)
    swapped = isinstance(module, _ConvNd) and module.transposed
    inputs, outputs = width(module, "in"), width(module, "out")
    first, second = _kept(weight, shape, 0), _kept(weight, shape, 1)
    if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
        rows, columns = _indices(weight, shape)[:2]
        per_group = shape[0] // module.groups
        second = tuple(np.unique(rows // per_group * shape[1] + columns).tolist())
    kept = {"in": first if swapped else second, "out": second if swapped else first}
    if len(kept["out"]) < outputs:
        yield Cut(path, "out", outputs, kept["out"])
    if not is_depthwise(module) and len(kept["in"]) < inputs:
        yield Cut(path, "in", inputs, kept["in"])


def _indices(left: Tensor, shape: torch.Size) -> tuple[Any, ...]:
    return np.unravel_index(left.detach().numpy().astype(np.int64).ravel(), tuple(shape))


def _kept(left: Tensor, shape: torch.Size, axis: int) -> tuple[int, ...]:
    """Indices along an axis of a tensor of this shape that are left."""
    return tuple(np.unique(_indices(left, shape)[axis]).tolist())
