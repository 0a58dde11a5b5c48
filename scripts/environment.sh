# shellcheck shell=bash
# Sourced by scripts/demo and scripts/test: a Python environment with this package in it.
# Uses the active virtual environment, or makes .venv beside pyproject.toml.
# Usage: . scripts/environment.sh [extra]
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || return
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        python=""
        for candidate in python3 python3.13 python3.12 python3.11; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                python="$candidate"
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "error: mmrjax needs Python 3.11 or newer; none found on the path" >&2
            exit 1
        fi
        echo "making a virtual environment in $root/.venv"
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi
# Once per environment and change of pyproject.toml: the next call also works without a network.
stamp="$(python -c 'import sys; print(sys.prefix)')/.mmrjax-${1:-base}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$(cksum pyproject.toml) $root" ]; then
    echo "installing mmrjax${1:+ with the extra $1} (a minute or two)"
    python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
    echo "$(cksum pyproject.toml) $root" >"$stamp"
fi
