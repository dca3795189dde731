"""The repairs of others: against loops over the papers' formulas, and against what least squares must satisfy."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torch_pruning")

from benchmarks.accuracy.rivals import compensations
from benchmarks.accuracy.rivals.__main__ import chosen
from benchmarks.accuracy.rivals.compensations import (
    grail_,
    least_squares_,
    least_squares_in_order_,
    merge_neurons_,
    merging_scales,
    reconstruction_map,
)
from benchmarks.accuracy.rivals.page import write
from benchmarks.data.models import CifarResNet, stream_layers
from ss_pruning._utils.copying import copied
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.surgery.plan import Plan


def resnet() -> CifarResNet:
    """Three blocks with norms that do something, in double precision."""
    torch.manual_seed(0)
    model = CifarResNet(1).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3)
    return model


def cut(model: nn.Module, x: Tensor, ignore: list[str]) -> tuple[TracedModel, Plan]:
    """A plan by magnitude at half of the multiply-accumulates."""
    traced = TracedModel.of(model, x[:1], ignore)
    return traced, chosen(model, 0.5, "magnitude", x[:1], None)


def seen(model: nn.Module, paths: list[str], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules read and put out."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        hook = lambda _, read, output, path=path: found.__setitem__(path, (read[0], output))  # noqa: E731
        model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        model(x)
    return found


def steepness(module: Any, weight: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
    """The largest slope of what a 3x3 convolution's weights should minimise: its error on `x`, and the ridge."""
    weight = weight.detach().clone().requires_grad_()
    ridge = compensations.RIDGE * F.unfold(x, 3, 1, 1, module.stride).square().sum() / weight[0].numel()
    error = (F.conv2d(x, weight, None, module.stride, module.padding) - wanted).square().sum()
    (slope,) = torch.autograd.grad(error + ridge * weight.square().sum(), weight)
    return slope.abs().max()


@pytest.fixture(autouse=True)
def _few_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensations, "BATCH", 2)


def test_merging_follows_the_formulas_written_out() -> None:
    torch.manual_seed(1)
    filters, norm, kept = torch.randn(7, 3, 3, 3).double(), nn.BatchNorm2d(7).double(), [0, 3, 4]
    norm.weight.data = torch.tensor([1.0, 0.5, -0.7, 2.0, -1.5, 0.8, 0.3]).double()
    norm.bias.data.normal_()
    norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    g, b = norm.weight.tolist(), norm.bias.tolist()
    m, v = norm.running_mean.tolist(), (norm.running_var + norm.eps).sqrt().tolist()  # type: ignore[union-attr, operator]
    wanted = torch.zeros(7, 3).double()
    for i in range(7):
        if i in kept:
            wanted[i, kept.index(i)] = 1
            continue
        fits = []
        for place, k in enumerate(kept):
            s = float(filters[i].norm() / filters[k].norm())
            scale = s * g[i] / g[k] * v[k] / v[i]
            shift = g[i] / v[i] * (s * (m[k] - v[k] * b[k] / g[k]) - m[i]) + b[i]
            cosine = float(F.cosine_similarity(filters[i].flatten(), filters[k].flatten(), dim=0))
            if scale > 0:
                fits.append((place, scale, abs(shift) / scale, cosine))
        far = [fit[2] for fit in fits]
        span = max(max(far) - min(far), 1e-12)
        best = min(fits, key=lambda fit: 0.85 * (1 - fit[3]) + 0.15 * (fit[2] - min(far)) / span)
        if best[3] >= 0.1:
            wanted[i, best[0]] = best[1]
    assert bool((wanted[[1, 2, 5, 6]] > 0).any())
    assert torch.allclose(merging_scales(filters, norm, torch.tensor(kept)), wanted)


def test_a_filter_that_is_a_multiple_of_another_is_merged_without_loss() -> None:
    model = resnet()
    block = model.layer1[0]
    for i in range(8):  # the second half: multiples of the first, and behind the norm, too
        block.conv1.weight.data[8 + i] = 0.1 * (i + 1) * block.conv1.weight[i]
        block.bn1.weight.data[8 + i], block.bn1.bias.data[8 + i] = block.bn1.weight[i], block.bn1.bias[i]
        block.bn1.running_mean[8 + i] = 0.1 * (i + 1) * block.bn1.running_mean[i]
        variance = 0.01 * (i + 1) ** 2 * (block.bn1.running_var[i] + block.bn1.eps)
        block.bn1.running_var[8 + i] = variance - block.bn1.eps
    x = torch.randn(4, 3, 16, 16).double()
    traced, plan = cut(model, x, stream_layers(model))
    first = tuple(range(8))
    kept = Plan(tuple(replace(c, kept=first) for c in plan.cuts if c.path.startswith("layer1.0")))
    small, plain = (kept.cut_copy(copied(model)) for _ in range(2))
    merge_neurons_(small, traced, kept)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-10)
        assert not torch.allclose(plain(x), model(x), atol=1e-3)


def test_the_map_is_a_ridge_regression() -> None:
    torch.manual_seed(0)
    rows, kept = torch.randn(50, 5).double() @ torch.randn(5, 5).double(), torch.tensor([0, 3])
    gram = rows.T @ rows
    ridge = compensations.RIDGE * gram.diagonal()[kept].mean()
    more = torch.cat([rows[:, kept], ridge.sqrt() * torch.eye(2).double()])
    wanted = torch.cat([rows, torch.zeros(2, 5).double()])
    found = torch.linalg.lstsq(more, wanted).solution
    assert torch.allclose(reconstruction_map(gram, kept), found.T)


