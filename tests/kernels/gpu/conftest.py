"""Tests of the Triton kernels: on the GPU where there is one, else interpreted on the CPU.

Triton decides when it is imported whether it compiles or interprets, so these tests need a process of their own where
there is no GPU: `make test-kernels`, a part of `make test`, runs them with TRITON_INTERPRET=1. A run without that
variable and without a GPU does not collect them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from salad_compile.kernels import use_engine
from salad_compile.kernels.launch import interpreting

if interpreting():
    from tests.kernels.gpu.interpreter import mend

    mend()
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _triton_engine() -> Iterator[None]:
    with use_engine("triton"):
        yield


@pytest.fixture
def device() -> str:
    """Where the tensors of a test live."""
    return "cpu" if interpreting() else "cuda"
