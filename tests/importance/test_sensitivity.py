"""Measured output error, against loops that run one copy at a time and fit one channel at a time."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.progress import Clock, listening
from ss_pruning.compensation.apply import cut_
from ss_pruning.config import (
    COMPENSATIONS,
    LEAST_IMAGES,
    SOLVED,
    Allocation,
    Budget,
    Config,
    FoldMean,
    Method,
    Reconstruct,
)
from ss_pruning.errors import BudgetError, InputError, ModelError, NothingToPruneError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Coupling, couple, ranks_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.batched_ablation import BatchedAblation
from ss_pruning.importance.calibration import Batch
from ss_pruning.importance.regression import precision
from ss_pruning.importance.sensitivity import (
    QUICK,
    THOROUGH,
    Scores,
    Shrinking,
    _hull,
    _joined,
    _measured,
    _Shrinkage,
    _shrinkage,
    added_by,
    by_sensitivity,
    set_aside,
)
from ss_pruning.importance.shared_prefix import Prefix
from ss_pruning.importance.synaptic import SynapticImportance as Synaptic
from ss_pruning.planning.allocation import allot, pruned_of, schedule, select, to_plan
from ss_pruning.planning.costs import Costs
from ss_pruning.planning.ranking import Ranker
from ss_pruning.report.notes import certainty
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.plan import Plan

BATCH = 8


def images(count: int = 16, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def norm(width: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(width)
    made.running_mean = 0.1 * torch.randn(width)
    made.running_var = 0.5 + torch.rand(width)
    return made


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), norm(6), nn.ReLU(),
        nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    ).eval()  # fmt: skip


def lab_of(
    model: nn.Module, x: Tensor, method: Method = "reconstruct", follow: bool = False
) -> BatchedAblation:
    connectivity = trace(model, x[:1])
    paths = [path for path, layer in connectivity.layers.items() if layer.kind == "synaptic"]
    statistics = measure(model, connectivity, [x], None, paths, covariance=True)
    return BatchedAblation(model, connectivity, x, statistics, method, follow)


def fitted(y: Tensor, dense: Tensor) -> Tensor:
    """Each channel of `y`, scaled and shifted to come closest to `dense`."""
    out = y.clone()
    for c in range(y.shape[1]):
        a, b = y[:, c].flatten().double(), dense[:, c].flatten().double()
        design = torch.stack([a, torch.ones_like(a)], 1)
        scale, shift = torch.linalg.lstsq(design, b).solution
        out[:, c] = (scale * y[:, c].double() + shift).float()
    return out


def following(layer: Any, small: Tensor, dense: Tensor) -> Any:
    """The norm with statistics that have moved as far as what reaches it."""
    moved = copy.deepcopy(layer)
    assert isinstance(moved.running_mean, Tensor)
    assert isinstance(moved.running_var, Tensor)
    for c in range(dense.shape[1]):
        before, after = dense[:, c].double(), small[:, c].double()
        grown = (after.var(correction=0) + layer.eps) / (before.var(correction=0) + layer.eps)
        moved.running_var[c] = grown * (moved.running_var[c] + layer.eps) - layer.eps
        moved.running_mean[c] = after.mean() + (moved.running_mean[c] - before.mean()) * grown.sqrt()
    return moved


def by_loops(
    model: nn.Sequential, x: Tensor, cut: dict[int, list[int]], method: str, follow: bool = False
) -> float:
    """Output error of a chain whose layers miss channels: layer by layer, with a regression by least squares."""
    dense = small = x
    for number, layer in enumerate(model):
        pruned, shift = cut.get(number), torch.zeros(())
        if pruned:
            rows, others = (t.movedim(1, -1).flatten(0, -2).double() for t in (dense, small))
            kept = [c for c in range(rows.shape[1]) if c not in pruned]
            one = torch.ones(len(rows), 1, dtype=torch.float64)
            told = torch.cat([rows[:, kept] if method in SOLVED else 0 * rows[:, kept], one], 1)
            solution = torch.linalg.lstsq(told, rows[:, pruned], driver="gelsd").solution
            solution = solution * (method != "none")
            if method in ("mean", "linear"):  # what is constant goes into the bias, which knows of no border
                taps = layer.weight[:, pruned].unflatten(1, (len(pruned), 1)).flatten(2).sum(2)
                shift = (taps.double() @ solution[-1]).float().reshape(-1, *[1] * (dense.dim() - 2))
                solution[-1] = 0
            predicted = torch.cat([others[:, kept], one], 1) @ solution
            small = small.clone()
            small[:, pruned] = (
                predicted.float().reshape(*dense[:, pruned].movedim(1, -1).shape).movedim(-1, 1)
            )
        moved = following(layer, small, dense) if follow and isinstance(layer, nn.BatchNorm2d) else layer
        dense, small = layer(dense), moved(small) + shift
        if method == "reconstruct" and number >= min(cut) and isinstance(layer, (nn.Conv2d, nn.Linear)):
            small = fitted(small, dense)
    return float((small - dense).square().mean() / (dense - dense.mean(0)).square().mean())


@torch.no_grad()
def test_it_is_what_loops_from_the_definition_give() -> None:
    model, x = chain(), images()
    cuts = [[1], [0, 5], [2, 3, 4, 6]]
    found = lab_of(model, x).sensitivity([{"3": np.array(pruned)} for pruned in cuts])
    wanted = [by_loops(model, x, {3: pruned}, "reconstruct") for pruned in cuts]
    assert found.tolist() == pytest.approx(wanted, rel=0.02)  # but for the regression's ridge
    assert min(wanted) > 1e-3


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize(("method", "close"), [("none", 1e-4), ("mean", 1e-4), ("linear", 0.02)])
@torch.no_grad()
def test_where_no_layer_behind_takes_back_it_is_what_the_cut_loses(
    method: Any, close: float, follow: bool
) -> None:
    model, x = chain(), images()
    cuts: list[dict[int, list[int]]] = [{3: [1]}, {3: [0, 5], 6: [2]}, {3: [4], 6: [1, 3]}, {}]
    ablation = lab_of(model, x, method, follow)
    found = ablation.sensitivity(
        [{str(consumer): np.array(pruned) for consumer, pruned in cut.items()} for cut in cuts]
    )
    wanted = [by_loops(model, x, cut, method, follow) for cut in cuts]
    assert found.tolist() == pytest.approx(wanted, rel=close, abs=1e-7)
    assert min(wanted[:3]) > 1e-3
    assert wanted[3] < 1e-7
    otherwise = by_loops(model, x, cuts[1], method, not follow)
    assert abs(wanted[1] / otherwise - 1) > 0.05


class Flat(nn.Module):
    """Its norm sees the positions of all images as rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.flat = nn.Conv2d(3, 8, 1), nn.BatchNorm1d(6)
        self.narrow, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def rows(self, x: Tensor) -> Tensor:
        return self.narrow(x).movedim(1, -1).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.flat(self.rows(torch.relu(self.wide(x)))).relu()
        out: Tensor = self.head(rows.unflatten(0, (len(x), -1)).mean(1))
        return out


