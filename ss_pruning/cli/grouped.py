"""Commands whose options are the fields of dataclasses: the command line's own, and the library's configurations.

Of a configuration the name, the choices, the default and the help of an option stand in the class and its docstring;
what only a command line needs (a panel, a metavar) stands here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from ss_pruning import config
from ss_pruning.cli.console import guarded
from ss_pruning.errors import InputError
from ss_pruning.integrations.finetuning.options import Sparsifying, Training

CRITERION = "Criterion"
#: Of configurations that do not decide what is cut.
_PANELS: dict[type, str] = {
    config.Recovery: "Training",
    Training: "Training",
    Sparsifying: "Sparse training and pruning",
}
#: By class and field: what typer is told beside help, type and default.
_TOLD: dict[tuple[type, str], dict[str, Any]] = {
    (config.Allocation, "max_ratio"): {"metavar": "0..1"},
    (config.Allocation, "cost_exponent"): {"metavar": "P"},
    (config.Allocation, "round_to"): {"metavar": "N|measured", "parser": lambda text: _multiple(text)},
    (config.Synaptic, "conditional"): {"metavar": "0..1"},
}
#: What cannot be said on a command line, or is said otherwise.
_LEFT_OUT = {(config.Allocation, "latency_inputs")}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of the dataclasses that it takes, and guard it.

    Parameters that are no dataclass are options or arguments as ever; one named `results` gets the real stdout.
    """
    hints: dict[str, Any] = get_type_hints(command, include_extras=True)
    wanted = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: hints[name] for name in wanted if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    for name, parameter in wanted.items():
        if name in groups:
            parameters += _parameters(groups[name])
        elif name != "results":
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        with guarded() as results:
            made = {
                name: group(**{p.name: values.pop(p.name) for p in _parameters(group)})
                for name, group in groups.items()
            }
            command(**made, **values, **({"results": results} if "results" in wanted else {}))

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    """One for each field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    told = _documented(group)
    for field in fields(group):
        if (group, field.name) in _LEFT_OUT:
            continue
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            own = _TOLD.get((group, field.name), {})
            hint = str | None if "parser" in own else hint
            option = partial(
                typer.Option, rich_help_panel=_PANELS.get(group, CRITERION), help=told[field.name]
            )
            hint = Annotated[hint, option(show_default=field.default is not None, **own)]
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hint
        )


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _documented(group: type) -> dict[str, str]:
    """By attribute, what the docstring says of it, without what only readers of the code can look up."""
    _, _, text = inspect.getdoc(group).partition("Attributes:\n")  # type: ignore[union-attr]
    text = text.partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: _plain(" ".join(lines.split())) for name, lines in entries}


def _plain(text: str) -> str:
    """For the terminal: no cross-references, no backticks, and no brackets that would be taken for markup."""
    text = re.sub(r",? ?see `ss_pruning[^`]*`", "", text).replace("`", "")
    return text.replace("[", r"\[")


def _multiple(text: str) -> int | str:
    """Read --round-to.

    Raises:
        InputError: It is no number, nor the word.
    """
    if text == "measured":
        return text
    if not text.isdigit():
        raise InputError(f"--round-to is a whole number, such as 8, or measured, not {text!r}.")
    return int(text)
