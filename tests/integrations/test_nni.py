"""NNI's pruners and ours on the same configs, and what becomes of their masks."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("nni", reason="NNI is an optional extra: pip install 'ss-pruning[nni]'")

import nni
from nni.compression import TorchEvaluator
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    LinearPruner,
    SlimPruner,
    TaylorPruner,
)

import ss_pruning
from ss_pruning.errors import InputError, ModelError
from ss_pruning.integrations.nni.pruner import SynapticStrengthPruner, bake, compact, speedup
from ss_pruning.integrations.nni.ranking import rank_globally
from tests.support import oracle
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, randomise

ROOT = Path(__file__).parents[2]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
KERNEL, IN, OUT = [1, 1, -1, -1], "in_channel", "out_channel"


class Grouped(nn.Module):
    """Two groups in the middle and a shortcut around them; all norms with shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.n1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.n2 = nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16)
        self.conv3, self.n3 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n1(self.conv1(x)))
        x = F.relu(x + self.n3(self.conv3(F.relu(self.n2(self.conv2(x))))))
        return self.fc(x.mean((2, 3)))


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Grouped()).eval()


def compress(pruner: Any) -> dict[str, dict[str, Tensor]]:
    return pruner.compress()[1]


def sparsity(mask: Tensor) -> float:
    return 1 - float(mask.mean())


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return oracle.tensors(model.eval()(*inputs))


def difference(a: nn.Module, b: nn.Module, *inputs: Tensor) -> float:
    pairs = zip(outputs(a, *inputs), outputs(b, *inputs), strict=True)
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


# ----------------------------------------------------------------------------------------------------------
# Masks: of the shape of NNI's own test of its norm pruners


@pytest.mark.parametrize("score", ["share", "strength"])
@pytest.mark.parametrize("granularity", [KERNEL, IN, OUT, [4, 4, -1, -1], "default"])
def test_masks_have_the_asked_sparsity(granularity: Any, score: str) -> None:
    config = [
        {
            "op_types": ["Conv2d"],
            "exclude_op_names": ["conv1"],
            "sparse_ratio": 0.75,
            "granularity": granularity,
        }
    ]
    pruner = SynapticStrengthPruner(grouped(), config, IMAGES, score=score)
    masks = compress(pruner)
    assert list(masks) == ["conv2", "conv3"]
    for name in masks:
        weight, bias = masks[name]["weight"], masks[name]["bias"]
        assert sparsity(weight) == pytest.approx(0.75)
        assert torch.equal(bias.bool(), weight.flatten(1).any(1))
        blocks = weight.flatten(2)
        assert torch.equal(blocks.amin(2), blocks.amax(2))  # whole kernels
        if granularity == IN:
            assert torch.equal(weight.amin(0), weight.amax(0))
        if granularity == OUT:
            assert torch.equal(weight.flatten(1).amin(1), weight.flatten(1).amax(1))


def test_dependent_layers_lose_the_same_outputs_in_every_group() -> None:
    config = [
        {
            "op_names": ["conv1", "conv3"],
            "sparse_ratio": 0.5,
            "granularity": OUT,
            "dependency_group_id": "stream",
        },
        {
            "op_names": ["conv2"],
            "sparse_ratio": 0.5,
            "granularity": OUT,
            "dependency_group_id": "b",
            "internal_metric_block": 2,
        },
    ]
    masks = compress(SynapticStrengthPruner(grouped(), config, IMAGES))
    rows = {name: mask["weight"].flatten(1).any(1) for name, mask in masks.items()}
    assert torch.equal(rows["conv1"], rows["conv3"])
    assert rows["conv2"].reshape(2, 8).sum(1).tolist() == [4, 4]


def test_thresholds_are_thresholds_of_the_scores() -> None:
    model = grouped()
    shares = ss_pruning.synaptic_strength(model, IMAGES).shares()["conv3"]
    threshold = float(shares.median())
    config = [{"op_names": ["conv3"], "sparse_threshold": threshold}]
    masks = compress(SynapticStrengthPruner(copy.deepcopy(model), config, IMAGES))
    assert torch.equal(masks["conv3"]["weight"].flatten(1).bool(), shares >= threshold)
    config[0]["max_sparse_ratio"] = 0.25
    assert sparsity(compress(SynapticStrengthPruner(model, config, IMAGES))["conv3"]["weight"]) == 0.25


