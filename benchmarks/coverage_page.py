"""Summary and page of the coverage run."""

from __future__ import annotations


def write_all(*args): ...
