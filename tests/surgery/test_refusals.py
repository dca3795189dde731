"""What is refused, excluded or passed over: with a reason that says what to do, and the model as it was."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masks

from ss_pruning import FoldLinear, Plan, Reconstruct, prune_
from ss_pruning.compensation import apply
from ss_pruning.compensation.apply import cut_
from ss_pruning.compensation.folding import IDLE, NO_WEIGHTED_SUM
from ss_pruning.config import Method
from ss_pruning.errors import InputError, ModelError, NothingToPruneError, PlanError, VerificationError
from ss_pruning.graph import TracedModel, couple, trace
from ss_pruning.graph.layers import is_linear_in_weight
from ss_pruning.planning.allocation import to_plan
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.equivalence.agreement import compare
from ss_pruning.surgery.factors import Factor
from ss_pruning.surgery.plan import Attribute
from ss_pruning.surgery.verification import Verifier
from tests.support.chain import Chain, chain
from tests.support.snapshot import snapshot
from tests.support.zoo import Unused, randomise

X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def without(model: nn.Module, count: int) -> tuple[Plan, dict[tuple[str, str], tuple[int, ...]]]:
    """A plan that cuts the last outputs of conv1, and what it selects."""
    connectivity = trace(model, X)
    kept = tuple(range(8 - count))
    selection = {("conv1", "out"): kept, ("bn1", "through"): kept, ("conv2", "in"): kept}
    return to_plan(selection, couple(connectivity, model), connectivity), selection  # type: ignore[arg-type]


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "some"}, "allocation='some' is unknown; use 'global', 'local', 'sensitivity'"),
        ({"ignore": ["nowhere"]}, "nowhere"),
        ({"ignore": [nn.Conv2d(1, 1, 1)]}, "ignore"),
        ({"compensation": "magic"}, "magic"),
        ({"compensation": "linear"}, "calibration"),
    ],
    ids=str,
)
def test_silly_options_are_refused_before_anything_happens(options: dict[str, object], message: str) -> None:
    model = chain()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        prune_(model, X, macs=0.5, **options)  # type: ignore[arg-type]
    assert snapshot(model) == before


def test_calibration_images_that_the_model_does_not_take_leave_it_alone() -> None:
    model, wrong = chain(), torch.randn(8, 5, 10, 10)
    before = snapshot(model)
    with pytest.raises(ModelError, match="does not run on the calibration inputs"):
        prune_(model, X, macs=0.5, compensation="reconstruct", calibration=wrong)
    assert snapshot(model) == before


def test_a_compensation_that_stumbles_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object) -> None:
        raise ZeroDivisionError("out of luck")

    model = chain()
    plan, _ = without(model, 3)
    traced, before = TracedModel.of(model, X), snapshot(model)
    monkeypatch.setitem(apply._COMPENSATIONS, "linear", stumble)
    with pytest.raises(ModelError, match=r"the model is as it was \(ZeroDivisionError: out of luck\)"):
        cut_(traced, plan, FoldLinear(recalibrate=False), X)
    assert snapshot(model) == before


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "plan 99"}, "format 'plan 99' is unknown here"),
        ({"cuts": 1}, "no pruning plan|not a pruning plan"),
        (
            {"cuts": [{"path": "a", "side": "in", "width": math.inf, "kept": [0], "axis": 0}]},
            "not a pruning plan",
        ),
        ({"cuts": [{"path": "a", "side": "up", "width": 4, "kept": [0], "axis": 0}]}, "unknown side 'up'"),
        *[
            (
                {"cuts": [{"path": "a", "side": "in", "width": 4, "kept": kept, "axis": 0}]},
                "not distinct numbers below 4",
            )
            for kept in ([], [1, 1], [-1], [4])
        ],
    ],
    ids=str,
)
def test_plans_that_make_no_sense_are_not_read(change: dict[str, object], message: str) -> None:
    values = json.loads(Plan((Cut("a", "in", 4, (0, 2), 0),)).to_json())
    assert Plan.from_json(json.dumps(values)) == Plan((Cut("a", "in", 4, (0, 2), 0),))
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps({**values, **change}))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            Plan((Cut("conv1", "out", 9, (0,), 0),)),
            "expects 9 channels on side 'out' of 'conv1', the model has 8",
        ),
        (Plan((Cut("conv9", "out", 8, (0,), 0),)), "the model has no such layer"),
        (Plan((Cut("loose", "tensor", 8, (0,), 0),)), "the model has no such layer"),
        (Plan(biases=("conv1",)), "expects a layer without a bias at 'conv1'"),
        (Plan(factors=(Factor("conv1", "out", (0,), 2.0),)), "channels of 'conv1' that it does not cut"),
        (Plan(attributes=(Attribute("conv1", "stride", 0, 7, 3),)), "expects the number 7 in 'conv1.stride'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "plan",
)
def test_plans_for_another_model_leave_this_one_alone(plan: Plan, message: str) -> None:
    model = chain()
    before = snapshot(model)
    with pytest.raises(PlanError, match=message):
        plan.apply_(model)
    assert snapshot(model) == before


def test_plans_only_follow_each_other_if_the_widths_fit() -> None:
    first = Plan((Cut("conv1", "out", 8, (0, 2, 4), 0),))
    assert first.then(Plan((Cut("conv1", "out", 3, (1, 2), 0),))).cuts[0].kept == (2, 4)
    with pytest.raises(PlanError, match="'conv1' has 3 channels, not 8"):
        first.then(Plan((Cut("conv1", "out", 8, (0,), 0),)))


# ---------------------------------------------------------------- excluded


def reasons(model: nn.Module) -> dict[str, str]:
    left = couple(trace(model, X), model).excluded
    return {path: entry.reason for entry in left for path in entry.paths}


def test_layers_whose_weight_cannot_be_replaced_are_left_whole() -> None:
    model = chain()
    parametrizations.weight_norm(model.conv1)
    assert "parametrised; remove the parametrisation first" in reasons(model)["conv1"]
    model = chain()
    masks.identity(model.conv1, "weight")
    assert "old-style hook" in reasons(model)["conv1"]


def test_layers_that_share_a_weight_are_left_whole() -> None:
    model = chain()
    model.conv3 = nn.Conv2d(8, 8, 3, padding=1)
    model.conv3.weight = model.conv2.weight
    stream = model.forward
    model.forward = lambda x: stream(x) + model.conv3(F.relu(model.bn1(model.conv1(x)))).mean()  # type: ignore[method-assign]
    assert "shares a weight tensor ('conv2' and 'conv3')" in reasons(model)["conv2"]


class Gated(nn.Conv2d):
    """A convolution that holds a layer of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.gate = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gate(x.mean((1, 2, 3), keepdim=True))


