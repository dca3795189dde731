"""Example and calibration inputs in all forms: what the model takes counts, not how it is written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ss_pruning import SynapticImportance, prune_
from ss_pruning.config import NoCompensation
from ss_pruning.errors import InputError
from ss_pruning.graph import trace
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.calibration import Batch, gather
from tests.support.snapshot import snapshot
from tests.support.zoo import randomise

IMAGES = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(0))
METHODS = ["mean", "linear", "reconstruct"]
FRAMES = 4


class Net(nn.Module):
    """Two convolutions and a head; the other nets change what they take."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def pooled(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.n(self.a(x)).relu()).relu()
        return y.mean((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.c(self.pooled(image))
        return answer


class OneImage(Net):
    """As converters from ONNX write it."""

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.c(self.pooled(image).reshape(1, 16))
        return answer


class Unbatched(nn.Module):
    """Takes an image `[3, height, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.c(self.b(self.a(image).relu()).relu().mean((1, 2)))
        return answer


class Frames(Net):
    """Clips, of which each frame is one row of the batch."""

    def forward(self, image: Tensor) -> Tensor:
        y = self.pooled(image)
        answer: Tensor = self.c(y.view(-1, FRAMES, y.shape[1]).mean(1))
        return answer


class Clips(Net):
    """The same net, on clips `[clips, frames, 3, height, width]`."""

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.c(self.pooled(image.flatten(0, 1)).unflatten(0, (-1, FRAMES)).mean(1))
        return answer


class Two(Net):
    """Red, and the other two channels."""

    def forward(self, red: Tensor, rest: Tensor, *, scale: float = 1.0) -> Tensor:
        return super().forward(scale * torch.cat([red, rest], 1))


def made(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind().eval())


def pruned(kind: type[nn.Module], example: Any, **options: Any) -> dict[str, Tensor]:
    """By the global scope, which is quick, where images would have output error measured."""
    model, scope = made(kind), "global" if "calibration" in options else None
    prune_(model, example, ratio=0.4, **{"allocation": scope, **options})
    return model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"compensation": "mean"}, {"compensation": NoCompensation(recalibrate=True)}], ids=str
)
def test_forms_and_batch_sizes_of_the_example_give_one_plan(options: dict[str, Any]) -> None:
    x = IMAGES[:1]
    expected = pruned(Net, x, **options)
    for example in ((x,), {"image": x}, IMAGES[:8], {"image": IMAGES[:3]}):
        same(pruned(Net, example, **options), expected)


@pytest.mark.parametrize("method", ["linear"])
def test_forms_of_calibration_batches_give_one_model(method: str) -> None:
    expected = pruned(Net, IMAGES[:1], compensation=method, calibration=IMAGES)
    labels = torch.arange(32)
    halves = IMAGES.split(16)
    for calibration in (
        list(halves),
        halves,
        (half for half in halves),
        DataLoader(TensorDataset(IMAGES, labels), batch_size=12),
        [{"pixel_values": half, "labels": labels[:16]} for half in halves],
        {"image": IMAGES},
        [((half,), labels[:16]) for half in halves],
        [IMAGES.double()],
    ):
        same(pruned(Net, IMAGES[:1], compensation=method, calibration=calibration), expected)
    for example in ((IMAGES[:1],), {"image": IMAGES[:1]}):
        for calibration in (IMAGES, [(IMAGES, labels)], [{"image": IMAGES, "labels": labels}]):
            same(pruned(Net, example, compensation=method, calibration=calibration), expected)


@pytest.mark.parametrize("method", METHODS)
def test_several_inputs_are_calibrated_like_one(method: str) -> None:
    """The oracle is the same net with both inputs in one tensor."""
    expected = pruned(Net, IMAGES[:1], compensation=method, calibration=IMAGES)
    red, rest, labels = IMAGES[:, :1], IMAGES[:, 1:], torch.arange(32)
    parts = list(zip(red.split(16), rest.split(16), labels.split(16), strict=True))
    named = [{"labels": y, "rest": b, "red": a} for a, b, y in parts]
    for calibration in (
        (red, rest),
        [(red, rest)],
        parts,
        [[a, b] for a, b, _ in parts],
        [((a, b), y) for a, b, y in parts],
    ):
        same(pruned(Two, (red[:1], rest[:1]), compensation=method, calibration=calibration), expected)
    example = {"red": red[:2], "rest": rest[:2], "scale": 1.0}
    for calibration in (named, [(batch, 0) for batch in named], {"red": red, "rest": rest}):
        same(pruned(Two, example, compensation=method, calibration=calibration), expected)


class OfDict(Two):
    """Takes one dict, which holds all of its inputs, as detectors of some packages do."""

    def forward(self, inputs: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(inputs["red"], inputs["rest"])


def test_a_dict_as_the_one_argument_is_calibrated_like_an_image() -> None:
    expected = pruned(Net, IMAGES[:1], compensation="mean", calibration=IMAGES)
    batches = [{"red": x[:, :1], "rest": x[:, 1:], "labels": torch.zeros(16)} for x in IMAGES.split(16)]
    example = ({"red": IMAGES[:1, :1], "rest": IMAGES[:1, 1:]},)
    for calibration in (batches, [(batch,) for batch in batches], [(batch, 0) for batch in batches]):
        same(pruned(OfDict, example, compensation="mean", calibration=calibration), expected)
    with pytest.raises(InputError, match=r"dicts with the keys \['red', 'rest'\]"):
        pruned(OfDict, example, compensation="mean", calibration=[IMAGES])


@pytest.mark.parametrize("scope", ["global", None])
@pytest.mark.parametrize("method", METHODS)
def test_frames_in_the_batch_are_calibrated_like_clips(method: str, scope: Any) -> None:
    """The oracle is the net that takes whole clips; a clip cut in two by a batch of 64 or 10 would not run.

    Reconstruction fits, and is measured for, samples drawn clip by clip in the one, frame by frame in the other.
    """
    expected = pruned(
        Clips,
        IMAGES[:4].unflatten(0, (1, 4)),
        compensation=method,
        calibration=IMAGES.unflatten(0, (-1, 4)),
        allocation=scope,
    )
    more = torch.cat([IMAGES, IMAGES[:3]])  # the last three are no clip
    for calibration in (IMAGES, list(more.split(10))):
        found = pruned(Frames, IMAGES[:4], compensation=method, calibration=calibration, allocation=scope)
        if method == "reconstruct":
            assert found.keys() == expected.keys()
            assert all(bool(tensor.isfinite().all()) for tensor in found.values())
        else:
            same(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance": tp.importance.GroupMagnitudeImportance()},
        {"compensation": "mean"},
        {"compensation": "mean", "calibration": IMAGES, "allocation": "global"},
        {"compensation": "linear", "calibration": IMAGES, "allocation": "global"},
        {"compensation": NoCompensation(recalibrate=True)},
    ],
    ids=["default", "magnitude", "mean", "mean-images", "linear-images", "recalibrated"],
)
@pytest.mark.parametrize("kind", [OneImage, Unbatched])
def test_a_model_for_one_image_is_pruned(kind: type[nn.Module], options: dict[str, Any]) -> None:
    example = IMAGES[:1] if kind is OneImage else IMAGES[0]
    if kind is Unbatched and "calibration" in options:
        options = {**options, "calibration": list(IMAGES)}
    assert pruned(kind, example, **options)["b.weight"].shape != (16, 16, 3, 3)


def test_a_model_for_one_image_is_reconstructed() -> None:
    report = prune_(
        made(OneImage),
        IMAGES[:1],
        ratio=0.4,
        compensation="reconstruct",
        calibration=IMAGES,
        allocation="global",
    )
    assert report.fidelity is not None
    assert report.fidelity_uncompensated is not None
    assert report.fidelity.error < report.fidelity_uncompensated.error / 2


def test_noise_image_by_image_says_what_noise_in_a_batch_does() -> None:
    x = IMAGES[:1].repeat(1, 1, 4, 4)
    models = made(Net), made(OneImage)
    one, many = (
        measure(model, trace(model, x), "gaussian", x, ["a", "b", "c"]) for model in (models[1], models[0])
    )
    for path in ("a", "b", "c"):
        # A head sees 16 vectors, of which the variance is known to within a third or so a channel.
        ratio = float(one[path].variance.sum() / many[path].variance.sum())
        assert ratio == pytest.approx(1, rel=0.3 if path == "c" else 0.05)


@pytest.mark.parametrize("images", [IMAGES[:1], torch.zeros(12, 3, 12, 12)], ids=["one", "blank ones"])
def test_inputs_that_tell_less_than_noise_are_not_used(images: Tensor) -> None:
    """Of one image the vectors behind pooling do not vary: all scores were 0, and means were that image's."""
    without, few = made(), made()
    prune_(without, IMAGES[:1], ratio=0.4, compensation="mean")
    report = prune_(few, IMAGES[:1], ratio=0.4, compensation="mean", calibration=images)
    assert report.settings["statistics"] == "gaussian"
    assert f"{len(images)} calibration inputs were given and not used" in report.to_html()
    for a, b in zip(without.state_dict().values(), few.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_samples_that_differ_are_counted() -> None:
    assert Batch.of(torch.zeros(5, 3)).different() == 1
    assert Batch.of((IMAGES[:4], torch.zeros(4))).different() == 4
    assert Batch.of(([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5), torch.zeros(3, 4, 4)],)).different() == 2
    assert Batch.of(IMAGES[:0]).different() == 0


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(InputError, match=r"batches of 4.* there are 3"):
        prune_(made(Frames), IMAGES[:4], ratio=0.3, compensation="mean", calibration=IMAGES[:3])


def test_calibration_comes_to_the_precision_of_the_model() -> None:
    model = made().double()
    prune_(model, IMAGES[:1].double(), ratio=0.4, compensation="reconstruct", calibration=IMAGES)
    twin = made().double()
    prune_(twin, IMAGES[:1].double(), ratio=0.4, compensation="reconstruct", calibration=IMAGES.double())
    same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["none", *METHODS])
def test_a_broken_image_is_named(method: str, value: float) -> None:
    broken = IMAGES.clone()
    broken[21, 1, 2, 3] = value
    model = made()
    before = snapshot(model)
    with pytest.raises(InputError, match="batch 1 holds NaN or Inf at index 5"):
        prune_(model, IMAGES[:1], ratio=0.4, compensation=method, calibration=broken.split(16))
    assert snapshot(model) == before


def test_a_broken_image_among_those_for_statistics_is_named() -> None:
    importance = SynapticImportance(statistics=[IMAGES, IMAGES / 0])
    with pytest.raises(InputError, match="batch 1 holds NaN or Inf at index 0"):
        prune_(made(), IMAGES[:1], ratio=0.4, importance=importance)


class Photos(torch.utils.data.Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return IMAGES[index]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            ["a.jpg", "b.jpg"],
            r"batch 0 is a str; give tensors with 4 axes, like the example's \[1, 3, 10, 10\]",
        ),
        (iter([]), "are empty"),
        (torch.zeros(0, 3, 10, 10), "are empty"),
        (7, "is a int, which gives no batches"),
        (Photos(), "DataLoader"),
        (list(IMAGES), r"batch 0 is a tensor of shape \[3, 10, 10\]; give tensors with 4 axes"),
        ((IMAGES, torch.arange(32)), r"batch 1 is a tensor of shape \[32\]"),
        ([IMAGES.mul(255).byte()], "batch 0 is torch.uint8, the example input torch.float32"),
        ([{"a": IMAGES, "b": IMAGES}], r"keys \['a', 'b'\], of which 2"),
        ([IMAGES, IMAGES[..., :8]], "different shapes"),
        ([IMAGES.to("meta")], "meta"),
        ([IMAGES.numpy()], "ndarray"),
        ([None], "NoneType"),
    ],
)
def test_what_is_no_calibration_says_what_would_be(calibration: Any, message: str) -> None:
    model = made()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        prune_(model, IMAGES[:1], ratio=0.4, compensation="mean", calibration=calibration)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("example", "calibration", "message"),
    [
        ((IMAGES[:1, :1], IMAGES[:1, 1:]), [IMAGES], "tuples of 2 tensors"),
        ((IMAGES[:1, :1], IMAGES[:1, 1:]), [(IMAGES,)], "has 1 entries; give tuples of 2 tensors"),
        ((IMAGES[:1, :1], IMAGES[:1, 1:]), [{"red": IMAGES}], "tuples of 2 tensors"),
        ({"red": IMAGES[:1, :1], "rest": IMAGES[:1, 1:]}, [{"red": IMAGES}], "no 'rest'"),
        ({"red": IMAGES[:1, :1], "rest": IMAGES[:1, 1:]}, [IMAGES], r"dicts with the keys \['red', 'rest'\]"),
    ],
)
def test_what_is_missing_of_several_inputs_is_named(example: Any, calibration: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune_(made(Two), example, ratio=0.4, compensation="mean", calibration=calibration)


def test_a_generator_for_statistics_serves_every_step() -> None:
    x = IMAGES[:1]

    def widths(statistics: Any) -> Iterator[int]:
        model = made()
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            SynapticImportance(statistics=statistics),
            pruning_ratio=0.5,
            iterative_steps=2,
            ignored_layers=[model.c],
        )
        for _ in range(2):
            pruner.step()
            yield from (len(p) for p in model.parameters())

    assert list(widths(half for half in IMAGES.split(16))) == list(widths(IMAGES.split(16)))


