"""Budgets: costs against a recount of the cut model, and what the cost exponent does to the order."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import plan, prune_
from ss_pruning._utils.arrays import Floats
from ss_pruning.config import Allocation, Budget
from ss_pruning.errors import BudgetError, InputError, NothingToPruneError
from ss_pruning.graph import TracedModel, couple, trace
from ss_pruning.graph.groups import Coupling, Member, PruningGroup, Subgroup
from ss_pruning.planning.allocation import Schedule, choose, schedule, select
from ss_pruning.planning.costs import Costs
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE
from tests.support.attention import EXAMPLE, block
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, randomise


class TwoWidths(nn.Module):
    """Two inner layers that can shrink: a channel of the second one costs four times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap_in, self.cheap_out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.dear_in, self.dear_out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        cheap = self.cheap_out(F.relu(self.cheap_in(F.avg_pool2d(x, 2))))
        return F.interpolate(cheap, scale_factor=2) + self.dear_out(F.relu(self.dear_in(x)))


X = torch.zeros(1, 4, 8, 8)


class Given:
    """An importance that hands out fixed scores by layer."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores

    def __call__(self, group: object) -> Tensor:
        name = group[0].dep.target.name  # type: ignore[index]
        return self.scores[name] * torch.arange(1.0, 9.0)


@pytest.mark.parametrize("name", ["residual_chain", "dense", "grouped", "separable", "flattened"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_what_a_channel_set_costs_is_what_the_costs_say(name: str, kind: str) -> None:
    net = BY_NAME[name]
    model = net.make().eval()
    connectivity = trace(model, net.example)
    coupling = couple(connectivity, model)
    costs = Costs(TracedModel(model, net.example, connectivity, coupling))
    step = costs.removed_per_step(coupling.groups)
    each = costs.per_channel_set(coupling.groups, kind)  # type: ignore[arg-type]
    tiny = 1e-6
    for u, group in enumerate(coupling.groups):
        channel_sets = sum(subgroup.size for subgroup in group.subgroups) / group.steps
        saved = costs.after(kind, 0 * step[u]) - costs.after(kind, tiny * step[u])  # type: ignore[arg-type]
        dense = costs.macs if kind == "macs" else costs.params
        assert each[u] == pytest.approx(saved / tiny / channel_sets / dense, rel=1e-3)


def test_one_channel_costs_what_cutting_it_saves() -> None:
    model = randomise(TwoWidths(), 0)
    connectivity = trace(model, X)
    costs = Costs(TracedModel.of(model, X))
    groups = couple(connectivity, model).groups
    each = dict(zip((group.name for group in groups), costs.per_channel_set(groups, "macs"), strict=True))
    dear, cheap = 64 * (4 + 4), 16 * (4 + 4)
    assert each["dear_in"] == pytest.approx(dear / (8 * dear + 8 * cheap))
    assert each["cheap_in"] == pytest.approx(cheap / (8 * dear + 8 * cheap))


@pytest.mark.parametrize(("exponent", "spared"), [(0.0, "dear_in"), (1.0, "cheap_in")])
def test_the_exponent_decides_between_importance_and_importance_per_cost(
    exponent: float, spared: str
) -> None:
    """The dear layer is twice as important, and four times as expensive."""
    model = randomise(TwoWidths(), 0)
    importance = Given(cheap_in=1.0, dear_in=2.0)
    prune_(model, X, macs=0.8, importance=importance, allocation=Allocation(cost_exponent=exponent))
    kept = {name: model.get_submodule(name).out_channels for name in ("cheap_in", "dear_in")}
    other = ({"cheap_in", "dear_in"} - {spared}).pop()
    assert kept[spared] > kept[other]


def test_a_ratio_has_no_cost() -> None:
    models = [randomise(TwoWidths(), 0)]
    models.append(copy.deepcopy(models[0]))
    for model, exponent in zip(models, (0.0, 3.0), strict=True):
        prune_(model, X, ratio=0.5, allocation=Allocation(cost_exponent=exponent))
    assert models[0].ss_pruning_plan == models[1].ss_pruning_plan


@pytest.mark.parametrize("exponent", [-0.1, 11, float("nan")])
def test_a_silly_exponent_is_refused(exponent: float) -> None:
    model = randomise(TwoWidths(), 0)
    before = snapshot(model)
    with pytest.raises(InputError, match="cost_exponent"):
        prune_(model, X, macs=0.5, allocation=Allocation(cost_exponent=exponent))
    assert snapshot(model) == before


# ---------------------------------------------------------------- the order of moves


def group(name: str, *sizes: int) -> PruningGroup:
    """A group of one subgroup per size; each channel set is an output channel of a layer named after both."""
    subgroups = (
        Subgroup((Member(f"{name}{n}", "out", np.arange(size)[:, None]),)) for n, size in enumerate(sizes)
    )
    return PruningGroup(tuple(subgroups))


def scores(*values: float) -> list[Floats]:
    return [np.array(values)]


def moves(plan: Schedule) -> list[tuple[int, int, int]]:
    return list(zip(plan.group.tolist(), plan.steps.tolist(), plan.channel_sets.tolist(), strict=True))


def test_globally_the_least_score_goes_first_whatever_its_group() -> None:
    groups = [group("a", 4), group("b", 3)]
    plan = schedule(groups, [scores(4.0, 1.0, 9.0, 6.0), scores(5.0, 2.0, 8.0)], max_ratio=1.0)
    # In ascending order 1 (a), 2 (b), 4 (a), 5 (b), 6 (a); the best of each group never goes.
    assert moves(plan) == [(0, 1, 1), (1, 1, 1), (0, 1, 1), (1, 1, 1), (0, 1, 1)]
    assert [ranks[0].tolist() for ranks in plan.ranked] == [[1, 0, 3, 2], [1, 0, 2]]
    assert plan.taken(3).tolist() == [2, 1]


def test_locally_groups_shrink_evenly() -> None:
    groups = [group("a", 4), group("b", 2)]
    plan = schedule(groups, [scores(9.0, 9.0, 9.0, 9.0), scores(1.0, 1.0)], scope="local", max_ratio=1.0)
    assert plan.group.tolist() == [0, 0, 1, 0]  # 1/4, 2/4, 1/2, 3/4


@pytest.mark.parametrize(("max_ratio", "most"), [(0.9, 9), (0.3, 3), (0.29, 2), (0.05, 0), (1.0, 9)])
def test_max_ratio_is_met_exactly_and_one_step_always_stays(max_ratio: float, most: int) -> None:
    plan = schedule([group("a", 10)], [scores(*range(10))], max_ratio=max_ratio)
    assert len(plan.group) == most
    assert schedule([group("a", 10)], [scores(*range(10))], max_ratio=[max_ratio]).steps.sum() == most


def test_rounded_widths_are_multiples_and_moves_take_what_lies_between() -> None:
    plan = schedule([group("a", 10)], [scores(*range(1, 11))], round_to=4, max_ratio=1.0)
    assert moves(plan) == [(0, 2, 2), (0, 4, 4)]  # 10 -> 8 -> 4


def test_a_rounded_move_counts_with_its_mean_score() -> None:
    """a loses two channels at once, of scores 1 and 7: the mean, 4, stands between b's 3 and 5."""
    groups = [group("a", 4), group("b", 3)]
    given = [scores(1.0, 7.0, 8.0, 9.0), scores(3.0, 5.0, 6.0)]
    plan = schedule(groups, given, round_to=2, max_ratio=1.0)
    assert moves(plan) == [(1, 1, 1), (0, 2, 2)]
    assert plan.taken(2).tolist() == [2, 1]


