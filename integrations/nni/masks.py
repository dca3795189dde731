"""From the masks of any NNI pruner to a smaller model: baked in and compacted here, or by NNI's ModelSpeedup."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.running import preserved
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import kind_of, mixes_channels, width
from ss_pruning.graph.tracing import trace
from ss_pruning.sparsity.compaction import compact_
from ss_pruning.sparsity.dead_channels import living_kernels
from ss_pruning.sparsity.size import Compaction
from ss_pruning.surgery.cut import Cut, cut_layer

Masks = Mapping[str, Mapping[str, Tensor | None]]
Norms = Literal["keep", "mask"]


def bake(model: nn.Module, masks: Masks, example_inputs: Any = None, norms: Norms = "keep") -> nn.Module:
    """A plain copy of a model with NNI's masks multiplied into its weights.

    Args:
        model: Before or after the pruner's `unwrap_model()`; not changed. After SlimPruner before it: unwrapping loses
            the scales that it has trained.
        masks: What `compress()` or `get_masks()` returned.
        example_inputs: What `forward` takes; needed for `norms="mask"`.
        norms: "keep" leaves norms alone: a filter that is masked puts out 0, and the batch norm behind it a constant.
            "mask" zeroes the scales and shifts of norms whose channel only dead filters feed, so that the channel is 0.

    Raises:
        InputError: The masks are of another model, or mask inputs or outputs rather than parameters.
    """
    if norms not in ("keep", "mask"):
        raise InputError(f"norms={norms!r} is unknown; use 'keep' or 'mask'")
    baked = _unwrapped(model)
    for target, mask in _masked(baked, masks):
        target.data.mul_(mask.to(target))
    if norms == "mask":
        _mask_norms(baked, masks, example_inputs)
    return baked


def compact(
    model: nn.Module, masks: Masks, example_inputs: Any, *, norms: Norms = "keep"
) -> tuple[nn.Module, Compaction]:
    """A smaller model that puts out what the masked one does, from any NNI pruner's masks of any granularity.

    The masks are baked into a copy (`bake`), and the channels that are dead then are cut (`ss_pruning.compact_`),
    checked in float64. With `norms="keep"` the reference is the model as NNI's wrappers run it, in eval mode. With
    "mask" it is that model with the norms of dead filters masked too: that changes what the model puts out, and lets
    a little more go, where constants would run into padded borders.

    Args:
        model: Before or after the pruner's `unwrap_model()`; not changed.
        masks: What `compress()` or `get_masks()` returned.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        norms: "keep" or "mask", see `bake`.

    Returns:
        The small model, and the report on what was cut and what had to stay.

    Raises:
        InputError: The masks are of another model, or mask inputs or outputs rather than parameters.
        ModelError: The model does not run on the inputs.
    """
    small = bake(model, masks, example_inputs, norms)
    return small, compact_(small, example_inputs)


def speedup(model: nn.Module, masks: Masks, example_inputs: Tensor | tuple[Tensor, ...]) -> nn.Module:
    """NNI's own `ModelSpeedup` on a copy, with what it needs on today's PyTorch.

    Its tracer is replaced by `torch.fx` with every layer a leaf, subclasses of known layers are cut as what they are
    (NNI would rebuild them as their base class, or stop), train flags stay as they are, and it is kept from printing.
    What it makes of masks is NNI's affair: kernel masks are lost, and a constant behind a batch norm is dropped.

    Args:
        model: Before or after the pruner's `unwrap_model()`; not changed.
        masks: What `compress()` or `get_masks()` returned.
        example_inputs: A tensor, or a tuple of tensors.

    Raises:
        InputError: The masks are of another model.
        ModelError: NNI fails; its own error is the cause.
    """
    with warnings.catch_warnings():  # it uses what torch has deprecated
        warnings.simplefilter("ignore")
        from nni.compression.speedup import ModelSpeedup
        from nni.compression.speedup.replacer import DefaultReplacer

    twin = _unwrapped(model)
    _masked(twin, masks)  # do they fit?
    modules = dict(twin.named_modules())
    known = {"Conv1d", "Conv2d", "Linear", "BatchNorm1d", "BatchNorm2d", "ConvTranspose2d"}
    names = {type(m).__name__ for m in modules.values() if kind_of(m) is not None} - known
    replacer = DefaultReplacer(dict.fromkeys(names, _cut_subclass))
    quiet = logging.getLogger("nni")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    given = {p: {n: m.clone() for n, m in t.items() if m is not None} for p, t in masks.items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ModelSpeedup(
                twin,
                example_inputs,
                given,
                customized_replacers=[replacer],
                graph_module=symbolic_graph(twin.eval(), example_inputs),
                logger=quiet,
            ).speedup_model()
    except Exception as error:
        raise ModelError(
            f"NNI's ModelSpeedup fails on this model ({type(error).__name__}: {error})"
        ) from error
    finally:
        quiet.setLevel(level)
    flags = {path: module.training for path, module in model.named_modules()}
    for path, module in twin.named_modules():  # the layers that it has built anew are in train mode
        module.training = flags.get(path, model.training)
    return twin


def symbolic_graph(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> fx.GraphModule:
    """A graph for what takes one in NNI: `auto_set_denpendency_group_ids`, `ModelSpeedup`.

    Layers are leaves, and the shapes of all tensors are noted: without them NNI finds only some of the dependencies.
    """
    graph = fx.GraphModule(model, _Tracer().trace(model))
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with preserved(model, training=False), torch.no_grad():
        ShapeProp(graph).propagate(*inputs)
    return graph


class _Tracer(fx.Tracer):
    """Layers are leaves, whatever package they come from."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _unwrapped(model: nn.Module) -> nn.Module:
    """A copy without NNI's wrappers."""
    # In training the wrappers leave masked weights with their history behind, which cannot be copied.
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in model.buffers() if not t.is_leaf}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    for module in list(twin.modules()):
        wrapper = module._modules.get("_nni_wrapper")
        if wrapper is not None:
            wrapper.unwrap()  # type: ignore[operator]
            _keep_slim_factors(module, wrapper)
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                del module.forward  # NNI leaves the method behind as an attribute
    return twin


