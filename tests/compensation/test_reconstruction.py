"""What reconstruction is fitted on and judged by, and in which context the dense model runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning.compensation.normal_equations import NormalEquations, outputs_at
from ss_pruning.compensation.passes.memory import VARIABLE
from ss_pruning.compensation.reconstruction import reconstruct_
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.traced import TracedModel
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.plan import Plan
from tests.support.snapshot import snapshot

Convolution = nn.Conv2d | nn.ConvTranspose2d | nn.ConvTranspose1d


def images(n: int, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 2**23])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 11, 16, 17, 26, 32, 64, 101])
def test_whole_images_are_held_out_evenly_whatever_their_number(
    n: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, fitted = set[int](), set[int]()

    def note(
        self: NormalEquations, x: Tensor, wanted: Tensor, positions: Tensor, held_out: bool, *_: Any
    ) -> None:
        if x.shape[1] == 3:  # the first layer
            (held if held_out else fitted).update(x.flatten(1)[:, 0].int().tolist())

    monkeypatch.setattr(NormalEquations, "add", note)
    monkeypatch.setattr("ss_pruning.compensation.passes.lockstep._AT_ONCE", at_once)
    numbered = torch.arange(float(n)).reshape(-1, 1, 1, 1).expand(n, 3, 8, 8)
    model = net(nn.Identity())
    reconstruct_(
        plan_of_half().apply_(net(nn.Identity())),
        TracedModel.of(model, numbered[:1]),
        plan_of_half(),
        numbered,
    )
    assert not held & fitted
    assert held | fitted == set(range(n))
    assert len(held) == -(-(n - 1) // 5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, stride=2, groups=4, bias=False),
    nn.Conv2d(4, 6, (3, 1), dilation=2, padding_mode="reflect", padding=1), nn.Conv2d(4, 2, 1),
    nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2),
    nn.ConvTranspose2d(4, 6, (1, 3), (3, 1), padding=(1, 0), dilation=2), nn.ConvTranspose1d(4, 2, 4, 2, 1),
])  # fmt: skip
def test_both_parts_together_are_all_there_is(layer: Convolution, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition: every tap read off one by one."""
    torch.manual_seed(0)
    monkeypatch.setattr("ss_pruning.compensation.normal_equations._COLUMNS", 5)
    monkeypatch.setattr("ss_pruning.compensation.normal_equations._CHUNK", 100)
    x = torch.randn(7, 4, *[8] * len(layer.kernel_size))
    y = layer(x)
    equations, positions = NormalEquations(layer), torch.arange(y[0, 0].numel())
    for begin, end, held_out in ((0, 3, False), (3, 5, True), (5, 7, False)):
        equations.add(
            x[begin:end], outputs_at(layer, y[begin:end], positions), positions, held_out, y.shape[2:]
        )
    gram, cross = equations.sums()
    assert float(gram[0, 0, -1, -1]) == 5 * len(positions)
    assert float(gram[1, 0, -1, -1]) == 2 * len(positions)
    wanted = (
        y.flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (layer.groups, -1)).transpose(0, 1).double()
    )
    patches = patches_of(layer, x)
    torch.testing.assert_close(gram.sum(0).triu(), (patches.mT @ patches).triu(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cross.sum(0), patches.mT @ wanted, rtol=1e-5, atol=1e-4)


def patches_of(layer: Convolution, x: Tensor) -> Tensor:
    """`[groups, rows, d + 1]`: what each input and tap brings to an output, as the layer says, and a constant 1."""
    options = {
        name: getattr(layer, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    options |= {"output_padding": layer.output_padding} if layer.transposed else {}
    bare = type(layer)(1, 1, bias=False, **options)
    each = layer.in_channels // layer.groups
    found = []
    for group in range(layer.groups):
        columns = []
        for tap in range(bare.weight.numel()):
            bare.weight.zero_().view(-1)[tap] = 1
            columns += [bare(x[:, [group * each + i]]).flatten() for i in range(each)]
        found.append(torch.stack([*columns, torch.ones_like(columns[0])], 1))
    return torch.stack(found).double()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(24, 3, 8, 8), (1, 3, 8, 8)])
def test_what_a_layer_can_do_it_is_made_to_do(shape: tuple[int, ...]) -> None:
    """A layer whose input lost nothing finds the dense weights; of a single image positions are held out."""
    torch.manual_seed(0)
    model, x = net(), torch.randn(shape)
    small = net()
    for path in ("0", "3", "8"):
        module = small.get_submodule(path)
        module.weight.data += 0.1 * torch.randn_like(module.weight)
    everything = Plan((Cut("0", "out", 16, tuple(range(16))),))
    reconstruct_(small, TracedModel.of(model, x[:1]), everything, x)
    wanted, found = model[:4](x), small[:4](x)
    assert float((found - wanted).norm()) < 2e-3 * float(wanted.norm())


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_solved_whatever_size_they_are_told(groups: int) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
            self.up = nn.ConvTranspose2d(8, 6, 3, 2, padding=1, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(self.norm(self.down(x)).relu(), output_size=x.shape[2:])
            return y

    torch.manual_seed(0)
    model, x = Decoder().eval(), images(24, 10)  # left to itself it makes a map of 9
    small = copy.deepcopy(model)
    small.up.weight += 0.1 * torch.randn_like(small.up.weight)
    everything = Plan((Cut("down", "out", 8, tuple(range(8))),))
    outcome = reconstruct_(small, TracedModel.of(model, x[:1]), everything, x)
    assert "up" in outcome.layers
    assert float((small(x) - model(x)).norm()) < 2e-3 * float(model(x).norm())


@torch.no_grad()
def test_with_nothing_to_judge_by_weights_stay_as_near_as_can_be() -> None:
    """The largest ridge is taken, not the one that explains it best."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(5, 8)
    target = torch.randn(5, 1, 4)

    def moved(held_out: int) -> float:
        equations, here = NormalEquations(layer), torch.zeros(1, dtype=torch.long)
        equations.add(x[:4], target[:4], here, False)
        if held_out:
            equations.add(x[:4], target[:4], here, True)
        return float((equations.solve()[0] - layer.weight).norm())

    assert moved(0) < 0.9 * moved(1)


@torch.no_grad()
@pytest.mark.parametrize("value", [0.3, 1e-6, 3e3])
def test_inputs_that_never_vary_still_give_what_is_wanted(value: float) -> None:
    """All columns say the same as the bias, to within rounding."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(144, 4), torch.full((20000, 144), value), torch.randn(4)
    equations, here = NormalEquations(layer), torch.zeros(1, dtype=torch.long)
    for part in (False, True):
        equations.add(x, y.expand(20000, 1, 4), here, part)
    weight, bias = equations.solve()
    found = x[0] @ weight[0].T + layer.bias + bias
    torch.testing.assert_close(found, y, rtol=1e-2, atol=1e-2)


def test_a_layer_that_reads_infinite_numbers_is_named() -> None:
    model, x = net(nn.Identity()).half(), images(24).half()
    model[2].weight.data.fill_(3e4)
    traced, small = TracedModel.of(model, x[:1]), plan_of_half().apply_(copy.deepcopy(model))
    with pytest.raises(ModelError, match=r"'4' reads or puts out .*float16.*model.float()"):
        reconstruct_(small, traced, plan_of_half(), x)


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


@pytest.mark.parametrize("all_frozen", [False, True])
def test_what_is_frozen_while_other_layers_are_not_is_not_solved(all_frozen: bool) -> None:
    """It has a fixed meaning, such as the decoding of distances; a model for inference is frozen as a whole."""
    model, x = net(nn.Identity()), images(24)
    small = plan_of_half().apply_(net(nn.Identity())).requires_grad_(not all_frozen)
    conv, head = small[4], small[9].requires_grad_(False)
    before = copy.deepcopy((conv.state_dict(), head.state_dict()))
    outcome = reconstruct_(small, TracedModel.of(model, x[:1]), plan_of_half(), x)
    assert not torch.equal(conv.weight, before[0]["weight"])  # type: ignore[arg-type]
    stays = all(torch.equal(now, before[1][name]) for name, now in head.state_dict().items())
    assert stays == (not all_frozen)
    assert outcome.skipped == ({} if all_frozen else {"9": "it is frozen, while other layers are not"})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("last", [9.0, 8.5])
def test_weights_that_count_stay(last: float, frozen: bool) -> None:
    """They decode, as distances in a detector, also where a file has everything frozen, or code has thawed it."""
    weight = torch.arange(16.0).reshape(16, 1)
    weight[-1] += last - 9

    def decoding() -> nn.Sequential:
        head = nn.Linear(16, 1, bias=False)
        head.weight = nn.Parameter(weight.T.clone())
        return net(nn.Identity())[:-1].append(head).requires_grad_(not frozen)

    model, x = decoding(), images(24)
    small = plan_of_half().apply_(decoding())
    outcome = reconstruct_(small, TracedModel.of(model, x[:1]), plan_of_half(), x)
    counts = last == 9
    assert torch.equal(small[9].weight, weight.T) == counts
    assert (small[9].bias is None) == counts
    assert outcome.skipped.keys() == ({"9"} if counts else set())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("enabled", [False, True])
def test_both_models_run_in_the_context_of_the_caller(enabled: bool, mode: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def note(x: Tensor) -> None:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen.append((threading.get_ident(), torch.is_autocast_enabled("cpu"), *modes, x.dtype))

    model, x = net(Watched()), images(24)
    traced = TracedModel.of(model, x[:1])
    small = plan_of_half().apply_(net(Watched()))
    WATCHER.append(note)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), mode():
        seen.clear()
        outcome = reconstruct_(small, traced, plan_of_half(), x)
        dtype = torch.bfloat16 if enabled else torch.float32
        context = threading.get_ident(), enabled, False
        assert {(*entry[:3], entry[4]) for entry in seen} == {(*context, dtype)}
        # Where functions are watched they count what they write, which they do not in inference mode.
        assert sum(entry[3] is not torch.is_inference_mode_enabled() for entry in seen) <= 1
        wanted, found = model(x).float(), small(x).float()
    assert outcome.layers == ["0", "4", "9"]
    assert float((found - wanted).square().mean() / wanted.var(0).mean()) < 0.5


def test_the_bound_on_memory_changes_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may be held passes begin anew at each layer, of which there are three."""
    monkeypatch.setattr("ss_pruning.compensation.passes.lockstep._AT_ONCE", 4 * 16 * 64)
    x, found, runs = images(12), [], []
    for bound in (2**30, 40000, 0):
        monkeypatch.setenv(VARIABLE, str(bound))
        seen: list[int] = []
        WATCHER[:] = [lambda x, seen=seen: seen.append(len(x))]  # type: ignore[misc]
        model = net(Watched())
        traced, small = TracedModel.of(model, x[:1]), plan_of_half().apply_(net(nn.Identity()))
        seen.clear()
        reconstruct_(small, traced, plan_of_half(), x)
        runs.append(seen.count(4))
        found.append(small.state_dict())
    assert runs[0] == 3
    assert 3 < runs[1] < runs[2] == 6
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("told", ["", "-1", "2 GB"])
def test_a_bound_that_is_no_number_of_bytes_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, told)
    model, x = net(nn.Identity()), images(12)
    small, traced = plan_of_half().apply_(net(nn.Identity())), TracedModel.of(model, x[:1])
    with pytest.raises(InputError, match=f"{VARIABLE}='{told}'"):
        reconstruct_(small, traced, plan_of_half(), x)


class Pairs(nn.Module):
    """Runs on two images at a time, no more and no fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.reshape(2, 3, 8, 8))
        return y


def test_a_model_that_takes_so_many_images_at_once_is_reconstructed() -> None:
    x, model = images(24), Pairs().eval()
    report = prune_(model, x[:2], macs=0.6, allocation="global", compensation="reconstruct", calibration=x)
    assert "not compensated" not in report.settings
    small, plain = Pairs().eval(), Pairs().eval()
    prune_(small, x[:2], macs=0.6, allocation="global", compensation="reconstruct", calibration=x)
    prune_(plain, x[:2], macs=0.6, allocation="global", calibration=x)
    with torch.no_grad():
        wanted, found, cut = (
            torch.cat([m(pair) for pair in x.split(2)]) for m in (Pairs().eval(), small, plain)
        )
    assert float((found - wanted).square().mean()) < 0.5 * float((cut - wanted).square().mean())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_whatever_stops_it_leaves_the_model_as_it_was_and_no_thread(
    error: type[BaseException], after: int
) -> None:
    def stop(x: Tensor) -> None:
        seen.append(len(x))
        if len(seen) >= calls - after:
            raise error("stop")

    model, x = net(Watched()), images(16)  # too few to hold any out
    calls, seen = 10**9, list[int]()
    WATCHER.append(stop)
    prune_(net(Watched()), x[:1], macs=0.6, allocation="global", compensation="reconstruct", calibration=x)
    calls = len(seen)
    seen.clear()
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


class SharedHead(nn.Module):
    """A head that reads maps of two sizes; one that always saw the first alone would not do for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(self.stem(x)).relu()
        levels = x, nn.functional.max_pool2d(x, 2) * torch.linspace(-3, 3, 8)[:, None, None]
        return tuple(self.out(self.head(level).relu()) for level in levels)


@torch.no_grad()
@pytest.mark.parametrize("bound", [None, "1"])
def test_layers_that_run_several_times_are_solved_for_all_calls(
    bound: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against normal equations of all that the layer reads and shall put out, made at one go."""
    if bound is not None:
        monkeypatch.setenv(VARIABLE, bound)
    torch.manual_seed(0)
    model, x = SharedHead().eval(), images(24, 16)
    small = copy.deepcopy(model)
    small.stem.weight[:4] = 0
    seen = NormalEquations(copy.deepcopy(small.head))
    everything = Plan((Cut("head", "out", 8, tuple(range(8))),))
    outcome = reconstruct_(small, TracedModel.of(model, x[:1]), everything, x)
    assert {"head", "out"} <= set(outcome.layers)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    dense, pruned = (_reads_of_head(net, x[order]) for net in (model, small))
    for wanted, found in zip(dense, pruned, strict=True):
        y = model.head(wanted)
        for number in range(24):
            positions = torch.randperm(y[0, 0].numel(), generator=torch.Generator().manual_seed(0))
            targets = outputs_at(model.head, y[number : number + 1], positions)
            seen.add(found[number : number + 1], targets, positions, number % 5 == 1)
    weight, _ = seen.solve()
    torch.testing.assert_close(small.head.weight, weight[0], rtol=1e-2, atol=1e-3)


def _reads_of_head(net: SharedHead, x: Tensor) -> list[Tensor]:
    x = net.norm(net.stem(x)).relu()
    return [x, nn.functional.max_pool2d(x, 2) * torch.linspace(-3, 3, 8)[:, None, None]]


@torch.no_grad()
def test_the_norm_of_a_siamese_net_takes_the_bias_of_its_convolution() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.second, self.norm2 = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            one, two = (
                self.norm2(self.second(self.norm1(self.first(t)).relu())).mean((2, 3)) for t in (x, 2 * x)
            )
            return one * two

    torch.manual_seed(0)
    model, x = Siamese().eval(), images(32)
    small = copy.deepcopy(model)
    small.first.weight += 0.3 * torch.randn_like(small.first.weight)
    plan = Plan((Cut("first", "out", 8, tuple(range(8))),))
    off = float((small(x) - model(x)).norm())
    reconstruct_(small, TracedModel.of(model, x[:1]), plan, x)
    assert small.first.bias is None
    assert small.second.bias is None
    assert not torch.equal(small.norm2.running_mean, model.norm2.running_mean)  # type: ignore[arg-type]
    assert float((small(x) - model(x)).norm()) < 0.05 * off
