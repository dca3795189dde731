"""A cut happens whole or not at all; what hangs on the model besides is used, followed and put back with care."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import ss_pruning
from ss_pruning import prune_, pruning
from ss_pruning._utils.copying import copied
from ss_pruning.errors import BudgetError, NothingToPruneError, VerificationError
from ss_pruning.graph import couple, trace
from ss_pruning.integrations.torch_pruning.pruner import GraphPruner
from ss_pruning.sparsity import compaction
from ss_pruning.sparsity.compaction import compact_
from ss_pruning.surgery import cut as cutting
from ss_pruning.surgery import plan as surgery
from ss_pruning.surgery.plan import Plan, adopt_
from ss_pruning.surgery.verification import Verifier
from tests.support.chain import chain
from tests.support.snapshot import snapshot
from tests.support.zoo import ZOO, Net, randomise

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- interrupts


@pytest.mark.parametrize("at", range(1, 6))
@pytest.mark.parametrize("place", ["plan._cut", "cut.gather_", "cut._replace"])
def test_an_interrupt_in_the_middle_of_a_cut_changes_nothing(
    place: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name = place.split(".")
    module = {"plan": surgery, "cut": cutting}[file]
    model, original, calls = chain(), getattr(module, name), itertools.count(1)
    plan = ss_pruning.plan(model, X, ratio=0.4)[0]
    before, output = snapshot(model), model(X)

    def interrupted(*given: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(module, name, interrupted)
    try:
        plan.apply_(model)
    except KeyboardInterrupt:
        assert snapshot(model) == before
        assert torch.equal(model(X), output)
    else:
        assert next(calls) <= at  # there were fewer calls than that


@pytest.mark.parametrize("module", [pruning, compaction])
def test_the_swap_is_the_last_step(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while hooks are put back comes before it: no model is pruned by a call that raises."""

    @contextlib.contextmanager
    def interrupted(*_: Any) -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    model = chain()
    with torch.no_grad():
        model.conv1.weight[:3] = 0  # to be compacted away
    before = snapshot(model)
    monkeypatch.setattr(module, "quiet_hooks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_(model, X, ratio=0.4) if module is pruning else compact_(model, X)
    assert snapshot(model) == before


def test_a_swap_is_one_step_for_signals() -> None:
    """A timer interrupts some thousand swaps; each left the model whole, the old one or the new one."""
    model = chain()
    plan = ss_pruning.plan(model, X, ratio=0.4)[0]
    small = plan.cut_copy(model)
    old = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    states = {"before": 0, "after": 0}

    def alarm(*_: object) -> None:
        raise KeyboardInterrupt

    assert threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGALRM, alarm)
    try:
        for number in range(300):
            victim = plan.cut_copy(model) if number < 0 else ss_pruning._utils.copying.shell(model)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-6 * (number % 100))
                adopt_(victim, small)
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            states["after" if victim.conv1.out_channels < 8 else "before"] += 1
            victim(X)
    except KeyboardInterrupt:  # a late one, outside of what is tested
        pass
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert states["before"]
    assert [m.out_channels for m in old] == [8, 8]


