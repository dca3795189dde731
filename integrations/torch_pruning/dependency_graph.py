"""Torch-Pruning's dependency graph, made from the channel graph.

Groups hold what really shares a channel (padded shortcuts, splits and shuffles included) and are cut as plans are:
verified on a copy first. Torch-Pruning's importances work on them as they are, and so do its regularisers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch_pruning as tp
from torch import nn

from ss_pruning._utils.arrays import Ints
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.exclusions import IGNORED_REASON, Excluded
from ss_pruning.graph.groups import Member, PruningGroup, Subgroup, couple
from ss_pruning.graph.layers import is_depthwise, kind_of, width
from ss_pruning.graph.refusals import check_bare, check_weights
from ss_pruning.graph.traced import TracedModel
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.scoring import as_group
from ss_pruning.integrations.torch_pruning.session import Era
from ss_pruning.planning.tied_heads import with_tied_heads
from ss_pruning.surgery.plan import Plan

_IN = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
#: What may be pruned for its own sake, unless told otherwise.
ROOT_TYPES = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)


class ChannelGroup(tp.dependency.Group):  # type: ignore[misc]
    """Channel sets as a Torch-Pruning group: `group[i].idxs` are channels, `group[i].root_idxs` places in `group[0]`.

    Layers that Torch-Pruning has no name for are cut as well, though no item stands for them.
    """

    def __init__(self, graph: ChannelGraph, subgroups: Iterable[Subgroup]) -> None:
        super().__init__()
        self._DG, self.era, self.subgroups = graph, graph.latest, tuple(subgroups)
        # Channel sets by place in the root.
        self.order = list(range(sum(subgroup.size for subgroup in self.subgroups)))

    def only(self, wanted: Callable[[Any], bool]) -> ChannelGroup | None:
        """The group with some of its items; None if its root is not among them."""
        if not wanted(self[0].dep):
            return None
        group = ChannelGroup(self._DG, self.subgroups)
        group.order, group._group = self.order, [item for item in self if wanted(item.dep)]
        return group

    def prune(self, idxs: Iterable[int] | None = None, record_history: bool = True) -> None:
        """Verify the cut of the group (or of the channels `idxs` of its first layer) on a copy, then cut.

        Raises:
            InputError: The group is older than the last trace, or would take more than its layers can lose.
            VerificationError: The cut model would be wrong; nothing was changed.
        """
        graph: ChannelGraph = self._DG
        if idxs is not None:
            root = self[0].dep
            graph.get_pruning_group(root.target.module, root.handler, idxs).prune(
                record_history=record_history
            )
            return
        if self.era is not graph.latest:
            raise InputError("the model was cut and traced again since this group was made; ask for it anew")
        if not graph.check_pruning_group(self):
            raise InputError(
                f"{len(self[0].idxs)} channels of '{self[0].dep.target.name}' cannot go: something must stay, and all "
                "parts (of a grouped convolution, of a split) must lose as many"
            )
        plan = self.era.apply(self.era.verify(self.subgroups).plan, self.subgroups)
        if record_history:
            graph.record(self.subgroups[0].root.path, plan)


class ChannelGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A drop-in for `tp.DependencyGraph` that knows what shares a channel from running the model on labels.

    After a cut the model is traced anew when groups are asked for next.

    Attributes:
        excluded: Layers that no group offers, with the reason.
    """

    latest: Era
    _stale = False

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Any = None,
        output_transform: Any = None,
        unwrapped_parameters: Any = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        ignored_layers: Iterable[nn.Module] | None = None,
        ignored_params: Iterable[nn.Parameter] | None = None,
        verbose: bool = True,
    ) -> ChannelGraph:
        """Trace `model`. Outputs of any structure and loose parameters are understood without being told of.

        Args:
            model: Any CNN.
            example_inputs: What `forward` takes: a tensor, a sequence of positional or a dict of keyword arguments.
            forward_fn: Not supported.
            output_transform: Not needed.
            unwrapped_parameters: Not needed.
            customized_pruners: Not supported.
            ignored_layers: Layers whose channels stay.
            ignored_params: Parameters whose channels stay.
            verbose: Not needed.

        Raises:
            InputError: An argument is given that is not supported.
            ModelError: The model does not run on the inputs.
        """
        if forward_fn is not None or customized_pruners:
            raise InputError(
                "forward_fn and customized_pruners are not supported here; wrap the model in a module whose forward "
                "takes the example inputs"
            )
        check_bare(model)
        check_weights(model)
        inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
        self.model, self.example_inputs, self.verbose = model, inputs, verbose
        self._module2name = {module: name for name, module in model.named_modules()}
        self._param_to_name = {parameter: name for name, parameter in model.named_parameters()}
        self.unwrapped_parameters: list[Any] = []
        names = {self._module2name.get(m, "") for m in ignored_layers or ()}
        names |= {self._param_to_name.get(p, "") for p in ignored_params or ()}
        self._ignored = dict.fromkeys(names, IGNORED_REASON)
        self._trace_anew()
        modules = self.latest.modules
        self.module2node = {
            modules[path]: tp.dependency.Node(modules[path], None, path)
            for path in self.latest.connectivity.layers
        }
        return self

    def _trace_anew(self) -> None:
        connectivity = trace(self.model, self.example_inputs)
        coupling = couple(connectivity, self.model, self._ignored)
        tied = with_tied_heads(TracedModel(self.model, self.example_inputs, connectivity, coupling))
        whole = tuple(replace(group, tied=()) for group in tied.coupling.groups)  # they have names, and stay
        tied_for_good = replace(tied.coupling, groups=whole)
        self.latest = Era(self.model, self.example_inputs, connectivity, tied_for_good)
        self._stale = False

    @property
    def era(self) -> Era:
        """The model as it is now."""
        if self._stale or self.latest.pruned:
            self._trace_anew()
        return self.latest

    @property
    def connectivity(self) -> Connectivity:
        """Who feeds whom; importances that look for it need no trace of their own."""
        return self.latest.connectivity

    @property
    def modules(self) -> dict[str, nn.Module]:
        """By path."""
        return self.latest.modules

    @property
    def excluded(self) -> list[Excluded]:
        """Layers that no group offers, with the reason."""
        unequal = [
            pruning_group
            for pruning_group in self.era.groups.values()
            if self.group_of(pruning_group.subgroups) is None
        ]
        reason = "its parts come from several layers, which no Torch-Pruning group can express"
        return [
            *self.era.coupling.excluded,
            *(Excluded((u.name,), u.size, reason) for u in unequal),
        ]

    def get_all_groups(
        self,
        ignored_layers: Collection[nn.Module] = (),
        root_module_types: Sequence[Any] = ROOT_TYPES,
    ) -> Iterator[ChannelGroup]:
        """All groups in full, each as the model is when it is its turn: earlier ones may be cut meanwhile."""
        ignored = set(ignored_layers)
        for label in list(self.era.groups):
            pruning_group = self.era.groups.get(label)
            if pruning_group is None or not self.is_root(pruning_group, root_module_types):
                continue
            group = self.group_of(pruning_group.subgroups)
            if group is not None and not any(
                _writes(i.dep) and i.dep.target.module in ignored for i in group
            ):
                yield group

    def is_root(self, pruning_group: PruningGroup, types: Sequence[Any]) -> bool:
        """True if a layer of one of the types writes what the group shrinks."""
        return any(isinstance(self.modules[path], tuple(types)) for path in producers(pruning_group))

    def get_pruning_group(
        self, module: nn.Module, pruning_fn: Any, idxs: Iterable[int] | int
    ) -> ChannelGroup:
        """The channels `idxs` of one side of a layer, with all that shares them. Channels that must stay are left out.

        Raises:
            ValueError: The layer is not in the graph (as Torch-Pruning has it).
            InputError: None of the channels may go, or no Torch-Pruning group can express them.
        """
        if module not in self.module2node:
            raise ValueError(f"Module {module} is not in the dependency graph.")
        era, path = self.era, self._module2name[module]
        sides = ("in",) if pruning_fn in _IN and not is_depthwise(module) else ("out", "through")
        wanted = np.atleast_1d(np.asarray(idxs if isinstance(idxs, int) else list(idxs), dtype=np.int64))
        subgroups = []
        for subgroup in era.coupling.subgroups:
            rows = [
                np.isin(m.index, wanted).any(1)
                for m in subgroup.members
                if m.path == path and m.side in sides
            ]
            if rows and rows[0].any():
                subgroups.append(rows_of(subgroup, np.flatnonzero(rows[0])))
        group = self.group_of(subgroups, module, sides[0]) if subgroups else None
        if group is None:
            reasons = [left.reason for left in era.coupling.excluded if path in left.paths]
            raise InputError(f"these channels of '{path}' must stay: {'; '.join(reasons) or 'see excluded'}")
        return group

    def group_of(
        self, subgroups: Sequence[Subgroup], root: nn.Module | None = None, side: str = "out"
    ) -> ChannelGroup | None:
        """The channel sets as one group, in the order of its root's channels; None if no layer side holds them all."""
        merged: dict[Any, tuple[Any, list[int], list[int]]] = {}
        total = 0
        for subgroup in subgroups:
            for item in as_group(subgroup, self):
                found = merged.setdefault((item.dep.target.module, item.dep.handler), (item.dep, [], []))
                found[1].extend(item.idxs)
                found[2].extend(total + channel_set for channel_set in item.root_idxs)
            total += subgroup.size
        if not any(len(set(channel_sets)) == total for _, _, channel_sets in merged.values()):
            return None

        def rank(item: tuple[Any, list[int], list[int]]) -> tuple[bool, ...]:
            dep, idxs, channel_sets = item
            wrong = len(set(channel_sets)) < total, dep.layer is not root and len(idxs) > total
            return *wrong, dep.layer is not root, _writes(dep) != (side == "out")

        items = sorted(merged.values(), key=rank)
        first = dict(zip(reversed(items[0][2]), reversed(items[0][1]), strict=True))
        group = ChannelGroup(self, subgroups)
        group.order = sorted(first, key=first.__getitem__)
        place = {channel_set: i for i, channel_set in enumerate(group.order)}
        for dep, idxs, channel_sets in items:
            pairs = sorted(zip((place[f] for f in channel_sets), idxs, strict=True))
            group.add_dep(dep, [i for _, i in pairs])
            group[-1].root_idxs = [i for i, _ in pairs]
        return group

    def check_pruning_group(self, group: ChannelGroup) -> bool:
        """True if something of every group stays, and all its parts lose the same share."""
        pruned = {
            slot for subgroup in (*group.era.pruned, *group.subgroups) for slot in _channel_sets(subgroup)
        }
        for pruning_group in group.era.coupling.groups:
            lost = {
                sum(s in pruned for s in _channel_sets(subgroup)) * pruning_group.steps / subgroup.size
                for subgroup in pruning_group.subgroups
            }
            if len(lost) > 1 or lost == {pruning_group.steps}:
                return False
        return True

    def get_out_channels(self, module_or_node: Any) -> int | None:
        """Width of a layer's output; None for what is no layer."""
        return _width(module_or_node, "out")

    def get_in_channels(self, module_or_node: Any) -> int | None:
        """Width of a layer's input; None for what is no layer."""
        return _width(module_or_node, "in")

    def record(self, name: str, plan: Plan) -> None:
        """Note a cut in the history."""
        self._pruning_history.append([name, True, plan.to_json()])

    def load_pruning_history(self, pruning_history: Iterable[Sequence[Any]]) -> None:
        """Redo a history: a graph's own (exact plans, nothing is traced), or one that Torch-Pruning wrote.

        Raises:
            PlanError: The history does not fit the model.
        """
        for name, is_out, what in pruning_history:
            if isinstance(what, str):
                Plan.from_json(what).apply_(self.model)
                self._stale = True
            else:
                module = self.model.get_submodule(name)
                pruner = self.get_pruner_of_module(module)
                fn = pruner.prune_out_channels if is_out else pruner.prune_in_channels
                self.get_pruning_group(module, fn, what).prune(record_history=False)
            self._pruning_history.append([name, is_out, what])


def _writes(dep: Any) -> bool:
    return dep.handler not in _IN


def rows_of(subgroup: Subgroup, rows: Ints) -> Subgroup:
    """Some channel sets of a subgroup."""
    return Subgroup(tuple(Member(m.path, m.side, m.index[rows]) for m in subgroup.members))


def _channel_sets(subgroup: Subgroup) -> list[tuple[str, int]]:
    """Names for the channel sets of a subgroup: the first producer and its channel."""
    return [(subgroup.root.path, channel) for channel in subgroup.root.index[:, 0].tolist()]


def producers(pruning_group: PruningGroup) -> list[str]:
    """The layers whose outputs the group shrinks."""
    return list(dict.fromkeys(m.path for m in pruning_group.members if m.side == "out"))


def _width(module_or_node: Any, side: Literal["in", "out"]) -> int | None:
    module = getattr(module_or_node, "module", module_or_node)
    return width(module, side) if kind_of(module) is not None else None
