"""Reconstruction: solve the remaining weights anew so that the pruned model puts out what the dense one does.

Layer by layer in forward order, each layer's weights and bias are fitted by ridge least squares: fed with the *pruned*
model's input it should reproduce the *dense* layer's output. That moves what removed channels carried onto what stays,
and repairs what went wrong upstream. A layer whose output is added to something that is known already (the end of a
residual branch) reproduces the dense *sum*: else the errors of all branches would pile up in the stream, where no
other layer sees them. Norms keep the dense statistics. No labels.

What the dense layers put out is kept at sampled positions, for as many layers as the memory set aside holds. The dense
model runs once more for those that do not fit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.hooks import on_input
from ss_pruning._utils.running import call, preserved
from ss_pruning.compensation.folding import IDLE, REGISTERED, Outcome, add_bias, norms_behind
from ss_pruning.compensation.residual_sums import Others, Sum, find_sums
from ss_pruning.errors import ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import channel_axis, groups_of
from ss_pruning.importance.calibration import Batch
from ss_pruning.registry import layer_type_of
from ss_pruning.surgery.plan import Plan

# Ridge, as a share of the mean diagonal of the Gram matrix: the one that predicts held-out images best, or the first
# where there is nothing to hold out.
_RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
# Added to the diagonal, relative to it, where rounding has made the normal equations indefinite.
_ROUNDING = 1e-5
# Of so many images (or positions of a single one) one chooses the ridge, and is not fitted on.
_HELD_OUT = 5
# Patches a layer is fitted on: at most so many, since a few hundred a parameter change nothing any more.
_ROWS = 65536
# Numbers in one chunk of patches, and in the rows of dense layers that are kept at a time.
_CHUNK, _KEPT = 2**25, 2**28


def reconstruct_(
    pruned: nn.Module,
    dense: nn.Module,
    plan: Plan,
    connectivity: Connectivity,
    images: Any,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Re-solve every layer of `pruned`, in place and in forward order, to put out what `dense` does.

    The pruned model runs once on all images: when a layer is reached, its input there and the dense layer's output are
    at hand, its weights are solved, and the pass goes on with the new ones.

    Args:
        pruned: `dense` with `plan` applied; changed in place.
        dense: The dense model; not changed.
        plan: What was cut.
        connectivity: The connectivity of `dense`.
        images: One batch of inputs; more is better, a few hundred are enough.
        progress: Called with (layers done, layers in all).
    """
    batch = Batch.of(images)
    if batch.most:
        raise ModelError(
            f"the model runs on no more than {batch.most} inputs at once, and compensation='reconstruct' needs all of "
            "them in one pass; take 'linear', or 'mean'"
        )
    outcome, norms = Outcome(), norms_behind(connectivity)
    kept = {cut.path: torch.tensor(cut.kept) for cut in plan.cuts if cut.side == "out"}
    paths = _solvable(pruned, connectivity, plan, outcome)
    found = find_sums(dense, batch[: batch.unit].inputs, norms)
    sums = {path: found[path] for path in paths if path in found}
    dense_rows = _DenseRows(dense, paths, sums, batch.inputs)

    def solve(others: Others, path: str, module: nn.Module, x: Tensor) -> None:
        wanted, other = dense_rows.take(path), others.take(path) if path in sums else None
        with torch.autocast(x.device.type, enabled=False):  # sums of many rows
            weight, bias = _fit(module, x, wanted, kept.get(path), other)
        module.weight.data.copy_(weight)  # type: ignore[operator]
        add_bias(pruned, path, bias, norms, outcome)
        outcome.layers.append(path)
        progress(len(outcome.layers), len(paths))

    with (
        torch.no_grad(),
        preserved(pruned, training=False, but=map(pruned.get_submodule, connectivity.layers)),
        Others(pruned, sums) as others,
        contextlib.ExitStack() as hooks,
    ):
        for path in paths:
            hook = partial(solve, others, path)
            hooks.callback(on_input(pruned.get_submodule(path), hook).remove)
        call(pruned, batch.inputs)
    outcome.skipped |= dict.fromkeys((path for path in paths if path not in outcome.layers), IDLE)
    return outcome


