"""Timing, the table of layer times, and latency as a budget: exact where a fake clock can make it so."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning import prune_
from ss_pruning.config import Allocation, Budget
from ss_pruning.errors import BudgetError, InputError, ModelError
from ss_pruning.graph import TracedModel, couple, trace
from ss_pruning.planning import latency_target as hastening
from ss_pruning.planning.costs import Costs
from ss_pruning.profiling import latency, layer_latency
from ss_pruning.profiling.latency import Timing, as_reported, measure_latency, peak_memory, race
from ss_pruning.profiling.layer_latency import GRID, ROUNDINGS, LatencyTable, LayerLatency
from ss_pruning.surgery.size_attributes import Verified
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, randomise

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


class Net(nn.Module):
    """Two wide inner layers: the first is said to be slow, the second quick."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.slow, self.back = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.quick, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(torch.relu(self.slow(x)))
        y: Tensor = self.out(torch.relu(self.quick(x)))
        return y


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Clock:
    """Stands in for the time: each call of `perf_counter` gives the next of the readings."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(latency, "time", fake)
    return fake


# ---------------------------------------------------------------- timing


def test_timing_reads_the_middle() -> None:
    timing, other = Timing((1.0, 2.0, 3.0, 4.0, 100.0)), Timing((2.0, 4.0, 6.0, 8.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == (2.0, 4.0)
    assert (
        timing.over(other) == 0.5
    )  # by round: neither 3 / 6 of the medians nor the mean, by chance the same here
    assert Timing((1.0, 10.0, 2.0)).over(Timing((2.0, 10.0, 8.0))) == 0.5
    # the shares are 1/2, 10/10 and 2/8
    assert Timing((1.0, 10.0, 2.0)).spread_over(Timing((2.0, 10.0, 8.0))) == (0.375, 0.75)


def test_rounds_are_in_turns_and_change_direction(clock: Clock) -> None:
    seen: list[str] = []

    def run(name: str, takes: float) -> Any:
        def go() -> None:
            seen.append(name)
            clock.now += takes

        return go

    a, b = race([run("a", 1.0), run("b", 0.5)], CPU, rounds=(3, 3))
    assert "".join(seen) == "aaabbb" + "ab" + "ba" + "ab"  # warm-up, then three rounds
    assert a.seconds == (1.0,) * 3
    assert b.over(a) == 0.5


def test_short_runs_are_timed_together(clock: Clock) -> None:
    calls = 0

    def go() -> None:
        nonlocal calls
        calls += 1
        clock.now += 1e-5

    (timing,) = race([go], CPU, rounds=(2, 2))
    assert calls == 3 + 2 * 200  # 2 ms of 10 us each
    assert timing.median == pytest.approx(1e-5)


def test_noise_asks_for_more_rounds(clock: Clock) -> None:
    takes = iter([1.0] * 6 + [1.0, 1.0, 1.0, 2.0, 1.0, 3.0] + [1.0, 1.0] * 100)

    def go() -> None:
        clock.now += next(takes)

    (noisy, _) = race([go, go], CPU, rounds=(3, 20))
    assert 3 < len(noisy.seconds) < 20


def test_a_slow_model_stops_at_the_time_limit(clock: Clock) -> None:
    chance = np.random.default_rng(0)

    def go() -> None:
        clock.now += chance.uniform(1.0, 9.0)

    (timing,) = race([go], CPU, rounds=(3, 1000), seconds=100.0)
    assert 3 < len(timing.seconds) < 110


def test_measuring_leaves_no_trace_also_on_errors() -> None:
    model = Net().train()
    before = snapshot(model)
    measure_latency([model, model], X, rounds=(2, 3))
    with pytest.raises(ModelError, match="does not run on the inputs"):
        measure_latency([model], torch.zeros(1, 4, 8, 8))
    assert snapshot(model) == before
    with pytest.raises(InputError, match="as a list, one at least"):
        measure_latency([], X)


@pytest.mark.parametrize("models", [nn.Sequential(nn.Linear(3, 2)), [5], [nn.Linear]])
def test_what_is_no_list_of_models_is_not_measured(models: Any) -> None:
    """Of a Sequential that stands alone, layers would be timed one by one."""
    with pytest.raises(InputError, match="as a list, one at least"):
        measure_latency(models, torch.zeros(1, 3))


def test_more_work_takes_longer() -> None:
    small, large = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 512, 3)
    a, b = measure_latency([small, large], torch.zeros(2, 3, 64, 64), rounds=(5, 9))
    assert a.over(b) < 0.8


@pytest.mark.parametrize("inputs", [(X,), {"x": X}])
def test_inputs_of_any_form(inputs: Any) -> None:
    (timing,) = measure_latency([Net()], inputs, rounds=(2, 3))
    assert timing.median > 0


def test_peak_memory_is_what_is_alive_at_once() -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a = x + 1  # alive: a
            b = a + 1  # a, b
            del a
            c = b.view(-1) + 1  # b (and its view), c
            del b
            d: Tensor = torch.cat([c, c])  # c, d: three times x
            return d

    x = torch.zeros(1000)
    assert peak_memory(Chain(), x) == 4000 * (1 + 3)
    conv = nn.Conv2d(3, 8, 1, bias=False)
    image = torch.zeros(1, 3, 10, 10)
    assert peak_memory(conv, image) == 4 * (24 + 300 + 800)


# ---------------------------------------------------------------- the table of layer times


def test_the_table_is_bilinear_between_its_points() -> None:
    grid = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [4.0, 8.0, 12.0]])
    time = LayerLatency(grid, {})
    for i, a in enumerate(GRID):
        for j, b in enumerate(GRID):
            assert time.at(a, b) == grid[i, j]
    assert time.at(0.75, 1.0) == pytest.approx((6.0 + 12.0) / 2)
    assert time.at(0.75, 0.75) == pytest.approx((4.0 + 6.0 + 8.0 + 12.0) / 4)
    assert time.at(0.01, 0.01) == 1.0  # below what was measured nothing more is promised


@pytest.mark.parametrize("step", [1, 4, 16])
def test_roundings_are_the_steps_of_the_hardware(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(self: Any, inputs: int, outputs: int) -> float:
        wide = [-(-n // step) * step if n > 3 else n for n in (inputs, outputs)]
        return 1e-6 * wide[0] * wide[1]

    monkeypatch.setattr(layer_latency._Lone, "_seconds", seconds)
    model = Net(128)
    connectivity = trace(model, X)
    groups = couple(connectivity, model).groups
    times = layer_latency.latency_table(model, X, connectivity)
    found = {group.name: times.rounding(group) for group in groups}
    assert (found["slow"], found["quick"]) == (step, step)


def test_noise_alone_asks_for_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)

    def seconds(self: Any, inputs: int, outputs: int) -> float:
        return float(1e-6 * inputs * outputs * chance.uniform(0.995, 1.005))

    monkeypatch.setattr(layer_latency._Lone, "_seconds", seconds)
    model = Net(128)
    connectivity = trace(model, X)
    times = layer_latency.latency_table(model, X, connectivity)
    assert {times.rounding(group) for group in couple(connectivity, model).groups} == {1}


def test_the_table_is_measured_once(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    calls = 0

    def seconds(self: Any, inputs: int, outputs: int) -> float:
        nonlocal calls
        calls += 1
        return 1e-6 * inputs * outputs

    monkeypatch.setattr(layer_latency._Lone, "_seconds", seconds)
    model = Net()
    connectivity = trace(model, X)
    before = snapshot(model)
    first = layer_latency.latency_table(model, X, connectivity)
    assert snapshot(model) == before
    measured, share = calls, dict.fromkeys(couple(connectivity, model).widths, 0.7)
    assert (
        len(list(own_cache.glob("layer-*.safetensors"))) == 2
    )  # slow and quick are alike, and so are the others
    again = layer_latency.latency_table(model, X, connectivity)
    assert calls == measured
    assert again.total(share) == first.total(share)
    for path in own_cache.glob("layer-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])  # damaged: measured anew
    assert layer_latency.latency_table(model, X, connectivity).total(share) == first.total(share)
    assert calls == 2 * measured
    layer_latency.latency_table(model, X[:1], connectivity)  # another batch size is another cost
    assert calls == 3 * measured


@pytest.mark.parametrize("name", ["residual_chain", "grouped", "transposed"])
def test_every_layer_of_the_zoo_gets_its_times(name: str) -> None:
    net = BY_NAME[name]
    model = net.make().eval()
    connectivity = trace(model, net.example)
    times = layer_latency.latency_table(model, net.example, connectivity)
    widths = couple(connectivity, model).widths
    whole = times.total(dict.fromkeys(widths, 1.0))
    assert set(times.layers) == set(connectivity.layers)
    assert whole == pytest.approx(sum(time.at(1, 1) for time, _, _ in times.layers.values()))
    assert all(np.isfinite(time.grid).all() and (time.grid > 0).all() for time, _, _ in times.layers.values())
    assert all(slope >= 0 for slope in times.slope(dict.fromkeys(widths, 1.0)).values())


# ---------------------------------------------------------------- budgets in seconds


def table(model: nn.Module, **seconds: float) -> LatencyTable:
    """Times proportional to both widths, and such for a whole layer."""
    grid = np.outer(GRID, GRID)
    return LatencyTable(
        {
            path: (LayerLatency(grid * value, {}), (path, "in"), (path, "out"))
            for path, value in seconds.items()
        }
    )


def test_seconds_cost_like_macs_where_they_are_proportional() -> None:
    """The table against the formula: with times that are MACs, all costs agree."""
    model = Net()
    connectivity = trace(model, X)
    coupling = couple(connectivity, model)
    costs = Costs(TracedModel(model, X, connectivity, coupling))
    amounts = {"slow": 1.0, "back": 1.0, "quick": 1.0, "out": 1.0}
    costs.times = table(model, **amounts)
    groups = [group for group in coupling.groups if group.name in ("slow", "quick")]
    removed = costs.removed_per_step(groups).T @ np.array([8.0, 24.0])
    assert costs.after("latency", removed) / costs.dense("latency") == pytest.approx(
        costs.after("macs", removed) / costs.macs, rel=0.02
    )
    for kind in ("macs", "latency"):
        each = costs.per_channel_set(groups, kind)  # type: ignore[arg-type]
        assert each == pytest.approx([2 * 0.25 / 64] * 2, rel=0.01)


def measured_by(times: LatencyTable, model: nn.Module, offset: float = 0.0) -> hastening.Measure:
    """A clock that reads a table of its own, and a part that no pruning can spare."""

    def measure(plan: Any) -> tuple[Timing, Timing]:
        share: dict[Any, float] = dict.fromkeys(((p, s) for p in times.layers for s in ("in", "out")), 1.0)
        share |= {(cut.path, cut.side): len(cut.kept) / cut.width for cut in plan.cuts}
        whole = times.total(dict.fromkeys(share, 1.0))
        return Timing((whole + offset,)), Timing((times.total(share) + offset,))

    return measure


@pytest.mark.parametrize("target", [0.4, 0.6, 0.85])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_clock_has_the_last_word(target: float, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is wrong on purpose, by layer and by what it leaves out: the target is met nevertheless."""
    model = randomise(Net(), 0)
    guess, truth = (
        table(model, slow=1, back=1, quick=1, out=1),
        table(model, slow=2, back=1, quick=0.3, out=0.3),
    )
    monkeypatch.setattr("ss_pruning.pruning.latency_table", lambda *_: guess)
    monkeypatch.setattr("ss_pruning.pruning.stopwatch", lambda *_: measured_by(truth, model, offset))
    report = prune_(model, X, latency=target)
    assert report.latency_ratio == pytest.approx(target, rel=hastening.TOLERANCE)
    assert report.settings["latency"] == target
    assert "latency" in [row[0] for row in report.headline()]


