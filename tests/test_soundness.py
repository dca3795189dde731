"""The search for the sound part of a cut, on made-up units: what it finds, and in how few trials."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from ss_pruning.coupling import Cell, Member, Unit
from ss_pruning.errors import VerificationError
from ss_pruning.following import Number
from ss_pruning.soundness import SoundPart
from ss_pruning.surgery import Attribute, Plan
from ss_pruning.verification import Verified


def unit(path: str, size: int = 4) -> Unit:
    return Unit((Cell((Member(path, "out", np.arange(size)[:, None]),)),))


class Bench:
    """Refuses cuts that hold certain units, and says which, or only that something is wrong."""

    def __init__(self, units: list[Unit], wrong: Collection[str], *, tells: bool = True) -> None:
        self.units, self.wrong, self.tells = units, set(wrong), tells
        self.trials = 0

    def __call__(self, part: Collection[int], fixed: Collection[Number], *, locate: bool) -> Verified:
        self.trials += 1
        bad = sorted(self.wrong & {self.units[i].name for i in part})
        if bad:
            raise VerificationError("wrong", (), bad[0] if self.tells else None)
        return Verified(Plan(), 0.0)


def searched(bench: Bench) -> SoundPart:
    part = SoundPart(bench.units, bench, set())
    part.search(list(range(len(bench.units))))
    return part


def test_all_sound_takes_one_trial() -> None:
    bench = Bench([unit(f"blocks.{i}.conv") for i in range(50)], ())
    assert searched(bench).sound == set(range(50))
    assert bench.trials == 1


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("wrong", [{"a"}, {"a", "c"}, {"b", "d", "e"}, set("abcdefgh")])
def test_finds_just_what_fails(wrong: set[str], tells: bool) -> None:
    bench = Bench([unit(name) for name in "abcdefgh"], wrong, tells=tells)
    part = searched(bench)
    assert {bench.units[i].name for i in part.failed} == wrong
    assert part.sound == set(range(8)) - set(part.failed)


def test_what_is_the_same_as_what_failed_is_not_tried() -> None:
    """Forty blocks alike, each with an attention that cannot be cut: a few trials, not some for each."""
    units = [unit(f"blocks.{i}.{name}") for i in range(40) for name in ("qkv", "mlp")]
    bench = Bench(units, {f"blocks.{i}.qkv" for i in range(40)})
    part = searched(bench)
    assert {units[i].name.partition(".qkv")[1] for i in part.failed} == {".qkv"}
    assert len(part.failed) == len(part.sound) == 40
    assert bench.trials < 12


def test_alike_ones_of_another_width_are_tried() -> None:
    units = [unit(f"stages.{i}.qkv", size) for i, size in enumerate((4, 8, 8, 16))]
    bench = Bench(units, {"stages.0.qkv", "stages.3.qkv"})
    assert {units[i].name for i in searched(bench).failed} == bench.wrong


def test_a_model_that_is_not_the_same_twice_is_refused() -> None:
    def attempt(part: Collection[int], fixed: Collection[Number], *, locate: bool) -> Verified:
        raise VerificationError("differs")

    with pytest.raises(VerificationError, match="differs"):
        SoundPart([], attempt, set()).search([])


class Coincidence(Bench):
    """In every block a number equals a width by coincidence: the cut is right only if it stays."""

    def __call__(self, part: Collection[int], fixed: Collection[Number], *, locate: bool) -> Verified:
        self.trials += 1
        paths = [self.units[i].name.rpartition(".")[0] for i in sorted(part)]
        loose = [
            p for p in paths if not {(p, "heads", None), (p.replace(p[-1], "#"), "heads", None)} & set(fixed)
        ]
        if loose:
            raise VerificationError("does not run", [(loose[0], "heads", None)], f"{loose[0]}.qkv")
        return Verified(Plan(attributes=(Attribute("other", "n", None, 8, 4),)), 0.0)


def test_a_number_fixed_in_one_block_is_fixed_in_its_likes() -> None:
    bench = Coincidence([unit(f"blocks.{i}.proj") for i in range(8)], ())
    part = searched(bench)
    assert not part.failed
    assert ("blocks.#", "heads", None) in part.fixed
    assert bench.trials < 8


class Stacked(Bench):
    """The width may follow, layer numbers that equal it may not: the net then takes another layer's output."""

    def __call__(self, part: Collection[int], fixed: Collection[Number], *, locate: bool) -> Verified:
        self.trials += 1
        followed = [n for n in (("net.0", "width", None), ("net.3", "index", None)) if n not in fixed]
        if followed != [("net.0", "width", None)]:
            raise VerificationError("takes nothing", followed, "head")
        return Verified(Plan(), 0.0)


def test_numbers_are_fixed_by_name_where_the_failure_does_not_point_at_one() -> None:
    bench = Stacked([unit("net.0.conv")], ())
    part = searched(bench)
    assert not part.failed
    assert ("net.3", "index", None) in part.fixed
    assert ("net.0", "width", None) not in part.fixed
