"""What a newcomer meets: a page says first what one gets, and last what can go wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAVIGATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
HOW_TO = re.findall(r"(\w+\.md)", re.findall(r"  - How to:\n((?: {6}.*\n)*)", NAVIGATION)[0])


def test_every_page_is_in_the_navigation_once() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    listed = re.findall(r": ([\w/]+\.md)", NAVIGATION)
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("name", ["tutorial.md", "notebook.md", *HOW_TO])
def test_it_begins_with_what_one_gets_and_ends_with_what_can_go_wrong(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    title, paragraph, *_ = text.split("\n\n")
    assert title.startswith("# ")
    assert paragraph.startswith("You get "), paragraph
    assert re.findall(r"^## (.*)", text, re.MULTILINE)[-1] == "What can go wrong"
