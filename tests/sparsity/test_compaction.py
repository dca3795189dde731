"""Compaction from outside: a masked net and its compacted twin must put out the same, and little must stay."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ss_pruning
from ss_pruning import compact_, prune_
from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import output_of
from ss_pruning.errors import InputError, ModelError, VerificationError
from ss_pruning.sparsity import compaction
from ss_pruning.sparsity.constant_folding import CARRIER_REASON, MIXED_REASON, PATTERN_REASON
from ss_pruning.sparsity.dead_channels import living_kernels
from ss_pruning.sparsity.size import Compaction
from tests.graph.test_coverage_cases import GlobalResponse
from tests.support import oracle
from tests.support.snapshot import Bomb, snapshot
from tests.support.zoo import BY_NAME, ZOO, conv, pooled, randomise

# Kernels of zeros have no standard deviation to be divided by.
NETS = [net for net in ZOO if net.name != "standardised"]


def mask(model: nn.Module, share: float, kind: str = "kernel", seed: int = 1) -> nn.Module:
    """Zero a random share of all kernels, of all outputs (biases stay) or of all inputs, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, oracle.LAYERS):
            continue
        outputs, inputs = oracle.widths(layer)
        per_group = inputs // oracle.groups_of(layer)
        shape = {"kernel": (outputs, per_group), "out": (outputs, 1), "in": (1, per_group)}[kind]
        pruned = (torch.rand(shape, generator=generator) < share).expand(outputs, per_group)
        with torch.no_grad():
            for k, j in pruned.nonzero().tolist():
                zero(layer, k, j)
    return model


def zero(layer: nn.Module, k: int, j: int) -> None:
    """Zero the kernel from input number `j` (within its group) to output `k`."""
    if isinstance(layer, oracle.TRANSPOSED):
        per_group = oracle.widths(layer)[0] // oracle.groups_of(layer)
        layer.weight[oracle.input_of(layer, k, j), k % per_group] = 0
    else:
        layer.weight[k, j] = 0


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What the model puts out in evaluation mode."""
    with torch.no_grad():
        return oracle.tensors(copy.deepcopy(model).eval()(*inputs))


def difference(a: nn.Module, b: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference between two models' outputs, relative to the largest output."""
    pairs = list(zip(outputs(a, inputs), outputs(b, inputs), strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)) for x, y in pairs)


def compacted(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, Compaction]:
    """A compacted copy, checked against the model in float64 on fresh inputs."""
    small = copy.deepcopy(model)
    report = compact_(small, inputs if len(inputs) > 1 else inputs[0])
    generator = torch.Generator().manual_seed(99)
    fresh = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) * 2 for x in inputs)
    assert difference(model, small, fresh) < 1e-10
    assert report.max_error < 1e-10
    return small, report


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("kernel", 0.8),
        ("out", 0.5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("kernel", 0.5), ("kernel", 0.95), ("in", 0.5)]
        ),
    ],
)
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_compacted_equals_masked(net: object, kind: str, share: float) -> None:
    model = mask(net.make().double(), share, kind)
    inputs = tuple(x.double() for x in net.inputs)
    if not any(bool(t.any()) for t in tensors_in(output_of(model, inputs)).values()):
        with pytest.raises(ModelError, match="nothing that the model returns"):
            compacted(model, inputs)
        return
    small, report = compacted(model, inputs)
    assert report.after.params == sum(p.numel() for p in small.parameters())
    assert report.after.params <= report.before.params
    assert (report.channels_removed > 0) == (report.after.params < report.before.params)
    # What is left of a cut may be silent, and then nothing can be compared.
    wrong = [left for left in report.excluded if "relies on" in left.reason]
    assert [left for left in wrong if "could be compared" not in left.reason] == []


@pytest.mark.parametrize(
    "name", ["residual_chain", "dense", "grouped", "separable", "squeeze_excite_conv", "flattened"]
)
def test_one_pass_finds_everything(name: str) -> None:
    net = BY_NAME[name]
    small, first = compacted(mask(net.make().double(), 0.85), tuple(x.double() for x in net.inputs))
    assert first.channels_removed > 0
    _, again = compacted(small, tuple(x.double() for x in net.inputs))
    assert again.channels_removed == 0


