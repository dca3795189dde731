"""The normal equations of a layer: what it reads, against what it shall put out, summed over rows batch by batch.

A row is what the layer sees at one position of one image. Rows wait until there are many; their products are taken in
single precision, and summed in double precision.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning.graph.layers import ask, channel_axis, groups_of, weight_of
from ss_pruning.importance.regression import weights_by_group

# Ridge, as a share of the mean diagonal of the Gram matrix: the one that predicts held-out images best, or the first
# where there is nothing to hold out.
_RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
# Added to the diagonal, relative to it, where rounding has made the normal equations indefinite; ten times as much if
# that does not do.
_ROUNDING = (1e-5, 1e-4, 1e-3, 1e-2)
# A layer that differs from its weighted sum by this share of its root mean square puts out something else; less may be
# the rounding of a GPU (TF32).
_SAME = 1e-2
# Numbers in rows that are multiplied at a time: of few the sums cost more than the products. Columns of a Gram matrix
# that are made at a time: half of it follows from the other.
_CHUNK, _COLUMNS = 2**22, 256


class NormalEquations:
    """Gram matrices of rows and a constant 1, and their products with the outputs.

    Attributes:
        gram: `[2, groups, d + 1, d + 1]`; the first of the two is for fitting, the second of what is held out. Their
            upper halves, of what does not wait, see `sums`.
        cross: `[2, groups, d + 1, outputs of a group]`.
        parameters: Of one output, `d + 1`.
        rows: How many were added.
        waiting: By part, rows `[groups, rows, d]` and what they shall give, to be multiplied at once.
    """

    def __init__(self, module: nn.Module) -> None:
        weight = weights_by_group(module)
        self.module, self.groups, self.rows = module, len(weight), 0
        self.parameters = size = weight[0, 0].numel() + 1
        self.gram = weight.new_zeros(2, self.groups, size, size, dtype=torch.float64)
        self.cross = weight.new_zeros(2, self.groups, size, weight.shape[1], dtype=torch.float64)
        self.waiting: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    def add(
        self, x: Tensor, wanted: Tensor, positions: Tensor, held_out: bool, size: Sequence[int] = ()
    ) -> None:
        """Rows of some images.

        Args:
            x: What the layer reads, with an axis of images.
            wanted: `[images, positions, outputs]`.
            positions: Of the output, as if it were flat.
            held_out: Whether these rows choose the ridge.
            size: Of the output's map, of a transposed convolution, which may be told it.
        """
        if not len(x) * len(positions):
            return
        self.rows += len(x) * len(positions)
        numbers = len(positions) * self.groups * self.parameters
        count = max(_CHUNK // max(numbers, 1), 1)
        with torch.autocast(x.device.type, enabled=False):
            for images, targets in zip(x.split(count), wanted.split(count), strict=True):
                y = targets.float().flatten(0, 1).unflatten(1, (self.groups, -1)).transpose(0, 1)
                rows = rows_at(self.module, images, positions, size).float()
                self.waiting[held_out].append((rows, y))
                if sum(each.numel() for each, _ in self.waiting[held_out]) >= _CHUNK:
                    self._multiply(int(held_out))

    def sums(self) -> tuple[Tensor, Tensor]:
        """Gram matrices and products with the outputs, of all that was added."""
        for part, waiting in enumerate(self.waiting):
            if waiting:
                self._multiply(part)
        return self.gram, self.cross

    def _multiply(self, part: int) -> None:
        """Add what waits to the sums."""
        rows, y = (torch.cat(each, 1) for each in zip(*self.waiting[part], strict=True))
        self.waiting[part].clear()
        with torch.autocast(rows.device.type, enabled=False):
            self._sum(rows, y, part)

    def _sum(self, rows: Tensor, y: Tensor, part: int) -> None:
        gram, cross = self.gram[part], self.cross[part]
        y = torch.cat([y, torch.ones_like(y[..., :1])], 2)
        transposed, d = rows.transpose(1, 2), self.parameters - 1
        for begin in range(0, d, _COLUMNS):
            chosen = slice(begin, min(begin + _COLUMNS, d))
            gram[:, chosen, begin:d] += transposed[:, chosen] @ rows[:, :, begin:]
        products = transposed @ y
        cross[:, :d] += products[..., :-1]
        cross[:, d] += y[..., :-1].sum(1)
        gram[:, :d, d] += products[..., -1]
        gram[:, d, d] += rows.shape[1]

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight by group, and change of the bias, that put out what is wanted best; ridge towards those there are."""
        bias = self.module.bias
        grams, crosses = self.sums()
        _mirror_(grams)
        d = self.parameters - 1
        by_group = weights_by_group(self.module)
        start = _taps_first(by_group.double())
        old = start.new_zeros(start.shape[::2]) if bias is None else bias.detach().double()  # type: ignore[operator]
        start = torch.cat([start, old.reshape(self.groups, 1, -1)], 1)
        fitted, judged = (cross - gram @ start for gram, cross in zip(grams, crosses, strict=True))
        ridge = _best_ridge(grams, fitted, judged)
        theta = start + change(grams[0].add_(grams[1]), fitted + judged, ridge)
        new = theta[:, :d].unflatten(1, (-1, by_group.shape[2])).permute(0, 3, 2, 1).reshape(by_group.shape)
        return new.to(by_group), (theta[:, d] - start[:, d]).flatten().to(by_group)


