"""Score subgroups with any importance: one that knows them directly, one of Torch-Pruning's on groups made for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.arrays import Floats
from ss_pruning._utils.modules import modules_of
from ss_pruning.config import Synaptic
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Member, PruningGroup, Subgroup
from ss_pruning.graph.layers import is_depthwise

Maker = TypeVar("Maker", bound=Callable[[], Any])

_IMPORTANCES: dict[str, Callable[[], Any]] = {
    "synaptic": Synaptic,
    "magnitude": partial(tp.importance.GroupMagnitudeImportance, p=2),
    "magnitude-l1": partial(tp.importance.GroupMagnitudeImportance, p=1),
    "bn-scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "random": tp.importance.RandomImportance,
}


def register_importance(name: str) -> Callable[[Maker], Maker]:
    """Make an importance of your own known to `prune_(importance=name)` and `ss-prune --importance name`.

    Args:
        name: Its name.

    Returns:
        A decorator for a class, or a function, that makes the importance when called without arguments.
    """

    def register(maker: Maker) -> Maker:
        _IMPORTANCES[name] = maker
        return maker

    return register


def importance_of(choice: Any) -> Any:
    """The importance that was chosen: itself, or by its name.

    Raises:
        InputError: None is registered under this name.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in _IMPORTANCES:
        raise InputError(f"importance={choice!r} is unknown; use {', '.join(map(repr, _IMPORTANCES))}")
    return _IMPORTANCES[choice]()


@dataclass(frozen=True)
class _Node:
    """A layer as Torch-Pruning's dependencies present it."""

    module: Any
    name: str
    pruning_dim: int = 1

    @property
    def type(self) -> Any:
        return tp.ops.module2type(self.module)


@dataclass
class SubgroupGraph:
    """Stands for Torch-Pruning's `DependencyGraph` in groups made from subgroups."""

    model: nn.Module
    example_inputs: Any
    connectivity: Connectivity

    def __post_init__(self) -> None:
        self.modules = modules_of(self.model)

    def is_in_channel_pruning_fn(self, handler: Any) -> bool:
        """As in Torch-Pruning: norms and depthwise layers count on both sides."""
        return handler not in (tp.prune_conv_out_channels, tp.prune_linear_out_channels)

    def is_out_channel_pruning_fn(self, handler: Any) -> bool:
        """As in Torch-Pruning: norms and depthwise layers count on both sides."""
        return handler not in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


def as_group(subgroup: Subgroup, graph: SubgroupGraph) -> Any:
    """A subgroup as a Torch-Pruning group, for any importance; `root_idxs` number its channel sets from 0."""
    group = tp.dependency.Group()
    group._DG = graph
    modules = graph.modules
    members = sorted(subgroup.members, key=lambda m: not (m.side == "out" and m.index.shape[1] == 1))
    for member in members:
        handler = _handler(modules.get(member.path), member)
        if handler is None:
            continue
        node = _Node(modules[member.path], member.path)
        group.add_dep(
            tp.dependency.Dependency(handler, handler, node, node), member.index.reshape(-1).tolist()
        )
        width = member.index.shape[1]
        group[-1].root_idxs = np.repeat(np.arange(subgroup.size), width).tolist()
    return group


def _handler(module: nn.Module | None, member: Member) -> Any:
    """The Torch-Pruning function that importances know this layer side by; None where they know none."""
    if module is None:
        return None
    if isinstance(module, _ConvNd):
        if member.side == "through":  # slides along the channels: holds no weight of any one of them
            return None
        if is_depthwise(module):
            return tp.prune_depthwise_conv_out_channels if member.side == "out" else None
        # Importances index one group as if it were all.
        if module.transposed and module.groups > 1 and member.side == "out":
            return None
        return tp.prune_conv_in_channels if member.side == "in" else tp.prune_conv_out_channels
    if isinstance(module, nn.Linear):
        return tp.prune_linear_in_channels if member.side == "in" else tp.prune_linear_out_channels
    if isinstance(module, _BatchNorm):
        return tp.prune_batchnorm_out_channels
    if isinstance(module, nn.LayerNorm):
        return tp.prune_layernorm_out_channels
    if isinstance(module, nn.GroupNorm):
        return tp.prune_groupnorm_out_channels
    return None


