"""What an interrupt leaves behind between two statements is taken back at the end of the call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatching
from torch.utils._python_dispatch import TorchDispatchMode

from ss_pruning import prune_
from ss_pruning._utils.hooks import without_leftovers
from tests.support.chain import chain
from tests.support.snapshot import HOOKS, snapshot

X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def nothing(*_: Any) -> None:
    """A hook that does nothing."""


def stacks() -> list[list[Any]]:
    return [overrides._get_current_function_mode_stack(), dispatching._get_current_dispatch_mode_stack()]


LEFT: dict[str, Callable[[nn.Module], Any]] = {
    "a hook": lambda model: model.register_forward_hook(nothing, with_kwargs=True, always_call=True),
    "a hook ahead": lambda model: model.register_forward_pre_hook(nothing, with_kwargs=True),
    "a backward hook": lambda model: model.register_full_backward_hook(nothing),
    "a hook less": lambda model: next(model.children())._forward_hooks.clear(),
    "a forward": lambda model: vars(model).update(forward=nothing),
    "a function mode": lambda model: overrides._push_mode(TorchFunctionMode()),
    "a function mode less": lambda model: overrides._pop_mode(),
    "a dispatch mode": lambda model: dispatching._push_mode(TorchDispatchMode()),
    "a dispatch mode less": lambda model: dispatching._pop_mode(),
    "no gradients": lambda model: torch.set_grad_enabled(False),
}


class Functions(TorchFunctionMode):
    """A mode of the user's own, which changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """Likewise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", LEFT)
def test_what_was_left_is_taken_back(what: str) -> None:
    model = chain()
    next(model.children()).register_forward_hook(nothing, with_kwargs=True)
    before = snapshot(model)
    with Functions(), Dispatches():
        modes = stacks()
        with contextlib.suppress(KeyboardInterrupt), without_leftovers(model):
            LEFT[what](model)
            raise KeyboardInterrupt
        assert stacks() == modes
    assert snapshot(model) == before
    noted = [vars(m)["_forward_hooks_with_kwargs"] for m in model.modules()]
    assert [len(table) for table in noted] == [0, 1] + [0] * (len(noted) - 2)


@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_an_interrupt_before_a_hook_is_noted_leaves_none(
    compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes where the handle is there and the stack that will remove it does not know of it yet."""
    model, original = chain(), contextlib.ExitStack.callback
    before = snapshot(model)
    for at in itertools.count(1, 7):
        calls = itertools.count(1)

        def interrupted(self: Any, *given: Any, at: int = at, calls: Any = calls, **named: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return original(self, *given, **named)

        monkeypatch.setattr(contextlib.ExitStack, "callback", interrupted)
        try:
            prune_(model, X, ratio=0.4, compensation=compensation)
        except KeyboardInterrupt:
            assert snapshot(model) == before
        else:
            assert at > 20, "it was never interrupted"
            break
    assert all(not getattr(m, kind) for m in model.modules() for kind in HOOKS)
