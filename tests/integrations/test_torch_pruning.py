"""`SynapticImportance` inside Torch-Pruning's own pruners, and its scores against plain loops."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import SynapticImportance
from ss_pruning.errors import InputError
from tests.support import oracle
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, CLASSES, ZOO, Net

tp = pytest.importorskip("torch_pruning")

PRUNERS = ["BasePruner", "MetaPruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner"]
SCOPES: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}

# Torch-Pruning cannot trace these, or traces them wrongly: splits, slices and shuffles, padding of channels,
# loose parameters on odd axes.
HARD = {
    *(
        "swapped_chunks",
        "unequal_split",
        "shuffle",
        "shuffle_unit",
        "gated_halves",
        "pixel_shuffle",
        "doubled",
    ),
    *(
        "padded_shortcut",
        "padded_shortcut_module",
        "partial_add",
        "layer_scale",
        "layer_norm",
        "selective_kernel",
        "channel_attention",
    ),
    *(
        "blur_pool",
        "blur_pool_wide",
        "spatial_gate_of_mean",
        "functional_norm",
        "standardised",
        "shared_head",
    ),
    *("separable_twofold",),
}
EASY = [net for net in ZOO if net.name not in HARD]
easy_net = pytest.mark.parametrize("net", EASY, ids=lambda net: net.name)


def pruner_of(
    model: nn.Module, example: Any, kind: str = "BasePruner", importance: Any = None, **options: Any
) -> Any:
    """A pruner with its own dictionaries (Torch-Pruning writes into its defaults); the classifier stays."""
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "customized_pruners": {}}
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in (CLASSES, 1000)]
    heads += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in (CLASSES, 1000)]
    options = {"pruning_ratio": 0.5, "ignored_layers": heads, **fresh, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(tp.pruner, kind)(model, example, importance or SynapticImportance(), **options)


def widths(model: nn.Module) -> dict[str, int]:
    """Output widths of all convolutions and linear layers."""
    return {path: oracle.widths(m)[0] for path, m in model.named_modules() if isinstance(m, oracle.LAYERS)}


def runs(model: nn.Module, example: Any) -> None:
    """The model still runs, forwards and backwards."""
    inputs = example if isinstance(example, tuple) else (example,)
    result = oracle.tensors(model(*inputs))
    assert all(x.isfinite().all() for x in result)
    sum(x.sum() for x in result).backward()


def groups_of(model: nn.Module, example: Any, ignored: list[nn.Module] | None = None) -> Iterator[Any]:
    """All groups of Torch-Pruning's graph, classifier included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
        yield from graph.get_all_groups(ignored_layers=ignored or [])


# ----------------------------------------------------------------------------------------------------------
# Scores against plain loops


def oracle_scores(net: Net, model: nn.Module, group: Any, score: str, reduce: str) -> list[float] | None:
    """For every channel of the root: the scores of the synapses it feeds, reduced by layer, added up."""
    paths = {module: path for path, module in model.named_modules()}
    total, found = dict.fromkeys(group[0].root_idxs, 0.0), False
    for item in group:
        module = item.dep.target.module
        consumer = item.dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
        if not consumer or paths[module] not in net.sources:
            continue
        found = True
        scales = oracle.variances(model, net.calls.get(paths[module], [net.sources[paths[module]]]))
        table = oracle.strength(module, scales)
        table = oracle.shares(table) if score == "share" else table
        for channel, root in zip(item.idxs, item.root_idxs, strict=True):
            synapses = [
                row[j]
                for k, row in enumerate(table)
                for j in range(len(row))
                if oracle.input_of(module, k, j) == channel
            ]
            total[root] += {
                "sum": sum(synapses),
                "mean": sum(synapses) / len(synapses),
                "max": max(synapses),
            }[reduce]
    return [total[root] for root in group[0].root_idxs] if found else None


@pytest.mark.parametrize(("score", "reduce"), [("share", "sum"), ("strength", "mean"), ("share", "max")])
@easy_net
def test_scores_equal_the_oracle(net: Net, score: str, reduce: str) -> None:
    model = net.make()
    importance = SynapticImportance("batchnorm", score=score, reduce=reduce, example_inputs=net.example)
    seen = 0
    for group in groups_of(model, net.example):
        expected, found = oracle_scores(net, model, group, score, reduce), importance(group)
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.shape == (len(group[0].idxs),)
            torch.testing.assert_close(
                found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9
            )
            seen += 1
    assert seen


