"""Tiny nets that carry their own truth: who feeds whom, and which channels must be cut together.

Everything here is written by hand from the architectures. Nothing is imported from the package under test, so
that no mistake of it can slip into the truth. `tests/graph/test_zoo.py` checks this file itself, against autograd.

Words used:

* A *member* is `(path, side, channel)`. Side `"in"` is an (absolute) input channel of a convolution or linear
  layer; everything else, including norms, depthwise convolutions, PReLUs and loose parameters or buffers that
  hold one entry per channel, has side `"out"`. Loose tensors go by their own dotted name.
* A *family* is the frozenset of all members that must be cut together. Families that reach the model's
  output, and channels that are broadcast over others, may not be cut and are not listed.
* The *sources* of an input channel are the nearest convolution, linear or norm outputs that reach it without
  passing another such layer; `("<input>", c)` stands for channel `c` of an image. A convolution with one
  input and one output that slides along the channels (efficient channel attention) counts its positions as
  channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT = "<input>"
CLASSES = 5

Source = tuple[str, int]
Sources = list[set[Source]]
Member = tuple[str, str, int]
ChannelSet = frozenset[Member]
Place = Callable[[int], Iterable[Member]]


# ----------------------------------------------------------------------------------------------------------
# The truth's small alphabet


def image(channels: int = 3) -> Sources:
    """Channels that come straight from the image."""
    return [{(INPUT, c)} for c in range(channels)]


def fed(path: str, channels: int, at: int = 0) -> Sources:
    """Channels fed by `channels` outputs of one layer, in order, from output `at` on."""
    return [{(path, at + c)} for c in range(channels)]


def meet(*streams: Sources) -> Sources:
    """Channel by channel, all the sources of several streams that are added or multiplied."""
    assert len({len(stream) for stream in streams}) == 1
    return [set().union(*channel) for channel in zip(*streams, strict=True)]


def whole(path: str, channels: int, over: int) -> Sources:
    """`over` channels, each of which is reached by all `channels` outputs of one layer."""
    return [{(path, c) for c in range(channels)} for _ in range(over)]


def out(path: str, at: int | Callable[[int], Iterable[int]] = 0) -> Place:
    """Output channel `c + at` (or the channels `at(c)`) of a layer, norm, or loose tensor."""
    return _place(path, "out", at)


def into(path: str, at: int | Callable[[int], Iterable[int]] = 0) -> Place:
    """Input channel `c + at` (or the channels `at(c)`) of a convolution or linear layer."""
    return _place(path, "in", at)


def _place(path: str, side: str, at: int | Callable[[int], Iterable[int]]) -> Place:
    if isinstance(at, int):
        return lambda c: [(path, side, c + at)]
    return lambda c: [(path, side, where) for where in at(c)]


def couple(channels: int | Iterable[int], *places: Place) -> set[ChannelSet]:
    """One family per channel, with a member at every place."""
    chosen = range(channels) if isinstance(channels, int) else channels
    return {frozenset(member for place in places for member in place(c)) for c in chosen}


def parts(path: str, *sizes: int) -> list[set[Source]]:
    """Consecutive runs of a producer's output channels."""
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [
        {(path, c) for c in range(start, start + size)} for start, size in zip(starts, sizes, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------
# The record


class Branches(nn.Module):
    """Decides by what it sees, which no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) if x.sum() > 0 else -self.conv(x)
        return y


@dataclass(frozen=True)
class Net:
    """A tiny net with its truth.

    Attributes:
        name: The name of the pattern.
        build: Builds the model, not yet randomised.
        shapes: The shapes of its inputs.
        sources: For every convolution and linear layer that runs, and each absolute input channel, what feeds
            it; the union over its calls.
        channel_sets: The families that may be cut; `None` where that is a matter of policy (channels that mix).
        calls: The sources call by call, for modules that run more than once.
        broadcast: Source channels that feed several input channels of one layer through one and the same
            element (a gate for all channels, a mean over channels); a probe may leave them out of the
            sources.
        training: Layers that run in training only.
        balanced: Lists of parts, each a set of producers' output channels; every part of a list must lose the
            same number of channels.
        exact: Whether cutting equals masking (not where channels are normalised, averaged or convolved
            together).
        static: Whether `forward` reads stored channel numbers that must follow the cut.
        gammas: Fixed gammas, set after randomising: norm path to values.
    """

    name: str
    build: Callable[[], nn.Module]
    sources: dict[str, Sources]
    channel_sets: set[ChannelSet] | None
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 16, 16),)
    calls: dict[str, list[Sources]] = field(default_factory=dict)
    broadcast: set[Source] = field(default_factory=set)
    training: set[str] = field(default_factory=set)
    balanced: list[list[set[Source]]] = field(default_factory=list)
    exact: bool = True
    static: bool = False
    gammas: dict[str, list[float]] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Fresh, reproducible inputs, always as a tuple."""
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randn(shape, generator=generator) for shape in self.shapes)

    @property
    def example(self) -> Tensor | tuple[Tensor, ...]:
        """Fresh inputs as a user would hand them over: a tensor where there is one, else a tuple."""
        return self.inputs[0] if len(self.shapes) == 1 else self.inputs

    def make(self, seed: int = 0) -> nn.Module:
        """A fresh model in evaluation mode, with random weights, norms and statistics."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = randomise(self.build(), seed)
        with torch.no_grad():
            for path, values in self.gammas.items():
                model.get_submodule(path).weight.copy_(torch.tensor(values))
        return model.eval()


def two_normed_convolutions(seed: int = 0) -> nn.Sequential:
    """A classifier of images, `[n, 3, height, width]`, for tests that prune something and look at something else."""
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    ]  # fmt: skip
    return randomise(nn.Sequential(*layers), seed).eval()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every norm random gamma, beta and running statistics, in place; returns the model."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
        if not norm:
            continue
        with torch.no_grad():
            if module.weight is not None:
                module.weight.copy_(draw(module.weight, 0.3, 1.7))
                module.bias.copy_(draw(module.bias, -0.5, 0.5))
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(draw(module.running_var, 0.5, 2.0))
    return model


def conv(
    inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A 2-D convolution that keeps the size of the map at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, flat."""
    return x.flatten(2).mean(2)


# ----------------------------------------------------------------------------------------------------------
# Plain nets and their activations


class Plain(nn.Module):
    """conv bn act conv bn act pool conv bn act, pooled, linear."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8, bias=bias), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 12, bias=bias), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = conv(12, 10, 1, bias=bias), nn.BatchNorm2d(10)
        self.act = act()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(10, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.pool(self.act(self.bn2(self.conv2(x))))
        x = self.act(self.bn3(self.conv3(x)))
        return self.fc(pooled(x))


def plain(name: str, build: Callable[[], nn.Module], **more: object) -> Net:
    """The record of a `Plain` net."""
    return Net(
        name,
        build,
        sources={"conv1": image(), "conv2": fed("bn1", 8), "conv3": fed("bn2", 12), "fc": fed("bn3", 10)},
        channel_sets=couple(8, out("conv1"), out("bn1"), into("conv2"))
        | couple(12, out("conv2"), out("bn2"), into("conv3"))
        | couple(10, out("conv3"), out("bn3"), into("fc")),
        **more,
    )


class NormAct(nn.BatchNorm2d):
    """A norm that holds its activation, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class PlainNormAct(nn.Module):
    """Norms with the activation inside, in nested containers, and a cast to the weight's dtype on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(conv(3, 8), NormAct(8)),
            nn.Sequential(conv(8, 12), NormAct(12), nn.Dropout2d(0.1)),
        )
        self.head = nn.ModuleDict({"fc": nn.Linear(12, CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)
        return self.head["fc"](pooled(x).to(self.head["fc"].weight.dtype))


class PerChannelSlope(nn.Module):
    """PReLU with a slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv(3, 8), nn.BatchNorm2d(8), nn.PReLU(8)
        self.conv2, self.act2 = conv(8, 6, bias=True), nn.PReLU()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.fc(pooled(self.act2(self.conv2(x))))


class Unused(nn.Module):
    """Holds an auxiliary head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.fc, self.aux = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = pooled(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


PLAIN = [
    plain("plain", Plain),
    plain("plain_bias", lambda: Plain(bias=True)),
    plain("inplace", lambda: Plain(lambda: nn.ReLU(inplace=True))),
    plain("leaky", lambda: Plain(lambda: nn.LeakyReLU(0.1, inplace=True))),
    plain("silu", lambda: Plain(nn.SiLU)),
    plain("gelu", lambda: Plain(nn.GELU)),
    plain("hardswish", lambda: Plain(nn.Hardswish)),
    plain("relu6", lambda: Plain(nn.ReLU6)),
    plain("sigmoid", lambda: Plain(nn.Sigmoid)),
    plain(
        "negative_and_zero_gammas",
        Plain,
        gammas={
            "bn1": [0.7, -0.4, 0.0, 1.2, -1.1, 0.0, 0.3, -0.2],
            "bn3": [0.0] * 4 + [-0.5, 0.5, -1e-20, 2.0, -2.0, 1e-3],
        },
    ),
    Net(
        "norm_act",
        PlainNormAct,
        sources={
            "stages.0.0": image(),
            "stages.1.0": fed("stages.0.1", 8),
            "head.fc": fed("stages.1.1", 12),
        },
        channel_sets=couple(8, out("stages.0.0"), out("stages.0.1"), into("stages.1.0"))
        | couple(12, out("stages.1.0"), out("stages.1.1"), into("head.fc")),
    ),
    Net(
        "prelu",
        PerChannelSlope,
        sources={"conv1": image(), "conv2": fed("bn1", 8), "fc": fed("conv2", 6)},
        channel_sets=couple(8, out("conv1"), out("bn1"), out("act1"), into("conv2"))
        | couple(6, out("conv2"), into("fc")),
    ),
    Net(
        "unused_head",
        Unused,
        sources={"conv1": image(), "fc": fed("bn1", 8), "aux": fed("bn1", 8)},
        channel_sets=couple(8, out("conv1"), out("bn1"), into("fc"), into("aux")),
        training={"aux"},
    ),
]


# ----------------------------------------------------------------------------------------------------------
# Residual nets


class Residual(nn.Module):
    """A chain of basic blocks with identity shortcuts, in-place additions and ReLUs."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"conv1": conv(8, 6), "bn1": nn.BatchNorm2d(6), "conv2": conv(6, 8), "bn2": nn.BatchNorm2d(8)}
            )
            for _ in range(blocks)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)), inplace=True)
        for block in self.blocks:
            y = F.relu(block["bn1"](block["conv1"](x)), inplace=True)
            y = block["bn2"](block["conv2"](y))
            y += x
            x = F.relu(y, inplace=True)
        return self.fc(pooled(x))


