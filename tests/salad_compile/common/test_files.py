"""A file is there whole or as it was before."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from salad_compile.common import files
from salad_compile.common.files import exchange, write_at_once, write_directory_at_once
from salad_compile.common.locks import hold, is_held
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


# --- writers that meet, and writers that died ------------------------------------------------------------------------


def test_writers_of_one_directory_wait_for_each_other(tmp_path: Path) -> None:
    """Threads of one process, which share its number."""
    target, at_once, most = tmp_path / "a.txt", [], []

    def write(number: int) -> None:
        for _ in range(20):
            with write_at_once(target) as temporary:
                at_once.append(number)
                most.append(len(at_once))
                temporary.write_text(str(number) * 1000)
                at_once.remove(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        text = target.read_text() if target.exists() else ""
        assert text == text[:1] * len(text)
    assert set(most) == {1}
    assert list(tmp_path.iterdir()) == [target]


def test_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.txt.1.partial", ".a.txt.0011223344556677.partial"):  # of this release and of earlier ones
        (tmp_path / name).write_text("half")
    for name in (".b.txt.1.partial", "a.txt.partial"):
        (tmp_path / name).write_text("of others")
    (tmp_path / ".a.txt.8899aabbccddeeff.partial").mkdir()
    (tmp_path / ".a.txt.8899aabbccddeeff.partial" / "a.txt").write_text("half")
    with write_at_once(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".b.txt.1.partial", "a.txt.partial"}


def test_what_a_library_puts_beside_the_file_it_writes_goes_too(tmp_path: Path) -> None:
    """As safetensors 0.8 does, whose temporary file a kill leaves."""
    for text in ("first", "second"):
        with write_at_once(tmp_path / "a.txt") as temporary:
            (temporary.parent / ".tmpAbCdEf").write_text("half")
            temporary.write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_directories_of_dead_writers_are_removed_and_those_of_living_ones_stay(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    target = tmp_path / "out"
    (tmp_path / ".out.77.partial").mkdir()
    with write_directory_at_once(target) as first:
        (first / "a").write_text("first")
        with write_directory_at_once(target) as second:
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
        assert (target / "a").read_text() == "second"
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    """Its writer died between two renames, where names cannot be exchanged."""
    (tmp_path / ".out.77.before").mkdir()
    (tmp_path / ".out.77.before" / "a").write_text("precious")

    def fail() -> None:
        with write_directory_at_once(tmp_path / "out"):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "out" / "a").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "a").read_text() == "other"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "missing")


def test_a_directory_is_held_until_its_holder_dies(tmp_path: Path) -> None:
    ready = multiprocessing.get_context("fork").Event()
    process = multiprocessing.get_context("fork").Process(target=hold_for_ever, args=(tmp_path, ready))
    process.start()
    ready.wait()
    assert is_held(tmp_path)
    with pytest.raises(WriteError, match="another process is writing"), hold(tmp_path, seconds=0.05):
        pass
    process.kill()
    process.join()
    with hold(tmp_path, seconds=5) as held:
        assert held
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
    with hold(tmp_path, seconds=5):  # the fork does not hold on
        pass
    child.kill()
    child.join()


def hold_for_ever(directory: Path, ready: Any) -> None:
    with hold(directory):
        ready.set()
        time.sleep(600)
