"""Compensation is applied where it helps, judged on inputs that it was not fitted on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import FoldMean, prune_
from ss_pruning.compensation import apply
from ss_pruning.compensation.fidelity import Reference, held_out
from ss_pruning.importance.calibration import Batch
from ss_pruning.report.notes import certainty
from ss_pruning.report.records import Report
from tests.support.zoo import two_normed_convolutions as net

X = torch.randn(60, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def pruned(compensation: Any, count: int = 60, **options: Any) -> tuple[nn.Module, Report]:
    model = net()
    options = {"calibration": X[:count], "allocation": "global", **options}
    return model, prune_(model, X[:1], macs=0.6, compensation=compensation, **options)


def test_the_report_says_what_is_kept_on_inputs_that_were_held_out() -> None:
    model, report = pruned("reconstruct")
    held, _ = held_out(Batch.of(X))
    found = report.fidelity
    assert found is not None
    again = Reference(net(), held).fidelity(model)  # laid out otherwise, and so rounded otherwise
    assert (found.error, found.agreement) == (pytest.approx(again.error, rel=1e-4), again.agreement)
    assert found.inputs == 12
    assert report.fidelity_uncompensated is not None
    assert found.error < report.fidelity_uncompensated.error
    assert Report.from_dict(report.to_dict()).fidelity == found
    assert "12 held-out inputs" in str(report)
    assert "of the cut alone" in dict(certainty(report))["fidelity"]


def test_nothing_held_out_is_fitted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = apply.prepared

    def noted(traced: Any, plan: Any, compensation: Any, images: Any) -> Any:
        seen.append(images.inputs if images is not None else torch.empty(0, 3, 9, 9))
        return real(traced, plan, compensation, images)

    monkeypatch.setattr(apply, "prepared", noted)
    pruned("linear")
    held, _ = held_out(Batch.of(X))
    fitted = {row.numpy().tobytes() for rows in seen for row in rows}
    assert len(fitted) == 48
    assert not fitted & {row.numpy().tobytes() for row in held.inputs}


def test_a_compensation_that_leads_away_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that adds noise to what it was given."""
    real = apply.prepared

    def spoiled(traced: Any, plan: Any, compensation: Any, images: Any) -> Any:
        made = real(traced, plan, compensation, images)
        if isinstance(compensation, FoldMean):
            with torch.no_grad():
                made.model[8].weight.add_(100 * torch.randn(made.model[8].weight.shape))
        return made

    plain, _ = pruned("none", allocation="global")
    monkeypatch.setattr(apply, "prepared", spoiled)
    model, report = pruned("mean")
    assert report.compensation_dropped
    assert report.fidelity == report.fidelity_uncompensated
    assert "which was left out" in report.verification()
    assert [m.weight.shape for m in model if hasattr(m, "weight")] == [
        m.weight.shape for m in plain if hasattr(m, "weight")
    ]
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize(("count", "held"), [(19, None), (20, 4)])
def test_of_few_inputs_none_is_held_out(count: int, held: int | None) -> None:
    _, report = pruned("mean", count)
    assert (None if report.fidelity is None else report.fidelity.inputs) == held


def test_without_inputs_there_is_nothing_to_say() -> None:
    _, report = pruned("mean", calibration=None)
    assert report.fidelity is None
    assert "fidelity" not in dict(certainty(report))


def test_what_cannot_be_compared_is_pruned_all_the_same() -> None:
    class Boxes(nn.Module):
        """As detectors do: so many numbers as the input asks for."""

        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [row[: 1 + int(row.abs().sum() * 10) % 3] for row in self.body(x)]

    report = prune_(Boxes(), X[:1], macs=0.8, compensation="mean", calibration=X, allocation="global")
    assert report.fidelity is None
