"""Paths that no file can have, and names that belong to no file: nothing is taken the place of, nothing waits."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import salad_compile
from salad_compile.common.files import read_json, write_at_once, write_directory_at_once
from salad_compile.common.paths import as_directory
from salad_compile.common.schema import SummaryFields, decode_file
from salad_compile.common.tensor_files import open_safetensors
from salad_compile.errors import ConfigError, CorruptFileError, WriteError
from salad_compile.latents import convert_latents, open_latents, write_latents
from salad_compile.training import TrainSettings, read_log
from tests import toys
from tests.support import TINY

CONFIG = dataclasses.replace(TINY, min_tokens=64)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("write", [write_at_once, write_directory_at_once])
def test_what_is_no_file_is_not_taken_the_place_of(write: Callable[[Path], Any], pipe: Path) -> None:
    with pytest.raises(WriteError, match="a device, a pipe or a socket"), write(pipe):
        pass
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert os.listdir(pipe.parent) == [pipe.name]


def test_a_pipe_is_not_waited_for(pipe: Path) -> None:
    with pytest.raises(ValueError, match="a device, a pipe or a socket"), open_safetensors(pipe):
        pass
    with pytest.raises(OSError, match="a device, a pipe or a socket"):
        read_json(pipe)
    with pytest.raises(OSError, match="a device, a pipe or a socket"):
        decode_file(SummaryFields, pipe, CorruptFileError)


@pytest.mark.parametrize("path", [None, 3, "a\0b", "", "\ud800"])
def test_what_is_no_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = salad_compile.convert(toys.SelfAttention(), CONFIG, example_inputs=(toys.tokens(),))
    takers: list[Callable[[], Any]] = [
        lambda: salad_compile.save(model, path),
        lambda: salad_compile.load(toys.SelfAttention(), path),
        lambda: salad_compile.export(model, path),
        lambda: salad_compile.push_to_hub(path, "owner/name"),
        lambda: open_latents(path),
        lambda: write_latents([], path),
        lambda: convert_latents(path, "destination"),
        lambda: convert_latents("source", path),
        lambda: TrainSettings.from_file(path),
        lambda: read_log(path),
    ]
    for take in takers:
        with pytest.raises(ConfigError, match=r"a path is|is no name of a file"):
            take()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_to_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_directory(tmp_path / "new" / "newer") == tmp_path / "new" / "newer"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file: name a directory"):
        as_directory(tmp_path / "file" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # the user of tests may write anywhere
    for directory in (tmp_path, tmp_path / "new" / "newer"):
        with pytest.raises(WriteError, match=f"{tmp_path} cannot be written to") as told:
            as_directory(directory)
        assert told.value.errno == errno.EACCES


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    model = salad_compile.convert(toys.SelfAttention(), CONFIG, example_inputs=(toys.tokens(),))
    with pytest.raises(WriteError, match="could not be written"):
        salad_compile.save(model, tmp_path / ("x" * 3000))
    with pytest.raises(FileNotFoundError, match="no SALAD file"):
        salad_compile.load(toys.SelfAttention(), tmp_path / ("x" * 3000))
