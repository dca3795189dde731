"""What reconstruction is fitted on and judged by, and in which context the dense model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import prune_
from ss_pruning.compensation.reconstruction import _fit, _normal_equations, _sample, reconstruct_
from ss_pruning.errors import ModelError
from ss_pruning.graph.tracing import trace
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.plan import Plan
from tests.support.snapshot import snapshot


def images(n: int, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 11, 16, 17, 26, 32, 64, 101])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_whole_images_are_held_out_evenly_whatever_their_number(n: int, kind: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1) if kind == "convolution" else nn.Linear(8, 4)
    x = images(n)
    held, fitted = set[int](), set[int]()
    marked = x if kind == "convolution" else x[:, 0]
    for chunk, _ in _sample(layer, layer(marked).detach()):
        number = torch.arange(n)[chunk.images].repeat_interleave(len(chunk.positions))
        held |= set(number[chunk.held_out].tolist())
        fitted |= set(number[~chunk.held_out].tolist())
    assert not held & fitted
    assert held | fitted == set(range(n))
    assert len(held) == -(-(n - 1) // 5)
    assert n < 7 or set(torch.tensor(sorted(held)).diff().tolist()) == {5}


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 7])
def test_both_parts_together_are_all_there_is(n: int) -> None:
    """Against the definition, by unfolding; of a single image positions are held out."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(n, 4, 5, 5)
    y = layer(x)
    gram, cross = _normal_equations(layer, x, iter(_sample(layer, y)))
    assert float(gram[0, 0, -1, -1] + gram[1, 0, -1, -1]) == 25 * n
    assert float(gram[1, 0, -1, -1]) == (5 if n == 1 else 25 * -(-(n - 1) // 5))
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(25 * n, 2, -1).transpose(0, 1)
    patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2).double()
    wanted = y.flatten(2).transpose(1, 2).reshape(25 * n, 2, -1).transpose(0, 1).double()
    torch.testing.assert_close(gram.sum(0), patches.transpose(1, 2) @ patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross.sum(0), patches.transpose(1, 2) @ wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_with_nothing_to_judge_by_weights_stay_as_near_as_can_be() -> None:
    """One vector of one image: the largest ridge is taken, not the one that explains it best."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(1, 8)
    target = torch.randn(1, 4)
    weight, _ = _fit(layer, x, _sample(layer, target), None, None)
    far = _fit(layer, x.repeat(5, 1), _sample(layer, target.repeat(5, 1)), None, None)[0]
    assert float((weight - layer.weight).norm()) < 0.9 * float((far - layer.weight).norm())


#: What watches the modules below; a pass is taken back in whatever hangs on a model, and so would notes that do.
WATCHER: list[Callable[[Tensor], None]] = []


class Watched(nn.Module):
    """Shows what it sees to the watchers."""

    def forward(self, x: Tensor) -> Tensor:
        show(x)
        return x


def show(x: Tensor) -> None:
    for watch in WATCHER:
        watch(x)


@pytest.fixture(autouse=True)
def _nobody_watches() -> Iterator[None]:
    yield
    WATCHER.clear()


def net(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *between, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def plan_of_half() -> Plan:
    half = tuple(range(8))
    return Plan((Cut("0", "out", 16, half), Cut("2", "through", 16, half), Cut("4", "in", 16, half)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("enabled", [False, True])
def test_both_models_run_in_the_context_of_the_caller(enabled: bool, mode: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(x: Tensor) -> None:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen.append((threading.get_ident(), torch.is_autocast_enabled("cpu"), *modes, x.dtype))

    model, x = net(Watched()), images(24)
    connectivity = trace(model, x[:1])
    small = plan_of_half().apply_(net(Watched()))
    WATCHER.append(note)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), mode():
        seen.clear()
        outcome = reconstruct_(small, model, plan_of_half(), connectivity, x)
        dtype = torch.bfloat16 if enabled else torch.float32
        context = threading.get_ident(), enabled, False, torch.is_inference_mode_enabled(), dtype
        assert set(seen) == {context}
        assert len(seen) == 3  # the dense one, the pruned one, and one image to find sums
        wanted, found = model(x).float(), small(x).float()
    assert outcome.layers == ["0", "4", "9"]
    assert float((found - wanted).square().mean() / wanted.var(0).mean()) < 0.5


def test_the_dense_model_runs_again_where_its_outputs_do_not_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, found, runs = images(12), [], []
    for kept in (2**28, 12 * 64 * 16 + 12 * 36 * 16, 1):
        monkeypatch.setattr("ss_pruning.compensation.reconstruction._KEPT", kept)
        seen: list[int] = []
        WATCHER[:] = [lambda x, seen=seen: seen.append(len(x))]  # type: ignore[misc]
        model = net(Watched())
        connectivity, small = trace(model, x[:1]), plan_of_half().apply_(net(nn.Identity()))
        seen.clear()
        reconstruct_(small, model, plan_of_half(), connectivity, x)
        runs.append(seen.count(12))
        found.append(list(small.state_dict().values()))
    assert runs == [1, 2, 3]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_whatever_stops_it_leaves_the_model_as_it_was_and_no_thread(
    error: type[BaseException], after: int
) -> None:
    seen: list[int] = []

    def stop(x: Tensor) -> None:
        seen.append(len(x))
        if seen.count(16) == after:  # for its statistics, the pruned one, the dense one
            raise error("stop")

    WATCHER.append(stop)
    model, x = net(Watched()), images(16)  # too few to hold any out
    before, threads = snapshot(model), threading.active_count()
    with pytest.raises(ModelError if error is RuntimeError else error, match="stop"):
        prune_(model, x[:1], macs=0.6, allocation="global", compensation="reconstruct", calibration=x)
    assert snapshot(model) == before
    assert threading.active_count() == threads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_does_not_reach_the_sums() -> None:
    """In half precision the normal equations of this net were indefinite."""
    x = images(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = prune_(
            net(), x[:1], macs=0.6, allocation="global", compensation="reconstruct", calibration=x
        )
    assert report.macs_after <= 0.6 * report.macs_before
