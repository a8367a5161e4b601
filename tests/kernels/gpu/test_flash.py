"""The engine "flash" on a Hopper GPU, against the definition in fp64; the cases are in `flash_cases.py`.

Each configuration is compiled in a process of its own, all at the same time: a kernel that waits for ever ends with its
process and with nothing else.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 150
CONFIGURATIONS = (
    "128 128 128",
    "128 128 64",
    "128 64 128",
    "128 64 64",
    "128 256 128",
    "128 256 64",
    "64 128 128",
    "64 64 64",
    "96 128 128",
    "80 128 64",
    "128 128 128 float16",
)
Running = tuple[subprocess.Popen[bytes], IO[bytes]]


def installed() -> bool:
    try:
        return bool(importlib.metadata.version("flash-attn-4"))
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
    pytest.mark.skipif(not installed(), reason="needs the package flash-attn-4"),
]


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, Running]]:
    """All configurations at work, and the files of what they print."""
    started: dict[str, Running] = {}
    for configuration in CONFIGURATIONS:
        said = tempfile.TemporaryFile()  # noqa: SIM115
        command = [sys.executable, "-m", "tests.kernels.gpu.flash_cases", *configuration.split()]
        started[configuration] = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT), said
    yield started
    for process, said in started.values():
        process.kill()
        said.close()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_every_case(configuration: str, running: dict[str, Running]) -> None:
    process, said = running[configuration]
    try:
        code: int | None = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    said.seek(0)
    text = said.read().decode()
    failed = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert code is not None, f"hangs after {text.splitlines()[-1:]}"
    assert not failed, "\n".join(failed)
    assert code == 0, text
    assert sum(line.startswith("ok ") for line in text.splitlines()) == 21
