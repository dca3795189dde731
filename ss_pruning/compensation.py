"""Compensated surgery: what removed channels carried is moved onto what stays, in closed form and without labels.

Three methods, each for any importance:

* **mean**: what a removed channel carries on average becomes part of the consumer's bias. No data needed.
* **linear**: removed channels are regressed on the kept ones over calibration pixels, `x_r ~ A x_k + b`, and folded:
  `W[:, k] += W[:, r] A`. Exact if the removed channels are linear in the kept ones.
* **reconstruct**: layer by layer in forward order, the remaining weights and bias are solved anew by ridge least
  squares, so that on the *pruned* net's inputs the layer puts out what the *dense* one does. Also repairs what went
  wrong upstream. Norms keep the dense statistics.

A constant folded through a zero-padded convolution is exact inside and wrong at the border, where part of the kernel
sees padding: `mean` and `linear` are exact for 1x1 kernels, padding 0, linear layers, or constants of 0; `Inexact`
names the other layers. `reconstruct` fits with the padding as it is.

A bias that a layer does not have goes into the running mean of the norm behind it; where there is none, the layer
gets a bias, and the plan says so.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from ss_pruning.errors import InputError, ModelError
from ss_pruning.layers import channel_axis, groups_of, kind_of
from ss_pruning.provenance import Wiring, call, preserved
from ss_pruning.surgery import Plan

Method = Literal["none", "mean", "linear", "reconstruct"]
METHODS: tuple[Method, ...] = ("none", "mean", "linear", "reconstruct")

# Ridge, as a share of the mean diagonal of the Gram matrix; the one that predicts held-out images best is taken.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
# Patches a layer is fitted on: at most so many, since a few hundred a parameter change nothing any more.
_ROWS = 65536
_CHUNK = 2**25


@dataclass
class Outcome:
    """What a compensation did.

    Attributes:
        layers: Paths of the layers that were changed.
        inexact: Layers where a constant went through a zero-padded kernel, and is wrong at the border.
        skipped: Layers that could not be compensated, with the reason.
        biases: Layers that got a bias.
    """

    layers: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)


def gather_batches(calibration: Any, most: int = 1024) -> Any:
    """One input from calibration batches: tensors are joined along the batch, up to `most` samples.

    Args:
        calibration: A tensor, or an iterable of tensors or of tuples that start with one (a data loader).
        most: Take no more samples than this.

    Raises:
        InputError: Nothing is there, or batches are no tensors.
    """
    if isinstance(calibration, Tensor):
        return calibration[:most]
    parts: list[Tensor] = []
    count = 0
    for batch in calibration:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not isinstance(x, Tensor):
            raise InputError(f"a calibration batch is a {type(x).__name__}; give tensors or tuples that start with one")
        parts.append(x)
        count += len(x)
        if count >= most:
            break
    if not parts:
        raise InputError("the calibration batches are empty")
    return torch.cat(parts)[:most]


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
    outcome = Outcome()
    kept = {cut.path: cut.kept for cut in plan.cuts if cut.side == "out"}
    paths = _solvable(pruned, wiring, plan, outcome)
    modules = {pruned.get_submodule(path): path for path in paths}
    norms = _norms_behind(wiring)
    with _outputs_of(dense, paths, images) as outputs, torch.no_grad(), preserved(pruned, training=False):

        def solve(module: nn.Module, args: tuple[Any, ...]) -> None:
            path = modules[module]
            target = outputs(path)
            if path in kept:
                index = torch.tensor(kept[path], device=target.device)
                target = target.index_select(channel_axis(module, target), index)
            weight, bias = _fit(module, args[0], target)
            module.weight.copy_(weight)  # type: ignore[operator]
            _add_bias(pruned, path, bias, norms, outcome)
            outcome.layers.append(path)
            progress(len(outcome.layers), len(paths))

        handles = [module.register_forward_pre_hook(solve) for module in modules]
        try:
            call(pruned, images)
        finally:
            for handle in handles:
                handle.remove()
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
        x = torch.ones(1, module.in_channels, *[16] * len(module.kernel_size), dtype=weight.dtype).to(weight.device)
    else:
        return False
    zero = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
    with torch.no_grad():
        once = torch.func.functional_call(module, {"weight": weight, **zero}, (x,))
        twice = torch.func.functional_call(module, {"weight": 2 * weight, **zero}, (x,))
    return torch.allclose(2 * once, twice, rtol=1e-3, atol=1e-6)


@contextlib.contextmanager
def _outputs_of(dense: nn.Module, paths: list[str], images: Any) -> Iterator[Callable[[str], Tensor]]:
    """Runs `dense` in a thread that stops at each layer until its output is asked for."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    class Stopped(Exception):
        pass

    def put(path: str, value: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((path, value), timeout=0.1)
                return
        raise Stopped

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, output: put(path, output)

    def run() -> None:
        try:
            with torch.no_grad():
                call(dense, images)
        except Stopped:
            pass
        except BaseException as error:  # handed to the thread that waits for an output
            with contextlib.suppress(Stopped):
                put("", error)

    def get(path: str) -> Tensor:
        while True:
            try:
                found, value = ready.get(timeout=1.0)
            except queue.Empty:
                if not thread.is_alive():
                    raise ModelError(f"the dense model did not reach '{path}' on the calibration images") from None
                continue
            if isinstance(value, BaseException):
                raise ModelError(f"the model does not run on the calibration images ({value})") from value
            if found != path:
                raise ModelError(f"the layers run in another order on the calibration images ('{found}', '{path}')")
            return value

    with preserved(dense, training=False):
        handles = [dense.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
        thread = threading.Thread(target=run, daemon=True)
        try:
            thread.start()
            yield get
        finally:
            stop.set()
            thread.join()
            for handle in handles:
                handle.remove()


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
    factor = torch.linalg.cholesky(gram + torch.diag_embed(penalty))
    return start + torch.cholesky_solve(cross - gram @ start, factor)


def _normal_equations(module: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices `[2, groups, d + 1, d + 1]` of patches and a constant 1, and `[2, groups, d + 1, outputs / groups]`.

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
        for part in index.chunk(max(5, 1)):
            yield rows[part].float(), y[part].float()
        return
    assert isinstance(module, _ConvNd)
    wanted = wanted.reshape(len(target), -1, wanted.shape[-1])
    positions = wanted.shape[1]
    each = min(positions, max(1, -(-_ROWS // len(x))))
    width = module.in_channels * module.weight[0, 0].numel() * positions
    count = max(1, min(-(-len(x) // 5), _CHUNK // max(width, 1)))
    for begin in range(0, len(x), count):
        columns = _columns(module, x[begin : begin + count])
        where = torch.randperm(positions, generator=generator)[:each].to(x.device)
        rows = columns[:, :, where].transpose(1, 2).reshape(-1, columns.shape[1])
        yield rows.float(), wanted[begin : begin + count, where].reshape(-1, wanted.shape[-1]).float()


def _columns(conv: _ConvNd, x: Tensor) -> Tensor:
    """Patches as the convolution sees them, `[images, in_channels * taps, positions]`."""
    if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    # Any other padding: let the layer itself lay out its patches, one channel at a time, with one-hot kernels.
    taps = conv.weight[0, 0].numel()
    probe = copy.copy(conv)
    probe.__dict__ = dict(conv.__dict__)
    eye = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *conv.kernel_size)
    n, channels = x.shape[:2]
    probe._parameters = {"weight": nn.Parameter(eye, requires_grad=False), "bias": None}
    probe.groups, probe.in_channels, probe.out_channels = 1, 1, taps
    out = probe.forward(x.reshape(n * channels, 1, *x.shape[2:]))
    return out.reshape(n, channels * taps, -1)


def _norms_behind(wiring: Wiring) -> dict[str, str]:
    """By layer: the norm that reads its output channel by channel, if nothing else does and it reads nothing else."""
    readers: dict[str, set[str]] = {}
    for path, feeds in wiring.feeds.items():
        for feed in feeds:
            readers.setdefault(feed.source, set()).add(path)
    behind = {}
    for path, layer in wiring.layers.items():
        feeds = wiring.feeds[path]
        if layer.kind != "norm" or len(feeds) != 1:
            continue
        pairs, source = feeds[0].pairs, feeds[0].source
        same = len(pairs) == layer.inputs and bool((pairs[:, 0] == pairs[:, 1]).all())
        if same and readers[source] == {path} and source not in wiring.reaches_output:
            behind[source] = path
    return behind


def _add_bias(
    model: nn.Module, path: str, bias: Tensor, norms: Mapping[str, str], outcome: Outcome
) -> None:
    """Add to a layer's bias, or to what stands for one."""
    module = model.get_submodule(path)
    if isinstance(module.bias, Tensor):
        module.bias.data.add_(bias.to(module.bias))
        return
    norm = model.get_submodule(norms[path]) if path in norms else None
    mean = getattr(norm, "running_mean", None)
    if isinstance(mean, Tensor):
        mean.sub_(bias.to(mean))
        return
    give_bias(module)
    outcome.biases.append(path)
    module.bias.data.add_(bias.to(module.bias))  # type: ignore[union-attr, operator]


def give_bias(module: nn.Module) -> None:
    """Register a bias of zeros on a layer without one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    n = getattr(module, "out_channels", None) or module.out_features
    module.bias = nn.Parameter(torch.zeros(int(n), dtype=weight.dtype, device=weight.device))  # type: ignore[arg-type]


