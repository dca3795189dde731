"""Commands whose options are the fields of dataclasses: the command line's own, and the library's configurations.

Name, choices, default and help of an option stand in the class and its docstring; what only a command line needs (a
panel, a metavar) is with the field, or for the library's own classes in `ss_pruning.cli.options`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from ss_pruning.cli.console import guarded
from ss_pruning.cli.options import LEFT_OUT, PANELS, TOLD


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of the dataclasses that it takes, and guard it.

    Parameters that are no dataclass are options or arguments as ever; one named `results` gets the real stdout. The
    docstring is its help.
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

    run.__name__ = command.__name__
    run.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")  # each paragraph in one line
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    """One for each field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        owner = next(c for c in group.__mro__ if field.name in inspect.get_annotations(c))
        if (owner, field.name) in LEFT_OUT:
            continue
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            told = {**field.metadata, **TOLD.get((owner, field.name), {})}
            hint = str | None if "parser" in told else hint
            said = next(text for c in group.__mro__ if (text := _documented(c).get(field.name)))
            hint = Annotated[hint, _info(owner, field, {"help": said, **told})]
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _info(owner: type, field: Field[Any], told: dict[str, Any]) -> Any:
    """What typer takes."""
    shown = {"rich_help_panel": PANELS.get(owner), "show_default": field.default is not None}
    told = {**shown, **told}
    kind, names = told.pop("kind", typer.Option), told.pop("param_decls", ())
    return kind(*names, **told)


def _documented(group: type) -> dict[str, str]:
    """By attribute, what the docstring says of it, without what only readers of the code can look up."""
    _, _, text = inspect.cleandoc(group.__doc__ or "").partition("Attributes:\n")
    text = text.partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: _plain(" ".join(lines.split())) for name, lines in entries}


def _plain(text: str) -> str:
    """For the terminal: no cross-references, no backticks, no brackets that would be taken for markup; bold is bold."""
    text = re.sub(r",? ?see `ss_pruning[^`]*`", "", text).replace("`", "").replace("[", r"\[")
    return re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/bold]", text)
