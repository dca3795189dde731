"""What runs for one of several copies: nothing that could tell, and all that comes before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning._utils.modules import modules_of
from ss_pruning.importance.shared_prefix import Prefix
from tests.support import oracle
from tests.support.zoo import ZOO, Net


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def watched(model: nn.Module, x: Tensor) -> Prefix:
    prefix = Prefix(modules_of(model))
    with torch.no_grad(), prefix.sized():
        model(x)
    with torch.no_grad(), prefix.watched():
        model(torch.cat([x, x]))
    return prefix


def images(width: int = 4) -> Tensor:
    return torch.randn(3, width, 6, 6, generator=torch.Generator().manual_seed(0))


class Uses(nn.Module):
    """A stem, then whatever is asked for, then a head."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.stem, self.middle, self.head, self.how = block(4), nn.ReLU(inplace=True), block(4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self, self.stem(x)))


class Scaled(nn.Module):
    def forward(self, x: Tensor, by: Tensor | float = 2.0) -> Tensor:
        return x * by


def test_the_outermost_of_what_is_over_is_taken() -> None:
    model = nn.Sequential(nn.Sequential(block(4), block(4)), block(4), block(4)).eval()
    prefix = watched(model, images())
    assert prefix.before(prefix.begin("2.0")) == ["0", "1"]
    assert prefix.before(prefix.begin("0.1.2")) == ["0.0", "0.1.0", "0.1.1"]
    assert prefix.before(prefix.begin("0.0.0")) == []


@pytest.mark.parametrize(
    ("how", "alone"),
    [
        (lambda net, y: y, ["stem"]),
        (lambda net, y: net.middle(y), ["stem"]),  # changes what it takes: somebody may read that again
        (lambda net, y: y + net.middle(y), ["stem"]),
        (lambda net, y: net.stem(y), []),  # runs twice
        (lambda net, y: net.scaled(y), ["stem", "scaled"]),
        (lambda net, y: net.scaled(y, 3.0), ["stem", "scaled"]),
        (lambda net, y: net.scaled(y, by=3.0), ["stem"]),
        (lambda net, y: net.scaled(y, torch.arange(6.0)), ["stem"]),  # takes what does not go by images
        (lambda net, y: net.scaled(y, torch.tensor([1.0, 2, 3] * 2)), ["stem"]),  # nor does what is like two copies
        (lambda net, y: net.scaled(y, y.detach() * 2), ["stem", "scaled"]),
    ],
)  # fmt: skip
def test_only_what_cannot_tell_runs_once(how: Any, alone: list[str]) -> None:
    net = Uses(how).eval()
    net.scaled = Scaled()
    x = images()
    prefix = watched(net, x)
    found = prefix.before(prefix.begin("head"))
    assert found == alone

    def outputs() -> Tensor:
        with torch.no_grad():
            return net(torch.cat([x] * 5))

    wanted = outputs()
    with prefix.run_once(prefix.begin("head"), 5):
        torch.testing.assert_close(outputs(), wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_it_runs_for_one_copy() -> None:
    net, x = Uses(lambda net, y: y).eval(), images()
    prefix, seen = watched(net, x), []
    net.stem[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    net.head[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with prefix.run_once(prefix.begin("head"), 4), torch.no_grad():
        net(torch.cat([x] * 4))
    assert seen == [3, 12]


@pytest.mark.parametrize("net", [net for net in ZOO if len(net.shapes) == 1], ids=lambda net: net.name)
def test_the_outputs_are_those_of_all_copies(net: Net) -> None:
    model = net.make().eval().double()
    x = torch.randn(4, *net.shapes[0][1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prefix = watched(model, x)
    with torch.no_grad():
        wanted = oracle.tensors(model(torch.cat([x] * 3)))
        for path in prefix.calls:
            with prefix.run_once(prefix.begin(path), 3):
                found = oracle.tensors(model(torch.cat([x] * 3)))
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_output_error_is_measured_in_any_mode(mode: Any) -> None:
    net = nn.Sequential(block(4), block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    with mode():
        report = prune_(net, x[:1], macs=0.6, calibration=x)
    assert report.settings["scope"] == "sensitivity"
    assert report.macs_after < report.macs_before