def test_a_layer_does_not_share_with_itself_what_a_layer_inside_it_holds() -> None:
    model = chain()
    model.conv2 = Gated()
    assert "conv2" not in reasons(model)


# ---------------------------------------------------------------- verification


class SinglePrecision(Chain):
    """Runs in float32 only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_model_that_only_runs_in_single_precision_is_verified_there() -> None:
    model = randomise(SinglePrecision(), 0).eval()
    report = prune_(model, X, macs=0.5)
    assert report.max_error < 1e-4
    assert model(X).shape == (8, 4)


class FollowsItsTable(Chain):
    """Asks the table of its parameters, not an attribute, in which precision to run."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(next(self.parameters()).dtype))


def test_a_model_that_looks_into_its_tables_is_verified_in_float64_all_the_same() -> None:
    model = randomise(FollowsItsTable(), 0).eval()
    assert prune_(model, X, macs=0.5).max_error < 1e-12
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_verification_holds_no_second_copy_of_what_is_not_constant() -> None:
    model = randomise(chain(), 0)
    before = snapshot(model)
    verifier = Verifier(model, X, trace(model, X))
    verifier.run()
    ours = {p.data_ptr() for p in model.parameters()}
    for twin in (verifier.dense, verifier.twin):
        assert {p.data_ptr() for p in twin.parameters()} == ours
    assert all(p.dtype == torch.float64 for p in (verifier.twin.conv1.weight, verifier.twin.bn1.running_mean))  # type: ignore[union-attr]
    assert snapshot(model) == before


def test_a_cut_that_is_not_what_was_masked_is_found_and_located() -> None:
    model = chain()
    verifier = Verifier(model, X, trace(model, X))
    verifier.run()
    plan, selection = without(model, 3)
    assert verifier.verify(plan, selection).max_error < 1e-12  # type: ignore[arg-type]
    other = dict.fromkeys(selection, (1, 2, 3, 4, 5))
    with pytest.raises(VerificationError, match="differs from the masked one") as failure:
        verifier.verify(plan, other)  # type: ignore[arg-type]
    assert failure.value.at in ("bn1", "conv2")
    with pytest.raises(VerificationError) as failure:
        verifier.verify(plan, other, locate=False)  # type: ignore[arg-type]
    assert failure.value.at == ""