def _solvable(pruned: nn.Module, connectivity: Connectivity, plan: Plan, outcome: Outcome) -> list[str]:
    """Layers behind a cut that run once and whose output is linear in their weight."""
    touched = {cut.path for cut in plan.cuts}
    paths: list[str] = []
    reached = False
    for path, layer in connectivity.layers.items():
        module = pruned.get_submodule(path)
        reached = reached or path in touched
        if not reached or layer.kind not in ("synaptic", "depthwise"):
            continue
        if layer_type_of(module) is not None:
            outcome.skipped[path] = REGISTERED
            continue
        if len({edge.call for edge in connectivity.edges[path]}) > 1:
            outcome.skipped[path] = "it runs several times"
        elif isinstance(module, _ConvNd) and module.transposed:
            outcome.skipped[path] = "transposed convolutions are not solved"
        elif hasattr(module, "parametrizations") or not _is_linear_in_weight(module):
            outcome.skipped[path] = "its output is not linear in its weight"
        else:
            paths.append(path)
    return paths


def _is_linear_in_weight(module: nn.Module) -> bool:
    """Plain torch layers are; of a subclass, see whether a doubled weight doubles the output."""
    if type(module).__module__.startswith("torch.nn."):
        return True
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Linear):
        x = torch.ones(1, module.in_features, dtype=weight.dtype, device=weight.device)
    elif isinstance(module, _ConvNd):
        x = torch.ones(1, module.in_channels, *[16] * len(module.kernel_size), dtype=weight.dtype).to(
            weight.device
        )
    else:
        return False
    zero = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
    with torch.no_grad():
        once = torch.func.functional_call(module, {"weight": weight, **zero}, (x,))
        twice = torch.func.functional_call(module, {"weight": 2 * weight, **zero}, (x,))
    return torch.allclose(2 * once, twice, rtol=1e-3, atol=1e-6)


class _Full(BaseException):
    """Ends a run of the dense model."""


@dataclass(frozen=True)
class _Chunk:
    """Some images and some positions of what a layer puts out, `[images, positions, channels]`.

    Attributes:
        images: Which images.
        positions: `[positions]`.
        held_out: `[images * positions]`, true of rows that choose the ridge.
    """

    images: slice
    positions: Tensor
    held_out: Tensor

    def of(self, x: Tensor) -> Tensor:
        """`[images * positions, channels]` of `[images, positions, channels]`."""
        return x[self.images].index_select(1, self.positions).flatten(0, 1)


#: An even sample of what a layer puts out, chunk by chunk with its rows.
_Sample = list[tuple[_Chunk, Tensor]]


