"""Layer types that users register: traced, scored, cut and verified like torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.layers import layer_type_of, layout_of, register_layer
from ss_pruning.graph.traced import TracedModel
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.strength import kernel_powers
from ss_pruning.planning.costs import Costs
from ss_pruning.profiling.macs import count_macs
from ss_pruning.sparsity.penalty import StrengthPenalty
from tests.support.snapshot import snapshot
from tests.support.zoo import randomise

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Standardised(nn.Module):
    """A convolution whose kernels have mean 0 and deviation 1 over all that an output reads; no `nn.Conv2d`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.pow(2).sum((1, 2, 3), keepdim=True) / (9 * self.inputs) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, padding=1)


class LowRank(nn.Module):
    """A linear map of rank 3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(3, inputs)), nn.Parameter(torch.randn(outputs, 3))

    @property
    def weight(self) -> Tensor:
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T


register_layer(outputs={"weight": 0, "bias": 0}, inputs={"weight": 1}, in_size="inputs", out_size="outputs")(
    Standardised
)
register_layer(outputs={"up": 0}, inputs={"down": 1}, axis=-1)(LowRank)


class Net(nn.Module):
    """Convolutions of torch's before and behind; norms between."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.own, self.bn2 = Standardised(8, 10, bias), nn.BatchNorm2d(10)
        self.conv2, self.bn3 = nn.Conv2d(10, 12, 3), nn.BatchNorm2d(12)
        self.low, self.fc = LowRank(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.own(x)).relu()
        x = self.bn3(self.conv2(x)).relu().mean((2, 3))
        return self.fc(self.low(x).relu())


def make(bias: bool = True) -> Net:
    torch.manual_seed(0)
    return randomise(Net(bias)).eval()


def kept_of(model: nn.Module, width: dict[str, int]) -> dict[str, list[int]]:
    """By layer, the outputs that stay."""
    kept = {cut.path: list(cut.kept) for cut in model.ss_pruning_plan.cuts if cut.side == "out"}
    return {path: kept.get(path, list(range(n))) for path, n in width.items()}


