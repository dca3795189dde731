"""Checks the zoo itself: its hand-written truth against autograd and against a plain slicing of weights."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from tests.support import oracle
from tests.support.zoo import ZOO, Family, Net

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
def test_families_are_disjoint_and_hold_every_consumer(net: Net) -> None:
    families = net.families or set()
    members = [member for family in families for member in family]
    assert len(members) == len(set(members))
    home = {member: family for family in families for member in family}
    model = net.make()
    for family in families:
        for path, side, channel in family:
            if side != "in" or oracle.groups_of(model.get_submodule(path)) > 1:
                continue
            for source in net.sources[path][channel]:
                assert home.get((source[0], "out", source[1])) in (family, None), (path, channel, source)


def removable(net: Net) -> list[Family]:
    """Some families that may go together: about a third, the same number from every balanced part."""
    parts = [part for constraint in net.balanced for part in constraint]
    chosen: list[Family] = []
    used: set[int] = set()
    free = []
    for family in sorted(net.families or (), key=sorted):
        outputs = {(path, c) for path, side, c in family if side == "out"}
        hit = {k for k, part in enumerate(parts) if part & outputs}
        if hit and not hit & used:
            chosen.append(family)
            used |= hit
        elif not hit:
            free.append(family)
    return chosen + free[::3]


def sliced(model: nn.Module, families: list[Family]) -> nn.Module:
    """A float64 copy without the families' members, cut by indexing."""
    twin = copy.deepcopy(model).double()
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    for family in families:
        for path, side, channel in family:
            gone[path, side].add(channel)
    modules = dict(twin.named_modules())
    for path in {path for path, _ in gone}:
        if path not in modules:
            owner, _, name = path.rpartition(".")
            cut_loose(modules[owner], name, gone[path, "out"])
        elif isinstance(modules[path], oracle.LAYERS):
            cut_layer(modules[path], gone[path, "in"], gone[path, "out"])
        else:
            cut_norm(modules[path], gone[path, "out"])
    return twin


def keep(size: int, gone: set[int]) -> list[int]:
    return [c for c in range(size) if c not in gone]


def put(module: nn.Module, name: str, value: Tensor) -> None:
    value = value.detach().clone()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value)
    else:
        module._buffers[name] = value


def cut_loose(owner: nn.Module, name: str, gone: set[int]) -> None:
    value = getattr(owner, name)
    axis = next(d for d in range(value.dim()) if value.shape[d] > 1)
    put(owner, name, value.index_select(axis, torch.tensor(keep(value.shape[axis], gone))))


def cut_norm(module: nn.Module, gone: set[int]) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(module, name, None)
        if value is not None:
            put(module, name, value[keep(len(value), gone)])
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (len(value) - len(gone),)
    if isinstance(module, nn.InstanceNorm2d):
        module.num_features -= len(gone)


def cut_layer(layer: nn.Module, gone_in: set[int], gone_out: set[int]) -> None:
    outputs, inputs = oracle.widths(layer)
    groups = oracle.groups_of(layer)
    if groups > 1 and groups == inputs and not gone_in:  # depthwise
        gone_in = {c // (outputs // inputs) for c in gone_out}
        put(layer, "weight", layer.weight[keep(outputs, gone_out)])
        layer.groups = layer.in_channels = inputs - len(gone_in)
    else:
        cut_grouped(layer, gone_in, gone_out)
    if layer.bias is not None:
        put(layer, "bias", layer.bias[keep(outputs, gone_out)])


def cut_grouped(layer: nn.Module, gone_in: set[int], gone_out: set[int]) -> None:
    outputs, inputs = oracle.widths(layer)
    groups = oracle.groups_of(layer)
    rows, columns = outputs // groups, inputs // groups
    pieces = []
    for g in range(groups):
        row = [k for k in range(rows) if g * rows + k not in gone_out]
        column = [c for c in range(columns) if g * columns + c not in gone_in]
        if isinstance(layer, oracle.TRANSPOSED):
            pieces.append(layer.weight[g * columns : (g + 1) * columns][column][:, row])
        else:
            pieces.append(layer.weight[g * rows : (g + 1) * rows][row][:, column])
    put(layer, "weight", torch.cat(pieces))


@pytest.mark.parametrize("net", [n for n in ZOO if n.families and not n.static], ids=lambda net: net.name)
def test_families_are_enough_to_slice(net: Net) -> None:
    """Slicing all members of some families leaves a net that runs, equal to the masked one where defined."""
    model, families = net.make(), removable(net)
    assert families
    removed: dict[str, set[int]] = defaultdict(set)
    for family in families:
        for path, side, channel in family:
            if side == "in":
                removed[path].add(channel)
    with torch.no_grad():
        cut = oracle.tensors(sliced(model, families)(*(x.double() for x in net.inputs)))
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
