"""One pass of a model with the output of every layer cut loose, and what arrived at each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from ss_pruning._utils.hooks import given, hooked, is_read_by_code, replaced_forward
from ss_pruning._utils.modules import modules_of, tensors_of
from ss_pruning._utils.running import advice, as_arguments, preserved, random_state
from ss_pruning.errors import ModelError
from ss_pruning.graph.attention import all_mixed
from ss_pruning.graph.connectivity import INPUT, Layer
from ss_pruning.graph.layers import channel_axis, check_registered, kind_of, weight_of, width
from ss_pruning.graph.probe.channel_labels import Arrival, Leaf
from ss_pruning.graph.probe.flat_slopes import FlatSlopes
from ss_pruning.graph.probe.modes import KeptDouble, KeptGradients, PlainStatistics, TiedIndices
from ss_pruning.graph.probe.vjp_probe import SEED

# Operating point of every layer's output. Positive, so that rectifiers pass; small, so that a dozen residual adds
# stay below the knees of ReLU6 and of hard gates; different from channel to channel, so that what compares channels
# (a softmax over branches) has a slope that does not vanish in the sum over positions.
_LOW, _HIGH, _JITTER = 0.3, 0.5, 0.01


class Recorder:
    """Forward hooks that cut every layer loose and remember what arrived at it."""

    def __init__(self, paths: Mapping[nn.Module, str], double: bool, kept: bool = False) -> None:
        """With `double`, labels pass in float64; with `kept`, they pass where code switches gradients off."""
        self.paths, self.double, self.kept = paths, double, kept
        self.layers: dict[str, Layer] = {}
        self.leaves: list[Leaf] = []
        self.arrivals: list[Arrival] = []
        self.calls: Counter[str] = Counter()
        self.single: set[str] = set()
        self.drew = False  # random numbers, on which its way may depend
        self.current: str | None = None
        self.generator = torch.Generator().manual_seed(SEED)

    def leaf(self, source: str, like: Tensor, axis: int) -> Tensor:
        """A fresh leaf around the operating point; a clone is handed out, as in-place operations refuse leaves."""
        shape = [n if a == axis else 1 for a, n in enumerate(like.shape)]
        centre = torch.empty(shape).uniform_(_LOW, _HIGH, generator=self.generator)
        # Drawn anew each time: noise that leaves share, even turned, lets attention look alike where it is not.
        jitter = torch.empty(like.shape).uniform_(-_JITTER, _JITTER, generator=self.generator)
        tensor = (centre + jitter).to(like.device, self.precision(like)).requires_grad_()
        self.leaves.append(Leaf(source, tensor, axis))
        return tensor.clone()

    def unlabelled(self) -> int:
        """How often something arrived at a layer to which no label goes back."""
        return sum(arrival.end is None for arrival in self.arrivals)

    def precision(self, like: Tensor) -> torch.dtype:
        """In which labels pass."""
        return torch.float64 if self.double else like.dtype

    def before(self, path: str, module: nn.Module, call: Any) -> Any:
        """Note what arrives at a layer, which runs on it without labels."""
        self.current = path
        x = _input_of(path, module, call)
        axis = channel_axis(module, x)
        check_registered(path, module, x, "in")
        layer = self.layers.setdefault(path, _layer(path, module, x, axis))
        if layer.kind == "norm" and x.numel() == x.shape[axis]:
            self.single.add(path)
        # A clone: a later in-place operation would otherwise rewrite the history of what arrived here.
        if x.is_floating_point():
            end = get_gradient_edge(x) if x.requires_grad else None
            self.arrivals.append(Arrival(path, x.clone(), axis, self.calls[path], end))
        self.calls[path] += 1
        own = (*module._parameters.values(), *module._buffers.values())
        dtype = next((t.dtype for t in own if t is not None and t.is_floating_point()), torch.float32)
        return pytree.tree_map_only(Tensor, lambda t: _cast(t.detach(), dtype), call)

    def after(self, path: str, module: nn.Module, _: Any, output: Any) -> Any:
        """A leaf in place of what a layer puts out."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        check_registered(path, module, output, "out")
        leaf = self.leaf(path, output, channel_axis(module, output))
        # Where code adds a bias of its own, that feeds what the leaf feeds: as a factor it does so in a softmax, too.
        return leaf * (1 + (output - output.detach())) if is_read_by_code(module) else leaf


def _input_of(path: str, module: nn.Module, call: Any) -> Tensor:
    x = given(module, *call)
    if not isinstance(x, Tensor):
        raise ModelError(f"layer '{path}' was called without a tensor")
    if torch._C._functorch.is_batchedtensor(x):
        raise ModelError(
            f"'{path}' runs inside torch.vmap, where channels cannot be followed: call it on the whole batch, "
            "without vmap"
        )
    return x


