"""Noise that models are run on, and the statistics of what arrives."""

from __future__ import annotations

import pytest
import torch

from ss_pruning._utils.arrays import mean_and_variance, normal_like, with_spectrum_of_photos


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_noise_takes_the_place_of_floating_point_numbers_only() -> None:
    inputs = {
        "x": torch.zeros(200, 50, dtype=torch.float64),
        "n": torch.arange(3),
        "more": (torch.ones(2), "text"),
    }
    before = torch.get_rng_state()
    found = normal_like(inputs, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert found["x"].dtype == torch.float64
    assert float(found["x"].mean()) == pytest.approx(0, abs=0.03)
    assert float(found["x"].var()) == pytest.approx(1, abs=0.05)
    assert found["n"] is inputs["n"]
    assert found["more"][1] == "text"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_is_the_same_in_every_precision(dtype: torch.dtype) -> None:
    like = torch.zeros(4, 5, dtype=dtype)
    plain = normal_like(torch.zeros(4, 5), generator())
    assert torch.equal(normal_like(like, generator()), plain.to(dtype))
    assert torch.equal(normal_like(like, generator(), torch.float64), plain.double())


@pytest.mark.parametrize("sides", [(64,), (48, 64), (16, 16, 16)])
def test_amplitudes_fall_as_the_frequency_rises(sides: tuple[int, ...]) -> None:
    maps = with_spectrum_of_photos(torch.randn(64, 3, *sides, generator=generator()))
    assert maps.shape == (64, 3, *sides)
    assert float(maps.square().mean()) == pytest.approx(1, abs=1e-5)
    waves = torch.fft.fftn(maps.double(), dim=tuple(range(2, maps.dim())))
    along_first = waves[(..., *[0] * (len(sides) - 1))]
    power = along_first.abs().square().mean((0, 1))
    assert float(power[2] / power[4]) == pytest.approx(4, rel=0.4)


def test_means_and_variances_are_those_of_a_loop() -> None:
    x = 1e4 + torch.randn(3, 4, 5, 6, generator=generator())
    mean, variance = mean_and_variance(x)
    assert mean.shape == variance.shape == (1, 4, 1, 1)
    for channel in range(4):
        values = [float(v) for v in x[:, channel].double().flatten()]
        centre = sum(values) / len(values)
        assert float(mean[0, channel]) == pytest.approx(centre, rel=1e-6)
        wanted = sum((v - centre) ** 2 for v in values) / len(values)
        assert float(variance[0, channel]) == pytest.approx(wanted, rel=1e-3)
    assert mean_and_variance(x.double())[0].dtype == torch.float64
    assert mean_and_variance(x.half())[1].dtype == torch.float32
