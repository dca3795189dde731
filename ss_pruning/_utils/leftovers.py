"""What an interrupt leaves behind where it comes between two statements that belong together, taken back.

A `with` block undoes nothing where Ctrl-C comes after it has set something and before it has noted how to undo it:
when a hook is registered but its handle is not kept yet, say. torch's own blocks are no better. So whoever works on a
user's model notes all such things at the start, and puts them back at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn, overrides
from torch.utils import _python_dispatch as dispatching

from ss_pruning._utils.modules import modules_of

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
# What torch notes about hooks beside them.
_NOTES = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


@contextlib.contextmanager
def without_leftovers(model: nn.Module) -> Iterator[None]:
    """After a block, however it ended, hooks, a `forward` of a module's own and torch's modes are what they were."""
    undo = _undo(model)
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:  # an interrupt has come in between: all of it is done again
            undo()
            raise


def hook_tables(model: nn.Module, kinds: tuple[str, ...]) -> list[dict[Any, Any]]:
    """The modules' tables of hooks of some kinds."""
    return [
        vars(m)[kind] for m in modules_of(model).values() for kind in kinds if vars(m).get(kind) is not None
    ]


def _undo(model: nn.Module) -> Callable[[], None]:
    """What puts back what is there now."""
    tables = [(table, dict(table)) for table in hook_tables(model, (*FORWARD, *BACKWARD, *_NOTES))]
    forwards = [(vars(m), vars(m).get("forward")) for m in modules_of(model).values()]
    functions, dispatches = overrides._get_current_function_mode_stack(), _dispatch_modes()
    grad = torch.is_grad_enabled()

    def undo() -> None:
        _set_stack(
            functions, overrides._get_current_function_mode_stack, overrides._pop_mode, overrides._push_mode
        )
        _set_stack(dispatches, _dispatch_modes, dispatching._pop_mode, dispatching._push_mode)
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
        for table, hooks in tables:
            if table or hooks:
                table.clear()
                table.update(hooks)
        for own, forward in forwards:
            if own.get("forward") is not forward:
                own.pop("forward", None) if forward is None else own.update(forward=forward)

    return undo


def _dispatch_modes() -> list[Any]:
    return list(dispatching._get_current_dispatch_mode_stack())


def _set_stack(
    wanted: list[Any],
    now: Callable[[], list[Any]],
    pop: Callable[[], Any],
    push: Callable[[Any], Any],
) -> None:
    """Make torch's stack of modes what it was, from the first mode on that is another."""
    while (stack := now()) != wanted[: len(stack)]:
        pop()
    for mode in wanted[len(stack) :]:
        push(mode)