def residual(name: str, blocks: int) -> Net:
    """The record of a `Residual` net: block `b` is fed by the stem and all blocks before it."""
    sources = {"conv0": image()}
    stream = fed("bn0", 8)
    places = [out("conv0"), out("bn0"), into("fc")]
    channel_sets: set[ChannelSet] = set()
    for b in range(blocks):
        path = f"blocks.{b}"
        sources[f"{path}.conv1"] = stream
        sources[f"{path}.conv2"] = fed(f"{path}.bn1", 6)
        stream = meet(stream, fed(f"{path}.bn2", 8))
        places += [into(f"{path}.conv1"), out(f"{path}.conv2"), out(f"{path}.bn2")]
        channel_sets |= couple(6, out(f"{path}.conv1"), out(f"{path}.bn1"), into(f"{path}.conv2"))
    sources["fc"] = stream
    return Net(
        name, lambda: Residual(blocks), sources=sources, channel_sets=channel_sets | couple(8, *places)
    )


class Projection(nn.Module):
    """A block that halves the map, with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 10, stride=2), nn.BatchNorm2d(10)
        self.conv2, self.bn2 = conv(10, 12), nn.BatchNorm2d(12)
        self.down = nn.Sequential(conv(8, 12, 1, stride=2), nn.BatchNorm2d(12))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(pooled(F.relu(y + self.down(x))))


class PreActivation(nn.Module):
    """Norm and ReLU come before each convolution; the stream itself has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv(3, 8)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), conv(8, 6)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), conv(6, 8)
        self.bn3, self.conv3 = nn.BatchNorm2d(8), conv(8, 8)
        self.bn4 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        x = x + self.conv3(F.relu(self.bn3(x)))
        return self.fc(pooled(F.relu(self.bn4(x))))


