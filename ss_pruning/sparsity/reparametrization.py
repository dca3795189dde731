"""The paper's parametrisation: the strength of a synapse is a parameter, its kernel a unit one, the norm has no scale.

    W[k, c] = s[k, c] / g_c * V[k, c] / ||V[k, c]||

Where a batch norm's scale gamma can be moved out of the activation (gamma > 0, the activation positively homogeneous,
as ReLU is), it is: into the kernels that read the channel, and `g_c = 1`. Where several sources meet in one channel, as
in a residual stream, no single scale can be moved; there gamma stays where it is, fixed, and `g_c = sqrt(sum gamma^2)`.
Lin et al. (NeurIPS 2018) train the strengths `s` with a sparsity penalty; so does `StrengthPenalty` of a model in this
form. Whether a scale can be moved is not looked up in a table of activations: the model is run with it moved.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ss_pruning._utils.arrays import normal_like
from ss_pruning._utils.copying import copied
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import InputError, ModelError, VerificationError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import weight_of, width
from ss_pruning.graph.refusals import check_bare, check_finite
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import from_norms, norm_scales
from ss_pruning.importance.strength import at_synapses, by_kernel, inner_paths, kernel_powers
from ss_pruning.surgery.equivalence.agreement import compare

# Relative difference of outputs in float64 that counts as rounding.
_EQUAL = 1e-9
#: Layers into whose kernels a scale can be moved.
_SCALABLE = ("synaptic", "depthwise")
#: By layer that reads a norm: pairs of the norm's channels and the layer's.
Readers = dict[str, list[Tensor]]


class StrengthTimesKernel(nn.Module):
    """The parametrisation of one layer's weight by strengths and directions."""

    deviation: Tensor

    def __init__(self, module: nn.Module, deviation: Tensor) -> None:
        """Hold a layer, and `[out, in // groups]`, the square roots of the variances of what arrives, not 0."""
        super().__init__()
        self._layer = (module,)  # in a tuple: not a child of its own child
        self.register_buffer("deviation", deviation)

    def forward(self, strength: Tensor, direction: Tensor) -> Tensor:
        """The weight."""
        norms = kernel_powers(self._layer[0], direction).sqrt()
        return direction * by_kernel(self._layer[0], direction, strength / (self.deviation * norms)).to(
            direction
        )

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Strengths `[out, in // groups]`, and directions in the layout of the weight."""
        norms = kernel_powers(self._layer[0], weight).sqrt()
        # A kernel of zeros has no direction: any will do, as its strength is 0.
        direction = torch.where(by_kernel(self._layer[0], weight, norms) > 0, weight, torch.ones_like(weight))
        return (norms * self.deviation).to(weight), direction


def explicit_strength(module: nn.Module) -> Tensor | None:
    """The parameter of a layer's strengths, `[out, in // groups]`, if the layer is in this form."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    own: Any = module.parametrizations["weight"]  # type: ignore[index]
    strength: Tensor | None = own.original0 if isinstance(own[0], StrengthTimesKernel) else None
    return strength


