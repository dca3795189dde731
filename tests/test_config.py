"""What can be asked for, and what is taken for what is not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from ss_pruning.config import (
    LEAST_IMAGES,
    Allocation,
    Budget,
    Compensation,
    Config,
    FoldLinear,
    FoldMean,
    NoCompensation,
    Reconstruct,
    Synaptic,
    SyntheticImages,
)
from ss_pruning.errors import InputError

HALF = Budget("macs", 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scope": "some"}, "scope='some' is unknown; use 'global', 'local', 'sensitivity'"),
        ({"max_ratio": 0.0}, r"max_ratio=0.0 must lie in \(0, 1\]"),
        ({"max_ratio": 1.5}, "max_ratio=1.5"),
        ({"max_ratio": True}, "max_ratio=True is no number"),
        ({"round_to": True}, "round_to=True is no number"),
        ({"cost_exponent": True}, "cost_exponent=True is no number"),
        ({"round_to": 0}, "round_to=0"),
        ({"round_to": 2.5}, "round_to=2.5 must be a positive whole number, such as 8, or 'measured'"),
        ({"cost_exponent": -1}, "cost_exponent=-1"),
    ],
)
def test_an_allocation_refuses_what_it_cannot_do(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Allocation(**wrong)


def test_short_forms() -> None:
    assert Allocation.of("local") == Allocation(scope="local")
    assert Allocation.of(None) == Allocation()
    assert Compensation.of("mean") == FoldMean(recalibrate=True)
    assert Compensation.of("linear") == FoldLinear(recalibrate=True)
    assert Compensation.of("reconstruct") == Reconstruct(recalibrate=False)
    assert Compensation.of("none") == NoCompensation(recalibrate=False)
    assert Compensation.of(FoldMean(recalibrate=False)) == FoldMean(recalibrate=False)
    with pytest.raises(InputError, match="compensation='kind' is unknown; use 'none', 'mean', 'linear'"):
        Compensation.of("kind")
    with pytest.raises(InputError, match="allocation=8 is none"):
        Allocation.of(8)  # type: ignore[arg-type]


def test_settings_cannot_be_changed_behind_a_calls_back() -> None:
    with pytest.raises(FrozenInstanceError):
        Allocation().max_ratio = 0.5  # type: ignore[misc]
    with pytest.raises(InputError, match="images=0"):
        SyntheticImages(images=0)
    with pytest.raises(InputError, match="recalibrate=1"):
        FoldMean(recalibrate=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compensation", "images", "noise", "scope", "exponent", "score", "conditional"),
    [
        ("none", 0, True, "global", 0.75, "relevance", 0.0),
        ("mean", 0, True, "sensitivity", 0.75, "relevance", 0.0),
        ("mean", 0, False, "global", 0.75, "relevance", 0.0),
        ("none", LEAST_IMAGES, True, "sensitivity", 1.0, "relevance", 0.0),
        ("none", LEAST_IMAGES - 1, True, "global", 0.75, "relevance", 0.0),
        ("linear", 100, False, "sensitivity", 1.0, "share", 1.0),
        ("reconstruct", LEAST_IMAGES - 1, False, "global", 0.5, "share", 0.5),
    ],
)
def test_defaults(
    compensation: str, images: int, noise: bool, scope: str, exponent: float, score: str, conditional: float
) -> None:
    config = Config(HALF, compensation=Compensation.of(compensation)).resolve(images, noise)
    assert (config.allocation.scope, config.allocation.cost_exponent) == (scope, exponent)
    assert config.importance == Synaptic("data" if images else "gaussian", score, conditional)  # type: ignore[arg-type]
    assert config.resolve(images, noise) == config  # nothing is left to resolve


def test_what_was_said_is_kept() -> None:
    asked = Config(HALF, Allocation("local", cost_exponent=0.3), FoldMean(), Synaptic(score="entropy"))
    config = asked.resolve(100, noise=True)
    assert config.allocation == asked.allocation
    assert config.importance == Synaptic("data", "entropy", 0.0)
    assert Config(HALF, importance=(mine := object())).resolve(0, noise=False).importance is mine


def test_a_report_stores_the_effective_settings() -> None:
    settings = Config(HALF, compensation=Reconstruct()).resolve(64, noise=False).settings()
    assert settings == {
        "macs": 0.5,
        "importance": "SynapticImportance",
        "statistics": "data",
        "score": "share",
        "conditional": 1.0,
        "scope": "sensitivity",
        "max_ratio": 0.9,
        "round_to": None,
        "cost_exponent": 1.0,
        "compensation": "reconstruct",
        "recalibrate": False,
    }


def test_it_is_light() -> None:
    """No torch is loaded for a configuration, so that `--help` is quick."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ss_pruning.config; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
