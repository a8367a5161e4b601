"""The branch of one site, built by its record from the projections that the record names."""

from __future__ import annotations

import torch
import torch.nn as nn

from salad_compile.calls.multihead import projection
from salad_compile.common.projections import channels
from salad_compile.common.wrappers import base_layer
from salad_compile.config import SaladConfig
from salad_compile.conversion.channel_slots import channel_slots
from salad_compile.conversion.placement import branch_placement
from salad_compile.errors import ConfigError, UnknownProjectionError
from salad_compile.sites.branch import BRANCH_NAME, SaladBranch
from salad_compile.sites.parameters import Projections
from salad_compile.sites.record import SiteRecord


def build_branch(model: nn.Module, record: SiteRecord, config: SaladConfig) -> SaladBranch:
    """The branch of one site, on the device and in the dtype of its projections; the model is not touched.

    Raises:
        ConfigError: the owner has something else in its place. UnknownProjectionError: see :func:`new_branch`.
    """
    if hasattr(submodule(model, record.owner, record), BRANCH_NAME):
        raise ConfigError(f"{record.owner!r} has an attribute {BRANCH_NAME!r} already: rename it before converting.")
    return new_branch(model, record, config)


def new_branch(
    model: nn.Module, record: SiteRecord, config: SaladConfig, device: torch.device | None = None
) -> SaladBranch:
    """A branch as :func:`build_branch` makes it, for a site that may have one already.

    Args:
        device: None: that of the projections.

    Raises:
        UnknownProjectionError: a module that the record names is missing or is no projection of the recorded widths.
    """
    found = {role: widths_of(model, name, record) for role, name in record.projections().items()}
    slots = {first: channel_slots(record, roles, found[first][1]) for first, roles in record.shared_roles().items()}
    shares = {role: width for group in slots.values() for role, width in group}
    targets = [role for role in found if role.removeprefix("text_") in config.lora_targets]
    widths = {role: (found[role][0], shares[role]) for role in targets}
    there, dtype = branch_placement(submodule(model, record.query, record), submodule(model, record.owner, record))
    return SaladBranch(record, config, Projections(found["query"][0], widths, slots, dtype, device or there))


def widths_of(model: nn.Module, name: str, record: SiteRecord) -> tuple[int, int]:
    """Input and output channels of a projection."""
    module = submodule(model, name, record)
    found = channels(module)
    if found is None:
        raise UnknownProjectionError(
            f"{name!r} of the site {record.owner!r} is a {type(module).__name__}, not a projection."
        )
    return found


def submodule(model: nn.Module, name: str, record: SiteRecord) -> nn.Module:
    """A module that a record names, without the wrapper of an adapter. Raises UnknownProjectionError."""
    try:
        return base_layer(projection(model, name))
    except AttributeError as error:
        raise UnknownProjectionError(
            f"{type(model).__name__} has no module {name!r}, which the site {record.owner!r} needs."
        ) from error
