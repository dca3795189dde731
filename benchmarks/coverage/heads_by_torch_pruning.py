"""Torch-Pruning on models with attention: told how many heads there are, as its own example for timm does.

Each layer that makes queries, keys or values is given the number that its module stores; after the cut the module's
numbers (heads, and their width together) are set to what is left. What comes out is compared with the dense model in
which all that was removed is masked, in float64, as our own cuts are.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.coverage.worker import OutOfTimeError, limited
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Selection
from ss_pruning.graph.layers import is_norm, width
from ss_pruning.graph.tracing import trace
from ss_pruning.surgery.equivalence.masked_model import masked

_COUNTS = ("num_heads", "num_attention_heads", "heads", "n_heads")
_PARTS = ("qkv", "kv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "to_q", "to_kv")
_SECONDS = 30.0


def heads_of(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, str]]:
    """By layer that makes queries, keys or values, the module that stores how many heads it has, and as what."""
    found: dict[nn.Module, tuple[nn.Module, str]] = {}
    for module in model.modules():
        count = next((name for name in _COUNTS if type(vars(module).get(name)) is int), None)
        if count is None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            found[module] = module, count
        for name, child in module.named_children():
            if name in _PARTS and isinstance(child, (nn.Linear, nn.Conv2d)):
                found[child] = module, count
    return found


def prune(
    model: nn.Module, x: Tensor, ignored: Collection[str], ratio: float = 0.5, **options: Any
) -> Selection:
    """A share of the heads and of all channels go but for the layers `ignored`; returns what stays, by layer side.

    Args:
        model: Cut in place; may break.
        x: What it takes.
        ignored: Paths of layers whose outputs stay.
        ratio: The share.
        options: Of Torch-Pruning's pruner.
    """
    heads, names = heads_of(model), {module: path for path, module in model.named_modules()}
    pruner = tp.pruner.BasePruner(
        model,
        x,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads={layer: getattr(module, name) for layer, (module, name) in heads.items()},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[module for module, path in names.items() if path in ignored],
        output_transform=_summed,
        **{"importance": tp.importance.MagnitudeImportance(), **options},
    )
    before = {layer: width(layer, "out") for layer in heads if not isinstance(layer, nn.MultiheadAttention)}
    kept: dict[Any, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dep, indices in group:
            key = _side(names.get(dep.target.module, ""), dep, pruner)
            if key is not None:
                channels = kept.setdefault(key, [*range(width(dep.target.module, "in"))])
                gone = set(tp._helpers.to_plain_idxs(indices))
                kept[key] = [channel for at, channel in enumerate(channels) if at not in gone]
        group.prune()
    for layer, (module, name) in heads.items():
        _set_numbers(module, name, before.get(layer, 0), layer, pruner.num_heads.get(layer))
    return {key: tuple(channels) for key, channels in kept.items()}


def _summed(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    total: Tensor = sum(t.sum() for t in (output if isinstance(output, tuple) else (output,)))
    return total


def _side(path: str, dep: Any, pruner: Any) -> tuple[str, str] | None:
    """What a step of a group removes: what a layer reads, or a norm's channels."""
    module = dep.target.module
    if isinstance(module, nn.Module) and is_norm(module):
        return path, "through"
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return None
    reads = dep.handler == pruner.DG.get_pruner_of_module(module).prune_in_channels
    return (path, "in") if reads and getattr(module, "groups", 1) == 1 else None


def _set_numbers(module: nn.Module, name: str, before: int, layer: nn.Module, heads: int | None) -> None:
    """How many heads there are, and how wide they are together, whatever it is called.

    Where nothing of the layer went, as in Swin, its heads are still there, whatever Torch-Pruning counts.
    """
    if heads is None or isinstance(module, nn.MultiheadAttention) or width(layer, "out") == before:
        return
    setattr(module, name, heads)
    parts = 3 if layer is getattr(module, "qkv", None) else 1
    for wide, value in list(vars(module).items()):
        if type(value) is int and value == before // parts:
            setattr(module, wide, width(layer, "out") // parts)


def attempt(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What Torch-Pruning makes of a model (which it may break): "right", "wrong", "failed" or "not compared"."""
    dense, before = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    try:
        with limited(_SECONDS):
            connectivity = trace(model, x)
            selection = prune(model, x, connectivity.reaches_output)
            with torch.no_grad():
                model.eval()(x)
    except OutOfTimeError:
        return {"outcome": "failed", "error": f"took over {_SECONDS:.0f} s"}
    except Exception as error:
        return {"outcome": "failed", "error": f"{type(error).__name__}: {error}"[:200]}
    left = {"removed": 1 - sum(p.numel() for p in model.parameters()) / before}
    if any(isinstance(module, nn.MultiheadAttention) for module in dense.modules()):
        return left | {
            "outcome": "not compared"
        }  # torch's module holds its layers packed, so that none can be masked
    return left | {
        "outcome": "right" if _difference(dense, model, selection, connectivity, x) <= 1e-6 else "wrong"
    }


def _difference(
    dense: nn.Module, cut: nn.Module, selection: Selection, connectivity: Connectivity, x: Tensor
) -> float:
    known = {key: kept for key, kept in selection.items() if key[0] in connectivity.layers}
    dense, cut, x = dense.double(), cut.double(), x.double()
    with torch.no_grad(), masked(dense, known, connectivity):
        expected = _first(dense(x))
    with torch.no_grad():
        found = _first(cut(x))
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))


def _first(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
