"""Copies of a model that miss channels, run side by side in one batch: what of the output is lost with each.

What the consumers find in place of a channel that is gone, and what is fitted behind it, stands in
`ss_pruning.importance.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import Floats, Ints, mean_and_variance
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import call
from ss_pruning.config import FOLDED, SOLVED, Method
from ss_pruning.errors import ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import channel_axis, groups_of, has_statistics
from ss_pruning.importance.activation_stats import ActivationStatistics
from ss_pruning.importance.calibration import Batch
from ss_pruning.importance.conditional_variance import removal_errors
from ss_pruning.importance.regression import Predicted, constant_output, precision
from ss_pruning.importance.shared_prefix import Prefix, length

OTHERWISE = "take allocation='global'"
# A copy that lost nothing may differ from the dense model by this share of the output's variance.
_SAME = 1e-3
_NOTHING: Ints = np.empty(0, dtype=np.int64)


def output_key(path: str) -> str:
    """Under which channels are named that are missing from what a layer puts out, not from what it reads."""
    return f"{path}()"


def is_output(key: str) -> bool:
    """Whether it is such a key."""
    return key.endswith("()")


@dataclass
class BatchedAblation:
    """Runs copies of the dense model that miss channels, all in one batch; with `follow` batch norms follow the cut.

    Raises:
        ModelError: The model does not run on several copies, or images see each other.
    """

    model: nn.Module
    connectivity: Connectivity
    images: Any
    statistics: Mapping[str, ActivationStatistics]
    method: Method = "reconstruct"
    follow: bool = False

    def __post_init__(self) -> None:
        self.modules = modules_of(self.model)
        self.fitted = self.connectivity.weighted
        #: Those that follow; what reaches one that runs several times is not told apart.
        self.norms = {
            p: m for p in self.connectivity.layers if self.follow and has_statistics(m := self.modules[p])
        }
        self.reached: dict[str, _Reached] = {}
        self.batch = Batch.of(self.images)
        self.prefix = Prefix(self.modules)
        self.precisions: dict[str, Tensor] = {}
        #: By output, whether it goes by images.
        self.grow: list[bool] = []
        #: By path, the last channels that were missed and what stands in for them: a context comes again and again.
        self.last: dict[str, tuple[bytes, _StandIn]] = {}
        self._check()

    def _check(self) -> None:
        """Find the layers that see copies side by side, and raise if images see each other."""
        with self.prefix.sized():
            alone = pytree.tree_leaves(self._outputs(1))
        with self.prefix.watched():
            outputs = pytree.tree_leaves(self._outputs(2))
        self.fitted = [path for path in self.fitted if self.prefix.goes_by_images(path)]
        self.norms = {path: norm for path, norm in self.norms.items() if self.prefix.runs_once(path)}
        # Not those that grow along another axis, too: similarities of all images with all.
        self.grow = [
            length(two) == 2 * length(one) > 0 and _rest(one) == _rest(two)
            for one, two in zip(alone, outputs, strict=False)
        ]
        if _lost(*_first(self._heard(outputs), 2))[0] > _SAME:
            raise ModelError(
                "the output for an image depends on the others in its batch, so that channels cannot be measured side "
                f"by side; {OTHERWISE}"
            )

    def _heard(self, outputs: Any) -> list[Tensor]:
        """Those of the outputs that tell of output error: numbers that go by images."""
        leaves = pytree.tree_leaves(outputs)
        if len(leaves) != len(self.grow):
            raise ModelError(f"how many outputs there are depends on the number of images; {OTHERWISE}")
        heard = [leaf for leaf, grows in zip(leaves, self.grow, strict=True) if grows]
        numbers = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in heard]
        return [leaf for leaf in numbers if leaf.is_floating_point()]

    def sensitivity(self, cuts: Sequence[Mapping[str, Ints]]) -> Floats:
        """`[cuts]`: the share of the output's variance that is lost with each."""
        paths = dict.fromkeys(path for cut in cuts for path in cut)
        # Those without statistics do not run.
        consumers = [path for path in paths if is_output(path) or self.statistics[path].mean is not None]
        strange = [path for path in map(_layer, consumers) if path not in self.fitted]
        if strange:
            raise ModelError(f"what '{strange[0]}' reads does not go by images; {OTHERWISE}")
        if self.method == "reconstruct":
            return _lost(*_first(self._run(consumers, [{}, *cuts]), len(cuts) + 1))
        dense = self.dense  # first: copies follow what reaches its norms
        return _lost(dense, self._run(consumers, cuts))

    @cached_property
    def dense(self) -> list[Tensor]:
        """The outputs of the dense model; what reaches its norms is noted on the way."""

        def note(path: str, norm: nn.Module, x: Tensor) -> None:
            self.reached[path] = _Reached(len(x), *mean_and_variance(x))

        with hooked(self.norms, note):
            return self._heard(self._outputs(1))

    def _run(self, consumers: Sequence[str], cuts: Sequence[Mapping[str, Ints]]) -> list[Tensor]:
        """The outputs of copies with each of the cuts; what comes before they differ runs for one of them."""
        copies = len(cuts)
        pruned = {path: [cut.get(path, _NOTHING) for cut in cuts] for path in consumers}
        differ = [path for path, each in pruned.items() if len({g.tobytes() for g in each}) > 1]
        begin = min((self.prefix.begin(_layer(path)) for path in differ), default=0)
        fitted = self.fitted if self.method == "reconstruct" else ()
        # One that runs once reads one copy, all of whose parts miss the same.
        gone = {
            path: [self._stand_in(path, g) if len(g) else None for g in pruned[path]]
            for path in consumers
            if not is_output(path)
        }
        silent = {_layer(path): pruned[path] for path in consumers if is_output(path)}
        with (
            self.prefix.run_once(begin, copies),
            hooked(
                {path: self.modules[path] for path in gone},
                lambda path, layer, x: _replaced(layer, x, gone[path]),
                lambda path, layer, _, output: _shift_(layer, output, gone[path]),
            ),
            hooked(
                {path: self.modules[path] for path in fitted if self.prefix.begin(path) >= begin},
                after=lambda _, layer, __, output: _refit_(layer, output, copies),
            ),
            hooked(
                {path: self.modules[path] for path in silent},
                after=lambda path, layer, _, output: _silence_(layer, output, silent[path]),
            ),
            hooked(
                {path: self.norms[path] for path in self.reached},
                lambda path, norm, x: _followed(x, self.reached[path], norm.eps),  # type: ignore[arg-type]
            ),
        ):
            return self._heard(self._outputs(copies))

    def _outputs(self, copies: int) -> Any:
        try:
            with torch.no_grad():
                return call(self.model, self.batch.repeated(copies).inputs)
        except Exception as error:
            raise ModelError(
                f"the model does not run on {copies} copies of {len(self.batch)} calibration inputs side by side "
                f"({type(error).__name__}: {error}); {OTHERWISE}"
            ) from error

    def _stand_in(self, path: str, pruned: Ints) -> _StandIn:
        key = pruned.tobytes()
        if path not in self.last or self.last[path][0] != key:
            predicted, shift = self._predict(path, pruned), None
            if self.method in FOLDED:
                shift = constant_output(self.modules[path], predicted.constants())
            self.last[path] = key, _StandIn(predicted, shift)
        return self.last[path][1]

    def _predict(self, path: str, pruned: Ints) -> Predicted:
        mean = self.statistics[path].mean
        assert mean is not None
        if self.method == "none":
            mean = torch.zeros_like(mean)
        kept = np.setdiff1d(np.arange(len(mean)), pruned)
        return Predicted.of(mean, self._precision(path), torch.from_numpy(kept), torch.from_numpy(pruned))

    def _precision(self, path: str) -> Tensor | None:
        """Of what a layer reads; None where means stand in for channels."""
        statistics = self.statistics[path]
        if statistics.covariance is None or self.method not in SOLVED:
            return None
        if path not in self.precisions:
            self.precisions[path] = precision(
                statistics.covariance, groups_of(self.modules[path]), statistics.rows
            )
        return self.precisions[path]

    def removal_errors(self, path: str, order: Ints) -> Floats:
        """`[removed]`: the share of a layer's output that goes with each input channel, in the order in which they go.

        Zeros for one that does not run.
        """
        statistics = self.statistics[path]
        if statistics.mean is None:
            return np.zeros(len(order))
        added: Floats = removal_errors(
            self.modules[path], statistics, self._precision(path), torch.from_numpy(order), self.method
        ).numpy(force=True)
        return added

    def begin(self, path: str) -> int:
        """When a layer runs for the first time, counted in calls that began or ended; 0 for one that does not."""
        return self.prefix.begin(_layer(path)) if _layer(path) in self.prefix.calls else 0


