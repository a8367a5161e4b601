"""A file is there whole or as it was before."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from salad_compile.common.files import write_at_once, write_directory_at_once
from salad_compile.errors import HubError, WriteError


def test_the_file_takes_its_place_in_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("before")
    with write_at_once(target) as temporary:
        temporary.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with write_at_once(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
        with write_directory_at_once(tmp_path / "folder") as directory:
            save_file({"a": torch.zeros(1)}, directory / "a.safetensors")
    finally:
        os.umask(before)
    for file in (tmp_path / "a.safetensors", tmp_path / "folder" / "a.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("before")

    def fail() -> None:
        with write_at_once(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "no room"), SafetensorError("I/O error (os error 28)")])
def test_what_the_system_refuses_is_a_write_error_with_its_number(cause: Exception, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"a\.txt could not be written") as caught, write_at_once(tmp_path / "a.txt"):
        raise cause
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is cause
    with pytest.raises(SafetensorError, match="no tensors"), write_at_once(tmp_path / "a.txt"):
        raise SafetensorError("no tensors")  # of what was read in between, not of writing
    with pytest.raises(HubError), write_at_once(tmp_path / "a.txt"):
        raise HubError("another error of ours that is an OSError")
    assert not list(tmp_path.iterdir())


def test_safetensors_says_why_it_could_not_write_in_a_form_that_is_read(tmp_path: Path) -> None:
    """The text of its errors is no API: seen in safetensors 0.8."""
    with pytest.raises(WriteError) as caught, write_at_once(tmp_path / "a"):
        save_file({"a": torch.zeros(1)}, tmp_path / "missing" / "a")
    assert caught.value.errno == errno.ENOENT


def test_a_directory_takes_its_place_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with write_directory_at_once(target) as temporary:
            (temporary / text).write_text(text)
        assert [entry.name for entry in target.iterdir()] == [text]

    def fail() -> None:
        with write_directory_at_once(target) as temporary:
            (temporary / "third").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [entry.name for entry in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]
