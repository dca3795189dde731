"""Rank channels across layers by importance or by measured layer sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ss_pruning._utils.arrays import Ints
from ss_pruning._utils.progress import Clock
from ss_pruning.compensation.passes.memory import give_back
from ss_pruning.config import METHODS, Config, Method, Reconstruct, Synaptic
from ss_pruning.errors import InputError, ModelError, NothingToPruneError
from ss_pruning.graph.groups import Coupling, PruningGroup
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.activation_stats import ActivationStatistics
from ss_pruning.importance.calibration import BATCH, Batch
from ss_pruning.importance.scoring import SubgroupGraph, group_scores
from ss_pruning.importance.sensitivity import Effort, Scores, Shrinking, by_sensitivity, effort_for, set_aside
from ss_pruning.importance.synaptic import SynapticImportance
from ss_pruning.planning.allocation import Schedule, allot, divided
from ss_pruning.planning.costs import Costs
from ss_pruning.planning.remembered import key_of, remembered

#: Powers of costs that scores are divided by in what competes, unless one was asked for.
EXPONENTS = (1.0, 0.75, 0.5)
# In units of the largest score: no power of costs brings it back, and the order within a group is not rounded away.
_BEHIND = 1e6


@dataclass(frozen=True)
class Ranking:
    """Of all channel sets of a model.

    Attributes:
        config: The effective settings.
        scores: By group and subgroup, one a channel set.
        not_measured: Why no sensitivity was measured, where it would have been by default.
    """

    config: Config
    scores: Scores
    not_measured: str = ""


@dataclass
class Ranker:
    """Ranks the channels of what may be cut, anew where that has changed, and takes what the budget asks for."""

    traced: TracedModel
    config: Config
    costs: Costs
    images: Batch | None
    clock: Clock
    effort: Effort | None = None
    _importances: dict[Synaptic, Any] = field(default_factory=dict, init=False)
    _latest: tuple[Coupling, Ranking] | None = field(default=None, init=False)

    def allocate(self, coupling: Coupling) -> tuple[Schedule, Ints]:
        """The moves in order, and `[groups]`, how many steps each group takes to meet the budget."""
        check_any(coupling)
        ranking = self.ranked(coupling)
        config = replace(ranking.config, budget=self.config.budget)
        try:
            return allot(coupling.groups, ranking.scores, self.costs, config)
        except NothingToPruneError as error:
            raise NothingToPruneError(f"{error}. {named_excluded(coupling)}") from error

    def ranked(self, coupling: Coupling) -> Ranking:
        """Rank the channels of these groups.

        Raises:
            InputError: Sensitivity cannot be measured without calibration inputs.
            ModelError: Nor can it be on this model. If nobody asked for it, layers compete by their scores then.
        """
        if self._latest is None or self._latest[0] is not coupling:
            self._latest = coupling, self._rank(replace(self.traced, coupling=coupling))
        return self._latest[1]

    def _rank(self, traced: TracedModel) -> Ranking:
        count = 0 if self.images is None else len(self.images)
        config = self.config.resolve(count)
        if config.allocation.scope != "sensitivity":
            return Ranking(config, self._scores(traced, config.importance))
        if self.config.allocation.scope is not None:
            return Ranking(config, self._by_sensitivity(traced, config))
        try:
            return Ranking(config, self._by_sensitivity(traced, config))
        except ModelError as error:
            asked = replace(self.config, allocation=replace(self.config.allocation, scope="global"))
            config = asked.resolve(count)
            return Ranking(config, self._scores(traced, config.importance), not_measured=str(error))

    def _scores(self, traced: TracedModel, importance: Any) -> Scores:
        """By group and subgroup, one score a channel set; those that were measured on inputs are kept for next time."""
        if not isinstance(importance, Synaptic):
            return self._scored(traced, importance)
        scorer = self._synaptic(importance)
        if importance.statistics != "data" or self.images is None:
            return self._scored(traced, scorer)
        key = key_of(traced, self._seen_by(importance, self.images), (), importance)
        shapes = [[np.empty(s.size) for s in group.subgroups] for group in traced.coupling.groups]
        return remembered(key, lambda: self._scored(traced, scorer), shapes)

    def _scored(self, traced: TracedModel, importance: Any) -> Scores:
        with self.clock("score"):
            graph = SubgroupGraph(traced.model, traced.example_inputs, traced.connectivity)
            return group_scores(importance, traced.coupling.groups, graph)

    def _synaptic(self, options: Synaptic) -> Any:
        """The importance of these options; it keeps what it has measured."""
        if options not in self._importances:
            statistics: Any = options.statistics
            if statistics == "data":
                if self.images is None:
                    raise InputError("statistics='data' needs calibration=, inputs to measure variances on")
                statistics = self._seen_by(options, self.images).split(BATCH)
            self._importances[options] = SynapticImportance(
                statistics, score=options.score or "share", conditional=options.conditional or 0.0
            )
        return self._importances[options]

    def _seen_by(self, options: Synaptic, images: Batch) -> Batch:
        """What an importance takes its statistics of: where sensitivity is told by them, not what that is measured on.

        A wide layer with few positions explains what it has seen, and would seem to lose little.
        """
        return self._left_over(images) if self._shares(options) else images

    def _left_over(self, images: Batch) -> Batch:
        return set_aside(images, (self.effort or effort_for(self._method, images)).images)[1]

    def _shares(self, options: Synaptic) -> bool:
        """Whether sensitivity takes the covariances of an importance: of so many images that a few less are as good."""
        if self.images is None or self.config.allocation.scope not in (None, "sensitivity"):
            return False
        return (options.conditional or 0.0) > 0 and len(self._left_over(self.images)) >= BATCH

    @property
    def _method(self) -> Method:
        """How the cut will be compensated; what one of the user's own makes up for is not known."""
        method = self.config.compensation.method
        return method if method in METHODS else "none"

    def _by_sensitivity(self, traced: TracedModel, config: Config) -> Scores:
        """In the order of the scores within a layer."""
        if self.images is None:
            raise InputError(
                "allocation='sensitivity' needs calibration=, some unlabelled inputs to measure on, or 'synthetic', "
                "which makes them from the batch norms; allocation='global' does without"
            )
        images, scores = self.images, self._scores(traced, config.importance)

        def taken(scores: Scores) -> Ints:
            return allot(traced.coupling.groups, scores, self.costs, config)[1]

        method = self._method

        def measure() -> Scores:
            shrinking = Shrinking(
                config.allocation.max_ratio,
                method,
                config.compensation.recalibrate,
                None if method == "reconstruct" else taken,
                lambda measured: self._rivals(measured, scores, traced, config),
                self.effort,
            )
            give_back()  # what scores took is not held beside what this takes
            with self.clock("measure"):
                known = self._known(config.importance)
                return by_sensitivity(traced, scores, images, shrinking, known)

        return remembered(self._key(traced, config, scores), measure, scores)

    def _rivals(
        self, measured: list[Scores], scores: Scores, traced: TracedModel, config: Config
    ) -> list[Scores]:
        """Sensitivities and, unless these were asked for, the scores themselves, divided by more or less of the costs.

        Each with the streams among the others, and with them last. All as if they were to be divided by the power that
        `config` says.
        """
        asked, power = self.config.allocation, config.allocation.cost_exponent or 0.0
        rivals = measured if asked.scope is not None else [*measured, scores]
        streams = [_is_stream(group) for group in traced.coupling.groups]
        if any(streams):
            rivals = [*rivals, *(_last(streams, rival) for rival in rivals)]
        if asked.cost_exponent is not None or config.budget.kind == "ratio":
            return rivals
        costs = self.costs.per_channel_set(traced.coupling.groups, config.budget.kind)
        return [divided(rival, costs, exponent - power) for exponent in EXPONENTS for rival in rivals]

    def _known(self, importance: Any) -> Mapping[str, ActivationStatistics] | None:
        """The covariances that the importance has measured, if it shares them."""
        if not isinstance(importance, Synaptic) or not self._shares(importance):
            return None
        made = self._importances.get(importance)
        return None if made is None else made.known

    def _key(self, traced: TracedModel, config: Config, scores: Scores) -> str | None:
        """What sensitivities are kept under; none where they depend on times, which are never the same twice."""
        given: tuple[object, ...] = (config.allocation.max_ratio, config.compensation, self.effort)
        # All but reconstruct are measured again, beside what the other groups would lose.
        if not isinstance(config.compensation, Reconstruct):
            # What was asked for says what competes.
            asked = replace(self.config.allocation, latency_inputs=None, budget_time=None)
            given = (*given, config.budget, asked, config.allocation.cost_exponent)
            if config.budget.kind == "latency" or config.allocation.round_to == "measured":
                return None
        assert self.images is not None
        return key_of(traced, self.images, scores, *given)