def by_hand(dense: Net, kept: dict[str, list[int]]) -> Net:
    """The smaller net written out: every tensor is sliced by the name that it has."""
    c1, own, c2, low = (kept[path] for path in ("conv1", "own", "conv2", "low"))
    small = Net(dense.own.bias is not None)
    d = dense.state_dict()
    sliced = {
        **{f"conv1.{n}": d[f"conv1.{n}"][c1] for n in ("weight", "bias")},
        "own.weight": d["own.weight"][own][:, c1],
        "conv2.weight": d["conv2.weight"][c2][:, own],
        "conv2.bias": d["conv2.bias"][c2],
        "low.down": d["low.down"][:, c2],
        "low.up": d["low.up"][low],
        "fc.weight": d["fc.weight"][:, low],
        "fc.bias": d["fc.bias"],
    }
    if dense.own.bias is not None:
        sliced["own.bias"] = d["own.bias"][own]
    for norm, stay in (("bn1", c1), ("bn2", own), ("bn3", c2)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            sliced[f"{norm}.{name}"] = d[f"{norm}.{name}"][stay]
    for name, tensor in sliced.items():
        owner, _, attribute = name.rpartition(".")
        module = small.get_submodule(owner)
        table = module._parameters if attribute in module._parameters else module._buffers
        table[attribute] = nn.Parameter(tensor.clone()) if table is module._parameters else tensor.clone()
    small.own.inputs, small.own.outputs = len(c1), len(own)
    return small.double().eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", [{"macs": 0.3}, {"params": 0.3}, {"ratio": 0.6}], ids=str)
def test_the_cut_net_is_the_one_written_by_hand(budget: dict[str, float], bias: bool) -> None:
    dense, model = make(bias), make(bias)
    report = ss_pruning.prune_(model, X, **budget, compensation="none")
    kept = kept_of(model, {"conv1": 8, "own": 10, "conv2": 12, "low": 9})
    assert len(kept["own"]) < 10
    assert len(kept["conv1"]) < 8  # so that the registered layer lost inputs, too
    assert "ratio" not in budget or len(kept["low"]) < 9
    assert (model.own.inputs, model.own.outputs) == (len(kept["conv1"]), len(kept["own"]))
    torch.testing.assert_close(
        model.double()(X.double()), by_hand(dense, kept)(X.double()), rtol=0, atol=1e-10
    )
    assert report.max_error <= 1e-10
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert report.macs_after == count_macs(model, X.double())[0]
    assert not {"own", "low"} & {path for left in report.excluded for path in left.paths if path != "fc"}


def test_removed_channels_of_a_linear_layer_count_as_zeros() -> None:
    """Cut equals masked: what is removed of the low-rank layer's inputs and outputs is set to zero in the dense net."""
    dense, model = make().double(), make().double()
    ss_pruning.prune_(model, X.double(), ratio=0.5, compensation="none", ignore=["conv1", "own"])
    kept = kept_of(model, {"conv2": 12, "low": 9})

    def only(stay: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            mask = torch.zeros(args[0].shape[1], dtype=args[0].dtype)
            mask[stay] = 1
            return (args[0] * mask,)

        return hook

    dense.low.register_forward_pre_hook(only(kept["conv2"]))
    dense.fc.register_forward_pre_hook(only(kept["low"]))
    assert len(kept["low"]) < 9
    torch.testing.assert_close(model(X.double()), dense(X.double()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("compensation", ["mean", "linear", "reconstruct"])
def test_compensation_leaves_registered_layers_as_they_are(compensation: str) -> None:
    model, dense = make(), make()
    images = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    report = ss_pruning.prune_(model, X, ratio=0.6, compensation=compensation, calibration=images)
    kept = kept_of(model, {"conv1": 8, "own": 10, "conv2": 12, "low": 9})
    assert {"own", "low"} <= set(report.not_compensated)
    assert torch.equal(model.own.weight, dense.own.weight[kept["own"]][:, kept["conv1"]])
    assert torch.equal(model.low.up, dense.low.up[kept["low"]])
    assert model(X).isfinite().all()


def test_gradients_flags_and_training_survive() -> None:
    model = make().train()
    model.own.weight.requires_grad_(False)
    model(X).sum().backward()
    grads = model.low.up.grad.clone()
    ss_pruning.prune_(model, X, ratio=0.5, compensation="none")
    kept = kept_of(model, {"low": 9})["low"]
    assert not model.own.weight.requires_grad
    assert torch.equal(model.low.up.grad, grads[kept])
    assert model.training
    model(X).sum().backward()


def test_strengths_are_those_of_its_weight() -> None:
    model = make()
    strengths = ss_pruning.synaptic_strength(model, X)
    for path in ("own", "low"):
        weight = model.get_submodule(path).weight
        gamma = model.get_submodule({"own": "bn1", "low": "bn3"}[path]).weight
        for k in range(weight.shape[0]):
            for c in range(weight.shape[1]):
                expected = gamma[c].abs() * weight[k, c].norm()
                assert strengths[path][k, c].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_subclass_is_of_the_registered_type_and_a_stranger_is_not() -> None:
    class Child(Standardised):
        pass

    class Stranger(nn.Module):
        pass

    assert layer_type_of(Child(2, 2)) is layer_type_of(Standardised(2, 2)) is not None
    assert layer_type_of(Stranger()) is None


class Unregistered(nn.Module):
    """A layer of which nobody has told."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


def test_an_unregistered_layer_stays_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Unregistered(), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)
    ).eval()
    report = ss_pruning.prune_(model, X, ratio=0.5, compensation="none")
    assert model[2].weight.shape == (6, 8, 3, 3)
    assert any("0" in left.paths for left in report.excluded)


def refused(module: nn.Module, match: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), module, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    before = snapshot(model)
    with pytest.raises(ModelError, match=match):
        trace(model, X)
    assert snapshot(model) == before


def test_a_wrong_axis_is_named() -> None:
    @register_layer(outputs={"weight": 1}, inputs={"weight": 0})
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(F.conv2d(x, self.weight), (0, 0, 0, 0, 0, 2))

    refused(
        Swapped(), "'2' reads 8 channels on axis 1, and its tensors have 6: see how Swapped is registered"
    )


def test_a_missing_tensor_is_named() -> None:
    @register_layer(outputs={"wieght": 0}, inputs={"weight": 1})
    class Misspelt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)

    refused(Misspelt(), "Misspelt is registered with a tensor 'wieght'")


def test_a_missing_size_is_named() -> None:
    @register_layer(outputs={"weight": 0}, inputs={"weight": 1}, out_size="out")
    class Sizeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight)

    refused(Sizeless(), "Sizeless is registered with out_size='out'; the layer has no such attribute")


def test_a_layer_inside_a_registered_one_is_refused() -> None:
    @register_layer(outputs={"weight": 0}, inputs={"weight": 1})
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 1)

        @property
        def weight(self) -> Tensor:
            return self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    refused(Wrapper(), "holds another, 'inner'")


def test_a_side_without_tensors_is_refused() -> None:
    with pytest.raises(InputError, match="at least one tensor"):
        register_layer(outputs={}, inputs={"weight": 1})


def test_kernel_powers_of_a_weight_without_taps() -> None:
    layer = LowRank(4, 2)
    assert torch.equal(kernel_powers(layer), layer.weight.square())


def test_sparse_training_and_compaction_do_it_no_harm() -> None:
    """Compacted without harm; not shrunk, and then nothing is."""
    model = make()
    with torch.no_grad():
        model.own.weight[3] = 0
        model.conv1.weight[4] = 0
    expected = model(X)
    ss_pruning.compact_(model, X)
    torch.testing.assert_close(model(X), expected)
    before = snapshot(model)
    with pytest.raises(ModelError, match="the weight of a LowRank is computed from several parameters"):
        StrengthPenalty(model, X).shrink_(1e-3)
    assert snapshot(model) == before


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = make()
    ss_pruning.prune_(model, X, ratio=0.5)
    ss_pruning.save(model, tmp_path / "small.safetensors")
    loaded = ss_pruning.load(tmp_path / "small.safetensors", make)
    assert loaded.own.inputs == model.own.inputs < 8
    assert torch.equal(loaded(X), model(X))


def test_foreign_importances_do_without_it() -> None:
    tp = pytest.importorskip("torch_pruning")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Standardised(8, 6), Standardised(6, 6), nn.Conv2d(6, 4, 1)
    ).eval()
    ss_pruning.prune_(model, X, ratio=0.2, importance=tp.importance.GroupMagnitudeImportance())
    assert len(model[0].weight) < 8
    assert len(model[1].weight) == 6  # nothing in that group is known to Torch-Pruning


def test_costs_know_which_tensors_shrink() -> None:
    model = make()
    costs = Costs(TracedModel.of(model, X))
    ss_pruning.prune_(model, X, ratio=0.5, compensation="none")
    removed = np.zeros(len(costs.keys))
    for cut in model.ss_pruning_plan.cuts:
        removed[costs.keys.index((cut.path, cut.side))] = len(cut.removed)
    assert costs.after("params", removed) == sum(p.numel() for p in model.parameters())
    assert costs.after("macs", removed) == pytest.approx(count_macs(model, X)[0])


def test_the_layout_of_torchs_layers_is_that_of_their_tensors() -> None:
    for layer in (nn.Conv1d(3, 5, 2), nn.Conv3d(3, 5, 2), nn.ConvTranspose2d(3, 5, 2), nn.Linear(3, 5)):
        layout = layout_of(layer)
        for side, n in (("in", 3), ("out", 5)):
            assert getattr(layer, layout.sizes[side]) == n
            for name, axis in layout.axes[side].items():
                assert getattr(layer, name).shape[axis] == n
    assert layout_of(nn.BatchNorm2d(3)) is None