class ExplicitStrengths:
    """A model in the paper's form, until `merge_` makes it plain again; its output is the same in both.

    Build optimisers after it, and after `merge_`: the parameters are new.

    Attributes:
        paths: Layers whose strengths are parameters now: `parametrizations.weight.original0`, `[out, in // groups]`.
        moved: Batch norms whose scale is 1 now.
        kept: Batch norms whose scale stays, fixed: other sources meet theirs in the channels that they feed, or
            what they put out is spread over several channels.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        ignore: Collection[str] = (),
        keep: Collection[str] = (),
    ) -> None:
        """Convert in place; on any error the model is as it was.

        Args:
            model: A plain model, without parametrisations.
            example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
            ignore: Layers that stay plain, besides those that read the model's input or put out its output.
            keep: Batch norms whose scale is to stay where it is.

        Raises:
            InputError: No layer is left, or a path names nothing.
            ModelError: A scale cannot be moved: it is not positive, or the activation behind it is not positively
                homogeneous; or a weight has a parametrisation already.
        """
        check_bare(model)
        check_finite(model)
        connectivity = trace(model, example_inputs)
        unknown = sorted((set(ignore) | set(keep)) - set(connectivity.layers))
        self.model, self.paths = model, tuple(p for p in inner_paths(connectivity) if p not in ignore)
        if unknown or not self.paths:
            raise InputError(f"no such layers: {unknown}" if unknown else "no layer is left to parametrise")
        feeding = {
            f.source
            for p in self.paths
            for f in connectivity.edges[p]
            if _has_scale(model, connectivity, f.source)
        }
        owning = {
            norm: consumers for norm in feeding if (consumers := _readers(connectivity, norm)) is not None
        }
        self.moved = tuple(norm for norm in connectivity.layers if norm in owning and norm not in keep)
        self.kept = tuple(norm for norm in connectivity.layers if norm in feeding and norm not in self.moved)
        for path in (*self.paths, *(path for norm in self.moved for path in owning[norm])):
            if parametrize.is_parametrized(model.get_submodule(path)):
                raise ModelError(f"'{path}' has a parametrisation already; remove or merge it first")
        _check_movable(model, example_inputs, {norm: owning[norm] for norm in self.moved})
        for norm in self.moved:
            _move_scale_(model, norm, owning[norm])
        self._frozen = self._freeze()
        self._parametrise(connectivity)

    def _parametrise(self, connectivity: Connectivity) -> None:
        scales = norm_scales(self.model, connectivity)
        for path in self.paths:
            module = self.model.get_submodule(path)
            variance = from_norms(connectivity, path, scales).variance.detach()
            deviation = torch.where(variance > 0, variance, 1.0).sqrt()
            synapses = at_synapses(module, deviation, len(kernel_powers(module)))
            parametrize.register_parametrization(module, "weight", StrengthTimesKernel(module, synapses))

    def _freeze(self) -> list[nn.Parameter]:
        scales = [self.model.get_parameter(f"{norm}.weight") for norm in (*self.moved, *self.kept)]
        frozen = [scale for scale in scales if scale.requires_grad]
        for scale in frozen:
            scale.requires_grad_(False)
        return frozen

    def merge_(self) -> nn.Module:
        """Make the model plain again, with the weights that it computes with now; scales can be trained again."""
        for path in self.paths:
            parametrize.remove_parametrizations(self.model.get_submodule(path), "weight")
        for scale in self._frozen:
            scale.requires_grad_(True)
        return self.model


def _has_scale(model: nn.Module, connectivity: Connectivity, source: str) -> bool:
    if source not in connectivity.layers or connectivity.layers[source].kind != "norm":
        return False
    module = model.get_submodule(source)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine


def _readers(connectivity: Connectivity, norm: str) -> Readers | None:
    """By layer that reads the norm: pairs of its channels and theirs; None if the norm does not own those channels."""
    if len(connectivity.reaches_output.get(norm, ())):
        return None
    consumers: Readers = {}
    for path, edges in connectivity.edges.items():
        mine = [edge for edge in edges if edge.source == norm]
        if not mine:
            continue
        channels = torch.cat([edge.pairs[:, 1] for edge in mine])
        others = [edge.pairs[:, 1] for edge in edges if edge.source != norm]
        shared = others and bool(torch.isin(channels, torch.cat(others)).any())
        # One value reaches several channels, as from a gate.
        spread = any(len(edge.broadcast) for edge in mine)
        repeated = len(edges) != len({edge.source for edge in edges})
        if shared or spread or repeated or connectivity.layers[path].kind not in _SCALABLE:
            return None
        consumers[path] = [edge.pairs for edge in mine]
    return consumers


@torch.no_grad()
def _move_scale_(model: nn.Module, norm: str, consumers: Readers) -> None:
    """Divide what the norm puts out by its scale, and multiply the kernels that read it."""
    module = model.get_submodule(norm)
    scale, shift = module.weight, module.bias
    assert isinstance(scale, Tensor)
    assert isinstance(shift, Tensor)
    for path, all_pairs in consumers.items():
        consumer = model.get_submodule(path)
        weight = weight_of(consumer)
        powers = kernel_powers(consumer)
        factors = scale.new_ones(width(consumer, "in"))
        for pairs in all_pairs:
            factors[pairs[:, 1]] = scale[pairs[:, 0]]
        weight.mul_(by_kernel(consumer, weight, at_synapses(consumer, factors, len(powers))))
    shift.div_(scale)
    scale.fill_(1.0)


def _check_movable(model: nn.Module, example_inputs: Any, norms: dict[str, Readers]) -> None:
    """Refuse scales that are not positive, or that change the output when they are moved."""
    for norm in norms:
        scale = model.get_parameter(f"{norm}.weight")
        if bool((scale <= 0).any()):
            raise ModelError(
                f"the scale of '{norm}' is not positive in channels {(scale <= 0).nonzero().flatten().tolist()[:5]}: "
                f"it cannot be moved out of an activation. Leave it in place with keep=['{norm}']"
            )
    twin = copied(model).double()
    inputs = normal_like(example_inputs, torch.Generator().manual_seed(0), torch.float64)
    with torch.no_grad(), preserved(twin, training=False):
        expected = call(twin, inputs)
        for norm, consumers in norms.items():
            before = {path: twin.get_parameter(f"{path}.weight").clone() for path in (norm, *consumers)}
            shift = twin.get_parameter(f"{norm}.bias").clone()
            _move_scale_(twin, norm, consumers)
            try:
                compare(expected, call(twin, inputs), _EQUAL)
            except VerificationError as error:
                raise ModelError(
                    f"moving the scale of '{norm}' into the kernels that read it changes the output: the activation "
                    "between them is not positively homogeneous (as ReLU is, and SiLU, GELU or ReLU6 are not). Leave "
                    f"it in place with keep=['{norm}']"
                ) from error
            twin.get_parameter(f"{norm}.bias").copy_(shift)
            for path, weight in before.items():
                twin.get_parameter(f"{path}.weight").copy_(weight)
