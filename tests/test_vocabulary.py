"""Words that were retired for the field's: they are not to come back into code, docs, reports or the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What is not said any more, and what is said in its place.
RETIRED = {
    r"\bleft[ _-]whole\b|\bLeftWhole\b": "excluded",
    r"\b[Cc]ontests?\b": "ranking",
    r"\b[Ss]ettl(er|ing|ed)\b": "plan search",
    r"\b[Hh]asten(ing|ed)\b": "latency target",
    r"\b[Pp]ulling\b": "VJP probe",
    r"\b[Ww]irings?\b|\bFeeds?\b": "connectivity, edge",
    r"\bUnits?\b(?! de)|\bCells?\b": "PruningGroup, Subgroup",
    r"\b(family|families)_|_(family|families)\b": "channel set",
    r"\bFollowers?\b": "size attributes",
    r"\bBench\b|\bLab\b": "Verifier, BatchedAblation",
    r"\bdamages?\b": "sensitivity, output error",
    r"\bside_by_side\b": "batched ablation",
    r"\b[Rr]edundanc": "conditional variance",
    r"\bmoments\s*=|\b[Mm]oments (of|are|come)\b|\bMoments\b": "activation statistics",
    r"[Rr]e-?estimat": "recalibration",
    r"\bdistil(led)? images\b|\bdistil\b|calibration=.distilled": "synthetic images",
    r"\bLayerTimes?\b|\blayer_times\b": "latency table",
    r"\bnet's\b|\b(the|a|dense|small|pruned) nets?\b": "model",
    r"scope=.measured|--scope measured": "sensitivity",
}
FILES = [
    path
    for folder in ("ss_pruning", "integrations", "docs", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".j2") and "integrations/integrations" not in str(path)
] + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("pattern", RETIRED, ids=list(RETIRED.values()))
def test_retired_words_stay_away(pattern: str) -> None:
    retired = re.compile(pattern)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if retired.search(line)
    ]
    assert not found, f"say {RETIRED[pattern]!r}: {found}"


def test_names_of_tests_stay_away_from_them_too() -> None:
    retired = re.compile(
        r"def (test\w*?_(?:famil(?:y|ies)|damage|unit|cells_of|distil\w*?|\w+_moments)(?:_\w*)?)\("
    )
    harmless = {"test_killed_at_random_moments_it_loses_nothing_that_was_saved"}
    names = {name for path in (ROOT / "tests").rglob("*.py") for name in retired.findall(path.read_text())}
    assert not names - harmless
