"""Uniform pruning of transformers with a repair in closed form, in the manner of CORP.

Written from the formulas of Zhang and Yang 2026 (arXiv 2602.05243); the code is ours. Every MLP loses the same share of
its hidden units, and every head the same share of the dimensions of its queries and keys: those that carry least
energy. On calibration images what goes (P) is predicted from what stays (S), by ridge regression:

    hidden units       x_P ~ B x_S + c        W_S + W_P B and b + W_P c behind them
    attention logits   q_P k_P ~ q_S M k_S    E[q_S q_S'] M E[k_S k_S'] + ridge M = E[q_S q_P'] E[k_P k_S']

and `1 + M` goes into the queries. As an option dimensions of the values go, too, predicted as hidden units are.
All statistics are those of the dense model. Knows timm's MLPs, and its attention in ViTs and Swins.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from benchmarks.accuracy.attention.ways import OutOfReachError
from ss_pruning.profiling.macs import count_macs

#: As a share of the mean diagonal.
RIDGE = 1e-3
BATCH = 64
# Shares that may go are told apart down to 2 to the power of minus this.
_HALVINGS = 9


@dataclass
class Moments:
    """Of channels, over all tokens of all images, in double precision.

    Attributes:
        count: How many tokens.
        total: `[channels]`, sums.
        products: `[channels, channels]`, sums of products.
    """

    count: int
    total: Tensor
    products: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def second(self) -> Tensor:
        return self.products / self.count

    @property
    def covariance(self) -> Tensor:
        return self.second - torch.outer(self.mean, self.mean)


class NarrowAttention(nn.Module):
    """What timm's attention does, with heads of fewer dimensions: queries and keys of so many, values of their own."""

    def __init__(
        self, of: nn.Module, query: nn.Linear, key: nn.Linear, value: nn.Linear, projection: nn.Linear
    ) -> None:
        super().__init__()
        self.heads, self.scale = of.num_heads, of.scale
        self.query, self.key, self.value, self.projection = query, key, value, projection
        positions = of._get_rel_pos_bias().detach() if hasattr(of, "_get_rel_pos_bias") else None
        self.register_buffer("positions", positions)

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:
        """`x` is `[windows, tokens, channels]`; `mask` is `[windows of an image, tokens, tokens]`, as Swin's."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        bias = self.positions
        if mask is not None:
            bias = bias + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        return self.projection(y.transpose(1, 2).flatten(2))


def prune_uniformly(model: nn.Module, macs: float, images: Tensor, values: bool = False) -> nn.Module:
    """A smaller copy with at most this share of the multiply-accumulates, by the smallest sparsity that does.

    Args:
        model: Made of timm's blocks; not changed.
        macs: Share to keep.
        images: `[n, ...]` to calibrate on.
        values: Whether dimensions of values go, too.

    Raises:
        OutOfReachError: Even without what may go it multiplies more.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        moments = _moments(model, images)
        goal = macs * count_macs(model, images[:1])[0]
        low, high, best = 0.0, 1.0, None
        for _ in range(_HALVINGS):
            sparsity = (low + high) / 2
            small = _cut(model, moments, sparsity, values)
            if count_macs(small, images[:1])[0] <= goal:
                high, best = sparsity, small
            else:
                low = sparsity
    if best is None:
        raise OutOfReachError(f"{macs:.0%} of the multiply-accumulates cannot be reached")
    return best


def _cut(model: nn.Module, moments: dict[str, Moments], sparsity: float, values: bool) -> nn.Module:
    small = copy.deepcopy(model)
    for path, module in _parts(small):
        if isinstance(module, Mlp):
            narrow_mlp_(module, moments[f"{path}.fc2"], sparsity)
        else:
            read = moments[f"{path}.proj"] if values else None
            small.set_submodule(path, narrow_attention(module, moments[f"{path}.qkv"], read, sparsity))
    return small


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """MLPs and attention, by path."""
    return [(p, m) for p, m in model.named_modules() if isinstance(m, Mlp) or hasattr(m, "qkv")]


def _moments(model: nn.Module, images: Tensor) -> dict[str, Moments]:
    """Of what is read by second layers of MLPs and by projections, and of what queries, keys and values are."""
    found: dict[str, Moments] = {}

    def add(path: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).double()
        new = Moments(len(rows), rows.sum(0), rows.T @ rows)
        old = found.get(path)
        if old is not None:
            new = Moments(old.count + new.count, old.total + new.total, old.products + new.products)
        found[path] = new

    with _watched(model, add):
        for batch in images.split(BATCH):
            model(batch)
    return found