@torch.no_grad()
def test_a_norm_that_sees_rows_follows_copy_by_copy() -> None:
    model, x = Flat().eval(), images()
    pruned = [0, 3, 5]
    (found,) = lab_of(model, x, "mean", follow=True).sensitivity([{"narrow": np.array(pruned)}])
    dense = torch.relu(model.wide(x))
    small = dense.clone()
    small[:, pruned] = dense[:, pruned].mean((0, 2, 3), keepdim=True)
    moved = following(model.flat, model.rows(small), model.rows(dense))
    y = model.head(moved(model.rows(small)).relu().unflatten(0, (len(x), -1)).mean(1))
    wanted = (y - model(x)).square().mean() / (model(x) - model(x).mean(0)).square().mean()
    assert found == pytest.approx(float(wanted), rel=1e-3)
    assert wanted > 1e-3


@pytest.mark.parametrize(
    ("method", "recalibrate"), [("none", False), ("mean", True), ("mean", False), ("none", True)]
)
def test_norms_follow_where_they_will(
    method: Any, recalibrate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    class Seen(BatchedAblation):
        def __post_init__(self) -> None:
            seen.append(self.follow)
            super().__post_init__()

    monkeypatch.setattr("ss_pruning.importance.sensitivity.BatchedAblation", Seen)
    x = images()
    report = prune_(
        chain(), x[:1], macs=0.6, compensation=COMPENSATIONS[method](recalibrate=recalibrate), calibration=x
    )
    assert seen == [recalibrate] == [report.settings["recalibrate"]]


Wired = tuple[Connectivity, Coupling, list[list[Floats]]]


def wired(model: nn.Module, x: Tensor) -> Wired:
    connectivity = trace(model, x[:1])
    coupling = couple(connectivity, model)
    return (
        connectivity,
        coupling,
        [[1.0 + np.arange(c.size) for c in group.subgroups] for group in coupling.groups],
    )


def halves(coupling: Coupling) -> Ints:
    return np.array([group.steps // 2 for group in coupling.groups])


def shrinkages_of(
    ablation: BatchedAblation,
    coupling: Coupling,
    scores: list[list[Floats]],
    shares: tuple[float, ...] = QUICK.widths,
) -> list[_Shrinkage]:
    pairs = zip(coupling.groups, scores, strict=True)
    return [_shrinkage(ablation, group, subgroups, 0.9, shares) for group, subgroups in pairs]


def silent(done: int) -> None:
    """Progress that nobody follows."""


@pytest.mark.parametrize("method", ["none", "mean", "linear"])
@torch.no_grad()
def test_behind_the_last_layer_but_one_the_closed_form_tells_the_output_error_of_all_widths(
    method: Method,
) -> None:
    """What a 1x1 convolution loses there is what the output loses, so one measured width is enough to know the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = images(32)
    _, coupling, scores = wired(model, x)
    ablation = lab_of(model, x, method)
    (shrinkage,) = shrinkages_of(ablation, coupling, scores)
    ((found,),) = _measured(ablation, [shrinkage], [0], silent)
    wanted = ablation.sensitivity([shrinkage.cut(steps) for steps in range(1, 8)])
    # Between the corners output error goes as the scores do.
    corners = _hull(np.arange(8), np.array([0.0, *wanted]))[1:]
    added = [found[:steps].sum() for steps, _ in corners]
    assert added == pytest.approx([lost for _, lost in corners], rel=0.05)
    assert len(corners) > 1
    assert wanted[0] > 1e-3


@pytest.mark.parametrize("method", ["none", "mean"])
@torch.no_grad()
def test_beside_other_cuts_it_is_what_a_cut_adds_to_them(method: Any) -> None:
    x, model = images(), chain()
    _, coupling, scores = wired(model, x)
    ablation = lab_of(model, x, method)
    shrinkages, steps = shrinkages_of(ablation, coupling, scores), [4, 3, 2]
    assert {path: pruned.tolist() for path, pruned in _joined(shrinkages, steps).items()} == {
        "3": [0, 1, 2, 3], "6": [0, 1, 2], "10": [0, 1]
    }  # fmt: skip
    beside, alone = (_measured(ablation, shrinkages, cut, silent) for cut in (steps, [0, 0, 0]))
    context = {3: [0, 1, 2, 3], 6: [0, 1, 2], 10: [0, 1]}
    wanted = []
    for number, shrinkage in zip(context, shrinkages, strict=True):
        others = {n: pruned for n, pruned in context.items() if n != number}
        base = by_loops(model, x, others, method)
        cuts = [{**others, number: list(range(width))} for width in shrinkage.widths]
        wanted.append(max(0.0, *(by_loops(model, x, cut, method) - base for cut in cuts)))

    def most(measured: list[list[Floats]]) -> list[float]:
        return [float(added[: s.most].sum()) for (added,), s in zip(measured, shrinkages, strict=True)]

    assert most(beside) == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert max(wanted) > 1e-3
    assert not np.allclose(most(beside), most(alone), rtol=0.01)


@pytest.mark.parametrize("method", ["none", "mean", "linear"])
@torch.no_grad()
def test_of_two_measurements_and_their_sum_the_one_whose_cut_loses_least_is_taken(method: Any) -> None:
    x = images(64)
    torch.manual_seed(6)
    layers = ((nn.Conv2d(3 if not i else 16, 16, 3, padding=1), norm(16), nn.ReLU()) for i in range(6))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    model = nn.Sequential(*(layer for block in layers for layer in block), *head).eval()
    connectivity, coupling, scores = wired(model, x)
    steps: list[tuple[int, int]] = []

    costs = Costs(TracedModel(model, x[:1], connectivity, coupling))
    config = Config(Budget("macs", 0.6), Allocation("global", cost_exponent=1.0))

    def taken(scores: list[list[Floats]]) -> Ints:
        return allot(coupling.groups, scores, costs, config)[1]

    def note(*step: int) -> None:
        steps.append((step[0], step[1]))

    with listening(note):
        chosen = by_sensitivity(
            TracedModel(model, x[:1], connectivity, coupling),
            scores,
            x,
            Shrinking(method=method, taken=taken),
        )
    told = [step for step in steps if step[1] != 1]  # those of the statistics, before, are nothing of one
    assert told[0] == (0, 2 * len(scores))
    assert told[-1] == (2 * len(scores), 2 * len(scores))
    assert sorted(told) == told
    assert not any(done for done, _ in steps[: len(steps) - len(told)])
    held, others = set_aside(x, THOROUGH.images)
    paths = [path for path, layer in connectivity.layers.items() if layer.kind == "synaptic"]
    statistics = measure(model, connectivity, others.split(BATCH), None, paths, covariance=True)
    ablation = BatchedAblation(model, connectivity, held, statistics, method)
    shrinkages = shrinkages_of(ablation, coupling, scores, THOROUGH.widths)
    alone = _measured(ablation, shrinkages, [0] * len(scores), silent)
    beside = _measured(ablation, shrinkages, taken(alone).tolist(), silent)
    both = [[c + d for c, d in zip(a, b, strict=True)] for a, b in zip(alone, beside, strict=True)]

    def loses(scores: list[list[Floats]]) -> float:
        return float(ablation.sensitivity([_joined(shrinkages, taken(scores).tolist())])[0])

    assert loses(chosen) == pytest.approx(min(map(loses, (alone, beside, both))), rel=1e-3)
    assert len({loses(found) for found in (alone, beside, both)}) > 1


@torch.no_grad()
def test_what_the_others_can_tell_costs_nothing() -> None:
    model = chain()
    for tensor in (model[0].weight, model[0].bias, *model[1].parameters(), *list(model[1].buffers())[:2]):
        tensor[7] = tensor[2]  # the same channel twice
    model[1].weight[4], model[1].bias[4] = 0.0, -1.0  # behind the ReLU always 0
    lost = lab_of(model, images()).sensitivity([{"3": np.array(pruned)} for pruned in ([7], [4], [2, 7])])
    assert lost[:2].max() < 1e-4 < 1e-3 < lost[2]


@torch.no_grad()
def test_what_the_layers_behind_make_up_for_costs_nothing() -> None:
    model = chain()
    model[3].weight[:, 6] = 0
    model[3].weight[2] = 0  # an output that reads channel 6 and nothing else,
    model[3].weight[2, 6, 1, 1] = 1
    model[6].weight[:, 2] = 0  # and that nothing reads
    assert lab_of(model, images()).sensitivity([{"3": np.array([6])}])[0] < 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.data())
def test_the_hull_is_below_all_points_and_bends_upwards(values: list[float], data: Any) -> None:
    steps = data.draw(st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)))
    x, y = np.cumsum([0, *steps]), np.array([0.0, *values])
    corners = _hull(x, y)
    ends, heights = (np.array(part) for part in zip(*corners, strict=True))
    assert (corners[0], corners[-1]) == ((0, 0.0), (x[-1], y[-1]))
    assert np.all(np.interp(x, ends, heights) <= y + 1e-12)
    slopes = np.diff(heights) / np.diff(ends)
    assert np.all(np.diff(slopes) >= -1e-12)


@given(
    st.lists(st.floats(0, 1e3), min_size=4, max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.booleans(),
)
def test_what_steps_add_grows_and_sums_to_the_output_error(
    scores: list[float], sensitivity: list[float], dead: bool
) -> None:
    ascending = np.sort(np.array(scores)) * (not dead)
    stops = np.unique(np.linspace(1, len(scores) - 1, len(sensitivity)).round().astype(np.int64))
    measured = np.array(sensitivity[: len(stops)])
    added = added_by(stops, measured, ascending)
    assert len(added) == len(scores)
    assert np.all(np.diff(added) > 0)
    assert added[: stops[-1]].sum() == pytest.approx(measured.max(), abs=1e-9)


def residual() -> nn.Module:
    """A stream, a depthwise and a grouped convolution, a concatenation, a norm over channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8))
            self.expand = nn.Sequential(nn.Conv2d(8, 16, 1), norm(16), nn.ReLU6())
            self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), norm(16), nn.ReLU6())
            self.project = nn.Sequential(nn.Conv2d(16, 8, 1), norm(8))
            self.grouped = nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.ReLU()
            )
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = x + self.project(self.deep(self.expand(x)))
            return self.head(torch.cat([x, self.grouped(x)], 1).mean((2, 3)))

    torch.manual_seed(1)
    return Net().eval()