@dataclass(frozen=True)
class _StandIn:
    """What stands in for channels that a layer misses: in what it reads, or what is constant of it in its bias.

    As the compensation has it: a bias knows of no padded border, weights that are solved anew do.

    Attributes:
        predicted: What is read in their place.
        shift: `[out_channels]`, what its constant adds to the output; None where the layer reads the constant itself.
    """

    predicted: Predicted
    shift: Tensor | None


def _replaced(layer: nn.Module, x: Tensor, stand_ins: Sequence[_StandIn | None]) -> Tensor:
    """What a layer reads, with channels of each of the copies replaced."""
    x = x.clone()
    for one, copy in zip(stand_ins, x.tensor_split(len(stand_ins)), strict=True):
        if one is not None:
            one.predicted.fill_(copy.movedim(channel_axis(layer, x), -1), constant=one.shift is None)
    return x


def _shift_(layer: nn.Module, output: Tensor, stand_ins: Sequence[_StandIn | None]) -> None:
    """Add to what a layer puts out of each copy."""
    for one, copy in zip(stand_ins, output.tensor_split(len(stand_ins)), strict=True):
        if one is not None and one.shift is not None:
            copy.movedim(channel_axis(layer, output), -1).add_(one.shift.to(output))


def _layer(key: str) -> str:
    return key.removesuffix("()")


