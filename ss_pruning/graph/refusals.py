"""Models and example inputs that cannot be used as they are, refused before any work, with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.modules import modules_of, tensors_of
from ss_pruning.errors import InputError, ModelError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_FORMS = "a tensor [batch, channels, height, width], a tuple of positional or a dict of keyword arguments"


def usable_inputs(example_inputs: Any, name: str = "example_inputs") -> Any:
    """Example inputs with any mapping as a dict.

    Raises:
        InputError: They hold no tensor, or one without values.
    """
    inputs = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    tensors = tensors_among(inputs)
    if not tensors:
        raise InputError(
            f"{name}={_shown(example_inputs)} holds no tensor; give what the model's forward takes: {_FORMS}"
        )
    if not any(tensor.dim() for tensor in tensors):
        raise InputError(
            f"{name} is a single number, no batch; give what the model's forward takes: {_FORMS}"
        )
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            what = "lies on the meta device, without values" if tensor.is_meta else "is empty"
            raise InputError(
                f"an example input of shape {list(tensor.shape)} {what}; the model is run on it: give a real one, such "
                "as torch.randn of that shape"
            )
    return inputs


def _shown(value: Any) -> str:
    """In one line: arrays tell themselves in many."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"<{type(value).__name__}>"


def check_module(model: Any, verb: str) -> None:
    """Refuse what is no module of Python's with its weights in it, and what hides one in a wrapper.

    Raises:
        InputError: Names what to give instead.
        ModelError: Names the first tensor without values.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"the model is {kind}; give a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):  # parts may be; they are run around
        raise InputError(
            f"the model is a TorchScript module, whose code is fixed: {verb} the module that it was made from"
        )
    for path, module in modules_of(model).items():
        inner = f"model.{path}" if path else "model"
        if isinstance(module, _WRAPPERS):
            raise InputError(
                f"{inner} is a {type(module).__name__}: {verb} {inner}.module, and wrap it anew afterwards"
            )
        if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            raise InputError(f"{inner} is compiled: {verb} {inner}._orig_mod, and compile it anew afterwards")
    for name, tensor in tensors_of(model).items():
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"'{name}' has no shape yet: run the model once on its inputs first")
        if tensor.is_meta:
            raise ModelError(f"'{name}' lies on the meta device, without values; load weights first")
    check_whole(model, verb)


def check_whole(model: nn.Module, verb: str) -> None:
    """Refuse a model whose weights are sharded.

    Raises:
        ModelError: Names the first such tensor.
    """
    for name, tensor in tensors_of(model).items():
        if hasattr(tensor, "device_mesh"):
            raise ModelError(
                f"'{name}' is sharded over several devices (FSDP): {verb} a model whose weights are whole; prune "
                "before fully_shard"
            )


def infinite_numbers(dtype: torch.dtype) -> str:
    """What a message says of a layer that meets some, and what to do."""
    if dtype == torch.float16:
        return (
            "NaN or Inf, as float16 ends at 65504: prune the model in single precision (model.float()), and turn it "
            "back afterwards"
        )
    return "NaN or Inf; check the inputs, and the weights of the layers before it"


def check_bare(model: nn.Module, verb: str = "prune") -> None:
    """Refuse a model that would run something else than its modules, or one that cannot train; `verb` says what for.

    Raises:
        InputError: Names what to give instead.
        ModelError: Names the first tensor without values.
    """
    check_module(model, verb)
    for path, module in modules_of(model).items():
        inner = f"model.{path}" if path else "model"
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{inner} is compiled in place: {verb} it before that (until then, {inner}._compiled_call_impl = None)"
            )
    for name, tensor in tensors_of(model).items():
        if tensor.is_inference():
            raise InputError(
                f"'{name}' was made under torch.inference_mode(), so that it can never be trained: make the model "
                "outside of it, or take copy.deepcopy(model) there"
            )


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf weights; buffers other than statistics may hold Inf, as masks of attention do.

    Raises:
        ModelError: Names the first such tensor.
    """
    for name, tensor in tensors_of(model).items():
        # A sum is finite if all is, unless it overflows: a quick first look.
        if not tensor.is_floating_point() or tensor.sum().isfinite():
            continue
        may_mask = not isinstance(tensor, nn.Parameter) and not name.rpartition(".")[2].startswith("running_")
        if (tensor.isnan() if may_mask else ~tensor.isfinite()).any():
            raise ModelError(f"'{name}' holds NaN or Inf; load sound weights first")


def check_weights(model: nn.Module) -> None:
    """Refuse weights that a hook computes anew before each pass from tensors of other names, and complex ones.

    Raises:
        InputError: Names the first such module, and what takes the hook away.
        ModelError: Names the first complex weight of a layer.
    """
    for name, tensor in tensors_of(model).items():
        if tensor.is_complex() and name.rpartition(".")[2] == "weight":
            raise ModelError(f"'{name}' is complex; only layers with real weights can be pruned")
    for path, module in modules_of(model).items():
        for name in (*module._parameters.keys(), *module._buffers.keys()):  # scripted ones have no other way
            base, _, kind = name.rpartition("_")
            remedy = None
            if kind == "mask" and f"{base}_orig" in module._parameters:
                remedy = (
                    f"is masked by torch.nn.utils.prune: call torch.nn.utils.prune.remove(module, {base!r})"
                )
            elif kind == "g" and f"{base}_v" in module._parameters:
                remedy = f"has the old weight norm: call torch.nn.utils.remove_weight_norm(module, {base!r})"
            if remedy:
                raise InputError(f"'{path}' {remedy} with module = model.get_submodule({path!r}) first")
