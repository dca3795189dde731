"""The label probe: which channels of which layers feed each channel of each layer, for any architecture.

The model is run once with the output of every layer (convolution, linear, norm) cut loose: replaced by a fresh
leaf tensor near a constant operating point. What lies between two layers (adds, concatenations, splits, shuffles,
pools, gates, any functional code) is then a small differentiable function from the leaves to a layer's input.
Propagating labels back through it says which leaf channel feeds which input channel: with a random cotangent `r` the
gradient at a leaf element is `sum r J`, with `r * channel` it is `channel * sum r J` if just one input channel
listens, so the ratio of the two *is* that channel; a third pull with permuted labels confirms it. Elements whose
ratio is no channel number feed several channels at once (a broadcast gate, a softmax, attention).

The layers themselves run in their own precision, what lies between them in float64: sums that nearly cancel (a
softmax over two alike branches) would else blur the ratios. No table of operators, no trace: the cost is one forward
pass and three local backward passes for each set of layers of which no two have a source in common. A pull ends where
it meets what arrived at an earlier layer, if that is handed on channel by channel, as along a residual stream.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ss_pruning._utils.hooks import (
    KeptDouble,
    KeptGradients,
    PlainStatistics,
    find_weights_read_by_code,
    given,
    hooked,
    is_read_by_code,
    replaced_forward,
)
from ss_pruning._utils.modules import modules_of, tensors_of
from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import advice, as_arguments, output_of, preserved, quiet_hooks
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.attention import PrunableAttention, all_mixed
from ss_pruning.graph.channel_labels import Arrival, Labels, Leaf
from ss_pruning.graph.connectivity import INPUT, Connectivity, Layer
from ss_pruning.graph.layers import channel_axis, check_registered, kind_of, weight_of, width
from ss_pruning.graph.refusals import check_bare, usable_inputs
from ss_pruning.graph.vjp_probe import SEED, pull, pull_output, unseen

#: The path of a layer (or the name of a loose tensor) and one of its channels.
Source = tuple[str, int]

# Operating point of every layer's output. Positive, so that rectifiers pass; small, so that a dozen residual adds
# stay below the knees of ReLU6 and of hard gates; different from channel to channel, so that what compares channels
# (a softmax over branches) has a slope that does not vanish in the sum over positions.
_LOW, _HIGH, _JITTER = 0.3, 0.5, 0.01


def trace(model: nn.Module, example_inputs: Any) -> Connectivity:
    """Find which channels feed which, by running `model` on labels.

    The model is left as it was: no hook, flag, gradient, buffer or random state changes. It is run in eval mode;
    layers that only run in training (auxiliary heads) are found by a second pass in train mode.

    Args:
        model: Any module.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        The connectivity between layers.

    Raises:
        ModelError: The model does not run on the inputs, or has no layer.
        InputError: Something has wrapped the model, or the inputs are none; see `ss_pruning.graph.refusals`.
    """
    check_bare(model)
    check_unwrapped(model)
    example_inputs = usable_inputs(example_inputs)
    paths = {module: name for name, module in modules_of(model).items() if kind_of(module) is not None}
    if not paths:
        raise ModelError("the model has no convolution or linear layer that could be pruned")
    connectivity = Connectivity()
    with quiet_hooks(model, example_inputs):
        _probe(model, example_inputs, paths, connectivity, training=False)
        if any(not _read_alone(model, path) for path in set(paths.values()) - set(connectivity.layers)):
            # Auxiliary heads may refuse small inputs; then they stay unseen, and are listed as such.
            with contextlib.suppress(ModelError):
                _probe(model, example_inputs, paths, connectivity, training=True)
    connectivity.uncalled = tuple(sorted(set(paths.values()) - set(connectivity.layers)))
    return connectivity


def _reads_more(model: nn.Module, example_inputs: Any, called: Collection[str]) -> bool:
    """Whether the model reads weights of linear layers that it has not called; if so, hooks see it from here on."""
    left = [module for path, module in modules_of(model).items() if path not in called]
    return any(type(module) is nn.Linear for module in left) and find_weights_read_by_code(
        left, lambda: output_of(model, example_inputs)
    )


def trace_outputs(
    model: nn.Module, example_inputs: Any, axes: Mapping[str, int]
) -> dict[str, list[frozenset[Source]]]:
    """What the channels of modules' outputs are made from, by running `model` on labels; it is left as it was.

    Args:
        model: Any module.
        example_inputs: What `forward` takes.
        axes: By path of modules that run once, the axis of their output on which its channels lie.

    Returns:
        By path, for each channel of the output the (layer path, output channel) pairs that feed it.

    Raises:
        ModelError: The model does not run on the inputs.
    """
    modules = modules_of(model)
    paths = {module: name for name, module in modules.items() if kind_of(module) is not None}
    arrived: dict[str, Arrival] = {}

    def note(path: str, _: nn.Module, __: Any, output: Any) -> None:
        arrived[path] = Arrival(path, output.clone(), axes[path], 0)

    own = {path: width(modules[path], "out") for path in axes if modules[path] in paths}
    with (
        quiet_hooks(model, example_inputs),
        hooked({p: modules[p] for p in axes if p not in own}, after=note),
    ):
        recorder, _ = _labelled(model, example_inputs, paths, training=False)
    found = Connectivity(edges={path: [] for path in arrived})
    leaves = {id(leaf.tensor): leaf for leaf in recorder.leaves}
    pull(list(arrived.values()), leaves, Labels(recorder.generator), found)
    fed = {path: [frozenset({(path, channel)}) for channel in range(n)] for path, n in own.items()}
    for path, arrival in arrived.items():
        sources: list[set[Source]] = [set() for _ in range(arrival.tensor.shape[arrival.axis])]
        for edge in found.edges[path]:
            for channel, into in edge.pairs.tolist():
                sources[into].add((edge.source, channel))
        fed[path] = list(map(frozenset, sources))
    return fed


def _read_alone(model: nn.Module, path: str) -> bool:
    """Whether a layer never runs, in no mode: torch's attention reads the weights of its projection."""
    holder = model.get_submodule(path.rpartition(".")[0])
    return isinstance(holder, nn.MultiheadAttention) and not isinstance(holder, PrunableAttention)


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model whose weights NNI holds in wrappers: a cut would not reach them.

    Raises:
        InputError: Names the first wrapped module.
    """
    for path, module in modules_of(model).items():
        if "_nni_wrapper" in module._modules:
            raise InputError(
                f"'{path}' is wrapped by NNI: call unwrap_model() of the pruner first. That gives back the unmasked "
                "weights; ss_pruning.integrations.nni.pruner.compact bakes the masks in and cuts what is dead"
            )


class _Recorder:
    """Forward hooks that cut every layer loose and remember what arrived at it."""

    def __init__(self, paths: Mapping[nn.Module, str], double: bool, kept: bool = False) -> None:
        """With `double`, labels pass in float64; with `kept`, they pass where code switches gradients off."""
        self.paths, self.double, self.kept = paths, double, kept
        self.layers: dict[str, Layer] = {}
        self.leaves: list[Leaf] = []
        self.arrivals: list[Arrival] = []
        self.calls: Counter[str] = Counter()
        self.single: set[str] = set()
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
        return torch.float64 if self.double else like.dtype

    def before(self, path: str, module: nn.Module, call: Any) -> Any:
        self.current = path
        x = given(module, *call)
        if not isinstance(x, Tensor):
            raise ModelError(f"layer '{path}' was called without a tensor")
        if torch._C._functorch.is_batchedtensor(x):
            raise ModelError(
                f"'{path}' runs inside torch.vmap, where channels cannot be followed: call it on the whole batch, "
                "without vmap"
            )
        kind = kind_of(module)
        assert kind is not None
        axis = channel_axis(module, x)
        check_registered(path, module, x, "in")
        if path not in self.layers:
            positional = kind == "positional"
            inputs, outputs = (
                (x.shape[axis],) * 2 if positional else (width(module, "in"), width(module, "out"))
            )
            self.layers[path] = Layer(path, kind, inputs, outputs, axis)
        if kind == "norm" and x.numel() == x.shape[axis]:
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
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        check_registered(path, module, output, "out")
        leaf = self.leaf(path, output, channel_axis(module, output))
        # Where code adds a bias of its own, that feeds what the leaf feeds: as a factor it does so in a softmax, too.
        return leaf * (1 + (output - output.detach())) if is_read_by_code(module) else leaf


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Not by `to`, which keeps what is double while labels pass."""
    return torch.empty_like(tensor, dtype=dtype).copy_(tensor) if tensor.is_floating_point() else tensor


