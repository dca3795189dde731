"""What the documentation site does besides mkdocs: leaves pages out of the navigation that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Drop entries whose page a checkout does not hold, so that a part of the docs can be built alone."""
    config["nav"] = _present(config["nav"], Path(config["docs_dir"]))
    return config


def _present(entries: list[Any], folder: Path) -> list[Any]:
    kept = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _present(target, folder)})
        elif (folder / target).is_file():
            kept.append(entry)
    return kept