def _layer(path: str, module: nn.Module, x: Tensor, axis: int) -> Layer:
    kind = kind_of(module)
    assert kind is not None
    if kind == "positional":
        return Layer(path, kind, x.shape[axis], x.shape[axis], axis)
    return Layer(path, kind, width(module, "in"), width(module, "out"), axis)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Not by `to`, which keeps what is double while labels pass."""
    return torch.empty_like(tensor, dtype=dtype).copy_(tensor) if tensor.is_floating_point() else tensor


def labelled(
    model: nn.Module, example_inputs: Any, paths: Mapping[nn.Module, str], training: bool
) -> tuple[Recorder, Any]:
    """What a pass with all layers cut loose has left, and its output."""
    recorder = Recorder(paths, double=True)
    try:
        output = _run(model, example_inputs, recorder, training)
    except ModelError:  # some code between layers insists on the precision it was written for
        recorder = Recorder(paths, double=False)
        output = _run(model, example_inputs, recorder, training)
    if recorder.unlabelled() and not training:  # no_grad or detach on the way
        again = Recorder(paths, recorder.double, kept=True)
        with contextlib.suppress(ModelError):
            other = _run(model, example_inputs, again, training)
            if again.unlabelled() < recorder.unlabelled():
                return again, other
    return recorder, output


def _run(model: nn.Module, example_inputs: Any, recorder: Recorder, training: bool) -> Any:
    """The forward pass with hooks, and with loose tensors replaced by leaves; everything is undone afterwards."""
    layers = {path: module for module, path in recorder.paths.items()}
    slopes = {path: module for path, module in modules_of(model).items() if isinstance(module, nn.PReLU)}
    attention = [m for m in modules_of(model).values() if type(m) is nn.MultiheadAttention]
    replaced: dict[str, Tensor] = {}
    with (
        contextlib.ExitStack() as undo,
        torch.inference_mode(False),
        torch.enable_grad(),
        preserved(model, training, replaced=True),
        TiedIndices(),
        PlainStatistics(),
        FlatSlopes(),
        KeptDouble() if recorder.double else contextlib.nullcontext(),
        KeptGradients() if recorder.kept else contextlib.nullcontext(),
        hooked(layers, recorder.before, recorder.after, whole=True),
        hooked(slopes, after=_sloped),
    ):
        for module in attention:
            undo.enter_context(replaced_forward(module, partial(all_mixed, module)))
        for name, tensor in _loose_tensors(model, [*recorder.paths, *attention]):
            replaced[name] = recorder.leaf(name, tensor, -1)
        if training or recorder.kept:  # the pass must not update running statistics
            replaced |= {name: b.clone() for name, b in model.named_buffers() if name not in replaced}
        if training:  # batch norms refuse a single value
            example_inputs = pytree.tree_map_only(
                Tensor, lambda t: torch.cat([t, t]) if t.shape[:1] == (1,) else t, example_inputs
            )
        inputs = pytree.tree_map_with_path(lambda at, t: _input_leaf(at, t, recorder), example_inputs)
        args, kwargs = as_arguments(inputs)
        state = random_state(model)
        try:
            output = torch.func.functional_call(model, replaced, args, kwargs)
            recorder.drew = random_state(model) != state
            return output
        except ModelError:
            raise
        except Exception as error:
            where = f"; the last layer reached was '{recorder.current}'" if recorder.current else ""
            raise ModelError(
                f"the model does not run on the example inputs{where} ({type(error).__name__}: {error}); "
                f"{advice(inputs)}"
            ) from error


def _sloped(path: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """The other half of a PReLU, as the operating point's does not depend on the slopes; positive, too."""
    return -nn.functional.prelu(-x.abs(), weight_of(module))


def _input_leaf(at: tuple[Any, ...], tensor: Any, recorder: Recorder) -> Any:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    leaf = tensor.detach().to(recorder.precision(tensor), copy=True).requires_grad_()
    single = len(at) > 0 and tensor.dim() == 3  # a list of images, as detectors take, has no batch axis
    recorder.leaves.append(Leaf(INPUT, leaf, 0 if single else min(1, tensor.dim() - 1)))
    return leaf.clone()


def _loose_tensors(model: nn.Module, owners: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Floating-point parameters and (non-scalar) buffers outside the layers and torch's attention."""
    owned = {id(t) for m in owners for t in tensors_of(m).values()}
    for name, tensor in tensors_of(model).items():
        several = isinstance(tensor, nn.Parameter) or tensor.numel() > 1
        if several and id(tensor) not in owned and tensor.is_floating_point():
            yield name, tensor
