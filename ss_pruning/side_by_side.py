"""Copies of a net that miss channels, run side by side in one batch: what of the output is lost with each.

What the readers find in place of a channel that is gone, and what is fitted behind it, stands in `ss_pruning.damage`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning.batches import Batch
from ss_pruning.compensation import Method
from ss_pruning.errors import ModelError
from ss_pruning.hooks import on_input
from ss_pruning.layers import channel_axis, groups_of, has_statistics
from ss_pruning.moments import Moments
from ss_pruning.planning import Floats, Ints
from ss_pruning.prefix import Prefix
from ss_pruning.provenance import call
from ss_pruning.redundancy import ridged_factor
from ss_pruning.walking import modules_of
from ss_pruning.wiring import Wiring

OTHERWISE = "take scope='global'"
# Ridge of the regression, as a share of the mean variance; at least so much.
_RIDGE = 1e-3
# A copy that lost nothing may differ from the dense net by this share of the output's variance.
_SAME = 1e-3
_NOTHING: Ints = np.empty(0, dtype=np.int64)


@dataclass
class Lab:
    """Runs copies of the dense net that miss channels, all in one batch; with `follow` batch norms follow the cut.

    Raises:
        ModelError: The model does not run on several copies, or images see each other.
    """

    model: nn.Module
    wiring: Wiring
    images: Any
    moments: Mapping[str, Moments]
    method: Method = "reconstruct"
    follow: bool = False

    def __post_init__(self) -> None:
        self.modules = modules_of(self.model)
        self.fitted = [
            p for p, layer in self.wiring.layers.items() if layer.kind in ("synaptic", "depthwise")
        ]
        #: Those that follow; what reaches one that runs several times is not told apart.
        self.norms = {
            p: m for p in self.wiring.layers if self.follow and has_statistics(m := self.modules[p])
        }
        self.reached: dict[str, _Reached] = {}
        self.batch = Batch.of(self.images)
        self.prefix = Prefix(self.modules, len(self.batch) // self.batch.unit)
        self.precisions: dict[str, Tensor] = {}
        #: By path, the last channels that were missed and what is read in their place: a context comes again and again.
        self.last: dict[str, tuple[bytes, _Predicted]] = {}
        self._check()

    def _check(self) -> None:
        """Find the layers that see copies side by side, and raise if images see each other."""
        with self.prefix.watched():
            outputs = self._outputs(2)
        self.fitted = [path for path in self.fitted if self.prefix.goes_by_images(path)]
        self.norms = {path: norm for path, norm in self.norms.items() if self.prefix.runs_once(path)}
        if _lost(outputs, 2)[0] > _SAME:
            raise ModelError(
                "the output for an image depends on the others in its batch, so that channels cannot be measured side "
                f"by side; {OTHERWISE}"
            )

    def damage(self, cuts: Sequence[Mapping[str, Ints]]) -> Floats:
        """`[cuts]`: the share of the output's variance that is lost with each."""
        paths = dict.fromkeys(path for cut in cuts for path in cut)
        readers = [path for path in paths if self.moments[path].mean is not None]  # the others do not run
        strange = [path for path in readers if path not in self.fitted]
        if strange:
            raise ModelError(f"what '{strange[0]}' reads does not go by images; {OTHERWISE}")
        if self.method == "reconstruct":
            return _lost(self._run(readers, [{}, *cuts]), len(cuts) + 1)
        return _lost(_beside(self.dense, self._run(readers, cuts), len(cuts)), len(cuts) + 1)

    @cached_property
    def dense(self) -> Any:
        """The outputs of the dense net; what reaches its norms is noted on the way."""

        def note(path: str, norm: nn.Module, x: Tensor) -> None:
            self.reached[path] = _Reached(len(x), *_moments(x))

        with contextlib.ExitStack() as undo:
            for path, norm in self.norms.items():
                undo.callback(on_input(norm, partial(note, path)).remove)
            return self._outputs(1)

    def _run(self, readers: Sequence[str], cuts: Sequence[Mapping[str, Ints]]) -> Any:
        """The outputs of copies with each of the cuts; what comes before they differ runs for one of them."""
        copies = len(cuts)
        gone = {path: [cut.get(path, _NOTHING) for cut in cuts] for path in readers}
        differ = [path for path, each in gone.items() if len({g.tobytes() for g in each}) > 1]
        begin = min((self.prefix.begin(path) for path in differ), default=0)
        with contextlib.ExitStack() as undo:
            self.prefix.run_once(begin, copies, undo)
            for path in readers:  # one that runs once reads one copy, all of whose parts miss the same
                predicted = [self._predicted(path, g) if len(g) else None for g in gone[path]]
                undo.callback(on_input(self.modules[path], _replace(predicted)).remove)
            for path in self.fitted if self.method == "reconstruct" else ():
                if self.prefix.begin(path) >= begin:
                    undo.callback(self.modules[path].register_forward_hook(_refit(copies)).remove)
            for path, reached in self.reached.items():
                hook = _follow(reached, self.norms[path].eps)
                undo.callback(on_input(self.norms[path], hook).remove)
            return self._outputs(copies)

    def _outputs(self, copies: int) -> Any:
        try:
            with torch.no_grad():
                return call(self.model, self.batch.repeated(copies).inputs)
        except Exception as error:
            raise ModelError(
                f"the model does not run on {copies} copies of {len(self.batch)} calibration inputs side by side "
                f"({type(error).__name__}: {error}); {OTHERWISE}"
            ) from error

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


