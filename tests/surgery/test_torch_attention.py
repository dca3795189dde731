"""Heads of `torch.nn.MultiheadAttention`: the module is replaced where it loses some, as part of the cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import Allocation, load, prune_, save
from ss_pruning.errors import SSPruningError
from ss_pruning.graph.attention import PrunableAttention
from ss_pruning.profiling.latency import Timing
from ss_pruning.surgery import same_attention
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan
from tests.support.attention import EXAMPLE, Block
from tests.support.snapshot import snapshot

OTHERS = ("embed", "fc1", "fc2")


class Torchs(nn.Module):
    """Attends with torch's module, to itself or to another layer's features."""

    def __init__(self, crossed: bool = False, **options: Any) -> None:
        super().__init__()
        self.context = nn.Linear(12, 10) if crossed else None
        widths = {"kdim": 10, "vdim": 10} if crossed else {}
        self.inner = nn.MultiheadAttention(12, 4, **widths, **options)
        for parameter in self.inner.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.inner.batch_first:
            x = x.transpose(0, 1)
        other = x if self.context is None else self.context(x)
        y: Tensor = self.inner(x, other, other, need_weights=False)[0]
        return y if self.inner.batch_first else y.transpose(0, 1)


def torchs(**options: Any) -> Block:
    torch.manual_seed(0)
    return Block(Torchs(**options)).eval()


def inner(model: nn.Module) -> Any:
    return model.attn.inner  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"crossed": True}])
def test_heads_that_go_are_as_if_silenced(options: dict[str, Any]) -> None:
    """Silenced by hand in the dense model, which is torch's own: the output projection's weights are zero."""
    model = torchs(**options).double()
    dense, same = copy.deepcopy(model), inner(model)
    ignore = [*OTHERS, *(["attn.context"] if "crossed" in options else [])]
    report = prune_(model, EXAMPLE.double(), ratio=0.5, allocation="local", ignore=ignore)
    plan: Plan = getattr(model, PLAN_ATTRIBUTE)
    (cut,) = (cut for cut in plan.cuts if (cut.path, cut.side) == ("attn.inner.out_proj", "in"))
    assert inner(model) is same
    assert (type(same), same.num_heads, same.q_proj.out_features) == (PrunableAttention, 2, 6)
    assert report.max_error < 1e-10
    with torch.no_grad():
        inner(dense).out_proj.weight[:, cut.removed] = 0
        torch.testing.assert_close(model(EXAMPLE.double()), dense(EXAMPLE.double()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["none", "mean", "linear", "reconstruct"])
def test_with_all_else_and_a_step_of_training(how: Any) -> None:
    model = torchs()
    before = sum(p.numel() for p in model.parameters())
    images = torch.randn(64, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    report = prune_(model, EXAMPLE, ratio=0.5, allocation="local", compensation=how, calibration=images)
    assert report.max_error < 1e-10
    assert report.params_after == sum(p.numel() for p in model.parameters()) < 0.4 * before
    model.train()(EXAMPLE).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_its_layers_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of queries, keys and values are layers of the copy alone."""
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path))
    monkeypatch.setattr("ss_pruning.profiling.layer_latency.race", lambda *_: [Timing((1e-3,))])
    model = torchs()
    report = prune_(model, EXAMPLE, macs=0.7, allocation=Allocation(round_to="measured"))
    assert report.macs_after < 0.7 * report.macs_before
    assert len(list(tmp_path.iterdir())) >= 5


def test_what_loses_nothing_stays_torchs() -> None:
    model = torchs()
    prune_(model, EXAMPLE, ratio=0.5, allocation="local", ignore=("embed", "attn"))
    assert type(inner(model)) is nn.MultiheadAttention
    assert model.fc1.out_features == 8


def test_pruned_again() -> None:
    model = torchs()
    for heads in (2, 1):
        report = prune_(model, EXAMPLE, ratio=0.5, allocation="local", ignore=OTHERS)
        assert report.max_error < 1e-10
        assert inner(model).num_heads == heads


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = torchs()
    prune_(model, EXAMPLE, ratio=0.5, allocation="local", compensation="mean")
    save(model, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", torchs)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(EXAMPLE), model(EXAMPLE))
    fresh = torchs()
    getattr(model, PLAN_ATTRIBUTE).apply_(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(EXAMPLE), model(EXAMPLE))


@pytest.mark.parametrize("failing", ["plan", "cut"])
def test_a_failure_leaves_torchs_module(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchs()
    before = snapshot(model)

    def fail(*_: Any, **__: Any) -> None:
        raise SSPruningError("boom")

    names = {"plan": "ss_pruning.pruning.find_verified_plan", "cut": "ss_pruning.pruning.adopt_"}
    monkeypatch.setattr(names[failing], fail)
    with pytest.raises(SSPruningError, match="boom"):
        prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert snapshot(model) == before


class Reading(Torchs):
    """Looks at the packed weight, which only torch's module has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.inner.in_proj_weight.shape[0]


def test_where_it_cannot_be_replaced_it_is_named() -> None:
    for attention in (Reading(), Torchs(add_zero_attn=True)):
        model = Block(attention).eval()
        report = prune_(model, EXAMPLE, ratio=0.5, allocation="local")
        assert type(inner(model)) is nn.MultiheadAttention
        assert any("'attn.inner' (MultiheadAttention" in left.reason for left in report.excluded)


def test_a_model_that_would_differ_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrunableAttention, "_heads", lambda self, x: x.unflatten(-1, (4, -1)).transpose(1, 2))
    model = torchs()
    assert same_attention.with_prunable_attention(model, EXAMPLE) is model


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_of_torch(norm_first: bool) -> None:
    """In eval mode they have a fast path of their own, which reads the packed weight."""

    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
            self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(self.embed(x)).mean(1))
            return y

    torch.manual_seed(0)
    model, x = Encoded().eval(), torch.randn(2, 5, 6)
    report = prune_(model, x, ratio=0.5, allocation="local")
    assert report.max_error < 1e-10
    assert model.layer.self_attn.num_heads == 2
    with torch.no_grad():
        assert model(x).shape == (2, 3)


@pytest.mark.slow
def test_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    from ss_pruning.io.export import export

    model = torchs(batch_first=True)
    prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert export(model, tmp_path / "small.onnx", EXAMPLE).max_error < 1e-5
