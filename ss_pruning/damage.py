"""How much of the output goes when a unit shrinks, measured: what makes channels of different layers comparable.

Scores order the channels of a unit well and compare units badly: no score of one layer knows what the layers behind it
make of its loss, nor what they can make up for. So every unit is shrunk by itself, to a few widths, on a few images,
and its readers find in place of what is gone what the compensation will leave them:

* "none": nothing; "mean": its mean;
* "linear", "reconstruct": what the channels that stay tell of it, by linear regression;
* "reconstruct": every layer behind is fitted to what it puts out in the dense net, scale and shift a channel, in place
  of the solve that will come: what that takes back is no damage;
* the damage is the share of the output's variance that is lost.

All widths of a unit run in one batch, and what comes before it once. The lower convex hull of damage over width gives
each channel the damage that its removal adds, in the order of the scores. What no layer behind takes back adds up from
one to the next, and damage beside whole layers says too little: without "reconstruct" it is measured again in a net
whose other units are cut as the first measurement would have it. Of both and their sum that is taken whose whole cut
loses least.

The idea of measuring every layer's sensitivity by itself is from Li et al. (2017), "Pruning filters for efficient
ConvNets", section 3.2; they did not repair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning.compensation import SOLVED, Method
from ss_pruning.coupling import Coupling, Unit
from ss_pruning.errors import InputError, ModelError
from ss_pruning.layers import channel_axis, groups_of
from ss_pruning.moments import Moments, measure
from ss_pruning.planning import Floats, Ints, gone_of, ranks_of, step_scores
from ss_pruning.provenance import call, preserved
from ss_pruning.redundancy import ridged_factor
from ss_pruning.walking import modules_of
from ss_pruning.wiring import Wiring

#: Fewer images than this say too little.
LEAST_IMAGES = 8
# Widths are measured on so many of the images.
_IMAGES = 32
# Widths, as shares of the most that may go.
_WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
# This share of the scores' mean is added to each: dead channels need a place in the order, too.
_EVEN, _NUDGE = 1e-3, 1e-15
# Ridge of the regression, as a share of the mean variance; at least so much.
_RIDGE = 1e-3
# A copy that lost nothing may differ from the dense net by this share of the output's variance.
_SAME = 1e-3
_OTHERWISE = "take scope='global'"
_NOTHING: Ints = np.empty(0, dtype=np.int64)


def by_damage(
    model: nn.Module,
    wiring: Wiring,
    coupling: Coupling,
    scores: Sequence[Sequence[Floats]],
    images: Tensor,
    batch: int,
    max_ratio: float,
    method: Method = "reconstruct",
    taken: Callable[[list[list[Floats]]], Ints] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Floats]]:
    """Scores in the same order within each unit, that tell how much damage each family's removal adds.

    Takes at most a pass over 6 x 32 images a unit, and one more with `taken`.

    Args:
        model: The dense model; not changed.
        wiring: Its wiring.
        coupling: Its units.
        scores: By unit and cell, one score a family; units with a score that is not finite keep theirs.
        images: Calibration inputs.
        batch: Moments are taken on so many of them at a time.
        max_ratio: No unit will lose a larger share of its channels.
        method: How the cut will be compensated.
        taken: Says by such scores how many steps each unit would take, `[units]`. If it is given, damage is measured
            again: what is added to that of the other units, cut so.
        progress: Called with (units done, units in all), of all measurements.

    Returns:
        By unit and cell, the damage of each family as a share of the output's variance.

    Raises:
        InputError: Too few images.
        ModelError: The model's outputs do not tell images apart, or are not finite.
    """
    if len(images) < LEAST_IMAGES:
        raise InputError(
            f"scope='measured' needs {LEAST_IMAGES} calibration inputs or more, there are {len(images)}; give more, "
            f"or {_OTHERWISE}"
        )
    readers = dict.fromkeys(path for unit in coupling.units for path in _readers(unit, wiring))
    held, others = _held_out(images)
    with preserved(model, training=False), torch.no_grad():
        moments = measure(
            model, wiring, others.split(batch), None, list(readers), covariance=method in SOLVED
        )
        lab = _Lab(model, wiring, held, moments, method)
        lab.check()
        if taken is None or not scores:
            return _measured(lab, coupling, scores, max_ratio, {}, progress)
        half, whole = len(scores), 2 * len(scores)
        alone = _measured(lab, coupling, scores, max_ratio, {}, lambda n, _: progress(n, whole))
        context = _context(coupling, wiring, alone, taken(alone))
        joint = _measured(lab, coupling, scores, max_ratio, context, lambda n, _: progress(half + n, whole))
        choices = [alone, joint, _sum(alone, joint)]
        lost = lab.damage([_context(coupling, wiring, choice, taken(choice)) for choice in choices])
    return choices[int(lost.argmin())]


def _held_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images to measure on and the others, on which the regressions are fitted: few rows explain themselves."""
    chosen = torch.linspace(0, len(images) - 1, min(_IMAGES, len(images) // 2)).long()
    stays = torch.ones(len(images), dtype=torch.bool)
    stays[chosen] = False
    return images[chosen.to(images.device)], images[stays.to(images.device)]


def _readers(unit: Unit, wiring: Wiring) -> list[str]:
    """The layers that mix channels of the unit."""
    members = (m for cell in unit.cells for m in cell.members if m.side == "in")
    return list(dict.fromkeys(m.path for m in members if wiring.layers[m.path].kind == "synaptic"))


def _measured(
    lab: _Lab,
    coupling: Coupling,
    scores: Sequence[Sequence[Floats]],
    max_ratio: float,
    context: Mapping[str, Ints],
    progress: Callable[[int, int], None],
) -> list[list[Floats]]:
    """By unit and cell, the damage of each family, where the other units are cut as the context says."""
    found = []
    for number, (unit, cells) in enumerate(zip(coupling.units, scores, strict=True)):
        progress(number, len(scores))
        found.append(_scored(lab, unit, cells, max_ratio, context))
    progress(len(scores), len(scores))
    return found


def _sum(first: Sequence[Sequence[Floats]], second: Sequence[Sequence[Floats]]) -> list[list[Floats]]:
    pairs = zip(first, second, strict=True)
    return [[a + b for a, b in zip(*cells, strict=True)] for cells in pairs]


def _context(
    coupling: Coupling, wiring: Wiring, scores: Sequence[Sequence[Floats]], taken: Ints
) -> dict[str, Ints]:
    """By reader, the input channels that go when each unit takes so many steps."""
    gone: dict[str, list[Ints]] = {}
    for unit, cells, steps in zip(coupling.units, scores, taken.tolist(), strict=True):
        for path, channels in _removed(unit, ranks_of(cells), steps, _readers(unit, wiring)).items():
            gone.setdefault(path, []).append(channels)
    return {path: np.concatenate(parts) for path, parts in gone.items()}


def _scored(
    lab: _Lab, unit: Unit, cells: Sequence[Floats], max_ratio: float, context: Mapping[str, Ints]
) -> list[Floats]:
    most = min(int(max_ratio * unit.steps + 1e-9), unit.steps - 1)
    readers = _readers(unit, lab.wiring)
    if most < 1 or not readers or not all(np.isfinite(s).all() for s in cells):
        return list(cells)
    stops = np.unique(np.ceil(np.array(_WIDTHS) * most).astype(np.int64))
    ranks = ranks_of(cells)
    cuts = [_removed(unit, ranks, int(stop), readers) for stop in stops]
    own = _removed(unit, ranks, unit.steps, readers)
    others = {path: np.setdiff1d(gone, own.get(path, ())) for path, gone in context.items()}
    uncut: list[dict[str, Ints]] = [{}] if others else []
    lost = lab.damage([_joined(others, cut) for cut in (*uncut, *cuts)])
    damage = (lost[1:] - lost[0]).clip(0) if others else lost
    added = added_by(stops, damage, step_scores(unit, cells, ranks))
    per_step = sum(cell.size for cell in unit.cells) / unit.steps
    found = []
    for rank in ranks:
        values = np.empty(len(rank))
        values[rank] = np.repeat(added / per_step, len(rank) // unit.steps)
        found.append(values)
    return found


def _removed(unit: Unit, ranks: Sequence[Ints], steps: int, readers: Sequence[str]) -> dict[str, Ints]:
    """By reader, the input channels that go with the first `steps` of the unit."""
    gone = gone_of(unit, ranks, steps)
    return {path: gone[path, "in"] for path in readers if (path, "in") in gone}


def _joined(first: Mapping[str, Ints], second: Mapping[str, Ints]) -> dict[str, Ints]:
    return {
        path: np.concatenate([part[path] for part in (first, second) if path in part])
        for path in (*first, *second)
    }


def added_by(stops: Ints, damage: Floats, scores: Floats) -> Floats:
    """`[steps]`: the damage that each step adds, growing from step to step.

    Args:
        stops: Numbers of steps after which the damage was measured, ascending.
        damage: What it was; between the corners of its lower convex hull it is spread as the scores are.
        scores: `[steps]`, ascending.
    """
    corners = _hull(np.array([0, *stops]), np.maximum.accumulate([0.0, *damage]))
    ends = np.array([stop for stop, _ in corners])
    most = ends[-1]
    weights = scores[:most] + max(float(scores[:most].mean()), 1e-300) * _EVEN
    piece = np.diff([at for _, at in corners]) / np.add.reduceat(weights, ends[:-1])
    added = np.sort(weights * np.repeat(piece, np.diff(ends)))
    beyond = np.full(len(scores) - most, added[-1])
    # Where nothing is lost the order of the scores must not be, either.
    ordered: Floats = np.concatenate([added, beyond]) + _NUDGE * np.arange(len(scores))
    return ordered


def _hull(x: Ints, y: Floats) -> list[tuple[int, float]]:
    """The corners of the lower convex hull of points that ascend in x."""
    corners: list[tuple[int, float]] = []
    for c in zip(x.tolist(), y.tolist(), strict=True):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (c[1] - b[1]) * (b[0] - a[0]) > (b[1] - a[1]) * (c[0] - b[0]):
                break
            corners.pop()
        corners.append(c)
    return corners


@dataclass
class _Lab:
    """Runs copies of the dense net that miss channels, all in one batch."""

    model: nn.Module
    wiring: Wiring
    images: Tensor
    moments: Mapping[str, Moments]
    method: Method = "reconstruct"

    def __post_init__(self) -> None:
        self.modules = modules_of(self.model)
        self.fitted = [
            p for p, layer in self.wiring.layers.items() if layer.kind in ("synaptic", "depthwise")
        ]
        self.precisions: dict[str, Tensor] = {}
        #: By path, the last channels that were missed and what is read in their place: a context comes again and again.
        self.last: dict[str, tuple[bytes, _Predicted]] = {}

    def check(self) -> None:
        """Find the layers that see copies side by side, and raise if images see each other."""
        alike: dict[str, bool] = {}

        def watch(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                alike[path] = alike.get(path, True) and _halves_are_alike(output)

            return hook

        with contextlib.ExitStack() as undo:
            for path in self.fitted:
                undo.callback(self.modules[path].register_forward_hook(watch(path)).remove)
            outputs = self._outputs(2)
        self.fitted = [path for path in self.fitted if alike.get(path)]
        if _lost(outputs, 2)[0] > _SAME:
            raise ModelError(
                "the output for an image depends on the others in its batch, so that channels cannot be measured side "
                f"by side; {_OTHERWISE}"
            )

    def damage(self, cuts: Sequence[Mapping[str, Ints]]) -> Floats:
        """`[cuts]`: the share of the output's variance that is lost with each."""
        paths = dict.fromkeys(path for cut in cuts for path in cut)
        readers = [path for path in paths if self.moments[path].mean is not None]  # the others do not run
        strange = [path for path in readers if path not in self.fitted]
        if strange:
            raise ModelError(f"what '{strange[0]}' reads does not go by images; {_OTHERWISE}")
        if self.method == "reconstruct":
            return _lost(self._run(readers, [{}, *cuts]), len(cuts) + 1)
        return _lost(_beside(self.dense, self._run(readers, cuts), len(cuts)), len(cuts) + 1)

    @cached_property
    def dense(self) -> Any:
        """The outputs of the dense net."""
        return self._outputs(1)

    def _run(self, readers: Sequence[str], cuts: Sequence[Mapping[str, Ints]]) -> Any:
        """The outputs of copies with each of the cuts; what comes before they differ runs for one of them."""
        copies = len(cuts)
        gone = {path: [cut.get(path, _NOTHING) for cut in cuts] for path in readers}
        differ = [path for path, each in gone.items() if len({g.tobytes() for g in each}) > 1]
        first = min((self.fitted.index(path) for path in differ), default=0)
        with contextlib.ExitStack() as undo:
            for path in self.fitted[:first]:
                self._once(path, copies, undo)
            for path in readers:  # one that runs once reads one copy, all of whose parts miss the same
                predicted = [self._predicted(path, g) if len(g) else None for g in gone[path]]
                undo.callback(self.modules[path].register_forward_pre_hook(_replace(predicted)).remove)
            for path in self.fitted[first:] if self.method == "reconstruct" else ():
                undo.callback(self.modules[path].register_forward_hook(_refit(copies)).remove)
            return self._outputs(copies)

    def _outputs(self, copies: int) -> Any:
        try:
            return call(self.model, torch.cat([self.images] * copies))
        except Exception as error:
            raise ModelError(
                f"the model does not run on {copies} copies of {len(self.images)} calibration inputs side by side "
                f"({type(error).__name__}: {error}); {_OTHERWISE}"
            ) from error

    def _once(self, path: str, copies: int, undo: contextlib.ExitStack) -> None:
        """Let a layer that all copies reach alike run for one of them."""
        if len({feed.call for feed in self.wiring.feeds[path]}) > 1:  # it may come again behind the cut
            return
        module = self.modules[path]
        undo.callback(module.register_forward_pre_hook(_first(copies)).remove)
        undo.callback(module.register_forward_hook(_repeated(copies)).remove)

    def _predicted(self, path: str, gone: Ints) -> _Predicted:
        key = gone.tobytes()
        if path not in self.last or self.last[path][0] != key:
            self.last[path] = key, self._predict(path, gone)
        return self.last[path][1]

    def _predict(self, path: str, gone: Ints) -> _Predicted:
        moments = self.moments[path]
        mean, covariance = moments.mean, moments.covariance
        assert mean is not None
        if self.method == "none":
            mean = torch.zeros_like(mean)
        if covariance is not None and path not in self.precisions:
            self.precisions[path] = _inverse(covariance, groups_of(self.modules[path]), moments.rows)
        return _Predicted.of(mean, self.precisions.get(path), gone)


@dataclass(frozen=True)
class _Predicted:
    """What a layer reads on removed channels is taken for `constant + kept channels @ slope`.

    Any regression among channels follows from the inverse of their covariance.
    """

    removed: Tensor
    kept: Tensor
    slope: Tensor | None
    constant: Tensor

    @staticmethod
    def of(mean: Tensor, precision: Tensor | None, gone: Ints) -> _Predicted:
        removed = torch.from_numpy(gone).to(mean.device)
        stays = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
        stays[removed] = False
        kept = stays.nonzero()[:, 0]
        if precision is None:
            return _Predicted(removed, kept, None, mean[removed].float())
        rows = precision[removed]
        factor = torch.linalg.cholesky(rows[:, removed])
        slope = -torch.cholesky_solve(rows[:, kept], factor)
        constant = mean[removed].double() - slope @ mean[kept].double()
        return _Predicted(removed, kept, slope.T.float(), constant.float())

    def fill_(self, channels: Tensor) -> None:
        """Replace them in `[..., channels]`."""
        value = self.constant
        if self.slope is not None:
            value = value + channels[..., self.kept].float() @ self.slope
        channels[..., self.removed] = value.to(channels.dtype)


def _inverse(covariance: Tensor, groups: int, rows: int) -> Tensor:
    """Of the covariance with a ridge, which grows with the channels a row; channels of other groups tell nothing."""
    if groups > 1:
        group = torch.arange(len(covariance), device=covariance.device) // (len(covariance) // groups)
        covariance = covariance * (group[:, None] == group)
    share = max(_RIDGE, len(covariance) // groups / max(rows, 1))
    ridge = share * covariance.diagonal().mean(0, keepdim=True) + torch.finfo(covariance.dtype).tiny
    factor, _ = ridged_factor(covariance, ridge)
    if factor is None:
        raise ModelError("what a layer reads is not finite on the calibration inputs; check them")
    return torch.cholesky_inverse(factor)


def _halves_are_alike(output: Tensor) -> bool:
    """True if a batch that holds every image twice, one half after the other, comes out so."""
    if len(output) % 2:
        return False
    first, second = output.float().chunk(2)
    return bool((first - second).square().mean() <= _SAME * first.square().mean())


def _replace(predicted: Sequence[_Predicted | None]) -> Callable[[nn.Module, Any], Any]:
    """A hook that takes channels from each of the copies, or leaves it alone."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        for one, copy in zip(predicted, x.tensor_split(len(predicted)), strict=True):
            if one is not None:
                one.fill_(copy.movedim(channel_axis(module, x), -1))
        return (x, *args[1:])

    return hook


def _first(copies: int) -> Callable[[nn.Module, Any], Any]:
    return lambda module, args: (args[0][: len(args[0]) // copies], *args[1:])


def _repeated(copies: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, args, output: torch.cat([output] * copies)


def _refit(copies: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that scales and shifts each channel of all copies towards the first one, by least squares."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        over = [axis for axis in range(output.dim()) if axis != channel_axis(module, output)]
        dense, *others = output.chunk(copies)
        mean = dense.float().mean(over, keepdim=True)
        centred = dense.float() - mean
        return torch.cat([dense, *(_fitted(copy, mean, centred, over) for copy in others)])

    return hook


def _fitted(copy: Tensor, mean: Tensor, centred: Tensor, over: list[int]) -> Tensor:
    """`copy`, each of its channels scaled and shifted to come closest to `mean + centred`."""
    x = copy.float()
    x = x - x.mean(over, keepdim=True)
    power = x.square().mean(over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    slope = (x * centred).mean(over, keepdim=True) / power
    return (mean + slope * x).to(copy.dtype)


def _beside(dense: Any, outputs: Any, copies: int) -> Any:
    """Outputs of the dense net, followed by those of the copies."""

    def joined(first: Any, others: Any) -> Any:
        by_image = isinstance(others, Tensor) and others.dim() and len(others) == copies * len(first)
        return torch.cat([first, others]) if by_image else others

    return pytree.tree_map(joined, dense, outputs)


def _lost(outputs: Any, copies: int) -> Floats:
    """`[copies - 1]`: mean squared difference from the first copy over its variance, mean over the outputs."""
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if (
            not isinstance(leaf, Tensor)
            or not leaf.is_floating_point()
            or not leaf.dim()
            or len(leaf) % copies
        ):
            continue
        parts = leaf.unflatten(0, (copies, -1)).double()
        variance = (parts[0] - parts[0].mean(0)).square().mean()
        if bool(variance > 0):
            found.append((parts[1:] - parts[0]).flatten(1).square().mean(1) / variance)
    if not found:
        raise ModelError(f"no output of the model varies from image to image; {_OTHERWISE}")
    lost = torch.stack(found).mean(0)
    if not bool(lost.isfinite().all()):
        raise ModelError("the model's output is not finite on the calibration inputs; check them")
    shares: Floats = lost.cpu().numpy()
    return shares