def test_a_batch_is_cut_repeated_and_joined_along_its_samples() -> None:
    grid, n = torch.rand(5, 2), torch.arange(6.0)
    batch = Batch.of({"x": n[:, None], "boxes": [n[i : i + 1] for i in range(6)], "grid": grid, "flag": True})
    assert (len(batch), batch.batched) == (6, (True, True, False, False))
    some = batch[torch.tensor([4, 1])]
    assert (len(some), some.inputs["x"].flatten().tolist()) == (2, [4, 1])
    assert torch.cat(some.inputs["boxes"]).tolist() == [4, 1]
    assert some.inputs["grid"] is grid
    assert batch.repeated(2).inputs["x"].flatten().tolist() == 2 * n.tolist()
    assert torch.cat(batch.resized(8).inputs["boxes"]).tolist() == [*n.tolist(), 0, 1]
    assert [len(part) for part in batch.split(4)] == [4, 2]
    assert [len(part) for part in batch.limited(2, None).split(5)] == [4, 2]
    assert [len(part) for part in batch.limited(4, 4).split(64)] == [4]
    both = gather(
        [{"x": part.inputs["x"], "grid": grid} for part in batch.split(4)], {"x": n[:1, None], "grid": grid}
    )
    assert torch.equal(both.inputs["x"], n[:, None])
    assert torch.equal(both.inputs["grid"], grid)
    with pytest.raises(InputError, match="no row a sample and differs"):
        gather(
            [{"x": part.inputs["x"], "grid": grid + len(part)} for part in batch.split(4)],
            {"x": n[:1, None], "grid": grid},
        )


def test_lists_of_images_are_gathered_as_detectors_take_them() -> None:
    example = [IMAGES[0], IMAGES[1]]
    for calibration in (
        list(IMAGES),
        [list(IMAGES[:9]), list(IMAGES[9:])],
        [(tuple(IMAGES), tuple(range(32)))],
    ):
        found = gather(calibration, example)
        assert len(found) == 32
        assert torch.equal(torch.stack(found.inputs), IMAGES)


def test_samples_are_chosen_without_a_copy_and_run_in_one() -> None:
    batch = Batch.of((IMAGES, torch.arange(32)))
    chosen = batch.limited(2, None).of_units(torch.tensor([3, 0])).repeated(2).split(4)[1]
    assert chosen.source is batch.source
    images, numbers = chosen.inputs
    assert numbers.tolist() == [6, 7, 0, 1]
    assert torch.equal(images, IMAGES[numbers])
    assert chosen.numbers == 301
    before = IMAGES.clone()
    batch.inputs[0].zero_()  # as a model does that normalises in place
    assert torch.equal(IMAGES, before)