class PaddedShortcut(nn.Module):
    """Option A of the CIFAR ResNets: subsampled, padded by `pad` channels on each side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 6, stride=2), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(6, 16), nn.BatchNorm2d(16)
        self.pad = 4
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return self.fc(pooled(F.relu(y)))


class Padding(nn.Module):
    """Option A as a module of its own; it holds no layer, and the pad is the width of nothing that reaches it."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class PaddedShortcutModule(nn.Module):
    """Option A with the shortcut beside the block's layers, as most CIFAR ResNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 6, stride=2), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = conv(6, 16), nn.BatchNorm2d(16)
        self.shortcut = Padding(4, 4)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(pooled(F.relu(y + self.shortcut(x))))


def padded_shortcut(name: str, build: Callable[[], nn.Module]) -> Net:
    """The record of both padded shortcuts: stem channel `i` meets block channel `i + 4`."""
    nothing: Sources = [set() for _ in range(4)]
    return Net(
        name,
        build,
        sources={
            "conv0": image(),
            "conv1": fed("bn0", 8),
            "conv2": fed("bn1", 6),
            "fc": meet(fed("bn2", 16), nothing + fed("bn0", 8) + nothing),
        },
        channel_sets=couple(6, out("conv1"), out("bn1"), into("conv2"))
        | couple(8, out("conv0"), out("bn0"), into("conv1"), out("conv2", 4), out("bn2", 4), into("fc", 4))
        | couple([*range(4), *range(12, 16)], out("conv2"), out("bn2"), into("fc")),
        static=True,
    )


class PartialAdd(nn.Module):
    """Only the first channels of a wider layer receive the shortcut, as in RexNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 12), nn.BatchNorm2d(12)
        self.width = 8
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        y = self.bn1(self.conv1(x))
        y = torch.cat([y[:, : self.width] + x, y[:, self.width :]], dim=1)
        return self.fc(pooled(F.relu(y)))


class Scaled(nn.Module):
    """A branch without a norm, scaled per channel by a loose parameter; a learned offset on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1 = conv(8, 8, bias=True)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.1)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.place = nn.Parameter(torch.randn(1, 1, 16, 16))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x))) + self.offset + self.place
        return self.fc(pooled(F.relu(x + self.gamma * self.conv1(x))))


RESIDUAL = [
    residual("residual", 1),
    residual("residual_chain", 3),
    Net(
        "projection",
        Projection,
        sources={
            "conv0": image(),
            "conv1": fed("bn0", 8),
            "conv2": fed("bn1", 10),
            "down.0": fed("bn0", 8),
            "fc": meet(fed("bn2", 12), fed("down.1", 12)),
        },
        channel_sets=couple(8, out("conv0"), out("bn0"), into("conv1"), into("down.0"))
        | couple(10, out("conv1"), out("bn1"), into("conv2"))
        | couple(12, out("conv2"), out("bn2"), out("down.0"), out("down.1"), into("fc")),
    ),
    Net(
        "pre_activation",
        PreActivation,
        sources={
            "conv0": image(),
            "conv1": fed("bn1", 8),
            "conv2": fed("bn2", 6),
            "conv3": fed("bn3", 8),
            "fc": fed("bn4", 8),
        },
        channel_sets=couple(6, out("conv1"), out("bn2"), into("conv2"))
        | couple(
            8,
            *(out("conv0"), out("bn1"), into("conv1"), out("conv2"), out("bn3"), into("conv3"), out("conv3")),
            *(out("bn4"), into("fc")),
        ),
    ),
    padded_shortcut("padded_shortcut", PaddedShortcut),
    padded_shortcut("padded_shortcut_module", PaddedShortcutModule),
    Net(
        "partial_add",
        PartialAdd,
        sources={
            "conv0": image(),
            "conv1": fed("bn0", 8),
            "fc": meet(fed("bn1", 12), fed("bn0", 8) + [set() for _ in range(4)]),
        },
        channel_sets=couple(8, out("conv0"), out("bn0"), into("conv1"), out("conv1"), out("bn1"), into("fc"))
        | couple(range(8, 12), out("conv1"), out("bn1"), into("fc")),
        static=True,
    ),
    Net(
        "layer_scale",
        Scaled,
        sources={"conv0": image(), "conv1": fed("bn0", 8), "fc": meet(fed("bn0", 8), fed("conv1", 8))},
        channel_sets=couple(
            8, out("conv0"), out("bn0"), into("conv1"), out("conv1"), out("gamma"), out("offset"), into("fc")
        ),
    ),
]


# ----------------------------------------------------------------------------------------------------------
# Concatenations, splits and permutations


class Dense(nn.Module):
    """Dense concatenation, each layer with its norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 6), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = conv(6, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(10, 5), nn.BatchNorm2d(5)
        self.fc = nn.Linear(15, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = torch.cat([x, F.relu(self.bn1(self.conv1(x)))], dim=1)
        x = torch.cat([F.relu(self.bn2(self.conv2(x))), x], dim=1)
        return self.fc(pooled(x))


class DensePreActivation(nn.Module):
    """DenseNet: a norm over the concatenation before each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv(3, 6)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), conv(6, 4)
        self.bn2, self.conv2 = nn.BatchNorm2d(10), conv(10, 4)
        self.bn3, self.fc = nn.BatchNorm2d(14), nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], dim=1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], dim=1)
        return self.fc(pooled(F.relu(self.bn3(x))))


class Doubled(nn.Module):
    """The same stream twice in a concatenation, and the image beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 6), nn.BatchNorm2d(6)
        self.conv1 = conv(15, 4, bias=True)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn0(self.conv0(x)))
        return self.fc(pooled(F.relu(self.conv1(torch.cat([y, x, y], dim=1)))))


