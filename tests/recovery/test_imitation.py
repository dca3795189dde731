"""The imitation loss as users train with it: the formula, whose gradients, and what stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import ImitationLoss, prune_
from ss_pruning.errors import InputError, ModelError
from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.fidelity import HeldOut
from ss_pruning.recovery.imitation import relative_error
from ss_pruning.sources.demo import digits_resnet
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE
from tests.support.snapshot import snapshot
from tests.support.zoo import randomise


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A pruned model and its dense one."""
    torch.manual_seed(0)
    dense = randomise(digits_resnet(), 0).eval()
    model = copy.deepcopy(dense)
    prune_(model, torch.zeros(1, 1, 8, 8), macs=0.4, allocation="local")
    return model, dense


X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def stages(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = torch.relu(model.bn1(model.conv1(x)))
    first = model.layer1(x)
    second = model.layer2(first)
    return [first, second, model.layer3(second)]


def test_it_is_the_mean_relative_error_of_the_stages(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    kept = {(cut.path, cut.side): list(cut.kept) for cut in getattr(model, PLAN_ATTRIBUTE).cuts}
    with ImitationLoss(model, dense, X[:1]) as imitation:
        model(X)
        loss = imitation()
    errors = []
    for number, (x, y) in enumerate(zip(stages(model, X), stages(dense, X), strict=True), 1):
        channels = kept.get((f"layer{number}.1.conv2", "out"))
        y = y if channels is None else y[:, channels]
        errors.append(((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    assert loss.item() == pytest.approx(sum(errors).item() / 3, rel=1e-4)
    assert any(place.kept for place in imitation.places)


def test_gradients_reach_what_lies_ahead_of_the_classifier_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    with ImitationLoss(model, dense, X[:1]) as imitation:
        model(X)
        imitation().backward()
    assert all((p.grad is None) == name.startswith("fc.") for name, p in model.named_parameters())
    assert all(p.grad is None for p in dense.parameters())


def test_both_models_are_as_they_were(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    model.train()
    dense.train()
    before = snapshot(model), snapshot(dense)
    with torch.no_grad(), ImitationLoss(model, dense, X[:1]) as imitation:
        model.eval()(X)
        imitation()
        model.train()
    assert (snapshot(model), snapshot(dense)) == before


def test_it_is_zero_for_the_dense_model_itself(pair: tuple[nn.Module, nn.Module]) -> None:
    with ImitationLoss(copy.deepcopy(pair[1]), pair[1], X[:1]) as imitation:
        imitation.model(X)
        assert imitation().item() == 0.0


class Scaled(nn.Module):
    """Called by position and by name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return self.net(by * x)


def test_it_knows_what_the_last_pass_was_given(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = Scaled(pair[0]), Scaled(pair[1])
    with ImitationLoss(*pair, X[:1]) as imitation:
        model(X)
        model(X, by=2.0)
        loss = imitation()
        pair[0](2.0 * X)
        assert torch.equal(loss, imitation())
    with ImitationLoss(copy.deepcopy(dense), dense, X[:1]) as imitation:
        imitation.model(X, by=3.0)
        assert imitation().item() == 0.0


def test_called_without_a_pass_it_says_so(pair: tuple[nn.Module, nn.Module]) -> None:
    imitation = ImitationLoss(*pair, X[:1])
    with pytest.raises(InputError, match="run the pruned model within the block"):
        imitation()
    with imitation:
        pair[0](X)
        imitation()
        with pytest.raises(InputError, match="run the pruned model within the block"):
            imitation()


def test_channels_are_not_guessed_without_a_plan(pair: tuple[nn.Module, nn.Module]) -> None:
    """A module around the pruned one knows nothing of its plan; so does a model that was cut by hand."""
    with pytest.raises(InputError, match=r"carries no plan, and 'net\..*fewer channels"):
        ImitationLoss(Scaled(pair[0]), Scaled(pair[1]), X[:1])
    vars(pair[0]).pop(PLAN_ATTRIBUTE)
    with pytest.raises(InputError, match="carries no plan"):
        ImitationLoss(*pair, X[:1])


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_no_bare_model_is_refused(pair: tuple[nn.Module, nn.Module], which: int) -> None:
    compiled = copy.deepcopy(pair[which])
    compiled.compile(backend="eager")
    for odd, said in (
        (nn.DataParallel(pair[which]), "DataParallel: imitate model.module"),
        (torch.compile(pair[which], backend="eager"), "compiled: imitate model._orig_mod"),
        (compiled, "compiled in place: imitate it before that"),
        (copy.deepcopy(pair[which]).to("meta"), "meta device"),
        (type(pair[which]), "the class"),
        (None, "NoneType"),
    ):
        given = [*pair]
        given[which] = odd  # type: ignore[call-overload]
        with pytest.raises((InputError, ModelError), match=said):
            ImitationLoss(*given, X[:1])


def by_loop(x: Tensor, y: Tensor) -> float:
    """The relative error from its definition."""
    numbers = y.double().flatten().tolist()
    mean = sum(numbers) / len(numbers)
    above = sum((a - b) ** 2 for a, b in zip(x.double().flatten().tolist(), numbers, strict=True))
    below = sum((b - mean) ** 2 for b in numbers)
    return above / max(below, sum(b**2 for b in numbers) / 100)


@pytest.mark.parametrize("mean", [0.0, 2.0, -8.0, -12.0, 300.0])
def test_the_relative_error_is_that_of_the_definition(mean: float) -> None:
    """From maps that vary to scores that hardly do, beside their mean."""
    drawn = torch.Generator().manual_seed(0)
    y = torch.randn(5, 3, 2, 2, generator=drawn) + mean
    x = y + 0.3 * torch.randn(5, 3, 2, 2, generator=drawn)
    assert float(relative_error(x, y)) == pytest.approx(by_loop(x, y), rel=1e-4)
    assert float(relative_error(7 * x, 7 * y)) == pytest.approx(by_loop(x, y), rel=1e-4)


def test_constant_maps_are_measured_by_their_size_and_zeros_by_nothing() -> None:
    """The limit of maps that vary less and less; zeros have no size."""
    y = torch.full((4, 2, 3, 3), -10.0)
    assert float(relative_error(y + 1.0, y)) == pytest.approx(1.0)
    less = y + 1e-4 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    assert float(relative_error(less + 1.0, less)) == pytest.approx(1.0, rel=1e-3)
    assert float(relative_error(y, torch.zeros_like(y))) == pytest.approx(100.0)


class Quiet(nn.Module):
    """A detector's two outputs: boxes, and scores that say nothing is there, nearly the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)
        nn.init.constant_(self.scores.bias, -12.0)
        nn.init.normal_(self.scores.weight, std=1e-5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.body(x)
        return {"boxes": self.boxes(found), "scores": self.scores(found)}


def test_scores_that_hardly_vary_do_not_decide_the_fidelity() -> None:
    """A ten-thousandth of their size is no error to speak of; of the boxes' error half is left in the mean."""
    torch.manual_seed(0)
    dense = Quiet().eval()
    model = copy.deepcopy(dense)
    prune_(model, torch.zeros(1, 3, 10, 10), ratio=0.25, ignore=["boxes", "scores"])
    with torch.no_grad():
        model.scores.bias += 1e-3
    x = torch.randn(12, 3, 10, 10)
    with ImitationLoss(model, dense, x[:1]) as imitation:
        fidelity = HeldOut(imitation, Batch.of(x), 5).measure()
    with torch.no_grad():
        ours, theirs = model(x), dense(x)
    assert fidelity.error == pytest.approx(
        sum(by_loop(ours[name], theirs[name]) for name in theirs) / 2, rel=1e-4
    )
    assert fidelity.error == pytest.approx(by_loop(ours["boxes"], theirs["boxes"]) / 2, rel=1e-3)
