"""A second conversion asks for the same as the first one, or is an error: what is there is not changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.nn as nn

from salad_compile.errors import AlreadyConvertedError
from salad_compile.sites.branch import BRANCH_NAME, SaladBranch

if TYPE_CHECKING:
    from salad_compile.config import SaladConfig
    from salad_compile.discovery.discover import Discovery


def require_same_conversion(
    model: nn.Module, known: Mapping[str, SaladBranch], config: SaladConfig, component: str
) -> None:
    """Check that a model was converted as itself, and with this configuration.

    Args:
        known: its branches by module name. component: of a pipeline, "" for a model.

    Raises:
        AlreadyConvertedError: a part of it, or a model around it, was converted; or with other settings.
    """
    subject = component or "the model"
    for name, branch in known.items():
        owner = ".".join(filter(None, (branch.record.owner, BRANCH_NAME)))
        if owner != name:
            part = name.removesuffix(owner).rstrip(".")
            what = f"its part {part!r}" if name.endswith(owner) and part else "a model around it"
            raise AlreadyConvertedError(
                f"{subject} ({type(model).__name__}) was not converted itself, but {what} was: sites are named from "
                "there. Convert a fresh copy of the base model, as a whole."
            )
    before = next(iter(known.values())).config
    if before.different(config):
        raise AlreadyConvertedError(
            f"{subject} was converted before with another configuration (now != before): "
            f"{config.difference(before)}. Convert a fresh copy of the base model."
        )


def require_same_sites(known: Mapping[str, SaladBranch], found: Discovery, component: str) -> None:
    """Raises AlreadyConvertedError where `sites=` asks for other sites than are converted."""
    before = {branch.record.owner for branch in known.values()}
    now = {site.name for site in found.sites if site.eligible}
    if before != now:
        missing, extra = sorted(now - before), sorted(before - now)
        parts = [
            f"{', '.join(map(repr, names[:4]))} {what}"
            for names, what in (
                (missing, "asked for now and not converted"),
                (extra, "converted before and not asked for now"),
            )
            if names
        ]
        raise AlreadyConvertedError(
            f"{component or 'the model'} was converted before with other sites: {'; '.join(parts)}. Convert a fresh "
            "copy of the base model."
        )