def _taps_first(by_group: Tensor) -> Tensor:
    """`[groups, taps * inputs of a group, outputs of a group]`, as rows are laid out."""
    return by_group.flatten(3).permute(0, 3, 2, 1).flatten(1, 2) if by_group.dim() > 3 else by_group.mT


def _mirror_(gram: Tensor) -> None:
    """Write the upper half into the lower one, some columns at a time."""
    for begin in range(0, gram.shape[-1], _COLUMNS):
        chosen = slice(begin, begin + _COLUMNS)
        square = gram[..., chosen, chosen]
        square.copy_(square.triu() + square.triu(1).mT)
        gram[..., begin + _COLUMNS :, chosen] = gram[..., chosen, begin + _COLUMNS :].mT


def _best_ridge(gram: Tensor, fitted: Tensor, judged: Tensor) -> float:
    """By the error on what is held out: from the largest on, as long as the next one is better.

    Args:
        gram: `[2, groups, d + 1, d + 1]`, of what is fitted and of what is held out.
        fitted: `[groups, d + 1, outputs]`, what the old weights leave, as products with the rows that are fitted.
        judged: The same with those that are held out.
    """
    if not bool(gram[1, :, -1, -1].any()):
        return _RIDGES[0]

    def held_out(ridge: float) -> float:
        delta = change(gram[0], fitted, ridge)
        return float((delta * (gram[1] @ delta - 2 * judged)).sum())

    best, least = _RIDGES[0], held_out(_RIDGES[0])
    for ridge in _RIDGES[1:]:
        if (error := held_out(ridge)) >= least:
            break
        best, least = ridge, error
    return best


def change(gram: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """`argmin |P t - r|^2 + ridge mean(diag) |t|^2` with `residual = P' r`; the last row, the bias, is free.

    What is not finite leads to NaN.

    Args:
        gram: `P' P`, `[groups, d + 1, d + 1]`.
        residual: `[groups, d + 1, outputs]`.
        ridge: As a share of the mean diagonal.
    """
    d = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal[:, :-1].mean(1, keepdim=True).clamp_min(1e-12)
    penalty = torch.cat([ridge * scale.expand(-1, d - 1), 1e-9 * scale], 1)
    factor, failed = torch.linalg.cholesky_ex(_with_diagonal(gram, penalty))
    for share in _ROUNDING:
        if not bool(failed.any()):
            return torch.cholesky_solve(residual, factor)
        # Inputs that hardly vary say the same as the bias, to within the rounding of sums in single precision.
        factor, failed = torch.linalg.cholesky_ex(_with_diagonal(gram, penalty + share * diagonal))
    found = torch.cholesky_solve(residual, factor)
    return torch.full_like(found, torch.nan) if bool(failed.any()) else found


def _with_diagonal(gram: Tensor, added: Tensor) -> Tensor:
    made = gram.clone()
    made.diagonal(dim1=-2, dim2=-1).add_(added)
    return made


def is_weighted_sum(module: nn.Module) -> bool:
    """Whether a layer puts out its weight times what it reads, plus its bias; one that it is given if it has none.

    Layers of torch's own types do, unless a weight or bias is computed anew. The others are asked, with numbers drawn
    at random: a subclass may scale, standardise or leave the bias out.
    """
    if not module._parameters.keys() >= {"weight", "bias"}:
        return False
    if type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module):
        return True
    try:
        return _puts_out_rows(module)
    except Exception:  # takes something else than one tensor
        return False


def _puts_out_rows(module: nn.Module) -> bool:
    """In single precision, whatever the layer's is."""
    like, drawn = weight_of(module), torch.Generator().manual_seed(0)

    def made(*size: int) -> Tensor:
        return torch.randn(size, generator=drawn).to(like.device)

    weight = made(*like.shape)
    by_group = weights_by_group(module, weight)
    bias = made(by_group.shape[:2].numel()) * by_group[0, 0].numel() ** 0.5  # as much as the rest
    if isinstance(module, _ConvNd):
        seen = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        # Few positions: rows take memory.
        x = made(1, module.in_channels, *(d * (k - 1) + s + 2 for k, d, s in seen))
    else:
        x = made(1, like.shape[1])
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        y = ask(module, {"weight": weight, "bias": bias}, x)
        positions = torch.arange(positions_of(module, y), device=like.device)
        ones, rows = (rows_at(module, each, positions, y.shape[2:]) for each in (torch.ones_like(x), x))
        found = (rows @ _taps_first(by_group)).transpose(0, 1).flatten(1) + bias
    unscaled = bool((ones.eq(0) | ones.eq(1)).all())  # a tap sees what is there, or padding
    off = outputs_at(module, y, positions)[0] - found
    return unscaled and bool(off.abs().max() <= _SAME * found.square().mean().sqrt())


