"""A model as it was traced: who feeds whom, and what must be cut together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ss_pruning._utils.modules import modules_of
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.exclusions import IGNORED_REASON
from ss_pruning.graph.groups import Coupling, couple
from ss_pruning.graph.tracing import trace

#: Modules or module paths whose output channels stay; one alone, or several.
Ignore = str | nn.Module | Iterable[str | nn.Module]


@dataclass(frozen=True)
class TracedModel:
    """What is known of a model once it has run.

    Attributes:
        model: The model; not changed.
        example_inputs: What it ran on.
        connectivity: Who feeds whom.
        coupling: What may be cut, and what may not.
    """

    model: nn.Module
    example_inputs: Any
    connectivity: Connectivity
    coupling: Coupling

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, ignore: Ignore = ()) -> TracedModel:
        """Run the model."""
        connectivity = trace(model, example_inputs)
        ignored: dict[str, str] = {}
        for path in paths_of(model, ignore):
            inside = [p for p in connectivity.layers if p == path or p.startswith(f"{path}.") or not path]
            if not inside:
                raise InputError(f"ignore={path!r} names no layer that runs. {_closest(path, model)}")
            ignored.update(dict.fromkeys(inside, IGNORED_REASON))
        coupling = couple(connectivity, model, ignored)
        return cls(model, example_inputs, connectivity, coupling)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By path."""
        return modules_of(self.model)


def _closest(path: str, model: nn.Module) -> str:
    names = [name for name, _ in model.named_modules() if name]
    close = difflib.get_close_matches(path, names, n=4)
    said = f"The closest names are {', '.join(close)}; all" if close else "All"
    return f"{said} are in dict(model.named_modules())"


def paths_of(model: nn.Module, ignore: Ignore) -> list[str]:
    """The same as module paths.

    Raises:
        InputError: It holds a module that is not in the model, or neither modules nor paths.
    """
    paths = {module: path for path, module in modules_of(model).items()}
    items = (
        (ignore,)
        if isinstance(ignore, (str, nn.Module)) or not isinstance(ignore, Iterable)
        else tuple(ignore)
    )
    for item in items:
        if not isinstance(item, (str, nn.Module)):
            raise InputError(f"ignore={item!r:.80} is neither a module of the model nor the path of one")
        if isinstance(item, nn.Module) and item not in paths:
            raise InputError(f"ignore holds a {type(item).__name__} that is not in the model")
    return [paths[item] if isinstance(item, nn.Module) else item for item in items]