def test_seconds_decide_what_goes_where_importance_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    with torch.no_grad():  # both branches are equally important
        model.quick.load_state_dict(model.slow.state_dict())
        model.out.load_state_dict(model.back.state_dict())
    truth = table(model, slow=10, back=10, quick=1, out=1)
    monkeypatch.setattr("ss_pruning.pruning.latency_table", lambda *_: truth)
    monkeypatch.setattr("ss_pruning.pruning.stopwatch", lambda *_: measured_by(truth, model))
    prune_(model, X, latency=0.6, importance=Even(), allocation=Allocation(cost_exponent=1.0))
    assert model.slow.out_channels < model.quick.out_channels


class Even:
    """Channels of all layers are worth the same, the later ones a little more."""

    def __call__(self, group: Any) -> Tensor:
        return torch.linspace(1.0, 2.0, len(group[0].idxs))


def test_a_target_out_of_reach_names_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Net(), 0)
    before, truth = snapshot(model), table(model, slow=1, back=1, quick=1, out=1)
    monkeypatch.setattr("ss_pruning.pruning.latency_table", lambda *_: truth)
    monkeypatch.setattr("ss_pruning.pruning.stopwatch", lambda *_: measured_by(truth, model, offset=4.0))
    with pytest.raises(
        BudgetError, match=r"the fastest plan took 0\.5\d\d of .*, so latency=0\.\d\d can be had"
    ) as told:
        prune_(model, X, latency=0.5)
    took, low, high, offered = map(float, re.findall(r"0\.5\d+", str(told.value)))
    assert low == high == pytest.approx(took, abs=0.006)  # each turn takes the same time here
    assert took <= offered <= took + 0.01
    assert snapshot(model) == before