@pytest.mark.parametrize("training", [True, False])
def test_flags_stay_and_single_precision_is_close(training: bool) -> None:
    net = BY_NAME["residual_chain"]
    model = mask(net.make(), 0.8).train(training)
    model.conv0.weight.requires_grad_(False)
    masked = copy.deepcopy(model)
    compact_(model, net.example)
    assert model.training is training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model.conv0.weight.requires_grad
    assert sum(not p.requires_grad for p in model.parameters()) == 1
    assert difference(masked, model, net.inputs) < 1e-6


# ----------------------------------------------------------------------------------------------------------
# What counts as dead


class Chain(nn.Module):
    """conv norm relu conv norm relu linear, with the padding of the convolutions to choose."""

    def __init__(self, padding: int, mode: str = "zeros") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=padding, padding_mode=mode, bias=False)
        self.n1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=padding, padding_mode=mode, bias=False)
        self.n2 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.conv1(x)))
        return self.fc(pooled(F.relu(self.n2(self.conv2(x)))))


def chain(padding: int, beta: float, mode: str = "zeros") -> nn.Module:
    """A chain of which outputs 0 to 3 of the first convolution are dead: their norms put out about `beta`."""
    model = randomise(Chain(padding, mode)).double().eval()
    with torch.no_grad():
        model.conv1.weight[:4] = 0
        model.n1.running_mean[:4] = 0
        model.n1.bias[:4] = torch.tensor([1.0, 1.5, 2.0, 2.5]) * beta
    return model


IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double(),)


@pytest.mark.parametrize(
    ("padding", "mode", "beta", "left"),
    [
        (0, "zeros", 0.5, 4),
        (1, "zeros", -0.5, 4),
        (1, "zeros", 0.5, 5),
        (1, "reflect", 0.5, 4),
        (1, "circular", 0.5, 4),
    ],
)
def test_constants_go_where_it_is_exact(padding: int, mode: str, beta: float, left: int) -> None:
    small, report = compacted(chain(padding, beta, mode), IMAGE)
    assert small.conv1.out_channels == left
    carriers = [stay.channels for stay in report.excluded if stay.reason == CARRIER_REASON]
    assert carriers == ([1] if left == 5 else [])


def test_without_a_bias_or_norm_a_layer_gets_a_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:5], model[0].bias[:5] = 0, 1
    small, _ = compacted(model, (torch.randn(2, 3).double(),))
    assert small[0].out_features == 3
    assert small[2].bias is not None
    assert small.ss_pruning_plan.biases == ("2",)


def test_a_closed_rectifier_is_not_dead() -> None:
    """Noise never opens it; an image might."""
    model = chain(1, 0.5)
    with torch.no_grad():
        model.n1.bias[4:] = -50
    small, _ = compacted(model, IMAGE)
    assert small.conv1.out_channels == 5


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid, nn.ReLU6])
def test_one_image_is_enough(batch: int, gate: Callable[[], nn.Module]) -> None:
    """Vectors of one image have no spread: only other noise shows that they are alive."""
    torch.manual_seed(0)
    parts = [nn.Linear(3, 16), nn.BatchNorm1d(16), gate(), nn.Linear(16, 12), gate(), nn.Linear(12, 2)]
    model = randomise(nn.Sequential(*parts)).double().eval()
    small, report = compacted(model, (torch.randn(batch, 3).double(),))
    assert report.channels_removed == 0
    assert small[0].out_features == 16


