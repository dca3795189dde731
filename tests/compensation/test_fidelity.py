"""What a small model keeps, against plain loops from the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ss_pruning.compensation.fidelity import Reference, held_out
from ss_pruning.errors import ModelError
from ss_pruning.importance.calibration import Batch
from tests.support.snapshot import snapshot


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4))


X = torch.randn(75, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_error_and_agreement_equal_plain_loops() -> None:
    dense, small = net(0), net(1).train()
    before = snapshot(dense), snapshot(small)
    found = Reference(dense, Batch.of(X)).fidelity(small)
    assert (snapshot(dense), snapshot(small)) == before
    with torch.no_grad():
        y, z = dense.eval()(X).double(), small.eval()(X).double()
    mean = [sum(float(row[k]) for row in y) / 75 for k in range(4)]
    variance = sum((float(row[k]) - mean[k]) ** 2 for row in y for k in range(4)) / 75 / 4
    errors = [
        sum((float(a[k]) - float(b[k])) ** 2 for k in range(4)) / 4 / variance
        for a, b in zip(y, z, strict=True)
    ]
    expected = sum(errors) / 75
    assert found.error == pytest.approx(expected, rel=1e-6)
    spread = math.sqrt(sum((e - expected) ** 2 for e in errors) / 74 / 75)
    assert found.error_deviation == pytest.approx(spread, rel=1e-6)
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(y, z, strict=True))
    assert (found.agreement, found.inputs) == (same / 75, 75)
    share = (same + 2) / 79
    assert found.agreement_deviation == pytest.approx(math.sqrt(share * (1 - share) / 79))


def test_a_model_is_itself() -> None:
    found = Reference(net(0), Batch.of(X)).fidelity(net(0))
    assert (found.error, found.agreement) == (0.0, 1.0)


def test_outputs_that_are_no_classes_have_an_error_alone() -> None:
    class Two(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"map": x * self.scale, "mean": x.mean((2, 3)), "count": torch.tensor(3)}

    found = Reference(Two(1.0), Batch.of(X)).fidelity(Two(0.5))
    assert found.agreement is None
    mean = X.double().mean(0)
    share = (0.25 * X.double().square()).mean() / (X.double() - mean).square().mean()
    assert found.error == pytest.approx(float(share) / 2, rel=1e-6)  # the mean over both outputs


def test_what_is_lacking_or_not_finite_counts() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_full((len(x), 4), float("nan"))

    reference = Reference(net(0), Batch.of(X))
    assert reference.fidelity(Odd()).error == math.inf
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    assert reference.fidelity(wide).error == 1.0
    assert reference.fidelity(wide).agreement == 0.0

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    silent = reference.fidelity(Silent())
    assert (silent.error, silent.agreement) == (1.0, 0.0)


def test_nothing_to_compare_is_said() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 2)

    with pytest.raises(ModelError, match="no output of the model varies"):
        Reference(Constant(), Batch.of(X))


@pytest.mark.parametrize(("count", "unit"), [(75, 1), (40, 4)])
def test_a_fifth_is_held_out_in_whole_units(count: int, unit: int) -> None:
    batch = Batch.of(X[:count]).limited(unit, None)
    held, others = held_out(batch)
    assert len(held) == count // unit // 5 * unit
    rows = torch.cat([held.inputs, others.inputs])
    assert len({row.numpy().tobytes() for row in rows}) == count
    firsts = [int((row == X).flatten(1).all(1).nonzero()) for row in held.inputs[::unit]]
    assert all(first % unit == 0 for first in firsts)
