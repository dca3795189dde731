"""Reconstruction: solve the remaining weights anew so that the pruned net puts out what the dense one does.

Layer by layer in forward order, each layer's weights and bias are fitted by ridge least squares: fed with the *pruned*
net's input it should reproduce the *dense* layer's output. That moves what removed channels carried onto what stays,
and repairs what went wrong upstream. A layer whose output is added to something that is known already (the end of a
residual branch) reproduces the dense *sum*: else the errors of all branches would pile up in the stream, where no
other layer sees them. Norms keep the dense statistics. No labels.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ss_pruning.batches import Batch
from ss_pruning.compensation import IDLE, Outcome, add_bias, norms_behind
from ss_pruning.errors import ModelError
from ss_pruning.hooks import on_input
from ss_pruning.layers import channel_axis, groups_of
from ss_pruning.provenance import call, preserved
from ss_pruning.summing import Others, Sum, find_sums
from ss_pruning.surgery import Plan
from ss_pruning.wiring import Wiring

# Ridge, as a share of the mean diagonal of the Gram matrix; the one that predicts held-out images best is taken.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
# Added to the diagonal, relative to it, where rounding has made the normal equations indefinite.
_ROUNDING = 1e-5
# Patches a layer is fitted on: at most so many, since a few hundred a parameter change nothing any more.
_ROWS = 65536
# Numbers in one chunk of patches.
_CHUNK = 2**25


def reconstruct_(
    pruned: nn.Module,
    dense: nn.Module,
    plan: Plan,
    wiring: Wiring,
    images: Any,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Re-solve every layer of `pruned`, in place and in forward order, to put out what `dense` does.

    Both nets run once, in step, on all images: when a layer of the pruned net is reached, its input there and the
    dense layer's output are at hand, its weights are solved, and the pass goes on with the new ones.

    Args:
        pruned: `dense` with `plan` applied; changed in place.
        dense: The dense model; not changed.
        plan: What was cut.
        wiring: The wiring of `dense`.
        images: One batch of inputs; more is better, a few hundred are enough.
        progress: Called with (layers done, layers in all).
    """
    batch = Batch.of(images)
    if batch.most:
        raise ModelError(
            f"the model runs on no more than {batch.most} inputs at once, and compensation='reconstruct' needs all of "
            "them in one pass; take 'linear', or 'mean'"
        )
    outcome, norms = Outcome(), norms_behind(wiring)
    kept = {cut.path: torch.tensor(cut.kept) for cut in plan.cuts if cut.side == "out"}
    paths = _solvable(pruned, wiring, plan, outcome)
    found = find_sums(dense, batch[: batch.unit].inputs, norms)
    sums = {path: found[path] for path in paths if path in found}
    with (
        _DenseOutputs(dense, paths, sums, batch.inputs) as outputs,
        torch.no_grad(),
        preserved(pruned, training=False),
        Others(pruned, sums) as others,
        contextlib.ExitStack() as hooks,
    ):

        def solve(path: str, module: nn.Module, x: Tensor) -> None:
            target = outputs(path)
            if path in kept:
                target = target.index_select(channel_axis(module, target), kept[path].to(target.device))
            if path in sums:
                target = target - others.take(path)
            weight, bias = _fit(module, x, target)
            module.weight.data.copy_(weight)  # type: ignore[operator]
            add_bias(pruned, path, bias, norms, outcome)
            outcome.layers.append(path)
            progress(len(outcome.layers), len(paths))

        for path in paths:
            hooks.callback(on_input(pruned.get_submodule(path), partial(solve, path)).remove)
        call(pruned, batch.inputs)
    outcome.skipped |= dict.fromkeys((path for path in paths if path not in outcome.layers), IDLE)
    return outcome


def _solvable(pruned: nn.Module, wiring: Wiring, plan: Plan, outcome: Outcome) -> list[str]:
    """Layers behind a cut that run once and whose output is linear in their weight."""
    touched = {cut.path for cut in plan.cuts}
    paths: list[str] = []
    reached = False
    for path, layer in wiring.layers.items():
        module = pruned.get_submodule(path)
        reached = reached or path in touched
        if not reached or layer.kind not in ("synaptic", "depthwise"):
            continue
        if len({feed.call for feed in wiring.feeds[path]}) > 1:
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


class _Stop(BaseException):
    """Ends the dense model's thread."""


