"""save(model, path) and load(model, path): one safetensors file with exactly the branch state, strict both ways.

The header says what the tensors mean: format version, configuration, base class and digest, table of sites. Loading
checks everything, names and shapes included, before it touches the model; saving writes to a temporary name first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.calls.multihead import projection
from salad_compile.checkpoints.location import FILE_NAME as FILE_NAME
from salad_compile.checkpoints.location import file_at
from salad_compile.common.files import failures_named, flush_to_disk, written_at_once
from salad_compile.common.logs import logger
from salad_compile.common.sharding import is_first_rank, shard_like, whole, whole_state
from salad_compile.common.wrappers import plain_key, single_model
from salad_compile.config import SaladConfig
from salad_compile.conversion.convert import attach, dense_projections, prepare
from salad_compile.errors import (
    AlreadyConvertedError,
    BaseModelMismatchError,
    CheckpointError,
    CorruptFileError,
    FormatVersionError,
    MissingKeysError,
    NotASaladFileError,
    NotConvertedError,
    SaladError,
    ShapeMismatchError,
    UnexpectedKeysError,
    UnknownProjectionError,
)
from salad_compile.grid.geometry import GridRule, GridSource
from salad_compile.sites.branch import BRANCH_NAME, SaladBranch, branches
from salad_compile.sites.record import SiteRecord

FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)  # 2 knew no dropped branches, 3 no rotated_first: SiteRecord's defaults say so
HEADER_KEY = "salad_config"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Header:
    """What a SALAD file says about itself."""

    config: SaladConfig
    base_class: str
    base_digest: str
    sites: tuple[SiteRecord, ...]
    dense_projections: tuple[str, ...]
    versions: Mapping[str, str]
    # after merge_lora: sums of the absolute weights of each site's projections, since only that base fits the file
    merged_weights: tuple[float, ...] = ()
    # how to read the video's token grid; None: not known, or a function of the user, which no file can hold
    grid: GridRule | None = None

    def to_json(self) -> str:
        """The text stored under `salad_config` in the file's metadata."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "versions": dict(self.versions),
                "config": self.config.to_dict(),
                "base_class": self.base_class,
                "base_digest": self.base_digest,
                "sites": [site.to_dict() for site in self.sites],
                "dense_projections": list(self.dense_projections),
                "merged_weights": list(self.merged_weights),
                "grid": None if self.grid is None else self.grid.to_dict(),
            }
        )

    @classmethod
    def from_json(cls, text: str, path: Path) -> Header:
        """Raises FormatVersionError or CorruptFileError."""
        try:
            values = json.loads(text)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path}: the header is not readable: {error!r}") from error
        if version not in READABLE_VERSIONS:
            readable = " and ".join(map(str, READABLE_VERSIONS))
            raise FormatVersionError(
                f"{path} has format version {version}, this release of salad_compile reads {readable}. "
                f"It was written by {values.get('versions')}: use that release, or a newer one."
            )
        try:
            return cls(
                config=SaladConfig.from_dict(values["config"]),
                base_class=values["base_class"],
                base_digest=values["base_digest"],
                sites=tuple(SiteRecord.from_dict(site) for site in values["sites"]),
                dense_projections=tuple(values["dense_projections"]),
                versions=values["versions"],
                merged_weights=tuple(values["merged_weights"]),
                grid=None if values["grid"] is None else GridRule.from_dict(values["grid"]),
            )
        except (KeyError, TypeError, SaladError) as error:
            raise CorruptFileError(f"{path}: the header is damaged: {error!r}") from error


