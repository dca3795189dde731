"""What all generated pages are made with."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from benchmarks import pages


def test_a_table_keeps_each_cell_in_its_place() -> None:
    text = pages.table(["a", "b", "c"], [["x|y", 1, "two\nlines"]], "ll")
    assert text.splitlines() == ["| a | b | c |", "|---|---|---:|", "| x\\|y | 1 | two lines |"]


def test_a_mean_over_too_few_seeds_is_marked() -> None:
    assert [pages.spread(values) for values in ([], [1.0], [1.0, 3.0], [1.0, 2.0, 3.0])] == [
        "",
        "1.00¹",
        "2.00 ± 1.41²",
        "2.00 ± 1.00",
    ]
    assert pages.spread([1.0], digits=1, seeds=1) == "1.0"


def test_only_the_marked_part_of_a_page_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    pages.write_part(page, "x", "new\nlines")
    assert page.read_text() == "before\n<!-- x -->\nnew\nlines\n<!-- /x -->\nafter\n"
    with pytest.raises(SystemExit, match="lacks the markers"):
        pages.write_part(page, "y", "new")


def test_a_template_wants_all_its_facts() -> None:
    with pytest.raises(UndefinedError):
        pages.render("readme_headline")
