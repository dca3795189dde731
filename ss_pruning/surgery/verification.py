"""Cut == masked: the definition of correct surgery, checked on a copy before the user's model is touched.

The *masked* model is the dense one with the removed channels' contributions zeroed: in every consumer the weights that
read them. Layers that compute statistics or slide across channels (layer and group norms, efficient channel attention,
convolutions that standardise their weights) are masked in the only sense that a smaller layer can have: they run on
the kept channels alone.

Compared is all that the model returns (`ss_pruning._utils.outputs`): numbers to within rounding, whole numbers exactly.
Where the model decides on numbers (top-k, suppression), the cut model is held to the decisions of the masked one as
long as it decides on the same (`ss_pruning.surgery.equivalence.decisions`).

The copy is stirred first: tensors that are constant (fresh norms, zero gammas, layer scales of 1e-6) get noise, since
a branch that contributes nothing would hide a wrong cut. It takes little more memory than the cut model
(`ss_pruning.surgery.equivalence.precision`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.copying import retyped
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.outputs import values_in
from ss_pruning._utils.running import output_of
from ss_pruning.errors import ModelError, VerificationError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import PruningGroup, Selection
from ss_pruning.graph.tracing import trace
from ss_pruning.surgery.channel_order import reordered
from ss_pruning.surgery.cut_pass import (
    let_follow,
    run_cut,
    to_meta,
    watching,
)
from ss_pruning.surgery.equivalence.agreement import (
    certified,
    check_comparable,
    compare,
    decisions_that_tell,
    that_tell,
)
from ss_pruning.surgery.equivalence.decisions import Decision, Holding, Recording
from ss_pruning.surgery.equivalence.masked_model import masked
from ss_pruning.surgery.equivalence.precision import DOUBLE, OWN, PRECISIONS, TOLERANCE, stirred
from ss_pruning.surgery.factors import multiply_
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import (
    FewestNumbers,
    Number,
    Parts,
    SizeAttributes,
    Verified,
    head_numbers,
    never_named,
    part_sizes,
)
from ss_pruning.surgery.training_pass import TrainingPass


class Verifier:
    """Where plans for one model are tried: a stirred copy, one without data, and the shapes at every module."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        connectivity: Connectivity,
        watch: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        copied: Callable[[nn.Module], nn.Module] = stirred,
    ) -> None:
        """Copy `model`, by `copied`.

        `watch` is entered for each verification, to time it.
        """
        self.connectivity, self.watch = connectivity, watch
        self.examples = example_inputs
        self.dense = copied(model)  # in the precision of the model, and never run as it is
        self.precisions = iter(PRECISIONS)
        self._next_precision()
        self.arrivals: dict[str, list[tuple[int, ...]]] = {}
        #: Names of what the model returns that depends on its layers, all if None.
        self.telling: frozenset[str] | None = None
        self.failures = 0
        #: What the masked model returns and decides, while one selection is tried with several sets of numbers.
        self.masked_run: tuple[Any, list[Decision]] | None = None
        self.numbers = FewestNumbers(never_named(model))

    @cached_property
    def ghost(self) -> nn.Module | None:
        """The copy without data, if the model runs so."""
        try:
            twin = retyped(self.dense, lambda t: t.to("meta"))
            output_of(self.precise(twin), to_meta(self.inputs))
        except Exception:  # looks at values, or keeps tensors where `to` does not find them
            return None
        return twin

    @property
    def precision(self) -> str:
        """In which models are compared, in words."""
        return DOUBLE if self.tolerance == TOLERANCE else OWN

    def close(self) -> None:
        """Let go of the copies, which share tensors with the model: else all it loses in a cut would stay in memory."""
        del self.dense, self.twin
        for name in ("ghost", "in_training"):
            vars(self).pop(name, None)

    def run(self) -> None:
        """Run the dense copy: from here on the shapes at every module and the tolerance are known."""
        self._masked({})

    def verify(
        self,
        plan: Plan,
        selection: Selection,
        groups: Sequence[PruningGroup] = (),
        *,
        fixed: Collection[Number] = (),
        locate: bool = True,
    ) -> Verified:
        """Apply `plan` to a copy and compare with the masked copy.

        `selection` is what the plan keeps, by layer side, positional layers included; the sizes of the subgroups of its
        `groups` are numbers that modules may store. `fixed` ones must not follow the cut. With `locate` the error says
        from which layer on outputs differ.

        Raises:
            VerificationError: The cut model does not run, or differs from the masked one.
        """
        shuffled = any(group.shuffled for group in groups)
        parts = part_sizes(groups, selection, self.connectivity)
        attempt = partial(self._verify, plan, selection, parts, locate=locate, reorder=shuffled)
        self.masked_run = None
        try:
            with self.watch():
                verified = self.numbers.verified(attempt, frozenset(fixed), last=not locate)
        except VerificationError:
            self.failures += 1
            raise
        finally:
            self.masked_run = None
        followed = {attribute.place for attribute in verified.plan.attributes}
        more = [a for a in head_numbers(self.dense, plan) if a.place not in followed]
        plan = verified.plan
        return replace(verified, plan=replace(plan, attributes=(*plan.attributes, *more)))

    def _verify(
        self,
        plan: Plan,
        selection: Selection,
        parts: Parts,
        fixed: Collection[Number],
        *,
        locate: bool,
        reorder: bool,
    ) -> Verified:
        """With `reorder`, if outputs differ, see in which order channels arrive in the cut model, and try again so."""
        # In a search, most plans that are wrong do not even run; that shows on shapes alone.
        if self.failures:
            self._run_on_shapes(plan, parts, fixed)
        if self.masked_run is None:
            self.masked_run = self._masked(selection)
        expected, decisions = self.masked_run
        small = _cut(self.dense, replace(plan, factors=()))
        twin = self.precise(small)
        multiply_(modules_of(twin), plan.factors, plan.cuts)  # in the precision that is compared in
        sizes_that_follow = SizeAttributes(plan, self.arrivals, parts, fixed)
        found, holding = run_cut(twin, self.inputs, sizes_that_follow, self.holding(decisions))
        try:
            match = compare(expected, found, self.tolerance, self.telling)
            by_decisions = certified(match, holding)
            worst = holding.error if by_decisions else match.error
            if self.in_training is not None:
                self.in_training.check(plan, selection, self.connectivity, sizes_that_follow, self.tolerance)
            verified = _verified(plan, sizes_that_follow, worst, by_decisions)
            return replace(verified, precision=self.precision)
        except VerificationError as error:
            if not reorder:
                at = self._first_difference(selection, twin) if locate else ""
                raise VerificationError(str(error), sizes_that_follow.found, at) from error
        let_follow(small, sizes_that_follow)
        moved = reordered(plan, selection, self.connectivity, trace(small, self.examples))
        return self._verify(replace(plan, cuts=moved), selection, parts, fixed, locate=locate, reorder=False)

    def verify_shapes(
        self,
        plan: Plan,
        selection: Selection,
        groups: Sequence[PruningGroup],
        fixed: Collection[Number] = (),
    ) -> Verified:
        """See that a cut model runs, without data; see `verify`. Where the model does not, nothing is seen."""
        if not self.arrivals:
            self.run()
        fixed = frozenset(fixed) | self.numbers.idle
        return _verified(
            plan, self._run_on_shapes(plan, part_sizes(groups, selection, self.connectivity), fixed)
        )

    def _run_on_shapes(self, plan: Plan, parts: Parts, fixed: Collection[Number]) -> SizeAttributes:
        """Run a cut model without data, and return what followed."""
        sizes_that_follow = SizeAttributes(plan, self.arrivals, parts, fixed)
        if self.ghost is not None:
            run_cut(self.precise(_cut(self.ghost, plan)), to_meta(self.inputs), sizes_that_follow)
        return sizes_that_follow

    @cached_property
    def in_training(self) -> TrainingPass | None:
        """How the model runs in training; None if that need not be seen to."""
        return TrainingPass.of(self.dense, self.inputs, self.precise)

    def holding(self, decisions: Sequence[Decision]) -> Callable[[], Holding]:
        """Makes what holds a pass of the cut model to the decisions of the masked one."""
        return partial(Holding, decisions, self.tolerance)

    def _masked(self, selection: Selection) -> tuple[Any, list[Decision]]:
        """What the masked model returns, and what it decides on the way."""
        try:
            return self._masked_pass(selection)
        except ModelError:
            raise
        except Exception as error:
            if self.arrivals or not self._finds_precision():
                raise VerificationError(
                    f"the masked model does not run ({type(error).__name__}: {error})"
                ) from error
        return self._masked(selection)

    def _masked_pass(self, selection: Selection) -> tuple[Any, list[Decision]]:
        """One pass; the first also notes the shapes that arrive at every module, which masking does not change."""
        shapes: dict[str, list[tuple[int, ...]]] = {}

        def arrived(path: str, _: nn.Module, found: list[tuple[int, ...]]) -> None:
            shapes.setdefault(path, []).extend(found)

        first = not self.arrivals
        with watching(self.twin, arrived) if first else contextlib.nullcontext():
            output, decisions = self._run_masked(self.twin, selection)
        if first:
            self.telling = self._telling(output)
        if self.telling == frozenset():
            decisions = decisions_that_tell(decisions, self._run_masked(self._nudged(), selection)[1])
        if first:
            check_comparable(output, decisions, self.telling)
            self.arrivals = shapes
        return output, decisions

    def _run_masked(self, twin: nn.Module, selection: Selection) -> tuple[Any, list[Decision]]:
        recording = Recording()
        with masked(twin, selection, self.connectivity):
            return output_of(twin, self.inputs, recording), recording.decisions

    def _telling(self, output: Any) -> frozenset[str] | None:
        """Names of what is returned that is another when all layers are; None if the connectivity tells as much."""
        reaching = [s for s, channels in self.connectivity.reaches_output.items() if len(channels)]
        if len(values_in(output)) == 1 and not self.connectivity.layers.keys().isdisjoint(reaching):
            return None
        return that_tell(output, self._run_masked(self._nudged(), {})[0])

    def _nudged(self) -> nn.Module:
        """A copy whose parameters, and buffers of layers, are a little others: what then stays says nothing of them."""
        generator = torch.Generator().manual_seed(0)

        def nudge(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor * (1 + 1e-2 * torch.rand(tensor.shape, generator=generator).to(tensor))

        twin = retyped(self.dense, nudge, ("_parameters",))
        for path in self.connectivity.layers:
            table = vars(twin.get_submodule(path))["_buffers"]
            table.update({name: nudge(tensor) for name, tensor in table.items() if tensor is not None})
        return self.precise(twin)

    def _finds_precision(self) -> bool:
        """Go on to the first precision in which the dense model runs; False if it runs in the present one."""
        with contextlib.suppress(Exception):
            output_of(self.twin, self.inputs)
            return False
        while self._next_precision():
            with contextlib.suppress(Exception):
                output_of(self.twin, self.inputs)
                return True
        return False

    def _next_precision(self) -> bool:
        """False if there is none left."""
        precision = next(self.precisions, None)
        if precision is None:
            return False
        self.precise, change, self.tolerance = precision
        self.inputs = pytree.tree_map_only(Tensor, change, self.examples)
        self.twin = self.precise(self.dense)
        return True

    def _first_difference(self, selection: Selection, small: nn.Module) -> str:
        """The first layer at which other values arrive in the cut model than in the masked one (on kept channels)."""
        with masked(self.twin, selection, self.connectivity):
            expected = self._sums(self.twin, selection)
        found = self._sums(small, {})
        for path, sums in expected.items():
            if not np.allclose(sums, found.get(path, []), rtol=100 * self.tolerance, atol=0):
                return path
        return ""

    def _sums(self, model: nn.Module, kept: Selection) -> dict[str, list[float]]:
        """By layer, the sum of magnitudes of what arrives in each call."""
        sums: dict[str, list[float]] = {path: [] for path in self.connectivity.layers}

        def arrived(path: str, _: nn.Module, x: Tensor) -> None:
            layer = self.connectivity.layers[path]
            channels = kept.get((path, "in"), kept.get((path, "through")))
            if channels is not None:
                x = x.index_select(layer.in_axis, torch.tensor(channels, device=x.device))
            sums[path].append(float(x.double().abs().sum()))

        modules = modules_of(model)
        with hooked({path: modules[path] for path in sums}, arrived):
            output_of(model, self.inputs)
        return sums


def _verified(
    plan: Plan, sizes_that_follow: SizeAttributes, error: float = 0.0, by_decisions: bool = False
) -> Verified:
    found = sizes_that_follow.found
    plan = Plan(plan.cuts, tuple(found.values()), factors=plan.factors)
    return Verified(plan, error, frozenset(found), by_decisions)


def _cut(model: nn.Module, plan: Plan) -> nn.Module:
    try:
        return plan.cut_copy(model)
    except (ValueError, RuntimeError, IndexError) as error:
        raise VerificationError(f"the plan cannot be applied ({type(error).__name__}: {error})") from error