# --- saving ----------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the branch state of a converted model: gates, projections and LoRA, nothing of the base.

    Works on models wrapped in torch.compile, DDP, FSDP or checkpoint wrappers. Under torch.distributed every rank must
    call it (sharded parameters are gathered); rank 0 writes.

    Args:
        path: a file, or a directory, in which the file is called `salad.safetensors`.

    Returns:
        The path of the file.

    Raises:
        NotConvertedError: the model has no branch. WriteError: the file cannot be written; a file that was there before
        is as it was.
    """
    bare = single_model(model, "save")
    header = describe(bare)
    state = whole_state(branch_state(bare))
    target = Path(path)
    if target.is_dir():
        target = target / FILE_NAME
    if is_first_rank():
        write(state, header, target)
        logger.info("saved %d tensors of %d sites to %s", len(state), len(header.sites), target)
    return target


def describe(model: nn.Module) -> Header:
    """The header for a converted model.

    Raises:
        NotConvertedError: the model has no branch.
    """
    known = list(branches(model).values())
    if not known:
        raise NotConvertedError(
            f"{type(model).__name__} has no SALAD branch to save: call salad_compile.convert(model) before fine-tuning."
        )
    from salad_compile.common.version import __version__

    records = tuple(branch.record for branch in known)
    return Header(
        config=known[0].config,
        base_class=base_class(model),
        base_digest=base_digest(model, records),
        sites=records,
        dense_projections=tuple(dense_projections(model)),
        versions={"salad_compile": __version__, "torch": torch.__version__},
        merged_weights=tuple(_weight_sums(model, records)) if any(branch.lora_merged for branch in known) else (),
        grid=_saved_grid(known[0]),
    )


def _saved_grid(branch: SaladBranch) -> GridRule | None:
    source = None if branch.grid is None else branch.grid.source
    if source is not None and not isinstance(source, GridRule):
        logger.warning("grid= was a function, which the file cannot hold: pass it again, load(model, path, grid=...)")
        return None
    return source


def branch_state(model: nn.Module) -> dict[str, Tensor]:
    """Plain name (`blocks.0.attn1.salad.gate_weight`) -> parameter or buffer of every branch."""
    return {
        plain_key(f"{name}.{key}"): tensor
        for name, branch in branches(model).items()
        for key, tensor in branch.state_dict(keep_vars=True).items()
    }


def base_class(model: nn.Module) -> str:
    """The class's name; FSDP2 puts a generated subclass in front of it."""
    return type(model).__name__.removeprefix("FSDP")


def base_digest(model: nn.Module, records: tuple[SiteRecord, ...]) -> str:
    """A digest of the structure that branches depend on: class, sites, projections and their widths.

    Structure and not values: a file fits every fine-tune of its base, and a quantised base too.
    """
    parts: list[Any] = [base_class(model)]
    for record in records:
        projections = {role: projection(model, name) for role, name in record.projections().items()}
        widths = {role: [int(m.in_features), int(m.out_features)] for role, m in projections.items()}  # type: ignore[arg-type]
        parts.append([plain_key(record.owner), record.heads, record.head_dim, record.value_dim, widths])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _weight_sums(model: nn.Module, records: tuple[SiteRecord, ...]) -> Iterator[float]:
    for record in records:
        weights: list[Any] = [model.get_submodule(name).weight for name in record.projections().values()]
        yield weight_sum(whole(weight) for weight in weights)


def weight_sum(weights: Iterable[Tensor]) -> float:
    """By what a base that holds a merged update is known: the sum of the absolute values, in fp64."""
    return sum(float(weight.abs().sum(dtype=torch.float64)) for weight in weights)


def write(state: Mapping[str, Tensor], header: Header, target: Path) -> None:
    """Write a SALAD file at once, in a directory that is made if need be. Raises WriteError."""
    from safetensors.torch import save_file

    with failures_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with written_at_once(target) as temporary:
        save_file(dict(state), temporary, metadata={"format": "pt", HEADER_KEY: header.to_json()})
        flush_to_disk(temporary)


# --- loading ---------------------------------------------------------------------------------------------------------


def load(model: Model, path: str | os.PathLike[str], *, grid: GridSource | None = None) -> Model:
    """Read a file of :func:`save` into `model`, converting it first, from the file's configuration, if need be.

    Args:
        model: the base model, or a model converted with the same configuration.
        path: a file, a directory that holds `salad.safetensors`, or the id of a repository on the Hugging Face Hub.
        grid: for a model whose conversion was given a function as `grid`: that function. None: what the file says.

    Raises:
        CheckpointError: one of its subclasses for each way in which the file can be wrong.
        AlreadyConvertedError: the model was converted with another configuration.
        FileNotFoundError: there is no such file, here or on the Hub. HubError: the download broke off.
        Whatever is raised, the model is unchanged.
    """
    bare = single_model(model, "load")
    file = file_at(path)
    with _opened(file) as content:
        header = read_header(content, file)
        _check_base(bare, header, file)
        known = branches(bare)
        prepared = [] if known else _prepare(bare, header, file)
        dropping = _still_to_drop(known, header, file)
        expected = _state_without(bare, dropping) if known else _planned_state(prepared)
        tensors = _read_checked(content, expected, file)
    for branch in dropping:
        branch.drop_linear()
    if not known:
        rule = header.grid if grid is None else grid
        if rule is None and any(site.on_grid for site in header.sites):
            logger.warning(
                "%s was made with a function as grid=, and is loaded without one: tokens stay in order", file
            )
        attach(bare, prepared, header.config, header.dense_projections, rule)
    with torch.no_grad():
        for name, parameter in branch_state(bare).items():
            parameter.copy_(shard_like(tensors[name], parameter))
    logger.info("loaded %d tensors of %d sites from %s", len(tensors), len(header.sites), file)
    return model


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        content = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CorruptFileError(
            f"{file} is no complete safetensors file ({error}): truncated by an interrupted copy or download?"
        ) from error
    with content:
        yield content


