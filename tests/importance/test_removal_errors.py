"""Local error in closed form, against regressions by least squares and sums over taps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning.importance.activation_stats import ActivationStatistics
from ss_pruning.importance.conditional_variance import removal_errors
from ss_pruning.importance.regression import precision

CHANNELS, ROWS = 8, 4000

#: Layers that read channels.
CONSUMERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(CHANNELS, 5),
    "1x1": lambda: nn.Conv2d(CHANNELS, 5, 1),
    "3x3": lambda: nn.Conv2d(CHANNELS, 5, 3),
    "grouped": lambda: nn.Conv2d(CHANNELS, 6, 3, groups=2),
    "one dimension": lambda: nn.Conv1d(CHANNELS, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 5, 2, stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(CHANNELS, 6, 2, stride=2, groups=2),
}  # fmt: skip


def plain_weight(module: Any) -> Tensor:
    """`[outputs, channels, taps]`, with zeros where an output does not read a channel."""
    weight = module.weight.detach().double()
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # stored inputs first
        weight = torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])
    weight = weight.reshape(len(weight), weight.shape[1], -1)
    full = torch.zeros(len(weight), CHANNELS, weight.shape[2], dtype=torch.float64)
    for o in range(len(weight)):
        first = o // (len(weight) // groups) * weight.shape[1]
        full[o, first : first + weight.shape[1]] = weight[o]
    return full


def rows() -> Tensor:
    """`[rows, channels]` that tell of each other, of means that are not 0."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    x = torch.randn(ROWS, CHANNELS, generator=generator, dtype=torch.float64) @ mixed
    return x + torch.randn(CHANNELS, generator=generator, dtype=torch.float64)


def statistics(x: Tensor) -> ActivationStatistics:
    return ActivationStatistics(
        x.mean(0), x.var(0, correction=0), torch.zeros(CHANNELS, dtype=torch.bool),
        torch.cov(x.T, correction=0), 10**9,
    )  # fmt: skip


def left_over(x: Tensor, removed: list[int], method: str, groups: int) -> Tensor:
    """`[rows, channels]`, what a compensation cannot tell of the removed channels; 0 for those that stay."""
    left = torch.zeros_like(x)
    for channel in removed:
        group = channel // (CHANNELS // groups)
        kept = [c for c in range(CHANNELS) if c not in removed and c // (CHANNELS // groups) == group]
        told = torch.cat([x[:, kept], torch.ones(ROWS, 1, dtype=torch.float64)], 1)
        if method == "mean":
            told = told[:, -1:]
        solution = torch.linalg.lstsq(told, x[:, channel : channel + 1]).solution
        left[:, channel] = x[:, channel] - (told @ solution)[:, 0] * (method != "none")
    return left


def power(x: Tensor, weight: Tensor) -> Tensor:
    """What taps put out of `[rows, channels]`, each by itself: mean square, summed over outputs and taps."""
    return sum(
        ((x @ weight[:, :, t].T).square().mean(0).sum() for t in range(weight.shape[2])), torch.zeros(())
    )


@pytest.mark.parametrize("method", ["none", "mean", "linear"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_it_is_what_taps_that_read_independently_lose(
    consumer: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ss_pruning.importance.regression._share", lambda *_: 1e-9)
    torch.manual_seed(1)
    module, x = CONSUMERS[consumer](), rows()
    seen, groups, weight = statistics(x), getattr(module, "groups", 1), plain_weight(module)
    inverse = precision(seen.covariance, groups, seen.rows)  # type: ignore[arg-type]
    order = [6, 1, 4, 0, 3]
    found = removal_errors(module, seen, inverse, torch.tensor(order), method).cumsum(0)
    # A mean is read by all taps at once; with a kernel as large as the stride an output sees one of them.
    of_mean = weight if "transposed" in consumer else weight.sum(2, keepdim=True)
    wanted = []
    for count in range(1, len(order) + 1):
        left = left_over(x, order[:count], method, groups)
        lost = power(left - left.mean(0), weight) + power(left.mean(0)[None], of_mean)
        wanted.append(float(lost / power(x - x.mean(0), weight)))
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_channel_that_the_others_tell_costs_nothing() -> None:
    x = rows()
    x[:, 3] = 2 * x[:, 0] - x[:, 5]
    module, seen = nn.Linear(CHANNELS, 5), statistics(x)
    inverse = precision(seen.covariance, 1, seen.rows)  # type: ignore[arg-type]
    first, second = removal_errors(module, seen, inverse, torch.tensor([3, 0]), "linear").tolist()
    assert first < 2e-3 < 1e-2 < second


def test_without_a_covariance_channels_are_independent() -> None:
    x, module = rows(), nn.Linear(CHANNELS, 5)
    seen = ActivationStatistics(x.mean(0), x.var(0), torch.zeros(CHANNELS, dtype=torch.bool))
    power = module.weight.double().square().sum(0) * seen.variance
    found = removal_errors(module, seen, None, torch.tensor([2, 7]), "linear")
    assert found.tolist() == pytest.approx((power[[2, 7]] / power.sum()).tolist())


def test_similarities_of_all_images_with_all_are_not_compared_beside_what_goes_by_images() -> None:
    class Contrastive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.second(self.first(x).relu()).mean((2, 3))
            return features @ features.T, features

    model = Contrastive().eval()
    images = torch.randn(10, 3, 8, 8)
    ss_pruning.prune_(model, images[:2], ratio=0.3, calibration=images, allocation="sensitivity")
    assert model.first.out_channels < 8