def test_kernel_scores_are_strengths_and_shares() -> None:
    model = grouped()
    strengths = ss_pruning.synaptic_strength(model, IMAGES)
    config = [{"op_names": ["conv2", "conv3"], "sparse_ratio": 0.5}]
    for score, expected in (("strength", dict(strengths)), ("share", strengths.shares())):
        pruner = SynapticStrengthPruner(copy.deepcopy(model), config, IMAGES, score=score)
        metrics = pruner._calculate_metrics(pruner._collect_data())
        for name in ("conv2", "conv3"):
            assert torch.allclose(metrics[name]["weight"].flatten(1), expected[name], atol=1e-7)


def test_whole_outputs_are_scored_by_what_reads_them() -> None:
    """Outputs of conv2 are read, through n2, by conv3 alone."""
    model = grouped()
    shares = ss_pruning.synaptic_strength(model, IMAGES).shares()
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": OUT}]
    pruner = SynapticStrengthPruner(model, config, IMAGES)
    scores = pruner._calculate_metrics(pruner._collect_data())["conv2"]["weight"].flatten()
    assert torch.allclose(scores, shares["conv3"].sum(0), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["transposed", "transposed_grouped", "separable_twofold", "one_dimension", "flattened"]
)
@pytest.mark.parametrize("granularity", ["default", IN, OUT])
def test_every_kind_of_layer(name: str, granularity: str) -> None:
    net = BY_NAME[name]
    types = sorted({type(m).__name__ for m in net.make().modules() if isinstance(m, oracle.LAYERS)})
    config = [{"op_types": types, "sparse_ratio": 0.5, "granularity": granularity}]
    model = net.make()
    masks = compress(SynapticStrengthPruner(model, config, net.example))
    for name, mask in masks.items():
        sizes = {
            "default": mask["weight"].flatten(2).shape[:2].numel()
            if mask["weight"].dim() > 2
            else mask["weight"].numel(),
            IN: mask["weight"].shape[1],
            OUT: mask["weight"].shape[0],
        }
        assert sparsity(mask["weight"]) == pytest.approx(0.5, abs=0.5 / sizes[granularity] + 1e-6), name


