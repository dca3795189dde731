"""Recalibrated batch norms: the statistics of what reaches them, and nothing else is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import prune_
from ss_pruning.compensation.batchnorm import noise_like, recalibrate_
from ss_pruning.config import COMPENSATIONS, FoldMean
from ss_pruning.errors import ModelError
from ss_pruning.graph.traced import TracedModel
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.plan import Plan
from tests.support.snapshot import snapshot
from tests.support.zoo import randomise


class Net(nn.Module):
    """Three convolutions with norms; the last norm runs twice, with frozen and instance norms beside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, momentum=None)
        self.plain = nn.BatchNorm2d(6, track_running_stats=False)
        self.conv3, self.bn3 = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.plain(F.relu(self.bn2(self.conv2(x))))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn3(3 * x + 1))
        return self.fc(self.drop(x.mean((2, 3))))


def net() -> Net:
    torch.manual_seed(0)
    model = randomise(Net(), 0).double()
    assert isinstance(model, Net)
    return model


def images(n: int = 24) -> Tensor:
    return torch.randn(n, 3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


KEPT = (0, 2, 3, 5)


def cut(model: Net) -> tuple[Net, Plan]:
    """Without two of the channels between the second and the third convolution."""
    sides = (("conv2", "out"), ("bn2", "through"), ("plain", "through"), ("conv3", "in"))
    plan = Plan(tuple(Cut(path, side, 6, KEPT) for path, side in sides))  # type: ignore[arg-type]
    return plan.apply_(copy.deepcopy(model)), plan  # type: ignore[return-value]


def statistics(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel, from the definition."""
    rows = torch.cat([part.movedim(1, -1).reshape(-1, part.shape[1]) for part in parts])
    mean = rows.sum(0) / len(rows)
    return mean, ((rows - mean) ** 2).sum(0) / len(rows)


def seen_at(model: nn.Module, path: str, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What reaches a module and what it puts out, call by call, in evaluation mode."""
    found: list[tuple[Tensor, Tensor]] = []
    twin = copy.deepcopy(model).eval()
    twin.get_submodule(path).register_forward_hook(lambda module, args, out: found.append((args[0], out)))
    with torch.no_grad():
        twin(x)
    return [read for read, _ in found], [out for _, out in found]


def moved(model: Net, x: Tensor | None, like: Tensor, means: bool = True) -> tuple[Net, list[str]]:
    small, plan = cut(model)
    return small, recalibrate_(small, TracedModel.of(model, like), plan, x, means)


def test_a_norm_puts_out_the_mean_and_variance_that_the_dense_one_puts_out() -> None:
    model, x = net(), images()
    small, paths = moved(model, x, x)
    assert paths == ["bn2", "bn3"]
    for now, then in zip(
        statistics(seen_at(small, "bn2", x)[1]), statistics(seen_at(model, "bn2", x)[1]), strict=True
    ):
        torch.testing.assert_close(now, then[list(KEPT)], rtol=1e-3, atol=1e-3)
    old = cut(model)[0]
    assert not torch.allclose(
        statistics(seen_at(old, "bn3", x)[1])[1], statistics(seen_at(model, "bn3", x)[1])[1], rtol=0.1
    )


def test_statistics_are_those_of_the_formula() -> None:
    model, x = net(), images()
    small, _ = moved(model, x, x)
    (m, v), (m2, v2) = statistics(seen_at(model, "bn2", x)[0]), statistics(seen_at(small, "bn2", x)[0])
    for position, channel in enumerate(KEPT):
        e = model.bn2.eps
        centre, spread = float(model.bn2.running_mean[channel]), float(model.bn2.running_var[channel])
        was, now = float(v[channel]) + e, float(v2[position]) + e
        mean = float(m2[position]) + (centre - float(m[channel])) * (now / was) ** 0.5
        assert float(small.bn2.running_mean[position]) == pytest.approx(mean, rel=1e-9)
        assert float(small.bn2.running_var[position]) == pytest.approx((spread + e) * now / was - e, rel=1e-9)


def test_without_a_change_nothing_moves() -> None:
    model, x = net(), images()
    small = copy.deepcopy(model)
    everything = Plan((Cut("conv2", "out", 6, tuple(range(6))),))
    for given in (x, None):
        recalibrate_(small, TracedModel.of(model, x), everything, given)
        for name, value in small.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_calls_of_one_norm_are_pooled() -> None:
    model, x = net(), images()
    small, _ = moved(model, x, x)
    # By its second call the norm has the statistics of both calls: those stay.
    before, after = statistics(seen_at(model, "bn3", x)[0]), None
    first = copy.deepcopy(small)
    reads = seen_at(first, "bn3", x)[0]
    e = model.bn3.eps
    (m, v), (m2, v2) = (statistics(seen_at(model, "bn3", x)[0][:1]), statistics(reads[:1]))
    # What the first call had set, for what the second one reads.
    first.bn3.running_mean.copy_(m2 + (model.bn3.running_mean - m) * ((v2 + e) / (v + e)).sqrt())
    first.bn3.running_var.copy_((model.bn3.running_var + e) * (v2 + e) / (v + e) - e)
    after = statistics([reads[0], seen_at(first, "bn3", x)[0][1]])
    (m, v), (m2, v2) = before, after
    mean = m2 + (model.bn3.running_mean - m) * ((v2 + e) / (v + e)).sqrt()
    torch.testing.assert_close(small.bn3.running_mean, mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("means", [True, False])
def test_images_in_parts_move_norms_as_all_at_once_do(means: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of norms that run once: against a second pass over all images by hooks."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, affine=False),
    ]  # fmt: skip
    model = randomise(nn.Sequential(*layers), 0).double().eval()
    plan, x = (
        Plan((Cut("3", "out", 6, KEPT), Cut("4", "through", 6, KEPT), Cut("6", "in", 6, KEPT))),
        images(23),
    )
    found = []
    for at_once in (1, 2**23):
        monkeypatch.setattr("ss_pruning.compensation.passes.lockstep._AT_ONCE", at_once)
        small = plan.apply_(copy.deepcopy(model))
        before = small[7].running_mean.clone()
        assert recalibrate_(small, TracedModel.of(model, x), plan, x, means) == ["4", "7"]
        assert torch.equal(small[7].running_mean, before) is not means
        found.append(small)
    for a, b in zip(found[0].state_dict().values(), found[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    (_, v), (_, v2) = statistics(seen_at(model, "7", x)[0]), statistics(seen_at(found[0], "7", x)[0])
    e = model[7].eps
    torch.testing.assert_close(found[0][7].running_var, (model[7].running_var + e) * (v2 + e) / (v + e) - e)


def test_on_noise_a_norm_loses_what_a_removed_channel_brought() -> None:
    """Half of equal channels that do not hang together: half of the mean, half of the variance."""
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1, bias=False), nn.BatchNorm2d(1)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[2].weight.fill_(1.0)
        model[1].bias.fill_(3.0)
        model[3].running_mean.fill_(48.0)  # of signals twice as large
        model[3].running_var.fill_(32.0)
    x = torch.randn(2, 8, 32, 32)
    kept = (0, 2, 4, 6)
    plan = Plan((Cut("2", "in", 8, kept),))
    small = plan.apply_(copy.deepcopy(model))
    small[2].register_forward_pre_hook(lambda module, args: args[0][:, list(kept)])
    moved = copy.deepcopy(small)
    assert recalibrate_(moved, TracedModel.of(model, x), plan, None) == ["3"]
    assert float(moved[3].running_mean) == pytest.approx(24.0, rel=0.04)
    assert float(moved[3].running_var) == pytest.approx(16.0, rel=0.1)
    recalibrate_(small, TracedModel.of(model, x), plan, None, False)
    assert float(small[3].running_mean) == 48.0
    assert float(small[3].running_var) == pytest.approx(16.0, rel=0.1)


def test_large_images_run_in_such_numbers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ss_pruning.compensation.batchnorm._AT_ONCE", 20 * 7 * 5)
    model, x = net(), images(24)
    (some, _), (first, _) = moved(model, x, x), moved(model, x[:20], x)
    assert all(
        torch.equal(a, b)
        for a, b in zip(some.state_dict().values(), first.state_dict().values(), strict=True)
    )
    monkeypatch.setattr("ss_pruning.compensation.batchnorm._AT_ONCE", 1)
    (some, _), (first, _) = moved(model, x, x), moved(model, x[:16], x)
    assert all(
        torch.equal(a, b)
        for a, b in zip(some.state_dict().values(), first.state_dict().values(), strict=True)
    )


def test_noise_has_the_spectrum_of_photos() -> None:
    noise = noise_like({"x": torch.zeros(1, 3, 32, 32), "n": 3}).inputs["x"]
    assert noise.shape == (256, 3, 32, 32)
    assert float(noise.std()) == pytest.approx(1, rel=0.01)
    power = torch.fft.rfft2(noise).abs().square().mean((0, 1))
    assert float(power[0, 2] / power[0, 8]) == pytest.approx(16, rel=0.3)  # amplitude falls as 1 / f
    assert noise_like(torch.zeros(1, 3, 224, 224)).inputs.shape == (16, 3, 224, 224)
    several = noise_like((torch.zeros(2, 3, 8, 8), torch.ones(2, 2).long())).inputs
    assert several[0].shape == (256, 3, 8, 8)
    assert several[1].tolist() == [[1, 1]] * 256


@pytest.mark.parametrize("training", [False, True])
def test_nothing_else_is_changed(training: bool) -> None:
    model, x = net(), images()
    small, plan = cut(model)
    small.train(training)
    before = snapshot(small)
    dense = snapshot(model)
    recalibrate_(small, TracedModel.of(model, x), plan, x)
    recalibrate_(small, TracedModel.of(model, x), plan, None)
    assert snapshot(model) == dense
    after = snapshot(small)
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {f"bn{n}.running_{what}: tensor" for n in (2, 3) for what in ("mean", "var")}


def test_half_precision_is_summed_in_single() -> None:
    model, x = net(), images(64) + 20
    small, plan = cut(model)
    recalibrate_(small, TracedModel.of(model, x), plan, x)
    half, _ = cut(model.bfloat16())
    recalibrate_(half, TracedModel.of(model, x.bfloat16()), plan, x.bfloat16())
    assert half.bn2.running_mean.dtype == torch.bfloat16
    assert torch.allclose(half.bn2.running_var.double(), small.bn2.running_var, rtol=0.05)


@pytest.mark.parametrize("calibration", [images(16), None], ids=["images", "noise"])
@pytest.mark.parametrize(
    ("compensation", "asked", "done"),
    [
        ("none", None, False), ("mean", None, True), ("linear", None, True), ("reconstruct", None, False),
        ("none", True, True), ("mean", False, False), ("reconstruct", True, True),
    ],
)  # fmt: skip
def test_prune_moves_norms_by_default_with_means_and_regressions(
    compensation: Any, asked: bool | None, done: bool, calibration: Any
) -> None:
    if calibration is None and compensation in ("linear", "reconstruct"):
        pytest.skip("needs images")
    models, x = [net().eval() for _ in range(2)], images()
    # Only the second convolution may lose a channel, whichever it is: the third norm is behind it.
    options: dict[str, Any] = {"calibration": calibration, "ratio": 0.2, "ignore": ["conv1", "conv3"]}
    kind = COMPENSATIONS[compensation]
    wanted = kind() if asked is None else kind(recalibrate=asked)
    report, _ = (
        prune_(model, x[:1], compensation=repair, **options)
        for model, repair in zip(models, (wanted, kind(recalibrate=False)), strict=True)
    )
    assert [model.conv2.out_channels for model in models] == [5, 5]
    assert report.settings["recalibrate"] is done
    variances = [model.bn3.running_var for model in models]
    assert torch.equal(*variances) is not done


def test_means_that_were_folded_stay_without_images() -> None:
    models, x = [net().eval() for _ in range(2)], images()
    for model, flag in zip(models, (True, False), strict=True):
        ignore = ["conv1", "conv3"]  # as above
        prune_(model, x[:1], ratio=0.2, ignore=ignore, compensation=FoldMean(recalibrate=flag))
    for name in ("bn1", "bn2", "bn3"):
        moved, left = (model.get_submodule(name) for model in models)
        assert torch.equal(moved.running_mean, left.running_mean)
    assert not torch.equal(models[0].bn3.running_var, models[1].bn3.running_var)


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_a_failure_leaves_the_model_as_it_was(compensation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("ss_pruning.compensation.apply.recalibrate_", fails)
    model, x = net(), images()
    before = snapshot(model)
    with pytest.raises(
        ModelError, match=r"recalibrate=True\) failed, the model is as it was .*out of memory"
    ):
        prune_(
            model, x[:1], ratio=0.3, compensation=COMPENSATIONS[compensation](recalibrate=True), calibration=x
        )
    assert snapshot(model) == before


def test_no_hook_survives_an_error() -> None:
    model, x = net(), images()
    small, plan = cut(model)
    traced = TracedModel.of(model, x)
    with pytest.raises(RuntimeError, match="expected input"):
        recalibrate_(small, traced, plan, x[:, :2])
    assert not any(module._forward_pre_hooks for net in (small, model) for module in net.modules())
