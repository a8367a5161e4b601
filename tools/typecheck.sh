#!/usr/bin/env bash
# Run mypy over the package as it is installed.
#
#   bash tools/typecheck.sh .venv/bin/mypy
set -euo pipefail
bash "$(dirname "$0")/link_package.sh" build/typecheck
MYPYPATH=build/typecheck "$1" -p salad_compile