def test_a_coarse_net_comes_as_close_as_it_can_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Net(8), 0)
    truth = table(model, slow=1, back=1, quick=1, out=1)
    monkeypatch.setattr("ss_pruning.pruning.latency_table", lambda *_: truth)
    monkeypatch.setattr("ss_pruning.pruning.stopwatch", lambda *_: measured_by(truth, model))
    report = prune_(model, X, latency=0.9, allocation=Allocation(round_to=4))
    assert report.latency_ratio == pytest.approx(0.75, abs=0.01)


@pytest.mark.slow
def test_really_measured_latency_prunes_a_real_net() -> None:
    """No fake: the table, the clock and the cut of a net wide enough that time follows width."""
    model = randomise(Net(256), 0).eval()
    images = torch.randn(4, 3, 32, 32)
    dense = copy.deepcopy(model)
    report = prune_(model, X[:1], latency=0.6, allocation=Allocation(latency_inputs=images))
    a, b = measure_latency([dense, model], images)
    assert report.latency_ratio == pytest.approx(0.6, rel=0.15)
    low, high = report.latency_spread
    assert low <= report.latency_ratio <= high
    assert 0.4 < b.over(a) < 0.8  # loose: whoever else uses the processor is in it


@pytest.mark.parametrize("round_to", ["8", 0, -1, 2.5, "auto"])
def test_other_roundings_are_refused(round_to: Any) -> None:
    with pytest.raises(InputError, match="must be a positive whole number, such as 8, or 'measured'"):
        prune_(Net(), X, macs=0.5, allocation=Allocation(round_to=round_to))