@dataclass
class _DenseRows:
    """Samples of what dense layers put out; holds those of the next layers, as many as memory is set aside for."""

    dense: nn.Module
    paths: Sequence[str]
    sums: Mapping[str, Sum]
    images: Any
    held: dict[str, _Sample] = field(default_factory=dict)

    def take(self, path: str) -> _Sample:
        """Of one layer; each can be taken once.

        Raises:
            ModelError: It does not run in the dense model.
        """
        if path not in self.held:
            self.held.clear()
            self._run(self.paths[self.paths.index(path) :])
        if path not in self.held:
            raise ModelError(f"'{path}' does not run in the dense model on the calibration images")
        return self.held.pop(path)

    def _run(self, paths: Sequence[str]) -> None:
        """Keep samples of the first of these layers that fit, and of one at least."""
        left = _KEPT

        def keep(others: Others, path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal left
            if path in self.sums:
                output = output + others.take(path)
            sample = _sample(module, output)
            left -= sum(rows.numel() for _, rows in sample)
            if self.held and left < 0:
                raise _Full
            self.held[path] = sample

        with (
            torch.no_grad(),
            preserved(self.dense, training=False),
            Others(self.dense, self.sums) as others,
            contextlib.ExitStack() as hooks,
        ):
            for path in paths:
                hook = partial(keep, others, path)
                hooks.callback(self.dense.get_submodule(path).register_forward_hook(hook).remove)
            with contextlib.suppress(_Full):
                call(self.dense, self.images)


def _sample(module: nn.Module, output: Tensor) -> _Sample:
    """An even sample of all positions, other ones in each fifth of the images."""
    assert isinstance(module.weight, Tensor)
    rows = _by_position(module, output)
    n, positions = rows.shape[:2]
    each = min(positions, max(1, -(-_ROWS // n)))
    reads = module.weight[0].numel() * groups_of(module)
    count = max(1, min(-(-n // 5), _CHUNK // max(each * reads, 1)))
    generator = torch.Generator().manual_seed(0)
    chunks = []
    for begin in range(0, n, count):
        where = torch.randperm(positions, generator=generator)[:each]
        images = torch.arange(begin, min(begin + count, n))
        number = torch.arange(each) if n == 1 else images.repeat_interleave(each)
        held_out = (number % _HELD_OUT == 1).to(output.device)
        chunks.append(_Chunk(slice(begin, begin + count), where.to(output.device), held_out))
    return [(chunk, chunk.of(rows)) for chunk in chunks]


def _by_position(module: nn.Module, output: Tensor) -> Tensor:
    """What a layer puts out as `[images, positions, channels]`; without an axis of images it is one."""
    rows = _batch(module, output)
    rows = rows.movedim(channel_axis(module, rows), -1)
    return rows.reshape(len(rows), -1, rows.shape[-1])


def _batch(module: nn.Module, x: Tensor) -> Tensor:
    """With an axis of images."""
    return x[None] if channel_axis(module, x) == 0 else x


def _fit(
    module: nn.Module, x: Tensor, wanted: _Sample, kept: Tensor | None, other: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias for which the layer best makes what is wanted of `x`; ridge towards the weights it has.

    Args:
        module: The layer.
        x: What it reads.
        wanted: What the dense layer puts out, and adds to.
        kept: Those of its channels that are left; None for all.
        other: What the layer adds to, to be subtracted from what is wanted.
    """
    assert isinstance(module.weight, Tensor)
    gram, cross = _normal_equations(module, x, _targets(module, wanted, kept, other))
    groups, d = groups_of(module), gram.shape[-1] - 1
    weight = module.weight.detach()
    start = weight.reshape(groups, -1, d).transpose(1, 2).double()
    bias = torch.zeros(groups, 1, start.shape[2], dtype=torch.float64, device=x.device)
    if isinstance(module.bias, Tensor):
        bias = module.bias.detach().reshape(groups, 1, -1).double()
    start = torch.cat([start, bias], 1)

    def held_out(ridge: float) -> float:
        theta = _solve(gram[0], cross[0], start, ridge)
        return float((theta * (gram[1] @ theta - 2 * cross[1])).sum())

    theta = _solve(gram.sum(0), cross.sum(0), start, min(_RIDGES, key=held_out))
    new = theta[:, :d].transpose(1, 2).reshape(weight.shape).to(weight)
    return new, (theta[:, d] - start[:, d]).flatten().to(weight)


def _targets(
    module: nn.Module, wanted: _Sample, kept: Tensor | None, other: Tensor | None
) -> Iterator[tuple[_Chunk, Tensor]]:
    """What the layer shall put out, chunk by chunk."""
    others = None if other is None else _by_position(module, other)
    for chunk, rows in wanted:
        y = rows if kept is None else rows.index_select(1, kept.to(rows.device))
        yield chunk, y.float() if others is None else y.float() - chunk.of(others).float()


def _solve(gram: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor:
    """`argmin |P t - y|^2 + ridge mean(diag) |t - start|^2`, the last row (the bias) left free."""
    d = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(1, keepdim=True).clamp_min(1e-12)
    penalty = torch.cat([ridge * diagonal.expand(-1, d - 1), 1e-9 * diagonal], 1)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(penalty))
    if bool(failed.any()):
        # Inputs that hardly vary say the same as the bias, to within the rounding of sums in single precision.
        penalty = penalty + _ROUNDING * gram.diagonal(dim1=-2, dim2=-1)
        factor = torch.linalg.cholesky(gram + torch.diag_embed(penalty))
    return start + torch.cholesky_solve(cross - gram @ start, factor)


def _normal_equations(
    module: nn.Module, x: Tensor, targets: Iterator[tuple[_Chunk, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Gram matrices of patches and a constant 1, `[2, groups, d + 1, d + 1]`, and with the outputs, `[..., outputs]`.

    The first of the two is for fitting, the second of what is held out. Sums in float64.
    """
    assert isinstance(module.weight, Tensor)
    groups, outputs, x = groups_of(module), len(module.weight), _batch(module, x)
    size = module.weight[0].numel() + 1
    gram = torch.zeros(2, groups, size, size, dtype=torch.float64, device=x.device)
    cross = torch.zeros(2, groups, size, outputs // groups, dtype=torch.float64, device=x.device)
    for chunk, wanted in targets:
        patches = _columns(module, x[chunk.images], chunk.positions).float()
        for part, chosen in enumerate((~chunk.held_out, chunk.held_out)):
            p = patches[chosen].unflatten(1, (groups, -1)).transpose(0, 1)
            p = torch.cat([p, torch.ones_like(p[..., :1])], 2)
            y = wanted[chosen].unflatten(1, (groups, -1)).transpose(0, 1)
            gram[part] += p.transpose(1, 2) @ p
            cross[part] += p.transpose(1, 2) @ y
    return gram, cross


def _columns(module: nn.Module, x: Tensor, where: Tensor) -> Tensor:
    """What the layer sees at the output positions `where`, `[rows, in_channels * taps]`."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).index_select(1, where).flatten(0, 1)
    assert isinstance(module, _ConvNd)
    return _convolved(module, x, where)


def _convolved(conv: _ConvNd, x: Tensor, where: Tensor) -> Tensor:
    if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return _plain_columns(conv, x, where)
    # Any other padding: let the layer itself lay out its patches, one channel at a time, with one-hot kernels.
    taps = conv.weight[0, 0].numel()
    probe = copy.copy(conv)
    probe.__dict__ = dict(conv.__dict__)
    eye = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *conv.kernel_size)
    n, channels = x.shape[:2]
    probe._parameters = {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
    probe.groups, probe.in_channels, probe.out_channels = 1, 1, taps
    out = probe.forward(x.reshape(n * channels, 1, *x.shape[2:]))
    columns: Tensor = out.reshape(n, channels * taps, -1)[:, :, where]
    return columns.transpose(1, 2).reshape(-1, channels * taps)


def _plain_columns(conv: nn.Conv2d, x: Tensor, where: Tensor) -> Tensor:
    """Gathers the patches that are asked for, and no others."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    ph, pw = (int(p) for p in conv.padding)
    x = F.pad(x, (pw, pw, ph, ph))
    width = x.shape[3]
    across = (width - dw * (kw - 1) - 1) // sw + 1
    corner = (where // across) * sh * width + (where % across) * sw
    rows, columns = torch.arange(kh, device=x.device) * dh, torch.arange(kw, device=x.device) * dw
    offsets = (rows[:, None] * width + columns).flatten()
    index = (corner[:, None] + offsets).flatten()
    patches = x.flatten(2).index_select(2, index).reshape(*x.shape[:2], len(where), -1)
    return patches.transpose(1, 2).reshape(len(x) * len(where), -1)
