"""What a channel adds to the stronger ones, against a loop of regressions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ss_pruning import SynapticImportance, prune_
from ss_pruning.config import NoCompensation
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.layers import groups_of
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.conditional_variance import unexplained

MANY = 10**9  # rows: the ridge is the least


def by_regression(covariance: Tensor, strengths: Tensor) -> list[float]:
    """For each channel, strongest first, the share of its variance that a regression on those before leaves."""
    left = [0.0] * len(strengths)
    before: list[int] = []
    for c in strengths.argsort(descending=True).tolist():
        explained = 0.0
        if before:
            cross = covariance[before, c]
            explained = float(cross @ torch.linalg.solve(covariance[before][:, before], cross))
        left[c] = 1 - explained / float(covariance[c, c])
        before.append(c)
    return left


def test_it_is_what_regressions_on_the_stronger_channels_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    covariance, strengths = mixed @ mixed.T, torch.rand(6, generator=generator)
    found = unexplained(covariance, strengths, MANY)
    assert found.tolist() == pytest.approx(
        by_regression(covariance, strengths), abs=0.02
    )  # but for the ridge
    assert found[strengths.argmax()] == pytest.approx(1)


def test_of_two_equal_channels_the_weaker_says_nothing() -> None:
    covariance = torch.eye(3, dtype=torch.float64)
    covariance[0, 2] = covariance[2, 0] = 1
    found = unexplained(covariance, torch.tensor([1.0, 2.0, 3.0]), MANY)
    assert found.tolist() == pytest.approx([0, 1, 1], abs=2e-3)


def test_covariances_of_tiny_numbers_are_those_of_others_scaled() -> None:
    """In single precision squares of 1e-30 are 0; the oracle is numpy's covariance in double precision."""
    layer, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(50, 4) @ torch.randn(4, 4) + 3
    known = trace(layer, x)
    for scale in (1.0, 1e-30, 1e12):
        found = measure(layer, known, [x * scale], x, ["0"], covariance=True)["0"].covariance
        wanted = torch.from_numpy(np.cov((x * scale).double().numpy().T, bias=True))
        assert found is not None
        assert torch.allclose(found / scale**2, wanted / scale**2, rtol=1e-4)


def test_what_is_not_finite_is_said() -> None:
    with pytest.raises(ModelError, match="not finite on the calibration inputs"):
        unexplained(torch.full((3, 3), torch.nan), torch.ones(3), MANY)


@pytest.mark.parametrize("method", ["linear", "reconstruct"])
def test_a_layer_of_numbers_that_have_no_square_is_pruned(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    model[0].weight.data.mul_(1e-42)
    images = torch.randn(16, 3, 2, 2)
    report = prune_(
        model, images[:1], ratio=0.5, compensation=method, calibration=images, allocation="global"
    )
    assert sum(layer.outputs_after for layer in report.layers) == 8 + 2
    assert bool(model(images).isfinite().all())


def test_groups_are_of_no_use_to_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    covariance, strengths = mixed @ mixed.T, torch.rand(8, generator=generator)
    found = unexplained(covariance, strengths, MANY, groups=2)
    halves = [unexplained(covariance[h, h], strengths[h], MANY) for h in (slice(4), slice(4, 8))]
    assert torch.allclose(found, torch.cat(halves))


def test_few_rows_explain_little() -> None:
    """Noise of 20 independent channels, seen 30 times: by chance they seem to tell each other."""
    generator = torch.Generator().manual_seed(2)
    covariance = torch.cov(torch.randn(20, 30, generator=generator, dtype=torch.float64))
    strengths = torch.rand(20, generator=generator)
    assert (
        unexplained(covariance, strengths, 30).mean() > unexplained(covariance, strengths, MANY).mean() + 0.1
    )


def test_dead_channels_are_no_error() -> None:
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    assert unexplained(covariance, torch.zeros(4), 10).isfinite().all()


def test_rounding_that_leaves_a_covariance_indefinite_is_no_error() -> None:
    covariance = torch.ones(50, 50, dtype=torch.float64) - 0.05 * torch.eye(50, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(covariance)[0]) < -0.01
    found = unexplained(covariance, torch.arange(50.0), MANY)
    assert found.isfinite().all()
    assert int(found.argmax()) == 49


@pytest.mark.parametrize("split", [(5,), (2, 3)])
def test_covariances_are_those_of_all_positions(split: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten()).eval()
    x = 5 + torch.randn(5, 3, 9, 9)
    connectivity = trace(model, x)
    found = measure(model, connectivity, x.split(split), x, ["2"], covariance=True)["2"]
    rows = model[:2](x).detach().double().movedim(1, 0).reshape(6, -1)
    assert found.covariance is not None
    assert torch.allclose(found.covariance, torch.cov(rows, correction=0), atol=1e-5)
    assert found.rows == rows.shape[1]
    assert groups_of(model[2]) == 2


def test_statistics_are_as_exact_as_the_model_and_no_coarser_than_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)).eval()
    x = 5 + torch.randn(5, 3, 9, 9)
    connectivity = trace(model, x)
    for dtype, kept, tolerance in (
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.float32, 1e-5),
    ):
        model, inputs = model.to(dtype), x.to(dtype)
        found = measure(model, connectivity, [inputs], inputs, ["1"], covariance=True)["1"]
        rows = model[0](inputs).detach().double().movedim(1, 0).reshape(6, -1)
        assert found.mean is not None
        assert found.covariance is not None
        assert found.mean.dtype == found.variance.dtype == kept
        assert torch.allclose(found.covariance, torch.cov(rows, correction=0), rtol=tolerance, atol=tolerance)


def twins() -> tuple[nn.Sequential, Tensor]:
    """Channels 0 to 3 come twice; 4 to 7 are weaker, and alone in what they say."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3)).eval()
    with torch.no_grad():
        first, second = model[0], model[2]
        first.weight[8:], first.bias[8:] = first.weight[:4], first.bias[:4]
        second.weight[:, 4:8] *= 0.5
    return model, torch.randn(16, 3, 12, 12)


def test_compensated_pruning_takes_what_comes_twice_and_changes_next_to_nothing() -> None:
    model, images = twins()
    expected = model(images).detach()
    prune_(model, images[:1], ratio=4 / 12, compensation="reconstruct", calibration=images)
    kept = next(cut.kept for cut in model.ss_pruning_plan.cuts if (cut.path, cut.side) == ("0", "out"))
    assert {4, 5, 6, 7} <= set(kept)
    assert {c % 8 for c in kept} == set(range(8))
    assert float((model(images).detach() - expected).abs().max() / expected.abs().max()) < 1e-3


def test_without_compensation_the_weak_go() -> None:
    model, images = twins()
    prune_(model, images[:1], ratio=4 / 12, calibration=images, compensation=NoCompensation(recalibrate=True))
    kept = next(cut.kept for cut in model.ss_pruning_plan.cuts if (cut.path, cut.side) == ("0", "out"))
    assert len({4, 5, 6, 7} & set(kept)) <= 1


def test_it_needs_images_and_a_power() -> None:
    with pytest.raises(InputError, match="give batches"):
        SynapticImportance(conditional=0.5)
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        SynapticImportance([torch.zeros(1, 3, 8, 8)], conditional=2)
