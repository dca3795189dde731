"""Draw `docs/terminal.svg`: real commands and what they print, as one animated picture.

    python scripts/terminal.py

The commands run one after the other in an empty folder. Every line appears when it did, but that no wait is longer than
`LONGEST_WAIT` seconds, and none shorter than `TO_READ`. There is no script in the picture, only CSS.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "terminal.svg"
COMMANDS = (
    "ss-prune prune demo:digits --data digits --macs 0.2 --batch 64 --out runs/plain",
    "ss-prune prune demo:digits --data digits --macs 0.2 --batch 64 --compensation reconstruct --out runs/small",
    "ss-prune recover runs/small/model.safetensors --data digits --steps 100",
    "ss-prune export runs/small/recovered.safetensors --format onnx",
)
COLUMNS, ROWS = 108, 32
LONGEST_WAIT, TO_READ, LAST_PAUSE = 4.0, 0.25, 10.0
_CHARACTER, _HEIGHT, _MARGIN = 8, 18, 16
_PROMPT = "$ "

_STYLE = """
svg { background: #f6f8fa } #ahead { fill: #f6f8fa }
text { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #24292f; white-space: pre }
.command { fill: #0550ae; font-weight: bold }
@media (prefers-color-scheme: dark) {
  svg { background: #161b22 } #ahead { fill: #161b22 } text { fill: #e6edf3 } .command { fill: #79c0ff }
}
"""


class Line(NamedTuple):
    """What was printed, and when."""

    seconds: float
    text: str


def main() -> None:
    """Run the commands and write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [line for command in COMMANDS for line in recorded(command, Path(folder))]
    PICTURE.write_text(picture(shortened(lines)), encoding="utf-8")
    print(f"{PICTURE}: {len(lines)} lines")


def recorded(command: str, folder: Path) -> Iterator[Line]:
    """The command behind a prompt, then each line that it prints, on stdout or stderr."""
    yield Line(time.monotonic(), _PROMPT + command)
    words = [sys.executable, "-m", "ss_pruning.cli", *command.split()[1:]]
    environment = os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for text in process.stdout or ():
            yield Line(time.monotonic(), text.rstrip())
    if process.returncode:
        raise SystemExit(f"{command} failed")
    yield Line(time.monotonic(), "")


def shortened(lines: Sequence[Line]) -> list[Line]:
    """From second 0 on, with waits that are neither too long nor too short."""
    seconds, kept = 0.0, [Line(0.0, lines[0].text)]
    for before, line in pairwise(lines):
        seconds += min(max(line.seconds - before.seconds, TO_READ), LONGEST_WAIT)
        kept.append(Line(seconds, line.text))
    return kept


def picture(lines: Sequence[Line]) -> str:
    """An SVG in which the lines appear at their times, scrolled once there are more than `ROWS`, again and again."""
    total = lines[-1].seconds + LAST_PAUSE
    width, height = COLUMNS * _CHARACTER + 2 * _MARGIN, ROWS * _HEIGHT + 2 * _MARGIN
    shown = "\n".join(_text(number, line.text) for number, line in enumerate(lines) if line.text)
    counts = {f"{line.seconds / total:.2%}": number for number, line in enumerate(lines, 1)}
    scroll = " ".join(f"{share} {{ {_scrolled(count)} }}" for share, count in counts.items())
    uncover = " ".join(f"{share} {{ {_uncovered(count)} }}" for share, count in counts.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<title>ss-prune in a terminal: prune, recover, export</title>
<style>{_STYLE}@keyframes scroll {{ {scroll} }}
@keyframes uncover {{ {uncover} }}
#lines {{ {_scrolled(len(lines))}; animation: scroll {total:.1f}s step-end infinite }}
#ahead {{ {_uncovered(len(lines))}; animation: uncover {total:.1f}s step-end infinite }}
@media (prefers-reduced-motion) {{ #lines, #ahead {{ animation: none }} }}
</style>
<svg x="{_MARGIN}" y="{_MARGIN}" width="{width - 2 * _MARGIN}" height="{height - 2 * _MARGIN}"><g id="lines">
{shown}
</g><rect id="ahead" width="100%" height="100%"/></svg>
</svg>
"""


def _text(number: int, text: str) -> str:
    kind = ' class="command"' if text.startswith(_PROMPT) else ""
    # A length of its own, so that columns stand below each other in any font.
    return f'<text y="{(number + 1) * _HEIGHT - 5}" textLength="{len(text) * _CHARACTER}"{kind}>{escape(text)}</text>'


def _scrolled(count: int) -> str:
    """The lines, so far up that the last of `count` is in sight."""
    return f"transform: translateY({min(ROWS - count, 0) * _HEIGHT}px)"


def _uncovered(count: int) -> str:
    """What hides the lines that are still to come."""
    return f"transform: translateY({min(count, ROWS) * _HEIGHT}px)"


if __name__ == "__main__":
    main()
