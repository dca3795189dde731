"""Choosing what goes: scores and a budget in, a selection of channels out.

Every group shrinks in equal steps, least important channel sets first. All steps of all groups are put in one order and
a prefix of it is taken: the shortest that meets the budget. The cost of a prefix is exact and cheap, since MACs and
parameters of a layer are bilinear in its input and output widths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.modules import modules_of, parameters_of
from ss_pruning.errors import BudgetError, InputError, NothingToPruneError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Coupling, Key, PruningGroup, Selection, pruned_of, ranks_of, step_scores
from ss_pruning.profiling.layer_latency import LayerTimes
from ss_pruning.profiling.macs import count_macs
from ss_pruning.surgery.plan import Cut, Plan

Scope = Literal["global", "local", "sensitivity"]
#: What a channel can cost; "latency" is in seconds, as `Costs.times` has them.
Cost = Literal["macs", "params", "latency"]


@dataclass(frozen=True)
class Budget:
    """What to reach.

    Attributes:
        kind: "macs", "params" or "latency" to keep, or "ratio" of channels to remove.
        value: As a share of the dense model's, in (0, 1).
    """

    kind: Literal["macs", "params", "latency", "ratio"]
    value: float

    @staticmethod
    def of(**choices: float | None) -> Budget:
        """Make one from keyword arguments, named like its kinds, of which exactly one is given.

        Raises:
            InputError: None or several are given, or a value outside (0, 1).
        """
        given = [(kind, value) for kind, value in choices.items() if value is not None]
        if len(given) != 1:
            raise InputError(
                "give exactly one of macs=, params=, latency= (shares to keep) and ratio= (share to remove)"
            )
        kind, value = given[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise InputError(f"{kind}={value!r} must lie strictly between 0 and 1; for example {kind}=0.5")
        return Budget(kind, float(value))  # type: ignore[arg-type]


class Costs:
    """MACs, parameters and seconds of the model as functions of how far each group has shrunk.

    Attributes:
        macs: Multiply-accumulates of the dense model.
        layer_macs: The same by layer path.
        params: Parameters of the dense model.
        times: What the layers take; None unless latency is the budget.
    """

    times: LayerTimes | None = None

    def __init__(
        self, model: nn.Module, example_inputs: Any, connectivity: Connectivity, coupling: Coupling
    ) -> None:
        self.keys = list(coupling.widths)
        self.number = {key: i for i, key in enumerate(self.keys)}
        self.widths: Floats = np.array([coupling.widths[key] for key in self.keys], dtype=np.float64)
        self.macs, self.layer_macs = count_macs(model, example_inputs)
        parameters = parameters_of(model)
        self.params = sum(p.numel() for p in parameters.values())
        # One row a term: amount, and the two sides it is proportional to (the last, constant side is always full).
        self.mac_terms: list[tuple[float, int, int]] = []
        self.param_terms: list[tuple[float, int, int]] = []
        self.excluded = coupling.excluded
        self._collect(modules_of(model), parameters, connectivity)

    def _collect(
        self,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, Tensor],
        connectivity: Connectivity,
    ) -> None:
        full = len(self.keys)
        for path, layer in connectivity.layers.items():
            if layer.kind == "positional":
                continue
            out = self.number[(path, "through") if layer.kind in ("norm", "response") else (path, "out")]
            into = self.number[path, "in"] if layer.kind == "synaptic" else full
            self.mac_terms.append((self.layer_macs.get(path, 0), into, out))
            for name, parameter in modules[path]._parameters.items():
                if parameter is None:
                    continue
                both = layer.kind == "synaptic" and name == "weight"
                self.param_terms.append((parameter.numel(), into if both else full, out))
        for name in connectivity.loose:
            if name in parameters:
                self.param_terms.append((parameters[name].numel(), full, self.number[name, "tensor"]))

    @property
    def in_layers(self) -> bool:
        """True if all multiply-accumulates are inside layers (none in attention, say), so that `after` is exact."""
        return self.macs == sum(amount for amount, _, _ in self.mac_terms)

    def macs_after(self, plan: Plan) -> int:
        """Multiply-accumulates after the cut; only exact if all are `in_layers`."""
        removed = np.zeros(len(self.keys))
        for cut in plan.cuts:
            removed[self.number[cut.path, cut.side]] = cut.width - len(cut.kept)
        return round(self.after("macs", removed))

    def removed_per_step(self, groups: Sequence[PruningGroup]) -> Floats:
        """`[groups, sides]`: how many channels of each side one step of each group removes."""
        removed = np.zeros((len(groups), len(self.keys)))
        for u, group in enumerate(groups):
            for subgroup in group.subgroups:
                for member in subgroup.members:
                    removed[u, self.number[member.path, member.side]] += member.index.size / group.steps
        return removed

    def per_channel_set(self, groups: Sequence[PruningGroup], kind: Cost) -> Floats:
        """`[groups]`: what the dense model saves with the first channel set of each group, as a share of its cost."""
        saved = self.removed_per_step(groups) @ (self._slope(kind) / self.widths)
        channel_sets = np.array(
            [sum(subgroup.size for subgroup in group.subgroups) / group.steps for group in groups]
        )
        saved_each: Floats = saved / channel_sets / self.dense(kind)
        return saved_each

    def _slope(self, kind: Cost) -> Floats:
        """`[sides]`: what the whole width of each side is worth."""
        if kind == "latency":
            slopes = self._measured().slope(dict.fromkeys(self.keys, 1.0))
            return np.array([slopes[key] for key in self.keys])
        terms = np.array(self.mac_terms if kind == "macs" else self.param_terms).reshape(-1, 3)
        slope = np.zeros(len(self.keys) + 1)  # the last side is always full
        for side in (1, 2):
            np.add.at(slope, terms[:, side].astype(np.int64), terms[:, 0])
        return slope[:-1]

    def held(self, kind: Cost, most: int = 3) -> str:
        """What layers whose outputs stay cost in the dense model, and why they do, of the dearest reasons."""
        terms = self.mac_terms if kind == "macs" else self.param_terms
        cost: dict[str, float] = defaultdict(float)
        for amount, _, out in terms:
            cost[self.keys[out][0]] += amount
        held = sorted(
            ((sum(cost[p] for p in left.paths), left) for left in self.excluded), key=lambda h: -h[0]
        )
        parts = []
        for amount, left in held[:most]:
            first = sorted(left.paths, key=lambda path: -cost[path])[:2]
            more = f" and {len(left.paths) - 2} others" if len(left.paths) > 2 else ""
            share = amount / self.dense(kind)
            parts.append(f"{share:.1%} in {', '.join(map(repr, first))}{more} ({left.reason})")
        return f". Of the {kind}, layers that keep their outputs hold {'; '.join(parts)}" if parts else ""

    def _measured(self) -> LayerTimes:
        if self.times is None:
            raise InputError("costs in seconds need measured layer times: set Costs.times")
        return self.times

    def dense(self, kind: Cost) -> float:
        """What the dense model costs."""
        if kind == "latency":
            return self.after(kind, np.zeros(len(self.keys)))
        return self.macs if kind == "macs" else self.params

    def after(self, kind: Cost, removed: Floats) -> float:
        """Cost when `removed` (`[sides]`) channels are gone."""
        share = np.append((self.widths - removed) / self.widths, 1.0)
        if kind == "latency":
            return self._measured().total(dict(zip(self.keys, share[:-1].tolist(), strict=True)))
        terms = np.array(self.mac_terms if kind == "macs" else self.param_terms).reshape(-1, 3)
        into, out = terms[:, 1].astype(np.int64), terms[:, 2].astype(np.int64)
        saved = float((terms[:, 0] * (1 - share[into] * share[out])).sum())
        return self.dense(kind) - saved


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
        per_step = sum(subgroup.size for subgroup in group.subgroups) // steps
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
    size, steps = group.subgroups[0].size, group.steps
    stops: Ints = np.arange(1, min(int(max_ratio * steps + 1e-9), steps - group.least, free) + 1)
    rest = size - stops * (size // steps)
    fitting: Ints = stops[rest % (round_to or 1) == 0]
    return fitting


def allot(
    groups: Sequence[PruningGroup],
    scores: Sequence[Sequence[Floats]],
    costs: Costs,
    budget: Budget,
    cost_exponent: float,
    **options: Any,
) -> tuple[Schedule, Ints]:
    """The moves in order, and `[groups]`, how many steps each group takes to meet the budget.

    Args:
        groups: What may shrink.
        scores: By group and subgroup, one score a channel set; higher stays longer.
        costs: Of the model.
        budget: What to reach.
        cost_exponent: Scores are divided by what a channel costs, to this power, before they are compared.
        options: As for `schedule`.

    Raises:
        NothingToPruneError: No move is possible.
        BudgetError: The budget is out of reach.
    """
    if budget.kind != "ratio" and cost_exponent:
        weights = np.maximum(costs.per_channel_set(groups, budget.kind) ** cost_exponent, 1e-300)
        scores = [[s / weight for s in subgroups] for weight, subgroups in zip(weights, scores, strict=True)]
    order = schedule(groups, scores, **options)
    return order, choose(order, groups, costs, budget)


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
        goal = budget.value * sum(subgroup.size for group in groups for subgroup in group.subgroups)
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
    return Plan(tuple(cuts))
