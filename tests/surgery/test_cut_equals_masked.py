"""Cut == masked, checked from outside: what `prune_` leaves against a dense net masked by the oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ss_pruning
from ss_pruning import prune_
from ss_pruning.config import Allocation
from ss_pruning.errors import BudgetError, InputError, ModelError, NothingToPruneError, PlanError
from ss_pruning.report.records import Report
from tests.graph.test_groups import words
from tests.support import oracle
from tests.support.snapshot import Bomb, snapshot
from tests.support.zoo import BY_NAME, CLASSES, ZOO, BlurPool, Net, conv, pooled, randomise

with_channel_sets = pytest.mark.parametrize(
    "net", [n for n in ZOO if n.channel_sets], ids=lambda net: net.name
)

# A cut of its inputs changes the mean that a standardised kernel subtracts: it cannot equal masking.
CANNOT_EQUAL_MASKING = {"standardised"}


def removed_inputs(model: nn.Module) -> dict[str, set[int]]:
    """The input channels of each consumer that the model's plan removed."""
    return {cut.path: set(cut.removed) for cut in model.ss_pruning_plan.cuts if cut.side == "in"}


def largest_difference(dense: nn.Module, cut: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Between the cut and the masked net, in float64, relative to the largest output."""
    expected = oracle.masked_output(dense, inputs, removed_inputs(cut))
    with torch.no_grad():
        found = oracle.tensors(copy.deepcopy(cut).double().eval()(*(x.double() for x in inputs)))
    assert [x.shape for x in found] == [x.shape for x in expected]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def left_for_the_forward(report: Report) -> list[tuple[str, ...]]:
    """What a search had to exclude, because the cut model was wrong or did not run."""
    return [left.paths for left in report.excluded if "relies on" in left.reason]


@pytest.mark.parametrize("scope", ["global", "local"])
@with_channel_sets
def test_cut_equals_masked(net: Net, scope: str) -> None:
    dense, model = net.make(), net.make().train()  # as it is in the middle of somebody's training
    report = prune_(model, net.example, ratio=0.4, allocation=scope)
    assert report.params_after < report.params_before
    assert report.max_error < 1e-10
    if net.exact:
        assert largest_difference(dense, model, net.inputs) < 1e-10
    if net.name not in CANNOT_EQUAL_MASKING:
        assert left_for_the_forward(report) == []


@with_channel_sets
def test_a_plan_cuts_a_model_without_data_alike(net: Net) -> None:
    """Verification tells wrong plans apart on shapes alone."""
    cut, ghost = net.make(), net.make().to("meta")
    prune_(cut, net.example, ratio=0.4, allocation="local")
    cut.ss_pruning_plan.apply_(ghost)
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (cut, ghost)]
    assert shapes[0] == shapes[1]


@with_channel_sets
def test_only_whole_channel_sets_go(net: Net) -> None:
    dense, model = net.make(), net.make()
    prune_(model, net.example, ratio=0.4)
    removed = {
        (named, side, channel)
        for cut in model.ss_pruning_plan.cuts
        for named, side in words(dense, cut.path, cut.side)
        for channel in cut.removed
    }
    for channel_set in net.channel_sets or ():
        assert channel_set <= removed or not channel_set & removed
    assert removed <= {member for channel_set in net.channel_sets or () for member in channel_set}


@with_channel_sets
def test_a_cut_net_trains(net: Net) -> None:
    model = net.make()
    prune_(model, net.example, ratio=0.3)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    sum(x.square().mean() for x in oracle.tensors(model(*net.inputs))).backward()
    assert all(
        p.grad is not None and p.grad.shape == p.shape for n, p in model.named_parameters() if "act2" not in n
    )
    optimiser.step()
    assert all(x.isfinite().all() for x in oracle.tensors(model(*net.inputs)))


@pytest.mark.parametrize(
    "name", ["padded_shortcut", "unequal_split", "partial_add", "swapped_chunks", "dense"]
)
def test_pruning_twice_is_one_plan(name: str) -> None:
    """A pruned net can be pruned again, and its plan leads there from the dense one."""
    net = BY_NAME[name]
    dense, model = net.make(), net.make()
    prune_(model, net.example, params=0.85)
    prune_(model, net.example, params=0.85)
    twin = model.ss_pruning_plan.apply_(net.make())
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert largest_difference(dense, model, net.inputs) < 1e-10


@pytest.mark.parametrize(
    "criterion", ["GroupMagnitudeImportance", "BNScaleImportance", "LAMPImportance", "RandomImportance"]
)
@pytest.mark.parametrize(
    "name", ["residual_chain", "dense", "shuffle_unit", "padded_shortcut", "separable", "grouped"]
)
def test_any_importance_of_torch_pruning(name: str, criterion: str) -> None:
    importance = getattr(pytest.importorskip("torch_pruning").importance, criterion)()
    net = BY_NAME[name]
    dense, model = net.make(), net.make()
    prune_(model, net.example, ratio=0.4, importance=importance)
    assert largest_difference(dense, model, net.inputs) < 1e-10


# ----------------------------------------------------------------------------------------------------------
# Budgets


def macs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates by torch's own counter."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("share", [0.9, 0.7, 0.45])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met_from_below_to_within_one_step(kind: str, share: float) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    dense = {"macs": macs_of(model, net.inputs), "params": sum(p.numel() for p in model.parameters())}
    report = prune_(model, net.example, **{kind: share})
    after = {"macs": macs_of(model, net.inputs), "params": sum(p.numel() for p in model.parameters())}
    assert (report.macs_before, report.macs_after) == (dense["macs"], after["macs"])
    assert (report.params_before, report.params_after) == (dense["params"], after["params"])
    widest_step = 0.1  # the stream's channel: a sixteenth of every layer but the stem
    assert share - widest_step < after[kind] / dense[kind] <= share


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({"macs": 0.0001}, BudgetError, r"smallest is macs=0\.\d+"),
        ({"params": 0.0001}, BudgetError, r"smallest is params=0\.\d+"),
        ({"macs": 1.5}, InputError, "between 0 and 1"),
        ({}, InputError, "exactly one"),
        ({"macs": 0.5, "ratio": 0.5}, InputError, "exactly one"),
        ({"macs": 0.5, "ignore": ["conv9"]}, InputError, "conv9"),
        ({"macs": 0.5, "allocation": "glocal"}, InputError, "glocal"),
        ({"macs": 0.5, "ignore": [""]}, NothingToPruneError, "no channel"),
    ],
)
def test_a_refusal_leaves_the_model_alone(
    budget: dict[str, Any], error: type[Exception], message: str
) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make().train()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        prune_(model, net.example, **budget)
    assert snapshot(model) == before


def test_a_model_that_raises_or_is_not_finite_is_left_alone() -> None:
    net = BY_NAME["residual"]
    raising, broken = Bomb(net.make()), net.make()
    with torch.no_grad():
        broken.conv0.weight[0, 0, 0, 0] = float("nan")
    for model, message in ((raising, "boom"), (broken, r"conv0\.weight.*NaN")):
        before = repr(snapshot(model))
        with pytest.raises(ModelError, match=message):
            prune_(model, net.example, ratio=0.4)
        assert repr(snapshot(model)) == before


def test_ignored_layers_keep_their_outputs() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    report = prune_(model, net.example, ratio=0.4, ignore=["conv2", model.conv3])
    assert (model.conv2.out_channels, model.conv3.out_channels) == (12, 10)
    assert model.conv1.out_channels < 8
    assert {"conv2", "conv3"} <= {path for left in report.excluded for path in left.paths}


def test_what_can_never_shrink_is_named() -> None:
    """Parts of 3 and 5 channels have no smaller sizes in proportion: they follow freely or stay whole."""
    net = BY_NAME["unequal_split"]
    model = net.make()
    for _ in range(2):
        report = prune_(model, net.example, params=0.9)
    named = {path for left in report.excluded for path in left.paths}
    assert model.conv0.out_channels < 8 or "conv0" in named


@pytest.mark.parametrize("name", ["plain", "residual_chain", "grouped", "dense"])
def test_round_to(name: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    report = prune_(model, net.example, ratio=0.3, allocation=Allocation(round_to=2))
    assert all(
        layer.outputs_after % 2 == 0 for layer in report.layers if layer.outputs_after != layer.outputs_before
    )


# ----------------------------------------------------------------------------------------------------------
# Random nets put together from the zoo's patterns


class Block(nn.Module):
    """A piece of a random net: takes a map of some width, gives one of `width`."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.width = inputs


class ConvBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.width = draw.draw(st.sampled_from([4, 6, 8, 12]))
        kernel = draw.draw(st.sampled_from([1, 3]))
        self.conv, self.bn = (
            conv(inputs, self.width, kernel, bias=draw.draw(st.booleans())),
            nn.BatchNorm2d(self.width),
        )
        self.act = draw.draw(
            st.sampled_from([nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(), nn.PReLU(self.width)])
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class ResidualBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        inner = draw.draw(st.sampled_from([4, 6]))
        self.before = draw.draw(st.booleans())
        self.conv1, self.conv2 = conv(inputs, inner), conv(inner, inputs)
        self.bn1, self.bn2 = (
            nn.BatchNorm2d(inputs if self.before else inner),
            nn.BatchNorm2d(inner if self.before else inputs),
        )
        self.gamma = nn.Parameter(torch.rand(inputs, 1, 1)) if draw.draw(st.booleans()) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        else:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return x + (y if self.gamma is None else y * self.gamma)


class DenseBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        growth, self.first = draw.draw(st.sampled_from([2, 4])), draw.draw(st.booleans())
        self.width = inputs + growth
        self.conv, self.bn = conv(inputs, growth), nn.BatchNorm2d(growth)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return torch.cat([y, x] if self.first else [x, y], dim=1)


class ChunkBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.sizes = [inputs // 2, inputs - inputs // 2]
        self.equal = inputs % 2 == 0 and draw.draw(st.booleans())
        self.width = 4 + self.sizes[0]
        self.conv, self.bn = conv(self.sizes[1], 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1) if self.equal else x.split(self.sizes, dim=1)
        return torch.cat([F.relu(self.bn(self.conv(b))), a], dim=1)


class GroupedBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.width = 8
        groups = draw.draw(st.sampled_from([g for g in (1, 2, 4) if inputs % g == 0 and g < inputs]))
        self.conv, self.bn = conv(inputs, 8, groups=groups), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class DepthwiseBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.dw = conv(inputs, inputs, groups=inputs)
        self.bn = nn.BatchNorm2d(inputs) if draw.draw(st.booleans()) else nn.Identity()
        self.squeeze, self.expand = nn.Conv2d(inputs, 4, 1), nn.Conv2d(4, inputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.dw(x)))
        return x * torch.sigmoid(self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class ShuffleBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.groups = 2 if inputs % 2 == 0 else 1

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).flatten(1, 2)


class PaddedBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.before, self.after = draw.draw(st.sampled_from([(2, 2), (0, 3), (1, 2)]))
        self.width = inputs + self.before + self.after
        self.conv, self.bn = conv(inputs, self.width), nn.BatchNorm2d(self.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + F.pad(x, (0, 0, 0, 0, self.before, self.after)))


class ResizeBlock(Block):
    def __init__(self, inputs: int, draw: st.DataObject) -> None:
        super().__init__(inputs)
        self.width = 6
        self.blur = BlurPool(None)
        self.up, self.bn = nn.ConvTranspose2d(inputs, 6, 2, 2, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.bn(self.up(self.blur(x))))


BLOCKS = [
    *(ConvBlock, ResidualBlock, DenseBlock, ChunkBlock, GroupedBlock, DepthwiseBlock),
    *(ShuffleBlock, PaddedBlock, ResizeBlock),
]


class RandomNet(nn.Module):
    """A stem, some blocks, a convolution, a classifier."""

    def __init__(self, kinds: list[type[Block]], draw: st.DataObject) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        width, blocks = 8, []
        for kind in kinds:
            blocks.append(kind(width, draw))
            width = blocks[-1].width
        self.blocks = nn.Sequential(*blocks)
        self.last, self.fc = conv(width, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(pooled(F.relu(self.last(x))))


@settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.data(), st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5), st.sampled_from(["global", "local"])
)
def test_random_nets(draw: st.DataObject, kinds: list[type[Block]], scope: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(RandomNet(kinds, draw)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    dense = copy.deepcopy(model)
    try:
        report = prune_(model, x, params=0.85, allocation=scope)
    except (
        BudgetError,
        NothingToPruneError,
    ):  # a shuffle of few channels may leave nothing that can go alone
        reject()
    assert largest_difference(dense, model, (x,)) < 1e-10
    assert report.params_after < report.params_before


def test_a_layers_own_numbers_are_its_widths() -> None:
    """Norms that timm builds keep `num_features` true, also where a new width equals another old one."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("cs3darknet_focus_s")
    prune_(model, torch.randn(1, 3, 64, 64), ratio=0.5, allocation="local")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight)
    prune_(model, torch.randn(1, 3, 64, 64), ratio=0.3)


class StoredHalf(nn.Module):
    """Shuffles channels by a number of its own, which must follow the cut before the order in it can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.half = conv(3, 16), conv(16, 6), 8
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv0(x))
        n, _, h, w = x.shape
        x = x.view(n, 2, self.half, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return self.fc(pooled(F.relu(self.conv1(x))))


def test_a_shuffle_by_a_stored_number_is_followed_and_put_in_order() -> None:
    torch.manual_seed(0)
    model, x = StoredHalf().eval(), torch.randn(2, 3, 8, 8)
    dense = copy.deepcopy(model)
    prune_(model, x, ratio=0.4, ignore=["conv1"])
    assert model.conv0.out_channels == 2 * model.half < 16
    assert largest_difference(dense, model, (x,)) < 1e-10


def test_a_plan_sets_nothing_but_numbers_that_are_there() -> None:
    net = BY_NAME["unequal_split"]
    model = net.make()
    prune_(model, net.example, ratio=0.4)
    text = model.ss_pruning_plan.to_json()
    assert '"name":"sizes"' in text
    for name in ("forward", "__class__", "training", "nothing"):
        forged = ss_pruning.Plan.from_json(text.replace('"name":"sizes"', f'"name":"{name}"'))
        with pytest.raises(PlanError, match=name):
            forged.apply_(net.make())


def test_a_grouped_convolution_may_come_down_to_one_input_a_group() -> None:
    """It looks like a depthwise one then; cut again, whole groups go; and the composed plan fits a fresh model."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=8), nn.ReLU(), nn.Conv2d(32, 5, 3)
        ).eval()

    model, x = build(), torch.randn(1, 3, 12, 12)
    report = prune_(model, x, ratio=0.5, allocation="local")
    assert (model[1].in_channels, model[1].out_channels, model[1].groups) == (8, 16, 8)
    assert report.max_error < 1e-10
    assert prune_(model, x, ratio=0.5, allocation="local").max_error < 1e-10
    assert (model[1].in_channels, model[1].groups) == (4, 4)
    fresh = model.ss_pruning_plan.apply_(build())
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    assert torch.equal(fresh(x), model(x))


def test_stages_are_timed_and_verification_is_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    told: list[tuple[str, int, int]] = []
    report = prune_(model, torch.zeros(1, 3, 8, 8), ratio=0.5, progress=lambda *what: told.append(what))
    assert list(report.seconds) == ["trace", "estimate", "score", "plan", "verify", "cut"]
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert told[0] == ("trace", 0, 1)
    assert told[-1][0] == "cut"
    assert told[-1][1] == told[-1][2]


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_cifar_resnets_lose_half_of_their_padded_residual_stream(name: str) -> None:
    from benchmarks.data.models import cifar_resnet, stream_layers

    torch.manual_seed(0)
    model = cifar_resnet(name).eval()
    before = {path: model.get_submodule(path).out_channels for path in stream_layers(model)}
    report = prune_(model, torch.zeros(1, 3, 16, 16), ratio=0.5, allocation="local")
    assert report.max_error <= 1e-10
    assert {path: 2 * model.get_submodule(path).out_channels for path in before} == before
