"""What runs before copies of a model differ runs for one of them: which modules, is seen in runs of one and of two.

The copies lie one behind the other in the batch. What goes by images is twice as long in a run of two as in a run of
one; a constant is as long as before, however many numbers it has. Of modules that lie in each other the outermost is
taken: a whole stage costs one repetition of what it puts out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Copies that saw the same may differ by this share, which is that of rounding and more.
_SAME = 1e-3
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class _Call:
    """Of one module: when it began and ended, and what is known of all its calls."""

    begin: int
    end: int = -1
    calls: int = 1
    #: What it puts out goes by images.
    by_image: bool = True
    #: What it takes does, too, and it leaves that as it is.
    pure: bool = True


@dataclass
class Prefix:
    """Watches runs of one copy and of two, and lets what begins and ends before a module run for one of many.

    Attributes:
        modules: By path, those of the model.
    """

    modules: Mapping[str, nn.Module]
    calls: dict[str, _Call] = field(default_factory=dict)
    #: Of the run of one copy: by path, call by call, how long what it took was, and what it gave.
    sizes: dict[str, list[list[int]]] = field(default_factory=dict)

    @contextlib.contextmanager
    def sized(self) -> Iterator[None]:
        """While it lasts, the model must run once, on the images."""

        def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            self.sizes.setdefault(path, []).append(_lengths(args))

        def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.sizes.setdefault(f"{path}()", []).append(_lengths(output))

        with self._hooked(before, after):
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Likewise, on two equal copies of the images; to be called after `sized`."""
        clock, versions = count(), dict[str, list[int]]()

        def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            call = self.calls.setdefault(path, _Call(next(clock), calls=0))
            leaves, grown = pytree.tree_leaves(args), self._grown(path, call.calls, args)
            call.calls += 1
            call.pure &= not kwargs and all(
                isinstance(x, _PLAIN) or (grows and not x.is_inference())  # whose versions nobody counts
                for x, grows in zip(leaves, grown, strict=True)
            )
            if call.pure:
                versions[path] = [x._version for x in leaves if isinstance(x, Tensor)]

        def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.calls[path]
            call.end = next(clock)
            call.by_image &= all(self._grown(f"{path}()", call.calls - 1, output))
            if call.pure:
                now = [x._version for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
                call.pure = now == versions[path]

        with self._hooked(before, after):
            yield

    @contextlib.contextmanager
    def _hooked(self, before: Callable[..., None], after: Callable[..., None]) -> Iterator[None]:
        """Calls these before and after each module that takes hooks."""
        with contextlib.ExitStack() as undo:
            for path, module in self.modules.items():
                if not isinstance(module, torch.jit.ScriptModule):
                    hook = partial(before, path)
                    undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    undo.callback(module.register_forward_hook(partial(after, path), with_kwargs=True).remove)
            yield

    def _grown(self, key: str, number: int, value: Any) -> list[bool]:
        """By leaf, whether it is a batch that holds every image twice, one half after the other."""
        leaves, calls = pytree.tree_leaves(value), self.sizes.get(key, [])
        before = calls[number] if number < len(calls) else []
        if len(before) != len(leaves):
            return [False] * len(leaves)
        return [
            length(x) == 2 * size > 0 and _halves_agree(x) for x, size in zip(leaves, before, strict=True)
        ]

    def goes_by_images(self, path: str) -> bool:
        """Whether it ran, and put out the same for equal images, wherever they were in the batch."""
        return path in self.calls and self.calls[path].by_image

    def runs_once(self, path: str) -> bool:
        """Likewise, and it ran once only."""
        return self.goes_by_images(path) and self.calls[path].calls == 1

    def begin(self, path: str) -> int:
        """When it ran for the first time, counted in calls that began or ended."""
        return self.calls[path].begin

    def before(self, moment: int) -> list[str]:
        """The outermost modules that are over by then and can run for one copy alone."""
        found: list[str] = []
        for path, call in self.calls.items():  # as they began: what lies in another comes after it
            alone = call.calls == 1 and call.pure and call.by_image and call.end < moment
            if alone and not (found and call.end < self.calls[found[-1]].end):
                found.append(path)
        return found

    def run_once(self, moment: int, copies: int, undo: contextlib.ExitStack) -> None:
        """Let what is over by then run for the first of so many copies, and repeat what it puts out."""

        def first(module: nn.Module, args: Any) -> Any:
            return _mapped(lambda x: x[: len(x) // copies], args)

        def repeated(module: nn.Module, args: Any, output: Any) -> Any:
            return _mapped(lambda x: torch.cat([x] * copies), output)

        for path in self.before(moment):
            undo.callback(self.modules[path].register_forward_pre_hook(first).remove)
            undo.callback(self.modules[path].register_forward_hook(repeated).remove)


def length(x: Any) -> int:
    """Of a tensor's first axis; 0 for all that has none."""
    return len(x) if isinstance(x, Tensor) and x.dim() else 0


def _lengths(value: Any) -> list[int]:
    return list(map(length, pytree.tree_leaves(value)))


def _halves_agree(x: Tensor) -> bool:
    first, second = (torch.view_as_real(x) if x.is_complex() else x.float()).chunk(2)
    return bool((first - second).square().mean() <= _SAME * first.square().mean())


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)