def _probe(
    model: nn.Module,
    example_inputs: Any,
    paths: Mapping[nn.Module, str],
    connectivity: Connectivity,
    *,
    training: bool,
) -> None:
    """One labelled pass; adds what it finds to `connectivity`.

    Between layers that are known already, evaluation counts. What else feeds them in training, such as a branch that
    only runs there, is tied to what feeds them in evaluation: the same channels of both are cut.
    """
    recorder, output = _labelled(model, example_inputs, paths, training)
    if not training and _reads_more(model, example_inputs, recorder.layers):
        recorder, output = _labelled(model, example_inputs, paths, training)
    known = {INPUT, *connectivity.layers, *connectivity.loose} if training else frozenset[str]()
    new = {path: layer for path, layer in recorder.layers.items() if path not in known}
    connectivity.layers |= new
    connectivity.single |= recorder.single
    connectivity.edges |= {path: [] for path in new}
    labels, leaves = Labels(recorder.generator), {id(leaf.tensor): leaf for leaf in recorder.leaves}
    try:
        pull(unseen(recorder.arrivals, leaves, known), leaves, labels, connectivity, known)
        for tensor in tensors_in(output).values():
            if tensor.requires_grad:
                pull_output(
                    torch.view_as_real(tensor) if tensor.is_complex() else tensor, leaves, connectivity
                )
    except RuntimeError as error:
        raise ModelError(
            f"no gradient goes back through the model, along which channels could be told apart ({error}); it cannot "
            "be trained either: let forward make new tensors where it writes into those that are needed later"
        ) from error


