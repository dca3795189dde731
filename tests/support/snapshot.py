"""Everything about a model that a call must leave alone, as comparable data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, flags, hooks, attributes, tensors (identity, bits, gradients) and the random state."""
    seen: dict[str, Any] = {"rng": torch.get_rng_state().tolist(), "grad mode": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        seen[f"{name}: class"] = type(module)
        seen[f"{name}: training"] = module.training
        seen[f"{name}: hooks"] = [list(getattr(module, kind)) for kind in HOOKS]
        plain = (bool, int, float, str, tuple, list, dict, type(None))
        seen[f"{name}: attributes"] = {
            key: (repr(value) if isinstance(value, plain) else id(value))
            for key, value in vars(module).items()
            if not key.startswith("_")
        }
        seen[f"{name}: names"] = sorted(vars(module))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = getattr(tensor, "grad", None)
        seen[f"{name}: tensor"] = (
            *(
                id(tensor),
                tensor.data_ptr(),
                tensor.dtype,
                tensor.requires_grad,
                tensor.is_leaf,
                tensor._version,
            ),
            None if grad is None else (id(grad), grad.flatten().tolist()),
            tensor.detach().flatten().tolist(),
        )
    return seen


class Bomb(nn.Module):
    """Wraps a model whose forward raises after everything ran, from inside a layer's own forward if asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        self.inner(*args)
        raise KeyError("boom")