def test_the_order_within_a_group_is_that_of_the_scores() -> None:
    model, x = residual(), images()
    connectivity = trace(model, x[:1])
    coupling = couple(connectivity, model)
    generator = np.random.default_rng(0)
    scores = [[generator.random(subgroup.size) for subgroup in group.subgroups] for group in coupling.groups]
    steps: list[tuple[int, int]] = []
    with listening(lambda *step: steps.append(step)):
        found = by_sensitivity(TracedModel(model, x[:1], connectivity, coupling), scores, x, Shrinking())
    told = [step for step in steps if step[1] != 1]  # those of the statistics, before, are nothing of one
    assert (told[0], told[-1]) == ((0, len(scores)), (len(scores), len(scores)))
    for group, measured in zip(scores, found, strict=True):
        ranks = zip(ranks_of(group), ranks_of(measured), strict=True)
        assert all(np.array_equal(a, b) for a, b in ranks)
        assert all((subgroup >= 0).all() and np.isfinite(subgroup).all() for subgroup in measured)


def test_scores_that_are_not_finite_stay() -> None:
    model, x = chain(), images()
    connectivity = trace(model, x[:1])
    coupling = couple(connectivity, model)
    scores = [[np.full(subgroup.size, np.inf) for subgroup in group.subgroups] for group in coupling.groups]
    found = by_sensitivity(TracedModel(model, x[:1], connectivity, coupling), scores, x, Shrinking())
    assert all(np.isinf(subgroup).all() for group in found for subgroup in group)


