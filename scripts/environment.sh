# Sourced by demo.sh and test.sh: puts the package, editable, with one of its extras into .venv.
#
# PYTHON   the interpreter that makes .venv (default python3)
# A second run installs nothing unless pyproject.toml changed.

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

check_python() {
    command -v "$1" >/dev/null || fail \
        "Python was not found as '$1'. On Debian or Ubuntu: sudo apt-get install python3 python3-venv" \
        "or name another interpreter: PYTHON=/path/to/python3 bash $0"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail \
        "$("$1" --version) is too old: Python 3.10 or newer is needed. Name one: PYTHON=python3.12 bash $0"
    # Debian ships venv without ensurepip; making a .venv would then fail half-way.
    "$1" -c 'import ensurepip, venv' 2>/dev/null || fail \
        "'$1' cannot make virtual environments. On Debian or Ubuntu: sudo apt-get install python3-venv"
}

# Usage: environment EXTRA; leaves the interpreter of .venv in $venv_python.
environment() {
    local extra=$1 wanted
    local stamp=.venv/.installed-$extra
    venv_python=.venv/bin/python
    # An interrupted run may have left an environment without pip: make it anew.
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        check_python "${PYTHON:-python3}"
        echo "Creating .venv"
        "${PYTHON:-python3}" -m venv --clear .venv
    fi
    # The path counts too: a checkout that was moved needs to be installed again.
    wanted=$(pwd; cksum <pyproject.toml)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "Installing ss-pruning[$extra] into .venv (PyTorch is large: the first time takes minutes)"
    "$venv_python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
    printf '%s\n' "$wanted" >"$stamp"
}
