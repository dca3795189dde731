"""Re-estimated batch norms: the statistics of what reaches them, and nothing else is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import prune_
from ss_pruning.errors import InputError, ModelError
from ss_pruning.provenance import trace
from ss_pruning.reestimation import reestimate_
from ss_pruning.surgery import Cut, Plan
from tests.snapshot import snapshot
from tests.zoo import randomise


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


def cut(model: Net) -> tuple[Net, Plan]:
    """Without two of the channels between the second and the third convolution."""
    kept = (0, 2, 3, 5)
    sides = (("conv2", "out"), ("bn2", "through"), ("plain", "through"), ("conv3", "in"))
    plan = Plan(tuple(Cut(path, side, 6, kept) for path, side in sides))  # type: ignore[arg-type]
    return plan.apply_(copy.deepcopy(model)), plan  # type: ignore[return-value]


def moments(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance by channel, from the definition."""
    rows = torch.cat([part.movedim(1, -1).reshape(-1, part.shape[1]) for part in parts])
    mean = rows.sum(0) / len(rows)
    return mean, ((rows - mean) ** 2).sum(0) / (len(rows) - 1)


def inputs_of(model: nn.Module, path: str, x: Tensor) -> list[Tensor]:
    """What reaches a module, call by call, in evaluation mode."""
    found: list[Tensor] = []
    twin = copy.deepcopy(model).eval()
    twin.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    twin(x)
    return found


def test_statistics_are_those_of_what_reaches_a_norm_from_now_on() -> None:
    model, x = net(), images()
    small, plan = cut(model)
    assert reestimate_(small, plan, trace(model, x), x) == ["bn2", "bn3"]
    mean, variance = moments(inputs_of(small, "bn2", x))
    assert torch.allclose(small.bn2.running_mean, mean, rtol=1e-12)
    assert torch.allclose(small.bn2.running_var, variance, rtol=1e-12)


def test_calls_of_one_norm_are_pooled() -> None:
    model, x = net(), images()
    small, plan = cut(model)
    twin = copy.deepcopy(small)
    reestimate_(small, plan, trace(model, x), x)
    # The first call has set the norm when the second one's input is made.
    twin.load_state_dict(small.state_dict())
    first = inputs_of(twin, "bn3", x)[0]
    mean, variance = moments([first])
    twin.bn3.running_mean.copy_(mean)
    twin.bn3.running_var.copy_(variance)
    mean, variance = moments(inputs_of(twin, "bn3", x))
    assert torch.allclose(small.bn3.running_mean, mean, rtol=1e-12)
    assert torch.allclose(small.bn3.running_var, variance, rtol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_else_is_changed(training: bool) -> None:
    model, x = net(), images()
    small, plan = cut(model)
    small.train(training)
    before = snapshot(small)
    reestimate_(small, plan, trace(model, x), x)
    after = snapshot(small)
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {f"bn{n}.running_{what}: tensor" for n in (2, 3) for what in ("mean", "var")}


def test_half_precision_is_summed_in_single() -> None:
    model, x = net(), images(64) + 20
    small, plan = cut(model)
    reestimate_(small, plan, trace(model, x), x)
    half, _ = cut(model.bfloat16())
    reestimate_(half, plan, trace(model, x.bfloat16()), x.bfloat16())
    assert half.bn2.running_mean.dtype == torch.bfloat16
    assert torch.allclose(half.bn2.running_var.double(), small.bn2.running_var, rtol=0.05)


def test_prune_re_estimates_on_request_only() -> None:
    x = images()
    plain, anew = net().eval(), net().eval()
    prune_(plain, x[:1], ratio=0.3)
    report = prune_(anew, x[:1], ratio=0.3, importance=None, calibration=x, reestimate=True)
    assert report.settings["reestimate"] is True
    mean, variance = moments(inputs_of(anew, "bn2", x))
    assert torch.allclose(anew.bn2.running_mean, mean, rtol=1e-9)
    assert torch.allclose(anew.bn2.running_var, variance, rtol=1e-9)
    assert not torch.allclose(plain.bn2.running_mean, moments(inputs_of(plain, "bn2", x))[0], rtol=1e-3)


def test_it_is_refused_without_calibration_inputs() -> None:
    with pytest.raises(InputError, match="reestimate=True needs calibration="):
        prune_(net(), images()[:1], ratio=0.3, reestimate=True)


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_a_failure_leaves_the_model_as_it_was(compensation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("ss_pruning.cutting.reestimate_", fails)
    model, x = net(), images()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"reestimate=True failed, the model is as it was .*out of memory"):
        prune_(model, x[:1], ratio=0.3, compensation=compensation, calibration=x, reestimate=True)
    assert snapshot(model) == before


def test_no_hook_survives_an_error() -> None:
    model, x = net(), images()
    small, plan = cut(model)
    wiring = trace(model, x)
    with pytest.raises(RuntimeError, match="expected input"):
        reestimate_(small, plan, wiring, x[:, :2])
    assert not any(module._forward_pre_hooks for module in small.modules())
