"""Synthetic calibration: images on which the norms find what they remember; the model is never touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning._utils import cache as _cache
from ss_pruning._utils.progress import listening
from ss_pruning.compensation.synthetic_data import default_images, synthesize, synthetic_images
from ss_pruning.config import SyntheticImages
from ss_pruning.errors import InputError, ModelError
from tests.support.snapshot import snapshot

EXAMPLE = torch.zeros(1, 3, 8, 8)
FEW = SyntheticImages(images=8, steps=5)


class Net(nn.Module):
    """Two normalised convolutions and a classifier; the norms have seen real (here: shifted, scaled) data."""

    def __init__(self, seen: int = 20) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.train()
        for _ in range(seen):
            self(0.5 + 2 * torch.randn(16, 3, 8, 8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def surprise(net: Net, images: Tensor) -> float:
    """By plain loops: how far what the norms see is from what they remember, over channels and norms."""
    seen: dict[nn.Module, Tensor] = {}
    norms = (net.bn1, net.bn2)
    handles = [norm.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for norm in norms]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for norm in norms:
        for c in range(norm.num_features):
            values = seen[norm][:, c].flatten()
            deviation = float(norm.running_var[c]) ** 0.5
            total += ((float(values.mean()) - float(norm.running_mean[c])) / deviation) ** 2
            total += (float(values.std()) / deviation - 1) ** 2
    return total / 16


def test_norms_find_what_they_remember(net: Net) -> None:
    images = synthesize(net, EXAMPLE, SyntheticImages(32, 150))
    assert images.shape == (32, 3, 8, 8)
    assert surprise(net, images) < 0.25 * surprise(net, torch.randn(32, 3, 8, 8))


def test_a_seed_gives_the_same_images_again(net: Net) -> None:
    first, again = synthesize(net, EXAMPLE, FEW), synthesize(net, EXAMPLE, FEW)
    assert torch.equal(first, again)
    assert not torch.equal(first, synthesize(net, EXAMPLE, replace(FEW, seed=1)))


class Drawing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_a_model_that_draws_numbers_gives_the_same_images_again() -> None:
    net = Drawing()
    assert torch.equal(synthesize(net, EXAMPLE, FEW), synthesize(net, EXAMPLE, FEW))


def test_batches_cover_all_images_and_report_steps(net: Net) -> None:
    steps: list[tuple[float, float]] = []
    with listening(lambda done, total: steps.append((done, total))):
        images = synthesize(net, EXAMPLE, SyntheticImages(139, 2))
    assert len(images) == 139
    assert torch.equal(images[70:], images[:69].flip(-1))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_type_and_place_are_those_of_the_example(net: Net) -> None:
    assert synthesize(net.double(), EXAMPLE.double(), FEW).dtype == torch.float64
    assert synthesize(net.bfloat16(), EXAMPLE.bfloat16(), FEW).dtype == torch.bfloat16


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(net: Net, context: Any) -> None:
    expected = synthesize(net, EXAMPLE, FEW)
    with context():
        assert torch.equal(synthesize(net, EXAMPLE, FEW), expected)


@pytest.mark.parametrize("example", [EXAMPLE[..., 0], EXAMPLE[..., None]])
def test_other_numbers_of_axes(example: Tensor) -> None:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if example.dim() == 3 else (nn.Conv3d, nn.BatchNorm3d)
    net = nn.Sequential(conv(3, 4, 1), norm(4)).eval()
    assert synthesize(net, (example,), FEW).shape == (8, *example.shape[1:])


def test_the_model_is_left_alone(net: Net) -> None:
    net.train()
    net.conv1.weight.requires_grad_(False)
    before, random = snapshot(net), torch.get_rng_state()
    synthesize(net, EXAMPLE, FEW)
    assert snapshot(net) == before
    assert torch.equal(torch.get_rng_state(), random)


class Overflowing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.inf


@pytest.mark.parametrize(
    ("make", "example", "message"),
    [
        (Overflowing, EXAMPLE, "NaN or Inf"),
        (Net, EXAMPLE[:, :2], "does not run"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
            EXAMPLE,
            "nothing to synthesize from",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
            EXAMPLE,
            "nothing to synthesize from",
        ),
    ],
)
def test_a_model_that_has_no_synthetic_images_says_so_and_is_left_alone(
    make: Any, example: Tensor, message: str
) -> None:
    net = make().train()
    before = snapshot(net)
    with pytest.raises(ModelError, match=message):
        synthesize(net, example, FEW)
    assert snapshot(net) == before


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(1, 5), torch.zeros(1, 3, 8, 8, dtype=torch.long), (EXAMPLE, EXAMPLE)],
)
def test_inputs_that_are_no_images(net: Net, inputs: Any) -> None:
    with pytest.raises(InputError, match="makes images"):
        synthesize(net, inputs, FEW)


def test_the_image_may_come_in_a_tuple_or_by_name(net: Net) -> None:
    alone = synthesize(net, EXAMPLE, FEW)
    assert torch.equal(synthesize(net, (EXAMPLE,), FEW), alone)
    assert torch.equal(synthesize(net, {"x": EXAMPLE}, FEW), alone)


@pytest.mark.parametrize("wrong", [{"images": 0}, {"steps": 0}])
def test_numbers_that_are_not_positive(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="positive"):
        replace(FEW, **wrong)


def test_large_images_are_fewer() -> None:
    assert [default_images(torch.zeros(1, 3, side, side)) for side in (8, 32, 224, 1024)] == [
        256,
        256,
        41,
        32,
    ]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise AssertionError("made anew")

    monkeypatch.setattr("ss_pruning.compensation.synthetic_data.synthesize", fail)


def test_the_cache_hands_out_what_was_made(net: Net, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = synthetic_images(net, EXAMPLE, FEW)
    assert torch.equal(first, synthesize(net, EXAMPLE, FEW))
    assert len(list(cache.iterdir())) == 1
    forbid(monkeypatch)
    assert torch.equal(synthetic_images(net, EXAMPLE, FEW), first)


@pytest.mark.parametrize("change", ["seed", "steps", "images", "weights", "structure"])
def test_the_cache_knows_models_and_settings_apart(
    net: Net, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic_images(net, EXAMPLE, FEW)
    forbid(monkeypatch)
    numbers: dict[str, int] = {change: 3} if change in ("seed", "steps", "images") else {}
    if change == "weights":
        net.bn2.running_var[3] *= 1.01
    if change == "structure":
        net.bn1.eps = 1e-3
    with pytest.raises(AssertionError, match="made anew"):
        synthetic_images(net, EXAMPLE, replace(FEW, **numbers))


@pytest.mark.parametrize("damage", ["truncated", "other tensor", "wrong shape", "NaN"])
def test_a_damaged_cache_file_is_written_anew(net: Net, cache: Path, damage: str) -> None:
    first = synthetic_images(net, EXAMPLE, FEW)
    (path,) = cache.iterdir()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    else:
        name = "others" if damage == "other tensor" else "images"
        value = torch.full((3, 3), 1.0) if damage == "wrong shape" else torch.full_like(first, torch.nan)
        _cache.write(path.stem, {name: value})
    assert torch.equal(synthetic_images(net, EXAMPLE, FEW), first)
    tensors = _cache.read(path.stem) or {}
    assert torch.equal(tensors["images"], first)


def test_an_unwritable_cache_costs_only_time(net: Net, cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert len(synthetic_images(net, EXAMPLE, FEW)) == 8


def test_prune_makes_synthetic_images_from_the_dense_model(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    images = synthetic_images(net, EXAMPLE, SyntheticImages(256))
    stages: list[str] = []
    torch.manual_seed(0)
    twin = Net()
    report = prune_(
        net,
        EXAMPLE,
        ratio=0.4,
        compensation="reconstruct",
        calibration="synthetic",
        progress=lambda stage, done, total: stages.append(stage),
    )
    prune_(twin, EXAMPLE, ratio=0.4, compensation="reconstruct", calibration=images)
    assert report.settings["calibration"] == "synthetic"
    assert {name: t.tolist() for name, t in net.state_dict().items()} == {
        name: t.tolist() for name, t in twin.state_dict().items()
    }
    assert "synthesize" not in stages  # all was in the cache
    assert "cut" in stages


def test_prune_reports_the_steps(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int, int]] = []
    report = prune_(
        net,
        EXAMPLE,
        ratio=0.4,
        compensation="mean",
        calibration="synthetic",
        progress=lambda *stage: stages.append(stage),
    )
    steps = [(done, total) for stage, done, total in stages if stage == "synthesize"]
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    assert report.seconds["synthesize"] > 0


def test_prune_leaves_a_model_without_norms_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    before = snapshot(net)
    with pytest.raises(ModelError, match="nothing to synthesize from"):
        prune_(net, EXAMPLE, ratio=0.4, compensation="reconstruct", calibration="synthetic")
    assert snapshot(net) == before


def test_prune_refuses_other_words(net: Net) -> None:
    with pytest.raises(InputError, match="'syntetic' is unknown"):
        prune_(net, EXAMPLE, ratio=0.4, compensation="reconstruct", calibration="syntetic")
