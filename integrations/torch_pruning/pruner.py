"""Torch-Pruning's pruners on the channel graph: any model, any importance, verified before anything is cut."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from ss_pruning._utils.running import quiet_hooks
from ss_pruning.compensation.apply import calibration_images, cut_
from ss_pruning.config import Compensation, NoCompensation, is_count, is_number
from ss_pruning.errors import InputError
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.graph.groups import PruningGroup, Subgroup
from ss_pruning.graph.layers import is_depthwise
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.scoring import importance_of, subgroup_scores
from ss_pruning.integrations.torch_pruning.dependency_graph import (
    ROOT_TYPES,
    ChannelGraph,
    ChannelGroup,
    producers,
)
from ss_pruning.integrations.torch_pruning.heads import HeadOptions
from ss_pruning.integrations.torch_pruning.scopes import Scopes, parts_of
from ss_pruning.integrations.torch_pruning.session import Era
from ss_pruning.planning.search import find_verified_plan
from ss_pruning.surgery.plan import Plan

__all__ = [
    "BNScalePruner",
    "ChannelGraph",
    "ChannelGroup",
    "GraphPruner",
    "GroupNormPruner",
    "GrowingRegPruner",
]


class GraphPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """A drop-in for `tp.pruner.BasePruner` on the channel graph; any model, verified before it is cut.

    What cannot be cut right is excluded (`excluded` says what and why). Two options hold more strictly than in
    Torch-Pruning: no layer ever loses more than `max_pruning_ratio` of its first width, nor its last channel; and
    `round_to` rounds kept widths up, so never more goes than the ratio says. To give another pruner of
    Torch-Pruning's this graph, inherit from both: `class Mine(TheirPruner, GraphPruner)`.

    Args:
        model: Any CNN.
        example_inputs: What `forward` takes: a tensor, a sequence of positional or a dict of keyword arguments.
        importance: Any Torch-Pruning importance, or the name of one as for `ss_pruning.prune_`.
        global_pruning: Rank the channels of all layers together.
        pruning_ratio: Share of the channels to remove.
        pruning_ratio_dict: Ratios of its own for modules (all layers inside), or tuples of modules.
        max_pruning_ratio: Largest share that any layer loses.
        iterative_steps: Number of `step()` calls in which the ratio is reached.
        iterative_pruning_ratio_scheduler: From ratio and number of steps to the ratio after each step.
        ignored_layers: Modules (all layers inside) and parameters whose channels stay.
        round_to: Remaining widths are multiples of this.
        isomorphic: Rank layers together whose surroundings are alike.
        root_module_types: Only what a layer of these types writes is pruned.
        forward_fn: Not supported.
        output_transform: Not needed.
        ch_sparsity: The older name of `pruning_ratio`.
        ch_sparsity_dict: The older name of `pruning_ratio_dict`.
        **found_by_the_graph: Torch-Pruning's options for what the graph finds by itself. Those for heads say how many
            go: none with `prune_num_heads=False`, else `head_pruning_ratio` (or `head_pruning_ratio_dict`) of them, or
            by default as many as of other channels; numbers in `num_heads` follow. Those for groups, loose parameters
            and the dimensions within heads have no effect.

    Raises:
        InputError: An option is out of range or not supported.
        ModelError: The model does not run on the inputs.
        TypeError: Torch-Pruning has no such option.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[[Any], Tensor | None] | str,
        global_pruning: bool = False,
        pruning_ratio: float = 0.5,
        pruning_ratio_dict: Mapping[Any, float] | None = None,
        max_pruning_ratio: float = 1.0,
        iterative_steps: int = 1,
        iterative_pruning_ratio_scheduler: Callable[[float, int], list[float]] = linear_scheduler,
        ignored_layers: Iterable[nn.Module | nn.Parameter] | None = None,
        round_to: int | None = None,
        isomorphic: bool = False,
        *,
        root_module_types: Sequence[Any] = ROOT_TYPES,
        forward_fn: Any = None,
        output_transform: Any = None,
        ch_sparsity: float | None = None,
        ch_sparsity_dict: Mapping[Any, float] | None = None,
        **found_by_the_graph: Any,
    ) -> None:
        _check_options(found_by_the_graph)
        self.model = model
        self.importance = importance_of(importance)
        if not callable(self.importance):
            raise InputError(
                f"importance={importance!r:.80}: give one, such as SynapticImportance(), or its name"
            )
        self.global_pruning, self.isomorphic = global_pruning, isomorphic
        self.round_to = None if round_to is None else _count(round_to, "round_to")
        alone = isinstance(root_module_types, type)
        self.root_module_types = (root_module_types,) if alone else tuple(root_module_types)
        self.max_pruning_ratio = _checked(max_pruning_ratio, "max_pruning_ratio")
        self.pruning_ratio = _checked(pruning_ratio if ch_sparsity is None else ch_sparsity, "pruning_ratio")
        self.iterative_steps, self.current_step = _count(iterative_steps, "iterative_steps"), 0
        self.iterative_pruning_ratio_scheduler = iterative_pruning_ratio_scheduler
        self.per_step_pruning_ratio = self._schedule(self.pruning_ratio)
        self.heads = HeadOptions.of(found_by_the_graph, self._schedule)
        self._set_ratios(pruning_ratio_dict if ch_sparsity_dict is None else ch_sparsity_dict)
        self._build(example_inputs, forward_fn, _listed(ignored_layers))

    def _build(self, example_inputs: Any, forward_fn: Any, ignored: list[nn.Module | nn.Parameter]) -> None:
        """The graph, and what Torch-Pruning's own methods read besides."""
        self.ignored_layers = [m for item in ignored if isinstance(item, nn.Module) for m in item.modules()]
        self.ignored_params = [item for item in ignored if isinstance(item, nn.Parameter)]
        self.in_channel_groups: dict[Any, int] = {}
        self.out_channel_groups: dict[Any, int] = {}
        self.DG = ChannelGraph().build_dependency(
            self.model,
            example_inputs,
            forward_fn=forward_fn,
            ignored_layers=self.ignored_layers,
            ignored_params=self.ignored_params,
        )
        self._first_widths = {path: layer.outputs for path, layer in self.DG.connectivity.layers.items()}
        self.removed: Counter[Hashable] = Counter()
        self._failed: dict[str, Excluded] = {}

    def _schedule(self, ratio: float) -> list[float]:
        """The ratio before the first step, and after each."""
        ratios = list(self.iterative_pruning_ratio_scheduler(ratio, self.iterative_steps))
        if len(ratios) <= self.iterative_steps:
            raise InputError(
                f"iterative_pruning_ratio_scheduler returns {len(ratios)} ratios for {self.iterative_steps} steps: one "
                "is needed before the first step, and one after each"
            )
        return ratios

    def _set_ratios(self, ratios: Mapping[Any, float] | None) -> None:
        """Ratios after each step, and the scope, of the layers that have one of their own."""
        self.pruning_ratio_dict: dict[nn.Module, list[float]] = {}
        self._own_scope: dict[nn.Module, int] = {}
        if not isinstance(ratios, Mapping | None):
            raise InputError(f"pruning_ratio_dict={ratios!r:.80}: give a dict of modules and their ratios")
        for number, (modules, ratio) in enumerate((ratios or {}).items()):
            if not (is_number(ratio) and 0 <= ratio <= 1):
                raise InputError(f"pruning_ratio_dict holds {ratio!r}, which does not lie in [0, 1]")
            for module in modules if isinstance(modules, tuple) else (modules,):
                if not isinstance(module, nn.Module):
                    raise InputError(
                        f"pruning_ratio_dict gives a ratio to {module!r:.80}, which is no module"
                    )
                for layer in module.modules():
                    self.pruning_ratio_dict[layer] = self._schedule(ratio)
                    self._own_scope[layer] = number

    @property
    def excluded(self) -> list[Excluded]:
        """Layers of which channels stay whatever the ratio, with the reason."""
        kept = self.heads.excluded(self.DG.era.groups)
        return [*self.DG.era.coupling.excluded, *self._failed.values(), *kept]

    @property
    def num_heads(self) -> dict[nn.Module, int]:
        """The numbers of heads that were given, as they are now."""
        return self.heads.followed()

    def step(
        self,
        interactive: bool = False,
        *,
        compensation: Compensation | str = "none",
        calibration: Any = None,
    ) -> Iterator[ChannelGroup] | None:
        """Choose, verify on a copy, and cut; or hand out what was chosen, group by group, to be cut by `prune()`.

        Args:
            interactive: Hand out groups instead of cutting.
            compensation: Move what the removed channels carried onto what stays, as for `ss_pruning.prune_`.
            calibration: Unlabelled inputs for it: a tensor, batches, or "synthetic".

        Raises:
            InputError: An unknown compensation, or one that lacks calibration inputs, or is asked of groups.
        """
        repair = Compensation.of(compensation)
        repair.check(calibration)
        plain = repair == NoCompensation()
        if interactive and not plain:
            raise InputError("groups that are handed out are cut one by one: compensate in a step that cuts")
        self.current_step += 1
        if interactive:
            return self._prune()
        try:
            with torch.inference_mode(False), quiet_hooks(self.model, self.DG.example_inputs):
                self._cut_chosen(None if plain else partial(self._cut, repair, calibration))
        except BaseException:
            self.current_step -= 1  # nothing was cut: the step is still to come
            raise
        return None

    def _cut_chosen(self, cut: Callable[[Plan], Plan] | None) -> None:
        """One step that cuts, with more to do than that if `cut` is given."""
        plan, parts = self._choose()
        if parts:
            era: Era = self.DG.latest
            self.DG.record(
                ", ".join(part[0].root.path for part in parts),
                era.apply(plan, [subgroup for part in parts for subgroup in part], cut),
            )

    def _cut(self, compensation: Compensation, calibration: Any, plan: Plan) -> Plan:
        """Cut with compensation; the connectivity is that of the model as earlier steps have left it."""
        inputs = self.DG.example_inputs
        images = calibration_images(calibration, self.model, inputs)
        return cut_(TracedModel.of(self.model, inputs), plan, compensation, images)[0]

    def _prune(self) -> Iterator[ChannelGroup]:
        for part in self._choose()[1]:
            yield self.DG.group_of(part) or ChannelGroup(self.DG, part)

    def _choose(self) -> tuple[Plan, list[list[Subgroup]]]:
        """What goes in this step: the verified plan, and group by group the channel sets."""
        if self.current_step > self.iterative_steps:
            warnings.warn("all iterative steps are done, so nothing more is pruned", stacklevel=4)
            return Plan(), []
        era: Era = self.DG.era
        fixed = [
            number
            for number, (label, group) in enumerate(era.groups.items())
            if label in self._failed
            or self.heads.stay(group)
            or not self.DG.is_root(group, self.root_module_types)
        ]
        scoped = Scopes(self, era)
        result = find_verified_plan(era.verifier, era.coupling.without(fixed, ()), scoped.allocate)
        failing = {left.paths[0]: left for left in result.failed}
        alive = set(map(id, result.coupling.groups))
        for number, (label, group) in enumerate(era.groups.items()):
            if number not in fixed and id(group) not in alive:
                self._failed[label] = failing[group.name]
        self.removed += scoped.taken
        return result.verified.plan, parts_of(result)

    def scope_of(
        self, label: str, group: PruningGroup, modules: Mapping[str, nn.Module]
    ) -> tuple[Hashable, float]:
        """With what a group is ranked, and the share that is to be gone there after this step."""
        scope: Hashable
        heads = self.heads.ratio_of(group, [modules[p] for p in producers(group)])
        if heads is not None:
            scope = "heads" if self.global_pruning else label
            return scope, min(heads[self.current_step], self.max_pruning_ratio)
        own = next((modules[p] for p in producers(group) if modules[p] in self.pruning_ratio_dict), None)
        ratios = self.per_step_pruning_ratio if own is None else self.pruning_ratio_dict[own]
        scope = label
        if own is not None and self.global_pruning:
            scope = self._own_scope[own]
        elif own is None and self.isomorphic:
            scope = tuple((type(modules.get(m.path)), m.side) for m in group.members)
        elif own is None and self.global_pruning:
            scope = None
        return scope, min(ratios[self.current_step], self.max_pruning_ratio)

    def allowed(self, group: PruningGroup, era: Era) -> float:
        """Share of its channels that a group may still lose."""
        keep = 1 - self.max_pruning_ratio
        shares = [
            1 - keep * self._first_widths[p] / era.connectivity.layers[p].outputs for p in producers(group)
        ]
        return max(0.0, min(shares))

    def estimate_importance(self, group: ChannelGroup) -> Tensor:
        """Scores of the group's channels; NaN, which regularisers skip, where the importance knows nothing."""
        scores = torch.cat(subgroup_scores(self.importance, group.subgroups, self.DG))[group.order]
        return torch.where(scores.isinf(), float("nan"), scores).to(next(self.model.parameters()))

    @property
    def _groups(self) -> list[ChannelGroup]:
        """What Torch-Pruning's regularisers work on."""
        return self._regularised

    @_groups.setter
    def _groups(self, groups: Iterable[ChannelGroup]) -> None:
        """Without the items that they would index wrongly."""
        self._regularised = [g for g in (group.only(_regularisable) for group in groups) if g is not None]


