"""What runs before copies of a model differ runs for one of them: which modules, is seen in runs of one and of two.

The copies lie one behind the other in the batch. What goes by images is twice as long in a run of two as in a run of
one; a constant is as long as before, however many numbers it has. Of modules that lie in each other the outermost is
taken: a whole stage costs one repetition of what it puts out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.hooks import hooked

# Copies that saw the same may differ by this share, which is that of rounding and more.
_SAME = 1e-3
_PLAIN = (bool, int, float, str, type(None))
#: Arguments of a call, by position and by name.
_Given = tuple[tuple[Any, ...], dict[str, Any]]


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
    """Watches runs of one copy and of two, and lets what begins and ends before a module run for one of many."""

    modules: Mapping[str, nn.Module]
    calls: dict[str, _Call] = field(default_factory=dict)
    #: Of the run of one copy: by path, call by call, how long what it took was, and what it gave.
    sizes: dict[str, list[list[int]]] = field(default_factory=dict)

    @contextlib.contextmanager
    def sized(self) -> Iterator[None]:
        """While it lasts, the model must run once, on the images."""

        def before(path: str, _: nn.Module, given: _Given) -> None:
            self.sizes.setdefault(path, []).append(_lengths(given[0]))

        def after(path: str, _: nn.Module, __: _Given, output: Any) -> None:
            self.sizes.setdefault(f"{path}()", []).append(_lengths(output))

        with hooked(self.modules, before, after, whole=True):
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Likewise, on two equal copies of the images; to be called after `sized`."""
        clock, versions = count(), dict[str, list[int]]()

        def before(path: str, _: nn.Module, given: _Given) -> None:
            args, kwargs = given
            call = self.calls.setdefault(path, _Call(next(clock), calls=0))
            leaves, grown = pytree.tree_leaves(args), self._grown(path, call.calls, args)
            call.calls += 1
            call.pure &= not kwargs and all(
                isinstance(x, _PLAIN) or (grows and not x.is_inference())  # whose versions nobody counts
                for x, grows in zip(leaves, grown, strict=True)
            )
            if call.pure:
                versions[path] = [x._version for x in leaves if isinstance(x, Tensor)]

        def after(path: str, _: nn.Module, given: _Given, output: Any) -> None:
            call = self.calls[path]
            call.end = next(clock)
            call.by_image &= all(self._grown(f"{path}()", call.calls - 1, output))
            if call.pure:
                now = [x._version for x in tensors_among(given[0])]
                call.pure = now == versions[path]

        with hooked(self.modules, before, after, whole=True):
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

    def run_once(self, moment: int, copies: int) -> contextlib.AbstractContextManager[None]:
        """While it lasts, what is over by then runs for the first of so many copies; what it puts out is repeated."""

        def first(path: str, _: nn.Module, given: _Given) -> Any:
            return _mapped(lambda x: x[: len(x) // copies], given)

        def repeated(path: str, _: nn.Module, __: _Given, output: Any) -> Any:
            return _mapped(lambda x: torch.cat([x] * copies), output)

        return hooked({path: self.modules[path] for path in self.before(moment)}, first, repeated, whole=True)


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