def test_default_is_the_share_of_every_output_summed() -> None:
    net = BY_NAME["residual"]
    model = net.make()
    for group in groups_of(model, net.example):
        expected, found = (
            oracle_scores(net, model, group, "share", "sum"),
            SynapticImportance("batchnorm")(group),
        )
        if expected is not None:
            torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-9)


def test_entropy_orders_single_synapses_as_strength_does() -> None:
    """With one consumer output the order of channels is that of their strengths."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3))
    x = torch.randn(2, 3, 8, 8)
    group = next(g for g in groups_of(model, x) if len(g[0].idxs) == 8)
    by = {score: SynapticImportance(score=score)(group) for score in ("strength", "entropy")}
    assert by["entropy"].argsort().tolist() == by["strength"].argsort().tolist()
    assert (by["entropy"] >= 0).all()


@pytest.mark.parametrize("normalizer", ["mean", "max", "sum"])
def test_normalizers(normalizer: str) -> None:
    net = BY_NAME["plain"]
    model = net.make()
    for group in groups_of(model, net.example, [model.fc]):
        scores = SynapticImportance(normalizer=normalizer)(group)
        assert getattr(scores, normalizer)().item() == pytest.approx(1.0, rel=1e-5)
        plain = SynapticImportance()(group)
        torch.testing.assert_close(scores / scores.sum(), plain / plain.sum())


@pytest.mark.parametrize("statistics", ["gaussian", "data"])
def test_other_statistics(statistics: str) -> None:
    net = BY_NAME["residual"]
    model = net.make()
    batches = [torch.randn(16, 3, 16, 16) for _ in range(2)]
    importance = SynapticImportance(statistics=batches if statistics == "data" else statistics)
    pruner = pruner_of(model, net.example, importance=importance, global_pruning=True)
    pruner.step()
    runs(model, net.example)


@easy_net
def test_scoring_leaves_the_model_alone(net: Net) -> None:
    model = net.make()
    groups = list(groups_of(model, net.example))
    before = snapshot(model)
    importance = SynapticImportance(example_inputs=net.example)
    for group in groups:
        importance(group)
    assert snapshot(model) == before


@pytest.mark.parametrize("option", ["score", "reduce", "normalizer", "statistics"])
def test_unknown_options_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"{option}='shares?'"):
        SynapticImportance(**{option: "shares"})


# ----------------------------------------------------------------------------------------------------------
# Never stale


def test_scores_follow_weights_that_change_between_two_groups() -> None:
    """Nobody tells it when a round begins: each answer must be that of the weights as they are."""
    net = BY_NAME["residual_chain"]
    model = net.make()
    groups = list(groups_of(model, net.example, [model.fc]))
    importance = SynapticImportance()
    importance(groups[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    for group in groups[1:]:
        torch.testing.assert_close(importance(group), SynapticImportance()(group))


EDITS = {
    "one number": lambda layer: layer.weight.data.view(-1)[0].add_(0.5),
    "channels change places": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),
    "taps change places": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(-1)),
    "signs": lambda layer: layer.weight.data[0].neg_(),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({}, False),
        ({}, True),
        ({"statistics": "batchnorm"}, False),
        ({"statistics": "batchnorm", "score": "relevance"}, False),
    ],
    ids=str,
)
def test_scores_follow_edits_that_nobody_counts(edit: str, options: Any, autocast: bool) -> None:
    """Writing to `.data` leaves no trace but the numbers; here in a layer that another group reads, too."""
    net = BY_NAME["residual_chain"]
    model = net.make()
    groups = list(groups_of(model, net.example, [model.fc]))
    importance = SynapticImportance(**options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        before = importance(groups[0])
        assert torch.equal(importance(groups[0]), before)
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        versions = [layer.weight._version for layer in layers]
        for layer in layers:
            EDITS[edit](layer)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.data.mul_(torch.linspace(0.2, 3, len(norm.weight)))
        assert [layer.weight._version for layer in layers] == versions
        for group in (*groups[1:], groups[0]):
            torch.testing.assert_close(importance(group), SynapticImportance(**options)(group))


def test_scores_follow_statistics_that_nobody_counts() -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    groups = list(groups_of(model, net.example, [model.fc]))
    importance = SynapticImportance([net.example])
    importance(groups[0])
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var.data.mul_(torch.linspace(0.1, 9, len(norm.running_var)))
    for group in groups[1:]:
        torch.testing.assert_close(importance(group), SynapticImportance([net.example])(group))


def test_a_generator_of_batches_is_read_once_and_kept() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    batches = [torch.randn_like(net.example, dtype=net.example.dtype) for _ in range(2)]
    importance = SynapticImportance(batch for batch in batches)
    pruner = pruner_of(model, net.example, importance=importance, iterative_steps=2, **SCOPES["global"])
    for _ in range(2):
        pruner.step()
        for group in groups_of(model, net.example, [model.fc]):
            torch.testing.assert_close(importance(group), SynapticImportance(batches)(group))


def test_one_importance_serves_two_models_in_turns() -> None:
    net = BY_NAME["plain"]
    models = [net.make(seed) for seed in (1, 2)]
    groups = [list(groups_of(model, net.example, [model.fc])) for model in models]
    importance = SynapticImportance()
    for pair in zip(*groups, strict=True):
        for group in pair:
            torch.testing.assert_close(importance(group), SynapticImportance()(group))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", ["plain", "residual_chain", "dense", "separable", "grouped"])
def test_iterative_steps_score_the_shrunk_model(name: str, scope: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    importance = SynapticImportance()
    pruner = pruner_of(model, net.example, importance=importance, iterative_steps=3, **SCOPES[scope])
    seen = [widths(model)]
    for _ in range(3):
        pruner.step()
        runs(model, net.example)
        seen.append(widths(model))
        for group in groups_of(model, net.example, [model.fc]):
            torch.testing.assert_close(importance(group), SynapticImportance()(group), rtol=0, atol=0)
    sums = [sum(w.values()) for w in seen]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < sums[0]


# ----------------------------------------------------------------------------------------------------------
# Pruners and their options


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("name", ["plain", "residual_chain", "dense_pre_activation", "separable"])
def test_every_pruner_in_every_scope(name: str, kind: str, scope: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    before = widths(model)
    pruner_of(model, net.example, kind, **SCOPES[scope]).step()
    after = widths(model)
    runs(model, net.example)
    assert sum(after.values()) < sum(before.values())
    assert after["fc"] == CLASSES
    if scope == "local":
        assert {after[path] / before[path] for path in before if path != "fc"} == {0.5}


@pytest.mark.parametrize("kind", ["BNScalePruner", "GroupNormPruner", "GrowingRegPruner"])
@pytest.mark.parametrize("name", ["plain", "residual_chain", "separable"])
def test_regularised_training(name: str, kind: str) -> None:
    net = BY_NAME[name]
    model = net.make().train()
    pruner = pruner_of(model, net.example, kind, global_pruning=True)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        pruner.update_regularizer()
        optimiser.zero_grad()
        model(net.example).square().mean().backward()
        pruner.regularize(model)
        optimiser.step()
    pruner.step()
    runs(model, net.example)


def test_a_pruner_without_ignored_layers_prunes_all_it_can_score() -> None:
    """Nothing reads the classifier, so it has no score: that must not stop the other groups."""
    net = BY_NAME["plain"]
    for kind in PRUNERS:
        model = net.make()
        pruner = pruner_of(model, net.example, kind, ignored_layers=[])
        pruner.step()
        assert widths(model) == {"conv1": 4, "conv2": 6, "conv3": 5, "fc": CLASSES}
        runs(model, net.example)


@pytest.mark.parametrize("scope", SCOPES)
def test_round_to(scope: str) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    pruner_of(model, net.example, round_to=2, pruning_ratio=0.4, **SCOPES[scope]).step()
    assert all(width % 2 == 0 for path, width in widths(model).items() if path != "fc")
    runs(model, net.example)


def test_ignored_layers_stay() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    pruner_of(model, net.example, ignored_layers=[model.fc, model.conv2], global_pruning=True).step()
    after = widths(model)
    assert after["conv2"] == 12
    assert after["conv1"] + after["conv3"] < 18


def test_ratios_by_layer() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    ratios = {model.conv1: 0.25, model.conv2: 0.75}
    pruner_of(model, net.example, pruning_ratio_dict=ratios).step()
    assert widths(model) == {"conv1": 6, "conv2": 3, "conv3": 5, "fc": CLASSES}


def test_the_weakest_channels_go() -> None:
    """Channels whose synapses are scaled down a thousandfold are those that are cut."""
    net = BY_NAME["residual"]
    model = net.make()
    weak = [1, 4, 6]
    with torch.no_grad():
        for norm in (model.bn0, model.blocks[0]["bn2"]):
            norm.weight[weak] *= 1e-3
    kept = model.bn0.bias.detach()[[c for c in range(8) if c not in weak]].clone()
    pruner_of(
        model, net.example, pruning_ratio=3 / 8, ignored_layers=[model.fc, model.blocks[0]["conv1"]]
    ).step()
    torch.testing.assert_close(model.bn0.bias.detach(), kept)


@pytest.mark.parametrize("scope", SCOPES)
def test_grouped_convolutions(scope: str) -> None:
    net = BY_NAME["grouped"]
    model = net.make()
    pruner_of(model, net.example, pruning_ratio=0.7, **SCOPES[scope]).step()
    runs(model, net.example)
    assert model.conv1.out_channels % 4 == 0
    assert sum(widths(model).values()) < 8 + 12 + 8 + CLASSES


@pytest.mark.parametrize(
    "name", ["dense", "dense_pre_activation", "transposed", "flattened", "squeeze_excite_conv"]
)
def test_several_root_indices(name: str) -> None:
    """Concatenations and flattened maps: a channel of the root has offset or several places in a consumer."""
    net = BY_NAME[name]
    model = net.make()
    pruner_of(model, net.example, global_pruning=True, pruning_ratio=0.4).step()
    runs(model, net.example)


# ----------------------------------------------------------------------------------------------------------
# Real nets

TORCHVISION = [
    *(
        "resnet18",
        "resnet50",
        "densenet121",
        "mobilenet_v2",
        "regnet_y_400mf",
        "googlenet",
        "shufflenet_v2_x1_0",
    ),
]
TIMM = [
    *(
        "resnet10t",
        "resnetv2_18",
        "regnety_002",
        "mobilenetv3_small_050",
        "efficientnet_lite0",
        "hrnet_w18_small",
    ),
    *("ghostnet_050", "repvgg_a0", "dla46_c", "mnasnet_small", "resnext26ts", "convnext_atto", "selecsls42b"),
]


# A group here spans only part of a concatenation, so that its widths depend on which channels go.
WIDTHS_DEPEND_ON_CHOICE = {"ghostnet_050"}


def build(library: str, name: str) -> nn.Module:
    """A real net with random weights."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        if library == "timm":
            return pytest.importorskip("timm").create_model(name).eval()
        return pytest.importorskip("torchvision").models.get_model(name, weights=None).eval()


