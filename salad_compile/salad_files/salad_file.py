"""save(model, path) and load(model, path): one safetensors file with exactly the branch state, strict both ways.

The header says what the tensors mean: format version, configuration, base class and digest, table of sites. Loading
checks everything, names and shapes included, before it touches the model; saving writes to a temporary name first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.default_device import with_real_tensors
from salad_compile.common.files import name_failures, write_at_once
from salad_compile.common.logs import logger
from salad_compile.common.paths import as_path
from salad_compile.common.reports import plural
from salad_compile.common.sharding import is_first_rank, shard_like
from salad_compile.common.tensor_files import with_digest
from salad_compile.common.undo import unchanged_on_failure
from salad_compile.common.wrappers import plain_key, single_model
from salad_compile.conversion.convert import attach, prepare, require_names
from salad_compile.errors import (
    AlreadyConvertedError,
    BaseModelMismatchError,
    NotASaladFileError,
    UnknownProjectionError,
)
from salad_compile.grid.rule import GridSource
from salad_compile.salad_files.contents import (
    base_class,
    base_digest,
    branch_state,
    describe,
    gathered_state,
    layers_left_out,
    leave_meta,
    require_writable,
    weight_sums,
)
from salad_compile.salad_files.header import CHECKED, HEADER_KEY, Header
from salad_compile.salad_files.location import FILE_NAME, file_at
from salad_compile.salad_files.reading import open_salad, read_tensors, require_loadable, require_rank
from salad_compile.salad_files.translation import translate
from salad_compile.sites.branch import BRANCH_NAME, SaladBranch, branches

Model = TypeVar("Model", bound=nn.Module)


# --- saving ----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the branch state of a converted model: gates, projections and LoRA, nothing of the base.

    Works on models wrapped in torch.compile, DDP, FSDP or checkpoint wrappers. Under torch.distributed every rank must
    call it (sharded parameters are gathered); rank 0 writes.

    Args:
        path: a file, or a directory, in which the file is called `salad.safetensors`; with a slash at its end it is
            one that is made.

    Returns:
        The path of the file.

    Raises:
        NotConvertedError: the model has no branch. ConfigError: `path` is none. ExportError: :func:`load` would refuse
        the file: a value is NaN or infinite, of 8 bits, or missing (on the meta device). WriteError: the file cannot be
        written. A file that was there before is as it was.
    """
    bare = single_model(model, "save")
    header = describe(bare)
    state = gathered_state(bare)
    target = as_path(path)
    with name_failures(target):
        target = target / FILE_NAME if target.is_dir() or os.fsdecode(path).endswith("/") else target
    if is_first_rank():
        write(state, header, target)
        logger.info("saved %d tensors of %s to %s", len(state), plural(len(header.sites), "site"), target)
    else:
        require_loadable(state, header, target)  # all processes raise what the first one does
    return target


def write(state: Mapping[str, Tensor], header: Header, target: Path) -> None:
    """Write a SALAD file as a whole, in a directory that is made if necessary.

    Raises:
        ExportError: nothing could read it, see :func:`require_loadable`. WriteError.
    """
    from safetensors.torch import save_file

    require_loadable(state, header, target)
    with name_failures(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    text = dataclasses.replace(header, checked=CHECKED).to_json()
    metadata = with_digest(state, {"format": "pt", HEADER_KEY: text})
    with write_at_once(target) as temporary:
        save_file(dict(state), temporary, metadata=metadata)


# --- loading ---------------------------------------------------------------------------------------------------------


@with_real_tensors
def load(
    model: Model, path: str | os.PathLike[str], *, grid: GridSource | None = None, example_inputs: Any = None
) -> Model:
    """Read a file of :func:`save` into `model`, converting it first, from the file's configuration, if need be.

    Args:
        model: the base model, or a model converted with the same configuration.
        path: a file, a directory that holds `salad.safetensors`, or the id of a repository on the Hugging Face Hub.
        grid: for a model whose conversion was given a function as `grid`: that function. None: what the file says.
        example_inputs: of one forward, as of :func:`salad_compile.convert`, for another implementation of the model
            that the file was made for: Wan of diffusers, the original Wan, or that of ComfyUI. Only where they cannot
            be made up.

    Raises:
        CheckpointError: the file is wrong; each way of being wrong has a subclass.
        AlreadyConvertedError: the model was converted with another configuration.
        WrappedModelError: the model is sharded, or offloaded in a way that takes no weights.
        FileNotFoundError: there is no such file, here or on the Hub. HubError: the download broke off.
        Whatever is raised, the model is unchanged.
    """
    bare = single_model(model, "load")
    require_writable(bare)
    file = file_at(path)
    with open_salad(file) as content:
        header = read_header(content, file)
        file_name: Callable[[str], str] = str
        require_rank(content, header, file)
        if base_class(bare) != header.base_class:
            header, file_name = translate(bare, header, file, example_inputs, grid)
        _check_base(bare, header, file)
        known = branches(bare)
        prepared = [] if known else _prepare(bare, header, file)
        dropping = _find_branches_to_drop(known, header, file)
        expected = _state_without(bare, dropping) if known else _plan_state(prepared)
        tensors = read_tensors(content, header, {file_name(name): t for name, t in expected.items()}, file)
    with unchanged_on_failure(bare) as undo, torch.no_grad():
        for branch in dropping:
            branch.drop_linear()
        if not known:
            rule = header.grid if grid is None else grid
            if rule is None and any(site.on_grid for site in header.sites):
                logger.warning(
                    "%s was made with a function as grid=, and is loaded without one: tokens stay in order", file
                )
            attach(bare, prepared, header.config, header.dense_projections, rule)
        leave_meta(bare)
        for name, parameter in branch_state(bare).items():
            if known:
                undo.callback(parameter.copy_, parameter.clone())
            parameter.copy_(shard_like(tensors[file_name(name)], parameter))
    logger.info("loaded %d tensors of %s from %s", len(tensors), plural(len(header.sites), "site"), file)
    if not known and (left := layers_left_out(bare, header.sites)):
        names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        logger.warning("%s has nothing for %s like its own, dense now: %s", file, plural(len(left), "layer"), names)
    return model


def read_header(content: Any, file: Path) -> Header:
    """The header of an opened safetensors file.

    Raises:
        NotASaladFileError: the file has none. FormatVersionError, CorruptFileError: it cannot be used.
    """
    metadata = content.metadata() or {}
    if HEADER_KEY not in metadata:
        first = ", ".join(list(content.keys())[:3])
        raise NotASaladFileError(
            f"{file} is a safetensors file but not a SALAD file (its first tensors: {first}). A LoRA is loaded with "
            "pipe.load_lora_weights, a base checkpoint with from_pretrained; salad_compile.save writes what load reads."
        )
    return Header.from_json(metadata[HEADER_KEY], file)


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Any, Header]]:
    """The path of a file that :func:`load` would read, its opened content, and its header; no tensor is read.

    Raises:
        CheckpointError, FileNotFoundError: see :func:`load`.
    """
    file = file_at(path)
    with open_salad(file) as content:
        yield file, content, read_header(content, file)


