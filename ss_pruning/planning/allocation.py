"""Choosing what goes: scores and a budget in, a selection of channels out.

Every group shrinks in equal steps, least important channel sets first. All steps of all groups are put in one order and
a prefix of it is taken: the shortest that meets the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning.config import Budget, Config, Scope
from ss_pruning.errors import BudgetError, NothingToPruneError
from ss_pruning.graph.connectivity import Connectivity, Key
from ss_pruning.graph.groups import Coupling, PruningGroup, Selection, ranks_of, step_scores
from ss_pruning.planning.costs import Cost, Costs
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.factors import Factor
from ss_pruning.surgery.plan import Plan


@dataclass(frozen=True)
class Schedule:
    """The moves of all groups in the order in which they would be taken; a move is one step or, with rounding, several.

    Attributes:
        group: `[moves]`, which group each move shrinks.
        steps: `[moves]`, by how many steps.
        channel_sets: `[moves]`, how many channel sets that removes.
        ranked: By group and subgroup, the channel sets in ascending order of importance.
    """

    group: Ints
    steps: Ints
    channel_sets: Ints
    ranked: list[list[Ints]]

    def taken(self, moves: int) -> Ints:
        """`[groups]`: steps of each group among the first `moves`."""
        weights = self.steps[:moves].astype(np.float64)
        return np.bincount(self.group[:moves], weights, minlength=len(self.ranked)).astype(np.int64)


def schedule(
    groups: Sequence[PruningGroup],
    scores: Sequence[Sequence[Floats]],
    *,
    scope: Scope = "global",
    max_ratio: float | Sequence[float] = 0.9,
    round_to: int | Mapping[str, int] | None = None,
) -> Schedule:
    """Order the moves of all groups.

    Args:
        groups: What may shrink.
        scores: By group and subgroup, one score a channel set; higher stays longer, and what is infinite stays.
        scope: "local" shrinks all groups evenly; any other compares scores across groups.
        max_ratio: No group loses a larger share than this (or than its own, if one a group is given); some steps of
            every group always stay.
        round_to: Widths that remain are multiples of this, or of its own by a group's name.
    """
    keys: list[Floats] = []
    moves: list[Ints] = []
    ranked = [ranks_of(subgroups) for subgroups in scores]
    caps = [max_ratio] * len(groups) if isinstance(max_ratio, (int, float)) else max_ratio
    for u, (group, subgroup_scores) in enumerate(zip(groups, scores, strict=True)):
        steps = group.steps
        per_step = group.size // steps
        multiple = round_to.get(group.name, 1) if isinstance(round_to, Mapping) else round_to
        summed = step_scores(group, subgroup_scores, ranked[u])
        ends = _stops(group, caps[u], multiple, int(np.isfinite(summed).sum()))
        taken = np.diff(ends, prepend=0)
        if scope == "local":
            keys.append(ends / steps)
        elif len(ends):
            keys.append(np.add.reduceat(summed[: ends[-1]], ends - taken) / (taken * per_step))
        moves.append(np.stack([np.full_like(ends, u), taken, taken * per_step], 1))
    order = np.argsort(np.concatenate([*keys, np.zeros(0)]), kind="stable")
    table = np.concatenate([*moves, np.zeros((0, 3), dtype=np.int64)])[order]
    return Schedule(table[:, 0], table[:, 1], table[:, 2], ranked)


def _stops(group: PruningGroup, max_ratio: float, round_to: int | None, free: int) -> Ints:
    """Numbers of steps after which the group may stop shrinking; no more than are free to go."""
    first, steps = group.subgroups[0], group.steps
    stops: Ints = np.arange(1, min(int(max_ratio * steps + 1e-9), steps - group.least, free) + 1)
    rest = (first.size - stops * (first.size // steps)) * first.head_width
    fitting: Ints = stops[rest % (round_to or 1) == 0]
    return fitting


def allot(
    groups: Sequence[PruningGroup], scores: Sequence[Sequence[Floats]], costs: Costs, config: Config
) -> tuple[Schedule, Ints]:
    """The moves in order, and `[groups]`, how many steps each group takes to meet the budget."""
    budget, allocation = config.budget, config.allocation
    multiples = costs.multiples(allocation.round_to, groups)
    if budget.kind != "ratio" and allocation.cost_exponent:
        scores = divided(scores, costs.per_channel_set(groups, budget.kind), allocation.cost_exponent)
    order = schedule(
        groups,
        scores,
        scope=allocation.scope or "global",
        max_ratio=allocation.max_ratio,
        round_to=multiples,
    )
    return order, choose(order, groups, costs, budget)


def divided(scores: Sequence[Sequence[Floats]], costs: Floats, exponent: float) -> list[list[Floats]]:
    """Scores by group and subgroup, divided by a power of `[groups]`, what a channel set of each group costs."""
    weights = np.maximum(np.maximum(costs, 1e-300) ** exponent, 1e-300)
    return [[s / weight for s in subgroups] for weight, subgroups in zip(weights, scores, strict=True)]


def choose(plan: Schedule, groups: Sequence[PruningGroup], costs: Costs, budget: Budget) -> Ints:
    """`[groups]`: how many steps each group takes, for the shortest prefix of moves that meets the budget.

    Raises:
        NothingToPruneError: No move is possible.
        BudgetError: All moves together do not reach the budget; says the smallest that can be reached.
    """
    total = len(plan.group)
    if not total:
        raise NothingToPruneError(
            "no layer is wide enough to lose a channel under max_ratio and round_to; raise the one or lower the other "
            "(channels of infinite importance stay)"
        )
    if budget.kind == "ratio":
        goal = budget.value * sum(group.size for group in groups)
        moves = int(np.searchsorted(plan.channel_sets.cumsum(), goal + 1e-9, side="right"))
        if not moves:
            raise BudgetError(
                f"ratio={budget.value} is less than one step; the smallest is {plan.channel_sets[0]} channels"
            )
        if moves == total and plan.channel_sets.sum() < goal - plan.channel_sets.max():
            reachable = plan.channel_sets.sum() / (goal / budget.value)
            raise BudgetError(
                f"ratio={budget.value} is out of reach; the largest is {reachable:.4f} (see max_ratio)"
            )
        return plan.taken(moves)
    return plan.taken(_search(plan, groups, costs, budget))


def _search(plan: Schedule, groups: Sequence[PruningGroup], costs: Costs, budget: Budget) -> int:
    """The smallest number of moves whose cost is within the budget, by bisection."""
    per_step = costs.removed_per_step(groups)
    kind: Cost = "params" if budget.kind == "ratio" else budget.kind
    dense = costs.dense(kind)

    def cost(moves: int) -> float:
        return costs.after(kind, plan.taken(moves) @ per_step)

    goal, low, high = budget.value * dense, 0, len(plan.group)
    if cost(high) > goal:
        if kind == "latency":  # a table's seconds are a guess: the clock will say how far this goes
            return high
        raise BudgetError(
            f"{kind}={budget.value} is below what is reachable; the smallest is {kind}={cost(high) / dense:.4f} "
            "(raise max_ratio, or ignore less; channels of infinite importance stay)"
            f"{costs.held(kind)}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) <= goal else (middle, high)
    return high


def select(plan: Schedule, groups: Sequence[PruningGroup], steps: Ints, coupling: Coupling) -> Selection:
    """The channels that stay, by layer side, when each group takes so many steps."""
    removed: dict[Key, list[Ints]] = {}
    for group, ranks, count in zip(groups, plan.ranked, steps.tolist(), strict=True):
        for key, channels in pruned_of(group, ranks, count).items():
            removed.setdefault(key, []).append(channels)
    selection: Selection = {}
    for key, parts in removed.items():
        stays = np.ones(coupling.widths[key], dtype=bool)
        stays[np.concatenate(parts)] = False
        selection[key] = tuple(np.flatnonzero(stays).tolist())
    return selection


def plan_for(
    order: Schedule, steps: Ints, coupling: Coupling, connectivity: Connectivity
) -> tuple[Plan, Selection]:
    """The cut in which each group takes so many steps, and the channels that stay by layer side."""
    selection = select(order, coupling.groups, steps, coupling)
    return to_plan(selection, coupling, connectivity), selection


def pruned_of(group: PruningGroup, ranks: Sequence[Ints], steps: int) -> dict[Key, Ints]:
    """By layer side, the channels that go with the first `steps` of a group."""
    pruned: dict[Key, list[Ints]] = {}
    for subgroup, rank in zip(group.subgroups, ranks, strict=True):
        channel_sets = rank[: steps * (subgroup.size // group.steps)]
        for member in subgroup.members if len(channel_sets) else ():
            pruned.setdefault(member.key, []).append(member.index[channel_sets].reshape(-1))
    return {key: np.concatenate(parts) for key, parts in pruned.items()}


def to_plan(selection: Selection, coupling: Coupling, connectivity: Connectivity) -> Plan:
    """The selection as an immutable plan, in the order in which the layers run."""
    cuts = []
    for path, side in coupling.widths:
        if (path, side) not in selection or (
            path in connectivity.layers and connectivity.layers[path].kind == "positional"
        ):
            continue
        axis = connectivity.loose[path].axis if side == "tensor" else 0
        cuts.append(Cut(path, side, coupling.widths[path, side], selection[path, side], axis))
    return Plan(tuple(cuts), factors=tuple(_factors(selection, coupling)))


def _factors(selection: Selection, coupling: Coupling) -> Iterator[Factor]:
    """What queries and keys are multiplied by: the fourth root each, as two of them make a product."""
    for subgroup, key in ((s, key) for g in coupling.groups for s in g.subgroups for key in g.by_width):
        for member in subgroup.members if key in selection else ():
            if subgroup.unread and member.key == key:
                stays = np.isin(member.index, selection[key]).all(1)
                by = (float(stays.sum()) / subgroup.size) ** 0.25
                yield Factor(*key, tuple(member.index[stays].ravel().tolist()), by)
