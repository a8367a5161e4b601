"""Reading the tensors of a SALAD file: names, shapes, kinds and values are checked before any of them is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.reports import plural
from salad_compile.common.tensor_files import first_not_finite, open_safetensors, require_digest
from salad_compile.common.wrappers import plain_key
from salad_compile.definition.branch_tensors import current_name
from salad_compile.errors import (
    CheckpointError,
    CorruptFileError,
    DtypeMismatchError,
    ExportError,
    MissingKeysError,
    ShapeMismatchError,
    UnexpectedKeysError,
)
from salad_compile.salad_files.header import Header

# A branch may be kept finer or coarser than it was saved. Smaller dtypes are storage formats with scales of their own.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def open_salad(file: Path) -> Iterator[Any]:
    """The opened file. Raises CorruptFileError: it cannot be read, or is no complete safetensors file."""
    with contextlib.ExitStack() as stack:
        try:
            content = stack.enter_context(open_safetensors(file))
        except ValueError as error:
            raise CorruptFileError(str(error)) from error
        yield content


def require_rank(content: Any, header: Header, file: Path) -> None:
    """A branch is built before its shapes are compared: its largest size must be one that the file has.

    Raises:
        ShapeMismatchError: no tensor has the rank that the header says.
    """
    rank = header.config.lora_rank
    shapes = [content.get_slice(key).get_shape() for key in content.keys()]  # noqa: SIM118 (it is not a dictionary)
    if rank > 1 and header.config.lora_targets and not any(rank in shape and 0 not in shape for shape in shapes):
        raise ShapeMismatchError(f"{file}: the header says lora_rank {rank}, and no tensor has that size.")


def read_tensors(content: Any, header: Header, expected: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """All tensors of the file, by the names of `expected`; strict both ways.

    Raises:
        MissingKeysError, UnexpectedKeysError, ShapeMismatchError, DtypeMismatchError: they are not those of `expected`.
        CorruptFileError: their values are not those that were written, or not finite.
    """
    found = list(content.keys())
    keys = {plain_key(key): key for key in found}
    there = {name if current_name(name) in keys else current_name(name): key for name, key in keys.items()}
    _require_keys(sorted(set(expected) - set(there)), MissingKeysError, f"{file} lacks", "Is the file complete?")
    _require_keys(
        sorted(set(there) - set(expected)) or sorted(set(found) - set(there.values())),
        UnexpectedKeysError,
        f"{file} has, beyond the model's sites,",
        "Was the model converted with fewer sites or LoRA targets?",
    )
    for name, parameter in expected.items():
        shape = tuple(content.get_slice(there[name]).get_shape())
        if shape != tuple(parameter.shape):
            raise ShapeMismatchError(f"{file}: {name} has shape {shape}, the model needs {tuple(parameter.shape)}.")
    tensors = {name: content.get_tensor(there[name]) for name in expected}
    for name, parameter in expected.items():
        _require_kind(tensors[name].dtype, parameter.dtype, name, file)
    _require_as_written(content, header, {there[name]: tensor for name, tensor in tensors.items()}, file)
    bad = first_not_finite(tensors)
    if bad is not None:
        raise CorruptFileError(f"{file}: {bad} holds NaN or infinity.")
    return tensors


def require_loadable(state: Mapping[str, Tensor], header: Header, file: Path) -> None:
    """Whether :func:`read_tensors` would take what is about to be written; a file that was there before may be good.

    Raises:
        ExportError: it would not.
    """
    bad = first_not_finite(state)
    if bad is not None:
        raise ExportError(
            f"{file} is not written, and what was there before is as it was: {bad} holds NaN or infinity. Go back to "
            "what was saved before the training diverged."
        )
    for name, tensor in state.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in FLOATS:
            raise ExportError(
                f"{file} is not written: {name} is {tensor.dtype}, and branches are kept as "
                f"{', '.join(map(str, FLOATS))}: bring them back to one of these (model.to(torch.bfloat16))."
            )
    try:
        Header.from_json(header.to_json(), file)
    except CheckpointError as error:
        raise ExportError(f"{file} is not written, because nothing could read it: {error}") from error


def _require_as_written(content: Any, header: Header, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises CorruptFileError: the digest is another, or is missing and the header says that there is one."""
    try:
        require_digest(content.metadata(), tensors, marked=header.checked is not None)
    except ValueError as error:
        raise CorruptFileError(f"{file}: {error}") from error


def _require_kind(dtype: torch.dtype, wanted: torch.dtype, name: str, file: Path) -> None:
    if dtype != wanted and not (dtype in FLOATS and wanted in FLOATS):
        raise DtypeMismatchError(f"{file}: {name} is {dtype}, the model needs {wanted}.")


def _require_keys(keys: list[str], error: type[CheckpointError], what: str, hint: str) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise error(f"{what} {plural(len(keys), 'tensor')}: {', '.join(keys[:3])}{more}. {hint}")
