"""Compensated surgery: exact where theory says exact, better than a plain cut elsewhere, and never a broken model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ss_pruning
from ss_pruning import prune_
from ss_pruning.compensation.folding import _is_padded, fold_linear_, fold_means_
from ss_pruning.compensation.normal_equations import change
from ss_pruning.compensation.reconstruction import reconstruct_
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import gather
from ss_pruning.importance.regression import Predicted, precision
from ss_pruning.planning.allocation import to_plan
from ss_pruning.surgery.plan import Plan
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, randomise


class TwoLayers(nn.Module):
    """conv -> BN -> ReLU -> conv -> (BN) -> ReLU -> pool -> linear, with the parts that matter as options."""

    def __init__(self, kernel: int = 1, padding: int = 0, norm_behind: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, kernel, padding=padding, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(6) if norm_behind else nn.Identity()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def double_net(**options: int | bool) -> TwoLayers:
    torch.manual_seed(0)
    return randomise(TwoLayers(**options), 0).double().eval()  # type: ignore[arg-type]


def images(n: int = 40) -> Tensor:
    return torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plan_without(model: nn.Module, removed: list[int], x: Tensor) -> tuple[Plan, TracedModel]:
    """Cut the given output channels of conv1."""
    traced = TracedModel.of(model, x)
    coupling = traced.coupling
    group = next(u for u in coupling.groups if u.name == "conv1")
    selection = {}
    for subgroup in group.subgroups:
        for member in subgroup.members:
            pruned = {
                channel
                for row, root in zip(member.index, subgroup.root.index[:, 0], strict=True)
                if root in removed
                for channel in row.tolist()
            }
            width = coupling.widths[member.path, member.side]
            before = selection.get((member.path, member.side), tuple(range(width)))
            selection[member.path, member.side] = tuple(c for c in before if c not in pruned)
    return to_plan(selection, coupling, traced.connectivity), traced


def cut(model: nn.Module, removed: list[int], x: Tensor) -> tuple[nn.Module, Plan, TracedModel]:
    import copy

    plan, traced = plan_without(model, removed, x)
    return plan.apply_(copy.deepcopy(model)), plan, traced


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


def make_duplicates(model: TwoLayers) -> None:
    """Channels 6 and 7 of the first layer become copies of 0 and 1."""
    with torch.no_grad():
        for tensor in (
            model.conv1.weight,
            *model.bn1.parameters(),
            model.bn1.running_mean,
            model.bn1.running_var,
        ):
            tensor[6:8] = tensor[0:2]


@pytest.mark.parametrize("padding", [0, 1])
def test_duplicates_go_without_a_trace_by_linear(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ss_pruning.importance.regression._share", lambda *_: 1e-9)
    dense, x = double_net(kernel=3, padding=padding), images()
    make_duplicates(dense)
    small, plan, traced = cut(dense, [6, 7], x)
    plain = error(dense, small, x)
    fold_linear_(small, traced, plan, x)
    assert plain > 1e-2
    assert error(dense, small, x) < 1e-8


def test_affine_copies_go_without_a_trace_by_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """`x_6 = 2 x_0 + 3`: a slope from statistics that are not about the mean would be another."""
    monkeypatch.setattr("ss_pruning.importance.regression._share", lambda *_: 1e-9)
    dense, x = double_net(), images()
    with torch.no_grad():
        dense.bn1.bias.fill_(50.0)  # far above the rectifier
        for tensor in (dense.conv1.weight, dense.bn1.running_mean, dense.bn1.running_var):
            tensor[6] = tensor[0]
        dense.bn1.weight[6], dense.bn1.bias[6] = 2 * dense.bn1.weight[0], 2 * dense.bn1.bias[0] + 3
    small, plan, traced = cut(dense, [6], x)
    assert error(dense, small, x) > 1e-2
    fold_linear_(small, traced, plan, x)
    assert error(dense, small, x) < 1e-7


def test_a_channel_that_is_zero_does_no_harm_at_a_padded_border() -> None:
    dense, x = double_net(kernel=3, padding=1), images()
    with torch.no_grad():
        dense.bn1.weight[6], dense.bn1.bias[6] = 0.0, -1.0  # behind the rectifier: 0
    small, plan, traced = cut(dense, [6], x)
    outcome = fold_means_(small, traced, plan, x)
    assert outcome.layers == ["conv2"]
    assert outcome.inexact == []
    assert error(dense, small, x) < 1e-12


@pytest.mark.parametrize("norm_behind", [True, False])
def test_duplicates_go_without_a_trace_by_reconstruct(
    norm_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ss_pruning.compensation.normal_equations._RIDGES", (1e-10,))
    dense, x = double_net(kernel=3, padding=1, norm_behind=norm_behind), images()
    make_duplicates(dense)
    small, plan, traced = cut(dense, [6, 7], x)
    reconstruct_(small, traced, plan, x)
    assert error(dense, small, x) < 1e-4  # patches are gathered in float32


def make_constant(model: TwoLayers) -> None:
    """Channel 5 of the first layer is 0.7 everywhere."""
    with torch.no_grad():
        model.bn1.weight[5], model.bn1.bias[5] = 0.0, 0.7


@pytest.mark.parametrize(("kernel", "padding", "exact"), [(1, 0, True), (3, 0, True), (3, 1, False)])
@pytest.mark.parametrize("norm_behind", [True, False])
@pytest.mark.parametrize("source", ["gaussian", "data"])
def test_a_constant_folds_exactly_unless_a_border_is_padded(
    kernel: int, padding: int, exact: bool, norm_behind: bool, source: str
) -> None:
    dense, x = double_net(kernel=kernel, padding=padding, norm_behind=norm_behind), images()
    make_constant(dense)
    small, plan, traced = cut(dense, [5], x)
    outcome = fold_means_(small, traced, plan, x if source == "data" else None)
    assert outcome.inexact == ([] if exact else ["conv2"])
    assert outcome.biases == ([] if norm_behind else ["conv2"])
    difference = error(dense, small, x)
    assert difference < 1e-6 if exact else difference > 1e-6


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (4, 2), (1, 2)])
def test_a_transposed_layer_puts_out_a_constant_on_average(kernel: int, stride: int) -> None:
    """Inside, a constant comes out as a pattern of the stride's period; the bias is its mean."""
    dense, x = double_net(norm_behind=False), images()
    dense.conv2 = randomise(nn.ConvTranspose2d(8, 6, kernel, stride), 2).double()
    make_constant(dense)
    small, plan, traced = cut(dense, [5], x)
    before = small.conv2.bias.detach().clone()
    outcome = fold_means_(small, traced, plan, x)
    alone = torch.zeros(1, 8, 12, 12, dtype=torch.float64)
    alone[:, 5] = 0.7
    with torch.no_grad():
        pattern = F.conv_transpose2d(alone, dense.conv2.weight, stride=stride)[:, :, 4:-4, 4:-4]
    period = pattern[:, :, : 2 * stride, : 2 * stride]
    assert torch.allclose(small.conv2.bias - before, period.mean((0, 2, 3)))
    assert outcome.inexact == ([] if kernel == stride == 1 else ["conv2"])


