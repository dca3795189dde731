"""Small nets for what the coverage run over timm and torchvision brought to light."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_, synaptic_strength
from ss_pruning._utils.hooks import replaced_forward
from ss_pruning.graph import trace
from ss_pruning.graph.layers import channel_axis, is_norm, kind_of, mixes_channels
from ss_pruning.surgery.verification import Verifier


class GroupScaled(nn.Module):
    """A norm of nobody's library: activation and grouped scale in one, as EvoNorm has it."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        spread = x.reshape(n, self.groups, -1).var(2, unbiased=False).add(1e-5).sqrt()
        y = x * torch.sigmoid(x * self.slope.view(1, -1, 1, 1))
        y = (y.reshape(n, self.groups, -1) / spread[..., None]).reshape(n, c, h, w)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class MeanSquare(nn.Module):
    """A root-mean-square norm over the channels of a map, without a shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.weight.view(1, -1, 1, 1)


class ActiveMeanSquare(MeanSquare):
    """The same with an activation inside, as timm's norms have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class MapNorm(nn.LayerNorm):
    """A layer norm over the channels of a channels-first map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Shiftless(nn.GroupNorm):
    """A group norm that learns no shift."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)
        self.bias = None


class Scaled(nn.Module):
    """No norm: a learned scale and shift of the input itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def between(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), norm, nn.Conv2d(16, 8, 3), nn.ReLU(), *head).eval()


NORMS: list[Callable[[], nn.Module]] = [
    lambda: GroupScaled(16, 4),
    lambda: MeanSquare(16),
    lambda: ActiveMeanSquare(16),
    lambda: MapNorm(16),
    lambda: Shiftless(16),
]


@pytest.mark.parametrize("make", NORMS, ids=["grouped", "mean_square", "active", "map", "shiftless"])
@pytest.mark.parametrize("pixels", [8, 16])  # with 16, channels and pixels are as many
def test_foreign_norms_are_cut(make: Callable[[], nn.Module], pixels: int) -> None:
    model = between(make())
    x = torch.randn(2, 3, pixels, pixels)
    report = prune_(model, x, ratio=0.5, allocation="local")
    assert (model[0].out_channels, model[1].weight.numel(), model[2].in_channels) == (8, 8, 8)
    assert report.max_error < 1e-10
    assert model(x).shape == (2, 4)


def test_groups_of_a_foreign_norm_lose_as_many_each() -> None:
    model = between(GroupScaled(16, 4))
    with torch.no_grad():
        model[0].weight[:8] *= 100  # by strength alone, the last two groups would go
        model[2].weight[:, :8] *= 100
    prune_(model, torch.randn(2, 3, 8, 8), ratio=0.5, allocation="local")
    (kept,) = [cut.kept for cut in model.ss_pruning_plan.cuts if cut.path == "1"]
    assert [sum(k // 4 == group for k in kept) for group in range(4)] == [2, 2, 2, 2]


def test_what_is_a_norm() -> None:
    assert is_norm(GroupScaled(8, 2))
    assert is_norm(MeanSquare(8))
    assert is_norm(ActiveMeanSquare(8))
    assert not is_norm(Scaled(8))
    assert not is_norm(nn.PReLU(8))
    assert mixes_channels(MeanSquare(8))
    assert not mixes_channels(nn.BatchNorm2d(8))


def test_asking_a_norm_runs_no_hook() -> None:
    norm = MapNorm(6)
    calls: list[int] = []
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    assert channel_axis(norm, torch.randn(2, 6, 6, 5)) == 1
    assert calls == []


def test_what_stands_in_for_a_forward_may_ask() -> None:
    norm = MapNorm(6)
    with replaced_forward(norm, lambda x: x.sum(channel_axis(norm, x))):
        assert norm(torch.ones(2, 6, 6, 5)).shape == (2, 6, 5)


class Attention(nn.Module):
    """Its output takes the width of its input, and what it splits has equal parts: `v` cannot go alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, c).unbind(2)
        y = self.drop((q @ k.transpose(1, 2)).softmax(-1)) @ v
        return self.proj(y.reshape(n, length, c))


