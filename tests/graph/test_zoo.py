"""Checks the zoo itself: its hand-written truth against autograd and against a plain slicing of weights."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from tests.support import oracle
from tests.support.zoo import ZOO, ChannelSet, Net

every_net = pytest.mark.parametrize("net", ZOO, ids=lambda net: net.name)


@every_net
def test_sources_agree_with_autograd(net: Net) -> None:
    for path, truth in net.sources.items():
        calls = [
            [oracle.feeders(arrival, c) for c in range(arrival.width)]
            for arrival in oracle.arrivals(net.make(), net.inputs)
            if arrival.path == path
        ]
        if path in net.training:
            continue
        assert net.calls.get(path, [truth]) == calls, path
        assert truth == [set().union(*channel) for channel in zip(*calls, strict=True)], path


@every_net
def test_every_layer_that_runs_has_a_truth(net: Net) -> None:
    ran = set()
    model = net.make()
    for path, module in model.named_modules():
        if isinstance(module, oracle.LAYERS):
            module.register_forward_pre_hook(lambda _, args, path=path: ran.add(path))
    model(*net.inputs)
    assert ran == set(net.sources) - net.training


@every_net
def test_channel_sets_are_disjoint_and_hold_every_consumer(net: Net) -> None:
    channel_sets = net.channel_sets or set()
    members = [member for channel_set in channel_sets for member in channel_set]
    assert len(members) == len(set(members))
    home = {member: channel_set for channel_set in channel_sets for member in channel_set}
    model = net.make()
    for channel_set in channel_sets:
        for path, side, channel in channel_set:
            if side != "in" or oracle.groups_of(model.get_submodule(path)) > 1:
                continue
            for source in net.sources[path][channel]:
                assert home.get((source[0], "out", source[1])) in (channel_set, None), (path, channel, source)


def removable(net: Net) -> list[ChannelSet]:
    """Some channel sets that may go together: about a third, the same number from every balanced part."""
    parts = [part for constraint in net.balanced for part in constraint]
    chosen: list[ChannelSet] = []
    used: set[int] = set()
    free = []
    for channel_set in sorted(net.channel_sets or (), key=sorted):
        outputs = {(path, c) for path, side, c in channel_set if side == "out"}
        hit = {k for k, part in enumerate(parts) if part & outputs}
        if hit and not hit & used:
            chosen.append(channel_set)
            used |= hit
        elif not hit:
            free.append(channel_set)
    return chosen + free[::3]


def sliced(model: nn.Module, channel_sets: list[ChannelSet]) -> nn.Module:
    """A float64 copy without the channel sets' members, cut by indexing."""
    twin = copy.deepcopy(model).double()
    pruned: dict[tuple[str, str], set[int]] = defaultdict(set)
    for channel_set in channel_sets:
        for path, side, channel in channel_set:
            pruned[path, side].add(channel)
    modules = dict(twin.named_modules())
    for path in {path for path, _ in pruned}:
        if path not in modules:
            owner, _, name = path.rpartition(".")
            cut_loose(modules[owner], name, pruned[path, "out"])
        elif isinstance(modules[path], oracle.LAYERS):
            cut_layer(modules[path], pruned[path, "in"], pruned[path, "out"])
        else:
            cut_norm(modules[path], pruned[path, "out"])
    return twin


def keep(size: int, pruned: set[int]) -> list[int]:
    return [c for c in range(size) if c not in pruned]


def put(module: nn.Module, name: str, value: Tensor) -> None:
    value = value.detach().clone()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value)
    else:
        module._buffers[name] = value


def cut_loose(owner: nn.Module, name: str, pruned: set[int]) -> None:
    value = getattr(owner, name)
    axis = next(d for d in range(value.dim()) if value.shape[d] > 1)
    put(owner, name, value.index_select(axis, torch.tensor(keep(value.shape[axis], pruned))))


def cut_norm(module: nn.Module, pruned: set[int]) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(module, name, None)
        if value is not None:
            put(module, name, value[keep(len(value), pruned)])
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (len(value) - len(pruned),)
    if isinstance(module, nn.InstanceNorm2d):
        module.num_features -= len(pruned)


def cut_layer(layer: nn.Module, pruned_in: set[int], pruned_out: set[int]) -> None:
    outputs, inputs = oracle.widths(layer)
    groups = oracle.groups_of(layer)
    if groups > 1 and groups == inputs and not pruned_in:  # depthwise
        pruned_in = {c // (outputs // inputs) for c in pruned_out}
        put(layer, "weight", layer.weight[keep(outputs, pruned_out)])
        layer.groups = layer.in_channels = inputs - len(pruned_in)
    else:
        cut_grouped(layer, pruned_in, pruned_out)
    if layer.bias is not None:
        put(layer, "bias", layer.bias[keep(outputs, pruned_out)])


def cut_grouped(layer: nn.Module, pruned_in: set[int], pruned_out: set[int]) -> None:
    outputs, inputs = oracle.widths(layer)
    groups = oracle.groups_of(layer)
    rows, columns = outputs // groups, inputs // groups
    pieces = []
    for g in range(groups):
        row = [k for k in range(rows) if g * rows + k not in pruned_out]
        column = [c for c in range(columns) if g * columns + c not in pruned_in]
        if isinstance(layer, oracle.TRANSPOSED):
            pieces.append(layer.weight[g * columns : (g + 1) * columns][column][:, row])
        else:
            pieces.append(layer.weight[g * rows : (g + 1) * rows][row][:, column])
    put(layer, "weight", torch.cat(pieces))


@pytest.mark.parametrize("net", [n for n in ZOO if n.channel_sets and not n.static], ids=lambda net: net.name)
def test_channel_sets_are_enough_to_slice(net: Net) -> None:
    """Slicing all members of some channel sets leaves a net that runs, equal to the masked one where defined."""
    model, channel_sets = net.make(), removable(net)
    assert channel_sets
    removed: dict[str, set[int]] = defaultdict(set)
    for channel_set in channel_sets:
        for path, side, channel in channel_set:
            if side == "in":
                removed[path].add(channel)
    with torch.no_grad():
        cut = oracle.tensors(sliced(model, channel_sets)(*(x.double() for x in net.inputs)))
    expected = oracle.masked_output(model, net.inputs, removed)
    dense = oracle.masked_output(model, net.inputs, {})
    assert [x.shape for x in cut] == [x.shape for x in dense]
    if net.exact:
        for a, b in zip(cut, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not torch.allclose(expected[0], dense[0], rtol=0, atol=1e-9)


def test_make_is_reproducible_and_leaves_the_generator_alone() -> None:
    for net in ZOO:
        before = torch.get_rng_state()
        a, b = net.make(4).state_dict(), net.make(4).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(a[name], b[name]) for name in a), net.name