def test_a_report_that_cannot_be_made_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    before = snapshot(model)

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ss_pruning.pruning.Report", fails)
    with pytest.raises(MemoryError):
        prune_(model, X, ratio=0.4)
    assert snapshot(model) == before


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_a_model_pruned_in_inference_mode_can_be_trained(compensation: str) -> None:
    model = chain()
    with torch.inference_mode():
        prune_(model, X, ratio=0.4, compensation=compensation)  # type: ignore[arg-type]
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    model.train()(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("compensation", ["none", "reconstruct"])
def test_gradients_are_cut_and_tied_tensors_stay_tied(compensation: str) -> None:
    model = chain()
    model.scale = model.bn1.weight  # a second name for it
    model(X).sum().backward()
    images = X.repeat(4, 1, 1, 1)
    prune_(model, X, ratio=0.3, ignore="conv2", compensation=compensation, calibration=images)  # type: ignore[arg-type]
    assert len(model.bn1.weight) < 8
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert model.scale is model.bn1.weight


# ---------------------------------------------------------------- hooks of the user


def test_a_hook_that_only_looks_runs_once_a_call_and_sees_no_labels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, kept = chain(), []
    model.conv2.register_forward_hook(lambda module, args, output: kept.append(output) or None)
    model.bn1.register_forward_pre_hook(prints)
    prune_(model, X, ratio=0.4)
    assert capsys.readouterr().out == "torch.float32\n"  # never a label
    assert kept == []  # what it keeps is taken back
    model(X)
    assert capsys.readouterr().out == "torch.float32\n"
    assert len(kept) == 1


def prints(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    print(args[0].dtype)


def test_a_hook_that_takes_part_runs_in_every_pass() -> None:
    """Half of what `conv1` puts out is doubled by a hook: the cut model computes so, too."""
    model = chain()
    dense = chain()
    for net in (model, dense):
        net.conv2.register_forward_hook(lambda module, args, output: 2 * output)
    report = prune_(model, X, ratio=0.4)
    assert report.max_error < 1e-10
    assert not torch.allclose(chain()(X), dense(X))
    strengths = ss_pruning.synaptic_strength(dense, X, [X])
    assert strengths["fc"].allclose(ss_pruning.synaptic_strength(dense, X, [X])["fc"])


def test_backward_hooks_see_nothing() -> None:
    model = chain()
    model.conv1.register_full_backward_hook(raises)
    prune_(model, X, ratio=0.4)
    with pytest.raises(ZeroDivisionError):
        model(X.clone().requires_grad_()).sum().backward()


def raises(*_: object) -> None:
    raise ZeroDivisionError


# ---------------------------------------------------------------- numbers


class Numbers(nn.Module):
    """Numbers that equal widths: one that a loss reads, one that nobody reads, one that forward slices by."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.image_size, self.split = 8, 12, 8
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.b(self.a(x).relu()).split([self.split, 8], 1)
        return self.c(torch.cat([left.relu(), right], 1)).mean((2, 3))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self(x).softmax(1), F.one_hot(y, self.num_classes).float())


def test_numbers_follow_only_where_forward_relies_on_them() -> None:
    torch.manual_seed(0)
    model = Numbers().eval()
    report = prune_(model, X, ratio=0.4, allocation="local")
    assert report.params_after < report.params_before
    assert (model.num_classes, model.image_size) == (8, 12)
    assert {a.name for a in model.ss_pruning_plan.attributes} <= {"split"}
    model.loss(X, torch.tensor([0, 3, 5, 7])).backward()


class ReadsInVain(Numbers):
    """Forward looks at a number, and would be right with another one, too."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.image_size > 0
        return super().forward(x)


def test_a_number_that_forward_looks_at_in_vain_stays() -> None:
    torch.manual_seed(0)
    model = ReadsInVain().eval()
    prune_(model, X, ratio=0.4, allocation="local")
    assert model.a.out_channels < 12 == model.image_size
    assert {a.name for a in model.ss_pruning_plan.attributes} <= {"split"}


class ReadsByName(Numbers):
    """Reads the number in a way that code does not show."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.b(self.a(x).relu()).split([getattr(self, "sp" + "lit"), 8], 1)
        return self.c(torch.cat([left.relu(), right], 1)).mean((2, 3))


def test_numbers_that_are_read_in_odd_ways_do_not_break_a_model() -> None:
    torch.manual_seed(0)
    model = ReadsByName().eval()
    prune_(model, X, ratio=0.4, allocation="local")
    assert model(X).shape == (4, 8)
    assert model.num_classes == 8


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_050",
        "efficientnet_lite0",
        "convnext_atto",
        "regnetx_002",
        "densenet121",
    ],
)
def test_timms_classifiers_can_be_replaced_after_a_cut(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    classes, features = model.num_classes, model.num_features
    prune_(model, x, ratio=0.4, allocation="local")
    assert model.num_classes == classes
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert name != "resnet18" or model.num_features < features


def test_timms_widths_stay_where_the_head_does() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.create_model("resnet18").eval()
    prune_(model, torch.randn(2, 3, 64, 64), ratio=0.1, allocation="local", ignore=["layer4"])
    assert model.num_features == 512
    assert model.reset_classifier(5) is None


# ---------------------------------------------------------------- what fails is as if ignored from the start


class Hidden(nn.Module):
    """A residual stream whose width hides in a closure, with blocks inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.inner = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(12, 8, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(2))
        width = 8
        self.add = lambda x, y: x.reshape(len(x), width, *x.shape[2:]) + y  # no number of a module

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for inner, norm, outer in zip(self.inner, self.norms, self.outer, strict=True):
            x = self.add(x, outer(norm(inner(x)).relu()))
        return self.head(x.mean((2, 3)))


OPTIONS: list[dict[str, Any]] = [
    {"macs": 0.3, "compensation": "mean", "allocation": "local"},
    {"macs": 0.3, "calibration": torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))},
    {"ratio": 0.7},
    {"params": 0.6, "allocation": "local"},
]