def test_the_model_is_left_as_it_was() -> None:
    model, x = residual().train(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    connectivity = trace(model, x[:1])
    coupling = couple(connectivity, model)
    scores = [
        [np.arange(subgroup.size, dtype=float) for subgroup in group.subgroups] for group in coupling.groups
    ]
    by_sensitivity(TracedModel(model, x[:1], connectivity, coupling), scores, x, Shrinking())
    by_sensitivity(
        TracedModel(model, x[:1], connectivity, coupling),
        scores,
        x,
        Shrinking(method="none", follow=True, taken=lambda _: halves(coupling)),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Blended(nn.Module):
    """Every image sees the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(x))
        y = y * torch.linspace(0, 1, len(y)).reshape(-1, 1, 1, 1)
        return self.head(y).mean((2, 3))


def test_images_that_depend_on_their_batch_are_refused() -> None:
    with pytest.raises(ModelError, match="others in its batch"):
        lab_of(Blended(), images(), "reconstruct")


@pytest.mark.parametrize(
    ("compensation", "weight"), [("none", 0.75), ("mean", 0.75), ("linear", 0.5), ("reconstruct", 0.5)]
)
def test_it_is_the_default_where_there_are_images(compensation: Any, weight: float) -> None:
    found = []
    for count in (LEAST_IMAGES - 1, LEAST_IMAGES):
        report = prune_(chain(), images(1), macs=0.7, compensation=compensation, calibration=images(count))
        found.append((report.settings["scope"], report.settings["cost_exponent"]))
    assert found == [("global", weight), ("sensitivity", 1.0)]


class Pair(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.body(x + y)
        return out


class Crowd(nn.Module):
    """What it says of an image depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out * torch.arange(1, 1 + len(out))[:, None]


def without_norms() -> nn.Module:
    return nn.Sequential(*[layer for layer in chain() if not isinstance(layer, nn.BatchNorm2d)])


def test_without_images_layers_compete_by_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ss_pruning.planning.ranking.by_sensitivity", None)
    for compensation in ("none", "mean"):
        report = prune_(chain(), images(1), macs=0.7, compensation=compensation)
        assert (report.settings["scope"], report.settings["cost_exponent"]) == ("global", 0.75)
        assert "of shrinking it" not in dict(certainty(report))["strengths"]
    with pytest.raises(InputError, match="or 'synthetic'"):
        prune_(chain(), images(1), macs=0.7, allocation="sensitivity")


def test_a_model_whose_images_see_each_other_is_told_why() -> None:
    report = prune_(Crowd(), images(1), macs=0.7, calibration=images())
    assert report.settings["scope"] == "global"
    assert "depends on the others in its batch" in (report.sensitivity_not_measured or "")


@pytest.mark.parametrize("count", [80, 70])
def test_what_sensitivity_is_told_has_not_seen_what_it_is_measured_on(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The covariance of what the last layer reads, from the images left over, by its definition."""
    model, x = chain(), images(count)
    traced, config = (
        TracedModel.of(model, images(1)),
        Config(Budget("macs", 0.7), Allocation(), Reconstruct()),
    )
    ranker = Ranker(traced, config, Costs(traced), Batch.of(x), Clock(lambda *_: None))
    told: list[Any] = []

    def listen(_: TracedModel, scores: Scores, on: Batch, __: Shrinking, known: Any) -> Scores:
        told.append(known)
        assert len(on) == count
        return scores

    monkeypatch.setattr("ss_pruning.planning.ranking.by_sensitivity", listen)
    ranker.ranked(traced.coupling)

    (known,) = told
    if count - 8 < 64:  # all are wanted for the scores
        assert known is None
        return
    chosen = torch.linspace(0, count - 1, 8).long()
    left = x[[n for n in range(count) if n not in chosen.tolist()]]
    with torch.no_grad():
        read = model[:-1](left).double().numpy()
    assert len(left) == count - 8
    assert known["10"].covariance.numpy() == pytest.approx(np.cov(read.T, bias=True), rel=1e-4, abs=1e-7)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def ranker_of(allocation: Allocation, budget: Budget | None = None) -> Ranker:
    traced = TracedModel.of(chain(), images(1))
    config = Config(budget or Budget("macs", 0.7), allocation, FoldMean())
    return Ranker(traced, config, Costs(traced), Batch.of(images()), Clock(lambda *_: None))


@pytest.mark.parametrize(
    ("allocation", "budget", "rivals"),
    [
        (Allocation(), None, 4 * 3),
        (Allocation("sensitivity"), None, 3 * 3),
        (Allocation(cost_exponent=0.3), None, 4),
        (Allocation("sensitivity", cost_exponent=0.3), None, 3),
        (Allocation(), Budget("ratio", 0.3), 4),
    ],
)
def test_what_competes(
    allocation: Allocation, budget: Budget | None, rivals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rival, allotted with the power in effect, is its scores, allotted with its own power."""
    ranker = ranker_of(allocation, budget)
    groups, seen = ranker.traced.coupling.groups, []

    def compete(traced: TracedModel, scores: Scores, on: Any, shrinking: Shrinking, *_: Any) -> Scores:
        measured: list[Scores] = [
            [[scale * np.arange(1.0, 1 + len(s)) for s in group] for group in scores] for scale in (1, 2, 3)
        ]
        seen.append((scores, measured, shrinking.rivals(measured), shrinking.taken))
        return measured[0]

    monkeypatch.setattr("ss_pruning.planning.ranking.by_sensitivity", compete)
    config = ranker.ranked(ranker.traced.coupling).config
    ((scores, measured, found, taken),) = seen
    assert len(found) == rivals
    own = measured if allocation.scope else [*measured, scores]
    powers = (1.0, 0.75, 0.5) if rivals > 4 else (config.allocation.cost_exponent,)
    for rival, (power, plain) in zip(found, itertools.product(powers, own), strict=True):
        alone = replace(config, allocation=replace(config.allocation, cost_exponent=power))
        assert taken(rival).tolist() == allot(groups, plain, ranker.costs, alone)[1].tolist()


def test_streams_compete_as_the_last_to_go() -> None:
    """Behind every other group, whatever costs are divided out, in the order that they had."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8), Residual(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    traced = TracedModel.of(model.eval(), torch.randn(1, 3, 8, 8))
    config = Config(Budget("macs", 0.7), Allocation(), FoldMean()).resolve(64)
    ranker = Ranker(
        traced, replace(config, allocation=Allocation()), Costs(traced), None, Clock(lambda *_: None)
    )
    groups = traced.coupling.groups
    stream = [len({m.path for m in group.subgroups[0].members if m.side == "out"}) == 3 for group in groups]
    assert stream.count(True) == 1
    assert len(groups) == 3
    scores = [[torch.rand(s.size).double().numpy() for s in group.subgroups] for group in groups]

    found = ranker._rivals([], scores, traced, config)

    assert len(found) == 2 * 3
    for rival in found[1::2]:
        (last,) = (group[0] for group, is_last in zip(rival, stream, strict=True) if is_last)
        others = [group[0] for group, is_last in zip(rival, stream, strict=True) if not is_last]
        assert last.min() > 1000 * max(other.max() for other in others)
    for rival in found:
        for before, after in zip(scores, rival, strict=True):
            assert np.argsort(before[0]).tolist() == np.argsort(after[0]).tolist()


def test_that_is_taken_whose_cut_loses_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rivals' cuts, each run by itself; more of them than run side by side."""
    monkeypatch.setattr("ss_pruning.importance.sensitivity._ROWS", 20)
    traced, x = TracedModel.of(chain(), images(1)), images()
    groups = traced.coupling.groups
    scores = [[np.arange(1.0, 1 + s.size) for s in group.subgroups] for group in groups]
    scales = torch.rand(5, len(groups), generator=torch.Generator().manual_seed(1)).tolist()
    rivals = [[[s * g for s in group] for g, group in zip(scale, scores, strict=True)] for scale in scales]

    def taken(of: Scores) -> Ints:
        """More of the group that counts for less."""
        levels = np.array([group[0][0] for group in of])
        most = np.array([group.steps - group.least for group in groups])
        found: Ints = np.minimum((most / (1 + levels)).astype(np.int64), most)
        return found

    found = by_sensitivity(traced, scores, x, Shrinking(0.9, "none", False, taken, lambda _: rivals))
    lost = []
    for rival in rivals:
        other = by_sensitivity(
            traced, scores, x, Shrinking(0.9, "none", False, taken, lambda _, r=rival: [r])
        )
        assert other is rival
        lost.append(_whole(traced, scores, x, taken(rival)))
    assert len(set(lost)) > 3
    assert found is rivals[int(np.argmin(lost))]


def _whole(traced: TracedModel, scores: Scores, x: Tensor, steps: Ints) -> float:
    """What a cut loses on the images that are measured on, with channels set to zero where they are read."""
    held, _ = set_aside(x, THOROUGH.images)
    model = copy.deepcopy(traced.model)
    for group, subgroups, count in zip(traced.coupling.groups, scores, steps.tolist(), strict=True):
        for key, channels in pruned_of(group, ranks_of(subgroups), count).items():
            path, side = key
            if side == "in" and traced.connectivity.layers[path].kind == "synaptic":
                with torch.no_grad():
                    model.get_submodule(path).weight[:, channels] = 0
    with torch.no_grad():
        dense, small = traced.model(held.inputs).double(), model(held.inputs).double()
    return float((small - dense).square().mean() / (dense - dense.mean(0)).square().mean())


def test_a_model_whose_channels_all_stay_is_told_why() -> None:
    with pytest.raises(NothingToPruneError, match="Excluded: "):
        prune_(chain(), images(1), macs=0.7, calibration=images(), ignore=[""])


def test_a_budget_out_of_reach_is_said_before_the_cut() -> None:
    model = chain()
    with pytest.raises(BudgetError, match="the smallest is"):
        prune_(model, images(1), macs=0.001, calibration=images())
    assert model[0].out_channels == 8


def test_what_is_asked_for_is_what_is_done() -> None:
    settings = prune_(
        chain(),
        images(1),
        macs=0.7,
        allocation=Allocation(scope="sensitivity", cost_exponent=0.3),
        calibration=images(),
    ).settings
    assert (settings["scope"], settings["cost_exponent"]) == ("sensitivity", 0.3)
    few = {
        "compensation": "reconstruct",
        "calibration": images(LEAST_IMAGES - 1),
        "allocation": "sensitivity",
    }
    with pytest.raises(InputError, match=f"{LEAST_IMAGES} calibration inputs"):
        prune_(chain(), images(1), macs=0.7, **few)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="or 'synthetic'"):
        prune_(chain(), images(1), macs=0.7, allocation="sensitivity")
    with pytest.raises(ModelError, match="depends on the others in its batch"):
        prune_(Crowd(), images(1), macs=0.7, allocation="sensitivity", calibration=images())


def test_the_order_of_the_default_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, str]] = []

    def watched(statistics: Any, **options: Any) -> Synaptic:
        seen.append((options["conditional"], options["score"]))
        return Synaptic(statistics, **options)

    monkeypatch.setattr("ss_pruning.planning.ranking.SynapticImportance", watched)
    for scope in ("sensitivity", "global"):
        given: dict[str, Any] = {"allocation": scope, "compensation": "reconstruct", "calibration": images()}
        prune_(chain(), images(1), macs=0.7, **given)
    prune_(chain(), images(1), macs=0.7, compensation="mean", calibration=images())
    assert seen == [(1.0, "share"), (0.5, "share"), (0, "relevance")]


