#!/usr/bin/env bash
# Set everything up (once), then lint, check types and run the tests.
#
#   bash scripts/test.sh [options of pytest, for example -m slow]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment dev
"$venv_python" -m ruff check
"$venv_python" -m ruff format --check
"$venv_python" -m mypy
exec "$venv_python" -m pytest "$@"
