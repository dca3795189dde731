"""Dead channels, and where the constants that they hold can go.

A channel may go if every consumer either does not read it or receives a constant. A constant of 0 needs nothing. Any
other is folded into the consumer's bias, which is exact where the consumer sees no zero-padded border (1x1 kernels, no
padding, linear layers). Where it sees one, one dead channel stays as the *carrier* of all others: their kernels are
added to its kernel in proportion of the constants, which is exact at the border too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ss_pruning.compensation.folding import Outcome, add_bias, norms_behind
from ss_pruning.graph.groups import Member, Subgroup
from ss_pruning.graph.layers import channel_axis, mixes_channels, weight_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.sparsity.dead_channels import (
    has_no_border,
    is_consumer,
    measure_liveness,
    reading,
    response,
    wanted_inputs,
)
from ss_pruning.surgery.plan import Plan

CARRIER_REASON = "dead, but stays to carry the constant of others into a zero-padded layer"
PATTERN_REASON = (
    "does not depend on the image, but is not one constant (an earlier zero-padded border, or several calls)"
)
MIXED_REASON = (
    "dead, but a layer that looks at several channels together (a norm, a standardised weight) reads it"
)


@dataclass
class Dead:
    """The dead channel sets of one subgroup.

    Attributes:
        goes: `[channel sets]`: True for what may be cut.
        stays: By reason, how many channel sets are dead and stay.
    """

    goes: Tensor
    stays: dict[str, int] = field(default_factory=dict)


class Folding:
    """Decides which channel sets are dead, and moves constants before they are cut."""

    def __init__(self, traced: TracedModel, shapes: Mapping[str, list[tuple[int, ...]]]) -> None:
        """Look at the layers of a masked model, and at the `shapes` that arrive there; the model is only read."""
        self.modules, self.connectivity = traced.modules, traced.connectivity
        self.liveness, self.norms = measure_liveness(traced), norms_behind(traced.connectivity)
        layers = self.connectivity.layers
        self.mixing = {
            path
            for path, layer in layers.items()
            if layer.kind == "positional" or mixes_channels(self.modules[path])
        } | self.liveness.opaque
        self.wanted = wanted_inputs(traced, self.liveness.kernels, self.mixing)
        self.shapes = {
            path: [
                s for s in shapes.get(path, []) if len(s) > layer.in_axis and s[layer.in_axis] == layer.inputs
            ]
            for path, layer in layers.items()
        }
        self._borderless: dict[str, bool] = {}
        self.carriers: dict[str, dict[int, int]] = {}

    def dead(self, subgroup: Subgroup) -> Dead:
        """The channel sets of a subgroup that may go, and those that are dead and have to stay."""
        consumers = [m for m in subgroup.members if is_consumer(m.path, m.side, self.connectivity)]
        slots = [self._slots(m) for m in consumers]
        still = _all([~s.wanted | s.still for s in slots], subgroup.size)
        constant = _all([~s.wanted | s.constant for s in slots], subgroup.size)
        if any(member.path in self.mixing for member in subgroup.members):
            count = int(constant.sum())
            return Dead(torch.zeros_like(constant), {MIXED_REASON: count} if count else {})
        easy = _all([~s.wanted | (s.constant & ~s.carried) for s in slots], subgroup.size)
        stays = {PATTERN_REASON: int((still & ~constant).sum())}
        goes, bound = easy, constant & ~easy
        carrier = self._carrier(slots, bound)
        if carrier is None:
            stays[CARRIER_REASON] = int(bound.sum())
        else:
            stays[CARRIER_REASON] = 1
            goes = constant.clone()
            goes[carrier] = False
            self._carry(consumers, bound.nonzero().flatten().tolist(), carrier)
        return Dead(goes, {reason: n for reason, n in stays.items() if n})

    def move_(self, twin: nn.Module, plan: Plan) -> Outcome:
        """Take the constants of the channels that `plan` removes out of their consumers' inputs, in a dense copy.

        Afterwards no kernel of `twin` reads a removed channel, and its output is what it was.
        """
        outcome = Outcome()
        for cut in plan.cuts:
            if cut.side != "in" or not is_consumer(cut.path, cut.side, self.connectivity) or not cut.removed:
                continue
            module, removed = twin.get_submodule(cut.path), torch.tensor(cut.removed)
            values = torch.zeros(cut.width, dtype=torch.float64)
            counts = self.wanted[cut.path][removed] & self.liveness.constant[cut.path][removed]
            values[removed[counts]] = self.liveness.value[cut.path].double()[removed[counts]]
            self._carry_over(module, cut.path, values)
            if bool(values.any()):
                self._to_bias(twin, cut.path, values, outcome)
            for channel in cut.removed:
                reading(module, channel).zero_()
        return outcome

    def _carry_over(self, module: nn.Module, path: str, values: Tensor) -> None:
        """Add kernels to those of their carriers; their constants are then dealt with."""
        for channel, carrier in self.carriers.get(path, {}).items():
            if values[channel]:
                ratio = float(values[channel] / self.liveness.value[path][carrier])
                reading(module, carrier).add_(ratio * reading(module, channel))
                values[channel] = 0

    def _to_bias(self, twin: nn.Module, path: str, values: Tensor, outcome: Outcome) -> None:
        module, axis = twin.get_submodule(path), self.connectivity.layers[path].in_axis
        weight = weight_of(module)
        y = response(module, self.shapes[path][0], axis, values.to(weight))
        bias = y.movedim(channel_axis(module, y), 0).flatten(1)[:, 0]
        add_bias(twin, path, bias, self.norms, outcome)
        outcome.layers.append(path)

    def _slots(self, member: Member) -> _Slots:
        path, index = member.path, torch.from_numpy(member.index)
        live = self.liveness
        value = live.value[path][index]
        return _Slots(
            self.wanted[path][index],
            live.still[path][index],
            live.constant[path][index],
            value,
            value.ne(0) & (not self._sees_no_border(path)),
        )

    def _sees_no_border(self, path: str) -> bool:
        if path not in self._borderless:
            shapes, axis = self.shapes[path], self.connectivity.layers[path].in_axis
            self._borderless[path] = bool(shapes) and has_no_border(self.modules[path], shapes, axis)
        return self._borderless[path]

    @staticmethod
    def _carrier(slots: list[_Slots], bound: Tensor) -> int | None:
        """The channel set with the largest constants wherever one of the `bound` channel sets needs a carrier."""
        strength = torch.where(bound, torch.inf, 0.0).double()
        for s in slots:
            needed = (s.wanted & s.carried & bound[:, None]).any(0)
            held = torch.where(s.constant, s.value.abs(), torch.zeros_like(s.value))[:, needed]
            if held.shape[1]:
                strength = torch.minimum(strength, held.amin(1).double())
        best = int(strength.argmax())
        return best if 0 < strength[best] < torch.inf else None

    def _carry(self, consumers: Iterable[Member], channel_sets: list[int], carrier: int) -> None:
        for member in consumers:
            if not self._sees_no_border(member.path):
                to = self.carriers.setdefault(member.path, {})
                for channel_set in channel_sets:
                    if channel_set != carrier:
                        to.update(
                            zip(
                                member.index[channel_set].tolist(),
                                member.index[carrier].tolist(),
                                strict=True,
                            )
                        )


@dataclass(frozen=True)
class _Slots:
    """By channel set and slot of one consumer: is it read, what arrives, and would that need a carrier."""

    wanted: Tensor
    still: Tensor
    constant: Tensor
    value: Tensor
    carried: Tensor


def _all(slots: list[Tensor], channel_sets: int) -> Tensor:
    """`[channel sets]`: True where all slots of all consumers agree."""
    agree = torch.ones(channel_sets, dtype=torch.bool)
    for s in slots:
        agree &= s.all(1)
    return agree
