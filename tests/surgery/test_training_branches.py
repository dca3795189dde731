"""What a model runs in training alone relies on widths, too: the cut model trains, or what it relies on stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import NothingToPruneError
from tests.support.odd_models import state_of

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branching(nn.Module):
    """Two layers, and a branch of training behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.first(x).relu()
        logits = self.head(self.second(features).relu().mean((2, 3)))
        return (logits, self.beside(features.mean((2, 3)))) if self.training else logits

    def beside(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class Written(Branching):
    """The width is written into code."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 5)

    def beside(self, features: Tensor) -> Tensor:
        return self.auxiliary(features.view(-1, 8))


class Stored(Written):
    """The width is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 8

    def beside(self, features: Tensor) -> Tensor:
        return self.auxiliary(features.view(-1, self.width))


class Prototypes(Branching):
    """A table that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(8, 4))

    def beside(self, features: Tensor) -> Tensor:
        return features @ self.prototypes


class Decides(Prototypes):
    """Does not run without data."""

    def beside(self, features: Tensor) -> Tensor:
        return features @ self.prototypes if features.sum().isfinite().item() else features


@pytest.mark.parametrize(
    ("kind", "kept"), [(Written, 8), (Stored, None), (Prototypes, 8), (Decides, 8)], ids=lambda k: str(k)
)
def test_the_cut_model_trains(kind: type[Branching], kept: int | None) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    report = ss_pruning.prune_(model, X, ratio=0.4, allocation="local")
    assert model.second.out_channels < 10
    if kept is None:
        assert model.first.out_channels == model.width < 8  # type: ignore[attr-defined]
    else:
        assert model.first.out_channels == kept
        (entry,) = (e for e in report.excluded if "first" in e.paths)
        assert "does not run in training" in entry.reason
    logits, beside = model.train()(X)
    (logits.sum() + beside.sum()).backward()


class Averaged(nn.Module):
    """The average of a net, which alone runs where nothing is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.teacher = copy.deepcopy(self.student)
        nn.init.normal_(self.student[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.data.lerp_(theirs.data, 0.1)
            return self.student(x)
        return self.teacher(x)


def test_a_net_is_not_cut_narrower_than_its_average() -> None:
    model = Averaged().eval()
    before = state_of(model)
    with pytest.raises(NothingToPruneError, match="does not run in training"):
        ss_pruning.prune_(model, X, ratio=0.4, ignore="teacher.0")
    assert state_of(model) == before


def test_verifying_in_training_moves_no_average_of_the_users() -> None:
    """Copies share parameters with the model, and code that goes through tables writes into those."""

    class Looking(Averaged):
        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().isfinite().item()  # does not run without data
            return super().forward(x)

    model = Looking().eval()
    nn.init.normal_(model.student[2].weight)
    weights = [p.detach().clone() for p in model.teacher.parameters()]
    with pytest.raises(NothingToPruneError, match="does not run in training"):
        ss_pruning.plan(model, X, ratio=0.4, allocation="local", ignore="teacher.0")
    assert all(torch.equal(*pair) for pair in zip(weights, model.teacher.parameters(), strict=True))


def test_a_net_and_its_average_keep_the_same_channels() -> None:
    """Cut alike in width alone, each would keep its own, and the average mix them from the first step on."""
    torch.manual_seed(0)
    model = Averaged().eval()
    for net, order in ((model.student, range(8)), (model.teacher, range(7, -1, -1))):
        with torch.no_grad():
            for size, channel in enumerate(order):
                net[0].weight[channel] *= 1 + size
    before = state_of(model)
    with pytest.raises(NothingToPruneError, match="does not run in training"):
        ss_pruning.prune_(model, X, ratio=0.4, allocation="local")
    assert state_of(model) == before


def test_a_net_and_its_average_that_keep_the_same_are_cut() -> None:
    torch.manual_seed(0)
    model = Averaged().eval()
    model.teacher.load_state_dict(model.student.state_dict())
    ss_pruning.prune_(model, X, ratio=0.4, allocation="local")
    assert model.student[0].out_channels == model.teacher[0].out_channels < 8
    model.train()(X).sum().backward()


def test_a_layer_that_counts_its_passes_in_training_is_cut() -> None:
    class Counting(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 8, 3)
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.passes += 1
            return super().forward(x)

    model = nn.Sequential(Counting(), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    ss_pruning.prune_(model, X, ratio=0.4, allocation="local")
    assert model[0].out_channels < 8
    assert model[0].passes == 0


def test_what_does_not_train_dense_is_cut_all_the_same() -> None:
    class Wanting(Written):
        def beside(self, features: Tensor) -> Tensor:
            raise ValueError("targets, please")

    model = Wanting().eval()
    ss_pruning.prune_(model, X, ratio=0.4, allocation="local")
    assert model.first.out_channels < 8
