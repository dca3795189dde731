#!/usr/bin/env bash
# Set everything up (once) and prune a real trained CNN to half of its multiply-accumulates.
#
#   bash scripts/demo.sh [options of 'ss-prune prune' in place of '--macs 0.5']
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment cli,demo
[ $# -gt 0 ] || set -- --macs 0.5
set -- prune demo:digits --data digits --out runs/demo "$@"
echo "+ ss-prune $*"
exec .venv/bin/ss-prune "$@"