def pruned_by(importance: Any, library: str, name: str, x: Tensor, **options: Any) -> nn.Module:
    model = build(library, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner_of(model, x, importance=importance, **options).step()
        runs(model, x)
    return model


# Several seconds each, and like others in how they hang together.
LARGE = {"densenet121", "resnet50", "googlenet", "regnet_y_400mf", "selecsls42b", "hrnet_w18_small"}


@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=[pytest.mark.slow] * (name in LARGE))
        for library, names in (("torchvision", TORCHVISION), ("timm", TIMM))
        for name in names
    ],
)
def test_replaces_group_magnitude_on_real_nets(library: str, name: str) -> None:
    """Where Torch-Pruning itself can: the same widths at a local ratio, and global pruning runs as well."""
    x = torch.randn(2, 3, 64, 64)
    try:
        theirs = pruned_by(tp.importance.GroupMagnitudeImportance(), library, name, x)
    except Exception as error:
        pytest.skip(f"Torch-Pruning itself fails here ({type(error).__name__})")
    ours = pruned_by(SynapticImportance(), library, name, x)
    if name not in WIDTHS_DEPEND_ON_CHOICE:
        assert widths(ours) == widths(theirs)
    spread = pruned_by(SynapticImportance(), library, name, x, global_pruning=True, pruning_ratio=0.3)
    assert sum(widths(spread).values()) < sum(widths(build(library, name)).values())
