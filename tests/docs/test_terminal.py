"""The recording of a terminal: of the commands as they are, drawn so that each line is in sight when it was printed."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.support.scripts import loaded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def terminal() -> ModuleType:
    return loaded(ROOT / "scripts" / "terminal.py")


def test_the_picture_is_of_the_commands_as_they_are(terminal: ModuleType) -> None:
    drawn = terminal.PICTURE.read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    commands = [unescape(text) for text in re.findall(r'class="command">\$ (.*?)</text>', drawn)]
    assert commands == list(terminal.COMMANDS)
    assert "<script" not in drawn
    assert "/tmp" not in drawn


def test_waits_are_neither_too_long_nor_too_short(terminal: ModuleType) -> None:
    lines = [terminal.Line(seconds, "") for seconds in (50.0, 50.0, 51.0, 151.0)]
    short, long = terminal.TO_READ, terminal.LONGEST_WAIT
    times = [line.seconds for line in terminal.shortened(lines)]
    assert times == [0, short, short + 1, short + 1 + long]


def test_each_line_is_the_last_in_sight_when_it_was_printed(terminal: ModuleType) -> None:
    lines = [terminal.Line(float(number), f"<line {number}>") for number in range(terminal.ROWS + 8)]
    drawn = terminal.picture(lines)
    window = int(re.findall(r'<svg x=.*? height="(\d+)">', drawn)[0])
    baselines = [int(y) for y in re.findall(r'<text y="(\d+)"', drawn)]
    scrolled, hidden = (steps(drawn, name) for name in ("scroll", "uncover"))
    total = lines[-1].seconds + terminal.LAST_PAUSE
    assert list(scrolled) == pytest.approx([100 * line.seconds / total for line in lines], abs=0.01)
    for number, (share, shift) in enumerate(scrolled.items()):
        in_sight = [y for y in baselines if 0 < y + shift < min(hidden[share], window)]
        assert in_sight[-1] == baselines[number]
        assert len(in_sight) == min(number + 1, terminal.ROWS)
    assert "&lt;line 1&gt;" in drawn


def steps(drawn: str, name: str) -> dict[float, int]:
    """Pixels down, by percent of the time."""
    (line,) = re.findall(rf"@keyframes {name} (.*)", drawn)
    return {float(share): int(y) for share, y in re.findall(r"([\d.]+)% \{ .*?\((-?\d+)px\)", line)}


def test_what_a_command_prints_is_recorded_and_a_failure_ends_it(
    terminal: ModuleType, tmp_path: Path
) -> None:
    lines = list(terminal.recorded("ss-prune compare --help", tmp_path))
    assert lines[0].text == "$ ss-prune compare --help"
    assert any("Usage" in line.text for line in lines)
    assert [line.seconds for line in lines] == sorted(line.seconds for line in lines)
    with pytest.raises(SystemExit, match="failed"):
        list(terminal.recorded("ss-prune prune", tmp_path))