def test_tokens_are_no_constants() -> None:
    """Noise cannot stand in for what is looked up: it only seems to be the same every time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    small, same = copy.deepcopy(model), torch.ones(2, 5, dtype=torch.long)
    assert compact_(small, same).channels_removed == 0
    with torch.no_grad():
        model[1].weight[:3] = 0
    small = copy.deepcopy(model)
    assert compact_(small, same).channels_removed == 3
    assert difference(model, small, (torch.arange(9)[None],)) < 1e-10


def test_a_zero_scale_is_dead() -> None:
    model = chain(1, -0.5)
    with torch.no_grad():
        model.n1.weight[6:] = 0
        model.n1.bias[6:] = -1
    small, _ = compacted(model, IMAGE)
    assert small.conv1.out_channels == 2


def test_nothing_reads_backwards() -> None:
    """What only dead channels read is dead too, in one pass."""
    model = chain(1, 0.5)
    with torch.no_grad():
        model.fc.weight[:, 2:] = 0
        model.conv2.weight[:2, :7] = 0
    small, _ = compacted(model, IMAGE)
    assert (small.conv1.out_channels, small.conv2.out_channels) == (1, 2)


def test_a_pattern_at_the_border_stays() -> None:
    """A dead channel behind a padded convolution of constants has a border: it is no constant, and is named."""
    model = chain(1, 0.5)
    with torch.no_grad():
        model.conv2.weight[:3, 4:] = 0
    with torch.no_grad():
        model.n2.bias[:3] = 5  # all of the pattern passes the rectifier

    class Longer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.conv3 = model, conv(6, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.inner.n1(self.inner.conv1(x)))
            return self.conv3(F.relu(self.inner.n2(self.inner.conv2(x))))

    torch.manual_seed(0)
    small, report = compacted(Longer().eval(), IMAGE)
    assert small.inner.conv2.out_channels == 6
    assert [left.channels for left in report.excluded if left.reason == PATTERN_REASON] == [3]


class Branches(nn.Module):
    """A residual branch that can die."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = conv(3, 8), nn.BatchNorm2d(8)
        self.a, self.na = conv(8, 12), nn.BatchNorm2d(12)
        self.b, self.nb = conv(12, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        return self.fc(pooled(x + self.nb(self.b(F.relu(self.na(self.a(x)))))))


@pytest.mark.parametrize("layer", ["a", "b"])
def test_a_dead_branch_keeps_one_channel(layer: str) -> None:
    model = randomise(Branches()).double().eval()
    model.get_submodule(layer).weight.data.zero_()
    small, report = compacted(model, IMAGE)
    assert (small.a.out_channels, small.stem.out_channels) == (1, 8)
    assert sum(left.channels for left in report.excluded) == 1


def test_a_norm_over_channels_keeps_its_dead() -> None:
    net = BY_NAME["group_norm"]
    model = mask(net.make().double(), 0.5, "out")
    small, report = compacted(model, tuple(x.double() for x in net.inputs))
    assert small.conv1.out_channels == 8
    assert any(left.reason == MIXED_REASON for left in report.excluded)


def test_standardised_weights_are_left_alone() -> None:
    """Kernels of zeros become something else there, if their row has others."""
    net = BY_NAME["standardised"]
    model = net.make().double()
    with torch.no_grad():
        model.conv2.weight[:, 0] = 0
    small, _ = compacted(model, tuple(x.double() for x in net.inputs))
    assert small.conv1.out_channels == 8


# ----------------------------------------------------------------------------------------------------------
# Plans, files, figures


def test_the_plan_composes_and_is_saved(tmp_path: object) -> None:
    net = BY_NAME["padded_shortcut"]
    model = net.make()
    prune_(model, net.example, params=0.85)
    mask(model, 0.8)
    masked = copy.deepcopy(model)
    report = compact_(model, net.example)
    assert report.channels_removed > 0
    assert difference(masked, model, net.inputs) < 1e-6
    ss_pruning.save(model, tmp_path / "small.safetensors")
    same = ss_pruning.load(tmp_path / "small.safetensors", net.make)
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(model, net.inputs), outputs(same, net.inputs), strict=True)
    )