def _keep_slim_factors(module: nn.Module, wrapper: Any) -> None:
    """Multiply in the scales that SlimPruner trains beside the weights; NNI forgets them when it unwraps."""
    for name, space in wrapper.pruning_target_spaces.items():
        factor = getattr(wrapper, f"{name}_slim_factor", None)
        if factor is not None:
            if space._scaler is not None:
                factor = space._scaler.expand(factor, space.shape, keepdim=True, full_expand=False)
            getattr(module, name).data.mul_(factor.detach())


def _masked(model: nn.Module, masks: Masks) -> list[tuple[Tensor, Tensor]]:
    """The masked tensors of a model, each with its mask.

    Raises:
        InputError: The masks do not fit the model.
    """
    modules = dict(model.named_modules())
    pairs = []
    for path, targets in masks.items():
        for name, mask in targets.items():
            if name.startswith(("_input_", "_output_")):
                raise InputError(f"'{path}' has a mask for {name}: only masks of parameters can be baked in")
            target = getattr(modules.get(path), name, None)
            if mask is None:
                continue
            if not isinstance(target, Tensor):
                raise InputError(f"the masks are of another model: this one has no '{path}.{name}'")
            try:
                fits = torch.broadcast_shapes(mask.shape, target.shape) == target.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise InputError(
                    f"the masks are of another model: '{path}.{name}' has shape {tuple(target.shape)}, its mask "
                    f"{tuple(mask.shape)}"
                )
            pairs.append((target, mask))
    return pairs


def _mask_norms(baked: nn.Module, masks: Masks, example_inputs: Any) -> None:
    """Zero scale and shift of norms at the channels that only dead filters feed."""
    if example_inputs is None:
        raise InputError('norms="mask" needs example_inputs=, what the model\'s forward takes')
    connectivity = trace(baked, example_inputs)
    dead: dict[str, Tensor] = {}
    for path, layer in connectivity.layers.items():
        module = baked.get_submodule(path)
        if layer.kind == "synaptic":
            dead[path] = _dead_filters(module) & (path in masks)
        elif layer.kind == "depthwise":
            passed = _fed_by_dead(connectivity, path, dead).repeat_interleave(layer.outputs // layer.inputs)
            dead[path] = passed | _dead_filters(module) & (path in masks)
        elif layer.kind == "norm" and not mixes_channels(module):
            dead[path] = _fed_by_dead(connectivity, path, dead)
            for tensor in (module.weight, module.bias):
                if isinstance(tensor, Tensor):
                    tensor.data[dead[path].to(tensor.device)] = 0


def _dead_filters(module: nn.Module) -> Tensor:
    """`[out]`: outputs without a living kernel or a bias."""
    dead = ~living_kernels(module).any(1)
    return (dead & module.bias.detach().eq(0) if isinstance(module.bias, Tensor) else dead).cpu()


def _fed_by_dead(connectivity: Connectivity, path: str, dead: Mapping[str, Tensor]) -> Tensor:
    """`[in]`: channels that something feeds, and nothing that is alive."""
    fed, alive = (torch.zeros(connectivity.layers[path].inputs, dtype=torch.bool) for _ in range(2))
    for edge in connectivity.edges[path]:
        source, channel = edge.pairs.cpu().unbind(1)
        fed[channel] = True
        pruned = dead.get(edge.source)
        alive[channel] |= True if pruned is None else ~pruned[source]
    return fed & ~alive


def _cut_subclass(module: nn.Module, masks: Any) -> nn.Module:
    """A replacer for NNI: the same layer without the channels whose masks are all 0."""
    arrives, leaves, _ = masks
    axis = -1 if isinstance(module, nn.Linear) else 1
    small = copy.deepcopy(module)
    sides: list[tuple[Any, Tensor]] = [("through", leaves)]
    if isinstance(module, (_ConvNd, nn.Linear)):
        sides = [("out", leaves), ("in", arrives[0])]
    for side, mask in sides:
        alive = mask.movedim(axis, 0).flatten(1).sum(1).ne(0)
        n = width(module, "in" if side == "in" else "out")
        kept = tuple(alive.nonzero().flatten().tolist())
        if 0 < len(kept) < n:
            cut_layer(small, Cut("", side, n, kept))
    return small
