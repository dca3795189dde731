"""A report read back from plain values: files may say anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ss_pruning.errors import FileFormatError
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.report.records import FORMAT, Fidelity, LayerReport, Report


def report_from(values: Mapping[str, Any]) -> Report:
    """The report that `Report.to_dict` gave.

    Raises:
        FileFormatError: A field is missing, unknown or of the wrong type.
    """
    if values.get("format") != FORMAT:
        raise FileFormatError(
            f"not a report of this version: the format reads {values.get('format')!r}, not {FORMAT!r}."
        )
    known = {key: value for key, value in values.items() if key != "format"}
    try:
        layers = [_layer(entry) for entry in known.pop("layers")]
        for name in ("fidelity", "fidelity_uncompensated"):
            known[name] = _fidelity(known.get(name))
        excluded = [_excluded(entry) for entry in known.pop("excluded")]
        known["max_error"] = float(known["max_error"])
        if (spread := known.get("latency_spread")) is not None:
            low, high = spread
            known["latency_spread"] = (float(low), float(high))
        report: Report = _checked(Report(layers=layers, excluded=excluded, **known))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"the report is damaged: {error}.") from error
    for accuracy in (report.accuracy_before, report.accuracy_after):
        if accuracy is not None and not 0 <= accuracy <= 1:
            raise FileFormatError(f"the report is damaged: an accuracy is {accuracy!r}.")
    return report


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "tuple": (tuple,),
    "list": (list,),
    "dict": (dict,),
    "None": (type(None),),
    "Fidelity": (Fidelity,),
    "Any": (object,),
}


def _checked(record: Any) -> Any:
    """The record itself, once every field is of its type and no number negative: files may say anything."""
    for item in fields(record):
        value = getattr(record, item.name)
        if not any(_fits(value, kind) for kind in str(item.type).split(" | ")):
            raise TypeError(f"{item.name} is {value!r:.60}, not {item.type}")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{item.name} is {value!r}")
    return record


def _fits(value: object, kind: str) -> bool:
    name, _, inner = kind.rstrip("]").partition("[")
    if not isinstance(value, _KINDS[name]):
        return False
    held = _KINDS.get(inner.rpartition(", ")[2], (object,))
    if isinstance(value, dict):
        return all(isinstance(key, str) and isinstance(entry, held) for key, entry in value.items())
    return not isinstance(value, list) or all(isinstance(entry, held) for entry in value)


def _layer(entry: Mapping[str, Any]) -> LayerReport:
    strength = tuple(float(value) for value in entry.get("strength", ()))
    return _checked(  # type: ignore[no-any-return]
        LayerReport(**{**entry, "strength": strength, "share_cut": float(entry.get("share_cut", math.nan))})
    )


def _fidelity(entry: Mapping[str, Any] | None) -> Fidelity | None:
    if entry is None:
        return None
    numbers = {name: float(entry[name]) for name in ("error", "error_deviation")}  # may be infinite
    return _checked(Fidelity(**{**entry, **numbers}))  # type: ignore[no-any-return]


def _excluded(entry: Mapping[str, Any]) -> Excluded:
    return _checked(Excluded(**{**entry, "paths": tuple(entry["paths"])}))  # type: ignore[no-any-return]