@contextmanager
def _watched(model: nn.Module, add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While this lasts, `add` is told what layers read or put out."""
    hooks = []
    for path, module in _parts(model):
        for name in ("fc2",) if isinstance(module, Mlp) else ("proj", "qkv"):
            layer, where = getattr(module, name), f"{path}.{name}"

            def hook(_: nn.Module, x: tuple[Tensor], y: Tensor, where: str = where) -> None:
                add(where, y if where.endswith("qkv") else x[0])

            hooks.append(layer.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def narrow_mlp_(mlp: Mlp, read: Moments, sparsity: float) -> None:
    """Hidden units of least energy go; `read` are the moments of what the second layer reads."""
    kept, gone = _chosen(read.second.diagonal(), sparsity)
    mlp.fc1, mlp.fc2 = _rows(mlp.fc1, kept), folded(mlp.fc2, read, kept, gone)


def narrow_attention(of: Any, made: Moments, read: Moments | None, sparsity: float) -> NarrowAttention:
    """Dimensions of queries and keys go in each head; of values, too, if `read`, what the projection reads, is given.

    Args:
        of: timm's attention.
        made: Moments of queries, keys and values, in this order.
        read: Moments of what the projection reads.
        sparsity: The share that goes.
    """
    width = of.qkv.out_features // 3
    each = width // of.num_heads
    query, key, value = (_part(of.qkv, part * width, width) for part in range(3))
    queries, keys, mixes = [], [], []
    energy = made.second.diagonal()
    for begin in range(0, width, each):
        q, k = (torch.arange(begin, begin + each) + part * width for part in range(2))
        kept, gone = _chosen(energy[q] * energy[k], sparsity)
        queries.append(begin + kept)
        keys.append(begin + kept)
        mixes.append(
            torch.eye(len(kept)).double() + logit_mix(made.second, (q[kept], q[gone]), (k[kept], k[gone]))
        )
    query, key = _rows(query, torch.cat(queries)), _rows(key, torch.cat(keys))
    _mix_(query, torch.block_diag(*mixes))
    projection = of.proj
    if read is not None:
        kept, gone = _alike(read.second.diagonal(), of.num_heads, sparsity)
        value, projection = _rows(value, kept), folded(of.proj, read, kept, gone)
    return NarrowAttention(of, query, key, value, projection)


def _alike(energy: Tensor, heads: int, sparsity: float) -> tuple[Tensor, Tensor]:
    """As many in each head: what stays, and what goes."""
    each = len(energy) // heads
    found = [_chosen(part, sparsity) for part in energy.split(each)]
    kept, gone = (torch.cat([head * each + pair[i] for head, pair in enumerate(found)]) for i in (0, 1))
    return kept, gone


def _chosen(energy: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """What stays, and what goes, at least one staying; in their order."""
    order = energy.argsort(descending=True)
    count = max(1, round(len(energy) * (1 - sparsity)))
    return order[:count].sort().values, order[count:].sort().values


def predicted(read: Moments, kept: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """`B` and `c` of `x_gone ~ B x_kept + c`."""
    covariance = read.covariance
    within = covariance[kept][:, kept]
    ridge = RIDGE * within.diagonal().mean() * torch.eye(len(kept)).double()
    b = torch.linalg.solve(within + ridge, covariance[kept][:, gone]).T
    return b, read.mean[gone] - b @ read.mean[kept]


def folded(layer: nn.Linear, read: Moments, kept: Tensor, gone: Tensor) -> nn.Linear:
    """The layer on what stays alone, with what goes predicted from it."""
    b, c = predicted(read, kept, gone)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    return _linear(weight[:, kept] + weight[:, gone] @ b, bias + weight[:, gone] @ c)


def logit_mix(second: Tensor, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """`M`, by which `q_S M k_S` predicts `q_P k_P`, if any query may meet any key.

    Args:
        second: Second moments of all channels.
        queries: Channels of queries that stay, and that go.
        keys: Likewise.
    """
    left, right = (second[kept][:, kept] for kept, _ in (queries, keys))
    wanted = second[queries[0]][:, queries[1]] @ second[keys[1]][:, keys[0]]
    (a, u), (b, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    ridge = RIDGE * a.mean() * b.mean()
    mixed: Tensor = u @ ((u.T @ wanted @ v) / (torch.outer(a, b) + ridge)) @ v.T
    return mixed


def _mix_(layer: nn.Linear, mix: Tensor) -> None:
    """What the layer puts out is multiplied by a matrix from the right."""
    for tensor in (layer.weight, layer.bias):
        tensor.data = (mix.T @ tensor.detach().double()).to(tensor.dtype)


def _part(layer: nn.Linear, begin: int, width: int) -> nn.Linear:
    return _rows(layer, torch.arange(begin, begin + width))


def _rows(layer: nn.Linear, kept: Tensor) -> nn.Linear:
    return _linear(layer.weight.detach()[kept], layer.bias.detach()[kept])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.float(), bias.float()
    return layer