def _replace(predicted: Sequence[_Predicted | None]) -> Callable[[nn.Module, Tensor], Tensor]:
    """A hook that takes channels from each of the copies, or leaves it alone."""

    def hook(module: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        for one, copy in zip(predicted, x.tensor_split(len(predicted)), strict=True):
            if one is not None:
                one.fill_(copy.movedim(channel_axis(module, x), -1))
        return x

    return hook


def _refit(copies: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that scales and shifts each channel of all copies towards the first one, by least squares."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        over = [axis for axis in range(output.dim()) if axis != channel_axis(module, output)]
        dense, *others = output.chunk(copies)
        mean = dense.float().mean(over, keepdim=True)
        centred = dense.float() - mean
        for copy in others:
            _fit_(copy, mean, centred, over)
        return output

    return hook


def _fit_(copy: Tensor, mean: Tensor, centred: Tensor, over: list[int]) -> None:
    """Scale and shift each channel of `copy`, in place, to come closest to `mean + centred`."""
    x = copy.float()  # `copy` itself, if that is single precision
    x -= x.mean(over, keepdim=True)
    power = x.square().mean(over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    slope = (x * centred).mean(over, keepdim=True) / power
    copy.copy_(x.mul_(slope).add_(mean))


@dataclass(frozen=True)
class _Reached:
    """What reaches a norm in the dense net: so many rows, of this mean and variance."""

    rows: int
    mean: Tensor
    variance: Tensor


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the channels of `[N, C, ...]`, in its dimensions."""
    over = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.float().mean(over, keepdim=True)
    return mean, (x - mean).square().mean(over, keepdim=True)


def _follow(dense: _Reached, eps: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """A hook that brings each channel of all copies to the mean and variance that it has in the dense net."""

    def hook(module: nn.Module, x: Tensor) -> Tensor:
        found = torch.empty_like(x)  # once: large tensors cost more than what fills them
        for copy, brought in zip(x.split(dense.rows), found.split(dense.rows), strict=True):
            mean, variance = _moments(copy)
            scale = ((dense.variance + eps) / (variance + eps)).sqrt()
            torch.addcmul((dense.mean - scale * mean).to(copy.dtype), copy, scale.to(copy.dtype), out=brought)
        return found

    return hook


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
        raise ModelError(f"no output of the model varies from image to image; {OTHERWISE}")
    lost = torch.stack(found).mean(0)
    if not bool(lost.isfinite().all()):
        raise ModelError("the model's output is not finite on the calibration inputs; check them")
    shares: Floats = lost.cpu().numpy()
    return shares