class SwappedChunks(nn.Module):
    """Two halves, each through its own layer, joined again in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conva, self.bna = conv(4, 5), nn.BatchNorm2d(5)
        self.convb, self.bnb = conv(4, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(11, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.bn0(self.conv0(x))).chunk(2, dim=1)
        x = torch.cat([self.bnb(self.convb(b)), self.bna(self.conva(a))], dim=1)
        return self.fc(pooled(F.relu(x)))


class UnequalSplit(nn.Module):
    """A split at stored sizes; the first part goes round the layer, as in cross-stage nets."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [3, 5]
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(5, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(F.relu(self.bn0(self.conv0(x))), self.sizes, dim=1)
        b = F.relu(self.bn1(self.conv1(b)))
        return self.fc(pooled(torch.cat([a, b], dim=1)))


class Shuffle(nn.Module):
    """A channel shuffle between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


def shuffled(c: int) -> int:
    """Where the shuffle of 8 channels in 2 groups puts channel `c`: (group, place) becomes (place, group)."""
    return (c % 4) * 2 + c // 4


class ShuffleUnit(nn.Module):
    """The unit of ShuffleNet-V2: half goes round, half through 1x1, depthwise, 1x1; then a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.pw1, self.bn1 = conv(4, 6, 1), nn.BatchNorm2d(6)
        self.dw, self.bn2 = conv(6, 6, groups=6), nn.BatchNorm2d(6)
        self.pw2, self.bn3 = conv(6, 4, 1), nn.BatchNorm2d(4)
        self.shuffle = nn.ChannelShuffle(2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.bn0(self.conv0(x))).chunk(2, dim=1)
        b = F.relu(self.bn1(self.pw1(b)))
        b = F.relu(self.bn3(self.pw2(self.bn2(self.dw(b)))))
        return self.fc(pooled(self.shuffle(torch.cat((a, b), dim=1))))


class GatedHalves(nn.Module):
    """Gated linear unit: the second half of the channels gates the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 12), nn.BatchNorm2d(12)
        self.conv1, self.bn1 = conv(6, 4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.bn0(self.conv0(x)), dim=1)
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


class PixelShuffle(nn.Module):
    """Four channels become one at twice the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 12), nn.BatchNorm2d(12)
        self.up = nn.PixelShuffle(2)
        self.conv1, self.bn1 = conv(3, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.bn0(self.conv0(x))))
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


