"""Models whose graph breaks between projection and attention: their attention modules run uncompiled, as SALAD.

Dynamo then hands over a graph that holds nothing of a converted module but the marker of its entry. The passes report
it here, before anything of the module has run; its second half finds the flag and runs under the eager twin. There the
definition itself is compiled, by this backend and with its options: one function for all sites.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from salad_compile.definition.attention import salad_of
from salad_compile.sites.site import Site

_sites: weakref.WeakSet[Site] = weakref.WeakSet()


def remember(site: Site) -> None:
    """A site that was attached to its owner, or copied or unpickled with it."""
    _sites.add(site)


def attached() -> list[Site]:
    """Every site that is in use in this process."""
    return list(_sites)


def leave_uncompiled(mark: Tensor, options: Mapping[str, Any]) -> list[str]:
    """Let the owner that this tensor marks, and every other owner of its class and model, run uncompiled from now on.

    All at once, because blocks of one class share compiled code.

    Args:
        mark: the tensor itself, as the entry marker mentions it (:attr:`BranchParameters.mark`).
        options: of the backend, with which their definition is compiled.

    Returns:
        Names of the owners, that one first; none if no attached site has this mark.
    """
    found = next((site for site in _sites if site.mark is mark), None)
    if found is None:
        return []
    alike = [
        site
        for site in _sites
        if site.owner_class is found.owner_class and site.grid is found.grid and site.config is found.config
    ]
    hide_from_dynamo(type(found))
    for site in alike:
        site.uncompiled, site.backend_options = True, options
    return sorted((site.record.owner for site in alike), key=lambda owner: (owner != found.record.owner, owner))


def hide_from_dynamo(site_class: type[Site]) -> None:
    """Here and not as a decorator: torch.compiler.disable loads Dynamo, which an import of this package must not."""
    # `_torchdynamo_disable` is private: the mark of torch.compiler.disable. Seen in torch 2.11 and 2.13;
    # tests/salad_compile/sites/test_private_names.py fails when it moves.
    if not hasattr(site_class.run_uncompiled, "_torchdynamo_disable"):
        hidden = torch.compiler.disable(site_class.run_uncompiled)  # type: ignore[no-untyped-call]
        site_class.run_uncompiled = hidden  # type: ignore[method-assign]


_definitions: dict[str, Callable[..., Tensor]] = {}


def definition_of(site: Site) -> Callable[..., Tensor]:
    """The definition of a site that runs uncompiled among compiled code, compiled."""
    options = site.backend_options
    if options.get("lowering") == "eager" or site.group:
        return salad_of
    key = repr(sorted(options.items()))
    if key not in _definitions:
        _definitions[key] = torch.compile(salad_of, backend="salad", options=dict(options))
    return _definitions[key]
