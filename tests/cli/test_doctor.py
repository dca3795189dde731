"""`ss-prune doctor`: what is there, what is missing, and how to get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from typer.testing import CliRunner

from ss_pruning.cli import doctor
from ss_pruning.cli.app import app


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *words])


def test_it_says_what_is_there_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "torch>=2.6",
        "absent-one>=1; extra == 'timm'",
        "pytest>=8; extra == 'dev'",
        "ss-pruning[timm]; extra == 'all'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: requires)
    result = run()
    assert result.exit_code == 0, result.output
    assert "missing: absent-one" in result.stdout
    assert "pip install 'ss-pruning[timm]'" in result.stdout
    assert "pip install 'ss-pruning[dev]'" not in result.stdout
    assert "--install-completion" in result.stdout
    values = json.loads(run("--json").stdout)
    assert list(values["required"]) == ["torch"]
    assert {name: extra["installed"] for name, extra in values["extras"].items()} == {
        "dev": True,
        "timm": False,
    }
    assert {"threads", "linear algebra", "processor", "accelerators"} <= values["machine"].keys()
    assert all(values["machine"].values())
    libraries = values["machine"]["linear algebra"].split(", ")
    assert len(set(libraries)) == len(libraries), "each is named once"


def test_it_fails_where_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["absent-one"])
    result = run()
    assert result.exit_code == 2
    assert "missing" in result.stdout


def test_it_works_from_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(_: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "requires", not_installed)
    assert doctor.examine().required.keys() >= {"torch", "torch-pruning"}


def test_every_extra_has_a_purpose() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    names = {line.partition(" = ")[0] for line in section.splitlines() if " = [" in line}
    assert names == doctor.PURPOSES.keys()
