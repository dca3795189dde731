"""The label probe: which channels of which layers feed each channel of each layer, for any architecture.

The model is run once with the output of every layer (convolution, linear, norm) cut loose: replaced by a fresh
leaf tensor near a constant operating point. What lies between two layers (adds, concatenations, splits, shuffles,
pools, gates, any functional code) is then a small differentiable function from the leaves to a layer's input.
Propagating labels back through it says which leaf channel feeds which input channel, see `probe.channel_labels`.
Elements whose ratio is no channel number feed several channels at once (a broadcast gate, a softmax, attention).

The layers themselves run in their own precision, what lies between them in float64: sums that nearly cancel (a
softmax over two alike branches) would else blur the ratios. No table of operators, no trace: the cost is one forward
pass and three local backward passes for each set of layers of which no two have a source in common. A pull ends where
it meets what arrived at an earlier layer, if that is handed on channel by channel, as along a residual stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ss_pruning._utils.hooks import find_weights_read_by_code, hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import draws_of, output_of, quiet_hooks
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.attention import PrunableAttention
from ss_pruning.graph.connectivity import INPUT, Connectivity
from ss_pruning.graph.layers import kind_of, width
from ss_pruning.graph.probe.channel_labels import Arrival, Labels
from ss_pruning.graph.probe.recorder import labelled
from ss_pruning.graph.probe.vjp_probe import pull, pull_output, unseen
from ss_pruning.graph.refusals import check_bare, usable_inputs

#: The path of a layer (or the name of a loose tensor) and one of its channels.
Source = tuple[str, int]
#: Where evaluation draws random numbers it may take another way each time: it is traced with so many more draws.
DRAWS = 8


def trace(model: nn.Module, example_inputs: Any) -> Connectivity:
    """Find which channels feed which, by running `model` on labels.

    The model is left as it was: no hook, flag, gradient, buffer or random state changes. It is run in eval mode;
    layers that only run in training (auxiliary heads) are found by a second pass in train mode. Where a pass draws
    random numbers, what any of several draws ties is tied.

    Args:
        model: Any module.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ModelError: The model does not run on the inputs, or has no layer.
        InputError: Something has wrapped the model, or the inputs are none; see `ss_pruning.graph.refusals`.
    """
    check_bare(model)
    check_unwrapped(model)
    example_inputs = usable_inputs(example_inputs)
    connectivity = Connectivity()
    with quiet_hooks(model, example_inputs):
        paths = {module: name for name, module in modules_of(model).items() if kind_of(module) is not None}
        if not paths:
            raise ModelError("the model has no convolution or linear layer that could be pruned")
        if _probe(model, example_inputs, paths, connectivity, training=False):
            for seed in range(DRAWS):
                with draws_of(model, seed):
                    _probe(model, example_inputs, paths, other := Connectivity(), training=False)
                connectivity.add_(other)
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

    `axes` say of modules that run once, by path, on which axis of their output its channels lie.

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
        recorder, _ = labelled(model, example_inputs, paths, training=False)
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


def _probe(
    model: nn.Module,
    example_inputs: Any,
    paths: Mapping[nn.Module, str],
    connectivity: Connectivity,
    *,
    training: bool,
) -> bool:
    """One labelled pass; adds what it finds to `connectivity`. Whether the pass drew random numbers.

    Between layers that are known already, evaluation counts. What else feeds them in training, such as a branch that
    only runs there, is tied to what feeds them in evaluation: the same channels of both are cut.
    """
    recorder, output = labelled(model, example_inputs, paths, training)
    if not training and _reads_more(model, example_inputs, recorder.layers):
        recorder, output = labelled(model, example_inputs, paths, training)
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
    return recorder.drew