def test_a_cut_model_that_does_not_run_names_the_layer() -> None:
    model = chain()
    verifier = Verifier(model, X, trace(model, X))
    verifier.run()
    plan, selection = without(model, 3)
    half = Plan(tuple(cut for cut in plan.cuts if cut.path != "conv2"))
    with pytest.raises(VerificationError, match="the cut model does not run, at 'conv2'"):
        verifier.verify(half, selection)  # type: ignore[arg-type]


def test_outputs_are_compared_whole() -> None:
    a = torch.tensor([1.0, -4.0])
    assert compare(a, a + torch.tensor([0.0, 0.4]), 0.2).error == pytest.approx(0.1)
    with pytest.raises(VerificationError, match=r"differs from the masked one by 1\.00e-01"):
        compare(a, a + 0.4, 0.05)
    with pytest.raises(VerificationError, match=r"returns 'output\[1\]'"):
        compare((a, a), (a,), 1.0)
    with pytest.raises(VerificationError, match=r"shape \(1,\), not \(2,\)"):
        compare(a, a[:1], 1.0)
    with pytest.raises(VerificationError, match="nan"):
        compare(a, a * float("nan"), 1.0)


# ---------------------------------------------------------------- what reconstruction passes over


class Standardised(nn.Conv2d):
    """Looks at its weights as a whole: twice the weights are the same layer."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Gained(nn.Conv2d):
    """Has a gain an output, which begins with nothing where a branch shall."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), gain))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    """Still linear in its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 3 * self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (nn.Conv2d(3, 4, 3), True),
        (Standardised(3, 4, 3), False),
        (Gained(3, 4, 2.0), True),
        (Gained(3, 4, 0.0), False),
        (Scaled(3, 4), True),
        (Scaled(3, 4, bias=False), True),
        (type("Odd", (nn.Bilinear,), {"__module__": "elsewhere"})(3, 3, 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_linear_in_their_weight_are_known(layer: nn.Module, linear: bool) -> None:
    assert is_linear_in_weight(layer) is linear


def test_a_layer_that_scales_by_its_own_width_keeps_it() -> None:
    """On fewer channels it would multiply by more: zeroed columns are the oracle, not the layer on what stays."""

    class Equalised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * (9 * self.in_channels) ** -0.5, self.bias, padding=1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.ReLU(), Equalised(16, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    report = prune_(model, x, ratio=0.5, allocation="local")
    assert (model[0].out_channels, model[3].in_channels) == (4, 16)
    [entry] = [entry for entry in report.excluded if entry.paths == ("1",)]
    assert "differs from the masked one" in entry.reason


def test_what_runs_in_inference_mode_is_named_with_the_reason() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
            self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                x = self.features(x)
            return self.head(x.clone())

    report = prune_(Frozen().eval(), torch.randn(1, 3, 8, 8), ratio=0.5)
    reasons = {path: entry.reason for entry in report.excluded for path in entry.paths}
    assert "inference_mode" in reasons["features.0"]
    assert "head.0" not in reasons


def test_layers_that_cannot_be_solved_are_named_with_the_reason() -> None:
    class Mixed(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = Standardised(8, 8, 3, padding=1)
            self.up, self.bn3 = nn.ConvTranspose2d(8, 8, 2), nn.BatchNorm2d(8)
            self.twice = nn.Conv2d(8, 8, 1)
            self.gained, self.branch = Gained(8, 8, 2.0), Gained(8, 8, 0.0)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
            x = F.relu(self.gained(x)) + self.branch(x)
            x = self.twice(F.relu(self.twice(F.relu(self.bn3(self.up(x))))))
            return self.fc(x.mean((2, 3)))

    model = randomise(Mixed(), 0).eval()
    plan, _ = without(model, 3)
    _, outcome = cut_(TracedModel.of(model, X), plan, Reconstruct(), X)
    assert outcome.skipped == {
        "conv2": NO_WEIGHTED_SUM,
        "gained": "it has parameters beside weight and bias",
        "branch": "it has parameters beside weight and bias",
    }
    assert {"up", "twice", "fc"} <= set(outcome.layers)


@pytest.mark.parametrize("compensation", ["mean", "linear", "reconstruct"])
def test_auxiliary_heads_are_cut_and_not_compensated(compensation: Method) -> None:
    model = randomise(Unused(), 0).eval()
    report = prune_(model, X[:1], ratio=0.4, compensation=compensation, calibration=X)
    assert report.not_compensated == {"aux": IDLE}
    assert model.aux.in_features == model.fc.in_features < 8


def test_an_exported_program_names_what_to_prune_in_its_place() -> None:
    program = torch.export.export(chain(), (X,)).module()
    with pytest.raises(NothingToPruneError, match=r"exported program .* prune the one that it was made from"):
        prune_(program, X, macs=0.5)
