"""Recalibration: the statistics of batch norms behind a cut move as far as what reaches them has moved.

A cut takes mean and variance away from what reaches the norms behind it, whose statistics are still the dense model's.
Both models run on the same inputs, and what differs between them is what the statistics are moved by: means by their
difference, variances by their quotient. What both have in common, such as a sample that is not the training set,
cancels; a model that lost nothing keeps its statistics as they are.

Without inputs both models run on noise whose spectrum is that of photos (amplitude 1/f), and what reaches a norm is
brought to its statistics on the way, channel by channel: every layer then reads what it reads in the dense model, as
far as means and variances go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.arrays import mean_and_variance, normal_like, tensors_among, with_spectrum_of_photos
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.progress import step
from ss_pruning._utils.running import call, preserved
from ss_pruning.compensation.batch_sizes import sizes_that_run
from ss_pruning.compensation.passes.calls import Calls
from ss_pruning.compensation.passes.lockstep import Lockstep
from ss_pruning.graph.layers import has_statistics
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.surgery.plan import Plan

#: Count, mean and (biased) variance by channel.
_Sample = tuple[int, Tensor, Tensor]
# Noise: at least so many images, at most so many, and else as many as have this number of positions.
_LEAST, _MOST, _POSITIONS = 16, 256, 2**18
# Inputs run at once, since each norm is set before what comes behind it: no more of them than have so many positions.
_AT_ONCE = 2**23


def recalibrate_(
    small: nn.Module, traced: TracedModel, plan: Plan, images: Any, means: bool = True
) -> list[str]:
    """Move the running statistics of the batch norms behind the first cut, in one pass; returns their paths.

    Each norm is set before it runs, so those behind it see what it will put out from now on. Over the calls of
    a norm that runs several times, statistics are those of all that it saw. With `m`, `v` and `M`, `V` what
    reaches the dense norm and its statistics, and `m'`, `v'` what reaches the norm now, what it puts out has
    the mean and variance of what the dense one puts out by `V' = V v' / v` and `M' = m' + (M - m) sqrt(v' /
    v)`; on noise `m` and `v` stand for `M` and `V`, and `M' = M + (m' - m) sqrt(V / v)`. To all variances the
    norm's `eps` is added.

    Without images both models run on noise, in the shape of the example inputs. Where a norm runs several times, those
    images are taken that fit into memory side by side, but 16 at least. `means` are moved, too; on noise they are known
    less well than those of `fold_means_`.
    """
    dense, connectivity, inputs = traced.model, traced.connectivity, traced.example_inputs
    order, cut = list(connectivity.layers), {cut.path for cut in plan.cuts}
    first = next((number for number, path in enumerate(order) if path in cut), len(order))
    norms, behind = (
        [path for path in paths if has_statistics(traced.modules[path])] for paths in (order, order[first:])
    )
    if not behind:
        return []
    kept = {cut.path: torch.tensor(cut.kept) for cut in plan.cuts if cut.side != "in"}
    once = all(len({edge.call for edge in connectivity.edges[path]}) == 1 for path in behind)
    if images is not None and once:
        return _moved_in_parts(small, dense, behind, kept, Batch.of(images), means)
    on_noise = images is None
    # Noise has to be brought to the statistics of the first norms, too.
    paths = norms if on_noise else behind
    batch = noise_like(inputs, *sizes_that_run(dense, inputs)) if on_noise else _fitting(Batch.of(images))
    wanted = _watched(dense, paths, batch, on_noise)
    seen: dict[str, list[_Sample]] = defaultdict(list)

    def listen(path: str, norm: Any, x: Tensor) -> Tensor | None:
        number = min(len(seen[path]), len(wanted[path]) - 1)
        now = _added(seen[path], x)
        if path not in behind:
            return _brought(norm, x, now)
        centre = norm.running_mean.clone()
        _set(norm, dense.get_submodule(path), kept.get(path), wanted[path][number], now, on_noise)
        if not means:
            norm.running_mean.copy_(centre)
        return _brought(norm, x, now) if on_noise else None

    _run(small, [path for path in paths if path in wanted], listen, batch)
    return [path for path in behind if path in seen]


def _moved_in_parts(
    small: nn.Module,
    dense: nn.Module,
    behind: Sequence[str],
    kept: Mapping[str, Tensor],
    images: Batch,
    means: bool,
) -> list[str]:
    """Move the statistics of norms that run once, on some images at a time, see `recalibrate_`."""
    found = []
    norms = {path: small.get_submodule(path) for path in behind}
    with (
        torch.no_grad(),
        preserved(small, training=False, but=norms.values()),
        preserved(dense, training=False),
        Calls(small) as few,
        Calls(dense) as all_,
    ):
        models = Lockstep(few, all_, images, behind, {}, dense_side="in")
        for number, path in enumerate(models.order, 1):
            then, now = list[_Sample](), list[_Sample]()
            for meeting in models.at(path, len(images)):
                _added(then, meeting.wanted)
                _added(now, meeting.x)
            if now:
                norm, centre = norms[path], norms[path].running_mean
                before = centre.clone()  # type: ignore[operator]
                _set(norm, dense.get_submodule(path), kept.get(path), then[-1], now[-1], False)
                if not means:
                    centre.copy_(before)  # type: ignore[operator]
                found.append(path)
            step(number, len(models.order))
    return found


def _watched(net: nn.Module, paths: Sequence[str], images: Batch, on_noise: bool) -> dict[str, list[_Sample]]:
    """By norm and call, what has reached it up to then."""
    seen: dict[str, list[_Sample]] = defaultdict(list)

    def listen(path: str, norm: Any, x: Tensor) -> Tensor | None:
        now = _added(seen[path], x)
        return _brought(norm, x, now) if on_noise else None

    _run(net, paths, listen, images)
    return dict(seen)


def _run(
    net: nn.Module, paths: Sequence[str], listen: Callable[[str, Any, Tensor], Any], images: Batch
) -> None:
    norms = {path: net.get_submodule(path) for path in paths}
    with torch.no_grad(), preserved(net, training=False, but=norms.values()), hooked(norms, listen):
        call(net, images.inputs)


def _set(norm: Any, dense: Any, kept: Tensor | None, then: _Sample, now: _Sample, on_noise: bool) -> None:
    """Move the statistics of a norm from those of the dense one."""
    (_, m, v), (_, mean, variance) = then, now
    parts = [part.double() for part in (m, v, dense.running_mean, dense.running_var)]
    m, v, centre, spread = parts if kept is None else [part[kept.to(part.device)] for part in parts]
    v, spread, variance = (part + norm.eps for part in (v, spread, variance))
    if on_noise:
        norm.running_mean.copy_(centre + (mean - m) * (spread / v).sqrt())
    else:
        norm.running_mean.copy_(mean + (centre - m) * (variance / v).sqrt())
    norm.running_var.copy_((spread * variance / v - norm.eps).clamp_min(0))


def _brought(norm: Any, x: Tensor, sample: _Sample) -> Tensor:
    """What reaches a norm, with its channels brought to the norm's statistics."""
    _, mean, variance = sample
    shape = [1, -1, *[1] * (x.dim() - 2)]
    scale = ((norm.running_var + norm.eps) / (variance + norm.eps)).sqrt()
    shift = norm.running_mean - scale * mean
    brought: Tensor = x * scale.reshape(shape).to(x.dtype)
    return brought.add_(shift.reshape(shape).to(x.dtype))


