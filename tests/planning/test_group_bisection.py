"""The search for the sound part of a cut, on made-up groups: what it finds, and in how few trials."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning.errors import VerificationError
from ss_pruning.graph.groups import Member, PruningGroup, Subgroup
from ss_pruning.planning.search import GroupBisection
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number, Verified


def group(path: str, size: int = 4) -> PruningGroup:
    return PruningGroup((Subgroup((Member(path, "out", np.arange(size)[:, None]),)),))


class Verifier:
    """Refuses cuts that hold certain groups, and says which, or only that something is wrong."""

    def __init__(self, groups: list[PruningGroup], wrong: Collection[str], *, tells: bool = True) -> None:
        self.groups, self.wrong, self.tells = groups, set(wrong), tells
        self.trials = 0

    def __call__(self, part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
        self.trials += 1
        bad = sorted(self.wrong & {self.groups[i].name for i in part})
        if bad:
            raise VerificationError("wrong", (), bad[0] if self.tells else None)
        return Verified(Plan(), 0.0)


def searched(verifier: Verifier) -> GroupBisection:
    part = GroupBisection(verifier.groups, verifier, set())
    part.search(list(range(len(verifier.groups))))
    return part


def test_all_sound_takes_one_trial() -> None:
    verifier = Verifier([group(f"blocks.{i}.conv") for i in range(50)], ())
    assert searched(verifier).sound == set(range(50))
    assert verifier.trials == 1


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("wrong", [{"a"}, {"a", "c"}, {"b", "d", "e"}, set("abcdefgh")])
def test_finds_just_what_fails(wrong: set[str], tells: bool) -> None:
    verifier = Verifier([group(name) for name in "abcdefgh"], wrong, tells=tells)
    part = searched(verifier)
    assert {verifier.groups[i].name for i in part.failed} == wrong
    assert part.sound == set(range(8)) - set(part.failed)


def test_what_is_the_same_as_what_failed_is_not_tried() -> None:
    """Forty blocks alike, each with an attention that cannot be cut: a few trials, not some for each."""
    groups = [group(f"blocks.{i}.{name}") for i in range(40) for name in ("qkv", "mlp")]
    verifier = Verifier(groups, {f"blocks.{i}.qkv" for i in range(40)})
    part = searched(verifier)
    assert {groups[i].name.partition(".qkv")[1] for i in part.failed} == {".qkv"}
    assert len(part.failed) == len(part.sound) == 40
    assert verifier.trials < 12


def test_alike_ones_of_another_width_are_tried() -> None:
    groups = [group(f"stages.{i}.qkv", size) for i, size in enumerate((4, 8, 8, 16))]
    verifier = Verifier(groups, {"stages.0.qkv", "stages.3.qkv"})
    assert {groups[i].name for i in searched(verifier).failed} == verifier.wrong


def test_a_model_that_is_not_the_same_twice_is_refused() -> None:
    def attempt(part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
        raise VerificationError("differs")

    with pytest.raises(VerificationError, match="differs"):
        GroupBisection([], attempt, set()).search([])


class Coincidence(Verifier):
    """In every block a number equals a width by coincidence: the cut is right only if it stays."""

    def __call__(self, part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
        self.trials += 1
        paths = [self.groups[i].name.rpartition(".")[0] for i in sorted(part)]
        loose = [
            p for p in paths if not {Number(p, "heads"), Number(p.replace(p[-1], "#"), "heads")} & set(fixed)
        ]
        if loose:
            raise VerificationError("does not run", [Number(loose[0], "heads")], f"{loose[0]}.qkv")
        return Verified(Plan(), 0.0, frozenset({Number("other", "n")}))


def test_a_number_fixed_in_one_block_is_fixed_in_its_likes() -> None:
    verifier = Coincidence([group(f"blocks.{i}.proj") for i in range(8)], ())
    part = searched(verifier)
    assert not part.failed
    assert Number("blocks.#", "heads") in part.fixed
    assert verifier.trials < 8


class Stacked(Verifier):
    """The width may follow, layer numbers that equal it may not: the net then takes another layer's output."""

    def __call__(self, part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
        self.trials += 1
        followed = [n for n in (Number("net.0", "width"), Number("net.3", "index")) if n not in fixed]
        if followed != [Number("net.0", "width")]:
            raise VerificationError("takes nothing", followed, "head")
        return Verified(Plan(), 0.0)


def test_numbers_are_fixed_by_name_where_the_failure_does_not_point_at_one() -> None:
    verifier = Stacked([group("net.0.conv")], ())
    part = searched(verifier)
    assert not part.failed
    assert Number("net.3", "index") in part.fixed
    assert Number("net.0", "width") not in part.fixed


def test_the_reason_is_what_is_wrong_nearest_to_the_cut() -> None:
    """A width that only happens to be stored elsewhere fails there first; that is not why the group stays."""
    chance = Number("other", "limit")

    def attempt(part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
        if not part:
            return Verified(Plan(), 0.0)
        if chance in fixed:
            raise VerificationError("wrong in 'own'", (), "own")
        raise VerificationError("wrong in 'other'", [chance], "other")

    part = GroupBisection([group("own")], attempt, set())
    part.search([0])
    assert part.failed == {0: "wrong in 'own'"}


def test_what_was_not_tried_says_what_it_is_like() -> None:
    groups = [group(f"blocks.{i}.qkv") for i in range(3)]
    part = searched(Verifier(groups, {group.name for group in groups}))
    tried = [i for i, reason in part.failed.items() if reason == "wrong"]
    assert len(tried) == 1
    said = f"as it does on that of '{groups[tried[0]].name}': wrong"
    assert sorted(part.failed.values()) == sorted(["wrong", said, said])


class Fixed(nn.Module):
    """Relies on one width in so many words; and crops to a number that is another's by chance."""

    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.limit, self.one, self.two = 8, nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())[..., : self.limit]

    def __init__(self) -> None:
        super().__init__()
        self.start, self.words = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 1)
        self.cropped, self.end = self.Cropped(), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.words(self.cropped(self.start(x))).reshape(-1, 10, 8, 8).relu())


def test_numbers_that_moved_by_chance_are_not_searched_for_group_by_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither before nor after a group was found to fail."""
    asked: list[str] = []
    ask = GroupBisection._without_numbers

    def noted(self: GroupBisection, part: list[int], error: VerificationError) -> Verified | str:
        asked.append(self.groups[part[0]].name)
        return ask(self, part, error)

    monkeypatch.setattr(GroupBisection, "_without_numbers", noted)
    torch.manual_seed(0)
    model = Fixed().eval()
    report = prune_(
        model, torch.randn(1, 3, 8, 8), macs=0.5
    )  # others take over what the failed one was to lose
    assert (model.cropped.limit, model.words.out_channels) == (8, 10)
    assert model.cropped.one.out_channels < 8
    assert any("relies on its width" in left.reason and left.paths == ("words",) for left in report.excluded)
    assert asked == ["words"]
