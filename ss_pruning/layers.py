"""What counts as a synaptic layer and as a norm, on which axis its channels lie, and its kernel norms."""

from __future__ import annotations

from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ss_pruning.errors import ModelError

#: A *synaptic* layer mixes channels; a *depthwise* convolution and a *norm* pass channel `i` on as channel `i`
#: (a depthwise one as `i * multiplier ...`); a *positional* convolution slides along an axis of positions that
#: may itself hold channels, as efficient channel attention does.
Kind = Literal["synaptic", "depthwise", "norm", "positional"]


def kind_of(module: nn.Module) -> Kind | None:
    """The role of a module in the channel graph; None for everything that is not a layer of its own."""
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Linear):
        return "synaptic"
    if not isinstance(module, _ConvNd) or isinstance(module.weight, nn.parameter.UninitializedParameter):
        return None
    if isinstance(module, nn.Conv1d) and module.in_channels == module.out_channels == 1:
        return "positional"
    return "depthwise" if is_depthwise(module) else "synaptic"


def is_norm(module: nn.Module) -> bool:
    """True for (batch, instance, group, layer, RMS) norms and for frozen batch norms, which only hold buffers."""
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return True
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1 and module.weight is not None
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [getattr(module, name, None) for name in names]
    return not list(module.children()) and all(isinstance(t, Tensor) and t.dim() == 1 for t in tensors)


def is_depthwise(module: nn.Module) -> TypeGuard[_ConvNd]:
    """True if every input channel of the convolution has outputs of its own."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def groups_of(module: nn.Module) -> int:
    """Number of groups of a convolution; 1 for a linear layer."""
    return int(getattr(module, "groups", 1))


def width(module: nn.Module, side: Literal["in", "out"]) -> int:
    """Number of input or output channels of a layer."""
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, _ConvNd):
        return module.in_channels if side == "in" else module.out_channels
    for name in ("num_features", "num_channels", "normalized_shape"):
        if hasattr(module, name):
            value: Any = getattr(module, name)
            return int(value[0]) if isinstance(value, (tuple, list)) else int(value)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.numel())


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """The (non-negative) axis of `x`, an input or output of `module`, on which the module's channels lie."""
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    if kind_of(module) == "positional":
        return x.dim() - 1
    if isinstance(module, _ConvNd):
        return x.dim() - len(module.kernel_size) - 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return _layer_norm_axis(module, x)
    return 1 if x.dim() > 1 else 0


def _layer_norm_axis(module: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> int:
    """Subclasses normalise channels-first maps too; where sizes leave it open, see on which axis the weight acts."""
    n = int(module.normalized_shape[0])
    fitting = [axis for axis, size in enumerate(x.shape) if size == n and axis > 0]
    if len(fitting) == 1:
        return fitting[0]
    forward = type(module).forward
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or not fitting:
        return x.dim() - 1
    with torch.no_grad():
        probe = torch.linspace(-1.0, 1.0, x[:1].numel(), dtype=x.dtype, device=x.device).reshape(x[:1].shape)
        weight = torch.ones(n, dtype=x.dtype, device=x.device)
        plain = torch.func.functional_call(module, {"weight": weight}, (probe,))
        weight = weight.clone()
        weight[0] = 2.0
        moved = (torch.func.functional_call(module, {"weight": weight}, (probe,)) - plain).nonzero()
    for axis in fitting:
        if moved.numel() and not moved[:, axis].any():
            return axis
    return x.dim() - 1


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf weights.

    Raises:
        ModelError: Names the first such tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"'{name}' holds NaN or Inf; load sound weights first")


def kernel_norms(module: nn.Module) -> Tensor:
    """Frobenius norm of every 2-D kernel (or single weight), shape `[out_channels, in_channels // groups]`.

    Differentiable; the weight is taken as the layer's `weight` gives it (a parametrisation included).
    """
    return kernel_powers(module).sqrt()


def kernel_powers(module: nn.Module) -> Tensor:
    """Squared `kernel_norms`, shape `[out_channels, in_channels // groups]`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Linear):
        return weight.square()
    powers = weight.flatten(2).square().sum(2)
    if isinstance(module, _ConvNd) and module.transposed:
        g = module.groups
        return powers.reshape(g, powers.shape[0] // g, -1).transpose(1, 2).reshape(-1, powers.shape[0] // g)
    return powers
