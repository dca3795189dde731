"""Leaves out, where an optional package is missing, the modules that cannot be imported without it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("nni") else ["**/integrations/nni_*.py"]
