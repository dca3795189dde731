"""Cut == masked: the definition of correct surgery, checked on a copy before the user's model is touched.

The *masked* model is the dense one with the removed channels' contributions zeroed: in every consumer the weights that
read them. Layers that compute statistics or slide across channels (layer and group norms, efficient channel attention,
convolutions that standardise their weights) are masked in the only sense that a smaller layer can have: they run on
the kept channels alone.

The copy is stirred first: tensors that are constant (fresh norms, zero gammas, layer scales of 1e-6) get noise, since
a branch that contributes nothing would hide a wrong cut. What is not constant it shares with the model, and its
parameters become float64 only while a layer reads them: a model is verified in little more memory than the cut one
takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning.cloning import read_as, retyped, shell
from ss_pruning.coupling import Unit
from ss_pruning.errors import VerificationError
from ss_pruning.following import Follower, Number, part_sizes
from ss_pruning.hooks import on_input
from ss_pruning.masking import masked
from ss_pruning.planning import Selection
from ss_pruning.provenance import call, preserved, trace
from ss_pruning.reordering import reordered
from ss_pruning.surgery import Plan, set_number
from ss_pruning.walking import modules_of
from ss_pruning.wiring import Wiring

#: Largest relative difference between cut and masked outputs, in float64 and in the model's own precision.
TOLERANCE, COARSE_TOLERANCE = 1e-10, 1e-3


@dataclass(frozen=True)
class Verified:
    """A plan that was applied to a copy and found right.

    Attributes:
        plan: The plan, with the stored numbers that have to follow.
        max_error: Largest difference between cut and masked outputs, relative to the largest output.
    """

    plan: Plan
    max_error: float

    def followed(self) -> frozenset[Number]:
        """The stored numbers that follow the cut."""
        return frozenset((a.path, a.name, a.position) for a in self.plan.attributes)


class Bench:
    """Where plans for one model are tried: a stirred copy, one without data, and the shapes at every module."""

    def __init__(self, model: nn.Module, example_inputs: Any, wiring: Wiring) -> None:
        """Copy `model`.

        Args:
            model: The dense model; not changed.
            example_inputs: What `forward` takes.
            wiring: The wiring of `model`.

        Raises:
            ModelError: The model cannot be copied.
        """
        self.wiring = wiring
        self.examples = example_inputs
        self.dense = _stirred(model)  # in the precision of the model, and never run as it is
        self.precisions = iter(_PRECISIONS)
        self._next_precision()
        self.arrivals: dict[str, list[tuple[int, ...]]] = {}
        self.failures = 0
        #: Entered for each verification: to time it.
        self.watch: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @cached_property
    def ghost(self) -> nn.Module | None:
        """The copy without data, if the model runs so."""
        try:
            twin = retyped(self.dense, lambda t: t.to("meta"))
            _run(self.precise(twin), _to_meta(self.inputs))
        except Exception:  # looks at values, or keeps tensors where `to` does not find them
            return None
        return twin

    def close(self) -> None:
        """Let go of the copies, which share tensors with the model: else all it loses in a cut would stay in memory."""
        del self.dense, self.twin
        vars(self).pop("ghost", None)

    def run(self) -> Any:
        """What the dense copy returns; from here on the shapes at every module and the tolerance are known.

        Raises:
            VerificationError: It does not run.
        """
        return self._masked({})

    def verify(
        self,
        plan: Plan,
        selection: Selection,
        units: Sequence[Unit] = (),
        *,
        fixed: Collection[Number] = (),
        locate: bool = True,
    ) -> Verified:
        """Apply `plan` to a copy and compare with the masked copy.

        Args:
            plan: What to cut.
            selection: The same as channels by layer side (positional layers included).
            units: The units of the plan; the sizes of their cells are numbers that modules may store.
            fixed: Stored numbers that must not follow the cut.
            locate: If the outputs differ, say in the error from which layer on.

        Raises:
            VerificationError: The cut model does not run, or differs from the masked one.
        """
        try:
            with self.watch():
                return self._verify(plan, selection, units, fixed, locate, reorder=True)
        except VerificationError:
            self.failures += 1
            raise

    def _verify(
        self,
        plan: Plan,
        selection: Selection,
        units: Sequence[Unit],
        fixed: Collection[Number],
        locate: bool,
        reorder: bool,
    ) -> Verified:
        """With `reorder`, if outputs differ, see in which order channels arrive in the cut model, and try again so."""
        parts = part_sizes(units, selection, self.wiring)
        # In a search, most plans that are wrong do not even run; that shows on shapes alone.
        if self.failures and self.ghost is not None:
            ghost = _cut(shell(self.ghost), plan)
            _run_cut(self.precise(ghost), _to_meta(self.inputs), Follower(plan, self.arrivals, parts, fixed))
        expected = self._masked(selection)
        small = _cut(shell(self.dense), plan)
        follower = Follower(plan, self.arrivals, parts, fixed)
        twin = self.precise(small)
        found = _run_cut(twin, self.inputs, follower)
        try:
            error = compare(expected, found, self.tolerance)
            return Verified(Plan(plan.cuts, tuple(follower.found)), error)
        except VerificationError as error:
            if not reorder or not any(unit.shuffled for unit in units):
                at = self._first_difference(selection, twin) if locate else ""
                raise VerificationError(str(error), follower.numbers(), at) from error
        for attribute in follower.found:  # so far only in the twin
            set_number(modules_of(small)[attribute.path], attribute)
        moved = reordered(plan, selection, self.wiring, trace(small, self.examples))
        return self._verify(replace(plan, cuts=moved), selection, units, fixed, locate, reorder=False)

    def _masked(self, selection: Selection) -> Any:
        """What the masked model returns.

        Raises:
            VerificationError: It does not run.
        """
        try:
            return self._masked_pass(selection)
        except Exception as error:
            if self.arrivals or not self._finds_precision():
                raise VerificationError(
                    f"the masked model does not run ({type(error).__name__}: {error})"
                ) from error
        return self._masked(selection)

    def _masked_pass(self, selection: Selection) -> Any:
        """One pass; the first also notes the shapes that arrive at every module, which masking does not change."""
        shapes: dict[str, list[tuple[int, ...]]] = {}

        def arrived(path: str, _: nn.Module, found: list[tuple[int, ...]]) -> None:
            shapes.setdefault(path, []).extend(found)

        with masked(self.twin, selection, self.wiring), contextlib.ExitStack() as stack:
            if not self.arrivals:
                stack.enter_context(_watching(self.twin, arrived))
            output = _run(self.twin, self.inputs)
        self.arrivals = self.arrivals or shapes
        return output

    def _finds_precision(self) -> bool:
        """Go on to the first precision in which the dense model runs; False if it runs in the present one."""
        with contextlib.suppress(Exception):
            _run(self.twin, self.inputs)
            return False
        while self._next_precision():
            with contextlib.suppress(Exception):
                _run(self.twin, self.inputs)
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
        with masked(self.twin, selection, self.wiring):
            expected = self._sums(self.twin, selection)
        found = self._sums(small, {})
        for path, sums in expected.items():
            if not np.allclose(sums, found.get(path, []), rtol=100 * self.tolerance, atol=0):
                return path
        return ""

    def _sums(self, model: nn.Module, kept: Selection) -> dict[str, list[float]]:
        """By layer, the sum of magnitudes of what arrives in each call."""
        sums: dict[str, list[float]] = {path: [] for path in self.wiring.layers}

        def arrived(path: str, _: nn.Module, x: Tensor) -> None:
            layer = self.wiring.layers[path]
            channels = kept.get((path, "in"), kept.get((path, "through")))
            if channels is not None:
                x = x.index_select(layer.in_axis, torch.tensor(channels, device=x.device))
            sums[path].append(float(x.double().abs().sum()))

        modules = modules_of(model)
        handles = [on_input(modules[path], partial(arrived, path)) for path in sums]
        _run(model, self.inputs)
        for handle in handles:
            handle.remove()
        return sums


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


# How a copy is run, how its inputs are changed, and the tolerance. Where code gets at parameters other than by reading
# attributes, all are made float64 at once; where a model does not run in float64, it is taken as it is.
_PRECISIONS: tuple[tuple[Callable[[nn.Module], nn.Module], Callable[[Tensor], Tensor], float], ...] = (
    (lambda model: read_as(model, _double), _double, TOLERANCE),
    (lambda model: retyped(model, _double), _double, TOLERANCE),
    (lambda model: read_as(model, Tensor.clone), Tensor.clone, COARSE_TOLERANCE),
)


def _run(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad(), preserved(model, training=False):
        return call(model, inputs)


def _to_meta(inputs: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)


def _cut(twin: nn.Module, plan: Plan) -> nn.Module:
    try:
        return plan.apply_(twin)
    except (ValueError, RuntimeError, IndexError) as error:
        raise VerificationError(f"the plan cannot be applied ({type(error).__name__}: {error})") from error


def _run_cut(small: nn.Module, inputs: Any, follower: Follower) -> Any:
    """The cut model's output, with all numbers that follow.

    They follow on the way, and what reads one before its module runs meets the old one: it runs until none is new.

    Raises:
        VerificationError: It does not run.
    """
    with _watching(small, follower):
        while True:
            known = len(follower.found)
            try:
                output = _run(small, inputs)
            except Exception as error:
                if len(follower.found) > known:
                    continue
                raise VerificationError(
                    f"the cut model does not run, at '{follower.current}' ({type(error).__name__}: {error})",
                    follower.numbers(),
                    follower.current,
                ) from error
            if len(follower.found) == known:
                return output


def _stirred(model: nn.Module) -> nn.Module:
    """A copy in which constant tensors hold noise; the others are shared."""
    generator = torch.Generator().manual_seed(0)

    def stir(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        if not tensor.is_floating_point() or not len(flat) or flat[0] != flat[-1] or (flat != flat[0]).any():
            return tensor
        return tensor + 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor)

    return retyped(model, stir)


class _watching:  # noqa: N801 - a context manager, used as a verb
    """Calls `visit(path, module, shapes of the tensors that arrive)` before each module runs."""

    def __init__(
        self, model: nn.Module, visit: Callable[[str, nn.Module, list[tuple[int, ...]]], Any]
    ) -> None:
        self.handles = [
            module.register_forward_pre_hook(self._hook(path, visit), with_kwargs=True)
            for path, module in modules_of(model).items()
        ]

    @staticmethod
    def _hook(path: str, visit: Callable[..., Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            plain = not kwargs and all(isinstance(a, Tensor) for a in args)
            leaves = args if plain else pytree.tree_leaves((args, kwargs))
            visit(path, module, [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)])

        return hook

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def compare(masked: Any, cut: Any, tolerance: float) -> float:
    """Largest difference relative to the largest output.

    Raises:
        VerificationError: Shapes differ, or the difference exceeds the tolerance.
    """
    worst = 0.0
    pairs = list(zip(pytree.tree_leaves(masked), pytree.tree_leaves(cut), strict=False))
    if len(pytree.tree_leaves(masked)) != len(pytree.tree_leaves(cut)):
        raise VerificationError("the cut model returns another number of outputs than the masked one")
    for a, b in pairs:
        if not isinstance(a, Tensor) or not a.is_floating_point() or not a.numel():
            continue
        if a.shape != b.shape:
            raise VerificationError(
                f"the cut model's output has shape {tuple(b.shape)}, not {tuple(a.shape)}"
            )
        error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        worst = worst if error <= worst else error  # unlike max(), this lets NaN through
    if not worst <= tolerance:
        raise VerificationError(f"the cut model differs from the masked one by {worst:.2e} (relative)")
    return worst
