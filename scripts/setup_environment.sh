# Sourced by run_full_pipeline.sh, resume_pipeline.sh and test.sh: sets PYTHON to an interpreter
# that can run Sevenfold, and installs one into .venv where there is none.
#
#   sevenfold_setup [EXTRA]
#
# SEVENFOLD_PYTHON    interpreter to use, or to make .venv with (3.11 or newer)
# SEVENFOLD_PIP_ARGS  further arguments for pip, such as the index of your CPU or CUDA wheels
# shellcheck shell=bash

SEVENFOLD_CPU_TORCH="torch==2.13.0"

sevenfold_say() { printf '%s\n' "$*" >&2; }

# The interpreters that could do, best first. An activated environment comes first.
sevenfold_interpreters() {
    if [ -n "${SEVENFOLD_PYTHON:-}" ]; then
        printf '%s\n' "$SEVENFOLD_PYTHON"
        return
    fi
    if [ -n "${VIRTUAL_ENV:-}" ]; then printf '%s\n' "$VIRTUAL_ENV/bin/python"; fi
    if [ -n "${CONDA_PREFIX:-}" ]; then printf '%s\n' "$CONDA_PREFIX/bin/python"; fi
    printf '%s\n' python3 python3.13 python3.12 python3.11 python3.14
}

# True if interpreter $1 has everything that extra $2 needs, at the right versions.
sevenfold_is_complete() {
    # shellcheck disable=SC2086
    "$1" scripts/check_environment.py ${2:-} >/dev/null 2>&1
}

# A name for everything that decides what is installed.
sevenfold_stamp() {
    printf '%s %s' "$1" "$(cat pyproject.toml scripts/setup_environment.sh | cksum | tr ' ' '-')"
}

# True if .venv was installed completely for extra $1 from these very files.
sevenfold_is_stamped() {
    [ -x .venv/bin/python ] && [ -f .venv/sevenfold-installed ] || return 1
    local found
    found="$(cat .venv/sevenfold-installed)"
    [ "$found" = "$(sevenfold_stamp "${1:-core}")" ] || [ "$found" = "$(sevenfold_stamp dev)" ]
}

sevenfold_has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

sevenfold_make_venv() {
    [ -x .venv/bin/python ] && return
    local candidate
    for candidate in $(sevenfold_interpreters); do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            sevenfold_say "making .venv with $("$candidate" --version)"
            "$candidate" -m venv .venv
            return
        fi
    done
    sevenfold_say "error: no Python 3.11 or newer with venv and ensurepip was found; install one" \
        "(Debian, Ubuntu: apt install python3-venv) or name it: SEVENFOLD_PYTHON=/path/to/python3"
    return 2
}

# Torch goes first and stays as it is: any package that depends on torch would otherwise bring a
# CUDA build of several GB to a machine without a GPU.
sevenfold_install() {
    local extra="$1" torch="$SEVENFOLD_CPU_TORCH" package="."
    if sevenfold_has_gpu; then torch="torch>=2.11,<2.14"; fi
    if [ "$extra" != core ]; then package=".[$extra]"; fi
    rm -f .venv/sevenfold-installed
    local pip=(.venv/bin/python -m pip install --disable-pip-version-check --quiet)
    sevenfold_say "installing $torch into .venv; the first time this takes a few minutes"
    # shellcheck disable=SC2086
    "${pip[@]}" ${SEVENFOLD_PIP_ARGS:-} "$torch" || return
    .venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
        >.venv/sevenfold-constraint.txt || return
    sevenfold_say "installing sevenfold and what it needs"
    # shellcheck disable=SC2086
    "${pip[@]}" ${SEVENFOLD_PIP_ARGS:-} --constraint .venv/sevenfold-constraint.txt \
        --editable "$package" || return
    sevenfold_stamp "$extra" >.venv/sevenfold-installed
}

# Sets PYTHON and leaves the working directory as it was.
sevenfold_setup() {
    local extra="${1:-core}" check="${1:-}" started_in="$PWD" candidate
    PYTHON=""
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
    if [ -n "${SEVENFOLD_PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || [ ! -d .venv ]; then
        for candidate in $(sevenfold_interpreters); do
            if sevenfold_is_complete "$candidate" "$check"; then
                PYTHON="$candidate"
                break
            fi
        done
    fi
    if [ -z "$PYTHON" ]; then
        PYTHON="$PWD/.venv/bin/python"
        if ! sevenfold_is_stamped "$extra" && ! { sevenfold_make_venv && sevenfold_install "$extra"; }
        then
            sevenfold_say "error: setting up .venv failed (see above); without a network, run this" \
                "in an environment that has what 'python scripts/check_environment.py $check' lists," \
                "or tell pip where to look with SEVENFOLD_PIP_ARGS"
            return 2
        fi
    fi
    # An environment that was prepared elsewhere may lack the package itself: the source serves.
    export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
    cd "$started_in" || return
}