JOINED = [
    Net(
        "dense",
        Dense,
        sources={
            "conv0": image(),
            "conv1": fed("bn0", 6),
            "conv2": fed("bn0", 6) + fed("bn1", 4),
            "fc": fed("bn2", 5) + fed("bn0", 6) + fed("bn1", 4),
        },
        channel_sets=couple(6, out("conv0"), out("bn0"), into("conv1"), into("conv2"), into("fc", 5))
        | couple(4, out("conv1"), out("bn1"), into("conv2", 6), into("fc", 11))
        | couple(5, out("conv2"), out("bn2"), into("fc")),
    ),
    Net(
        "dense_pre_activation",
        DensePreActivation,
        sources={"conv0": image(), "conv1": fed("bn1", 6), "conv2": fed("bn2", 10), "fc": fed("bn3", 14)},
        channel_sets=couple(
            6, out("conv0"), out("bn1"), into("conv1"), out("bn2"), into("conv2"), out("bn3"), into("fc")
        )
        | couple(4, out("conv1"), out("bn2", 6), into("conv2", 6), out("bn3", 6), into("fc", 6))
        | couple(4, out("conv2"), out("bn3", 10), into("fc", 10)),
    ),
    Net(
        "doubled",
        Doubled,
        sources={"conv0": image(), "conv1": fed("bn0", 6) + image() + fed("bn0", 6), "fc": fed("conv1", 4)},
        channel_sets=couple(6, out("conv0"), out("bn0"), into("conv1"), into("conv1", 9))
        | couple(4, out("conv1"), into("fc")),
    ),
    Net(
        "swapped_chunks",
        SwappedChunks,
        sources={
            "conv0": image(),
            "conva": fed("bn0", 4),
            "convb": fed("bn0", 4, at=4),
            "fc": fed("bnb", 6) + fed("bna", 5),
        },
        channel_sets=couple(4, out("conv0"), out("bn0"), into("conva"))
        | couple(4, out("conv0", 4), out("bn0", 4), into("convb"))
        | couple(5, out("conva"), out("bna"), into("fc", 6))
        | couple(6, out("convb"), out("bnb"), into("fc")),
        balanced=[parts("conv0", 4, 4)],
    ),
    Net(
        "unequal_split",
        UnequalSplit,
        sources={"conv0": image(), "conv1": fed("bn0", 5, at=3), "fc": fed("bn0", 3) + fed("bn1", 6)},
        channel_sets=couple(3, out("conv0"), out("bn0"), into("fc"))
        | couple(5, out("conv0", 3), out("bn0", 3), into("conv1"))
        | couple(6, out("conv1"), out("bn1"), into("fc", 3)),
        static=True,
    ),
    Net(
        "shuffle",
        Shuffle,
        sources={
            "conv0": image(),
            "conv1": [{("bn0", k)} for k in (0, 4, 1, 5, 2, 6, 3, 7)],
            "fc": fed("bn1", 6),
        },
        channel_sets=couple(8, out("conv0"), out("bn0"), into("conv1", lambda c: [shuffled(c)]))
        | couple(6, out("conv1"), out("bn1"), into("fc")),
        balanced=[parts("conv0", 4, 4)],
    ),
    Net(
        "shuffle_unit",
        ShuffleUnit,
        sources={
            "conv0": image(),
            "pw1": fed("bn0", 4, at=4),
            "dw": fed("bn1", 6),
            "pw2": fed("bn2", 6),
            "fc": [{source} for k in range(4) for source in (("bn0", k), ("bn3", k))],
        },
        channel_sets=couple(4, out("conv0"), out("bn0"), into("fc", lambda c: [2 * c]))
        | couple(4, out("conv0", 4), out("bn0", 4), into("pw1"))
        | couple(6, out("pw1"), out("bn1"), out("dw"), out("bn2"), into("pw2"))
        | couple(4, out("pw2"), out("bn3"), into("fc", lambda c: [2 * c + 1])),
        balanced=[[*parts("conv0", 4, 4), *parts("pw2", 4)]],
    ),
    Net(
        "gated_halves",
        GatedHalves,
        sources={"conv0": image(), "conv1": meet(fed("bn0", 6), fed("bn0", 6, at=6)), "fc": fed("bn1", 4)},
        channel_sets=couple(6, out("conv0"), out("conv0", 6), out("bn0"), out("bn0", 6), into("conv1"))
        | couple(4, out("conv1"), out("bn1"), into("fc")),
    ),
    Net(
        "pixel_shuffle",
        PixelShuffle,
        sources={
            "conv0": image(),
            "conv1": [{("bn0", 4 * c + k) for k in range(4)} for c in range(3)],
            "fc": fed("bn1", 6),
        },
        channel_sets=couple(
            3,
            out("conv0", lambda c: range(4 * c, 4 * c + 4)),
            out("bn0", lambda c: range(4 * c, 4 * c + 4)),
            into("conv1"),
        )
        | couple(6, out("conv1"), out("bn1"), into("fc")),
    ),
]


# ----------------------------------------------------------------------------------------------------------
# Grouped, depthwise and transposed convolutions


