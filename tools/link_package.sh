#!/usr/bin/env bash
# Make a folder from which `import salad_compile` works without an installation: passes/ and kernels/ belong inside
# salad_compile/ (setuptools' package-dir). For mypy, which does not read that, and for machines without pip.
#
#   bash tools/link_package.sh /tmp/site && export PYTHONPATH=/tmp/site
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$1" && mkdir -p "$1/salad_compile"
ln -s "$root"/salad_compile/* "$root/passes" "$root/kernels" "$1/salad_compile/"
rm -rf "$1/salad_compile/__pycache__"