def noise_like(inputs: Any, unit: int = 1, most: int | None = None) -> Batch:
    """Noise for each tensor of floating point numbers, as many images as it needs and the model runs on."""
    generator = torch.Generator().manual_seed(0)
    example = Batch.of(inputs)

    def made(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point() or leaf.dim() < 2:
            return leaf
        x = normal_like(leaf, generator, torch.float32)
        return (with_spectrum_of_photos(x) if x.dim() == 4 else x).to(leaf)

    count = min(max(_POSITIONS // _positions(inputs), _LEAST), _MOST)
    return example.resized(most or -(-count // unit) * unit).mapped(made).limited(unit, most)


def _positions(inputs: Any) -> int:
    """Of one channel of one image."""
    shapes = (tensor.shape for tensor in tensors_among(inputs))
    return max(next((shape[2:].numel() for shape in shapes if len(shape) > 1), 1), 1)


def _fitting(images: Batch) -> Batch:
    """As many as may run at once."""
    return images.at_most(max(_AT_ONCE // _positions(images[:1].inputs), _LEAST))


def _added(seen: list[_Sample], x: Tensor) -> _Sample:
    """Take note of what reaches a norm; returns all that has reached it."""
    mean, variance = mean_and_variance(x)
    now = x.numel() // x.shape[1], mean.flatten().double(), variance.flatten().double()
    seen.append(_pooled(seen[-1], now) if seen else now)
    return seen[-1]


def _pooled(a: _Sample, b: _Sample) -> _Sample:
    """Two samples taken together."""
    count = a[0] + b[0]
    share = b[0] / count
    shift = b[1] - a[1]
    return count, a[1] + share * shift, a[2].lerp(b[2], share) + share * (1 - share) * shift.square()
