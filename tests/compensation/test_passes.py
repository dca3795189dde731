"""Passes that stop and go on bring to every layer what an undisturbed pass does, and run each module once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning.compensation.passes.calls import Calls
from ss_pruning.compensation.passes.dataflow import Dataflow
from ss_pruning.compensation.passes.partial import PartialPasses, Paused, Side, Stops, tried

RUNS: Counter[str] = Counter()


class Conv(nn.Conv2d):
    """Counts its runs by name."""

    def __init__(self, name: str, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        RUNS[self.name] += 1
        return super().forward(x)


class Net(nn.Module):
    """A stem, two layers and a head with whatever is asked for in between; `how(net, stem's output)` gives the rest."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Sequential(Conv("stem.0", 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.a, self.b, self.head = Conv("a"), Conv("b"), Conv("head")
        self.act, self.same, self.norm = nn.ReLU(inplace=True), nn.Identity(), nn.BatchNorm2d(4)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self, self.stem(x)))


def added_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y += x
    return net.b(y) + y


def rectified_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.norm(x)
    z = net.act(net.a(net.act(y)))  # `y` has been rectified, too
    return net.b(z) + y


def handed_on(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(net.same(x))) + x


def by_functions(net: Net, x: Tensor) -> Tensor:
    y = F.relu(net.norm(net.a(F.relu(x))))
    return torch.cat([net.b(y[:, :2].repeat(1, 2, 1, 1))[:, :2], x[:, :2]], 1)


def in_place_by_functions(net: Net, x: Tensor) -> Tensor:
    return F.relu_(net.b(F.relu_(net.a(F.relu_(x)))))


def of_slices(net: Net, x: Tensor) -> Tensor:
    low, high = x.chunk(2, 1)
    y = net.a(torch.cat([high, low], 1))
    y[:, :2] += low
    return net.b(y) * high.mean()


def stepwise(net: Net, x: Tensor) -> Tensor:
    scale = float(net.a(x).mean())  # a number on the way, which no function can be seen to read
    return net.b(x) * scale


class Memory(nn.Module):
    def forward(self, net: Net, x: Tensor) -> Tensor:
        net.seen = x * 2
        return x


def remembered(net: Net, x: Tensor) -> Tensor:
    x = MEMORY(net, x)
    return net.b(net.a(x)) + net.seen


MEMORY = Memory()
STYLES = [
    added_in_place, rectified_in_place, handed_on, by_functions, in_place_by_functions, of_slices, stepwise, remembered,
]  # fmt: skip
LAYERS = ["stem.0", "a", "b", "head"]