def test_a_layer_that_hardly_matters_goes_before_one_that_does() -> None:
    """Two like branches, one of them next to silent at the end: only what is behind tells them apart."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = (
                nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 1)) for _ in range(2)
            )
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.loud(x) + 1e-3 * self.quiet(x)).mean((2, 3)))

    torch.manual_seed(2)
    model = Net()
    for a, b in zip(model.loud.parameters(), model.quiet.parameters(), strict=True):
        b.data.copy_(a.data)
    kept = {}
    for scope in ("global", "sensitivity"):
        torch.manual_seed(2)
        twin = Net()
        twin.load_state_dict(model.state_dict())
        given: dict[str, Any] = {
            "allocation": scope,
            "compensation": "reconstruct",
            "calibration": images(32),
        }
        prune_(twin, images(1), ratio=0.3, ignore=["loud.2", "quiet.2"], **given)
        kept[scope] = twin.loud[0].out_channels - twin.quiet[0].out_channels
    assert abs(kept["global"]) <= 1
    assert kept["sensitivity"] >= 5


class Twice(nn.Module):
    """One layer runs in front of the cut and again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.wide = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 9, 1)
        self.back, self.head = nn.Conv2d(9, 3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.back(torch.relu(self.wide(torch.relu(self.shared(x)))))
        return self.head(torch.relu(self.shared(y)).mean((2, 3)))


@pytest.mark.parametrize("make", [residual, Twice])
@pytest.mark.parametrize(
    ("method", "follow"), [("none", False), ("none", True), ("linear", True), ("reconstruct", False)]
)
def test_what_all_copies_share_is_run_once_and_changes_nothing(
    make: Any, method: Any, follow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model, x = make(), images()
    connectivity = trace(model, x[:1])
    coupling = couple(connectivity, model)
    scores = [
        [np.arange(subgroup.size, dtype=float) for subgroup in group.subgroups] for group in coupling.groups
    ]
    taken = None if method == "reconstruct" else lambda _: halves(coupling)
    once = by_sensitivity(
        TracedModel(model, x[:1], connectivity, coupling), scores, x, Shrinking(0.9, method, follow, taken)
    )
    assert sum(float(subgroup.sum()) for group in once for subgroup in group) > 1e-3
    monkeypatch.setattr(Prefix, "before", lambda *_: [])
    always = by_sensitivity(
        TracedModel(model, x[:1], connectivity, coupling), scores, x, Shrinking(0.9, method, follow, taken)
    )
    for a, b in zip(once, always, strict=True):
        assert all(np.allclose(c, d, rtol=1e-3, atol=1e-6) for c, d in zip(a, b, strict=True))


class Tokens(nn.Module):
    """A linear layer that runs on a table, not on images; the channels of the table stay."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table, self.embed = nn.Parameter(torch.randn(rows, 5)), nn.Linear(5, 6)
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(x)).mean((2, 3))
        return self.head(torch.relu(y + self.embed(self.table).mean(0)))


@pytest.mark.parametrize("rows", [7, 12])
def test_a_layer_that_does_not_see_images_is_left_alone(rows: int) -> None:
    torch.manual_seed(4)
    model = Tokens(rows)
    report = prune_(model, images(1), macs=0.7, compensation="linear", calibration=images())
    assert report.settings["scope"] == "sensitivity"
    assert model.body.out_channels == model.embed.out_features < 6


def test_a_batch_that_is_too_large_is_an_error_of_ours() -> None:
    class Small(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 40:
                raise RuntimeError("out of memory")
            out: Tensor = super().forward(x)
            return out

    model = Small(*chain())
    with pytest.raises(
        ModelError, match=r"copies of 20 calibration inputs.*out of memory.*allocation='global'"
    ):
        prune_(
            model,
            images(1),
            macs=0.7,
            compensation="linear",
            calibration=images(50),
            allocation="sensitivity",
        )
    assert model[0].out_channels == 8


@torch.no_grad()
def test_few_rows_do_not_explain_a_wide_layer() -> None:
    """A head reads one vector an image: with fewer images than channels, any of them could be fitted from the rest."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 256, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 40)
    )
    x = images(24)
    connectivity = trace(model, x[:1])
    coupling = couple(connectivity, model)
    ((found,),) = by_sensitivity(
        TracedModel(model, x[:1], connectivity, coupling), [[np.arange(256.0)]], x, Shrinking()
    )
    assert found[:230].sum() > 0.3


def test_what_is_measured_on_is_not_what_is_fitted_on() -> None:
    x = torch.arange(20.0)[:, None]
    held, others = set_aside(x, 16)
    assert sorted(torch.cat([held.inputs, others.inputs]).flatten().tolist()) == x.flatten().tolist()
    assert (len(held), len(others)) == (10, 10)
    assert [len(part) for part in set_aside(torch.zeros(100, 1), 16)] == [16, 84]


def test_a_covariance_that_rounding_left_indefinite_still_has_an_inverse() -> None:
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[0, 1] = covariance[1, 0] = 1.01
    assert precision(covariance, 1, 10**9).isfinite().all()
    with pytest.raises(ModelError, match="not finite"):
        precision(covariance * torch.nan, 1, 10**9)


@pytest.mark.parametrize(
    ("compensation", "times"), [("none", 2), ("mean", 2), ("linear", 2), ("reconstruct", 1)]
)
def test_it_is_measured_beside_other_cuts_where_no_layer_behind_takes_back(
    compensation: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[float, float]] = []
    monkeypatch.setattr("ss_pruning.importance.sensitivity.step", lambda *at: steps.append(at))
    prune_(chain(), images(1), macs=0.7, compensation=compensation, calibration=images())
    assert steps[-1] == (3 * times, 3 * times)  # three layers whose channels may go


READERS = {
    "1x1": lambda: nn.Conv2d(16, 12, 1),
    "two groups": lambda: nn.Conv2d(16, 12, 1, groups=2),
    "four groups": lambda: nn.Conv2d(16, 12, 3, groups=4),
    "eight groups": lambda: nn.Conv2d(16, 16, 1, groups=8),
    "padded": lambda: nn.Conv2d(16, 12, 3, padding=1),
    "padded groups": lambda: nn.Conv2d(16, 12, 3, padding=1, stride=2, groups=4),
    "behind a depthwise one": lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 12, 1)),
    "transposed": lambda: nn.ConvTranspose2d(16, 12, 3, stride=2),
    "transposed groups": lambda: nn.ConvTranspose2d(16, 12, 2, stride=2, groups=4),
}  # fmt: skip