@pytest.mark.parametrize(("outputs_", "groups"), [(6, 1), (12, 1), (8, 2), (12, 2)])
def test_biases_of_transposed_convolutions_go_with_outputs(outputs_: int, groups: int) -> None:
    """Not with inputs, which are the first axis of their weights."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(12, outputs_, 2, groups=groups)
    layer.weight.data[:3] *= 1e-6  # inputs that are masked
    layer.weight.data[:, :2] *= 1e-6  # outputs likewise
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), layer, nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    config = [{"op_names": ["3"], "sparse_threshold": 1e-3}]
    masks = compress(SynapticStrengthPruner(model, config, x, score="strength"))
    weight, bias = masks["3"]["weight"], masks["3"].get("bias")
    assert not weight[:3].any()
    if groups == 1:
        assert bias is not None
        assert bias.tolist() == [float(weight[:, k].any()) for k in range(outputs_)]
        assert bias.sum() == outputs_ - 2
    else:
        assert bias is None or bool(bias.all())
    small, _ = compact(model, masks, x)
    assert difference(bake(model, masks), small, x) < 1e-5


@pytest.mark.parametrize("statistics", ["gaussian", [IMAGES]])
def test_other_statistics(statistics: Any) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    masks = compress(SynapticStrengthPruner(grouped(), config, IMAGES, statistics=statistics))
    assert sparsity(masks["conv3"]["weight"]) == pytest.approx(0.5)


def test_norms_can_be_pruned_by_their_scales() -> None:
    model = grouped()
    scale = model.n2.weight.detach().clone()
    masks = compress(
        SynapticStrengthPruner(model, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], IMAGES)
    )
    assert masks["n2"]["weight"].sum() == 8
    assert scale[masks["n2"]["weight"] == 0].max() <= scale[masks["n2"]["weight"] == 1].min()


# ----------------------------------------------------------------------------------------------------------
# Global ratios


def global_config(**more: Any) -> list[dict[str, Any]]:
    return [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": 1, **more}]


def zeros(masks: dict[str, dict[str, Tensor]]) -> dict[str, tuple[int, int]]:
    return {name: (int((m["weight"] == 0).sum()), m["weight"].numel()) for name, m in masks.items()}


@pytest.mark.parametrize("granularity", [KERNEL, IN, OUT])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_a_global_ratio_is_met_to_within_one_block(granularity: Any, ratio: float) -> None:
    masks = compress(
        SynapticStrengthPruner(grouped(), global_config(sparse_ratio=ratio, granularity=granularity), IMAGES)
    )
    counted = zeros(masks)
    pruned, total = (sum(column) for column in zip(*counted.values(), strict=True))
    largest = {str(KERNEL): 9, IN: 16 * 9, OUT: 8 * 9}[str(granularity)]
    assert total * ratio - largest < pruned <= total * ratio
    assert all(n < size for n, size in counted.values())


def test_global_caps_hold() -> None:
    masks = compress(
        SynapticStrengthPruner(grouped(), global_config(max_sparse_ratio=0.6, min_sparse_ratio=0.4), IMAGES)
    )
    for name, (pruned, size) in zeros(masks).items():
        assert 0.4 - 9 / size <= pruned / size <= 0.6, name


def test_global_order_matches_plain_sorting() -> None:
    """Against a loop: all kernels of all layers in one list, lowest first."""
    model = grouped()
    shares = ss_pruning.synaptic_strength(model, IMAGES).shares()
    weights = {n: model.get_submodule(n).weight for n in ("conv1", "conv2", "conv3")}
    kernels = sorted(
        (float(shares[n][k, c]), n, k, c)
        for n in weights
        for k in range(len(shares[n]))
        for c in range(shares[n].shape[1])
    )
    budget = sum(w.numel() for w in weights.values()) * 0.5
    expected = {n: torch.ones_like(shares[n]) for n in weights}
    for _, n, k, c in kernels:
        size = weights[n][k, c].numel()
        if size > budget:
            break
        budget -= size
        expected[n][k, c] = 0
    masks = compress(SynapticStrengthPruner(model, global_config(), IMAGES))
    for n in weights:
        assert torch.equal(masks[n]["weight"].flatten(2).amax(2), expected[n])


def test_ties_and_an_empty_budget() -> None:
    class Space:
        sparse_ratio, min_sparse_ratio, max_sparse_ratio = 0.5, None, None
        target = torch.ones(8)

    a, b = rank_globally([(torch.ones(8), Space()), (torch.ones(8), Space())])
    assert (a.tolist(), b.tolist()) == ([0.0] * 7 + [1.0], [0.0] + [1.0] * 7)
    Space.sparse_ratio = 0.0
    assert all(mask.all() for mask in rank_globally([(torch.ones(8), Space())]))
    Space.sparse_ratio = 1.0
    assert not any(mask.any() for mask in rank_globally([(torch.ones(8), Space())]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_masks_are_right_and_do_not_depend_on_the_hash_seed(name: str) -> None:
    """Checks every layer's ratio too; `python -m benchmarks.nni.masks` does it on larger models."""
    pytest.importorskip("timm", reason="timm is an optional extra: pip install 'ss-pruning[timm]'")
    command = [sys.executable, "-m", "benchmarks.nni.masks", "--only", name, "--seeds", "0", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same masks in every process" in done.stdout


# ----------------------------------------------------------------------------------------------------------
# Training


def evaluator_for(model: nn.Module, losses: list[float] | None = None) -> TorchEvaluator:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    labels = torch.randint(5, (8,), generator=generator)

    def training_step(batch: Any, model: nn.Module) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def training_func(
        model: nn.Module,
        optimizer: Any,
        training_step: Any,
        scheduler: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        for _ in range(max_steps or 4 * (max_epochs or 1)):
            optimizer.zero_grad()
            loss = training_step((images, labels), model)
            loss.backward()
            optimizer.step()
            if losses is not None:
                losses.append(loss.item())

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return TorchEvaluator(training_func=training_func, optimizers=optimizer, training_step=training_step)


CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.75}]


@pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])
def test_schedules(schedule: Any) -> None:
    model = grouped()
    pruner = SynapticStrengthPruner(model, CONV, IMAGES, evaluator_for(model))
    _, masks = schedule(pruner, interval_steps=2, total_times=3).compress(max_steps=6, max_epochs=None)
    for mask in masks.values():
        assert sparsity(mask["weight"]) == pytest.approx(0.75, abs=0.02)


def test_the_penalty_is_in_the_loss_and_shrinks_strengths() -> None:
    found = {}
    for penalty in (0.0, 1e-2):
        model, losses = grouped(), []
        pruner = SynapticStrengthPruner(model, CONV, IMAGES, evaluator_for(model, losses), penalty=penalty)
        masks = pruner.compress(8, None)[1]
        pruner.unwrap_model()
        strengths = ss_pruning.synaptic_strength(model, IMAGES)
        found[penalty] = (losses[0], sum(float(strengths[name].sum()) for name in masks))
        assert all(sparsity(mask["weight"]) == pytest.approx(0.75, abs=0.02) for mask in masks.values())
    start = ss_pruning.synaptic_strength(grouped(), IMAGES)
    expected = 1e-2 * sum(float(start[name].sum()) for name in ("conv1", "conv2", "conv3"))
    assert found[1e-2][0] - found[0.0][0] == pytest.approx(expected, rel=1e-4)
    assert found[1e-2][1] < found[0.0][1]


def test_training_without_an_evaluator_is_refused() -> None:
    with pytest.raises(InputError, match="evaluator="):
        SynapticStrengthPruner(grouped(), CONV, IMAGES).compress(4, None)


def test_it_goes_on_from_another_compressor() -> None:
    first = L1NormPruner(grouped(), [{"op_names": ["conv1"], "sparse_ratio": 0.5}])
    first.compress()
    config = [{"op_names": ["conv3"], "sparse_ratio": 0.5}]
    second = SynapticStrengthPruner.from_compressor(first, config, example_inputs=IMAGES)
    assert sparsity(second.generate_masks()["conv3"]["weight"]) == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------------
# From masks to a smaller model


def masks_of(kind: str, model: nn.Module, granularity: Any) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    ratio = 0.9 if granularity == KERNEL else 0.5
    config = [
        {
            "op_types": ["Conv2d"],
            "exclude_op_names": ["conv1"],
            "sparse_ratio": ratio,
            "granularity": granularity,
        }
    ]
    if kind == "ours":
        pruner = SynapticStrengthPruner(model, config, IMAGES)
    elif kind in ("l1", "fpgm"):
        pruner = {"l1": L1NormPruner, "fpgm": FPGMPruner}[kind](model, config)
    elif kind == "taylor":
        pruner = TaylorPruner(model, config, evaluator_for(model), training_steps=2)
    else:
        pruner = SlimPruner(model, config, evaluator_for(model), training_steps=2)
    return pruner, pruner.compress()[1]


@pytest.mark.parametrize("granularity", [KERNEL, IN, OUT])
@pytest.mark.parametrize("kind", ["ours", "l1", "fpgm", "taylor", "slim"])
def test_the_small_model_equals_the_masked_one(kind: str, granularity: Any) -> None:
    model = grouped()
    pruner, masks = masks_of(kind, model, granularity)
    wrapped, report = compact(model, masks, IMAGES)
    assert report.max_error < 1e-10
    assert difference(model, wrapped, IMAGES) < 1e-5
    pruner.unwrap_model()
    unwrapped, _ = compact(model, masks, IMAGES)
    if kind != "slim":  # unwrapping forgets the scales that it has trained
        assert difference(wrapped, unwrapped, IMAGES) == 0
    assert difference(bake(model, masks), unwrapped, IMAGES) < 1e-5
    if granularity == OUT and kind in ("ours", "l1"):  # others may leave one group of conv2 whole
        assert report.after.params < report.before.params


def test_compact_leaves_the_model_and_masks_alone() -> None:
    model = grouped()
    pruner, masks = masks_of("ours", model, OUT)
    before, copies = snapshot(model), copy.deepcopy(dict(masks))
    compact(model, masks, IMAGES)
    assert snapshot(model) == before
    assert all(torch.equal(copies[p][n], m) for p, t in masks.items() for n, m in t.items())
    pruner.unwrap_model()


