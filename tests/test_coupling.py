"""Coupling: families channel by channel, and units, against the zoo's hand-written truth."""

from __future__ import annotations

import pytest
from torch import nn

from ss_pruning.coupling import Cell, Coupling, couple
from ss_pruning.provenance import trace
from tests import oracle
from tests.zoo import BY_NAME, ZOO, Family, Net

with_families = pytest.mark.parametrize("net", [n for n in ZOO if n.families], ids=lambda net: net.name)


def coupling_of(net: Net) -> tuple[nn.Module, Coupling]:
    model = net.make()
    return model, couple(trace(model, net.example), model)


def families_of(model: nn.Module, cell: Cell) -> list[Family]:
    """A cell's families in the zoo's words."""
    return [
        frozenset(
            (named, side, channel)
            for member in cell.members
            for named, side in words(model, member.path, member.side)
            for channel in member.index[i].tolist()
        )
        for i in range(cell.size)
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


@with_families
def test_families_equal_the_truth(net: Net) -> None:
    model, coupling = coupling_of(net)
    found = [f for unit in coupling.units for cell in unit.cells for f in families_of(model, cell)]
    assert len(found) == len(set(found))
    assert set(found) == net.families


@with_families
def test_balanced_parts_are_cells_of_one_unit(net: Net) -> None:
    """Whatever a unit may lose, every part that must stay in balance loses the same number."""
    model, coupling = coupling_of(net)
    for unit in coupling.units:
        lost: dict[tuple[str, int], float] = {}
        for cell in unit.cells:
            for family in families_of(model, cell):
                lost |= {(p, c): unit.steps and 1 / cell.size for p, side, c in family if side == "out"}
        for constraint in net.balanced:
            sums = [sum(lost.get(slot, 0.0) * len(part) for slot in part) / len(part) for part in constraint]
            assert max(sums) - min(sums) < 1e-9, (constraint, sums)


def test_what_stays_whole_is_listed_with_the_reason() -> None:
    _, coupling = coupling_of(BY_NAME["dict_output"])
    reasons = {path: left for left in coupling.left_whole for path in left.paths}
    assert set(reasons) == {"conv2", "fc"}
    assert "output" in reasons["conv2"].reason
    assert reasons["conv2"].channels == 6 + 5
