"""The contents of a SALAD file, from a converted model: its header and the state of its branches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.calls.multihead import projection
from salad_compile.common.foreign_hooks import is_on_disk, stored
from salad_compile.common.logs import logger
from salad_compile.common.projections import channels, weight_name
from salad_compile.common.sharding import whole, whole_state
from salad_compile.common.version import __version__
from salad_compile.common.wrappers import plain_key
from salad_compile.conversion.convert import dense_projections
from salad_compile.errors import ExportError, WrappedModelError, require_conversion
from salad_compile.grid.rule import GridRule
from salad_compile.salad_files.header import Header
from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.sites.record import SiteRecord


def describe(model: nn.Module) -> Header:
    """The header for a converted model.

    Raises:
        NotConvertedError: the model has no branch.
    """
    known = list(branches(model).values())
    require_conversion(bool(known), type(model).__name__, "call salad_compile.convert(model) before fine-tuning.")
    records = tuple(branch.record for branch in known)
    return Header(
        config=known[0].config,
        base_class=base_class(model),
        base_digest=base_digest(model, records),
        sites=records,
        dense_projections=tuple(dense_projections(model)),
        versions={"salad_compile": __version__, "torch": torch.__version__},
        merged_weights=tuple(weight_sums(model, records)) if any(branch.lora_merged for branch in known) else (),
        grid=_saved_grid(known[0]),
    )


def _saved_grid(branch: SaladBranch) -> GridRule | None:
    source = None if branch.grid is None else branch.grid.source
    if source is not None and not isinstance(source, GridRule):
        logger.warning("grid= was a function, which the file cannot hold: pass it again, load(model, path, grid=...)")
        return None
    return source


def branch_state(model: nn.Module) -> dict[str, Tensor]:
    """Plain name (`blocks.0.attn1.salad.gate_weight`) -> parameter or buffer of every branch, with its values."""
    return {
        plain_key(f"{name}.{key}"): stored(model, branch, key, tensor)
        for name, branch in branches(model).items()
        for key, tensor in branch.state_dict(keep_vars=True).items()
    }


def require_writable(model: nn.Module) -> None:
    """Raises WrappedModelError where hooks keep the parameters of a branch in files."""
    for name, branch in branches(model).items():
        for key, tensor in branch.state_dict(keep_vars=True).items():
            if is_on_disk(model, branch, key, tensor):
                raise WrappedModelError(f"{name}.{key} is offloaded to a file: load first, then offload.")


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """:func:`branch_state` with whole tensors on the CPU; of sharded ones every rank must call it.

    Raises ExportError: one has no values, because the model is on the meta device.
    """
    state = branch_state(model)
    empty = next((name for name, tensor in state.items() if tensor.is_meta), None)
    if empty is not None:
        raise ExportError(f"{empty} has no values, it is on the meta device: load a file or weights first.")
    return whole_state(state)


def leave_meta(model: nn.Module) -> None:
    """Give the branches of a model on the meta device memory on the CPU, without values, for those of a file."""
    for branch in branches(model).values():
        kept = branch.state_dict(keep_vars=True).items()
        if any(type(t.data) is Tensor and stored(model, branch, key, t).is_meta for key, t in kept):
            branch.to_empty(device="cpu")


def base_class(model: nn.Module) -> str:
    """The class's name; FSDP2 puts a generated subclass in front of it."""
    return type(model).__name__.removeprefix("FSDP")


def base_digest(model: nn.Module, records: tuple[SiteRecord, ...]) -> str:
    """A digest of the structure that branches depend on: class, sites, projections and their widths.

    Structure and not values: a file fits every fine-tune of its base, and a quantised base too.
    """
    return structure_digest(model, records, base_class(model), [record.owner for record in records])


def structure_digest(model: nn.Module, records: tuple[SiteRecord, ...], cls: str, owners: Iterable[str]) -> str:
    """:func:`base_digest` under the names of another implementation: its class, and its names of the sites."""
    parts: list[Any] = [cls]
    for record, owner in zip(records, owners, strict=True):
        widths = {role: channels(projection(model, name)) for role, name in record.projections().items()}
        parts.append([plain_key(owner), record.heads, record.head_dim, record.value_dim, widths])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def layers_left_out(model: nn.Module, records: Iterable[SiteRecord]) -> list[str]:
    """Names of modules like those of a file's sites that the file has no site for, from its first one on.

    Like them: named so but for numbers, and of their class. Where a file of a smaller model fits a larger one, these
    are the layers of which it knows nothing. What comes before its first site is what `dense_layers` leaves out.
    """
    owners = {plain_key(record.owner) for record in records}
    modules = {plain_key(name): module for name, module in model.named_modules()}
    first: dict[tuple[str, type], tuple[int, ...]] = {}
    for owner in owners:
        pattern, numbers = _numbers(owner)
        kind = (pattern, type(modules[owner]))
        first[kind] = min(numbers, first.get(kind, numbers))
    found = []
    for name, module in modules.items():
        pattern, numbers = _numbers(name)
        start = first.get((pattern, type(module)))
        if start is not None and numbers > start and name not in owners:
            found.append(name)
    return found


def _numbers(name: str) -> tuple[str, tuple[int, ...]]:
    """A module's name with its numbers taken out, and these."""
    parts = name.split(".")
    pattern = ".".join("*" if part.isdecimal() else part for part in parts)
    return pattern, tuple(int(part) for part in parts if part.isdecimal())


def weight_sums(model: nn.Module, records: tuple[SiteRecord, ...]) -> Iterator[float]:
    """:func:`weight_sum` of each site's projections; of sharded weights every rank must call it."""
    for record in records:
        modules = [model.get_submodule(name) for name in record.projections().values()]
        named = [(module, weight_name(module) or "weight") for module in modules]
        yield weight_sum(whole(stored(model, module, name, getattr(module, name))) for module, name in named)


def weight_sum(weights: Iterable[Tensor]) -> float:
    """The checksum that identifies a merged base: the sum of the absolute values, in fp64."""
    return sum(float(weight.abs().sum(dtype=torch.float64)) for weight in weights)
