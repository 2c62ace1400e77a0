# Sourced by the shell scripts, not run:
#
#   . "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
#   use_environment dev          # extras of pyproject.toml; none for the package alone
#   "$PYTHON" -m recformer.finetune …
#
# Afterwards PYTHON is an interpreter that has what pyproject.toml asks for, and PYTHONPATH starts
# with this checkout, so that its code is what runs from any working directory.
#
# The interpreter is ${PYTHON:-python3} itself when it already has everything (an activated
# environment); otherwise .venv in the checkout, made and filled here with the versions of
# constraints.txt. A .venv that is complete is used as it is: a second run installs nothing.

# With CDPATH set, `cd` prints where it went and may go to a folder of the same name elsewhere.
unset CDPATH
RECFORMER_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# Packed batches have a new size each: on a GPU, memory in segments that grow is not cut into pieces.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# `help_of SCRIPT`: the comment at its head.
help_of() {
    sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$1"
}

# `given FLAG ARGUMENT ...`: whether the flag is among the arguments, as `FLAG x` or `FLAG=x`.
given() {
    local flag=$1 argument
    shift
    for argument; do
        case $argument in "$flag" | "$flag="*) return 0 ;; esac
    done
    return 1
}

_environment_error() {
    printf 'error: %s\n' "$@" >&2
    return 1
}

# What an installation of this checkout depends on: a change of either file installs again.
_environment_stamp() {
    "$1" -c 'import hashlib, sys
print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' \
        "$RECFORMER_ROOT/pyproject.toml" "$RECFORMER_ROOT/constraints.txt"
}

_make_venv() { # python folder
    local base=$1 venv=$2
    if ! command -v "$base" >/dev/null 2>&1; then
        _environment_error "'$base' was not found; install Python 3.10 to 3.13 or name one:" \
            "    PYTHON=/path/to/python3.11 bash ${0##*/}"
        return 1
    fi
    if ! "$base" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'
    then
        _environment_error "$("$base" --version 2>&1) is not supported, Python 3.10 to 3.13 is;" \
            "name another one:  PYTHON=/path/to/python3.11 bash ${0##*/}"
        return 1
    fi
    if ! "$base" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        _environment_error "$("$base" --version 2>&1) cannot make virtual environments:" \
            "its venv or ensurepip module is missing (on Debian and Ubuntu: apt-get install" \
            "python3-venv), or name another one:  PYTHON=/path/to/python3.11 bash ${0##*/}"
        return 1
    fi
    echo "== making $venv with $("$base" --version 2>&1)"
    rm -rf "$venv"
    "$base" -m venv "$venv"
}

use_environment() { # extra ...
    local base=${PYTHON:-python3} venv="$RECFORMER_ROOT/.venv" check stamp
    check="$RECFORMER_ROOT/scripts/check_environment.py"
    export PYTHONPATH="$RECFORMER_ROOT${PYTHONPATH:+:$PYTHONPATH}"

    if "$base" "$check" "$@" >/dev/null 2>&1; then
        PYTHON=$(command -v "$base")
        export PYTHON
        echo "== using $PYTHON, which has everything"
        return 0
    fi

    if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then # absent, or half made
        _make_venv "$base" "$venv" || return 1
    fi
    PYTHON="$venv/bin/python"
    export PYTHON
    stamp=$(_environment_stamp "$PYTHON") || return 1
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ] \
        && "$PYTHON" "$check" "$@" >/dev/null; then
        echo "== using $venv"
        return 0
    fi
    local extras
    extras=$(IFS=,; echo "$*")
    echo "== installing recformer${extras:+[$extras]} into $venv (a few minutes the first time)"
    rm -f "$venv/.installed"
    local quiet=--quiet
    if [ -t 1 ]; then quiet=--progress-bar=on; fi # a person wants to see what is downloaded
    (cd "$RECFORMER_ROOT" && "$PYTHON" -m pip install "$quiet" --disable-pip-version-check \
        -c constraints.txt -e ".${extras:+[$extras]}") || {
        _environment_error "pip could not install what is needed; its own message stands above"
        return 1
    }
    if ! "$PYTHON" "$check" "$@"; then
        _environment_error "these packages are still missing after the installation"
        return 1
    fi
    echo "$stamp" >"$venv/.installed"
}