def test_measured_rounding_without_a_latency_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ss_pruning.pruning.latency_table", lambda *_: LatencyTable({}))
    monkeypatch.setattr(LatencyTable, "rounding", lambda _, group: {"slow": 16}.get(group.name, 1))
    model = randomise(Net(), 0)
    report = prune_(model, X, macs=0.55, allocation=Allocation(round_to="measured"))
    assert model.slow.out_channels % 16 == 0
    assert report.latency_after is None
    assert report.settings["round_to"] == "measured"


# ---------------------------------------------------------------- bench


def test_three_numbers_of_a_latency_are_one_statistic() -> None:
    """Medians of their own would say 0.3 of 0.3, and a share of 0.9."""
    dense, pruned = Timing((0.2, 0.4, 0.3)), Timing((0.3, 0.36, 0.2))
    report = as_reported(dense, pruned)
    assert report["latency_before"] == pytest.approx(0.3)
    assert report["latency_ratio"] == pytest.approx(0.9)
    assert report["latency_after"] == pytest.approx(0.27)
    chance = np.random.default_rng(0)
    for _ in range(50):  # whatever the noise, and whichever statistic is asked
        load = chance.uniform(1, 5, 9)
        a, b = (Timing(tuple(t * load * chance.uniform(0.9, 1.1, 9))) for t in (1.0, 0.7))
        level = b.levelled(a)
        assert level.median == pytest.approx(a.median * b.over(a))
        assert level.spread == pytest.approx([a.median * share for share in b.spread_over(a)])
        assert level.over(Timing((a.median,) * 9)) == pytest.approx(b.over(a))


def test_public_names() -> None:
    assert ss_pruning.measure_latency is measure_latency
    assert ROUNDINGS[0] == 1


def test_the_search_goes_on_where_a_plan_comes_back() -> None:
    """Steps are coarse: 1 % too slow down to a budget of 0.35, right down to 0.3, far too fast below."""

    def find(budget: Budget) -> Any:
        goal = budget.value
        plan: Any = "slow" if goal > 0.35 else "right" if goal > 0.3 else "fast"
        return SimpleNamespace(verified=Verified(plan, 0.0))

    seconds = {"slow": 0.635, "right": 0.6, "fast": 0.1}
    measured: list[str] = []

    def measure(plan: Any) -> tuple[Timing, Timing]:
        measured.append(plan)
        return Timing((1.0,)), Timing((seconds[plan],))

    found = hastening.find_latency_plan(find, 0.6, measure)
    assert found.ratio == 0.6
    assert sorted(measured) == ["fast", "right", "slow"]  # each plan is measured once
