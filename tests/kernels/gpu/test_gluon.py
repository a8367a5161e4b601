"""The Gluon kernels on a Hopper GPU, against the definition in fp64; the cases are in files of their own.

All cases of a head_dim and query block run in a process of their own with a time limit: a kernel that waits for ever
ends with its process and with nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 600  # a dozen builds and 65 cases take 40
CASES = {"gluon_cases": 60, "gluon_gradient_cases": 60, "gluon_tail_cases": 30}  # and how many there are at least

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0, as Gluon kernels cannot be interpreted",
)


@pytest.mark.parametrize("query_block", [128, 64])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("cases", CASES)
def test_every_case(cases: str, head_dim: int, query_block: int) -> None:
    command = [sys.executable, "-m", f"tests.kernels.gpu.{cases}", str(head_dim), str(query_block)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("ok ") for line in done.stdout.splitlines()) >= CASES[cases]
