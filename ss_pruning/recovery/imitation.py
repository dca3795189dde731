"""The imitation loss: how far a model's feature maps are from the dense model's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.copying import copied
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import device_of
from ss_pruning._utils.running import quiet_hooks
from ss_pruning.errors import InputError
from ss_pruning.graph.refusals import check_bare
from ss_pruning.recovery.places import Place, find_places

#: The least variance, as a share of the mean square, that errors are measured by. What hardly varies, such as a
#: detector's scores where it finds nothing, would otherwise be nearly all of the loss.
FLOOR = 0.01

#: Adds up a number over all processes.
Total = Callable[[Tensor], Tensor]


class ImitationLoss:
    """Relative squared error of a pruned model's feature maps against the dense model's, for training.

    At the end of each block that lost no channel, and of each stage, `sum (x - y)^2 / sum (y - mean y)^2`, where `x` is
    what the pruned model has and `y` the same channels in the dense one; the mean over these places. The denominator is
    a hundredth of `sum y^2` at least, so that maps that hardly vary do not outweigh the others. Comparing the last map
    ahead of the pooling is due to Wang et al., "Compressing Models with Few Samples: Mimicking then Replacing" (CVPR
    2022, arXiv 2201.02620). No labels are needed; with labels, add it to the loss of the task.

    A context manager: within, hooks on the pruned model note its feature maps. The dense model is copied; the copy runs
    in eval mode, without gradients.

    Args:
        model: What `prune_` or `compact_` has made, which carries its plan.
        dense: The model that was pruned.
        example_inputs: What `forward` takes, on the model's device.
        everywhere: In several processes that share a batch, adds up a number over them, so that what one would do is
            done: `lambda total: accelerator.reduce(total, "sum")`.

    Attributes:
        places: Where the models are compared.

    Raises:
        InputError: A model is wrapped or compiled, or does not run on the inputs, or there is nothing to compare.
        ModelError: A model has no values.

    Examples:
        >>> import copy, ss_pruning, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        ...     nn.Linear(128, 4))
        >>> dense, images = copy.deepcopy(net), torch.randn(16, 3, 8, 8)
        >>> report = ss_pruning.prune_(net, images[:1], ratio=0.25)
        >>> with ss_pruning.ImitationLoss(net, dense, images[:1]) as imitation:
        ...     scores = net(images)
        ...     loss = torch.nn.functional.cross_entropy(scores, torch.arange(16) % 4) + imitation()
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        example_inputs: Any,
        everywhere: Total = lambda total: total,
    ) -> None:
        for net in (model, dense):
            check_bare(net, "imitate")
        with torch.inference_mode(False), quiet_hooks(model, example_inputs):
            self.dense = copied(dense).eval().requires_grad_(False).to(device_of(model))
            self.places: tuple[Place, ...] = find_places(model, self.dense, example_inputs)
        self.model, self.everywhere = model, everywhere
        self.ours: dict[str, Tensor] = {}
        self.theirs: dict[str, Tensor] = {}
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> ImitationLoss:
        def note(_: str, __: nn.Module, arguments: Any) -> None:
            self.arguments[:] = [arguments]

        with contextlib.ExitStack() as undo:
            undo.enter_context(hooked({"": self.model}, before=note, whole=True))
            for model, noted in ((self.model, self.ours), (self.dense, self.theirs)):
                undo.enter_context(_noting(model, self.places, noted))
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()
        self.forget()

    def __call__(self) -> Tensor:
        """The loss, a number, of the last pass of the pruned model; the dense one runs on what that was given.

        Raises:
            InputError: The pruned model has not run since the last call, or outside of the block.
        """
        if not self.ours:
            raise InputError(
                "the imitation loss knows no feature maps: run the pruned model within the block, then call the loss"
            )
        with torch.no_grad():
            args, kwargs = self.arguments[0]
            self.dense(*args, **kwargs)
        errors = [
            relative_error(self.ours[place.path], place.of_dense(self.theirs[place.path]), self.everywhere)
            for place in self.places
        ]
        self.forget()
        return torch.stack(errors).mean()

    def forget(self) -> None:
        """Let go of the feature maps of passes that no loss is wanted of."""
        for noted in (self.ours, self.theirs, self.arguments):
            noted.clear()


def relative_error(found: Tensor, wanted: Tensor, everywhere: Total = lambda total: total) -> Tensor:
    """Mean squared error by the `scale` of what is wanted, by all processes together, in float32 at least."""
    with torch.autocast(wanted.device.type, enabled=False):
        precision = torch.promote_types(wanted.dtype, torch.float32)
        found, wanted = found.to(precision), wanted.to(precision)
        count = everywhere(wanted.new_tensor(wanted.numel()))
        mean = everywhere(wanted.sum()) / count
        variance = everywhere((wanted - mean).square().sum()) / count
        return (found - wanted).square().mean() / scale(mean, variance)


def scale(mean: Tensor, variance: Tensor) -> Tensor:
    """What squared errors are divided by: the variance, but `FLOOR` of the mean square at least; 1 where all is 0."""
    least = torch.maximum(variance, FLOOR * (variance + mean.square()))
    return torch.where(least > 0, least, torch.ones_like(least))


def _noting(
    model: nn.Module, places: tuple[Place, ...], noted: dict[str, Tensor]
) -> contextlib.AbstractContextManager[None]:
    def note(path: str, _: nn.Module, __: Any, output: Tensor) -> None:
        noted[path] = output

    return hooked({place.path: model.get_submodule(place.path) for place in places}, after=note)
