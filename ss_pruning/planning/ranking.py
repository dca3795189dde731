"""How channels of different layers compete: by their scores, or by the output error that was seen to be done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.progress import Clock
from ss_pruning.compensation.apply import BATCH
from ss_pruning.compensation.batchnorm import on_noise, supports_noise_calibration
from ss_pruning.config import Method
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Coupling
from ss_pruning.importance.scoring import SubgroupGraph, subgroup_scores
from ss_pruning.importance.sensitivity import by_sensitivity
from ss_pruning.importance.synaptic import SynapticImportance
from ss_pruning.planning.allocation import Budget, Costs, Scope, allot
from ss_pruning.planning.defaults import (
    ON_NOISE,
    default_conditional,
    default_cost_exponent,
    default_scope,
    default_score,
    is_relevance,
)


@dataclass(frozen=True)
class Ranking:
    """Of all channel sets of a model.

    Attributes:
        importance: What scored them.
        scores: By group and subgroup, one a channel set.
        moves: How groups may be cut, as `ss_pruning.planning.allocation.allot` takes it.
        cost_exponent: Before they are compared, scores are divided by costs to this power.
        on_noise: Whether scores are output error that was measured on noise.
        not_measured: Why no output error was measured, where it would have been by default.
    """

    importance: Any
    scores: list[list[Floats]]
    moves: dict[str, Any]
    cost_exponent: float
    on_noise: bool = False
    not_measured: str = ""

    @property
    def scope(self) -> Scope:
        """How layers compete."""
        scope: Scope = self.moves["scope"]
        return scope


@dataclass
class Ranker:
    """What rankings of a model's channels are made from; all as `prune_` takes it or has found it.

    Attributes:
        options: What `allot` takes beside the scope.
        images: One batch of calibration inputs, or None.
    """

    model: nn.Module
    example_inputs: Any
    connectivity: Connectivity
    coupling: Coupling
    costs: Costs
    budget: Budget
    options: dict[str, Any]
    importance: Any
    images: Any
    compensation: Method
    recalibrate: bool
    cost_exponent: float | None

    def ranked(self, scope: Scope | None, clock: Clock) -> Ranking:
        """Rank channels as asked, or by default.

        Raises:
            InputError: Output error cannot be measured without calibration inputs.
            ModelError: Nor can it be on this model. If nobody asked for it, layers compete by their scores then.
        """
        supported = supports_noise_calibration(self.model, self.example_inputs)
        if scope is not None:
            if scope == "sensitivity" and self.images is None and not supported:
                raise InputError(
                    "scope='sensitivity' needs calibration=, some unlabelled inputs to measure on; without any it is "
                    "measured on noise, but this model takes more than a tensor or has no batch norms to tell what "
                    "should reach them. scope='global' does without"
                )
            return self._ranked(scope, clock)
        count = 0 if self.images is None else len(self.images)
        scope = default_scope(count, self.compensation, supported)
        if scope != "sensitivity":
            return self._ranked(scope, clock)
        try:
            return self._ranked(scope, clock)
        except ModelError as error:
            return replace(self._ranked("global", clock), not_measured=str(error))

    def _ranked(self, scope: Scope, clock: Clock) -> Ranking:
        importance = self.importance or self._default_importance(scope)
        exponent = self.cost_exponent
        if exponent is None:
            exponent = default_cost_exponent(importance, scope, on_noise=self.images is None)
        with clock("score", 1):
            scores = self._scores(importance)
        moves = {**self.options, "scope": scope}
        if scope == "sensitivity":
            scores = self._measured(importance, scores, moves, exponent, clock)
        return Ranking(importance, scores, moves, exponent, scope == "sensitivity" and self.images is None)

    def _default_importance(self, scope: Scope) -> Any:
        score = default_score(self.compensation, scope)
        if self.images is None:
            return SynapticImportance(score=score)
        conditional = default_conditional(self.compensation, scope)
        return SynapticImportance(statistics=self.images.split(BATCH), score=score, conditional=conditional)

    def _scores(self, importance: Any) -> list[list[Floats]]:
        """By group and subgroup, one score a channel set."""
        graph = SubgroupGraph(self.model, self.example_inputs, self.connectivity)
        subgroups = [subgroup for group in self.coupling.groups for subgroup in group.subgroups]
        scored = iter(subgroup_scores(importance, subgroups, graph))
        return [[next(scored).numpy() for _ in group.subgroups] for group in self.coupling.groups]

    def _measured(
        self,
        importance: Any,
        scores: list[list[Floats]],
        moves: dict[str, Any],
        exponent: float,
        clock: Clock,
    ) -> list[list[Floats]]:
        """Output error in the order of the scores, on the calibration inputs; on noise relevance has a say, too."""

        def taken(scores: list[list[Floats]]) -> Ints:
            return allot(self.coupling.groups, scores, self.costs, self.budget, exponent, **moves)[1]

        model, images = self.model, self.images
        if images is None:
            model, images = on_noise(model, self.example_inputs)
        sensitivity = by_sensitivity(
            model,
            self.connectivity,
            self.coupling,
            scores,
            images,
            BATCH,
            moves["max_ratio"],
            self.compensation,
            None if self.compensation == "reconstruct" else taken,
            clock.steps("measure"),
            self.recalibrate,
        )
        if self.images is not None or not is_relevance(importance):
            return sensitivity
        return [
            [
                np.where(np.isinf(lost), lost, lost**ON_NOISE * score ** (1 - ON_NOISE))
                for lost, score in zip(*subgroups, strict=True)
            ]
            for subgroups in zip(sensitivity, scores, strict=True)
        ]