def test_mean_equals_plain_loops() -> None:
    dense, x = double_net(kernel=3, padding=1, norm_behind=False), images()
    removed = [1, 4]
    small, plan, traced = cut(dense, removed, x)
    fold_means_(small, traced, plan, x)
    with torch.no_grad():
        maps = F.relu(dense.bn1(dense.conv1(x)))
    for k in range(6):
        expected = 0.0
        for r in removed:
            expected += float(maps[:, r].mean()) * sum(
                float(w) for w in dense.conv2.weight[k, r].detach().flatten()
            )
        assert float(small.conv2.bias.detach()[k]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["linear", "reconstruct"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "residual_chain",
            "dense",
            "separable",
            "grouped",
            "padded_shortcut",
            "flattened",
            "transposed",
            "doubled",
        ),
        *("squeeze_excite_conv", "swapped_chunks", "one_dimension", "three_dimensions", "norm_free"),
    ],
)
def test_it_brings_outputs_nearer_to_the_dense_ones(name: str, method: str) -> None:
    net = BY_NAME[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, *net.shapes[0][1:], generator=generator)
    dense, plain, better = net.make().eval(), net.make().eval(), net.make().eval()
    prune_(plain, net.example, ratio=0.4)
    prune_(better, net.example, ratio=0.4, compensation=method, calibration=x[:64])
    with torch.no_grad():
        target = dense(x[64:])
        before, after = (float((model.eval()(x[64:]) - target).square().mean()) for model in (plain, better))
    assert after < before