@pytest.mark.parametrize("method", ["none", "mean", "linear"])
@pytest.mark.parametrize("consumer", READERS)
@torch.no_grad()
def test_predicted_output_error_is_the_measured_one(consumer: str, method: Any) -> None:
    """Measured, and then cut and compensated on the same images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), READERS[consumer](), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()  # fmt: skip
    mixed = torch.randn(16, 16) * torch.block_diag(*[torch.ones(4, 4)] * 4)  # neighbours tell of each other
    model[0].weight.copy_((mixed @ model[0].weight.flatten(1)).reshape_as(model[0].weight))
    x = images(24, 10)
    connectivity, coupling, _ = wired(model, x)
    group = next(group for group in coupling.groups if group.name == "0")
    scores = [np.random.default_rng(0).random(subgroup.size) for subgroup in group.subgroups]
    steps, ablation = group.steps // 2, lab_of(model, x, method)
    pruned = _shrinkage(ablation, group, scores, 0.9).cut(steps)
    assert sum(len(channels) for channels in pruned.values()) == 8
    predicted = ablation.sensitivity([pruned])[0]
    chosen = schedule([group], [scores], max_ratio=1.0)
    plan = to_plan(select(chosen, [group], np.array([steps]), coupling), coupling, connectivity)
    small = copy.deepcopy(model)
    traced = TracedModel(small, x[:1], connectivity, coupling)
    cut_(traced, plan, COMPENSATIONS[method](recalibrate=False), x)
    assert small[0].out_channels == 8
    dense = model(x)
    true = (small(x) - dense).square().mean() / (dense - dense.mean(0)).square().mean()
    assert predicted == pytest.approx(float(true), rel=1e-3)
    assert true > 1e-3


@torch.no_grad()
def test_in_groups_a_regression_takes_back_what_the_mean_leaves() -> None:
    """Each channel of the group has a double in it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for tensor in (model[0].weight, model[0].bias):
        tensor.copy_(tensor[::2].repeat_interleave(2, 0))
    x, found = images(24, 10), {}
    plan = Plan((Cut("0", "out", 16, tuple(range(0, 16, 2))), Cut("2", "in", 16, tuple(range(0, 16, 2)))))
    for method in ("mean", "linear"):
        small = copy.deepcopy(model)
        outcome = cut_(TracedModel.of(small, x), plan, COMPENSATIONS[method](recalibrate=False), x)[1]
        assert outcome.layers == ["2"]
        found[method] = float((small(x) - model(x)).square().mean() / model(x).var(0).mean())
    assert found["linear"] < 1e-4 < 1e-2 < found["mean"]


