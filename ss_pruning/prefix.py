"""What runs before copies of a net differ runs for one of them: which modules those are, seen in a run of two.

The copies lie one behind the other in the batch. Of modules that lie in each other the outermost is taken: a whole
stage costs one repetition of what it puts out.
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
    """Watches a run of two copies, and lets what begins and ends before a module run for one of many.

    Attributes:
        modules: By path, those of the model.
        images: How many there are of each copy.
    """

    modules: Mapping[str, nn.Module]
    images: int
    calls: dict[str, _Call] = field(default_factory=dict)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts, the model must run once, on two equal copies of the images."""
        clock, versions = count(), dict[str, list[int]]()

        def before(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            call = self.calls.setdefault(path, _Call(next(clock), calls=0))
            call.calls += 1
            leaves = pytree.tree_leaves(args)
            call.pure &= not kwargs and all(isinstance(x, _PLAIN) or self._may_be_cut(x) for x in leaves)
            if call.pure:
                versions[path] = [x._version for x in leaves if isinstance(x, Tensor)]

        def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self.calls[path]
            call.end = next(clock)
            call.by_image &= all(map(self._by_image, pytree.tree_leaves(output)))
            if call.pure:
                now = [x._version for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
                call.pure = now == versions[path]

        with contextlib.ExitStack() as undo:
            for path, module in self.modules.items():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                handles = (
                    module.register_forward_pre_hook(partial(before, path), with_kwargs=True),
                    module.register_forward_hook(partial(after, path), with_kwargs=True),
                )
                for handle in handles:
                    undo.callback(handle.remove)
            yield

    def _by_image(self, x: Any) -> bool:
        """True of a batch that holds every image twice, one half after the other."""
        if not isinstance(x, Tensor) or not x.dim() or len(x) % (2 * self.images):
            return False
        first, second = x.float().chunk(2)
        return bool((first - second).square().mean() <= _SAME * first.square().mean())

    def _may_be_cut(self, x: Any) -> bool:
        return self._by_image(x) and not x.is_inference()  # whose versions nobody counts

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
            return _mapped(lambda x: x if len(x) % (copies * self.images) else x[: len(x) // copies], args)

        def repeated(module: nn.Module, args: Any, output: Any) -> Any:
            return _mapped(lambda x: torch.cat([x] * copies), output)

        for path in self.before(moment):
            undo.callback(self.modules[path].register_forward_pre_hook(first).remove)
            undo.callback(self.modules[path].register_forward_hook(repeated).remove)


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)
