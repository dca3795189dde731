"""The example input that Torch-Pruning's graph was built with, from what autograd has saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import InputError

# So many inputs at most are looked for where several are recovered.
_MOST_INPUTS = 3


def recover_inputs(model: nn.Module, graph: Any) -> Any:
    """The example input that Torch-Pruning's graph was built with, from what autograd saved at the first layers.

    Views remember what they are of, and a sum or a concatenation of inputs may be split again: whatever it is, the
    model must hand the same to those layers.
    """
    stems: dict[nn.Module, list[Tensor]] = {}
    for node in getattr(graph, "module2node", {}).values():
        if isinstance(node.module, (_ConvNd, nn.Linear)) and (saved := _saved_inputs(node.grad_fn)):
            stems[node.module] = saved
    tensors = [saved for each in stems.values() for saved in each]
    for candidate in _candidates(tensors) if tensors else ():
        if _reproduces(model, candidate, stems):
            return candidate
    raise InputError(
        "the example input cannot be recovered from Torch-Pruning's graph; "
        "give the input yourself: SynapticImportance(example_inputs=x)"
    )


def _saved_inputs(grad_fn: Any, depth: int = 4) -> list[Tensor]:
    """What a layer's operation has kept that no other operation has made, and no parameter is."""
    if grad_fn is None or not depth:
        return []
    names = (name for name in dir(grad_fn) if name in ("_saved_input", "_saved_mat1", "_saved_self"))
    found = [value for name in names if isinstance(value := getattr(grad_fn, name), Tensor)]
    fresh = [t.detach() if t._base is None else t for t in found if t.grad_fn is None and not t.requires_grad]
    if found:
        return fresh
    # A linear layer on more than two axes is folded before and unfolded after.
    return next((s for f, _ in grad_fn.next_functions if (s := _saved_inputs(f, depth - 1))), [])


def _candidates(saved: Sequence[Tensor]) -> Iterator[Any]:
    """What the inputs may have been: one of the tensors, what it is a view of, parts of it, or all in some order."""
    distinct = {(t.data_ptr(), t.shape): t for t in saved}
    whole = {
        (b.data_ptr(), b.shape): b for t in distinct.values() for b in [t if t._base is None else t._base]
    }
    for tensor in (*distinct.values(), *whole.values()):
        yield tensor.detach()
    if 1 < len(whole) <= _MOST_INPUTS:
        for order in permutations(whole.values()):
            yield tuple(t.detach() for t in order)
    for tensor in distinct.values():
        for axis, parts in product(range(min(tensor.dim(), 2)), range(2, _MOST_INPUTS + 1)):
            if tensor.shape[axis] % parts == 0:
                pieces = tensor.detach().chunk(parts, axis)
                yield pieces[0]
                yield pieces


class _AllRead(Exception):  # noqa: N818 - it is no error: the rest of the pass would tell nothing more
    """Raised out of a forward pass."""


def _reproduces(model: nn.Module, inputs: Any, stems: Mapping[nn.Module, Sequence[Tensor]]) -> bool:
    """Whether the first layers, when the model runs on it, can read what they had read."""
    numbered = {str(number): module for number, module in enumerate(stems)}
    left = [(module, saved) for module, each in stems.items() for saved in each]

    def read(_: str, module: nn.Module, x: Tensor, __: Any) -> None:
        left[:] = [(m, saved) for m, saved in left if m is not module or not _same(x, saved)]
        if not left:
            raise _AllRead

    try:
        with hooked(numbered, after=read), preserved(model, training=False), torch.no_grad():
            call(model, inputs)
    except _AllRead:
        return True
    except Exception:  # of the model's own code: it was no input
        return False
    return not left


def _same(x: Tensor, saved: Tensor) -> bool:
    return x.numel() == saved.numel() and x.reshape(saved.shape).equal(saved)