class Marked:
    """Scores by place; says of one layer's last channel that it stays."""

    def __init__(self, scale: float, mark: float | None, layer: str = "3") -> None:
        self.scale, self.mark, self.layer = scale, mark, layer

    def __call__(self, group: Any) -> Tensor:
        scores = self.scale * torch.linspace(1, 2, len(group[0].idxs))
        if self.mark is not None and group[0].dep.target.name == self.layer:
            scores[0] = self.mark
        return scores


@pytest.mark.parametrize("scope", ["sensitivity", "global", "local"])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_infinity_keeps_a_channel_and_changes_nothing_elsewhere(scope: Any, scale: float) -> None:
    """It is the weakest one otherwise: the first to go in each scope."""
    widths = []
    for mark in (None, torch.inf):
        model, x = chain(), images()
        prune_(model, x[:1], ratio=0.5, importance=Marked(scale, mark), calibration=x, allocation=scope)
        widths.append([m.out_channels for m in model if isinstance(m, nn.Conv2d)])
        stays = {cut.path: cut.kept for cut in model.ss_pruning_plan.cuts if cut.side == "out"}
        assert (0 in stays.get("3", range(6))) is (mark is not None)
    assert max(abs(a - b) for a, b in zip(*widths, strict=True)) <= 1


def test_a_layer_that_is_kept_whole_loses_nothing() -> None:
    class All(Marked):
        def __call__(self, group: Any) -> Tensor:
            scores = super().__call__(group)
            return torch.full_like(scores, torch.inf) if group[0].dep.target.name == "3" else scores

    for scope in ("sensitivity", "global", "local"):
        model, x = chain(), images()
        prune_(model, x[:1], ratio=0.3, importance=All(1.0, None), calibration=x, allocation=scope)  # type: ignore[arg-type]
        assert model[3].out_channels == 6
        assert model[0].out_channels + model[6].out_channels < 13


