#!/usr/bin/env bash
# Set up .venv, then run ruff and the whole test suite, or only what pytest options choose.
#   scripts/test.sh [PYTEST OPTION...]     # e.g. -k camera, -x, test/test_engine.py
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,3s/^# \{0,1\}//p' "$0"
  exit 0
fi

cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

echo "test: ruff check" >&2
python -m ruff check .
echo "test: pytest" >&2
if (($#)); then
  exec python -m pytest -q "$@"
fi
failed=0
python -m pytest -q --durations=15 --numprocesses auto --maxprocesses 8 --dist worksteal -m "not full and not alone" ||
  failed=$?
echo "test: pytest, what runs in real time" >&2
python -m pytest -q --durations=5 -m alone || failed=$?
exit "$failed"
