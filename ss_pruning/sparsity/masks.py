"""Synapse masks: which connections stay, and weights that keep to it.

    strengths = synaptic_strength(model, x)
    masks = synapse_masks(strengths, fraction=0.9)  # True for what stays
    mask_(model, masks)  # fine-tune now: what is masked stays 0
    merge_masks_(model)  # zeros are written into the weights
    compact_(model, x)  # dead channels are cut

A mask is a parametrisation of `weight` (`torch.nn.utils.parametrize`): the layer computes with `weight * mask`, the
parameter behind it is the same object as before, so optimisers go on; the mask is a buffer, so `state_dict` holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ss_pruning._utils.modules import modules_of
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.layers import kind_of, weight_of
from ss_pruning.importance.strength import by_kernel, kernel_powers, share
from ss_pruning.sparsity.dead_channels import living_kernels

Masks = Mapping[str, Tensor]
Scope = Literal["global", "layer"]


def synapse_masks(
    strengths: Mapping[str, Tensor],
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    kept_variance: float | None = None,
    scope: Scope = "global",
    allow_dead: bool = False,
) -> dict[str, Tensor]:
    """Choose the synapses that stay, by exactly one of three rules.

    Args:
        strengths: By module path, `[out, in // groups]`: strengths, or any other score of which the smallest go.
        fraction: That share of all synapses goes (rounded down), the weakest first; ties in the order of layers.
        threshold: What is weaker goes.
        kept_variance: By output: the strongest stay that deliver this share of its variance, the sum of `s^2`.
        scope: "global" ranks all layers in one order, "layer" takes the fraction from each.
        allow_dead: Let a layer lose all its synapses.

    Returns:
        By module path, bool, True for what stays.

    Raises:
        InputError: Not exactly one rule, a value out of range, NaN scores, or a layer that would lose everything.

    Example:
        >>> masks = synapse_masks({"conv": torch.tensor([[0.1, 3.0], [2.0, 0.2]])}, fraction=0.5)
        >>> masks["conv"].tolist()
        [[False, True], [True, False]]
    """
    rule, value = _rule(fraction=fraction, threshold=threshold, kept_variance=kept_variance)
    if scope not in ("global", "layer"):
        raise InputError(f"scope={scope!r} is unknown; use 'global' or 'layer'")
    bad = [path for path, scores in strengths.items() if scores.isnan().any()]
    if bad:
        raise InputError(f"the scores of '{bad[0]}' hold NaN")
    if rule == "threshold":
        masks = {path: scores >= value for path, scores in strengths.items()}
    elif rule == "kept_variance":
        masks = {path: _carriers(share(scores.square()), value) for path, scores in strengths.items()}
    elif scope == "layer":
        masks = {path: _strongest([scores], value)[0] for path, scores in strengths.items()}
    else:
        masks = dict(zip(strengths, _strongest(list(strengths.values()), value), strict=True))
    dead = [path for path, mask in masks.items() if not mask.any()]
    if dead and not allow_dead:
        raise InputError(
            f"{rule}={value:g} would leave no synapse in: {', '.join(dead)}. Take less, leave those layers out, or "
            "pass allow_dead=True"
        )
    return masks


def _rule(**rules: float | None) -> tuple[str, float]:
    """The one that is given, and its value."""
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise InputError(f"give exactly one of {', '.join(rules)}; there are {len(given)}")
    ((rule, value),) = given.items()
    if not math.isfinite(value) or value < 0 or (rule != "threshold" and value > 1):
        raise InputError(f"{rule}={value} is out of range")
    return rule, value


def _strongest(scores: list[Tensor], fraction: float) -> list[Tensor]:
    """All but the smallest `fraction` of the scores of all tensors together."""
    flat = torch.cat([s.detach().flatten().double() for s in scores])
    stays = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    # 1e-9: 0.3 * 10 is 2.9999... in floating point
    stays[flat.argsort(stable=True)[: int(len(flat) * fraction + 1e-9)]] = False
    return [
        part.reshape(s.shape)
        for part, s in zip(stays.split([s.numel() for s in scores]), scores, strict=True)
    ]


def _carriers(shares: Tensor, kept: float) -> Tensor:
    """By row: the fewest whose shares add up to `kept`."""
    ordered, order = shares.sort(stable=True, dim=1, descending=True)
    before = ordered.cumsum(1) - ordered
    # 1e-6: shares that sum to 1 do so up to rounding; what carries nothing goes in any case
    stays = (before < kept - 1e-6) & (ordered > 0)
    return torch.zeros_like(stays).scatter(1, order, stays)


class SynapseMask(nn.Module):
    """The parametrisation: weights times a mask; what is masked gets the gradient 0, too."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        """Hold a bool mask in the layout of the weight, with taps of size 1."""
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the masked kernels 0."""
        return torch.where(self.mask, weight, 0.0)