@pytest.mark.parametrize("mark", [-torch.inf, torch.nan])
def test_what_is_no_score_is_refused_by_the_layers_name(mark: float) -> None:
    model, x = chain(), images()
    with pytest.raises(InputError, match=r"Marked gave 6 scores \(1 of them NaN or -inf\).*'3'"):
        prune_(model, x[:1], ratio=0.3, importance=Marked(1.0, mark))


class Fixed(nn.Module):
    """Runs on some numbers of images only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in (1, 2, 8, 16):
            raise RuntimeError(f"{len(x)} images")
        out: Tensor = self.net(x)
        return out


def test_where_nobody_asked_and_it_cannot_be_measured_scores_compete_and_the_report_says_so() -> None:
    x = images()
    with pytest.raises(ModelError, match=r"40 images.*allocation='global'"):
        prune_(Fixed(), x[:1], macs=0.7, calibration=x, allocation="sensitivity")
    report = prune_(Fixed(), x[:1], macs=0.7, calibration=x)
    assert report.settings["scope"] == "global"
    assert report.settings["cost_exponent"] == 0.75
    assert report.sensitivity_not_measured is not None
    assert "40 images" in report.sensitivity_not_measured
    other = prune_(Fixed(), x[:1], macs=0.7, calibration=x, allocation="global")
    assert [row.outputs_after for row in report.layers] == [row.outputs_after for row in other.layers]
    assert other.sensitivity_not_measured is None


class Anchored(nn.Module):
    """Puts out a constant beside its answer, and hands one to a block."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first, self.rest = Block(), chain()[3:]
        self.register_buffer("table", torch.linspace(0, 1, length) / length)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rest(self.first(x, self.table)), self.table


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = chain()[:3]

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + table.sum()
        return out


@pytest.mark.parametrize("method", ["none", "reconstruct"])
@torch.no_grad()
def test_a_constant_is_no_batch_however_long_it_is(method: Any) -> None:
    x = images()
    cuts = [{"rest.3": np.array(pruned)} for pruned in ([0], [0, 1], [2, 3], [4, 5])]
    wanted = lab_of(Anchored(79).eval(), x, method).sensitivity(cuts)
    assert wanted.max() > 1e-3
    for length in (16, 32, 64, 80, 240, 960):
        found = lab_of(Anchored(length).eval(), x, method).sensitivity(cuts)
        np.testing.assert_allclose(found, wanted, rtol=0.02, atol=1e-7)


def test_statistics_that_the_importance_has_measured_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("ss_pruning.importance.sensitivity.measure", fail)
    x = images(100)  # a fifth is held out, and 8 are set aside
    report = prune_(chain(), x[:1], macs=0.7, compensation="reconstruct", calibration=x)
    assert report.settings["scope"] == "sensitivity"
    with pytest.raises(AssertionError, match="measured again"):  # few images say little of themselves
        prune_(chain(), x[:1], macs=0.7, compensation="reconstruct", calibration=x[:40])
