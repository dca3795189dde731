"""The imitation loss as users train with it: the formula, whose gradients, and what stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import ImitationLoss, prune_
from ss_pruning.errors import InputError
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
        loss = imitation(X)
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
        imitation(X).backward()
    assert all((p.grad is None) == name.startswith("fc.") for name, p in model.named_parameters())
    assert all(p.grad is None for p in dense.parameters())


def test_both_models_are_as_they_were(pair: tuple[nn.Module, nn.Module]) -> None:
    model, dense = pair
    model.train()
    dense.train()
    before = snapshot(model), snapshot(dense)
    with torch.no_grad(), ImitationLoss(model, dense, X[:1]) as imitation:
        model.eval()(X)
        imitation(X)
        model.train()
    assert (snapshot(model), snapshot(dense)) == before


def test_it_is_zero_for_the_dense_model_itself(pair: tuple[nn.Module, nn.Module]) -> None:
    with ImitationLoss(copy.deepcopy(pair[1]), pair[1], X[:1]) as imitation:
        imitation.model(X)
        assert imitation(X).item() == 0.0


def test_called_without_a_pass_it_says_so(pair: tuple[nn.Module, nn.Module]) -> None:
    imitation = ImitationLoss(*pair, X[:1])
    with pytest.raises(InputError, match="run the pruned model within the block"):
        imitation(X)
    with imitation:
        pair[0](X)
        imitation(X)
        with pytest.raises(InputError, match="run the pruned model within the block"):
            imitation(X)