def outputs_at(module: nn.Module, y: Tensor, positions: Tensor) -> Tensor:
    """`[images, positions, outputs]`: what a layer puts out, with an axis of images, at some positions."""
    last = y.movedim(channel_axis(module, y), -1)
    return last.reshape(len(y), -1, last.shape[-1]).index_select(1, positions)


def positions_of(module: nn.Module, y: Tensor) -> int:
    """How many positions an image has in what a layer puts out, with an axis of images."""
    return y.numel() // max(len(y) * y.shape[channel_axis(module, y)], 1)


def with_images(module: nn.Module, x: Tensor) -> Tensor:
    """With an axis of images, where a layer was called without."""
    return x[None] if channel_axis(module, x) == 0 else x


def rows_at(module: nn.Module, x: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """`[groups, rows, taps * in_channels of a group]`: what a layer sees at these positions of its output.

    Args:
        module: The layer.
        x: What it reads, with an axis of images.
        positions: Of its output, as if it were flat.
        size: Of the output's map; transposed convolutions are told it when they run.
    """
    if isinstance(module, nn.Linear):
        return outputs_at(module, x, positions).flatten(0, 1)[None]
    assert isinstance(module, _ConvNd)
    if type(module) is nn.ConvTranspose2d:
        patches = _stretched_patches(module, x, positions, size)
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        patches = _plain_patches(module, x, positions)
    else:
        patches = _patches(module, x, positions, size)
    by_group: Tensor = patches.unflatten(3, (groups_of(module), -1)).permute(3, 0, 1, 2, 4)
    return by_group.flatten(3).flatten(1, 2)


def _patches(conv: _ConvNd, x: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """`[images, positions, taps, in_channels]`, laid out by the layer itself, channel by channel, one-hot kernels."""
    taps = conv.weight[0, 0].numel()
    probe = copy.copy(conv)
    probe.__dict__ = dict(conv.__dict__)
    channels = (1, taps) if conv.transposed else (taps, 1)
    eye = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(*channels, *conv.kernel_size)
    probe._parameters = {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
    probe.groups, probe.in_channels, probe.out_channels = 1, 1, taps
    told = (list(size),) if conv.transposed else ()
    out: Tensor = type(probe).forward(probe, x.flatten(0, 1)[:, None], *told)
    laid: Tensor = out.unflatten(0, x.shape[:2])
    return laid.flatten(3)[..., positions].permute(0, 3, 2, 1)


def _plain_patches(conv: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Likewise: gathers the patches that are asked for, and no others, all channels of a tap at once."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    ph, pw = (int(p) for p in conv.padding)
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, height + 2 * ph, width + 2 * pw, channels)
    padded[:, ph : ph + height, pw : pw + width] = x.permute(0, 2, 3, 1)
    across = (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1
    corner = (positions // across) * sh * padded.shape[2] + (positions % across) * sw
    rows, columns = torch.arange(kh, device=x.device) * dh, torch.arange(kw, device=x.device) * dw
    return _gathered(padded, corner, rows, columns)


def _stretched_patches(conv: nn.ConvTranspose2d, x: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """Likewise: it is a convolution by the turned kernel of the map stretched by the stride, with zeros between."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = (
        cast("tuple[int, int]", each) for each in (conv.kernel_size, conv.stride, conv.dilation, conv.padding)
    )
    high, wide = dh * (kh - 1), dw * (kw - 1)
    stretched = x.new_zeros(*x.shape[:2], (x.shape[2] - 1) * sh + 1, (x.shape[3] - 1) * sw + 1)
    stretched[..., ::sh, ::sw] = x
    # What is negative is cropped.
    padding = (wide - pw, size[1] + pw - stretched.shape[3], high - ph, size[0] + ph - stretched.shape[2])
    maps = nn.functional.pad(stretched, padding).permute(0, 2, 3, 1)
    corner = (positions // size[1]) * maps.shape[2] + positions % size[1]
    rows = high - torch.arange(kh, device=x.device) * dh
    return _gathered(maps, corner, rows, wide - torch.arange(kw, device=x.device) * dw)


def _gathered(maps: Tensor, corner: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`[images, positions, taps, channels]` of `[images, height, width, channels]`, taps this far from corners."""
    index = corner[:, None] + (rows[:, None] * maps.shape[2] + columns).flatten()
    gathered: Tensor = maps.flatten(1, 2).index_select(1, index.flatten()).unflatten(1, index.shape)
    return gathered