def test_flags_survive_and_the_plan_rebuilds_the_model(tmp_path: Path) -> None:
    dense, x = double_net(norm_behind=False).float().train(), images().float()
    dense.conv1.weight.requires_grad_(False)
    report = prune_(dense, x[:1], ratio=0.4, compensation="reconstruct", calibration=x)
    assert report.settings["compensation"] == "reconstruct"
    assert dense.training
    assert not dense.conv1.weight.requires_grad
    assert dense.conv2.bias is not None
    ss_pruning.save(dense, tmp_path / "m.safetensors")
    same = ss_pruning.load(tmp_path / "m.safetensors", lambda: TwoLayers(norm_behind=False))
    with torch.no_grad():
        assert torch.equal(same(x), dense.eval()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "magic"}, "magic"),
        ({"compensation": "reconstruct"}, "needs calibration"),
        ({"compensation": "linear", "calibration": []}, "empty"),
        ({"compensation": "mean", "calibration": [["no", "tensor"]]}, "str"),
    ],
)
def test_bad_options_leave_the_model_alone(options: dict[str, object], message: str) -> None:
    model, x = double_net().float(), images().float()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        prune_(model, x[:1], ratio=0.4, **options)  # type: ignore[arg-type]
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ["mean", "linear", "reconstruct"])
def test_images_of_the_wrong_shape_leave_the_model_alone(method: str) -> None:
    model, x = double_net().float(), images().float()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"channels|does not run"):
        prune_(
            model,
            x[:1],
            ratio=0.4,
            compensation=method,
            calibration=torch.arange(4500.0).reshape(9, 5, 10, 10),
        )
    assert snapshot(model) == before


def test_batches_are_joined_up_to_a_limit() -> None:
    batches = [(torch.full((3, 1), float(i)), torch.zeros(3)) for i in range(4)]
    assert gather(batches, torch.zeros(1, 1), most=7).inputs.flatten().tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_reconstruct_copes_with_an_input_that_says_the_same_as_the_bias() -> None:
    """A constant among many inputs that are zero: sums in single precision can then be indefinite."""
    rows, inputs = 1000.0, 289
    gram = torch.zeros(1, inputs, inputs, dtype=torch.float64)
    for i, j in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        gram[0, i, j] = rows
    gram[0, -1, -1] *= 1 - 1e-6  # as rounding leaves it
    assert torch.linalg.eigvalsh(gram[0]).min() < 0
    cross = torch.zeros(1, inputs, 1, dtype=torch.float64)
    cross[0, 0], cross[0, -1] = 3 * rows, 3 * rows  # the output is 3 wherever the input is 1
    found = change(gram, cross, 1e-4)[0, :, 0]
    assert float(found[0] + found[-1]) == pytest.approx(3, rel=1e-3)
    assert found[1:-1].abs().max() == 0