def test_subgroups_of_a_group_lose_the_same_share() -> None:
    """Subgroups of 2 and 4: a step takes one of the first and two of the second; means compare with others."""
    groups = [group("a", 2, 4), group("b", 4)]
    given = [[np.array([1.0, 9.0]), np.array([8.0, 2.0, 3.0, 7.0])], scores(1.0, 2.5, 5.0, 6.0)]
    plan = schedule(groups, given, max_ratio=1.0)
    # a's one step costs (1 + 2 + 3) / 3 = 2.
    assert moves(plan) == [(1, 1, 1), (0, 1, 3), (1, 1, 1), (1, 1, 1)]


def test_the_selection_holds_what_stays() -> None:
    groups = [group("a", 2, 4), group("b", 3)]
    given = [[np.array([9.0, 1.0]), np.array([8.0, 2.0, 3.0, 7.0])], scores(3.0, 1.0, 2.0)]
    plan = schedule(groups, given, max_ratio=1.0)
    widths = {("a0", "out"): 2, ("a1", "out"): 4, ("b0", "out"): 3}
    coupling = Coupling(tuple(groups), (), widths)  # type: ignore[arg-type]
    chosen = select(plan, groups, np.array([1, 2]), coupling)
    assert chosen == {("a0", "out"): (0,), ("a1", "out"): (0, 3), ("b0", "out"): (0,)}
    assert select(plan, groups, np.array([0, 1]), coupling) == {("b0", "out"): (0, 2)}