def _labelled(
    model: nn.Module, example_inputs: Any, paths: Mapping[nn.Module, str], training: bool
) -> tuple[_Recorder, Any]:
    """What a pass with all layers cut loose has left, and its output."""
    recorder = _Recorder(paths, double=True)
    try:
        output = _run(model, example_inputs, recorder, training)
    except ModelError:  # some code between layers insists on the precision it was written for
        recorder = _Recorder(paths, double=False)
        output = _run(model, example_inputs, recorder, training)
    if recorder.unlabelled() and not training:  # no_grad or detach on the way
        again = _Recorder(paths, recorder.double, kept=True)
        with contextlib.suppress(ModelError):
            other = _run(model, example_inputs, again, training)
            if again.unlabelled() < recorder.unlabelled():
                return again, other
    return recorder, output


def _run(model: nn.Module, example_inputs: Any, recorder: _Recorder, training: bool) -> Any:
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
        try:
            return torch.func.functional_call(model, replaced, args, kwargs)
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


def _input_leaf(at: tuple[Any, ...], tensor: Any, recorder: _Recorder) -> Any:
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


_POOLS = frozenset(
    getattr(F, f"{kind}max_pool{n}d_with_indices")
    for kind in ("", "adaptive_", "fractional_")
    for n in (1, 2, 3)
    if hasattr(F, f"{kind}max_pool{n}d_with_indices")
)
_UNPOOLS = frozenset((F.max_unpool1d, F.max_unpool2d, F.max_unpool3d))


class TiedIndices(TorchFunctionMode):
    """While it is entered, unpooled maps hold a share of the maps whose indices they use: a tie like that of a sum.

    The channels of both belong together, and whole numbers carry no gradient, so that no label would say so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pooled: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by the `id` of the indices, which are kept with it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _POOLS:
            self.pooled[id(result[1])] = result
        elif func in _UNPOOLS:
            named = [kwargs.pop(name) for name in ("input", "indices") if name in kwargs]
            given: list[Any] = [*args, *named]
            x, indices, *rest = given
            if id(indices) in self.pooled:
                values = self.pooled[id(indices)][0].to(x)
                result = result + func(values, indices, *rest, **kwargs)
        return result
