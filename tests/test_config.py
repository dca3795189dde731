"""What can be asked for, and what is taken for what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from fractions import Fraction
from typing import Any

import numpy as np
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
from ss_pruning.recovery.settings import Recovery

HALF = Budget("macs", 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scope": "some"}, "scope='some' is unknown; use 'global', 'local', 'sensitivity'"),
        ({"scope": ["local"]}, r"scope=\['local'\] is unknown"),
        ({"heads": "half"}, "heads='half' is unknown"),
        ({"max_ratio": 0.0}, r"max_ratio=0.0 must be a number in \(0, 1\]"),
        ({"max_ratio": 1.5}, "max_ratio=1.5"),
        ({"max_ratio": True}, "max_ratio=True must be a number"),
        ({"max_ratio": "0.5"}, "max_ratio='0.5' must be a number"),
        ({"max_ratio": None}, "max_ratio=None must be a number"),
        ({"max_ratio": np.array([1, 2])}, r"max_ratio=array\(\[1, 2\]\) must be a number"),
        ({"round_to": True}, "round_to=True"),
        ({"round_to": np.array([4, 8])}, r"round_to=array\(\[4, 8\]\) must be a positive whole number"),
        ({"round_to": 10**20}, "round_to=10+ must be a positive whole number"),
        ({"cost_exponent": True}, "cost_exponent=True must be a number"),
        ({"cost_exponent": "1"}, "cost_exponent='1' must be a number"),
        ({"cost_exponent": float("nan")}, "cost_exponent=nan"),
        ({"round_to": 0}, "round_to=0"),
        ({"round_to": 2.5}, "round_to=2.5 must be a positive whole number, such as 8, or 'measured'"),
        ({"cost_exponent": -1}, "cost_exponent=-1"),
    ],
)
def test_an_allocation_refuses_what_it_cannot_do(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Allocation(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"statistics": "some"}, "statistics='some' is unknown; use 'batchnorm', 'gaussian', 'data'"),
        ({"statistics": ["data"]}, r"statistics=\['data'\] is unknown"),
        ({"score": 1}, "score=1 is unknown"),
        ({"conditional": "1"}, "conditional='1' must be a number in"),
        ({"conditional": 1.5}, "conditional=1.5"),
    ],
)
def test_a_criterion_refuses_what_it_cannot_do(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Synaptic(**wrong)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (Synaptic, r"importance is the class Synaptic; give one that was made, Synaptic\(\)"),
        (5, "importance=5 is none; give a name"),
        (["magnitude"], r"importance=\['magnitude'\] is none"),
    ],
)
def test_an_importance_is_one(importance: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(HALF, importance=importance)


def test_numbers_of_numpy_are_numbers() -> None:
    """Reports and checkpoints hold them as JSON."""
    made = Allocation(max_ratio=np.float32(0.5), round_to=np.int64(4), cost_exponent=np.float16(1))  # type: ignore[arg-type]
    settings = Config(
        Budget.of(macs=np.float32(0.5)), made, importance=Synaptic(conditional=np.float32(1))
    ).settings()  # type: ignore[arg-type]
    assert json.loads(json.dumps(settings)) == settings
    assert (settings["macs"], settings["max_ratio"], settings["round_to"]) == (0.5, 0.5, 4)
    recovery = Recovery(rate=np.float32(0.5), batch=np.int32(8), seed=np.uint8(3))  # type: ignore[arg-type]
    assert json.dumps(asdict(recovery)) == json.dumps(asdict(Recovery(rate=0.5, batch=8, seed=3)))
    assert Budget.of(ratio=Fraction(1, 2)) == Budget("ratio", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, "0"])
@pytest.mark.parametrize("kind", [SyntheticImages, Recovery])
def test_a_seed_is_one_of_numpys_and_torchs(kind: Any, seed: Any) -> None:
    with pytest.raises(InputError, match="seed="):
        kind(seed=seed)


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
    ("compensation", "images", "scope", "exponent", "score", "conditional"),
    [
        ("none", 0, "global", 0.75, "relevance", 0.0),
        ("mean", 0, "global", 0.75, "relevance", 0.0),
        ("none", LEAST_IMAGES, "sensitivity", 1.0, "relevance", 0.0),
        ("none", LEAST_IMAGES - 1, "global", 0.75, "relevance", 0.0),
        ("linear", 100, "sensitivity", 1.0, "share", 1.0),
        ("reconstruct", LEAST_IMAGES - 1, "global", 0.5, "share", 0.5),
    ],
)
def test_defaults(
    compensation: str, images: int, scope: str, exponent: float, score: str, conditional: float
) -> None:
    config = Config(HALF, compensation=Compensation.of(compensation)).resolve(images)
    assert (config.allocation.scope, config.allocation.cost_exponent) == (scope, exponent)
    assert config.importance == Synaptic("data" if images else "gaussian", score, conditional)  # type: ignore[arg-type]
    assert config.resolve(images) == config  # nothing is left to resolve


def test_what_was_said_is_kept() -> None:
    asked = Config(
        HALF, Allocation("local", cost_exponent=0.3, heads="whole"), FoldMean(), Synaptic(score="entropy")
    )
    config = asked.resolve(100)
    assert config.allocation == asked.allocation
    assert config.importance == Synaptic("data", "entropy", 0.0)
    assert Config(HALF, importance=(mine := print)).resolve(0).importance is mine


def test_a_report_stores_the_effective_settings() -> None:
    settings = Config(HALF, compensation=Reconstruct()).resolve(64).settings()
    assert settings == {
        "macs": 0.5,
        "importance": "SynapticImportance",
        "statistics": "data",
        "score": "share",
        "conditional": 1.0,
        "scope": "sensitivity",
        "heads": "narrow",
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


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_few_inputs_are_used_where_noise_would_not_do(compensation: str) -> None:
    config = Config(HALF, compensation=Compensation.of(compensation))
    assert [config.uses(n) for n in (1, LEAST_IMAGES - 1, LEAST_IMAGES)] == [False, False, True]
    for asked in (
        replace(config, importance=Synaptic("data")),
        replace(config, allocation=Allocation("sensitivity")),
        replace(config, compensation=FoldLinear()),
    ):
        assert asked.uses(1)