def test_grail_regresses_what_the_consumer_read_position_by_position() -> None:
    model, x = resnet(), torch.randn(3, 3, 16, 16).double()
    traced, plan = cut(model, x, stream_layers(model))
    small = plan.cut_copy(copied(model))
    grail_(small, traced, plan, Batch.of(x))
    read, _ = seen(copy.deepcopy(model), ["layer2.0.conv2"], x)["layer2.0.conv2"]
    kept = torch.tensor(next(c.kept for c in plan.cuts if (c.path, c.side) == ("layer2.0.conv2", "in")))
    rows = torch.stack([image[:, i, j] for image in read for i in range(8) for j in range(8)])
    mapping = reconstruction_map(rows.T @ rows, kept)
    weight = model.layer2[0].conv2.weight
    wanted = sum(weight[:, c, None] * mapping[c][None, :, None, None] for c in range(weight.shape[1]))
    assert torch.allclose(small.get_submodule("layer2.0.conv2").weight, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_order", [False, True])
def test_no_other_weights_put_out_the_dense_layers_output_better(in_order: bool) -> None:
    model, x = resnet(), torch.randn(3, 3, 16, 16).double()
    traced, plan = cut(model, x, stream_layers(model))
    small, path = plan.cut_copy(copied(model)), "layer2.0.conv2"
    (least_squares_in_order_ if in_order else least_squares_)(small, traced, plan, Batch.of(x))
    kept = torch.tensor(next(c.kept for c in plan.cuts if (c.path, c.side) == (path, "in")))
    dense, wanted = seen(copy.deepcopy(model), [path], x)[path]
    read = seen(copy.deepcopy(small), [path], x)[path][0] if in_order else dense[:, kept]
    layer, old = small.get_submodule(path), model.layer2[0].conv2.weight[:, kept]
    assert steepness(layer, layer.weight, read, wanted) < 1e-9 * steepness(layer, old, read, wanted)  # type: ignore[arg-type]


def test_the_end_of_a_branch_makes_up_for_the_error_of_the_shortcut() -> None:
    """In the block behind another that was cut the sum is what comes as near as it can."""
    model = resnet()
    model.layer1.append(copy.deepcopy(model.layer1[0]))
    stays = ["conv1", "layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2", "layer3.0.conv2"]
    x = torch.randn(3, 3, 16, 16).double()
    traced, plan = cut(model, x, stays)
    small, block = plan.cut_copy(copied(model)), "layer1.1"
    least_squares_in_order_(small, traced, plan, Batch.of(x), shortcuts=True)
    paths = [block, f"{block}.conv2", f"{block}.bn2"]
    dense, found = (seen(copy.deepcopy(net), paths, x) for net in (model, small))
    layer, norm = small.get_submodule(f"{block}.conv2"), model.layer1[1].bn2
    slope = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]
    shortcut_error = (dense[block][0] - found[block][0]).detach()
    wanted = dense[f"{block}.conv2"][1]
    read = found[f"{block}.conv2"][0]
    assert shortcut_error.abs().max() > 1e-3
    aimed, plain = (
        steepness(layer, layer.weight, read, y) for y in (wanted + shortcut_error / slope, wanted)
    )  # type: ignore[arg-type]
    assert aimed < 1e-9 * plain


def test_the_filters_of_smallest_norm_go_the_same_share_of_each_layer() -> None:
    model, x = resnet(), torch.randn(1, 3, 16, 16).double()
    _, plan = cut(model, x, stream_layers(model))
    cuts = [c for c in plan.cuts if c.side == "out"]
    assert len(cuts) == 3
    for c in cuts:
        norms = model.get_submodule(c.path).weight.abs().sum((1, 2, 3))  # type: ignore[union-attr, operator]
        assert sorted(c.kept) == sorted(norms.topk(len(c.kept)).indices.tolist())
        assert abs(len(c.kept) / c.width - len(cuts[0].kept) / cuts[0].width) <= 1 / 16


def test_the_page_says_how_far_ours_is_ahead_or_behind(tmp_path: Path) -> None:
    common = {"net": "resnet20", "macs": 0.5, "split": "test", "dense": 91.7, "images": 10_000}
    common |= {"cpu_seconds": 2.0, "macs_kept": 0.5, "versions": {"torch": "2"}}
    tops = {
        ("magnitude", "none"): [20.0],
        ("magnitude", "mean"): [30.0],
        ("magnitude", "grail"): [60.0, 62.0, 64.0],
        ("magnitude", "reconstruct"): [70.0, 71.0, 72.0],
        ("ours", "merging"): [40.0],
        ("ours", "mean"): [35.0],
        ("ours", "grail"): [86.0],
        ("ours", "reconstruct"): [85.5],
    }
    lines = [
        {**common, "channels": channels, "way": way, "seed": seed, "top1": top1}
        for (channels, way), values in tops.items()
        for seed, top1 in enumerate(values)
    ]
    lines.append({**lines[0], "split": "train", "top1": 99.0})
    text = write(lines, tmp_path / "page.md").read_text()
    assert "*uniform L1* `reconstruct` is +9.0 (resnet20 at 50%) to +9.0 points" in text
    assert "*ours* `reconstruct` is -0.5 (resnet20 at 50%)" in text
    assert "*ours* `mean` is -5.0 (resnet20 at 50%)" in text
    assert "| GRAIL | 62.00 ± 2.00 | 86.00¹ | 2.0 |" in text
    assert "| **`mean`**, no images | 30.00 | 35.00 | 2.0 |" in text
    assert "| `resnet20`, 50% | 91.70 | 20.00 (plain cut) | 30.00 | 40.00 (Neuron Merging) | 35.00 |" in text
    assert "99.0" not in text