def group_scores(importance: Any, groups: Sequence[PruningGroup], graph: Any) -> list[list[Floats]]:
    """By group and subgroup, one score a channel set, see `subgroup_scores`."""
    scored = iter(subgroup_scores(importance, [s for group in groups for s in group.subgroups], graph))
    return [[next(scored).numpy() for _ in group.subgroups] for group in groups]


def subgroup_scores(importance: Any, subgroups: Sequence[Subgroup], graph: SubgroupGraph) -> list[Tensor]:
    """Score every subgroup; one value a channel set, in float64 on the CPU.

    Subgroups that differ only in their blocks (the groups of a grouped convolution, the parts of a split) are scored as
    one, so that an importance that normalises sees the whole layer.

    The importance has a method `scorer`, as `SynapticImportance` has it, or is one of Torch-Pruning: a callable that
    takes a Torch-Pruning group. Of a class that has both the one of the most derived class counts.

    Raises:
        InputError: The importance returns scores of the wrong length, NaN, or minus infinity. Infinity keeps a channel.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, subgroup in enumerate(subgroups):
        own = i if subgroup.unread else -1  # products of queries and keys are of one head
        alike[own, tuple((m.path, m.side, m.index.shape[1]) for m in subgroup.members)].append(i)
    wholes = [(numbers, _joined([subgroups[i] for i in numbers])) for numbers in alike.values()]
    score = _scorer(importance, graph)
    scores: dict[int, Tensor] = {}
    for numbers, whole in wholes:
        values = _checked(score(whole), whole, importance)
        scores.update(zip(numbers, values.split([subgroups[i].size for i in numbers]), strict=True))
    return [scores[i] for i in range(len(subgroups))]


def _scorer(importance: Any, graph: SubgroupGraph) -> Callable[[Subgroup], Any]:
    if _knows_subgroups(importance):
        scorer: Callable[[Subgroup], Any] = importance.scorer(
            graph.model, graph.connectivity, graph.example_inputs
        )
        return scorer
    return lambda subgroup: _as_torch_pruning_does(importance, as_group(subgroup, graph))


def _knows_subgroups(importance: Any) -> bool:
    """Whether `scorer` is what its class means by its scores: a subclass may have a `__call__` of its own."""
    for cls in type(importance).__mro__:
        if "scorer" in vars(cls):
            return True
        if "__call__" in vars(cls):
            return False
    return hasattr(importance, "scorer")


def _joined(subgroups: Sequence[Subgroup]) -> Subgroup:
    """Subgroups of the same layers as one."""
    if len(subgroups) == 1:
        return subgroups[0]
    columns = zip(*(subgroup.members for subgroup in subgroups), strict=True)
    return Subgroup(
        tuple(Member(c[0].path, c[0].side, np.concatenate([m.index for m in c])) for c in columns)
    )


def _as_torch_pruning_does(importance: Any, group: Any) -> Any:
    """What the importance says of a group; some of Torch-Pruning's own fail on what a grouped convolution reads."""
    if not len(group):  # of layers alone that Torch-Pruning does not know
        return None
    try:
        return importance(group)
    except (IndexError, RuntimeError):
        grouped = tp.prune_conv_in_channels
        items = [i for i in group if i.dep.handler != grouped or i.dep.layer.groups == 1]
        if not 0 < len(items) < len(group):
            raise
        group._group = items
        return importance(group)


def _checked(values: Any, subgroup: Subgroup, importance: Any) -> Tensor:
    if values is None:  # the sign for "knows nothing here"
        values = torch.full((subgroup.size,), float("inf"))
    scores = torch.as_tensor(values).detach().double().cpu().flatten()
    if subgroup.size == 1:  # nothing to compare it with: normalising within the group may give 0 / 0
        scores = scores.nan_to_num(nan=float("inf"))
    wrong = int((scores.isnan() | scores.isneginf()).sum())
    if len(scores) < subgroup.size or wrong:
        raise InputError(
            f"{type(importance).__name__} gave {len(scores)} scores ({wrong} of them NaN or -inf) for the "
            f"{subgroup.size} channels of '{subgroup.root.path}'; give each a number, or inf to keep it"
        )
    return scores[: subgroup.size]