def _silence_(layer: nn.Module, output: Tensor, channels: Sequence[Ints]) -> None:
    """Zero what a layer puts out on channels of each of the copies."""
    for pruned, copy in zip(channels, output.tensor_split(len(channels)), strict=True):
        copy.movedim(channel_axis(layer, output), -1)[..., torch.from_numpy(pruned)] = 0


def _refit_(layer: nn.Module, output: Tensor, copies: int) -> None:
    """Scale and shift each channel of all copies towards the first one, by least squares."""
    over = [axis for axis in range(output.dim()) if axis != channel_axis(layer, output)]
    dense, *others = output.chunk(copies)
    mean = dense.float().mean(over, keepdim=True)
    centred = dense.float() - mean
    for copy in others:
        _fit_(copy, mean, centred, over)


def _fit_(copy: Tensor, mean: Tensor, centred: Tensor, over: list[int]) -> None:
    """Scale and shift each channel of `copy`, in place, to come closest to `mean + centred`."""
    x = copy.float()  # `copy` itself, if that is single precision
    x -= x.mean(over, keepdim=True)
    power = x.square().mean(over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    slope = (x * centred).mean(over, keepdim=True) / power
    copy.copy_(x.mul_(slope).add_(mean))


@dataclass(frozen=True)
class _Reached:
    """What reaches a norm in the dense model: so many rows, of this mean and variance."""

    rows: int
    mean: Tensor
    variance: Tensor


def _followed(x: Tensor, dense: _Reached, eps: float) -> Tensor:
    """With each channel of all copies brought to the mean and variance that it has in the dense model."""
    found = torch.empty_like(x)  # once: large tensors cost more than what fills them
    for copy, brought in zip(x.split(dense.rows), found.split(dense.rows), strict=True):
        mean, variance = mean_and_variance(copy)
        scale = ((dense.variance + eps) / (variance + eps)).sqrt()
        torch.addcmul((dense.mean - scale * mean).to(copy.dtype), copy, scale.to(copy.dtype), out=brought)
    return found


def _rest(output: Any) -> Any:
    return output.shape[1:] if isinstance(output, Tensor) else None


def _first(outputs: Sequence[Tensor], copies: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the first of so many copies put out, and all others."""
    sizes = [len(output) // copies for output in outputs]
    pairs = list(zip(outputs, sizes, strict=True))
    return [output[:size] for output, size in pairs], [output[size:] for output, size in pairs]


def _lost(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> Floats:
    """`[copies]`: mean squared difference from the dense model over its variance, mean over the outputs."""
    found = []
    for output, others in zip(dense, pruned, strict=True):
        wanted = output.double()
        variance = (wanted - wanted.mean(0)).square().mean()
        if bool(variance > 0):
            errors = [(copy.double() - wanted).square().mean() for copy in others.split(len(wanted))]
            found.append(torch.stack(errors) / variance)
    if not found:
        raise ModelError(f"no output of the model varies from image to image; {OTHERWISE}")
    lost = torch.stack(found).mean(0)
    if not bool(lost.isfinite().all()):
        raise ModelError("the model's output is not finite on the calibration inputs; check them")
    shares: Floats = lost.cpu().numpy()
    return shares
