#!/usr/bin/env bash
# Set everything up (once), then lint, check types and run the tests, a file at a time on each of up to four cores.
#
#   bash scripts/test.sh [options of pytest, for example -m slow, or -n 0 for one process]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment dev
"$venv_python" -m ruff check
"$venv_python" -m ruff format --check
"$venv_python" -m mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two processes of one thread are faster than one of two
exec "$venv_python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
