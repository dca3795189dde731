"""How results become pages: words in `templates/`, and one helper each for a table, a spread, a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.common import ROOT
from ss_pruning._utils.files import write_text

#: Behind a mean over fewer seeds than there should be.
_FEW = {1: "¹", 2: "²"}
_templates = Environment(
    loader=FileSystemLoader(ROOT / "benchmarks" / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,  # Markdown; `table` escapes what would end a cell
)


def render(template: str, **facts: Any) -> str:
    """The template with its facts filled in, without empty lines at the end."""
    return _templates.get_template(f"{template}.md.j2").render(facts).rstrip()


def write_page(page: Path, template: str, **facts: Any) -> Path:
    """Write a page from its template, all at once."""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render(template, **facts) + "\n")
    return page


def write_part(page: Path, name: str, text: str) -> Path:
    """Rewrite what stands between `<!-- name -->` and `<!-- /name -->` of a page that is written by hand."""
    before, begin, rest = page.read_text("utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise SystemExit(f"{page} lacks the markers <!-- {name} --> and <!-- /{name} -->")
    write_text(page, f"{before}{begin}{text}\n{end}{after}")
    return page


def table(head: Sequence[str], rows: Iterable[Iterable[Any]], align: str = "l") -> str:
    """A table in Markdown; columns that `align` ("l" or "r" for each) does not name are aligned to the right."""
    align = align.ljust(len(head), "r")
    rule = "|".join({"l": "---", "r": "---:"}[side] for side in align)
    cells = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *rows))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join((first, f"|{rule}|", *others))


def spread(values: Iterable[float], digits: int = 2, seeds: int = 3) -> str:
    """Mean ± standard deviation; fewer values than `seeds` are marked by ¹ or ², and none are an empty cell."""
    found = list(values)
    if not found:
        return ""
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    few = _FEW.get(len(found), "") if len(found) < seeds else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}{few}"


@contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes `[rows, columns]`, saved as SVG at the end: the same file for the same results."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "ss-pruning"}):
        drawn, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
        yield drawn, axes
        drawn.savefig(path, metadata={"Date": None})
        plt.close(drawn)