def _check_base(model: nn.Module, header: Header, file: Path) -> None:
    known = list(branches(model).values())
    if known and known[0].config.different(header.config):
        raise AlreadyConvertedError(
            f"the model was converted with another configuration than {file} (model != file): "
            f"{known[0].config.difference(header.config)}. Load into the base model: it is converted from the file."
        )
    places = {record.owner: record.projections() for record in header.sites}
    if known and {b.record.owner: b.record.projections() for b in known} != places:
        raise BaseModelMismatchError(
            f"the model has {plural(len(known), 'converted site')} and {file} has "
            f"{plural(len(header.sites), 'site')}, or under other names. Load into the base "
            "model: it is converted from the file."
        )
    try:
        digest = base_digest(model, header.sites)
    except AttributeError as error:
        raise BaseModelMismatchError(
            f"{file} belongs to another {header.base_class}: {error}. It has {plural(len(header.sites), 'site')}, "
            f"from {header.sites[0].owner!r} to {header.sites[-1].owner!r}."
        ) from error
    if digest != header.base_digest:
        raise BaseModelMismatchError(
            f"{file} belongs to a {header.base_class} with other widths or heads: it has "
            f"{plural(len(header.sites), 'site')}, the first with {header.sites[0].heads} heads of "
            f"{header.sites[0].head_dim}."
        )
    here = weight_sums(model, header.sites) if header.merged_weights else ()
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(here, header.merged_weights, strict=True)):
        raise BaseModelMismatchError(
            f"{file} was saved after merge_lora, and this model's projections do not hold that update: load it into "
            "the merged base model, or save the model before merging."
        )


def _prepare(model: nn.Module, header: Header, file: Path) -> list[SaladBranch]:
    try:
        require_names(model, header.sites, header.dense_projections)
        return prepare(model, header.sites, header.config)
    except UnknownProjectionError as error:
        raise BaseModelMismatchError(f"{file} does not fit this {header.base_class}: {error}") from error


def _find_branches_to_drop(known: Mapping[str, SaladBranch], header: Header, file: Path) -> list[SaladBranch]:
    """The model's branches whose linear branch the file has dropped and the model has not.

    Raises:
        AlreadyConvertedError: the model has dropped one that the file has; it cannot come back.
    """
    dropped = {record.owner for record in header.sites if record.dropped}
    gone = [b.record.owner for b in known.values() if b.record.dropped and b.record.owner not in dropped]
    if gone:
        raise AlreadyConvertedError(
            f"the model has dropped the linear branch of {', '.join(map(repr, gone[:3]))}, and {file} has one. Load "
            "into the base model: it is converted from the file."
        )
    return [b for b in known.values() if b.record.owner in dropped and not b.record.dropped]


def _state_without(model: nn.Module, dropping: list[SaladBranch]) -> dict[str, Tensor]:
    """:func:`branch_state`, without what :meth:`SaladBranch.drop_linear` removes."""
    leaving = {id(tensor) for branch in dropping for tensor in branch.linear_parameters().values()}
    return {name: tensor for name, tensor in branch_state(model).items() if id(tensor) not in leaving}


def _plan_state(prepared: list[SaladBranch]) -> dict[str, Tensor]:
    return {
        plain_key(".".join(part for part in (branch.record.owner, BRANCH_NAME, key) if part)): tensor
        for branch in prepared
        for key, tensor in branch.state_dict(keep_vars=True).items()
    }