def test_masking_norms_makes_dead_filters_zero() -> None:
    model = grouped()
    pruner, masks = masks_of("l1", model, OUT)
    pruner.unwrap_model()
    kept, by_keep = compact(model, masks, IMAGES)
    reference = bake(model, masks, IMAGES, norms="mask")
    small, by_mask = compact(model, masks, IMAGES, norms="mask")
    dead = ~masks["conv2"]["weight"].flatten(1).any(1)
    assert not reference.n2.weight[dead].any()
    assert reference.n2.weight[~dead].all()
    assert reference.n1.weight.all()  # conv1 was not masked
    assert difference(reference, small, IMAGES) < 1e-6
    assert by_mask.after.params <= by_keep.after.params
    assert difference(kept, small, IMAGES) > 1e-3  # another model, and said so


def test_a_compacted_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = grouped()
    pruner, masks = masks_of("ours", model, OUT)
    pruner.unwrap_model()
    small, _ = compact(model, masks, IMAGES)
    ss_pruning.save(small, tmp_path / "small.safetensors")
    same = ss_pruning.load(tmp_path / "small.safetensors", Grouped)
    assert difference(small, same, IMAGES) == 0


# ----------------------------------------------------------------------------------------------------------
# NNI's own speedup


class Own(nn.Conv2d):
    """A subclass, as timm has them."""


