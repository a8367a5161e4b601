"""Models whose graph breaks between projection and attention: their attention modules run uncompiled, as SALAD.

Dynamo then hands over a graph that holds nothing of a converted module but the marker of its entry. The passes report
it here, before anything of the module has run; its second half finds the flag and runs under the eager twin.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from salad_compile.sites.branch import SaladBranch

_branches: weakref.WeakSet[SaladBranch] = weakref.WeakSet()


def remember(branch: SaladBranch) -> None:
    """A branch that was attached to its owner, or copied or unpickled with it."""
    _branches.add(branch)


def attached() -> list[SaladBranch]:
    """Every branch that is in use in this process."""
    return list(_branches)


def any_converted() -> bool:
    """Whether a converted model is in use in this process."""
    return bool(_branches)


def leave_uncompiled(mark: Tensor) -> list[str]:
    """Let the owner that this tensor marks, and every other owner of its class and model, run uncompiled from now on.

    All at once, because blocks of one class share compiled code.

    Args:
        mark: the tensor itself, as the entry marker mentions it (:attr:`SaladBranch.mark`).

    Returns:
        Names of the owners, that one first; none if no attached branch has this mark.
    """
    found = next((branch for branch in _branches if branch.mark is mark), None)
    if found is None:
        return []
    alike = [
        b for b in _branches if b.owner_class is found.owner_class and b.grid is found.grid and b.config is found.config
    ]
    hide_from_dynamo(type(found))
    for branch in alike:
        branch.uncompiled = True
    return sorted((b.record.owner for b in alike), key=lambda owner: (owner != found.record.owner, owner))


def hide_from_dynamo(branch_class: type[SaladBranch]) -> None:
    """Here and not as a decorator: torch.compiler.disable loads Dynamo, which an import of this package must not."""
    if not hasattr(branch_class.run_uncompiled, "_torchdynamo_disable"):
        hidden = torch.compiler.disable(branch_class.run_uncompiled)  # type: ignore[no-untyped-call]
        branch_class.run_uncompiled = hidden  # type: ignore[method-assign]
