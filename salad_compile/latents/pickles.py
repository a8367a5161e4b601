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

    Raises whatever a damaged archive makes torch raise.
    """
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def load_bytes(data: bytes) -> Any:
    """What torch.save wrote into bytes, after a look at its checksums. Raises as :func:`load_mapped`."""
    require_checksums(io.BytesIO(data), "an item")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def require_checksums(file: Path | IO[bytes], name: str) -> None:
    """torch.load looks at none of the archive's checksums. Raises ValueError, zipfile.BadZipFile."""
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise ValueError(f"{name}: the checksum of {bad} differs")


def single(tensor: Tensor, usual: int) -> Tensor:
    """Without the batch dimension of one, where there is one beside the usual number of dimensions."""
    return tensor[0] if tensor.ndim == usual + 1 and len(tensor) == 1 else tensor