class Grouped(nn.Module):
    """Convolutions in two, then four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 12, groups=2), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = conv(12, 8, groups=4), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(pooled(F.relu(self.bn2(self.conv2(x)))))


class Separable(nn.Module):
    """Depthwise then pointwise, with or without a norm between, with one or more maps per input channel."""

    def __init__(self, *, norm: bool, times: int = 1) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.dw = conv(8, 8 * times, groups=8)
        self.bn1 = nn.Sequential(nn.BatchNorm2d(8 * times), nn.ReLU6()) if norm else nn.Identity()
        self.pw, self.bn2 = conv(8 * times, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.conv0(x)))
        return self.fc(pooled(F.relu(self.bn2(self.pw(self.bn1(self.dw(x)))))))


class Transposed(nn.Module):
    """A little U-Net: down, up by a (grouped) transposed convolution, and a skip; the output is a map."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 6), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = conv(6, 8, stride=2), nn.BatchNorm2d(8)
        self.up, self.bn2 = nn.ConvTranspose2d(8, 10, 2, 2, groups=groups, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.bn3 = conv(16, 7), nn.BatchNorm2d(7)
        self.head = conv(7, CLASSES, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn1(self.conv1(skip)))
        x = F.relu(self.bn2(self.up(x)))
        x = F.relu(self.bn3(self.conv2(torch.cat([skip, x], dim=1))))
        return self.head(x)


def transposed(name: str, groups: int) -> Net:
    """The record of a `Transposed` net."""
    return Net(
        name,
        lambda: Transposed(groups),
        sources={
            "conv0": image(),
            "conv1": fed("bn0", 6),
            "up": fed("bn1", 8),
            "conv2": fed("bn0", 6) + fed("bn2", 10),
            "head": fed("bn3", 7),
        },
        channel_sets=couple(6, out("conv0"), out("bn0"), into("conv1"), into("conv2"))
        | couple(8, out("conv1"), out("bn1"), into("up"))
        | couple(10, out("up"), out("bn2"), into("conv2", 6))
        | couple(7, out("conv2"), out("bn3"), into("head")),
        balanced=[] if groups == 1 else [parts("conv1", 4, 4), parts("up", 5, 5)],
    )


CONVOLUTIONS = [
    Net(
        "grouped",
        Grouped,
        sources={"conv0": image(), "conv1": fed("bn0", 8), "conv2": fed("bn1", 12), "fc": fed("bn2", 8)},
        channel_sets=couple(8, out("conv0"), out("bn0"), into("conv1"))
        | couple(12, out("conv1"), out("bn1"), into("conv2"))
        | couple(8, out("conv2"), out("bn2"), into("fc")),
        balanced=[parts("conv0", 4, 4), parts("conv1", 3, 3, 3, 3), parts("conv2", 2, 2, 2, 2)],
    ),
    Net(
        "separable",
        lambda: Separable(norm=True),
        sources={"conv0": image(), "dw": fed("bn0", 8), "pw": fed("bn1.0", 8), "fc": fed("bn2", 6)},
        channel_sets=couple(8, out("conv0"), out("bn0"), out("dw"), out("bn1.0"), into("pw"))
        | couple(6, out("pw"), out("bn2"), into("fc")),
    ),
    Net(
        "separable_bare",
        lambda: Separable(norm=False),
        sources={"conv0": image(), "dw": fed("bn0", 8), "pw": fed("dw", 8), "fc": fed("bn2", 6)},
        channel_sets=couple(8, out("conv0"), out("bn0"), out("dw"), into("pw"))
        | couple(6, out("pw"), out("bn2"), into("fc")),
    ),
    Net(
        "separable_twofold",
        lambda: Separable(norm=True, times=2),
        sources={"conv0": image(), "dw": fed("bn0", 8), "pw": fed("bn1.0", 16), "fc": fed("bn2", 6)},
        channel_sets=couple(
            8,
            out("conv0"),
            out("bn0"),
            out("dw", lambda c: (2 * c, 2 * c + 1)),
            out("bn1.0", lambda c: (2 * c, 2 * c + 1)),
            into("pw", lambda c: (2 * c, 2 * c + 1)),
        )
        | couple(6, out("pw"), out("bn2"), into("fc")),
    ),
    transposed("transposed", 1),
    transposed("transposed_grouped", 2),
]


# ----------------------------------------------------------------------------------------------------------
# Gates


class SqueezeExcite(nn.Module):
    """Squeeze and excitation with 1x1 convolutions or linear layers."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 4) if linear else nn.Conv2d(8, 4, 1)
        self.fc2 = nn.Linear(4, 8) if linear else nn.Conv2d(4, 8, 1)
        self.conv1, self.bn1 = conv(8, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn0(self.conv0(x)))
        squeezed = pooled(x) if self.linear else x.mean((2, 3), keepdim=True)
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))
        x = x * (gate[:, :, None, None] if self.linear else gate)
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


def squeeze_excite(name: str, *, linear: bool) -> Net:
    """The record of a `SqueezeExcite` net."""
    return Net(
        name,
        lambda: SqueezeExcite(linear=linear),
        sources={
            "conv0": image(),
            "fc1": fed("bn0", 8),
            "fc2": fed("fc1", 4),
            "conv1": meet(fed("bn0", 8), fed("fc2", 8)),
            "fc": fed("bn1", 6),
        },
        channel_sets=couple(8, out("conv0"), out("bn0"), into("fc1"), out("fc2"), into("conv1"))
        | couple(4, out("fc1"), into("fc2"))
        | couple(6, out("conv1"), out("bn1"), into("fc")),
    )


class SpatialGate(nn.Module):
    """One gate per pixel for all channels, computed by a convolution or from the mean over channels."""

    def __init__(self, *, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.gate = conv(1 if mean else 8, 1, bias=True)
        self.conv1, self.bn1 = conv(8, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = x * torch.sigmoid(self.gate(x.mean(1, keepdim=True) if self.mean else x))
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


def spatial_gate(name: str, *, mean: bool) -> Net:
    """The record of a `SpatialGate` net.

    Where the gate sees the mean, all channels meet in its one input, so none of them can go alone.
    """
    inner = couple(8, out("conv0"), out("bn0"), into("conv1"), into("gate"))
    return Net(
        name,
        lambda: SpatialGate(mean=mean),
        sources={
            "conv0": image(),
            "gate": whole("bn0", 8, over=1) if mean else fed("bn0", 8),
            "conv1": meet(fed("bn0", 8), [{("gate", 0)}] * 8),
            "fc": fed("bn1", 6),
        },
        channel_sets=(set() if mean else inner) | couple(6, out("conv1"), out("bn1"), into("fc")),
        broadcast={("gate", 0)},
    )


class EfficientChannelAttention(nn.Module):
    """A 1-d convolution runs along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.conv1, self.bn1 = conv(8, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        gate = torch.sigmoid(self.eca(pooled(x).unsqueeze(1)))
        x = x * gate.view(x.shape[0], -1, 1, 1)
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


class SelectiveKernel(nn.Module):
    """Two branches weighed against each other by a softmax, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.conva, self.bna = conv(8, 6), nn.BatchNorm2d(6)
        self.convb, self.bnb = conv(8, 6, 5), nn.BatchNorm2d(6)
        self.reduce, self.bnr = conv(6, 4, 1), nn.BatchNorm2d(4)
        self.select = conv(4, 12, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        both = torch.stack([F.relu(self.bna(self.conva(x))), F.relu(self.bnb(self.convb(x)))], dim=1)
        weights = self.select(F.relu(self.bnr(self.reduce(both.sum(1).mean((2, 3), keepdim=True)))))
        weights = torch.softmax(weights.view(x.shape[0], 2, both.shape[2], 1, 1), dim=1)
        return self.fc(pooled((both * weights).sum(1)))


GATES = [
    squeeze_excite("squeeze_excite_conv", linear=False),
    squeeze_excite("squeeze_excite_linear", linear=True),
    spatial_gate("spatial_gate", mean=False),
    spatial_gate("spatial_gate_of_mean", mean=True),
    Net(
        "channel_attention",
        EfficientChannelAttention,
        sources={
            "conv0": image(),
            "eca": fed("bn0", 8),
            "conv1": meet(fed("bn0", 8), fed("eca", 8)),
            "fc": fed("bn1", 6),
        },
        channel_sets=couple(8, out("conv0"), out("bn0"), into("conv1"))
        | couple(6, out("conv1"), out("bn1"), into("fc")),
        exact=False,
    ),
    Net(
        "selective_kernel",
        SelectiveKernel,
        sources={
            "conv0": image(),
            "conva": fed("bn0", 8),
            "convb": fed("bn0", 8),
            "reduce": meet(fed("bna", 6), fed("bnb", 6)),
            "select": fed("bnr", 4),
            "fc": meet(fed("bna", 6), fed("bnb", 6), fed("select", 6), fed("select", 6, at=6)),
        },
        channel_sets=couple(8, out("conv0"), out("bn0"), into("conva"), into("convb"))
        | couple(
            6,
            *(out("conva"), out("bna"), out("convb"), out("bnb"), into("reduce")),
            *(out("select"), out("select", 6), into("fc")),
        )
        | couple(4, out("reduce"), out("bnr"), into("select")),
    ),
]


# ----------------------------------------------------------------------------------------------------------
# Nets without batch norms, or with other norms


class NormFree(nn.Module):
    """Convolutions and ReLUs only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8, bias=True), conv(8, 6, bias=True)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(pooled(F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)))))


