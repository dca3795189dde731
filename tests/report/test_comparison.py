"""Two reports side by side, and the checkup: figures that are right, notes where they do not compare."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from rich.console import Console
from typer.testing import CliRunner

from ss_pruning.cli.app import app
from ss_pruning.errors import InputError
from ss_pruning.report.comparison import Comparison, Figure, compare
from ss_pruning.report.records import LayerReport, Report
from tests.report.test_records import EVIL, Page

A = Report(
    model="net",
    macs_before=1000,
    macs_after=500,
    params_before=200,
    params_after=120,
    layers=[
        LayerReport("conv1", "Conv2d", 3, 3, 16, 8, 48, 24),
        LayerReport("only_in_a", "Conv2d", 16, 8, 4, 4, 64, 32),
    ],
    excluded=[],
    max_error=0.0,
    settings={"macs": 0.5, "importance": "synaptic", "score": "share"},
    accuracy_before=0.9,
    accuracy_after=0.8,
    images=100,
    command="ss-prune prune net --macs 0.5",
)
B = replace(
    A,
    macs_after=400,
    params_after=130,
    layers=[
        LayerReport("conv1", "Conv2d", 3, 3, 16, 6, 48, 18),
        LayerReport("only_in_b", "Linear", 6, 6, 2, 2, 12, 12),
    ],
    settings={"macs": 0.5, "importance": "magnitude"},
    accuracy_after=0.85,
)


def printed(found: Comparison, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(found.table())
    return console.export_text()


def test_figures_are_those_of_both_reports_and_their_difference() -> None:
    found = {row.name: (row.dense, row.a, row.b, row.difference) for row in compare(A, B).figures}
    assert found == {
        "top-1": ("90.00 %", "80.00 %", "85.00 %", "+5.00 points"),
        "multiply-accumulates": ("1.00 k", "500 (50.0 %)", "400 (40.0 %)", "-20.0 %"),
        "parameters": ("200", "120 (60.0 %)", "130 (65.0 %)", "+8.3 %"),
    }


def test_layers_are_matched_by_path() -> None:
    pairs = {pair.path: (pair.dense, pair.a, pair.b) for pair in compare(A, B).layers}
    assert pairs == {"conv1": (16, 8, 6), "only_in_a": (4, 4, None), "only_in_b": (2, None, 2)}
    assert list(pairs) == ["conv1", "only_in_a", "only_in_b"]


def test_it_prints_as_its_table_and_stands_in_a_notebook() -> None:
    found = compare(A, B, "runs/a", "[bold]b[/bold]")
    lines = str(found).splitlines()
    assert lines[:2] == ["A: runs/a", "B: [bold]b[/bold]"]
    assert lines[2].split() == ["dense", "A", "B", "A", "to", "B"]
    for row in found.figures:
        assert f"{row.name}  {row.dense}  {row.a}  {row.b}  {row.difference}".split() in map(str.split, lines)
    assert "importance: synaptic in A, magnitude in B" in lines
    assert "score: share in A, - in B" in lines
    assert lines[-1] == "3 of 3 layers differ in width"
    assert repr(found) == "Comparison('runs/a', '[bold]b[/bold]': 3 of 3 layers differ in width)"
    assert "+5.00 points" in Page(found._repr_html_()).text


def test_only_settings_that_differ_are_shown() -> None:
    assert compare(A, B).settings == [("importance", "synaptic", "magnitude"), ("score", "share", None)]
    assert compare(A, A).settings == []


def test_a_comparison_with_itself_has_no_note_and_no_difference() -> None:
    found = compare(A, A)
    assert found.notes == []
    assert {row.difference for row in found.figures} == {"+0.00 points", "+0.0 %"}
    assert "0 of 2 layers differ" in printed(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "called differently: net and other"),
        ({"macs_before": 4000}, "inputs of different sizes"),
        ({"images": 50}, "measured on 100 and 50 images"),
        ({"accuracy_before": 0.7}, "dense accuracies differ"),
        ({"accuracy_before": None, "images": None}, "Accuracy was measured of A only"),
        ({"random_weights": True}, "B has random weights"),
    ],
)
def test_what_does_not_compare_is_said(changes: dict[str, Any], words: str) -> None:
    (note,) = compare(A, replace(B, **changes)).notes
    assert words in note


def test_different_networks_are_refused() -> None:
    with pytest.raises(InputError, match=r"different networks: 'net' with 200 .* 'net' with 201"):
        compare(A, replace(B, params_before=201))


def test_unknown_figures_are_left_out() -> None:
    bare = replace(A, accuracy_after=None)
    assert [row.name for row in compare(bare, B).figures] == ["multiply-accumulates", "parameters"]
    assert compare(replace(A, accuracy_before=None), B).figures[0].dense == "-"


TIMED_A = replace(A, latency_before=0.0500, latency_after=0.0302, latency_ratio=0.6)
TIMED_B = replace(B, latency_before=0.0502, latency_after=0.0243, latency_ratio=0.48)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_folds_figures_and_loses_none(width: int) -> None:
    found = compare(TIMED_A, TIMED_B)
    words = printed(found, width).split()
    for row in found.figures:
        assert row.name in words
        for cell in (row.dense, row.a, row.b, row.difference):
            assert set(cell.split()) <= set(words), cell


def test_latencies_are_compared_as_shares_of_the_dense_model() -> None:
    found = compare(TIMED_A, TIMED_B)
    row = found.figures[-1]
    # 0.48 / 0.6 = 0.8: the shares count, as each was measured against its own dense model
    assert row == Figure("latency", "50 ms / 50.2 ms", "30.2 ms (60.0 %)", "24.3 ms (48.0 %)", "-20.0 %")
    assert found.notes == []
    html = found.to_html(TIMED_A, TIMED_B)
    assert "24.3 ms (48.0 %)" in Page(html).text
    assert "50&nbsp;ms&nbsp;/ 50.2&nbsp;ms" in html  # a phone has no room for both on one line
    assert compare(TIMED_A, TIMED_A).figures[-1].dense == "50 ms"


@pytest.mark.parametrize(
    ("spreads", "cells"),
    [
        (((0.58, 0.62), (0.45, 0.5)), ("30.2 ms (60.0 %)", "24.3 ms (48.0 %)", "-20.0 %")),
        (((0.5, 0.62), (0.45, 0.55)), ("30.2 ms (60.0 %)", "24.3 ms (48.0 %)", "too noisy to tell")),
        (((0.5, 1.1), (0.45, 0.49)), ("30.2 ms (too noisy to tell)", "24.3 ms (48.0 %)", "-20.0 %")),
    ],
)
def test_shares_whose_spreads_overlap_are_not_told_apart(spreads: Any, cells: tuple[str, ...]) -> None:
    pair = (replace(r, latency_spread=s) for r, s in zip((TIMED_A, TIMED_B), spreads, strict=True))
    (row,) = (figure for figure in compare(*pair).figures if figure.name == "latency")
    assert (row.a, row.b, row.difference) == cells


def test_a_latency_that_only_one_report_holds_is_left_out() -> None:
    for pair in ((TIMED_A, B), (A, TIMED_B)):
        assert "latency" not in {row.name for row in compare(*pair).figures}


def test_dense_times_that_differ_are_said() -> None:
    (note,) = compare(TIMED_A, replace(TIMED_B, latency_before=0.0775)).notes
    assert "took 50 ms and 77.5 ms" in note


def test_the_page_tells_both_and_needs_nothing_from_outside() -> None:
    html = compare(A, replace(B, images=50), "runs/a", "runs/b").to_html(A, B)
    page = Page(html)
    for words in (
        "runs/a",
        "runs/b",
        "+5.00 points",
        "8 | 6",
        "- | 2",
        "synaptic",
        "magnitude",
        A.command,
    ):
        assert str(words) in "".join(page.words), words
    assert "measured on 100 and 50 images" in page.text
    assert not {"script", "link", "img"} & {tag for tag, _ in page.elements}
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert "None." in Page(compare(A, A).to_html(A, A)).text


def test_text_from_outside_stays_text() -> None:
    evil = replace(
        A,
        model=EVIL,
        command=EVIL,
        settings={EVIL: EVIL},
        layers=[replace(A.layers[0], path=EVIL, share_cut=math.nan)],
    )
    found = compare(evil, B, EVIL, EVIL)
    assert not Page(found.to_html(evil, B)).all("script")
    assert "\x1b" not in printed(found)


# ---------------------------------------------------------------- the commands


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "a").mkdir()
    A.save_json(tmp_path / "a" / "report.json")
    B.save_json(tmp_path / "b.json")
    return tmp_path / "a", tmp_path / "b.json"


def test_compare_takes_folders_and_files(places: tuple[Path, Path]) -> None:
    result = run("compare", *places)
    assert result.exit_code == 0, result.output
    assert "-20.0 %" in result.stdout
    assert "3 of 3 layers differ" in result.stdout


def test_compare_prints_json_and_nothing_else(places: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("compare", *places, "--json", "--html", tmp_path / "page.html")
    values = json.loads(result.stdout)
    assert values["format"] == "ss-pruning comparison 1"
    assert values["layers"][0] == {"path": "conv1", "kind": "Conv2d", "dense": 16, "a": 8, "b": 6}
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_compare_refuses_what_is_no_report(places: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("compare", places[0], tmp_path / "absent")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "cannot read the report" in result.stderr
    result = run("compare", *places, "--html", tmp_path / "absent" / "page.html")
    assert result.exit_code == 2
    assert "does not exist" in " ".join(result.stderr.replace("│", " ").split())


def test_the_program_has_no_colours_when_piped(places: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "ss_pruning.cli", "compare", *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_help_teaches_exit_codes_completion_and_every_command() -> None:
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    for words in (
        "Exit codes: 0 done",
        "130 interrupted",
        "--install-completion",
        "prune",
        "score",
        "compare",
        "doctor",
    ):
        assert words in text
    assert "ss-prune compare runs/synaptic runs/magnitude" in " ".join(
        run("compare", "--help").stdout.split()
    )
    assert "--json" in run("doctor", "--help").stdout
