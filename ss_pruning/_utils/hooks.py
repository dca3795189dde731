"""Hooks that see, and may replace, what a layer is called with, as `layer(x)` or as `layer(input=x)`, and returns."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    before: Callable[[str, nn.Module, Any], Any] | None = None,
    after: Callable[[str, nn.Module, Any, Any], Any] | None = None,
    *,
    whole: bool = False,
) -> Iterator[None]:
    """While a block runs, see what modules are called with and what they return, and replace it.

    Args:
        modules: By the path that `before` and `after` are told. Those of TorchScript take no hooks and are left out.
        before: `before(path, module, x)`, ahead of each call; what it returns, if anything, takes the place of `x`.
        after: `after(path, module, x, output)`, likewise for the output.
        whole: `x` is all arguments, `(args, kwargs)`, not the first of them.
    """

    def ahead(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert before is not None
        if whole:
            return before(path, module, (args, kwargs))
        x = before(path, module, given(module, args, kwargs))
        return None if x is None else replaced(module, args, kwargs, x)

    def behind(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        assert after is not None
        return after(path, module, (args, kwargs) if whole else given(module, args, kwargs), y)

    with contextlib.ExitStack() as undo:
        for path, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if before is not None:
                handle = module.register_forward_pre_hook(partial(ahead, path), with_kwargs=True)
                undo.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(partial(behind, path), with_kwargs=True)
                undo.callback(handle.remove)
        yield


def given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call of `module`, whether it came by position or by name; None without any."""
    if args:
        return args[0]
    return kwargs[_first_name(module, kwargs)] if kwargs else None


def replaced(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of `module` with `x` in place of the first."""
    if args:
        return (x, *args[1:]), dict(kwargs)
    return args, {**kwargs, _first_name(module, kwargs): x}


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While a block runs, `forward` stands in the place of the module's own; hooks run around it as ever."""
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = forward
    try:
        yield
    finally:
        own.pop("forward", None)
        own.update(before)


def _first_name(module: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The name of the first parameter of `forward`, of those that were given; callers write them in any order."""
    names = inspect.signature(type(module).forward).parameters
    return next((name for name in names if name in kwargs), next(iter(kwargs)))