# ---------------------------------------------------------------- budgets


def two_widths() -> tuple[Costs, tuple[PruningGroup, ...], Schedule]:
    model = randomise(TwoWidths(), 0)
    connectivity = trace(model, X)
    coupling = couple(connectivity, model)
    given = [scores(*range(group.subgroups[0].size)) for group in coupling.groups]
    plan = schedule(coupling.groups, given, max_ratio=0.75)
    return Costs(TracedModel(model, X, connectivity, coupling)), coupling.groups, plan


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_shortest_prefix_within_the_budget_is_taken(kind: str) -> None:
    """Against every prefix, one after the other."""
    costs, groups, plan = two_widths()
    step = costs.removed_per_step(groups)
    dense = costs.macs if kind == "macs" else costs.params
    for value in (0.9, 0.7, 0.5, 0.4):
        steps = choose(plan, groups, costs, Budget(kind, value))  # type: ignore[arg-type]
        within = [
            n
            for n in range(len(plan.group) + 1)
            if costs.after(kind, plan.taken(n) @ step) <= value * dense  # type: ignore[arg-type]
        ]
        assert steps.tolist() == plan.taken(within[0]).tolist()
        assert within[0] > 0


def test_a_budget_of_exactly_a_prefix_takes_that_prefix() -> None:
    costs, groups, plan = two_widths()
    step = costs.removed_per_step(groups)
    for moves_taken in (1, 3, len(plan.group)):
        goal = costs.after("macs", plan.taken(moves_taken) @ step)
        found = choose(plan, groups, costs, Budget("macs", goal / costs.macs))
        assert found.tolist() == plan.taken(moves_taken).tolist()


@pytest.mark.parametrize(("ratio", "taken"), [(0.25, 4), (0.5, 8), (0.3, 4), (0.0625, 1)])
def test_a_ratio_takes_no_more_than_its_share_of_the_channels(ratio: float, taken: int) -> None:
    costs, groups, plan = two_widths()
    assert sum(subgroup.size for group in groups for subgroup in group.subgroups) == 16
    assert choose(plan, groups, costs, Budget("ratio", ratio)).sum() == taken


def test_budgets_out_of_reach_name_the_smallest_that_is_not() -> None:
    costs, groups, plan = two_widths()
    with pytest.raises(BudgetError, match=r"ratio=0\.05 is less than one step; the smallest is 1 channels"):
        choose(plan, groups, costs, Budget("ratio", 0.05))
    with pytest.raises(BudgetError, match=r"ratio=0\.9 is out of reach; the largest is 0\.7500"):
        choose(plan, groups, costs, Budget("ratio", 0.9))
    least = costs.after("macs", plan.taken(len(plan.group)) @ costs.removed_per_step(groups)) / costs.macs
    with pytest.raises(BudgetError, match=rf"macs=0\.1 is below .* the smallest is macs={least:.4f}"):
        choose(plan, groups, costs, Budget("macs", 0.1))
    nothing = schedule(groups, [scores(*range(8)), scores(*range(8))], max_ratio=0.01)
    with pytest.raises(NothingToPruneError, match="max_ratio"):
        choose(nothing, groups, costs, Budget("macs", 0.5))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 2.0])
