"""Reading safetensors files of others: bounded before they are parsed, and compared with a digest if there is one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.paths import require_regular

DIGEST_KEY = "salad_digest"  # in the metadata of files that we write
CHECKED_KEY, CHECKED = "salad_checked", "sha256"  # beside it: without both a damaged file would pass for an old one
LARGEST_HEADER = 16 * 2**20  # bytes; that of the largest model takes a few hundred kilobytes


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """The opened file, of which only the header was read.

    Raises:
        ValueError: truncated, no such file, no safetensors file, or a header that no file of ours has. It is named.
    """
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        try:
            require_regular(file)
            raw = stack.enter_context(file.open("rb"))
            length = int.from_bytes(raw.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"it is no safetensors file: its header would have {length:,} bytes")
            content = stack.enter_context(safe_open(_same_file(raw.fileno(), file), framework="pt"))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {_reason(error)}.") from error
        yield content


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValueError):
        return str(error)
    return f"it is no complete safetensors file, but perhaps one truncated by an interrupted copy or download ({error})"


def _same_file(descriptor: int, file: Path) -> str:
    """A name of the opened file that stays: safe_open opens it twice, for the header and for the values.

    When another file takes the name between the two, values of one file would go with the header of the other.
    """
    name = f"/proc/self/fd/{descriptor}"
    return name if os.path.exists(name) else str(file)


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata without its digest, and of names, dtypes, shapes and values, in the order of names."""
    rest = sorted((name, text) for name, text in metadata.items() if name != DIGEST_KEY)
    found = hashlib.sha256(json.dumps(rest).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def with_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the digest of a file that holds both, and with the mark that there is one."""
    marked = {**metadata, CHECKED_KEY: CHECKED}
    return {**marked, DIGEST_KEY: digest_of(tensors, marked)}


def require_digest(metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor], *, marked: bool = False) -> None:
    """Raises ValueError unless the file's digest, if it has one, is that of all its tensors and metadata.

    Files of others and older ones have none; it is missing where the file is marked, by itself or by another.
    """
    metadata = metadata or {}
    stated = metadata.get(DIGEST_KEY)
    if stated is None and (marked or CHECKED_KEY in metadata):
        raise ValueError(f"{DIGEST_KEY} is missing in its metadata: was it damaged?")
    if stated is not None and stated != digest_of(tensors, metadata):
        raise ValueError("its contents are not those that were written (the digest differs): was it damaged?")


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or infinity in it."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinity; of integers it is true."""
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # torch does not ask 8-bit formats for it
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
