"""Layers that are called by keyword are treated like those that are called by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ss_pruning
from ss_pruning._utils.copying import read_as, retyped, shell
from ss_pruning._utils.hooks import find_weights_read_by_code, given, hooked, is_read_by_code, replaced
from ss_pruning.profiling.layer_latency import latency_table
from tests.support.zoo import randomise


class Shifted(nn.GroupNorm):
    """A norm of the user's own, whose first parameter has a name of its own."""

    def forward(self, maps: Tensor, by: float = 0.0) -> Tensor:
        return super().forward(maps + by)


def by_position(layer: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor = layer(x)
    return answer


def by_name(layer: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor = layer(by=0.0, maps=x) if isinstance(layer, Shifted) else layer(input=x)
    return answer


class Net(nn.Module):
    """Kinds of layers, a residual sum and a head, each called as `how` says."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor], norm: type[nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.how = how
        self.stem, self.n0, self.act = (
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.PReLU(12),
        )
        self.inner, self.n1 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.spatial = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.n2 = norm(4, 16) if issubclass(norm, nn.GroupNorm) else norm(16)
        self.outer, self.n3 = nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.head, self.last = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        x = how(self.act, how(self.n0, how(self.stem, x)))
        y = how(self.n1, how(self.inner, x)).relu()
        y = how(self.n2, how(self.spatial, y)).relu()
        x = (x + how(self.n3, how(self.outer, y))).relu().mean((2, 3))
        return how(self.last, how(self.head, x).relu())


def pair(norm: type[nn.Module] = nn.BatchNorm2d) -> Iterator[Net]:
    for how in (by_position, by_name):
        torch.manual_seed(0)
        yield randomise(Net(how, norm)).eval()


IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"compensation": "mean"},
    {"compensation": "mean", "allocation": "global", "calibration": IMAGES},
    {"compensation": "linear", "calibration": IMAGES},
    {"compensation": "reconstruct", "calibration": IMAGES},
    {"compensation": "mean", "calibration": "synthetic"},
]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.GroupNorm, Shifted])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)) or "default")
def test_keyword_calls_prune_like_positional_ones(
    options: dict[str, Any], norm: type[nn.Module], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path))
    states = []
    for net in pair(norm):
        ss_pruning.prune_(net, IMAGES[:2], params=0.6, **options)
        states.append(net.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=name)


def test_keyword_calls_compact_like_positional_ones() -> None:
    widths = []
    for net in pair():
        with torch.no_grad():
            net.n1.weight[:8] = 0
        expected = net(IMAGES)
        ss_pruning.compact_(net, IMAGES[:2])
        torch.testing.assert_close(net(IMAGES), expected, atol=1e-4, rtol=1e-4)
        widths.append(net.inner.out_channels)
    assert widths[0] == widths[1] < 16


def test_layers_called_by_keyword_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path))
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    net.forward = lambda x: net["conv"](input=x)  # type: ignore[method-assign]
    times = latency_table(net, IMAGES[:1], ss_pruning.graph.trace(net, IMAGES[:1]))
    assert list(times.layers) == ["conv"]


def test_first_argument_is_found_and_replaced_whatever_its_name() -> None:
    norm = Shifted(2, 4)
    assert given(norm, (), {"by": 1.0, "maps": 2}) == 2
    assert given(norm, (3,), {"by": 1.0}) == 3
    assert given(norm, (), {}) is None
    assert replaced(norm, (), {"by": 1.0, "maps": 2}, 5) == ((), {"by": 1.0, "maps": 5})
    assert replaced(norm, (3, 1.0), {}, 5) == ((5, 1.0), {})


@pytest.mark.parametrize("how", [by_position, by_name])
def test_hooks_see_and_replace_and_go_away(how: Callable[[nn.Module, Tensor], Tensor]) -> None:
    layers, x = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, torch.ones(1, 2)
    seen: list[tuple[str, Tensor]] = []
    wanted = {path: layer(2 * x) + 1 for path, layer in layers.items()}

    def after(path: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append((path, x))
        return y + 1

    with hooked(layers, lambda path, layer, x: 2 * x, after):
        for path, layer in layers.items():
            assert torch.equal(how(layer, x), wanted[path])
    assert [path for path, _ in seen] == ["a", "b"]
    assert all(torch.equal(given, 2 * x) for _, given in seen)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers.values())


def test_what_returns_nothing_changes_nothing() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    wanted = layer(x)
    with hooked({"a": layer}, lambda *_: None, lambda *_: None):
        assert torch.equal(layer(x), wanted)


def test_hooks_may_see_whole_calls() -> None:
    norm, x = Shifted(2, 4), torch.randn(1, 4, 3, 3)
    wanted, seen = norm(x, by=2.0), []

    def before(path: str, norm: nn.Module, call: Any) -> Any:
        seen.append(call[1])
        return call[0], {"by": 2.0}

    with hooked({"norm": norm}, before, lambda path, norm, call, y: seen.append(call[1]), whole=True):
        assert torch.equal(norm(x, by=1.0), wanted)
    assert seen == [{"by": 1.0}, {"by": 2.0}]


def test_hooks_run_in_order_behind_the_users_own_and_go_when_something_fails() -> None:
    layer, order = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(lambda *_: order.append("user"))

    def run() -> None:
        with (
            hooked({"a": layer}, lambda *_: order.append("one")),
            hooked({"a": layer}, lambda *_: order.append("two")),
        ):
            layer(torch.ones(1, 3))

    with pytest.raises(RuntimeError):
        run()
    assert order == ["user", "one", "two"]
    assert len(layer._forward_pre_hooks) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_modules_of_torchscript_are_left_out() -> None:
    script = torch.jit.script(nn.Linear(2, 2))
    with hooked({"script": script}, lambda *_: pytest.fail("called")):
        script(torch.ones(1, 2))


class Reader(nn.Module):
    """Multiplies with the weight of a layer that it does not call, and with that of one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.idle = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 4)
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.called(F.linear(input=x, weight=self.read.weight, bias=self.bias))
        return y


def layers_seen(model: nn.Module, x: Tensor) -> list[str]:
    seen: list[str] = []
    modules = {path: module for path, module in model.named_modules() if path}
    with hooked(modules, lambda path, module, x: seen.append(path)):
        model(x)
    return seen


def test_weights_read_by_code_are_seen_as_calls_in_copies_too() -> None:
    model, x = Reader(), torch.randn(5, 3)
    expected = model(x)
    assert layers_seen(model, x) == ["called"]
    assert find_weights_read_by_code([model.read, model.idle], lambda: model(x))
    assert [is_read_by_code(m) for m in (model.read, model.called, model.idle)] == [True, False, False]
    for twin in (model, shell(model), retyped(model, Tensor.clone), read_as(model, Tensor.clone)):
        assert layers_seen(twin, x) == ["read", "called"]
        torch.testing.assert_close(twin(x), expected)


def test_what_stands_around_weights_read_by_code_can_be_replaced() -> None:
    model, x = Reader(), torch.randn(5, 3)
    find_weights_read_by_code([model.read], lambda: model(x))
    with hooked({"read": model.read}, lambda *_: torch.zeros(5, 3)):
        torch.testing.assert_close(model(x), model.called(torch.ones(5, 4)))
    with hooked({"read": model.read}, after=lambda path, module, x, y: 2 * y):
        doubled = 2 * (x @ model.read.weight.T + 1)
        torch.testing.assert_close(model(x), model.called(doubled))
    torch.testing.assert_close(model(x), model.called(doubled / 2))


def test_nothing_is_known_of_a_model_that_fails() -> None:
    model = Reader()
    with pytest.raises(RuntimeError):
        find_weights_read_by_code([model.read], lambda: model(torch.randn(5, 7)))
    assert layers_seen(model, torch.randn(5, 3)) == ["called"]
