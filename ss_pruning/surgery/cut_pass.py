"""One pass of a cut model, on whose way the numbers that its modules store follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import Training, output_of
from ss_pruning.errors import VerificationError
from ss_pruning.surgery.plan import set_number
from ss_pruning.surgery.size_attributes import SizeAttributes


def to_meta(inputs: Any) -> Any:
    """Inputs without data."""
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs)


def run_cut(
    small: nn.Module,
    inputs: Any,
    sizes_that_follow: SizeAttributes,
    mode: Callable[[], Any] = contextlib.nullcontext,
    *,
    training: Training = False,
) -> tuple[Any, Any]:
    """The cut model's output, with all numbers that follow, and the last mode that it ran in.

    They follow on the way, and what reads one before its module runs meets the old one: it runs until none is new.
    """
    with watching(small, sizes_that_follow):
        while True:
            known = len(sizes_that_follow.found)
            let_follow(small, sizes_that_follow)  # what a pass sets is taken back with the rest
            entered = mode()
            try:
                output = output_of(small, inputs, entered, training=training)
            except Exception as error:
                if len(sizes_that_follow.found) > known:
                    continue
                how, at = " in training" if training else "", sizes_that_follow.current
                raise VerificationError(
                    f"the cut model does not run{how}, at '{at}' ({type(error).__name__}: {error})",
                    sizes_that_follow.found,
                    at,
                ) from error
            if len(sizes_that_follow.found) == known:
                return output, entered


def let_follow(model: nn.Module, sizes_that_follow: SizeAttributes) -> None:
    """Set the numbers that were found to follow."""
    modules = modules_of(model)
    for attribute in sizes_that_follow.found.values():
        set_number(modules[attribute.path], attribute)


def watching(
    model: nn.Module, visit: Callable[[str, nn.Module, list[tuple[int, ...]]], None]
) -> AbstractContextManager[None]:
    """Calls `visit(path, module, shapes of the tensors that arrive)` before each module runs."""

    def arriving(path: str, module: nn.Module, given: Any) -> None:
        visit(path, module, [tuple(leaf.shape) for leaf in _leaves(*given) if isinstance(leaf, Tensor)])

    return hooked(modules_of(model), arriving, whole=True)


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    plain = not kwargs and all(isinstance(a, Tensor) for a in args)
    return args if plain else pytree.tree_leaves((args, kwargs))  # slow, and nearly all calls are plain