def _regularisable(dep: Any) -> bool:
    """False for the inputs of grouped convolutions, and for transposed ones: their axes differ."""
    module = dep.target.module
    if not isinstance(module, _ConvNd) or is_depthwise(module):
        return True
    return not module.transposed and (module.groups == 1 or dep.handler != tp.prune_conv_in_channels)


def _checked(ratio: Any, name: str) -> float:
    if not (is_number(ratio) and 0 <= ratio <= 1):
        raise InputError(f"{name}={ratio!r} must be a number in [0, 1]")
    return float(ratio)


def _count(number: Any, name: str) -> int:
    if not is_count(number):
        raise InputError(f"{name}={number!r} must be a positive whole number")
    return int(number)


def _listed(ignored: Any) -> list[nn.Module | nn.Parameter]:
    """What must stay, of which one may stand alone; what is neither would be passed over in silence."""
    alone = isinstance(ignored, (nn.Module, Tensor, str))
    items = [ignored] if alone else list(ignored or ())
    for item in items:
        if not isinstance(item, (nn.Module, nn.Parameter)):
            raise InputError(
                f"ignored_layers holds {item!r:.80}: give modules, such as model.fc, or parameters"
            )
    return items


def _check_options(options: Mapping[str, Any]) -> None:
    known = inspect.signature(tp.pruner.BasePruner.__init__).parameters
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"Torch-Pruning's pruners have no option {name!r}{meant}")
    if options.get("customized_pruners"):
        raise InputError(
            "customized_pruners is not supported here: all layers are cut as the channel graph says"
        )


