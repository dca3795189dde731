#!/usr/bin/env bash
# Build sdist and wheel, install the wheel with one extra (or none) into an environment of its own, import all tests
# there, and run those that apply: without an extra the core's, with one those of what it adds. What needs a package
# that is missing skips, with the reason.
#
#   bash scripts/test_wheel.sh EXTRA...       each alone, one after the other; 'none' for no extra
#
# PYTHON   the interpreter (default .venv/bin/python if there is one, else python3)
# TESTS    what to run instead, for example all of 'tests'
# BORROW   a site-packages folder whose torch, torchvision and numpy are used instead of downloading them again
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
unset PYTHONPATH  # it would win over the wheel
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x .venv/bin/python ] && python=$root/.venv/bin/python
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== sdist, and the wheel from it"
"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)

# Everything that PyTorch needs, and nothing that an extra would add. Folders of the environment's own with a link for
# each file: where an extra wants another version, pip replaces links; through a linked folder it would write to BORROW.
borrowed() {
    "$python" - "$BORROW" "$1" <<'PYTHON'
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

source, target = Path(sys.argv[1]), Path(sys.argv[2])
found = {re.sub(r"[-_.]+", "-", d.name).lower(): d for d in metadata.distributions(path=[str(source)])}
todo, seen = [("torch", ""), ("torchvision", ""), ("numpy", "")], set()
while todo:
    name, extra = todo.pop()
    name = re.sub(r"[-_.]+", "-", name).lower()
    if (name, extra) in seen or name not in found:
        continue
    seen.add((name, extra))
    for need in map(Requirement, found[name].requires or []):
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            todo += [(need.name, part) for part in ("", *need.extras)]
wanted = {name for name, _ in seen}
for name in wanted:
    for file in found[name].files or []:
        top = file.parts[0]
        if top not in ("..", "__pycache__") and (source / top).exists() and not (target / top).exists():
            if (source / top).is_dir():
                shutil.copytree(source / top, target / top, copy_function=os.symlink)
            else:
                os.symlink(source / top, target / top)
print("borrowed:", *sorted(wanted))
PYTHON
}

# What needs the extra, or without one of each package something.
tests_of() {
    case $1 in
        none) names="_utils/test_files graph/test_groups importance/test_strength planning/test_allocation
            report/test_records sparsity/test_masks surgery/test_refusals" ;;
        cli) names="cli/test_app cli/test_doctor report/test_comparison" ;;
        demo) names="sources/test_demo sources/test_data" ;;
        lightning | nni) names=integrations/test_$1 ;;
        onnx | openvino) names=io/test_export ;;
        plot) names=benchmarks/test_accuracy ;;
        sweep) names=benchmarks/test_sweep ;;
        timm) names="sources/test_models sources/test_data" ;;
        torchao) names=io/test_int8_program ;;
        train) names=examples/test_finetune ;;
        ultralytics) names=integrations/test_ultralytics ;;
        *) echo "no tests are named here for the extra $1" >&2; return 1 ;;
    esac
    printf 'tests/%s.py ' test_packaging $names
}

for extra in "$@"; do
    echo "== the wheel with: $extra"
    rm -rf "$work/env" "$work/tests"
    "$python" -m venv "$work/env"
    own=$work/env/bin/python
    site=$("$own" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    [ -z "${BORROW:-}" ] || borrowed "$site"
    what=$wheel
    [ "$extra" = none ] || what="$wheel[$extra]"
    "$own" -m pip install --quiet --disable-pip-version-check "$what" pytest pytest-timeout hypothesis
    # All but the package, away from the checkout: that must come from the wheel.
    mkdir -p "$work/tests"
    git ls-files -z --cached --others --exclude-standard ':!ss_pruning' ':!integrations' |
        tar --null -T - -cf - | tar -C "$work/tests" -xf -
    cd "$work/tests"
    "$own" - "$site" <<'PYTHON'
import sys
from pathlib import Path

import ss_pruning

path = Path(ss_pruning.__file__).resolve()
sys.exit(0 if Path(sys.argv[1]).resolve() in path.parents else f"{path} is not the wheel's")
PYTHON
    if [ "$extra" = none ]; then
        ! "$work/env/bin/ss-prune" doctor 2>"$work/needs.log" || { echo "ss-prune runs without its extra"; exit 1; }
        grep -F "pip install 'ss-pruning[cli]'" "$work/needs.log"
    elif [ "$extra" = cli ]; then
        "$work/env/bin/ss-prune" doctor
    fi
    "$own" -m pytest -q -p no:cacheprovider --collect-only tests >"$work/collected.log" ||
        { cat "$work/collected.log"; exit 1; }
    "$own" -m pytest -q -rs -p no:cacheprovider ${TESTS:-$(tests_of "$extra")}
    cd "$root"
done
echo "== all green"