class Hybrid(nn.Module):
    """Convolutions around attention blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, 2))
        self.blocks = nn.ModuleList(Attention(12) for _ in range(blocks))
        self.head = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            y = y + block(y)
        return self.head(y.mean(1))


def test_what_surrounds_attention_is_cut() -> None:
    torch.manual_seed(0)
    model = Hybrid(2).eval()
    report = prune_(model, torch.randn(1, 3, 12, 12), ratio=0.5, allocation="local")
    assert (model.stem[0].out_channels, model.head[0].out_features) == (8, 10)
    assert [block.qkv.out_features for block in model.blocks] == [36, 36]
    assert report.max_error < 1e-10


def test_a_plan_that_does_not_run_costs_no_pass_with_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone show it, so that a search among many attention blocks takes seconds."""
    torch.manual_seed(0)
    model, x = Hybrid(6).eval(), torch.randn(1, 3, 12, 12)
    passes: list[str] = []
    forward = Hybrid.forward

    def counted(self: Hybrid, x: Tensor) -> Tensor:
        passes.append(x.device.type)
        return forward(self, x)

    monkeypatch.setattr(Hybrid, "forward", counted)
    verifier = Verifier(model, x, trace(model, x))
    assert verifier.ghost is not None
    passes.clear()
    prune_(model, x, ratio=0.5, allocation="local")
    assert passes.count("meta") >= 4
    assert passes.count("cpu") < 14  # three estimate the time, one counts attention


class Peeking(Hybrid):
    """Looks at values, which tensors without data do not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) else x + 1)


def test_a_model_that_looks_at_values_is_tried_with_data() -> None:
    torch.manual_seed(0)
    model, x = Peeking(1).eval(), torch.randn(1, 3, 12, 12)
    assert Verifier(model, x, trace(model, x)).ghost is None
    prune_(model, x, ratio=0.5, allocation="local")
    assert model.stem[0].out_channels == 8


class GroupedAttention(nn.Module):
    """A grouped convolution after `q, k, v`, as multi-scale attention has it: only the groups of `v` are free."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.mix = nn.Conv2d(3 * channels, 3 * channels, 1, groups=6)
        self.proj = nn.Conv2d(channels, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.qkv(x)).flatten(2).chunk(3, 1)
        y = v @ (k.transpose(1, 2) @ q).softmax(-1).transpose(1, 2)
        return self.proj(y.unflatten(2, x.shape[2:]))


def test_groups_of_which_some_must_stay_are_left_whole() -> None:
    torch.manual_seed(0)
    stem, tail = [nn.Conv2d(3, 16, 3), nn.ReLU()], [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(*stem, GroupedAttention(16), *tail).eval()
    report = prune_(model, torch.randn(1, 3, 8, 8), ratio=0.5, allocation="local")
    assert model[0].out_channels == 8
    assert (model[2].mix.in_channels, model[2].mix.out_channels) == (24, 48)
    assert any("groups could not stay equal" in left.reason for left in report.excluded)
    assert report.max_error < 1e-10


class GlobalResponse(nn.Module):
    """Adds to each channel a multiple of itself that depends on all: global response normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, channels))
        self.bias = nn.Parameter(torch.linspace(1, 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        scaled = x * size / (size.mean(1, keepdim=True) + 1e-6)
        return x + self.weight.reshape(-1, 1, 1) * scaled + self.bias.reshape(-1, 1, 1)


def test_a_response_is_cut_through() -> None:
    """It is no norm whose weight were a scale: what it passes on is told by what is before it."""
    torch.manual_seed(0)
    assert kind_of(GlobalResponse(8)) == "response"
    assert kind_of(Scaled(8)) is None
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), GlobalResponse(8), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    assert synaptic_strength(model, x).unscaled["3"].all()
    report = prune_(model, x, ratio=0.5, allocation="local")
    assert (model[0].out_channels, model[2].weight.shape, model[2].bias.shape) == (4, (4,), (4,))
    assert report.max_error < 1e-10


class Split(nn.Module):
    """As Res2Net has it: a number at which an output splits, and layers of just that width behind."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.width = channels
        self.wide = nn.Conv2d(6, 2 * channels, 1)
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(2 * channels, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).relu().split(self.width, 1)
        return x + self.out(torch.cat([self.one(a), self.two(b)], 1))


def test_where_widths_compete_the_output_that_splits_decides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Split(12), Split(12), nn.Conv2d(6, 5, 1)).eval()
    report = prune_(model, torch.randn(1, 3, 8, 8), ratio=0.4, allocation="global")
    assert [left.reason for left in report.excluded] == ["reaches the model's output"]
    for block in (model[1], model[2]):
        assert block.wide.out_channels == 2 * block.width
        assert len({block.width, block.one.out_channels, block.two.out_channels}) > 1
    assert report.max_error < 1e-10
