"""Helpers of the readers and writers of safetensors files."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from salad_compile.common.files import name_failures, remove, write_at_once
from salad_compile.common.locks import hold
from salad_compile.common.tensor_files import with_digest

WAIT_SECONDS = 10.0  # for another writer of the same dataset, which may take hours
_LONGEST_STEM = 120  # most file systems take names of 255 bytes; formats append to the stem
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def file_stem(name: str) -> str:
    """A file name without suffix for an item: the name itself where that is one, else a part of it and a digest."""
    safe = _UNSAFE.sub("-", name).lstrip(".-")
    if safe == name and len(name) <= _LONGEST_STEM:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{safe[: _LONGEST_STEM - 13]}-{digest}"


@contextlib.contextmanager
def writing_in(directory: Path) -> Iterator[None]:
    """Make the directory if need be, hold it against other writers, and remove what dead ones have left half written.

    Raises:
        WriteError: it cannot be made, or another process writes there.
    """
    with name_failures(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with hold(directory, seconds=WAIT_SECONDS) as alone:
        with name_failures(directory):
            for left in list(directory.rglob(".*.partial")) if alone else ():
                remove(left)
        yield


def save_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as a whole or not at all, even if the power fails, inside :func:`writing_in`.

    Raises:
        WriteError: it cannot be written.
    """
    from safetensors.torch import save_file

    with write_at_once(target, held=True) as temporary:
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, temporary, metadata=with_digest(whole, metadata))


def save_text(target: Path, text: str) -> None:
    """As :func:`save_tensors`, a text file."""
    with write_at_once(target, held=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
