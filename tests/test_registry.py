"""Importances and compensations that users add by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning import config, register_compensation, register_importance
from ss_pruning.compensation import apply
from ss_pruning.compensation.folding import Outcome
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.groups import Subgroup
from ss_pruning.importance import scoring
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME

NET = BY_NAME["plain"]


@pytest.fixture(autouse=True)
def _same_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_IMPORTANCES", dict(scoring._IMPORTANCES))
    monkeypatch.setattr(apply, "_COMPENSATIONS", dict(apply._COMPENSATIONS))
    kinds = dict(config.COMPENSATIONS)
    for module in (config, apply):
        monkeypatch.setattr(module, "COMPENSATIONS", kinds)


def kept_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {cut.path: cut.kept for cut in model.ss_pruning_plan.cuts if cut.side == "out"}


def test_an_importance_is_found_by_name() -> None:
    @register_importance("last")
    class Last:
        """Later channels count more."""

        def scorer(self, model: nn.Module, connectivity: Any, inputs: Any) -> Callable[[Subgroup], Tensor]:
            return lambda subgroup: torch.from_numpy(subgroup.root.index[:, 0]).float()

    model = NET.make()
    report = ss_pruning.prune_(model, NET.example, ratio=0.5, importance="last", allocation="local")
    assert report.settings["importance"] == "Last"
    assert kept_of(model)
    for path, kept in kept_of(model).items():
        width = next(layer.outputs_before for layer in report.layers if layer.path == path)
        assert kept == tuple(range(width - len(kept), width))


@pytest.mark.parametrize("name", ["magnitude", "magnitude-l1", "bn-scale", "lamp", "fpgm", "random"])
def test_the_names_of_the_package_go_through_the_same_table(name: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    made = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "magnitude-l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "bn-scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
        "random": tp.importance.RandomImportance,
    }[name]()
    plans = []
    for importance in (name, made):
        model = NET.make()
        torch.manual_seed(0)
        ss_pruning.prune_(model, NET.example, ratio=0.5, importance=importance)
        plans.append(model.ss_pruning_plan)
    assert plans[0] == plans[1]


def test_synaptic_by_name_is_the_default() -> None:
    named, default = NET.make(), NET.make()
    ss_pruning.prune_(named, NET.example, ratio=0.5, importance="synaptic")
    ss_pruning.prune_(default, NET.example, ratio=0.5)
    assert named.ss_pruning_plan == default.ss_pruning_plan


def test_an_unknown_importance_is_refused_with_the_names() -> None:
    model = NET.make()
    before = snapshot(model)
    with pytest.raises(InputError, match=r"importance='best' is unknown; use .*'synaptic'.*'lamp'"):
        ss_pruning.prune_(model, NET.example, ratio=0.5, importance="best")
    assert snapshot(model) == before


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("answers", [True, False])
def test_a_compensation_is_found_by_name(answers: bool) -> None:
    seen: list[Any] = []

    @register_compensation("double", recalibrate=False)
    def double(pruned: nn.Module, traced: Any, plan: Any, images: Any) -> Outcome | None:
        seen.append((traced.model, plan, images))
        with torch.no_grad():
            for parameter in parameters(pruned):
                parameter.mul_(2)
        return Outcome(skipped={"fc": "for a test"}) if answers else None

    plain, model = NET.make(), NET.make()
    ss_pruning.prune_(plain, NET.example, ratio=0.5, compensation="none", allocation="global")
    report = ss_pruning.prune_(model, NET.example, ratio=0.5, compensation="double", allocation="global")
    assert report.settings["compensation"] == "double"
    assert report.not_compensated == ({"fc": "for a test"} if answers else {})
    assert seen[0][0] is model
    assert seen[0][1].cuts == model.ss_pruning_plan.cuts
    assert seen[0][2] is None
    for ours, theirs in zip(parameters(model), parameters(plain), strict=True):
        assert torch.equal(ours, 2 * theirs)


def test_one_that_needs_calibration_gets_it() -> None:
    seen: list[Tensor] = []

    @register_compensation("looks", needs_calibration=True)
    def looks(pruned: nn.Module, traced: Any, plan: Any, images: Any) -> None:
        seen.append(images.inputs)

    with pytest.raises(InputError, match="compensation='looks' needs calibration="):
        ss_pruning.prune_(NET.make(), NET.example, ratio=0.5, compensation="looks")
    images = torch.randn(16, *NET.example.shape[1:])
    ss_pruning.prune_(NET.make(), NET.example, ratio=0.5, compensation="looks", calibration=images)
    assert torch.equal(seen[0], images)


def test_one_that_fails_leaves_the_model_as_it_was() -> None:
    @register_compensation("fails")
    def fails(pruned: nn.Module, traced: Any, plan: Any, images: Any) -> None:
        with torch.no_grad():
            next(parameters(pruned)).zero_()
        raise ValueError("for a test")

    model = NET.make()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"failed, the model is as it was \(ValueError: for a test"):
        ss_pruning.prune_(model, NET.example, ratio=0.5, compensation="fails")
    assert snapshot(model) == before
