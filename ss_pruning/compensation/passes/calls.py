"""Every call of a module of a model, handed to somebody who may answer in its place."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from ss_pruning._utils.hooks import replaced_forward
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import call

#: A call of a module: the calls that it is made in, from the model's own to itself, each as the module's path and how
#: often that was called before within the same one. The same in each pass that takes the same way.
Call = tuple[tuple[str, int], ...]
#: In the place of a call where what the caller of the model gives is meant.
INPUTS: Call = (("", -1),)
#: Answers a call, given the arguments and what runs the module on them.
Visit = Callable[[Call, tuple[Any, ...], dict[str, Any], Callable[[], Any]], Any]


class Calls:
    """Runs a model with all calls of its modules handed to a visitor; a context manager, and outside as nothing was.

    Scripted modules cannot be intercepted: they are part of what calls them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._visit: Visit | None = None
        self._frames: list[tuple[Call, Counter[str]]] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Calls:
        with contextlib.ExitStack() as undo:
            for path, module in modules_of(self.model).items():
                if not isinstance(module, torch.jit.ScriptModule):
                    undo.enter_context(replaced_forward(module, self._intercepted(path, module.forward)))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def run(self, inputs: Any, visit: Visit) -> Any:
        """One pass; modules that are called beside it, such as in a question to a norm, run as ever."""
        self._visit, self._frames = visit, [((), Counter())]
        try:
            return call(self.model, inputs)
        finally:
            self._visit = None

    def _intercepted(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)  # some code reads signatures
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._visit is None:
                return original(*args, **kwargs)
            return self._visited(self._visit, path, partial(original, *args, **kwargs))

        return forward

    def _visited(self, visit: Visit, path: str, forward: partial[Any]) -> Any:
        caller, made = self._frames[-1]
        this = (*caller, (path, made[path]))
        made[path] += 1
        self._frames.append((this, Counter()))
        try:
            return visit(this, forward.args, forward.keywords, forward)
        finally:
            self._frames.pop()