class StandardisedConv(nn.Conv2d):
    """Standardises its weight and scales it by a learned gain per output, as NF-Nets do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / std * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    """Weight-standardised convolutions, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = StandardisedConv(3, 8), StandardisedConv(8, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(pooled(F.gelu(self.conv2(F.gelu(self.conv1(x)) * 1.7))))


class OtherNorm(nn.Module):
    """conv norm relu conv norm relu, with norms made by a function of the width."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.n1 = conv(3, 8), norm(8)
        self.conv2, self.n2 = conv(8, 12), norm(12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.conv1(x)))
        return self.fc(pooled(F.relu(self.n2(self.conv2(x)))))


def other_norm(name: str, norm: Callable[[int], nn.Module], **more: object) -> Net:
    """The record of an `OtherNorm` net."""
    return Net(
        name,
        lambda: OtherNorm(norm),
        sources={"conv1": image(), "conv2": fed("n1", 8), "fc": fed("n2", 12)},
        channel_sets=couple(8, out("conv1"), out("n1"), into("conv2"))
        | couple(12, out("conv2"), out("n2"), into("fc")),
        **more,
    )


class ConvNeXt(nn.Module):
    """Depthwise, layer norm over the channels, two linear layers, layer scale; channels last in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.dw = conv(8, 8, 5, groups=8, bias=True)
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gamma = nn.Parameter(torch.rand(8))
        self.last = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.fc2(F.gelu(self.fc1(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean((2, 3))))


class FunctionalNorm(nn.Module):
    """A mean over the channels without a module: every output channel depends on every input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x - x.mean(1, keepdim=True)
        return self.fc(pooled(F.relu(self.conv2(x))))


NORMS = [
    Net(
        "norm_free",
        NormFree,
        sources={"conv1": image(), "conv2": fed("conv1", 8), "fc": fed("conv2", 6)},
        channel_sets=couple(8, out("conv1"), into("conv2")) | couple(6, out("conv2"), into("fc")),
    ),
    Net(
        "standardised",
        Standardised,
        sources={"conv1": image(), "conv2": fed("conv1", 8), "fc": fed("conv2", 6)},
        channel_sets=couple(8, out("conv1"), out("conv1.gain"), into("conv2"))
        | couple(6, out("conv2"), out("conv2.gain"), into("fc")),
        exact=False,
    ),
    other_norm("instance_norm", lambda width: nn.InstanceNorm2d(width, affine=True)),
    other_norm("instance_norm_bare", nn.InstanceNorm2d),
    other_norm(
        "group_norm",
        lambda width: nn.GroupNorm(4, width),
        balanced=[parts("conv1", 2, 2, 2, 2), parts("conv2", 3, 3, 3, 3)],
        exact=False,
    ),
    other_norm("group_norm_one", lambda width: nn.GroupNorm(1, width), exact=False),
    Net(
        "layer_norm",
        ConvNeXt,
        sources={
            "stem": image(),
            "dw": fed("stem", 8),
            "fc1": fed("norm", 8),
            "fc2": fed("fc1", 12),
            "head": fed("last", 8),
        },
        channel_sets=couple(
            8,
            *(
                out("stem"),
                out("dw"),
                out("norm"),
                into("fc1"),
                out("fc2"),
                out("gamma"),
                out("last"),
                into("head"),
            ),
        )
        | couple(12, out("fc1"), into("fc2")),
        exact=False,
    ),
    Net(
        "functional_norm",
        FunctionalNorm,
        sources={"conv1": image(), "conv2": whole("conv1", 8, over=8), "fc": fed("conv2", 6)},
        channel_sets=None,
        broadcast={("conv1", c) for c in range(8)},
        exact=False,
    ),
]


# ----------------------------------------------------------------------------------------------------------
# Heads, dimensions, several inputs and outputs, shared modules


class Shared(nn.Module):
    """One convolution used twice in a row, with a norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = conv(3, 8), nn.BatchNorm2d(8)
        self.shared = conv(8, 8)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn1(self.shared(x)))
        return self.fc(pooled(F.relu(self.bn2(self.shared(x)))))


class SharedHead(nn.Module):
    """One head on two levels of a pyramid, as detectors have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conva, self.bna = conv(3, 8), nn.BatchNorm2d(8)
        self.convb, self.bnb = conv(8, 8, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Sequential(conv(8, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bna(self.conva(x)))
        b = F.relu(self.bnb(self.convb(a)))
        return self.fc(torch.cat([pooled(self.head(a)), pooled(self.head(b))], dim=1))


class Flattened(nn.Module):
    """A VGG head: 2x2 maps flattened into a linear layer, a norm on vectors, dropout, another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.fc1, self.norm = nn.Linear(24, 10), nn.BatchNorm1d(10)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.features(x), 1)
        return self.fc2(self.drop(F.relu(self.norm(self.fc1(x)))))


