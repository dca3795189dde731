#!/usr/bin/env bash
# How much of the core the whole suite runs, slow tests included; fails below 97 %. An hour or more.
#
#   bash scripts/coverage.sh [options of pytest, for example tests/graph]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment dev
"$venv_python" -m coverage run -m pytest -q -m "" "$@"
"$venv_python" -m coverage report --omit='*integrations*' --fail-under=97
