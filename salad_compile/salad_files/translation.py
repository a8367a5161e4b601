"""A file of one implementation of Wan in another: diffusers', the original release's, or ComfyUI's.

The release's checkpoints are the ones that all of them load, under the original names or under diffusers'. So a model
all of whose parameters have names of one of these namings, with the widths that the file knows, reads the same weights
into the same heads and the same rotation, whatever its code looks like. How its attention calls look is found out by
one forward, as in a conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn as nn

from salad_compile.common.reports import plural
from salad_compile.common.wrappers import plain_key
from salad_compile.config import OVERRIDES, SaladConfig
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.discover import Discovery, discover
from salad_compile.errors import BaseModelMismatchError, ConfigError, InputsError, SaladError
from salad_compile.grid.rule import GridRule, GridSource
from salad_compile.salad_files.contents import base_class, base_digest, structure_digest
from salad_compile.salad_files.header import Header
from salad_compile.salad_files.naming import WAN_CLASSES, diffusers_name, original_name
from salad_compile.sites.branch import BRANCH_NAME, branches
from salad_compile.sites.record import SiteRecord

Renaming = Callable[[str], str]


class Translated(NamedTuple):
    """A file as if it had been written by this model's implementation.

    Attributes:
        header: with the names, calls and class of this model.
        file_name: name of a tensor of a branch in this model -> its name in the file.
    """

    header: Header
    file_name: Renaming


def translate(model: nn.Module, header: Header, file: Path, example_inputs: Any, grid: GridSource | None) -> Translated:
    """The file's header for a model of another class that is the same network.

    Args:
        model: converted or not. example_inputs: of one forward, where none can be made up.
        grid: of the caller, or None.

    Raises:
        BaseModelMismatchError: it is another network, one of other widths, or one whose attention cannot be converted
            as the file says.
    """
    other = f"{file} belongs to a {header.base_class}, and this model is a {base_class(model)}"
    ways = _renamings(model, header)
    if ways is None:
        raise BaseModelMismatchError(f"{other}.")
    to_file, to_model = ways
    known = list(branches(model).values())
    if known:
        records, rule = [branch.record for branch in known], header.grid
    else:
        found = _discover(model, header.config, example_inputs, grid, other)
        _require_all(header, found.sites, to_file, other)
        records = [site.record() for site in found.sites if site.eligible]
        rule = found.grid if isinstance(found.grid, GridRule) else None
    by_query = {to_file(record.query): record for record in records if _is_known(to_file, record.query)}
    missing = [record.owner for record in header.sites if record.query not in by_query]
    if missing:
        raise BaseModelMismatchError(f"{other}, which is not converted at {missing[0]!r} of the file.")
    here = [by_query[record.query] for record in header.sites]
    owners = {mine.owner: theirs.owner for mine, theirs in zip(here, header.sites, strict=True)}
    config = known[0].config if known else _config(header.config, owners)
    sites = tuple(_as_in_file(mine, theirs, config, other) for mine, theirs in zip(here, header.sites, strict=True))
    if structure_digest(model, sites, header.base_class, owners.values()) != header.base_digest:
        first = header.sites[0]
        raise BaseModelMismatchError(
            f"{other} with other widths or heads: the file has {plural(len(sites), 'site')}, the first with "
            f"{first.heads} heads of {first.head_dim}."
        )
    translated = dataclasses.replace(
        header,
        config=config,
        base_class=base_class(model),
        base_digest=base_digest(model, sites),
        sites=sites,
        dense_projections=tuple(to_model(name) for name in header.dense_projections),
        grid=rule,
    )
    return Translated(translated, lambda name: _file_name(name, owners))


def _renamings(model: nn.Module, header: Header) -> tuple[Renaming, Renaming] | None:
    """From names of this model to those of the file, and back; None where either is no Wan as the release knows it."""
    names = [plain_key(name) for name, _ in model.named_parameters() if f".{BRANCH_NAME}." not in name]
    projections = [name for record in header.sites for name in record.projections().values()]
    ways: dict[tuple[str | None, str | None], tuple[Renaming, Renaming]] = {
        ("original", "diffusers"): (diffusers_name, original_name),
        ("diffusers", "original"): (original_name, diffusers_name),
        ("original", "original"): (str, str),
    }
    return ways.get((_naming(names, base_class(model)), _naming(projections, header.base_class)))


def _naming(names: list[str], cls: str) -> str | None:
    """Which of the two namings all these names are of. Classes of diffusers with the same names are other networks."""
    if all(_is_known(diffusers_name, name) for name in names):
        return "original"
    if cls in WAN_CLASSES and all(_is_known(original_name, name) for name in names):
        return "diffusers"
    return None


def _is_known(rename: Renaming, name: str) -> bool:
    try:
        rename(name)
    except ConfigError:
        return False
    return True


def _discover(model: nn.Module, config: SaladConfig, inputs: Any, grid: GridSource | None, other: str) -> Discovery:
    """The sites of this model, of any length: the file says what is converted."""
    replay = config.spec.maps_before_position
    try:
        return discover(model, inputs, min_tokens=1, grid=grid, replay_position=replay)
    except InputsError as error:
        raise BaseModelMismatchError(
            f"{other}: to see how it calls attention, load runs one forward, and cannot make up its "
            f"inputs: pass load(model, file, example_inputs=...). ({error})"
        ) from error
    except SaladError as error:
        raise BaseModelMismatchError(f"{other}, and its attention cannot be found: {error}") from error


def _require_all(header: Header, sites: list[AttentionSite], to_file: Renaming, other: str) -> None:
    """Raises BaseModelMismatchError that says why a site of the file cannot be converted here."""
    there = {to_file(site.query[0]): site for site in sites if site.query and _is_known(to_file, site.query[0])}
    for record in header.sites:
        site = there.get(record.query)
        if site is None or not site.eligible:
            why = "is not where it calls attention" if site is None else f"cannot be converted there: {site.reason}"
            raise BaseModelMismatchError(f"{other}: {record.owner!r} of the file {why}.")


def _config(config: SaladConfig, owners: Mapping[str, str]) -> SaladConfig:
    """The file's configuration, whose overrides speak of the sites by the names of this model."""
    plain = dataclasses.replace(config, overrides={})
    overrides: dict[str, dict[str, Any]] = {}
    for mine, theirs in owners.items():
        settings = config.of_site(theirs)
        changed = {name: getattr(settings, name) for name in OVERRIDES}
        changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
        overrides |= {mine: changed} if changed else {}
    return dataclasses.replace(plain, overrides=overrides)


def _as_in_file(here: SiteRecord, there: SiteRecord, config: SaladConfig, other: str) -> SiteRecord:
    """This model's record of a site, with what training decided.

    Raises:
        BaseModelMismatchError: the site would not compute what the file was trained for.
    """
    maps_first = config.of_site(here.owner).spec.maps_before_position
    if maps_first and here.rotated_first and not there.rotated_first:
        raise BaseModelMismatchError(
            f"{other}: the file maps before it rotates, and in {here.owner!r} the rotation cannot be replayed."
        )
    if (here.text, here.on_grid) != (there.text, there.on_grid):
        raise BaseModelMismatchError(
            f"{other}: {here.owner!r} has text {here.text!r}, grid known: {here.on_grid}; in the file it has text "
            f"{there.text!r}, grid known: {there.on_grid}. Pass grid=, or the function that the file was made with."
        )
    return dataclasses.replace(here, dropped=there.dropped, rotated_first=there.rotated_first)


def _file_name(name: str, owners: Mapping[str, str]) -> str:
    owner, _, rest = name.rpartition(f".{BRANCH_NAME}.")
    return f"{owners[owner]}.{BRANCH_NAME}.{rest}"
