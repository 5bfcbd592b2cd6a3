#!/usr/bin/env bash
# Set up .venv, then run ruff and the whole test suite.
#   scripts/test.sh [PYTEST OPTION...]     # e.g. -k camera, -x, test/test_engine.py
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,3s/^# \{0,1\}//p' "$0"
  exit 0
fi

cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh

# Nodes of tests talk to one another only: a domain that no robot of this network is likely to use.
export ROS_DOMAIN_ID=${ROS_DOMAIN_ID:-$((RANDOM % 100 + 1))}

echo "test: ruff check" >&2
python -m ruff check .
echo "test: pytest" >&2
python -m pytest -q --durations=15 "$@"
