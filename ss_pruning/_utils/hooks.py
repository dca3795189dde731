"""Hooks that see, and may replace, what a layer is called with, as `layer(x)` or as `layer(input=x)`, and returns.

A `with` block undoes nothing where Ctrl-C comes after it has set something and before it has noted how to undo it:
when a hook is registered but its handle is not kept yet, say. torch's own blocks are no better. So whoever works on a
user's model notes all such things at the start, and puts them back at the end (`without_leftovers`).

Some attention computes `F.linear(x, layer.weight, bias)` and never calls the layer. Once such weights are known
(`find_weights_read_by_code`), hooks see that as a call.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, overrides
from torch.utils import _python_dispatch as dispatching

from ss_pruning._utils.memento import READ_BY_CODE
from ss_pruning._utils.modules import modules_of

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
# What torch notes about hooks beside them.
_NOTES = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
# By `id` of a module in whose place another forward stands: the one of its own, if it has any.
_STOOD_IN_FOR: dict[int, dict[str, Any]] = {}


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

    read = {path: module for path, module in modules.items() if is_read_by_code(module)}
    with contextlib.ExitStack() as undo:
        if read:
            undo.enter_context(_calls(read, before and ahead, after and behind))
        for path, module in modules.items():
            if path in read or isinstance(module, torch.jit.ScriptModule):
                continue
            if before is not None:
                handle = module.register_forward_pre_hook(partial(ahead, path), with_kwargs=True)
                undo.callback(handle.remove)
            if after is not None:
                handle = module.register_forward_hook(partial(behind, path), with_kwargs=True)
                undo.callback(handle.remove)
        yield


def is_read_by_code(module: nn.Module) -> bool:
    """Whether it is a linear layer that is not called, as `find_weights_read_by_code` has found."""
    weight = _linear_weight(module)
    return weight is not None and weight in READ_BY_CODE


def _linear_weight(module: nn.Module) -> Tensor | None:
    """As it stands in the table of a plain linear layer, which may give another one to who asks for it."""
    return dict.get(module._parameters, "weight") if type(module) is nn.Linear else None


class _Products(overrides.TorchFunctionMode):
    """While it is entered, `product` makes those with weights that have a name, and is told the name."""

    def __init__(self, product: Callable[[object, Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _of_linear(*args, **kwargs)
            if weight in READ_BY_CODE:
                return self.product(READ_BY_CODE[weight], x, weight, bias)
        return func(*args, **kwargs)


def _of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002 - torch's name
    return input, weight, bias


def _calls(
    layers: Mapping[str, nn.Module], before: Callable[..., Any] | None, after: Callable[..., Any] | None
) -> _Products:
    """Runs hooks around products with the weights of layers that are not called."""
    known = {READ_BY_CODE[_linear_weight(module)]: (path, module) for path, module in layers.items()}

    def product(name: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As a call of the layer; the bias is added to what the weight makes, in the precision of both."""
        if name not in known:
            return F.linear(x, weight, bias)
        path, module = known[name]
        args: tuple[Any, ...] = (x,)
        if before is not None:
            args, _ = before(path, module, args, {}) or (args, {})
        y = F.linear(args[0], weight)
        y = y if bias is None else y + bias
        replaced = None if after is None else after(path, module, args, {}, y)
        return y if replaced is None else replaced

    return _Products(product)


def find_weights_read_by_code(modules: Iterable[nn.Module], run: Callable[[], Any]) -> bool:
    """Give weights a name that `run` reads from plain linear layers without calling them: hooks see them from then on.

    Returns:
        Whether there are any.
    """
    weights = [weight for weight in map(_linear_weight, modules) if weight is not None]
    for weight in weights:
        READ_BY_CODE.setdefault(weight, object())
    names: set[object] = set()

    def product(name: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        names.add(name)  # of products that could be taken
        return y

    try:
        with _Products(product):
            run()
    finally:
        for weight in weights:
            if READ_BY_CODE[weight] not in names:
                del READ_BY_CODE[weight]
    return bool(names)


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
    first = id(module) not in _STOOD_IN_FOR
    _STOOD_IN_FOR.setdefault(id(module), before)
    own["forward"] = forward
    try:
        yield
    finally:
        own.pop("forward", None)
        own.update(before)
        if first:
            del _STOOD_IN_FOR[id(module)]


def with_its_own_forward_(twin: nn.Module, module: nn.Module) -> None:
    """Give a copy of a module the forward that another stands in for at present, if one does."""
    if (before := _STOOD_IN_FOR.get(id(module))) is not None:
        vars(twin).pop("forward", None)
        vars(twin).update(before)


def _first_name(module: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The name of the first parameter of `forward`, of those that were given; callers write them in any order."""
    names = inspect.signature(type(module).forward).parameters
    return next((name for name in names if name in kwargs), next(iter(kwargs)))


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