class GroupNormPruner(tp.pruner.GroupNormPruner, GraphPruner):  # type: ignore[misc]
    """Torch-Pruning's pruner of that name (a growing group norm in training) on the channel graph."""


class GrowingRegPruner(tp.pruner.GrowingRegPruner, GraphPruner):  # type: ignore[misc]
    """Torch-Pruning's pruner of that name (a growing penalty in training) on the channel graph."""


class BNScalePruner(tp.pruner.BNScalePruner, GraphPruner):  # type: ignore[misc]
    """Torch-Pruning's pruner of that name (network slimming) on the channel graph."""

    @torch.no_grad()
    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add the penalty to the gradients; a group lasso also where a group holds only some of a norm's channels."""
        if not self.group_lasso:
            super().regularize(model, reg, bias)
            return
        reg = self.reg if reg is None else reg
        for group in self._groups:
            norms = [i for i in group if isinstance(i.dep.layer, _BatchNorm) and i.dep.layer.affine]
            squares = [self._squares(item, len(group.order)) for item in norms]
            for item in norms:
                power = torch.stack(squares).mean(0) + 1e-9
                weight, roots = item.dep.layer.weight, torch.tensor(item.root_idxs)
                if weight.grad is not None:
                    at = torch.tensor(item.idxs, device=weight.device)
                    weight.grad.index_add_(0, at, reg * weight[at] / power[roots.to(weight.device)].sqrt())

    @staticmethod
    def _squares(item: Any, size: int) -> Tensor:
        """The norm's squared weights at their places in the group."""
        weight: Tensor = item.dep.layer.weight
        roots = torch.tensor(item.root_idxs, device=weight.device)
        return weight.new_zeros(size).index_add_(0, roots, weight[item.idxs].square())
