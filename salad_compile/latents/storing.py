"""Helpers of the readers and writers of safetensors files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from salad_compile.common.files import flush_to_disk, write_at_once
from salad_compile.common.tensor_files import with_digest

_LONGEST_STEM = 120  # most file systems take names of 255 bytes; formats append to the stem
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def file_stem(name: str) -> str:
    """A file name without suffix for an item: the name itself where that is one, else a part of it and a digest."""
    safe = _UNSAFE.sub("-", name).lstrip(".-")
    if safe == name and len(name) <= _LONGEST_STEM:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{safe[: _LONGEST_STEM - 13]}-{digest}"


def save_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as a whole or not at all, even if the power fails. Raises WriteError."""
    from safetensors.torch import save_file

    with write_at_once(target) as temporary:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            temporary,
            metadata=with_digest(tensors, metadata),
        )
        flush_to_disk(temporary)


def save_text(target: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with write_at_once(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
        flush_to_disk(temporary)
