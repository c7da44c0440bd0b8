#!/usr/bin/env bash
# The whole path on real data, from shards to the proof that the answers come from the image: bash launch/demo.sh
# No account and no download but packages; CPU or GPU. Arguments go to `harness demo`, for instance --out runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment demo
export OMP_WAIT_POLICY=PASSIVE # two OpenMP threads that spin beside another process are 100 times slower
exec "$venv_python" -m harness demo "$@"
