"""What a run is expected to take, against the passes that it makes, and what is given up to take less."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import Allocation, Report, prune_
from ss_pruning.errors import InputError, ModelError
from ss_pruning.planning import duration
from ss_pruning.profiling.rates import Rates
from ss_pruning.report.notes import certainty
from tests.support.zoo import randomise

#: A pass costs a second an input, all else nothing.
PASSES = Rates(1.0, 1.0, 0.0, 0.0, 0.0)
X = torch.randn(80, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return randomise(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), 0
    ).eval()


def counted(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Report, dict[str, float]]:
    """By stage, how many inputs ran through the whole dense model, in multiply-accumulates of its convolutions."""
    monkeypatch.setattr(Rates, "measured", lambda model, inputs: PASSES)
    stage, seen = [""], defaultdict[str, float](float)
    real = nn.Conv2d.forward

    def counting(self: nn.Conv2d, x: Tensor) -> Tensor:
        y = real(self, x)
        seen[stage[0]] += y.numel() * self.weight[0].numel()
        return y

    monkeypatch.setattr(nn.Conv2d, "forward", counting)
    net()(X[:1])
    one = seen.pop("")

    def told(name: str, done: int, total: int) -> None:
        stage[0] = name

    report = prune_(net(), X[:1], macs=0.5, progress=told, **options)
    return report, {name: count / one for name, count in seen.items()}


@pytest.mark.parametrize("compensation", ["none", "mean", "linear", "reconstruct"])
@pytest.mark.parametrize("scope", ["global", "sensitivity"])
def test_passes_are_counted_as_they_are_made(
    compensation: str, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, seen = counted(monkeypatch, compensation=compensation, allocation=scope, calibration=X)
    expected = report.seconds_expected
    for stage in ("score", "measure", "cut"):
        assert expected[stage] == pytest.approx(seen.get(stage, 0.0), rel=0.4, abs=8), stage
    assert sum(expected.values()) == pytest.approx(sum(seen.values()), rel=0.3)


def test_time_that_is_enough_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"compensation": "reconstruct", "calibration": X}
    free, _ = counted(monkeypatch, **options)
    bound, _ = counted(monkeypatch, allocation=Allocation(budget_time=1e6), **options)
    assert bound.traded_for_time == []
    assert bound.layers == free.layers


def test_sensitivity_is_traded_first_then_inputs_then_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    free, _ = counted(monkeypatch, compensation="linear", calibration=X)
    whole = sum(free.seconds_expected.values())
    totals, traded = [], []
    for share in (1.01, 0.7, 0.4, 0.25, 0.1, 0.01):
        seconds = share * whole
        allocation = Allocation(budget_time=seconds)
        report, _ = counted(monkeypatch, compensation="linear", calibration=X, allocation=allocation)
        total = sum(report.seconds_expected.values())
        assert total <= seconds or "no more could be given up" in report.traded_for_time[-1]
        totals.append(total)
        traded.append(report.traded_for_time)
    assert totals == sorted(totals, reverse=True)
    assert traded[0] == []
    assert "sensitivity was measured on" in traded[1][0]
    assert any("of 80 calibration inputs" in text for text in traded[-1])
    assert traded[-1][0] == "sensitivity was not measured"


def test_sensitivity_that_was_asked_for_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    allocation = Allocation("sensitivity", budget_time=1)
    report, seen = counted(monkeypatch, compensation="linear", calibration=X, allocation=allocation)
    assert seen["measure"] > 0
    assert report.traded_for_time[0] == "sensitivity was measured on 8 inputs at one width"
    assert "no more could be given up" in dict(certainty(report))["time"]


def test_the_inputs_that_are_left_are_spread_over_all() -> None:
    from ss_pruning.importance.calibration import Batch

    work = duration.Work(None, 4, None, {})  # type: ignore[arg-type]
    batch = Batch.of(torch.arange(12.0)[:, None]).limited(2, None)
    found = work.of(batch)
    assert found is not None
    assert found.inputs.flatten().tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("seconds", [0, -1, True, "5m"])
def test_other_times_are_refused(seconds: Any) -> None:
    with pytest.raises(InputError, match="positive number of seconds"):
        Allocation(budget_time=seconds)


def test_rates_are_those_of_this_machine() -> None:
    from ss_pruning.importance.calibration import Batch

    slow = Rates.measured(nn.Conv2d(3, 256, 7), Batch.of(torch.randn(32, 3, 64, 64)))
    fast = Rates.measured(nn.Conv2d(3, 4, 3), Batch.of(torch.randn(32, 3, 64, 64)))
    assert slow.one > 3 * fast.one
    assert all(0 < rate < 1e-3 for rate in (fast.product, fast.solve, fast.number))


def test_inputs_that_the_model_does_not_run_on_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with pytest.raises(ModelError, match="does not run on the calibration inputs"):
        prune_(
            model,
            torch.zeros(1, 3, 8, 8),
            ratio=0.5,
            compensation="linear",
            calibration=torch.randn(24, 3, 9, 9),
        )
