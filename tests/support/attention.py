"""Small models with attention of many forms, each naming what belongs to one of its heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Layer side or loose tensor, by path, and the channels there that are of one head.
Head = dict[tuple[str, str], list[int]]


def runs(head: int, width: int, parts: int = 1, heads: int = 0) -> list[int]:
    """Channels of a head of `width` in a layer that puts out `parts` (queries, keys, values) of `heads` each."""
    return [part * heads * width + head * width + i for part in range(parts) for i in range(width)]


class Fused(nn.Module):
    """Queries, keys and values from one layer; how wide a head is follows from the scale that is stored."""

    def __init__(self, dim: int = 12, heads: int = 4, width: int = 5) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width
        self.attn_dim = heads * width
        self.qkv = nn.Linear(dim, 3 * self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(q, k, v))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, y: Tensor) -> Tensor:
        return self.proj(y.transpose(1, 2).reshape(len(y), -1, self.attn_dim))

    def truth(self, head: int) -> Head:
        h, w = self.num_heads, self.head_dim
        return {("qkv", "out"): runs(head, w, 3, h), ("proj", "in"): runs(head, w)}


class Biased(Fused):
    """With a table of biases and a temperature, both by head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, self.num_heads))
        self.temperature = nn.Parameter(torch.rand(self.num_heads, 1, 1) + 0.5)
        self.register_buffer("index", torch.arange(36).reshape(6, 6) % 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = self.table[self.index.flatten()].view(6, 6, -1).permute(2, 0, 1)
        return self.join((q @ k.mT * self.temperature + bias).softmax(-1) @ v)

    def truth(self, head: int) -> Head:
        return super().truth(head) | {("table", "tensor"): [head], ("temperature", "tensor"): [head]}


class MadeBias(nn.Module):
    """Makes a bias for each head with a layer of its own; it is asked for it, and never called."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads, self.layers = heads, nn.Sequential(nn.Linear(2, heads))
        self.register_buffer("places", torch.randn(36, 2))

    def made(self) -> Tensor:
        return self.layers(self.places).view(6, 6, self.num_heads).permute(2, 0, 1)


class Positioned(Fused):
    """With a bias that a network makes for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = MadeBias(self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.made()  # before there are queries
        return self.join(F.scaled_dot_product_attention(*self.split(x), bias))

    def truth(self, head: int) -> Head:
        return super().truth(head) | {("bias.layers.0", "out"): [head]}


class Grouped(nn.Module):
    """Three heads of queries share one of keys and values: they go together."""

    def __init__(self, dim: int = 12, groups: int = 4, width: int = 2) -> None:
        super().__init__()
        self.groups, self.width = groups, width
        self.q, self.k, self.v = (nn.Linear(dim, n * groups * width) for n in (3, 1, 1))
        self.o = nn.Linear(3 * groups * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(3, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def truth(self, head: int) -> Head:
        wide, narrow = runs(head, 3 * self.width), runs(head, self.width)
        return {("q", "out"): wide, ("k", "out"): narrow, ("v", "out"): narrow, ("o", "in"): wide}


class Crossed(Fused):
    """Channels attend to channels of their head, so that values mix, too."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.mT for t in self.split(x))
        return self.join(((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v).mT)


class OfMaps(nn.Module):
    """Attention between the places of a map, and a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 3, 4
        self.qkv = nn.Conv2d(12, 36, 1)
        self.norm = nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.mT.unsqueeze(-1))
        q, k, v = y.flatten(2).view(len(y), 3, self.heads, self.width, -1).unbind(1)
        mixed = v @ (q.mT @ k).softmax(-1).mT
        return self.out(self.norm(mixed.reshape(len(y), -1, *y.shape[2:])).relu()).flatten(2).mT

    def truth(self, head: int) -> Head:
        own = runs(head, self.width)
        return {("qkv", "out"): runs(head, self.width, 3, 3), ("norm", "through"): own, ("out", "in"): own}


class Aggregated(nn.Module):
    """Linear attention in single precision, on what a convolution with groups for each head has made."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.qkv, self.mix = nn.Conv2d(12, 36, 1), nn.Conv2d(36, 36, 1, groups=9)
        self.out = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.qkv(x.mT.unsqueeze(-1)))
        q, k, v = y.reshape(len(y), -1, 3 * self.width, y.shape[2]).float().chunk(3, 2)
        q, k = q.relu(), k.relu()
        mixed = (v @ k.mT @ q) / (k.sum(-1, keepdim=True) * q).sum(2, keepdim=True).clamp_min(1e-3)
        return self.out(mixed.to(x.dtype).reshape(len(y), -1, *y.shape[2:])).flatten(2).mT

    def truth(self, head: int) -> Head:
        own = runs(head, 3 * self.width)
        return {
            ("qkv", "out"): own,
            ("mix", "in"): own,
            ("mix", "out"): own,
            ("out", "in"): runs(head, self.width),
        }


class Read(Fused):
    """Reads the weight of a layer that it never calls, with biases of its own; no softmax notices that of the keys."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(width=width)
        self.qkv = nn.Linear(12, 3 * self.attn_dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(self.attn_dim)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(self.attn_dim), persistent=False)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=bias)
        return qkv.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def truth(self, head: int) -> Head:
        own = runs(head, self.head_dim)
        return super().truth(head) | {(f"{part}_bias", "tensor"): own for part in "qkv"}


class Blocked(Fused):
    """Its places lie in as many rows as it has heads, by chance, and it knows so twice."""

    def __init__(self) -> None:
        super().__init__(heads=3)
        self.rows = self.block = 3

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 2 * self.rows == 2 * self.block
        return super().forward(x)


class Interleaved(Fused):
    """Heads are moved behind their channels: at the projection they lie interleaved."""

    def join(self, y: Tensor) -> Tensor:
        return self.proj(y.permute(0, 2, 3, 1).reshape(len(y), -1, self.attn_dim))

    def truth(self, head: int) -> Head:
        h, w = self.num_heads, self.head_dim
        return super().truth(head) | {("proj", "in"): [head + h * i for i in range(w)]}


class MultiQuery(Fused):
    """All heads of queries read the same keys and values, which stay."""

    def __init__(self, dim: int = 12, heads: int = 4, width: int = 5) -> None:
        super().__init__(dim, heads, width)
        self.qkv = nn.Linear(dim, (heads + 2) * width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).split((self.attn_dim, self.head_dim, self.head_dim), -1)
        return q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)

    def truth(self, head: int) -> Head:
        own = runs(head, self.head_dim)
        return {("qkv", "out"): own, ("proj", "in"): own}


class LayerEach(nn.Module):
    """A layer of its own for each head, so that none could lose one; their values are channels like others."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(12, 15) for _ in range(3))
        self.width = 5
        self.proj = nn.Linear(15, 12)

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).split((5, 5, self.width), -1) for layer in self.heads)
        return self.proj(torch.cat([F.scaled_dot_product_attention(*part) for part in parts], -1))


class Proportional(Read):
    """Takes what all heads put out for as wide as its input: heads go with as large a share of that, or not at all."""

    def __init__(self) -> None:
        super().__init__(width=3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(x))
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Fixed(Fused):
    """Knows by heart how many heads there are."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).reshape(*x.shape[:2], 3, 4, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)


class Gated(Fused):
    """Queries are a gate for all heads, too, so that none of them can go."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        gate = q.mean((1, 2, 3), keepdim=True).sigmoid()
        return self.join(F.scaled_dot_product_attention(q, k, v) * gate)


class Apart(nn.Module):
    """Layers and numbers of their own for queries and keys, and for values; products are divided by a stored number."""

    def __init__(self, dim: int = 12, heads: int = 3, width: int = 4, value_width: int = 6) -> None:
        super().__init__()
        self.heads, self.key_width, self.value_width = heads, width, value_width
        self.scale = width**-0.5
        self.q, self.k = nn.Linear(dim, heads * width), nn.Linear(dim, heads * width)
        self.v, self.proj = nn.Linear(dim, heads * value_width), nn.Linear(heads * value_width, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (self.heads, self.key_width)).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (self.heads, self.value_width)).transpose(1, 2)
        return self.proj(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Turned(Fused):
    """Queries meet keys in reverse, which is not how the places of their channels pair them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(q, k.flip(-1), v))


class Rotary(Fused):
    """Queries and keys are turned in pairs of channels, by angles that are stored for a whole head."""

    def __init__(self) -> None:
        super().__init__(width=4)
        self.register_buffer("angles", torch.rand(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.join(F.scaled_dot_product_attention(self.turned(q), self.turned(k), v))

    def turned(self, x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Block(nn.Module):
    """Attention and a perceptron on one residual stream, with an image's patches in and two classes out."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 2, 2)
        self.norm1, self.attn = nn.LayerNorm(12), attention
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    kind.__name__.lower(): kind
    for kind in (
        Fused,
        Biased,
        Grouped,
        Crossed,
        OfMaps,
        Read,
        Positioned,
        Blocked,
        Interleaved,
        MultiQuery,
        Aggregated,
    )
}
#: Of an image with six patches.
EXAMPLE = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def block(name: str) -> Block:
    """A block with attention of one form, the same each time."""
    torch.manual_seed(0)
    return Block(ATTENTION[name]()).eval()
