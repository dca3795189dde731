"""`torch.nn.MultiheadAttention` as a module whose heads can go.

Torch's functional form takes one packed weight, and insists on heads that together are as wide as the embedding. What
stands here in its place computes the same from a layer each for queries, keys and values, as many heads as they hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss_pruning._utils.memento import parameter_like
from ss_pruning._utils.modules import modules_of

_LAYERS = ("q_proj", "k_proj", "v_proj")


class PrunableAttention(nn.MultiheadAttention):
    """Multi-head attention with layers of its own for queries, keys and values: `q_proj`, `k_proj`, `v_proj`.

    Called as `torch.nn.MultiheadAttention` is, and returns the same. `make_prunable_` turns torch's module into it.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; `is_causal` is a hint that `attn_mask` makes good."""
        if query.dim() == 2:
            batch = 0 if self.batch_first else 1
            padding = None if key_padding_mask is None else key_padding_mask[None]
            q, k, v = (x.unsqueeze(batch) for x in (query, key, value))
            y, weights = self.forward(q, k, v, padding, need_weights, attn_mask, average_attn_weights)
            return y.squeeze(batch), None if weights is None else weights.squeeze(0)
        q, k, v = map(self._heads, (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        bias = _summed(_as_bias(attn_mask, q), _as_bias(key_padding_mask, q), q.shape[0])
        y, weights = self._attend(q, k, v, bias, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """`[batch, heads, length, width]`."""
        x = x if self.batch_first else x.transpose(0, 1)
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, bias, dropout), None
        logits = q * q.shape[-1] ** -0.5 @ k.mT
        weights = F.dropout((logits if bias is None else logits + bias).softmax(-1), dropout)
        return weights @ v, weights


def _as_bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as what is added to the logits: where it is true, nothing is attended to."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _summed(mask: Tensor | None, padding: Tensor | None, batch: int) -> Tensor | None:
    """Both, as far as they are given, in a shape that fits `[batch, heads, length, source length]`."""
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, -1))
    if padding is None:
        return mask
    padding = padding[:, None, None]
    return padding if mask is None else mask + padding


def all_mixed(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """In the place of torch's attention while labels pass: each channel hears all that is read, and that is known."""
    heard = query.mean() + key.mean() + value.mean()
    y = heard * torch.linspace(0.5, 1.5, query.shape[-1], dtype=query.dtype, device=query.device)
    if not need_weights:
        return y.expand(query.shape), None
    last = module.batch_first or query.dim() == 2
    lengths = (query.shape[-2], key.shape[-2]) if last else (len(query), len(key))
    batch = query.shape[:-2] if last else query.shape[1:2]
    heads = () if average_attn_weights else (module.num_heads,)
    return y.expand(query.shape), heard.expand(*batch, *heads, *lengths)


def make_prunable_(model: nn.Module, chosen: Callable[[str], bool] = lambda path: True) -> None:
    """Turn torch's attention in `model`, at paths that are `chosen`, into `PrunableAttention` that computes the same.

    Where that cannot be, it stays. The modules stay the objects that they are. The new parameters hold copies of the
    old ones' values and gradients.
    """
    refused = refusals(model)
    for path, module in modules_of(model).items():
        if type(module) is nn.MultiheadAttention and path not in refused and chosen(path):
            _split_(module)


def refusals(model: nn.Module) -> dict[str, str]:
    """By path of torch's attention that cannot become `PrunableAttention`, why."""
    modules = modules_of(model)
    uses = Counter(id(tensor) for module in modules.values() for tensor in module._parameters.values())
    nested = [
        f"{path}." if path else ""
        for path, module in modules.items()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    ]
    found: dict[str, str] = {}
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, PrunableAttention):
            if reason := _refusal(module, uses):
                found[path] = reason
            elif any(map(path.startswith, nested)):
                found[path] = "may be given nested tensors; set use_nested_tensor = False above it"
    return found


def _refusal(module: nn.MultiheadAttention, uses: Mapping[int, int]) -> str | None:
    if type(module) is not nn.MultiheadAttention:
        return "is of a class of its own"
    if module.bias_k is not None or module.add_zero_attn:
        return "adds a key and a value of its own"
    if any(uses[id(tensor)] > 1 for tensor in module.parameters(recurse=False)):
        return "shares its weights"
    return None


def _split_(module: nn.MultiheadAttention) -> None:
    own = module._parameters
    apart = [own[f"{name}_weight"] for name in _LAYERS]
    weights = _thirds(own["in_proj_weight"]) if apart[0] is None else apart
    for name, weight, bias in zip(_LAYERS, weights, _thirds(own["in_proj_bias"]), strict=True):
        assert weight is not None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight, layer.training = weight, module.training
        if bias is not None:
            layer.bias = bias
        module._modules[name] = layer
    own.update(dict.fromkeys(own))
    module.__class__ = PrunableAttention


def _thirds(packed: nn.Parameter | None) -> list[nn.Parameter | None]:
    """Of a packed parameter the parts of queries, keys and values, with their gradients."""
    if packed is None:
        return [None] * 3
    parts = [parameter_like(packed, part.clone()) for part in packed.detach().chunk(3)]
    grads = [None] * 3 if packed.grad is None else packed.grad.chunk(3)
    for part, grad in zip(parts, grads, strict=True):
        part.grad = None if grad is None else grad.clone()
    return [*parts]
