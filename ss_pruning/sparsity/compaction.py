"""From a masked model to a small one: channels that are dead are cut, and the output stays what it is.

A mask leaves zeros: the model is as large as before. The masked model is the truth: the compacted one puts out the
same, in eval mode, in float64. Constants move onto what stays (`ss_pruning.sparsity.constant_folding`).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ss_pruning._utils.arrays import Ints, normal_like
from ss_pruning._utils.copying import copied, retyped
from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import output_of, quiet_hooks
from ss_pruning.compensation.folding import Outcome
from ss_pruning.errors import ModelError
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.graph.groups import Coupling, PruningGroup
from ss_pruning.graph.layers import width
from ss_pruning.graph.refusals import check_bare, check_finite
from ss_pruning.graph.traced import TracedModel
from ss_pruning.planning.allocation import Schedule, schedule
from ss_pruning.planning.search import find_verified_plan
from ss_pruning.report.records import LayerReport
from ss_pruning.sparsity.constant_folding import Dead, Folding
from ss_pruning.sparsity.dead_channels import living_kernels
from ss_pruning.sparsity.masks import check_unmasked
from ss_pruning.sparsity.size import Compaction, size_of
from ss_pruning.surgery.equivalence.agreement import certified, check_comparable, compare
from ss_pruning.surgery.equivalence.decisions import Recording
from ss_pruning.surgery.equivalence.precision import TOLERANCE, stirred
from ss_pruning.surgery.plan import Plan, adopt_
from ss_pruning.surgery.size_attributes import Verified
from ss_pruning.surgery.verification import Verifier

LAST_REASON = "dead, but one channel stays so that no layer is empty"
SHARE_REASON = (
    "dead, but the parts of its layer must lose equal shares, and another part has fewer dead channels"
)


def compact_(model: nn.Module, example_inputs: Any) -> Compaction:
    """Cut the dead channels of a masked model in place; its output in eval mode does not change.

    Dead is a channel that no living kernel reads on the way to the output, or that holds a constant because no living
    kernel writes it. Constants are measured and moved exactly, borders of padded convolutions included; dead channels
    that have to stay are named in the report. In train mode the two models differ where a batch norm reads a constant:
    there, statistics of a batch replace those that the constant was computed with.

    On any error the model is as it was. Build optimisers afterwards: the parameters are new.

    Args:
        model: A model whose masks are baked in: dead kernels, rows or columns are zeros. Changed in place.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ModelError: The model does not run on the inputs, or holds NaN or Inf weights.
        InputError: The model holds masks that are not merged, or is wrapped by another framework.
        VerificationError: The compacted model would differ from the masked one.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[:5].zero_()  # five neurons no longer see the input: constants
        >>> compact_(net, torch.randn(4, 3)).after.params, net[0]
        (20, Linear(in_features=3, out_features=3, bias=True))
    """
    check_bare(model)
    with torch.inference_mode(False), quiet_hooks(model, example_inputs):
        compaction, ready = _compacted(model, example_inputs)
    if ready is not model:
        adopt_(model, ready)
    return compaction


def _compacted(model: nn.Module, example_inputs: Any) -> tuple[Compaction, nn.Module]:
    """What was done to a copy, and the copy; the model itself where nothing was."""
    begin = time.perf_counter()
    check_finite(model)
    check_unmasked(model)
    traced = TracedModel.of(model, example_inputs)
    before = size_of(traced)
    first = this = _Round(traced)
    plan, stays = this.plan, this.stays
    while this.plan.cuts:  # what was cut may have been all that kept something else alive
        this = _Round(TracedModel.of(this.small, first.verifier.inputs))
        plan, stays = plan.then(this.plan), _later(stays, this.stays)
    error = first.verifier.difference(this.small)
    layers = _layer_reports(traced, this.small)
    ready = plan.cut_copy(model, this.small) if plan.cuts else model
    compaction = Compaction(
        model=type(model).__name__,
        before=before,
        after=size_of(replace(traced, model=ready)),
        layers=layers,
        excluded=stays,
        max_error=error,
        precision=first.verifier.precision,
        seconds=time.perf_counter() - begin,
    )
    return compaction, ready


class _Round:
    """One search for dead channels: a plan, and a copy that it was applied to."""

    def __init__(self, traced: TracedModel) -> None:
        self.verifier = _MaskedVerifier(traced)
        dead = DeadChannels(self.verifier.folding)
        found = find_verified_plan(self.verifier, traced.coupling, dead.allocate)
        self.stays = [*dead.stays(traced.coupling, found.coupling), *found.failed, *_dead_but_fixed(traced)]
        self.small, outcome = self.verifier.compacted(found.verified.plan)
        self.plan = replace(found.verified.plan, biases=tuple(outcome.biases))


class _MaskedVerifier(Verifier):
    """Where plans are tried twice: for their structure as ever, and for the values of the masked model itself."""

    def __init__(self, traced: TracedModel) -> None:
        super().__init__(traced.model, traced.example_inputs, traced.connectivity, copied=_revived)
        self.run()
        self.masked = copied(traced.model)
        if self.tolerance == TOLERANCE:
            self.masked.double()
        self.noise = normal_like(self.inputs, torch.Generator().manual_seed(0))
        self.folding = Folding(replace(traced, model=self.masked, example_inputs=self.inputs), self.arrivals)
        recording = Recording()
        self.expected = output_of(self.masked, self.noise, recording)
        self.decisions = recording.decisions
        finite = (t.isfinite().all() for t in tensors_in(self.expected).values())
        if not all(bool(ok) for ok in finite):
            raise ModelError(
                "the masked model puts out NaN or Inf, so a smaller one cannot be compared with it"
            )
        check_comparable(self.expected, self.decisions)

    def verify(self, *args: Any, **kwargs: Any) -> Verified:
        """As ever; then the compacted model's output must be the masked one's."""
        plan = super().verify(*args, **kwargs).plan
        return Verified(plan, self.difference(self.compacted(plan)[0]))

    def difference(self, small: nn.Module) -> float:
        """Largest difference to the masked model's output, relative to the largest output."""
        holding = self.holding(self.decisions)()
        match = compare(self.expected, output_of(small, self.noise, holding), self.tolerance)
        certified(match, holding)
        return match.error

    def compacted(self, plan: Plan) -> tuple[nn.Module, Outcome]:
        """A copy with the constants moved and the plan applied, and which layers got a bias."""
        small = copied(self.masked)
        outcome = self.folding.move_(small, plan)
        return plan.apply_(small), outcome