def mask_(model: nn.Module, masks: Masks) -> nn.Module:
    """Mask layers in place; a mask that a layer already has is replaced.

    Args:
        model: The model. The parameters stay the same objects.
        masks: By module path, bool `[out, in // groups]`, True for what stays.

    Returns:
        The model.

    Raises:
        InputError: The masks are of another model; nothing has been masked then.
        ModelError: A weight has a parametrisation that is not ours.
    """
    modules = {path: _fitting(model, path, mask) for path, mask in masks.items()}
    for path, module in modules.items():
        weight = weight_of(module)
        mask = by_kernel(module, weight, masks[path]).to(weight.device)
        if (own := _mask_of(module)) is not None:
            own.mask = mask.clone()
            continue
        parametrize.register_parametrization(module, "weight", SynapseMask(mask.clone()))
        _make_copyable(type(module))
    return model


def _fitting(model: nn.Module, path: str, mask: Tensor) -> nn.Module:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"the masks name '{path}', which is no module of this model") from None
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise InputError(f"the masks name '{path}', a {type(module).__name__} without a weight")
    expected = kernel_powers(module).shape
    if mask.dtype != torch.bool or mask.shape != expected:
        raise InputError(
            f"the mask of '{path}' is {mask.dtype} {tuple(mask.shape)}, but the layer has synapses {tuple(expected)}: "
            "give bool masks made for this model"
        )
    if parametrize.is_parametrized(module, "weight") and _mask_of(module) is None:
        raise ModelError(
            f"the weight of '{path}' has a parametrisation of its own: remove it first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return module


def _mask_of(module: nn.Module) -> SynapseMask | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    parametrizations: Any = module.parametrizations
    own = parametrizations["weight"]
    return own[0] if len(own) == 1 and isinstance(own[0], SynapseMask) else None


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks in a model, as `mask_` takes them."""
    found = {}
    for path, module in modules_of(model).items():
        if (own := _mask_of(module)) is not None:
            found[path] = kernel_powers(module, own.mask.double()) > 0
    return found


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Masks for `mask_` that keep zero what is zero now, after `merge_masks_` and a cut, say."""
    layers = {path: module for path, module in modules_of(model).items() if kind_of(module) == "synaptic"}
    alive = {path: living_kernels(module) for path, module in layers.items()}
    return {path: mask for path, mask in alive.items() if not mask.all()}


def merge_masks_(model: nn.Module) -> nn.Module:
    """Write the zeros into the weights and remove the masks; the output does not change."""
    return _remove(model, merge=True)


def remove_masks_(model: nn.Module) -> nn.Module:
    """Remove the masks; the weights are what they would be without them."""
    return _remove(model, merge=False)


def _remove(model: nn.Module, *, merge: bool) -> nn.Module:
    for module in model.modules():
        if _mask_of(module) is not None:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=merge)
    return model


def check_unmasked(model: nn.Module) -> None:
    """Refuse a model with masks: a cut would not reach the weights behind them.

    Raises:
        InputError: Names the first masked module.
    """
    for path, module in modules_of(model).items():
        if _mask_of(module) is not None:
            raise InputError(
                f"'{path}' is masked: call merge_masks_(model) first (ss_pruning.sparsity.masks), then cut "
                "(ss_pruning.compact_)"
            )


def _make_copyable(kind: type[nn.Module]) -> None:
    """Let masked modules be copied and pickled.

    `kind` is a class that torch has made for one module. Torch refuses to pickle it, and its copies share it, so that
    removing the mask of a copy would break the original. Copies by way of a plain module get a class of their own.
    """
    if "__deepcopy__" in vars(kind):
        del kind.__deepcopy__  # type: ignore[attr-defined]
    kind.__reduce_ex__ = _reduced  # type: ignore[assignment, method-assign]


def _reduced(module: nn.Module, protocol: Any) -> Any:
    own = _mask_of(module)
    assert own is not None
    plain: nn.Module = object.__new__(type(module).__bases__[0])
    state = vars(module)
    parametrizations: Any = module.parametrizations
    original = parametrizations["weight"].original
    plain.__dict__ = {
        **state,
        "_modules": {name: child for name, child in state["_modules"].items() if name != "parametrizations"},
        "_parameters": {"weight": original, **state["_parameters"]},
    }
    return _masked, (plain, own.mask)


def _masked(plain: nn.Module, mask: Tensor) -> nn.Module:
    parametrize.register_parametrization(plain, "weight", SynapseMask(mask))
    _make_copyable(type(plain))
    return plain
