"""Numbers, names and settings as text, for people and for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def count(number: float, unit: str = "") -> str:
    """Write a count with a prefix, three digits long.

    >>> count(4_089_184_256), count(25_557_032), count(940), count(940, "B"), count(999_999)
    ('4.09 G', '25.6 M', '940', '940 B', '1.00 M')
    """
    value, prefix = float(number), ""
    for step in ("k", "M", "G", "T"):
        if abs(value) < 999.5:
            break
        value, prefix = value / 1000, step
    whole = prefix == "" and value == int(value)
    digits = 0 if whole or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}".rstrip()


def percent(fraction: float, digits: int = 1) -> str:
    """Write a fraction as a percentage; what is not nothing does not read as nothing.

    >>> percent(0.7), percent(0.93391, 2), percent(0.0), percent(2e-9)
    ('70.0 %', '93.39 %', '0.0 %', '<0.1 %')
    """
    if 0 < 100 * fraction < 0.5 * 10**-digits:
        return f"<{10**-digits:.{digits}f} %"
    return f"{100 * fraction:.{digits}f} %"


def milliseconds(seconds: float | None) -> str:
    """Write a time.

    >>> milliseconds(0.0123456), milliseconds(None)
    ('12.3 ms', '-')
    """
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"


def plain(text: object) -> str:
    """Return text without rich markup, control characters and lone surrogates, safe to print anywhere."""
    from rich.markup import escape

    return escape(printable(text))


def printable(text: object) -> str:
    r"""Replace control characters and lone surrogates, which no file name or page should carry along.

    >>> printable("layer\x1b[31m.conv")
    'layer�[31m.conv'
    """
    drawn = (c if c.isprintable() or c in " \n\t" else "\ufffd" for c in str(text))
    return "".join(drawn).encode("utf-8", "replace").decode("utf-8")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows of cells in columns: the first to the left, numbers to the right.

    >>> aligned([("", "dense"), ("weights", "4 B")])
    ['         dense', 'weights    4 B']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))]
        ).rstrip()
        for name, *cells in rows
    ]


def rich_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    **style: Any,
) -> Table:
    """Rows of cells as a `rich` table: names to the left, numbers to the right; an empty row begins a section."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", **style)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    return table


def jsonable(value: object) -> Any:
    """Turn a value into what JSON can hold: records to objects, the rest to its text.

    JSON has no infinity and no NaN: they become text, which `float()` reads back.
    """
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value):
        return {item.name: jsonable(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(entry) for entry in value]
    return str(value)


def in_words(value: object) -> str:
    """Write a setting for people."""
    plain = jsonable(value)
    if plain is None:
        return "not set"
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    if isinstance(plain, list):
        return ", ".join(map(str, plain)) or "none"
    return str(plain)
