"""What counts as a layer, and where its channels lie: of torch's types, and of those that users register.

How to register one: docs/own_layer.md.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.hooks import with_its_own_forward_
from ss_pruning.errors import InputError, ModelError

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class LayerType:
    """Where the channels of a layer lie that mixes channels: each of its outputs reads all of its inputs.

    Attributes:
        axes: By side, and by name of a parameter or buffer, the axis on which channels lie.
        axis: Where channels lie in what the layer reads and puts out: 1 as in images, -1 as linear layers have it.
        sizes: By side, the name of the attribute that holds the number of channels.
    """

    axes: Mapping[str, Mapping[str, int]]
    axis: int
    sizes: Mapping[str, str]


_LAYER_TYPES: dict[type, LayerType] = {}


def register_layer(
    *,
    outputs: Mapping[str, int],
    inputs: Mapping[str, int],
    axis: int = 1,
    in_size: str | None = None,
    out_size: str | None = None,
) -> Callable[[Class], Class]:
    """Make a layer type of your own prunable; subclasses of it, too.

    Its `weight`, an attribute or a property `[out_channels, in_channels, ...]`, is what strengths are taken from.

    Args:
        outputs: By name of a parameter or buffer, the axis on which output channels lie.
        inputs: The same for input channels.
        axis: Where channels lie in what the layer reads and puts out: 1 as in images, -1 as linear layers have it.
        in_size: Name of the attribute that holds the number of input channels, if there is one.
        out_size: The same for output channels.

    Raises:
        InputError: A side has no tensor, so that its width cannot be told.

    Examples:
        >>> import torch
        >>> @register_layer(outputs={"weight": 0}, inputs={"weight": 1}, axis=-1)
        ... class Scaled(torch.nn.Module):
        ...     def __init__(self, inputs: int, outputs: int) -> None:
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(outputs, inputs))
        ...
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return x @ self.weight.T / len(self.weight)
    """
    if not outputs or not inputs:
        raise InputError("name at least one tensor on which output channels lie, and one for input channels")
    sizes = {side: name for side, name in (("in", in_size), ("out", out_size)) if name is not None}

    def register(cls: Class) -> Class:
        _LAYER_TYPES[cls] = LayerType({"in": dict(inputs), "out": dict(outputs)}, axis, sizes)
        return cls

    return register


def layer_type_of(module: Any) -> LayerType | None:
    """How a module's class, or the nearest that it inherits from, is registered; None where it is not."""
    if not _LAYER_TYPES:
        return None
    return next((_LAYER_TYPES[cls] for cls in type(module).__mro__ if cls in _LAYER_TYPES), None)


#: A *synaptic* layer mixes channels; a *depthwise* convolution and a *norm* pass channel `i` on as channel `i`
#: (a depthwise one as `i * multiplier ...`), and so does a *response*, which adds to its input; a *positional*
#: convolution slides along an axis of positions that may itself hold channels, as efficient channel attention does.
Kind = Literal["synaptic", "depthwise", "norm", "response", "positional"]


def kind_of(module: nn.Module) -> Kind | None:
    """The role of a module in the channel graph; None for everything that is not a layer of its own."""
    if isinstance(module, nn.Linear) or layer_type_of(module) is not None:
        return "synaptic"
    if not isinstance(module, _ConvNd):
        return "norm" if is_norm(module) else _foreign_kind(module)
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return None
    if _slides_along_channels(module):
        return "positional"
    return "depthwise" if is_depthwise(module) else "synaptic"