def test_a_budget_lies_strictly_between_none_and_all(value: float) -> None:
    with pytest.raises(InputError, match="strictly between 0 and 1"):
        Budget.of(macs=value, params=None, ratio=None)
    with pytest.raises(InputError, match="give exactly one"):
        Budget.of(macs=0.5, params=0.5, ratio=None)
    assert Budget.of(macs=None, params=None, ratio=0.5) == Budget("ratio", 0.5)


def test_groups_of_a_convolution_that_go_whole_cost_in_proportion() -> None:
    """Counted, not derived: what is left of each group reads as much as before."""
    model = block("aggregated")
    traced = TracedModel.of(model, EXAMPLE)
    costs = Costs(traced)
    prune_(model, EXAMPLE, ratio=0.5, allocation="local", ignore=("embed", "fc1", "fc2"))
    removed = np.zeros(len(costs.keys))
    for cut in getattr(model, PLAN_ATTRIBUTE).cuts:
        removed[costs.number[cut.path, cut.side]] = len(cut.removed)
    assert removed.any()
    assert costs.after("params", removed) == sum(p.numel() for p in model.parameters())


def test_heads_save_what_attention_multiplies_too() -> None:
    """Products of attention are in no layer; here they are more than half of all."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm.VisionTransformer(
        img_size=48, patch_size=3, embed_dim=32, depth=1, num_heads=8, num_classes=5
    )
    x = torch.randn(1, 3, 48, 48)
    costs = Costs(TracedModel.of(model.eval(), x))
    assert sum(costs.layer_macs.values()) < costs.macs / 2
    found, report = plan(model, x, ratio=0.5, allocation="local")
    assert report.macs_after < 0.6 * costs.macs
    assert costs.macs_after(found) == report.macs_after  # which is counted on the cut model


class NonLocal(nn.Module):
    """Attention of one head over the places of a map: its values may go, what it compares may not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.q, self.k, self.v, self.out = (nn.Conv2d(16, 16, 1) for _ in range(4))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))
        z = v @ (q.mT @ k).softmax(-1).mT
        return self.head((y + self.out(z.unflatten(2, x.shape[2:]))).mean((2, 3)))


def test_products_of_queries_that_stay_are_not_saved_with_values() -> None:
    """Without that, more than the budget was left."""
    torch.manual_seed(0)
    model, x = NonLocal(), torch.zeros(1, 3, 16, 16)
    found, report = plan(model, x, macs=0.6)
    assert {cut.path for cut in found.cuts if cut.side == "out"} == {"v"}
    assert 0.5 < report.macs_after / report.macs_before <= 0.6
    assert Costs(TracedModel.of(model, x)).macs_after(found) == report.macs_after


class Beside(nn.Module):
    """What no layer does is half of the work, and the layer behind it reads other channels, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(64 + 24, 5)
        self.first, self.second = (nn.Parameter(torch.randn(n, 64) / 8) for n in (3, 64))
        self.recurrent = nn.LSTM(3, 64, batch_first=True) if kind == "LSTM" else None

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        seen = pixels @ self.first @ self.second if self.recurrent is None else self.recurrent(pixels)[0]
        maps = self.b(self.a(x).relu()).relu()
        return self.fc(torch.cat([seen.mean(1), maps.mean((2, 3))], 1))


@pytest.mark.parametrize(
    ("kind", "share"), [("product", 0.7), ("product", 0.9), ("LSTM", 0.85), ("LSTM", 0.95)]
)
def test_what_no_layer_does_is_not_counted_as_gone(kind: str, share: float) -> None:
    torch.manual_seed(0)
    model, x = Beside(kind).eval(), torch.randn(1, 3, 10, 10)
    beside = 25 * (4 * 64 * (3 + 64) if kind == "LSTM" else 64 * (3 + 64))

    def macs() -> int:
        a, b = model.a.out_channels, model.b.out_channels
        return 64 * 9 * 3 * a + 36 * 9 * a * b + 5 * (64 + b) + beside

    dense = macs()
    assert dense * 0.3 < beside < dense * 0.8
    report = prune_(model, x, macs=share)
    assert (report.macs_before, report.macs_after) == (dense, macs())
    assert share - 0.05 < macs() / dense <= share
    with pytest.raises(BudgetError, match=f"{beside / macs():.1%} outside of layers"):
        prune_(model, x, macs=0.9 * beside / macs())
