"""Torch-Pruning's interface on the channel graph: any importance, any pruner, any net; cut == masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ss_pruning import SynapticImportance
from ss_pruning.config import NoCompensation
from ss_pruning.errors import InputError, PlanError, VerificationError
from tests.integrations.test_torch_pruning import SCOPES, widths
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, CLASSES, ZOO, Net, randomise
from tests.surgery.test_cut_equals_masked import largest_difference

tp = pytest.importorskip("torch_pruning")
from ss_pruning.integrations.torch_pruning import pruner as ours  # noqa: E402

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "gamma": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "random": tp.importance.RandomImportance,
    "synaptic": SynapticImportance,
}
REGULARISERS = {
    "growing group norm": (ours.GroupNormPruner, {}),
    "slimming": (ours.BNScalePruner, {}),
    "group lasso": (ours.BNScalePruner, {"group_lasso": True}),
    "growing": (ours.GrowingRegPruner, {}),
}
PRUNABLE = [net for net in ZOO if net.channel_sets]
# Torch-Pruning traces these wrongly, or not at all.
HARD = ["padded_shortcut", "swapped_chunks", "unequal_split", "shuffle_unit", "partial_add", "doubled"]
with_net = pytest.mark.parametrize("net", PRUNABLE, ids=lambda net: net.name)


def pruner_of(model: nn.Module, example: Any, importance: Any = None, **options: Any) -> ours.GraphPruner:
    """A pruner with its own defaults but for the importance."""
    return ours.GraphPruner(model, example, importance or IMPORTANCES["magnitude"](), **options)


def is_right(net: Net, dense: nn.Module, cut: nn.Module) -> bool:
    """Something went, and what remains equals the masked net."""
    smaller = sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in dense.parameters())
    return smaller and (not net.exact or largest_difference(dense, cut, net.inputs) < 1e-10)


def with_gradients(net: Net) -> nn.Module:
    """A net in training, after one backward pass."""
    model = net.make().train()
    sum(x.square().mean() for x in pytree.tree_leaves(model(*net.inputs))).backward()
    return model


# ----------------------------------------------------------------------------------------------------------
# GraphPruner


@pytest.mark.parametrize("scope", SCOPES)
@with_net
def test_every_net_in_every_scope(net: Net, scope: str) -> None:
    dense, model = net.make(), net.make()
    pruner_of(model, net.example, **SCOPES[scope]).step()
    assert is_right(net, dense, model)


@pytest.mark.parametrize("criterion", IMPORTANCES)
@pytest.mark.parametrize("name", [*HARD, "dense", "grouped", "transposed_grouped", "channel_attention"])
def test_every_importance(name: str, criterion: str) -> None:
    net = BY_NAME[name]
    dense, model = net.make(), net.make()
    pruner_of(model, net.example, IMPORTANCES[criterion](), global_pruning=True).step()
    assert is_right(net, dense, model)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", [*HARD, "residual_chain"])
def test_steps_reach_what_one_step_reaches(name: str, scope: str) -> None:
    net = BY_NAME[name]
    dense, once, slowly = net.make(), net.make(), net.make()
    pruner_of(once, net.example, **SCOPES[scope]).step()
    pruner = pruner_of(slowly, net.example, iterative_steps=3, **SCOPES[scope])
    total = [sum(widths(slowly).values())]
    for _ in range(3):
        pruner.step()
        total.append(sum(widths(slowly).values()))
        assert total[-1] == total[0] or largest_difference(dense, slowly, net.inputs) < 1e-10
    assert total == sorted(total, reverse=True)
    # One move can take several channels of several layers, and which parts are tied changes as they shrink.
    assert abs(total[-1] - sum(widths(once).values())) <= 0.2 * total[0]
    with pytest.warns(UserWarning, match="steps are done"):
        pruner.step()


def test_widths_are_those_of_torch_pruning() -> None:
    net = BY_NAME["plain"]
    for ratio in (0.25, 0.3, 0.5):
        model, theirs = net.make(), net.make()
        fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}}
        options = {"pruning_ratio": ratio}
        pruner_of(model, net.example, **options).step()
        magnitude = IMPORTANCES["magnitude"]()
        tp.pruner.BasePruner(
            theirs, net.example, magnitude, ignored_layers=[theirs.fc], **fresh, **options
        ).step()
        assert widths(model) == widths(theirs)
        assert torch.equal(model.conv2.weight, theirs.conv2.weight)


def test_ratios_by_layer_and_ignored_layers() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    ratios = {model.conv1: 0.25, (model.conv2,): 0.75}
    pruner_of(model, net.example, pruning_ratio_dict=ratios, ignored_layers=[model.conv3]).step()
    assert widths(model) == {"conv1": 6, "conv2": 3, "conv3": 10, "fc": CLASSES}


@pytest.mark.parametrize("scope", SCOPES)
def test_no_layer_loses_more_than_the_cap(scope: str) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    before = widths(model)
    pruner = pruner_of(
        model, net.example, pruning_ratio=0.9, max_pruning_ratio=0.5, iterative_steps=2, **SCOPES[scope]
    )
    pruner.step()
    pruner.step()
    after = widths(model)
    assert all(after[path] >= before[path] / 2 for path in before)
    assert sum(after.values()) < 0.7 * sum(before.values())


@pytest.mark.parametrize("scope", SCOPES)
def test_no_layer_vanishes(scope: str) -> None:
    net = BY_NAME["residual_chain"]
    dense, model = net.make(), net.make()
    pruner_of(model, net.example, pruning_ratio=1.0, **SCOPES[scope]).step()
    assert set(widths(model).values()) == {1, CLASSES}
    assert is_right(net, dense, model)


def test_round_to() -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    before = widths(model)
    pruner_of(model, net.example, pruning_ratio=0.3, round_to=2, global_pruning=True).step()
    assert all(n % 2 == 0 for path, n in widths(model).items() if n != before[path])
    assert widths(model) != before


def test_what_makes_the_forward_fail_is_left_whole_and_named() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            if x.shape[1] != int("8"):
                raise RuntimeError("eight channels, please")
            return self.head(self.two(x).mean((2, 3)))

    model = randomise(Strict()).eval()
    pruner = pruner_of(model, torch.randn(1, 3, 8, 8), global_pruning=True)
    pruner.step()
    assert (model.one.out_channels, model.two.out_channels) == (8, 4)
    assert any(left.paths == ("one",) and "eight" in left.reason for left in pruner.excluded)


def test_options() -> None:
    net = BY_NAME["plain"]
    for options, error, message in [
        ({"pruning_ratio": 1.5}, InputError, "pruning_ratio=1.5"),
        ({"max_pruning_ratio": -1}, InputError, "max_pruning_ratio=-1"),
        ({"pruning_ratio_dict": {nn.Conv2d(1, 1, 1): 2}}, InputError, "holds 2"),
        ({"pruning_ratio_dict": {"conv1": 0.5}}, InputError, "'conv1', which is no module"),
        ({"pruning_ratio": "half"}, InputError, "pruning_ratio='half' must be a number"),
        ({"iterative_steps": 0}, InputError, "iterative_steps=0 must be a positive whole number"),
        ({"iterative_steps": 2.5}, InputError, "iterative_steps=2.5"),
        ({"round_to": 0}, InputError, "round_to=0"),
        ({"ignored_layers": ["conv1"]}, InputError, "ignored_layers holds 'conv1': give modules"),
        ({"ignored_layers": "conv1"}, InputError, "ignored_layers holds 'conv1'"),
        ({"customized_pruners": {nn.Conv2d: object()}}, InputError, "customized_pruners"),
        ({"forward_fn": print}, InputError, "forward_fn"),
        ({"pruning_ration": 0.5}, TypeError, "'pruning_ration'; did you mean 'pruning_ratio'"),
        (
            {"importance": "magnitud"},
            InputError,
            "importance='magnitud' is unknown; use 'synaptic', 'magnitude'",
        ),
    ]:
        with pytest.raises(error, match=message):
            pruner_of(net.make(), net.example, **options)
    model = net.make()
    pruner_of(model, net.example, importance="lamp", ch_sparsity=0.25).step()
    assert model.conv1.out_channels == 6
    pruner_of(model, net.example, ignored_layers=model.conv1).step()  # one alone
    assert model.conv1.out_channels == 6


@with_net
def test_interactive_pruning_is_the_same(net: Net) -> None:
    model, whole = net.make(), net.make()
    for group in pruner_of(model, net.example).step(interactive=True):
        assert len(str(group)) > 0
        group.prune()
    pruner_of(whole, net.example).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("name", [*HARD, "dense", "grouped"])
def test_a_history_replays_on_a_fresh_copy(name: str) -> None:
    net = BY_NAME[name]
    model, twin = net.make(), net.make()
    pruner = pruner_of(model, net.example, iterative_steps=2, global_pruning=True)
    pruner.step()
    for group in pruner.step(interactive=True):
        group.prune()
    other = pruner_of(twin, net.example)
    other.load_pruning_history(pruner.pruning_history())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.pruning_history() == pruner.pruning_history()
    with pytest.raises(PlanError):
        pruner_of(BY_NAME["plain"].make(), BY_NAME["plain"].example).load_pruning_history(
            pruner.pruning_history()
        )


def test_a_history_of_torch_pruning_replays() -> None:
    net = BY_NAME["residual"]
    model, theirs = net.make(), net.make()
    graph = tp.DependencyGraph().build_dependency(theirs, net.example)
    for channels in ([1, 4], [0]):
        graph.get_pruning_group(theirs.conv0, tp.prune_conv_out_channels, channels).prune()
    ours.ChannelGraph().build_dependency(model, net.example).load_pruning_history(graph.pruning_history())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------
# Regularisers


@pytest.mark.parametrize("kind", REGULARISERS)
@with_net
def test_regularisers_reach_gradients(net: Net, kind: str) -> None:
    build, options = REGULARISERS[kind]
    model = with_gradients(net)
    pruner = build(model, net.example, IMPORTANCES["magnitude"](), **options)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    pruner.regularize(model)
    if kind == "growing":
        pruner.update_reg()
    changed = [n for n, p in model.named_parameters() if n in before and not torch.equal(p.grad, before[n])]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert changed or ("growing" not in kind and not norms)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    pruner.step()
    pruner.update_regularizer()
    assert all(len(group.order) == len(group[0].root_idxs) for group in pruner._groups)


def test_a_regulariser_skips_what_its_importance_does_not_know() -> None:
    net = BY_NAME["norm_free"]
    model = with_gradients(net)
    pruner = ours.GroupNormPruner(model, net.example, IMPORTANCES["gamma"]())
    before = snapshot(model)
    pruner.regularize(model)
    assert snapshot(model) == before


# ----------------------------------------------------------------------------------------------------------
# ChannelGraph by itself


@with_net
def test_groups_hold_whole_channel_sets(net: Net) -> None:
    model = net.make()
    graph = ours.ChannelGraph().build_dependency(model, net.example)
    known = {
        frozenset((path, side, c) for path, side, c in channel_set) for channel_set in net.channel_sets or ()
    }
    assert known
    for group in graph.get_all_groups():
        scores = IMPORTANCES["synaptic"]()(group)
        assert scores is None or len(scores) == len(group[0].idxs)
        for item in group:
            path = graph._module2name[item.dep.layer]
            side = "in" if not graph.is_out_channel_pruning_fn(item.dep.handler) else "out"
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                (channel_set,) = [f for f in known if (path, side, channel) in f]
                first = graph._module2name[group[0].dep.layer]
                at = [c for c, r in zip(group[0].idxs, group[0].root_idxs, strict=True) if r == root]
                assert {(first, c) for c in at} <= {(p, c) for p, _, c in channel_set}


def test_groups_are_made_for_the_model_as_it_is_at_their_turn() -> None:
    net = BY_NAME["dense"]
    dense, model = net.make(), net.make()
    graph = ours.ChannelGraph().build_dependency(model, net.example)
    seen = 0
    for group in graph.get_all_groups(ignored_layers=[model.fc]):
        weakest = IMPORTANCES["magnitude"]()(group).argsort()[:1].tolist()
        group.prune(idxs=weakest)
        seen += 1
    assert seen > 1
    assert len(graph.pruning_history()) == seen
    assert is_right(net, dense, model)


def test_refusals_leave_the_model_alone() -> None:
    net = BY_NAME["grouped"]
    model = net.make()
    graph = ours.ChannelGraph().build_dependency(model, net.example)
    stranger = nn.Conv2d(1, 1, 1)
    before = snapshot(model)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    everything = graph.get_pruning_group(conv, tp.prune_conv_in_channels, range(conv.in_channels))
    one = graph.get_pruning_group(conv, tp.prune_conv_in_channels, [0])
    assert not graph.check_pruning_group(one)
    assert not graph.check_pruning_group(everything)
    for group in (one, everything):
        with pytest.raises(InputError, match="cannot go"):
            group.prune()
    with pytest.raises(InputError, match=r"must stay.*output"):
        graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, [0])
    with pytest.raises(ValueError, match="not in the dependency graph"):
        graph.get_pruning_group(stranger, tp.prune_conv_out_channels, [0])
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"importance": None}, "importance=None: give one"),
        ({"pruning_ratio_dict": [1]}, r"pruning_ratio_dict=\[1\]: give a dict"),
        ({"iterative_pruning_ratio_scheduler": lambda ratio, steps: [ratio]}, "returns 1 ratios for 1 steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_the_wrong_kind_are_refused(options: dict[str, Any], said: str) -> None:
    net = BY_NAME["grouped"]
    model = net.make()
    before = snapshot(model)
    with pytest.raises(InputError, match=said):
        ours.GraphPruner(model, net.example, **{"importance": "magnitude", **options})
    assert snapshot(model) == before


def test_one_type_of_roots_may_stand_alone() -> None:
    net = BY_NAME["grouped"]
    widths = []
    for types in (nn.Conv2d, [nn.Conv2d]):
        model = net.make()
        ours.GraphPruner(model, net.example, "magnitude", root_module_types=types).step()
        widths.append([m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert widths[0] == widths[1]


def test_a_group_from_before_a_cut_is_refused() -> None:
    net = BY_NAME["residual"]
    model = net.make()
    graph = ours.ChannelGraph().build_dependency(model, net.example)
    old = graph.get_pruning_group(model.conv0, tp.prune_conv_out_channels, [0])
    graph.get_pruning_group(model.conv0, tp.prune_conv_out_channels, [1]).prune()
    graph.get_pruning_group(model.conv0, tp.prune_conv_out_channels, [2])
    with pytest.raises(InputError, match="anew"):
        old.prune()
    assert graph.get_out_channels(model.conv0) == graph.get_in_channels(model.fc) == 7


def test_a_group_that_would_break_the_forward_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x).reshape(len(x), int("8"), -1).reshape(len(x), 8, 6, 6)
            return self.head(self.two(x).mean((2, 3)))

    model = Fixed().eval()
    graph = ours.ChannelGraph().build_dependency(model, torch.randn(2, 3, 8, 8))
    group = graph.get_pruning_group(model.one, tp.prune_conv_out_channels, [0])
    before = snapshot(model)
    with pytest.raises(VerificationError, match="'one' is excluded"):
        group.prune()
    assert snapshot(model) == before


# ----------------------------------------------------------------------------------------------------------
# Compensation


@pytest.mark.parametrize("method", ["mean", "linear", "reconstruct"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_compensated_step_is_nearer_to_the_dense_model(method: str, steps: int) -> None:
    net = BY_NAME["residual_chain"]
    dense = net.make().eval()
    x = torch.randn(96, *net.shapes[0][1:], generator=torch.Generator().manual_seed(3))
    models = [copy.deepcopy(dense) for _ in range(2)]
    for model, chosen in zip(models, ("none", method), strict=True):
        pruner = pruner_of(
            model,
            net.example,
            tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.4,
            iterative_steps=steps,
        )
        for _ in range(steps):
            pruner.step(compensation=chosen, calibration=x[:64])
    assert [p.shape for p in models[0].parameters()] == [p.shape for p in models[1].parameters()]
    with torch.no_grad():
        target = dense(x[64:])
        plain, better = (float((model(x[64:]) - target).square().mean()) for model in models)
    assert better < plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "magic"}, "unknown"),
        ({"compensation": "linear"}, "needs calibration"),
        (
            {
                "compensation": NoCompensation(recalibrate=True),
                "calibration": torch.zeros(1),
                "interactive": True,
            },
            "one by one",
        ),
        ({"compensation": "mean", "interactive": True}, "one by one"),
    ],
)
def test_a_step_that_cannot_be_compensated_changes_nothing(options: dict[str, Any], message: str) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make().eval()
    pruner = pruner_of(model, net.example, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.4)
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        pruner.step(**options)
    assert snapshot(model) == before
    pruner.step()
    assert snapshot(model) != before


# ----------------------------------------------------------------------------------------------------------
# Real nets on which Torch-Pruning is wrong, or crashes


@pytest.mark.slow
@pytest.mark.parametrize("criterion", IMPORTANCES)
@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "dpn68", "cs3darknet_s", "res2net50_26w_4s"])
def test_real_nets(name: str, criterion: str) -> None:
    if name.startswith("shufflenet"):
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None)
    else:
        model = pytest.importorskip("timm").create_model(name, num_classes=CLASSES)
    model = randomise(model).eval()
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    pruner_of(model, x, IMPORTANCES[criterion](), pruning_ratio=0.5).step()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, model))
    assert after < 0.75 * before
    assert largest_difference(dense, model, (x,)) < 1e-10
