#!/usr/bin/env bash
# Lint, format check, type check and the whole test suite: bash launch/test.sh. With --fast: without whole runs,
# whole plans and runs of several processes. Other arguments go to pytest, for instance -k config.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
choice=()
if [ "${1:-}" = --fast ]; then
    shift
    choice=(-m "not slow and not long")
fi
make_environment demo,dev,hub,deepspeed,efficientnet
"$venv_python" -m ruff check --quiet .
"$venv_python" -m ruff format --check --quiet . || stop "some files are not formatted; run: $venv_python -m ruff format ."
"$venv_python" -m mypy || stop "the types do not fit, see above"
command -v chromedriver >/dev/null ||
    echo "no Chromium here (Debian: apt-get install chromium chromium-driver): tests/harness/tracking/test_browser.py is skipped"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # threads that spin beside another process are 100 times slower
exec "$venv_python" -m pytest -n 2 --dist loadfile ${choice[@]+"${choice[@]}"} "$@"
