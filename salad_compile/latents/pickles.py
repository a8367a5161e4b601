"""Reading torch's files of others: weights only, so that no code in them runs, and with their checksums."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def load_mapped(file: Path) -> Any:
    """What a file holds; tensors are mapped, and read when they are used. Checksums are not looked at.

    Raises:
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    return _load(file, file.name, mmap=True)


def load_bytes(data: bytes) -> Any:
    """What torch.save wrote into bytes. Raises as :func:`load_mapped`; BadZipFile: its checksums differ."""
    require_checksums(io.BytesIO(data), "an item")
    return _load(io.BytesIO(data), "it")


def _load(content: Path | IO[bytes], name: str, **options: Any) -> Any:
    try:
        return torch.load(content, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # whatever a damaged archive makes it raise
        said = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be read: {type(error).__name__}: {said}") from error


def require_checksums(file: Path | IO[bytes], name: str) -> None:
    """torch.load looks at none of the archive's checksums. Raises ValueError, zipfile.BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"{name}: the checksum of {bad} differs")


def single(tensor: Tensor, usual: int) -> Tensor:
    """Without the batch dimension of one, where there is one beside the usual number of dimensions."""
    return tensor[0] if tensor.ndim == usual + 1 and len(tensor) == 1 else tensor
