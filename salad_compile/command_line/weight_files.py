"""The files of weights in the directory of a model: whether they may be read, and of which dtype they are."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from salad_compile.common.files import read_json
from salad_compile.common.paths import require_regular
from salad_compile.errors import ModelSourceError

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "*.bin")


def require_own_files(directory: Path) -> None:
    """Whether the weights of a directory are files, and its own.

    Raises:
        ModelSourceError: an index of weights names files elsewhere. OSError: there is a device or a pipe among them,
            for which a reader would wait.
    """
    for file in (file for glob in WEIGHTS for file in sorted(directory.glob(glob))):
        require_regular(file)
    for index in sorted(directory.glob("*.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ModelSourceError(f"{index} has no weight_map from names of tensors to names of files.")
        for name in sorted(set(shards.values())):
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts or "\\" in name:
                raise ModelSourceError(
                    f"{index} names {name!r}, which leads out of {directory}: nothing is read there."
                )


def stored_dtype(directory: Path) -> torch.dtype | None:
    """The dtype of most stored weights, from the header of the first safetensors file; None if there is none.

    Raises:
        ModelSourceError: the file is not complete. OSError: it is a device or a pipe.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")):
        require_regular(file)
        try:
            with safe_open(file, framework="pt") as content:
                slices = [content.get_slice(key) for key in content.keys()]  # noqa: SIM118 (it is not a dictionary)
        except SafetensorError as error:
            raise ModelSourceError(f"{file} is not a complete safetensors file: {error}") from error
        counts: dict[str, int] = {}
        for part in slices:
            counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + math.prod(part.get_shape())
        return _torch_dtype(max(counts, key=counts.__getitem__)) if counts else None
    return None


def _torch_dtype(stored: str) -> torch.dtype | None:
    """A dtype by its name in safetensors; None for storage formats that no layer computes in."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(stored)
