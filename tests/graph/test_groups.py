"""Coupling: channel sets channel by channel, and groups, against the zoo's hand-written truth."""

from __future__ import annotations

import pytest
from torch import nn

from ss_pruning.graph.groups import Coupling, Subgroup, couple
from ss_pruning.graph.tracing import trace
from tests.support import oracle
from tests.support.zoo import BY_NAME, ZOO, ChannelSet, Net

with_channel_sets = pytest.mark.parametrize(
    "net", [n for n in ZOO if n.channel_sets], ids=lambda net: net.name
)


def coupling_of(net: Net) -> tuple[nn.Module, Coupling]:
    model = net.make()
    return model, couple(trace(model, net.example), model)


def channel_sets_of(model: nn.Module, subgroup: Subgroup) -> list[ChannelSet]:
    """A subgroup's channel sets in the zoo's words."""
    return [
        frozenset(
            (named, side, channel)
            for member in subgroup.members
            for named, side in words(model, member.path, member.side)
            for channel in member.index[i].tolist()
        )
        for i in range(subgroup.size)
    ]


def words(model: nn.Module, path: str, side: str) -> list[tuple[str, str]]:
    """The zoo names a depthwise layer once, a PReLU by its module, and further tensors one by one."""
    if side == "tensor":
        owner = path.rpartition(".")[0]
        prelu = isinstance(model.get_submodule(owner), nn.PReLU) if owner else False
        return [(owner if prelu else path, "out")]
    module = model.get_submodule(path)
    if isinstance(module, nn.Conv1d) and module.in_channels == module.out_channels == 1:
        return []
    depthwise = isinstance(module, oracle.CONVOLUTIONS) and module.groups == module.in_channels > 1
    if side == "in":
        return [] if depthwise else [(path, "in")]
    further = [f"{path}.{name}" for name, _ in module.named_parameters() if name not in ("weight", "bias")]
    return [(path, "out"), *((name, "out") for name in further)]


@with_channel_sets
def test_channel_sets_equal_the_truth(net: Net) -> None:
    model, coupling = coupling_of(net)
    found = [
        f
        for group in coupling.groups
        for subgroup in group.subgroups
        for f in channel_sets_of(model, subgroup)
    ]
    assert len(found) == len(set(found))
    assert set(found) == net.channel_sets


@pytest.mark.parametrize("net", [n for n in ZOO if n.balanced], ids=lambda net: net.name)
def test_balanced_parts_are_subgroups_of_one_group(net: Net) -> None:
    """Each part is made of whole subgroups, as many and as large as the next part's, all of one group."""
    model, coupling = coupling_of(net)
    for constraint in net.balanced:
        parts = [{(path, "out", c) for path, c in part} for part in constraint]
        sizes: list[list[int]] = [[] for _ in parts]
        groups = set()
        for u, group in enumerate(coupling.groups):
            for subgroup in group.subgroups:
                hits = [
                    [part & channel_set for channel_set in channel_sets_of(model, subgroup)] for part in parts
                ]
                touched = [k for k, hit in enumerate(hits) if any(hit)]
                assert len(touched) <= 1, (
                    f"a subgroup of {net.name} spans several parts, which could get out of balance"
                )
                if touched:
                    assert all(hits[touched[0]])
                    sizes[touched[0]].append(subgroup.size)
                    groups.add(u)
        assert len(groups) == 1
        assert all(sorted(part) == sorted(sizes[0]) for part in sizes)


def test_what_stays_whole_is_listed_with_the_reason() -> None:
    _, coupling = coupling_of(BY_NAME["dict_output"])
    reasons = {path: left for left in coupling.excluded for path in left.paths}
    assert set(reasons) == {"conv2", "fc"}
    assert "output" in reasons["conv2"].reason
    assert reasons["conv2"].channels == 6 + 5