def _slides_along_channels(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and module.in_channels == module.out_channels == 1


def is_norm(module: nn.Module) -> bool:
    """True for (batch, instance, group, layer, RMS) norms, frozen batch norms (only buffers) and ones like EvoNorm."""
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return True
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1 and module.weight is not None
    if not module._parameters and not module._buffers:
        return False
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [getattr(module, name, None) for name in names]
    if not list(module.children()) and all(isinstance(t, Tensor) and t.dim() == 1 for t in tensors):
        return True
    return is_foreign_norm(module)


def has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a batch norm that keeps the mean and variance of what it was trained on."""
    return isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)


def is_foreign_norm(module: nn.Module) -> bool:
    """True for a norm that torch does not have: scale (and shift) by channel, of something other than its input."""
    return _foreign_kind(module) == "norm"


def _foreign_kind(module: nn.Module) -> Kind | None:
    """What a module that is not torch's does with one weight a channel, found by asking it."""
    if not module._parameters or layer_type_of(module) is not None:
        return None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or isinstance(module, _NormBase) or _holds_tensors_inside(module):
        return None
    tensors = [*module.parameters(), *module.buffers()]
    if type(module).__module__.startswith("torch.nn.") or any(
        t.shape != weight.shape for t in tensors if t.dim()
    ):
        return None
    if module not in _FOREIGN:
        _FOREIGN[module] = _asked_kind(module, weight) if long_axis(weight) is not None else None
    return _FOREIGN[module]


def long_axis(tensor: Tensor) -> int | None:
    """The axis of a vector, which may have been given others of size 1: `[1, channels, 1, 1]`."""
    longest = max(range(tensor.dim()), key=lambda axis: tensor.shape[axis], default=None)
    return longest if longest is not None and tensor.shape[longest] == tensor.numel() else None


def _holds_tensors_inside(module: nn.Module) -> bool:
    """True if a child holds a tensor; an activation does not."""
    return any(True for child in module.children() for _ in (*child.parameters(), *child.buffers()))


_FOREIGN: WeakKeyDictionary[nn.Module, Kind | None] = WeakKeyDictionary()


def _asked_kind(module: nn.Module, weight: Tensor) -> Kind | None:
    n = weight.numel()
    x = torch.linspace(-1.0, 2.0, 6 * n, dtype=weight.dtype, device=weight.device)
    shift = {"bias": torch.zeros_like(weight)} if isinstance(getattr(module, "bias", None), Tensor) else {}
    for shape in ((1, n, 3, 2), (1, 3, 2, n)):
        image = x.reshape(shape)
        with contextlib.suppress(Exception):
            pruned = ask(module, {"weight": torch.zeros_like(weight), **shift}, image)
            plain = ask(module, {"weight": torch.ones_like(weight), **shift}, image)
            if pruned.shape == plain.shape == shape and not plain.equal(image):
                if not pruned.any():
                    return "norm"
                if pruned.equal(image):
                    return "response"
    return None


def ask(module: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the module makes of `x` with other tensors: a question, not a run that anybody's hooks should see.

    Nor what stands in the place of its forward for a while, which may ask as well.
    """
    bare = copy.copy(module)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    with_its_own_forward_(bare, module)
    with torch.no_grad():
        answer: Tensor = torch.func.functional_call(bare, tensors, (x,))
    return answer


def is_linear_in_weight(module: nn.Module) -> bool:
    """False where twice the weight is not twice the output: a convolution that standardises its weights, for one."""
    if type(module).__module__.startswith("torch.nn."):
        return True
    if layer_type_of(module) is not None:
        return False
    weight = weight_of(module)
    size = [weight.shape[1]]
    if isinstance(module, _ConvNd):
        reach = (d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        size = [module.in_channels, *reach]
    x = torch.linspace(0.1, 1.0, math.prod(size)).to(weight).reshape(1, *size)
    w = torch.linspace(-1.0, 2.0, weight.numel()).to(weight).reshape(weight.shape)
    try:
        nothing, once, twice = (ask(module, {"weight": share * w}, x) for share in (0, 1, 2))
    except Exception:  # takes more than one tensor: nothing is known of it
        return False
    most = (twice - nothing).abs().max()  # nothing where a gain of its own is nothing: it cannot be told
    return bool(most > 0) and bool((twice - 2 * once + nothing).abs().max() <= 1e-4 * most)


def mixes_channels(module: nn.Module) -> bool:
    """True for norms whose statistics span channels (or may): absent channels are not the same to them as zeros."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or _foreign_kind(module) is not None


def blocks_of(module: nn.Module | None, side: str) -> int:
    """In how many blocks of equal count the channels on a side of a layer must stay."""
    if isinstance(module, _ConvNd) and 1 < groups_of(module) < module.in_channels:
        return groups_of(module)
    if side != "through" or module is None:
        return 1
    if isinstance(module, nn.GroupNorm):
        return int(module.num_groups)
    groups = getattr(module, "groups", None)
    return groups if isinstance(groups, int) and is_foreign_norm(module) else 1


def is_depthwise(module: nn.Module) -> TypeGuard[_ConvNd]:
    """True if every input channel of the convolution has outputs of its own."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer that has one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def groups_of(module: nn.Module) -> int:
    """Number of groups of a convolution; 1 for a linear layer."""
    return 1 if layer_type_of(module) is not None else int(getattr(module, "groups", 1))


_PLAIN = {"in": {"weight": 1}, "out": {"weight": 0, "bias": 0}}
_LINEAR = LayerType(_PLAIN, -1, {"in": "in_features", "out": "out_features"})
_CHANNELS = {"in": "in_channels", "out": "out_channels"}
_CONVOLUTION = LayerType(_PLAIN, 1, _CHANNELS)
_TRANSPOSED = LayerType({"in": {"weight": 0}, "out": {"weight": 1, "bias": 0}}, 1, _CHANNELS)


def layout_of(module: nn.Module) -> LayerType | None:
    """Where the channels of a layer that mixes them lie, groups aside; None for norms."""
    own = layer_type_of(module)
    if own is not None:
        return own
    if isinstance(module, _ConvNd):
        return _TRANSPOSED if module.transposed else _CONVOLUTION
    return _LINEAR if isinstance(module, nn.Linear) else None


def registered_axes(module: nn.Module, side: Literal["in", "out"]) -> dict[str, int] | None:
    """By name of a tensor of a registered layer, the axis on which the channels of a side lie; None for other layers.

    Raises:
        ModelError: The layer has no tensor, or no attribute of a size, of a name that its type is registered with.
    """
    own = layer_type_of(module)
    if own is None:
        return None
    for name, axis in own.axes[side].items():
        tensor = getattr(module, name, ...)
        if tensor is not None and (
            not isinstance(tensor, Tensor) or not -tensor.dim() <= axis < tensor.dim()
        ):
            raise ModelError(
                f"{type(module).__name__} is registered with a tensor '{name}' that has an axis {axis}; the layer has "
                f"{'none of that name' if tensor is ... else repr(tensor)[:80]}"
            )
    if side in own.sizes and not hasattr(module, own.sizes[side]):
        raise ModelError(
            f"{type(module).__name__} is registered with {side}_size='{own.sizes[side]}'; the layer has no such "
            "attribute"
        )
    return {name: axis for name, axis in own.axes[side].items() if getattr(module, name) is not None}


def width(module: nn.Module, side: Literal["in", "out"]) -> int:
    """Number of input or output channels of a layer."""
    own = registered_axes(module, side)
    if own is not None:
        name, axis = next(iter(own.items()))
        return int(getattr(module, name).shape[axis])
    layout = layout_of(module)
    if layout is not None:
        return int(getattr(module, layout.sizes[side]))
    for name in ("num_features", "num_channels", "normalized_shape"):
        if hasattr(module, name):
            value: Any = getattr(module, name)
            return int(value[0]) if isinstance(value, (tuple, list)) else int(value)
    return weight_of(module).numel()


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """The (non-negative) axis of `x`, an input or output of `module`, on which the module's channels lie."""
    own = layer_type_of(module)
    if own is not None:
        return own.axis % x.dim()
    if isinstance(module, nn.Linear) or _slides_along_channels(module):
        return x.dim() - 1
    if isinstance(module, _ConvNd):
        return x.dim() - len(module.kernel_size) - 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _foreign_kind(module) is not None:
        return _norm_axis(module, x)
    return 1 if x.dim() > 1 else 0


def _norm_axis(module: nn.Module, x: Tensor) -> int:
    """Some normalise channels-first maps too; where sizes leave it open, see on which axis the weight acts."""
    n = width(module, "in")
    fitting = [axis for axis, size in enumerate(x.shape) if size == n and axis > 0]
    if len(fitting) == 1:
        return fitting[0]
    if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or not fitting:
        return x.dim() - 1
    weight = torch.ones(weight_of(module).shape, dtype=x.dtype, device=x.device)
    # Of both signs in every channel: an activation inside may silence one.
    probe = torch.arange(x[:1].numel(), device=x.device).sin().to(x.dtype).reshape(x[:1].shape)
    plain = ask(module, {"weight": weight}, probe)
    weight = weight.clone()
    weight.view(-1)[0] = 2.0
    moved = (ask(module, {"weight": weight}, probe) - plain).nonzero()
    for axis in fitting:
        if moved.numel() and not moved[:, axis].any():
            return axis
    return x.dim() - 1


def check_registered(path: str, module: nn.Module, x: Tensor, side: Literal["in", "out"]) -> None:
    """See that what a layer of a registered type reads or puts out is as wide as its tensors say.

    Raises:
        ModelError: It is not, or the layer holds other layers.
    """
    if layer_type_of(module) is None:
        return
    inside = next((name for name, child in module.named_modules() if name and kind_of(child)), None)
    if inside is not None:
        raise ModelError(
            f"'{path}', a {type(module).__name__}, is registered as one layer and holds another, '{inside}': hold its "
            "weights as parameters, or leave it unregistered so that the inner layer is pruned"
        )
    found, n = x.shape[channel_axis(module, x)], width(module, side)
    if found != n:
        what = "reads" if side == "in" else "puts out"
        raise ModelError(
            f"'{path}' {what} {found} channels on axis {channel_axis(module, x)}, and its tensors have {n}: see how "
            f"{type(module).__name__} is registered"
        )