def test_batches_are_gathered_up_to_so_many_and_no_more_are_read() -> None:
    read = []

    def loader() -> object:
        for number in range(10):
            read.append(number)
            yield torch.full((3, 2), float(number)), torch.zeros(3)

    found = gather(loader(), torch.zeros(1, 2), most=7).inputs
    assert found[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert read == [0, 1, 2]
    assert len(gather(torch.zeros(2000, 1), torch.zeros(1, 1))) == 1024


@pytest.mark.parametrize("calibration", [torch.zeros(0, 3, 10, 10), [], 5], ids=["tensor", "list", "number"])
@pytest.mark.parametrize("method", ["none", "mean", "linear", "reconstruct"])
def test_nothing_to_calibrate_on_is_no_calibration(calibration: Any, method: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    before = snapshot(model)
    with pytest.raises(InputError, match="give"):
        prune_(model, torch.zeros(1, 3, 10, 10), macs=0.5, compensation=method, calibration=calibration)
    assert snapshot(model) == before


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_regression_is_the_ridge_solution_in_each_group(groups: int) -> None:
    """Against the formula, with the ridge a share of the mean variance in the group."""
    size, rows = 4, 10**6
    torch.manual_seed(0)
    mixed = (
        torch.randn(200, size * groups, dtype=torch.float64)
        @ torch.randn(size * groups, size * groups).double()
    )
    covariance, mean = 1e-4 * mixed.T @ mixed / 200, torch.arange(size * groups).float()
    for share, seen in ((1e-3, rows), (size / 100, 100)):
        kept = torch.tensor([size * g + i for g in range(groups) for i in (0, 3)])
        removed = torch.tensor([size * g + i for g in range(groups) for i in (1, 2)])
        found = Predicted.of(mean, precision(covariance, groups, seen), kept, removed)
        assert found.slope is not None
        wanted = torch.zeros_like(found.slope)
        for g in range(groups):
            stay, go = torch.tensor([0, 3]) + size * g, torch.tensor([1, 2]) + size * g
            own = covariance[size * g : size * (g + 1), size * g : size * (g + 1)]
            ridge = share * own.trace() / size * torch.eye(2, dtype=torch.float64)
            inner = torch.linalg.inv(covariance[stay][:, stay] + ridge)
            wanted[2 * g : 2 * g + 2, 2 * g : 2 * g + 2] = inner @ covariance[stay][:, go]
        torch.testing.assert_close(found.slope, wanted, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found.constant, mean[removed].double() - mean[kept].double() @ wanted)


@pytest.mark.parametrize("method", ["mean", "linear"])
def test_the_outcome_names_the_layers_that_were_changed(method: str) -> None:
    x = images()
    for padding, inexact in ((0, []), (1, ["conv2"])):
        dense = double_net(kernel=3, padding=padding)
        small, plan, traced = cut(dense, [1, 4], x)
        if method == "mean":
            outcome = fold_means_(small, traced, plan, None)
        else:
            outcome = fold_linear_(small, traced, plan, x)
        assert outcome.layers == ["conv2"]
        assert outcome.inexact == inexact


@pytest.mark.parametrize(
    ("layer", "padded"),
    [
        (nn.Linear(2, 2), False),
        (nn.Conv2d(2, 2, 1, padding=1), False),
        (nn.Conv2d(2, 2, 3), False),
        (nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), True),
        (nn.Conv2d(2, 2, 3, padding="same"), True),
        (nn.Conv2d(2, 2, 3, padding="valid"), False),
        (nn.ConvTranspose2d(2, 2, 1), False),
        (nn.ConvTranspose2d(2, 2, 2), True),
        (nn.ConvTranspose2d(2, 2, 1, stride=2), True),
    ],
    ids=str,
)
def test_where_a_constant_may_meet_a_border(layer: nn.Module, padded: bool) -> None:
    assert _is_padded(layer) is padded


class Gated(TwoLayers):
    """Images in which some places do not count: what is added to their logits is minus infinity."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask.exp().mean((2, 3))


@pytest.mark.parametrize("method", ["mean", "linear"])
def test_masks_may_hold_infinity_where_the_example_does(method: str) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(24, 1, 9, 9).index_fill(3, torch.tensor([0, 1]), -torch.inf)
    inputs = {"x": torch.randn(24, 3, 9, 9), "mask": mask}
    model = randomise(Gated(), 0)
    report = prune_(
        model, {k: x[:2] for k, x in inputs.items()}, macs=0.7, compensation=method, calibration=inputs
    )
    assert report.fidelity is None or report.fidelity.error < 1
    assert all(p.isfinite().all() for p in model.parameters())


class TestWithoutImagesAndBatchNorms:
    """Means on noise are a guess where no batch norm tells them."""

    def model(self, norm: Any) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), norm(), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(216, 4)
        ).eval()

    @pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.GroupNorm(1, 8)])
    def test_the_cut_stays_a_plain_one(self, norm: Any) -> None:
        model, x = self.model(norm), torch.randn(1, 3, 8, 8)
        plain, folded = copy.deepcopy(model), copy.deepcopy(model)
        prune_(plain, x, ratio=0.5, importance="magnitude")
        report = prune_(folded, x, ratio=0.5, importance="magnitude", compensation="mean")
        assert report.not_compensated["3"].startswith("no batch norm tells")
        assert "lost inputs: 2 (no batch norm tells" in report.verification()
        assert torch.equal(plain(x), folded(x))

    def test_what_always_puts_out_the_same_is_known(self) -> None:
        """Dead channels go without a trace, as in pruned models."""
        model, x = self.model(nn.Identity), torch.randn(5, 3, 8, 8)
        with torch.no_grad():
            model[0].weight[:4] = 0.0
            model[0].bias[:4] = torch.arange(1.0, 5.0)
            wanted = model(x)
            prune_(model, x[:1], ratio=0.5, importance="magnitude", compensation="mean", ignore=["3"])
            assert model[0].out_channels == 4
            torch.testing.assert_close(model(x), wanted)

    def test_a_batch_norm_tells(self) -> None:
        model, x = self.model(lambda: nn.BatchNorm2d(8)), torch.randn(1, 3, 8, 8)
        plain, folded = copy.deepcopy(model), copy.deepcopy(model)
        prune_(plain, x, ratio=0.5, importance="magnitude")
        report = prune_(folded, x, ratio=0.5, importance="magnitude", compensation="mean")
        assert "3" not in report.not_compensated
        assert not torch.allclose(plain(x), folded(x))