class OwnNorm(nn.BatchNorm2d):
    """A norm with its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), OwnNorm(8)
        self.conv2, self.n2 = Own(8, 8, 3, padding=1), OwnNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.n2(self.conv2(self.n1(self.conv1(x)))).mean((2, 3)))


def subclasses() -> nn.Module:
    torch.manual_seed(0)
    return Subclasses().eval()


def test_subclasses_of_a_named_type_are_selected() -> None:
    masks = compress(SynapticStrengthPruner(subclasses(), CONV, IMAGES))
    assert list(masks) == ["conv1", "conv2"]
    config = [{"op_types": ["Conv2d"], "exclude_op_types": ["Own"], "sparse_ratio": 0.5}]
    assert list(compress(SynapticStrengthPruner(subclasses(), config, IMAGES))) == ["conv1"]


def test_speedup_runs_nnis_own(caplog: pytest.LogCaptureFixture) -> None:
    """With fresh norms, and masks of inputs behind them, its result equals the masked model; NNI tells nothing."""
    model = subclasses()
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": IN}]
    masks = compress(SynapticStrengthPruner(model, config, IMAGES))
    level = logging.getLogger("nni").level
    fast = speedup(model, masks, IMAGES)
    assert not [record for record in caplog.records if record.name.startswith("nni")]
    assert logging.getLogger("nni").level == level
    assert isinstance(fast.conv2, Own)
    assert fast.conv2.in_channels == fast.conv1.out_channels == fast.n1.num_features == 4
    assert not any(module.training for module in fast.modules())
    assert difference(model, fast, IMAGES) < 1e-5


def test_speedup_leaves_training_models_in_training() -> None:
    model = subclasses().train()
    masks = compress(L1NormPruner(copy.deepcopy(model), CONV))
    assert all(module.training for module in speedup(model, masks, IMAGES).modules())


def test_speedup_names_nnis_own_error() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else -self.conv(x)

    model = Branching()
    masks = compress(L1NormPruner(model, CONV))
    with pytest.raises(ModelError, match="NNI's ModelSpeedup fails"):
        speedup(model, masks, IMAGES)


# ----------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"op_types": ["Conv2d"], "sparsness": 0.5}], "NNI refuses the config"),
        ([{"op_types": ["Conv2d"], "sparse_ratio": 1}], "NNI refuses the config"),
        ([{"op_types": ["Conv3d"], "sparse_ratio": 0.5}], "selects no module"),
        ([{"op_names": ["conv9"], "sparse_ratio": 0.5}], "names 'conv9', which is no module"),
        (["Conv2d"], "NNI refuses the config"),
        (
            [{"op_types": ["Conv2d"], "target_names": ["bias"], "sparse_ratio": 0.5}],
            "name 'weight' in target",
        ),
        (
            [{"op_types": ["BatchNorm2d"]}],
            "the bias of 'n1' where the weight of 'n1' is masked, which the config",
        ),
        (
            [{"op_types": ["Conv2d"], "target_names": ["_output_"], "sparse_ratio": 0.5}],
            "names '_output_', which",
        ),
    ],
)
def test_wrong_configs(config: Any, message: str) -> None:
    model = grouped()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        SynapticStrengthPruner(model, config, IMAGES)
    assert snapshot(model) == before


def test_a_type_that_nni_cannot_mask() -> None:
    with pytest.raises(InputError, match="no layer of type Grouped"):
        SynapticStrengthPruner(grouped(), [{"op_names_re": [".*"], "sparse_ratio": 0.5}], IMAGES)


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="example_inputs="):
        SynapticStrengthPruner(grouped(), CONV)
    with pytest.raises(InputError, match="score='norm'"):
        SynapticStrengthPruner(grouped(), CONV, IMAGES, score="norm")
    with pytest.raises(InputError, match="norms='drop'"):
        bake(grouped(), {}, norms="drop")
    with pytest.raises(InputError, match="needs example_inputs"):
        bake(grouped(), {}, norms="mask")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"global_group_id": 1, "granularity": OUT}, "not with a global_group_id"),
        ({"granularity": KERNEL}, "set granularity 'out_channel' or 'in_channel'"),
    ],
)
def test_settings_that_exclude_each_other(more: dict[str, Any], message: str) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "dependency_group_id": 1, **more}]
    with pytest.raises(InputError, match=message):
        SynapticStrengthPruner(grouped(), config, IMAGES).compress()


@pytest.mark.parametrize("task", [compact, speedup])
def test_masks_of_another_model(task: Callable[..., Any]) -> None:
    masks = compress(L1NormPruner(grouped(), [{"op_names": ["conv2"], "sparse_ratio": 0.5}]))
    with pytest.raises(InputError, match=r"the masks are of another model: 'conv2.weight' has shape"):
        task(subclasses(), masks, IMAGES)
    with pytest.raises(InputError, match=r"has no 'conv9.weight'"):
        task(grouped(), {"conv9": {"weight": torch.ones(1)}}, IMAGES)
    with pytest.raises(InputError, match="only masks of parameters"):
        task(grouped(), {"conv1": {"_input_0": torch.ones(1)}}, IMAGES)


def test_a_wrapped_model_is_refused_with_the_remedy() -> None:
    tp = pytest.importorskip("torch_pruning")
    model = grouped()
    pruner = SynapticStrengthPruner(model, CONV, IMAGES)
    fresh = {"pruning_ratio_dict": {}, "in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    tasks = [
        lambda: ss_pruning.prune_(model, IMAGES, ratio=0.5),
        lambda: ss_pruning.graph.trace(model, IMAGES),
        lambda: ss_pruning.compact_(model, IMAGES),
        lambda: SynapticStrengthPruner(model, CONV, IMAGES),
        lambda: tp.pruner.BasePruner(
            model,
            IMAGES,
            ss_pruning.SynapticImportance(),
            pruning_ratio=0.5,
            ignored_layers=[model.fc],
            **fresh,
        ).step(),
    ]
    for task in tasks:
        with pytest.raises(InputError, match="unwrap_model"):
            task()
    pruner.unwrap_model()
    for task in tasks[:2]:
        task()


# ----------------------------------------------------------------------------------------------------------
# Beside Torch-Pruning


def test_both_frameworks_on_one_model() -> None:
    tp = pytest.importorskip("torch_pruning")
    model = grouped()
    fresh = {"pruning_ratio_dict": {}, "in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
    tp.pruner.BasePruner(
        model, IMAGES, ss_pruning.SynapticImportance(), pruning_ratio=0.25, ignored_layers=[model.fc], **fresh
    ).step()
    before = sum(p.numel() for p in model.parameters())
    pruner = SynapticStrengthPruner(
        model, [{"op_names": ["conv2"], "sparse_ratio": 0.5, "granularity": OUT}], IMAGES
    )
    masks = compress(pruner)
    pruner.unwrap_model()
    small, report = compact(model, masks, IMAGES)
    assert report.before.params == before > report.after.params
    assert difference(bake(model, masks), small, IMAGES) < 1e-5