class BlurPool(nn.Module):
    """An anti-aliasing pool: a functional depthwise convolution whose kernel is a buffer."""

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (row[:, None] * row[None, :])[None, None]
        self.register_buffer("kernel", kernel if channels is None else kernel.repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=kernel.shape[0])


class Blurred(nn.Module):
    """A blur pool between two layers, with one kernel for all channels or one kernel each."""

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.pool = BlurPool(channels)
        self.conv2, self.bn2 = conv(8, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.interpolate(F.relu(self.bn2(self.conv2(x))), scale_factor=2, mode="bilinear")
        return self.fc(pooled(x))


def blurred(name: str, channels: int | None) -> Net:
    """The record of a `Blurred` net."""
    places = [out("conv1"), out("bn1"), into("conv2")]
    return Net(
        name,
        lambda: Blurred(channels),
        sources={"conv1": image(), "conv2": fed("bn1", 8), "fc": fed("bn2", 6)},
        channel_sets=couple(8, *(places if channels is None else [*places, out("pool.kernel")]))
        | couple(6, out("conv2"), out("bn2"), into("fc")),
    )


class OtherDimension(nn.Module):
    """A plain net in one or three dimensions."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 3: nn.Conv3d}[dimension]
        norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dimension]
        self.conv1, self.bn1 = convolution(2, 8, 3, padding=1, bias=False), norm(8)
        self.conv2, self.bn2 = convolution(8, 6, 3, stride=2, bias=False), norm(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(pooled(F.relu(self.bn2(self.conv2(x)))))


def other_dimension(name: str, dimension: int, shape: tuple[int, ...]) -> Net:
    """The record of an `OtherDimension` net."""
    return Net(
        name,
        lambda: OtherDimension(dimension),
        sources={"conv1": image(2), "conv2": fed("bn1", 8), "fc": fed("bn2", 6)},
        channel_sets=couple(8, out("conv1"), out("bn1"), into("conv2"))
        | couple(6, out("conv2"), out("bn2"), into("fc")),
        shapes=(shape,),
    )


class TwoInputs(nn.Module):
    """Two images of different depth, added after their own stems."""

    def __init__(self) -> None:
        super().__init__()
        self.conva, self.bna = conv(3, 8), nn.BatchNorm2d(8)
        self.convb, self.bnb = conv(1, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(8, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(self.bna(self.conva(x)) + self.bnb(self.convb(y)))
        return self.fc(pooled(F.relu(self.bn1(self.conv1(x)))))


class DictOutput(nn.Module):
    """Returns features beside logits; the features' channels are promised to the caller and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 6), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = conv(6, 7), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        features = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        logits = self.fc(pooled(F.relu(self.bn3(self.conv3(features)))))
        return {"logits": logits, "features": [features]}


HEADS = [
    Net(
        "shared",
        Shared,
        sources={
            "conv0": image(),
            "shared": meet(fed("bn0", 8), fed("bn1", 8)),
            "fc": fed("bn2", 8),
        },
        channel_sets=couple(
            8, out("conv0"), out("bn0"), into("shared"), out("shared"), out("bn1"), out("bn2"), into("fc")
        ),
        calls={"shared": [fed("bn0", 8), fed("bn1", 8)]},
    ),
    Net(
        "shared_head",
        SharedHead,
        sources={
            "conva": image(),
            "convb": fed("bna", 8),
            "head.0": meet(fed("bna", 8), fed("bnb", 8)),
            "fc": fed("head.1", 6) + fed("head.1", 6),
        },
        channel_sets=couple(
            8, out("conva"), out("bna"), into("convb"), out("convb"), out("bnb"), into("head.0")
        )
        | couple(6, out("head.0"), out("head.1"), into("fc"), into("fc", 6)),
        calls={"head.0": [fed("bna", 8), fed("bnb", 8)]},
    ),
    Net(
        "flattened",
        Flattened,
        sources={
            "features.0": image(),
            "fc1": [{("features.1", c)} for c in range(6) for _ in range(4)],
            "fc2": fed("norm", 10),
        },
        channel_sets=couple(
            6, out("features.0"), out("features.1"), into("fc1", lambda c: range(4 * c, 4 * c + 4))
        )
        | couple(10, out("fc1"), out("norm"), into("fc2")),
    ),
    blurred("blur_pool", None),
    blurred("blur_pool_wide", 8),
    other_dimension("one_dimension", 1, (2, 2, 24)),
    other_dimension("three_dimensions", 3, (2, 2, 6, 7, 8)),
    Net(
        "two_inputs",
        TwoInputs,
        sources={
            "conva": image(3),
            "convb": image(1),
            "conv1": meet(fed("bna", 8), fed("bnb", 8)),
            "fc": fed("bn1", 6),
        },
        channel_sets=couple(8, out("conva"), out("bna"), out("convb"), out("bnb"), into("conv1"))
        | couple(6, out("conv1"), out("bn1"), into("fc")),
        shapes=((2, 3, 16, 16), (2, 1, 16, 16)),
    ),
    Net(
        "dict_output",
        DictOutput,
        sources={"conv1": image(), "conv2": fed("bn1", 8), "conv3": fed("bn2", 6), "fc": fed("bn3", 7)},
        channel_sets=couple(8, out("conv1"), out("bn1"), into("conv2"))
        | couple(7, out("conv3"), out("bn3"), into("fc")),
    ),
]

ZOO: list[Net] = [*PLAIN, *RESIDUAL, *JOINED, *CONVOLUTIONS, *GATES, *NORMS, *HEADS]
BY_NAME: dict[str, Net] = {net.name: net for net in ZOO}
