"""Weights of a directory that are no files: nothing waits for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from salad_compile.command_line.model_source import load_model
from salad_compile.command_line.weight_files import stored_dtype


@pytest.mark.parametrize("given", [{}, {"dtype": "float32"}])
@pytest.mark.parametrize("name", ["aaa.safetensors", "diffusion_pytorch_model.safetensors", "zzz.bin"])
def test_a_pipe_among_weights_is_not_waited_for(wan: Path, tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    directory = Path(shutil.copytree(wan, tmp_path / "wan"))
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(OSError, match="a device, a pipe or a socket"):
        load_model(directory, **given)
    if not name.endswith(".bin"):
        with pytest.raises(OSError, match="a device, a pipe or a socket"):
            stored_dtype(directory)