def _is_stream(group: PruningGroup) -> bool:
    """Whether several layers write to it: what goes is missed in many places, more than each by itself shows."""
    return any(len({m.path for m in s.members if m.side == "out"}) > 1 for s in group.subgroups)


def _last(chosen: Sequence[bool], scores: Scores) -> Scores:
    """With these groups behind all others, in the same order."""
    finite = [values[np.isfinite(values)].max(initial=0.0) for group in scores for values in group]
    behind = _BEHIND * max(finite)
    return [
        [values + behind for values in group] if last else group
        for last, group in zip(chosen, scores, strict=True)
    ]


_NO_LAYER = (
    "nothing, as no layer that is known ran; of a model whose layers are calls of functions, such as an exported "
    "program or a quantised model, prune the one that it was made from, and for layer types of your own see "
    "ss_pruning.register_layer"
)


def check_any(coupling: Coupling) -> None:
    """Refuse a model in which nothing may be cut."""
    if not coupling.groups:
        raise NothingToPruneError(f"the model has no channel that may go. {named_excluded(coupling)}")


def named_excluded(coupling: Coupling) -> str:
    """What is excluded and why, for messages."""
    why = "; ".join(f"{', '.join(left.paths[:3])} ({left.reason})" for left in coupling.excluded[:5])
    return f"Excluded: {why or _NO_LAYER}"
