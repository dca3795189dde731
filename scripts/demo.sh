#!/usr/bin/env bash
# Set everything up (once) and prune a real trained CNN to a fifth of its multiply-accumulates. (Half of them can go
# unnoticed: it was trained with a penalty.)
#
#   bash scripts/demo.sh [options of 'ss-prune prune' in place of '--macs 0.2 --compensation reconstruct']
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment cli,demo
[ $# -gt 0 ] || set -- --macs 0.2 --compensation reconstruct
set -- prune demo:digits --data digits --out runs/demo "$@"
echo "+ ss-prune $*"
exec .venv/bin/ss-prune "$@"