class _DenseOutputs:
    """Runs the dense model in a thread that waits at each layer until its output is asked for.

    Only one layer's output is in memory at a time, and the dense model runs once.
    """

    def __init__(self, dense: nn.Module, paths: list[str], sums: Mapping[str, Sum], images: Any) -> None:
        self.dense, self.paths, self.sums, self.images = dense, paths, sums, images
        self.ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
        self.stop = threading.Event()
        self.stack = contextlib.ExitStack()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _DenseOutputs:
        self.stack.enter_context(preserved(self.dense, training=False))
        for path in self.paths:
            handle = self.dense.get_submodule(path).register_forward_hook(self._hook(path))
            self.stack.callback(handle.remove)
        self.others = self.stack.enter_context(Others(self.dense, self.sums))
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()
        self.stack.close()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._put(path, output + self.others.take(path) if path in self.sums else output)

        return hook

    def _put(self, path: str, value: Any) -> None:
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put((path, value), timeout=0.1)
                return
        raise _Stop

    def _run(self) -> None:
        with contextlib.suppress(_Stop):
            try:
                with torch.no_grad():
                    call(self.dense, self.images)
                self._put("the end", None)
            except Exception as error:  # handed to the thread that waits for an output
                self._put("", error)

    def __call__(self, path: str) -> Tensor:
        found, value = self.ready.get()
        if isinstance(value, Exception):
            raise ModelError(f"the model does not run on the calibration images ({value})") from value
        if found != path or not isinstance(value, Tensor):
            raise ModelError(
                f"the layers run in another order on the calibration images: '{found}' before '{path}'"
            )
        return value


def _fit(module: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for which the layer maps `x` to `target` best; ridge towards the weights it has."""
    assert isinstance(module.weight, Tensor)
    gram, cross = _normal_equations(module, x, target)
    groups, d = groups_of(module), gram.shape[-1] - 1
    weight = module.weight.detach()
    start = weight.reshape(groups, -1, d).transpose(1, 2).double()
    bias = torch.zeros(groups, 1, start.shape[2], dtype=torch.float64, device=x.device)
    if isinstance(module.bias, Tensor):
        bias = module.bias.detach().reshape(groups, 1, -1).double()
    start = torch.cat([start, bias], 1)
    fit_gram, fit_cross = gram[0], cross[0]
    errors = []
    for ridge in _RIDGES:
        theta = _solve(fit_gram, fit_cross, start, ridge)
        held_out = (theta * (gram[1] @ theta - 2 * cross[1])).sum()
        errors.append(float(held_out))
    best = _RIDGES[min(range(len(errors)), key=errors.__getitem__)]
    theta = _solve(gram.sum(0), cross.sum(0), start, best)
    new = theta[:, :d].transpose(1, 2).reshape(weight.shape).to(weight)
    return new, (theta[:, d] - start[:, d]).flatten().to(weight)


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


def _normal_equations(module: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of patches and a constant 1, `[2, groups, d + 1, d + 1]`, and with the outputs, `[..., outputs]`.

    The first of the two halves is for fitting (4 of 5 images), the second for choosing the ridge. Sums in float64.
    """
    groups = groups_of(module)
    grams: list[Tensor | float] = [0.0, 0.0]
    crosses: list[Tensor | float] = [0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    for number, (rows, wanted) in enumerate(_patches(module, x, target, generator)):
        part = int(number % 5 == 4)
        p = rows.reshape(len(rows), groups, -1).transpose(0, 1)
        p = torch.cat([p, torch.ones_like(p[..., :1])], 2)
        y = wanted.reshape(len(wanted), groups, -1).transpose(0, 1)
        grams[part] = grams[part] + (p.transpose(1, 2) @ p).double()
        crosses[part] = crosses[part] + (p.transpose(1, 2) @ y).double()
    return torch.stack(_two(grams)), torch.stack(_two(crosses))


def _two(parts: list[Tensor | float]) -> list[Tensor]:
    """With less than five chunks nothing is held out; the fit then judges itself."""
    first, second = parts
    assert isinstance(first, Tensor)
    return [first, second if isinstance(second, Tensor) else first]


def _patches(
    module: nn.Module, x: Tensor, target: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (`[rows, in_channels * taps]`, `[rows, out_channels]`), an even sample of all positions."""
    axis = channel_axis(module, target)
    wanted = target.movedim(axis, -1)
    if isinstance(module, nn.Linear):
        rows, y = x.reshape(-1, x.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        index = torch.randperm(len(rows), generator=generator)[:_ROWS].to(x.device)
        for part in index.chunk(5):
            yield rows[part].float(), y[part].float()
        return
    assert isinstance(module, _ConvNd)
    wanted = wanted.reshape(len(target), -1, wanted.shape[-1])
    positions = wanted.shape[1]
    each = min(positions, max(1, -(-_ROWS // len(x))))
    count = max(1, min(-(-len(x) // 5), _CHUNK // max(each * module.in_channels * _taps(module), 1)))
    for begin in range(0, len(x), count):
        where = torch.randperm(positions, generator=generator)[:each].to(x.device)
        rows = _columns(module, x[begin : begin + count], where)
        yield rows.float(), wanted[begin : begin + count, where].reshape(-1, wanted.shape[-1]).float()


def _taps(conv: _ConvNd) -> int:
    return conv.weight[0, 0].numel()


def _columns(conv: _ConvNd, x: Tensor, where: Tensor) -> Tensor:
    """Patches at the output positions `where` as the convolution sees them, `[rows, in_channels * taps]`."""
    if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return _plain_columns(conv, x, where)
    # Any other padding: let the layer itself lay out its patches, one channel at a time, with one-hot kernels.
    taps = _taps(conv)
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