@dataclass
class DeadChannels:
    """Takes as many dead channel sets of every group as its subgroups can lose in equal shares."""

    folding: Folding
    _found: dict[int, list[Dead]] = field(default_factory=dict, init=False)

    def of(self, group: PruningGroup) -> list[Dead]:
        """By subgroup."""
        if id(group) not in self._found:
            self._found[id(group)] = [self.folding.dead(subgroup) for subgroup in group.subgroups]
        return self._found[id(group)]

    def allocate(self, coupling: Coupling) -> tuple[Schedule, Ints]:
        """All that can go: scores are 0 for a channel set that may, 1 for one that stays."""
        scores = [
            [1.0 - dead.goes.numpy().astype(np.float64) for dead in self.of(group)]
            for group in coupling.groups
        ]
        steps = [_steps(group, self.of(group)) for group in coupling.groups]
        return schedule(coupling.groups, scores, max_ratio=1.0), np.array(steps, dtype=np.int64)

    def stays(self, coupling: Coupling, cut: Coupling) -> list[Excluded]:
        """The dead channel sets that stay, and why; in `cut` are the groups that took what they could."""
        stays: dict[str, Counter[str]] = defaultdict(Counter)
        taken = set(map(id, cut.groups))
        for group in coupling.groups:
            found = self.of(group)
            for subgroup, dead in zip(group.subgroups, found, strict=True):
                for reason, channel_sets in dead.stays.items():
                    stays[reason][subgroup.root.path] += channel_sets
            if id(group) in taken:
                size = group.size
                going = sum(int(dead.goes.sum()) for dead in found)
                reason = LAST_REASON if going == size else SHARE_REASON
                stays[reason][group.name] += going - _steps(group, found) * (size // group.steps)
        return _named(stays)


def _revived(model: nn.Module) -> nn.Module:
    """Stirred, with noise in the place of zeros, too: a wrong cut of dead channels would not show in the structure."""
    generator = torch.Generator().manual_seed(0)

    def revive(tensor: Tensor) -> Tensor:
        dead = tensor.eq(0)
        if not tensor.is_floating_point() or not dead.any() or dead.all():
            return tensor
        scale = tensor[~dead].square().mean().sqrt()
        return torch.where(dead, scale * normal_like(tensor, generator), tensor)

    return retyped(stirred(model), revive, ("_parameters",))


def _named(counts: Mapping[str, Mapping[str, int]]) -> list[Excluded]:
    """By reason and layer how many channels stay, as one entry a reason.

    Last channels, of which later rounds may find some again, have one a layer.
    """
    whole = []
    for reason, by_path in counts.items():
        some = {path: channels for path, channels in by_path.items() if channels}
        if reason == LAST_REASON:
            whole += [Excluded((path,), channels, reason) for path, channels in some.items()]
        elif some:
            whole.append(Excluded(tuple(some), sum(some.values()), reason))
    return whole


def _steps(group: PruningGroup, found: Sequence[Dead]) -> int:
    """How many steps the subgroups can take together; one always stays."""
    shares = (
        int(dead.goes.sum()) * group.steps // subgroup.size
        for subgroup, dead in zip(group.subgroups, found, strict=True)
    )
    return min(group.steps - 1, *shares) if group.steps > 1 else 0


def _later(before: list[Excluded], now: list[Excluded]) -> list[Excluded]:
    """What stays after a further round: a last channel, which no later round sees, is carried along."""
    named = {path for left in now for path in left.paths}
    return now + [left for left in before if left.reason == LAST_REASON and not named & set(left.paths)]


def _dead_but_fixed(traced: TracedModel) -> list[Excluded]:
    """Output channels without a living kernel that the channel graph does not allow to go at all."""
    free, coupling = defaultdict[str, list[int]](list), traced.coupling
    for member in (m for group in coupling.groups for m in group.members):
        if member.side == "out":
            free[member.path] += member.index.reshape(-1).tolist()
    stays: dict[str, Counter[str]] = defaultdict(Counter)
    seen = set[str]()
    for whole in coupling.excluded:
        for path in whole.paths:
            dead = ~living_kernels(traced.modules[path]).any(1)
            dead[free[path]] = False
            if path not in seen:
                stays[f"dead, but {whole.reason}"][path] += int(dead.sum())
            seen.add(path)
    return _named(stays)


def _layer_reports(traced: TracedModel, after: nn.Module) -> list[LayerReport]:
    reports = []
    for path in traced.connectivity.weighted:
        layer, old, new = traced.connectivity.layers[path], traced.modules[path], after.get_submodule(path)
        widths = (layer.inputs, width(new, "in"), layer.outputs, width(new, "out"))
        synapses = living_kernels(old).numel()
        reports.append(
            LayerReport(path, type(old).__name__, *widths, synapses, int(living_kernels(new).sum()))
        )
    return reports
