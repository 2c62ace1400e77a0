#!/usr/bin/env bash
# Lint, type-check and test, from a fresh clone on:  bash run_tests.sh [pytest arguments]
#
#   bash run_tests.sh                        everything but the slow tests, two at a time
#   bash run_tests.sh tests/test_files.py    one file
#   bash run_tests.sh -m slow                the slow ones
#   RECFORMER_REAL_DATA=FOLDER bash run_tests.sh    also the tests on real data
#
# Needs Python 3.10 to 3.13 with pip; PYTHON=… names another one than python3.
set -euo pipefail

unset CDPATH
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
. "$here/scripts/environment.sh"
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then # pytest's own: python -m pytest --help
    help_of "$here/run_tests.sh"
    exit
fi
use_environment dev
cd "$RECFORMER_ROOT"

# Every step runs even if an earlier one failed, so that one run shows all there is to mend.
failed=()
step() { # name command ...
    local name=$1 status=0
    shift
    echo
    echo "== $name"
    "$@" || status=$?
    if [ "$status" -ne 0 ]; then failed+=("$name (exit $status)"); fi
    last_status=$status
}

step "ruff check" "$PYTHON" -m ruff check .
step "ruff format --check" "$PYTHON" -m ruff format --check .
step "mypy recformer" "$PYTHON" -m mypy
export NO_MKDOCS_2_WARNING=1
# Not --quiet, which keeps from --strict the warnings that it counts.
step "mkdocs build --strict" "$PYTHON" -m mkdocs build --strict
# Two tests at a time, a file in one process, each on one thread: two processes of two threads on
# two cores wait for each other. Whatever is asked for by name runs in this process.
tests=("$@")
if [ "$#" -eq 0 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    tests=(--numprocesses 2 --dist loadfile)
fi
step "pytest" "$PYTHON" -m pytest "${tests[@]}"

echo
if [ "${#failed[@]}" -gt 0 ]; then
    echo "FAILED: $(IFS=';'; echo "${failed[*]}")"
    # pytest's own status where it failed (5: no test ran), otherwise 1
    exit $((last_status == 0 ? 1 : last_status))
fi
echo "all passed"
