#!/usr/bin/env bash
# Make a folder from which `import salad_compile` and backend="salad" work without an installation: passes/ and kernels/
# belong inside salad_compile/ (setuptools' package-dir). For mypy, which does not read that, and for machines without
# access to packages.
#
#   bash tools/link_package.sh /tmp/site && export PYTHONPATH=/tmp/site
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$1" && mkdir -p "$1/salad_compile" "$1/salad_compile-0.dist-info"
ln -s "$root"/salad_compile/* "$root/passes" "$root/kernels" "$1/salad_compile/"
rm -rf "$1/salad_compile/__pycache__"
printf 'Metadata-Version: 2.1\nName: salad-compile\nVersion: 0\n' >"$1/salad_compile-0.dist-info/METADATA"
printf '[torch_dynamo_backends]\nsalad = salad_compile.backend:salad\n' >"$1/salad_compile-0.dist-info/entry_points.txt"