def read_header(content: Any, file: Path) -> Header:
    """The header of an opened safetensors file.

    Raises:
        NotASaladFileError: the file has none. FormatVersionError, CorruptFileError: it cannot be used.
    """
    metadata = content.metadata() or {}
    if HEADER_KEY not in metadata:
        first = ", ".join(list(content.keys())[:3])
        raise NotASaladFileError(
            f"{file} is a safetensors file but no SALAD file (its first tensors: {first}). A LoRA is loaded with "
            "pipe.load_lora_weights, a base checkpoint with from_pretrained; salad_compile.save writes what load reads."
        )
    return Header.from_json(metadata[HEADER_KEY], file)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Any, Header]]:
    """The place of a file that :func:`load` would read, its content by name, and its header; no tensor is read.

    Raises:
        CheckpointError, FileNotFoundError: see :func:`load`.
    """
    file = file_at(path)
    with _opened(file) as content:
        yield file, content, read_header(content, file)


def _check_base(model: nn.Module, header: Header, file: Path) -> None:
    if base_class(model) != header.base_class:
        raise BaseModelMismatchError(
            f"{file} belongs to a {header.base_class}, and this model is a {base_class(model)}."
        )
    known = list(branches(model).values())
    if known and known[0].config != header.config:
        raise AlreadyConvertedError(
            f"the model was converted with another configuration than {file} (model != file): "
            f"{known[0].config.difference(header.config)}. Load into the base model: it is converted from the file."
        )
    if known and {b.record.owner for b in known} != {record.owner for record in header.sites}:
        raise BaseModelMismatchError(
            f"the model has {len(known)} converted sites and {file} has {len(header.sites)} sites, or under other "
            "names. Load into the base model: it is converted from the file."
        )
    try:
        digest = base_digest(model, header.sites)
    except AttributeError as error:
        raise BaseModelMismatchError(
            f"{file} belongs to another {header.base_class}: {error}. It has {len(header.sites)} sites, "
            f"from {header.sites[0].owner!r} to {header.sites[-1].owner!r}."
        ) from error
    if digest != header.base_digest:
        raise BaseModelMismatchError(
            f"{file} belongs to a {header.base_class} with other widths or heads: it has {len(header.sites)} sites, "
            f"the first with {header.sites[0].heads} heads of {header.sites[0].head_dim}."
        )
    here = _weight_sums(model, header.sites) if header.merged_weights else ()
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(here, header.merged_weights, strict=True)):
        raise BaseModelMismatchError(
            f"{file} was saved after merge_lora, and this model's projections do not hold that update: load it into "
            "the merged base model, or save the model before merging."
        )


def _prepare(model: nn.Module, header: Header, file: Path) -> list[SaladBranch]:
    try:
        return prepare(model, header.sites, header.config)
    except UnknownProjectionError as error:
        raise BaseModelMismatchError(f"{file} does not fit this {header.base_class}: {error}") from error


def _still_to_drop(known: Mapping[str, SaladBranch], header: Header, file: Path) -> list[SaladBranch]:
    """The model's branches whose linear branch the file has dropped and the model has not.

    Raises:
        AlreadyConvertedError: the other way round; a dropped branch cannot come back.
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
    """:func:`branch_state`, without what :meth:`SaladBranch.drop_linear` takes away."""
    leaving = {id(tensor) for branch in dropping for tensor in branch.linear_parameters().values()}
    return {name: tensor for name, tensor in branch_state(model).items() if id(tensor) not in leaving}


def _planned_state(prepared: list[SaladBranch]) -> dict[str, Tensor]:
    return {
        ".".join(part for part in (branch.record.owner, BRANCH_NAME, key) if part): tensor
        for branch in prepared
        for key, tensor in branch.state_dict(keep_vars=True).items()
    }


def _read_checked(content: Any, expected: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """All tensors of the file; strict both ways, and every shape, before any of them is used."""
    there = {plain_key(key): key for key in content.keys()}  # noqa: SIM118 (safe_open is no dictionary)
    _require_keys(sorted(set(expected) - set(there)), MissingKeysError, f"{file} lacks", "Is the file complete?")
    _require_keys(
        sorted(set(there) - set(expected)),
        UnexpectedKeysError,
        f"{file} has, beyond the model's sites,",
        "Was the model converted with fewer sites or LoRA targets?",
    )
    tensors: dict[str, Tensor] = {}
    for name, parameter in expected.items():
        tensor = content.get_tensor(there[name])
        if tensor.shape != parameter.shape:
            raise ShapeMismatchError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}."
            )
        tensors[name] = tensor
    return tensors


def _require_keys(keys: list[str], error: type[CheckpointError], what: str, hint: str) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise error(f"{what} {len(keys)} tensors: {', '.join(keys[:3])}{more}. {hint}")