@pytest.mark.parametrize(
    "name", ["residual", "grouped", "separable_twofold", "transposed_grouped", "flattened"]
)
def test_figures_match_plain_loops(name: str) -> None:
    net = BY_NAME[name]
    model = mask(net.make(), 0.6)
    living = total = sparse = 0
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    for layer in model.modules():
        if isinstance(layer, oracle.LAYERS):
            outs, ins = oracle.widths(layer)
            kernels = [
                oracle.kernel(layer, k, j) for k in range(outs) for j in range(ins // oracle.groups_of(layer))
            ]
            alive = sum(bool(kernel.any()) for kernel in kernels)
            living, total = living + alive, total + len(kernels)
            sparse += (
                min(alive * (4 * len(kernels[0]) + 4), 4 * layer.weight.numel()) - 4 * layer.weight.numel()
            )
            assert int(living_kernels(layer).sum()) == alive
    report = compact_(model, net.example)
    assert (report.before.living_synapses, report.before.synapses) == (living, total)
    assert (report.before.bytes, report.before.sparse_bytes) == (dense, dense + sparse)
    assert report.after.living_macs <= report.before.living_macs <= report.before.macs


def test_living_macs_of_one_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    report = compact_(model, torch.randn(1, 2, 6, 6))
    assert report.before.macs == 2 * 3 * 9 * 16
    assert report.before.living_macs == 5 * 9 * 16


def test_the_report_is_json_and_a_table() -> None:
    net = BY_NAME["dense"]
    report = compact_(mask(net.make(), 0.8), net.example)
    values = json.loads(report.to_json())
    assert values["after"]["params"] == report.after.params
    assert {left["reason"] for left in values["excluded"]} == {left.reason for left in report.excluded}
    assert report.table().row_count == 7
    assert len(str(report).splitlines()) == 9
    assert f"{report.after.params / report.before.params:.1%}".replace("%", " %") in str(report)
    assert len(repr(report)) < 300


# ----------------------------------------------------------------------------------------------------------
# Errors


def broken_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr(compaction._MaskedVerifier, "compacted", fail)


def nan_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (Bomb, ModelError, "boom"),
        (nan_weights, ModelError, "fc.weight"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(
    spoil: Callable[[nn.Module], nn.Module], error: type[Exception], message: str
) -> None:
    net = BY_NAME["residual"]
    model = spoil(mask(net.make(), 0.8).train())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compact_(model, net.example)
    assert repr(snapshot(model)) == repr(before)


def test_a_late_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = BY_NAME["residual"]
    model = mask(net.make(), 0.8).train()
    before = snapshot(model)
    broken_later(monkeypatch)
    with pytest.raises(RuntimeError, match="late"):
        compact_(model, net.example)
    assert snapshot(model) == before


def test_what_would_differ_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """If constants are moved wrongly, the check on values finds it, and the layers stay."""
    model = chain(0, 0.5)
    monkeypatch.setattr(compaction.Folding, "_to_bias", lambda *_: None)
    small, report = compacted(model, IMAGE)
    assert small.conv1.out_channels == 8
    assert any("differs from the masked one" in left.reason for left in report.excluded)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1].running_var.fill_(-1)
    with pytest.raises(ModelError, match="puts out NaN"):
        compact_(model, torch.randn(2, 3))


def test_nan_is_no_agreement() -> None:
    from ss_pruning.surgery.equivalence.agreement import compare

    with pytest.raises(VerificationError, match="nan"):
        compare(torch.ones(2), torch.tensor([1.0, torch.nan]), 1.0)


def test_a_wrapped_model_is_refused() -> None:
    """As NNI wraps it: the weight lies in a child module."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].add_module("_nni_wrapper", nn.Identity())
    for task in (compact_, ss_pruning.graph.trace, ss_pruning.synaptic_strength):
        with pytest.raises(InputError, match=r"'0' is wrapped by NNI: call unwrap_model"):
            task(model, torch.randn(1, 3, 4, 4))


def test_a_response_that_sees_all_channels_keeps_dead_ones() -> None:
    """It divides by a mean over channels, in which dead ones count; behind it no channel is a constant."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), GlobalResponse(8), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
    )
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[3].weight[:, 6:] = 0
        model[4].weight[:, :2] = 0
    x = torch.randn(2, 3, 9, 9)
    before = outputs(model, (x,))
    found = compact_(model, x)
    assert (model[0].out_channels, model[3].out_channels) == (8, 4)
    assert [left.channels for left in found.excluded if left.reason == MIXED_REASON] == [2]
    assert torch.allclose(before[0], outputs(model, (x,))[0], atol=1e-6)