def undisturbed(model: nn.Module, x: Tensor, paths: list[str], side: Side) -> dict[str, Tensor]:
    """What layers read or give, by hooks."""
    found: dict[str, Tensor] = {}
    undo = []
    for path in paths:

        def hook(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            found[path] = (args[0] if side == "in" else output).clone()

        undo.append(model.get_submodule(path).register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for handle in undo:
        handle.remove()
    return found


def batches(count: int, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, size, generator=generator) for _ in range(count)]


def stops_of(calls: Calls, paths: list[str], side: Side, x: Tensor, other: Tensor) -> Stops:
    return tried(calls, Stops.of(Dataflow.of(calls, x), paths, side), x, other)


@torch.no_grad()
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("style", STYLES)
def test_layers_find_what_they_find_in_an_undisturbed_pass(style: Any, side: Side) -> None:
    torch.manual_seed(0)
    model = Net(style).eval()
    first, second, third = batches(3)
    wanted = [undisturbed(model, x, LAYERS, side) for x in (second, third)]
    with Calls(model) as calls:
        passes = PartialPasses(calls, stops_of(calls, LAYERS, side, first, second), {})
        paused = [Paused(), Paused()]
        for path in LAYERS:
            for state, x, known in zip(paused, (second, third), wanted, strict=True):
                found = passes.run(state, x.clone, path)
                assert found is not None
                torch.testing.assert_close(found, known[path])
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("style", [style for style in STYLES if style is not remembered])
def test_each_layer_runs_once_a_batch_and_inputs_are_made_once(style: Any) -> None:
    torch.manual_seed(0)
    model = Net(style).eval()
    x, other = batches(2)
    with Calls(model) as calls:
        passes = PartialPasses(calls, stops_of(calls, LAYERS, "out", x, other), {})
        RUNS.clear()
        state, made = Paused(), list[Tensor]()
        for path in LAYERS:
            passes.run(state, lambda: made.append(x) or x, path)  # type: ignore[func-returns-value]
    assert dict.fromkeys(LAYERS, 1) == RUNS
    assert len(made) == 1


@torch.no_grad()
@pytest.mark.parametrize("steered", [False, True])
def test_inputs_that_are_read_again_are_made_again(steered: bool) -> None:
    """By a function outside of all modules, late; or to decide which way to go."""
    torch.manual_seed(0)
    model = Net(handed_on).eval()
    plain = model.forward

    def forward(x: Tensor) -> Tensor:
        if steered and float(x.sum()) > 1e6:
            raise AssertionError("not what was given")
        y = plain(x)
        return y if steered else y + x[:, :1]

    model.forward = forward  # type: ignore[method-assign]
    x, other = batches(2)
    with Calls(model) as calls:
        passes = PartialPasses(calls, stops_of(calls, LAYERS, "out", x, other), {})
        state, made = Paused(), list[Tensor]()
        for path in LAYERS:
            passes.run(state, lambda: made.append(x) or x, path)  # type: ignore[func-returns-value]
    assert len(made) == len(LAYERS)


@torch.no_grad()
def test_what_nobody_reads_any_more_is_not_held() -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    x, other = batches(2, size=64)
    paths = [f"layer{stage}.{block}.conv{n}" for stage in (1, 2, 3, 4) for block in (0, 1) for n in (1, 2)]
    live = undisturbed(model, x, ["layer1.0", "layer1.0.conv2"], "out")
    with Calls(model) as calls:
        stops = stops_of(calls, paths, "in", x, other)
        passes, state, held = PartialPasses(calls, stops, {}), Paused(), {}
        for path in paths:
            passes.run(state, lambda: x, path)
            held[path] = state.bytes()
    bytes_of = {path: 4 * value.numel() for path, value in live.items()}
    assert held["layer1.1.conv1"] == bytes_of["layer1.0"]  # it is added later, and read now
    assert held["layer1.1.conv2"] == bytes_of["layer1.0"] + bytes_of["layer1.0.conv2"]
    assert held["layer4.1.conv1"] < held["layer2.1.conv1"] < held["layer1.1.conv1"]


@torch.no_grad()
def test_tensors_are_set_aside_on_the_way_and_only_until_they_are_wanted() -> None:
    torch.manual_seed(0)
    model = Net(added_in_place).eval()
    x, other = batches(2)
    with Calls(model) as calls:
        passes = PartialPasses(
            calls, stops_of(calls, LAYERS, "out", x, other), {"a": ("stem", "out"), "b": ("a", "out")}
        )
        state = Paused()
        passes.run(state, lambda: x, "stem.0")
        assert not state.aside
        passes.run(state, lambda: x, "a")
        torch.testing.assert_close(state.aside["a"], model.stem(x))
        passes.run(state, lambda: x, "head")
        assert "a" not in state.aside


def test_a_pass_that_does_not_reach_the_layer_says_so() -> None:
    model = Net(lambda net, x: net.b(x) if float(x.sum()) > 1e6 else net.a(x)).eval()
    x, other = batches(2)
    with torch.no_grad(), Calls(model) as calls:
        stops = stops_of(calls, ["a", "b", "head"], "in", x, other)
        assert list(stops.over) == ["a", "head"]
        passes = PartialPasses(calls, stops, {})
        assert passes.run(Paused(), lambda: torch.full_like(x, 1e9), "a") is None


def test_what_a_model_raises_comes_through_and_nothing_stays() -> None:
    model = Net(handed_on).eval()
    x, other = batches(2)
    with torch.no_grad(), Calls(model) as calls:
        passes = PartialPasses(calls, stops_of(calls, LAYERS, "in", x, other), {})
        with pytest.raises(RuntimeError, match="channels"):
            passes.run(Paused(), lambda: x[:, :2], "head")
        with pytest.raises(RuntimeError, match="channels"):
            model(x[:, :2])  # called by itself, it runs as ever
    assert not any("forward" in vars(module) for module in model.modules())