def excluded(report: ss_pruning.Report) -> list[str]:
    return [path for left in report.excluded if "relies on its width" in left.reason for path in left.paths]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)))
def test_groups_that_fail_are_as_if_ignored_from_the_start(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = randomise(Hidden(), 0).eval()
    other = copied(model)
    report = prune_(model, X, **options)
    assert excluded(report) == ["stem"]
    prune_(other, X, ignore=["stem", "outer.0", "outer.1"], **options)
    assert model.ss_pruning_plan == other.ss_pruning_plan


@pytest.mark.parametrize("net", ZOO, ids=lambda net: net.name)
def test_exclusions_of_the_zoo_are_as_if_ignored_from_the_start(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of a net's groups made to fail, where each layer has one group alone."""
    model = net.make()
    groups = couple(trace(model, net.example), model).groups
    members = Counter(path for group in groups for path in group.paths())
    victims = {group.name for group in groups[::2] if all(members[path] == 1 for path in group.paths())}
    verify = Verifier.verify

    def failing(verifier: Verifier, plan: Plan, *given: Any, **more: Any) -> Any:
        if found := [cut.path for cut in plan.cuts if cut.path in victims and cut.side == "out"]:
            raise VerificationError("made to fail", at=found[0])
        return verify(verifier, plan, *given, **more)

    def plan(ignore: list[str]) -> tuple[Plan | None, list[str]]:
        fresh = net.make()
        try:
            report = prune_(fresh, net.example, ratio=0.4, ignore=ignore)
        except (NothingToPruneError, BudgetError):
            return None, []
        return fresh.ss_pruning_plan, excluded(report)

    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "verify", failing)
        found, without = plan([])
    if found is not None:
        assert found == plan([path for path in without if path in victims])[0]


# ---------------------------------------------------------------- other ties


class SegNet(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 4)))
        self.pool, self.unpool, self.functional = (
            nn.MaxPool2d(2, return_indices=True),
            nn.MaxUnpool2d(2),
            functional,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y, indices = F.max_pool2d(x, 2, return_indices=True) if self.functional else self.pool(x)
        y = self.b(y).relu()
        return self.c(F.max_unpool2d(y, indices, 2) if self.functional else self.unpool(y, indices))


@pytest.mark.parametrize("functional", [False, True])
def test_pooling_indices_tie_encoder_and_decoder(functional: bool) -> None:
    torch.manual_seed(0)
    model = SegNet(functional).eval()
    report = prune_(model, X, ratio=0.5)
    assert model.a.out_channels == model.b.out_channels < 8
    assert model.a.weight.shape[0] == model.b.weight.shape[0]
    assert report.max_error < 1e-10


def test_nothing_of_ours_stays_on_a_real_model() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).train()
    x = torch.randn(2, 3, 64, 64)
    names = {path: sorted(vars(m)) for path, m in model.named_modules()}
    GraphPruner(model, x, ss_pruning.SynapticImportance(example_inputs=x), pruning_ratio=0.3).step()
    with torch.no_grad():
        model.layer1[0].conv1.weight[:3] = 0
    compact_(model, x)
    vars(model).pop("ss_pruning_plan")
    assert {path: sorted(vars(m)) for path, m in model.named_modules()} == names
    assert model.training
    assert model(x).shape == (2, 1000)
