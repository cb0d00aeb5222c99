#!/usr/bin/env bash
# Checks and speed of regraft on one GPU, in one command of at most 8 minutes. Correctness comes first, then speed.
#
#   benchmarks/gpu.sh                      # writes results.json and results.txt into $OUT, default ./gpu-results
#   benchmarks/gpu.sh --only fp32 resume   # some of the checks
#   benchmarks/gpu.sh --cpu                # the same checks on a CPU with tiny sizes, to test this script
#
# It installs nothing, needs no network, and draws its own images. It needs Python 3.11 with regraft's dependencies
# (pyproject.toml), and names those that are missing. They can be brought along in a folder, made with a network:
#
#   pip install --target site --no-deps jsonargparse docstring-parser typeshed-client pooch platformdirs
#   PYTHONPATH=site benchmarks/gpu.sh
#
# Every check runs in its own process with its own time limit. The exit code is 0 if all of them have passed.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu --out "${OUT:-gpu-results}" "$@"
