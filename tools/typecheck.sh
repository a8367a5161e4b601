#!/usr/bin/env bash
# Run mypy over the package as it is installed: passes/ and kernels/ inside salad_compile/ (setuptools' package-dir, which
# mypy does not read), through a tree of links.
#
#   bash tools/typecheck.sh .venv/bin/mypy
set -euo pipefail
root=$(pwd)
tree=build/typecheck
rm -rf "$tree" && mkdir -p "$tree/salad_compile"
ln -s "$root"/salad_compile/* "$root/passes" "$root/kernels" "$tree/salad_compile/"
rm -rf "$tree/salad_compile/__pycache__"
MYPYPATH="$tree" "$1" -p salad_compile
