"""Who looks at the attention calls of converted sites: diagnosis, calibration, dropping, pictures.

Observers do not run in compiled graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from salad_compile.config import AttentionSpec
from salad_compile.definition.attention import Operands
from salad_compile.kernels.listening import entered

if TYPE_CHECKING:
    from salad_compile.sites.branch import SaladBranch

    # branch, operands, what the site computes, factor of the scores
    Observer = Callable[[SaladBranch, Operands, AttentionSpec, float], None]

_observers: list[Observer] = []


def is_observed() -> bool:
    """Whether any observer is active."""
    return bool(_observers)


def notify(branch: SaladBranch, given: Operands, spec: AttentionSpec, scale: float) -> None:
    """Called by the eager twin for each attention call that it replaces, before it computes the call."""
    for observer in list(_observers):
        observer(branch, given, spec, scale)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """While active, `observer` gets each call of a converted site in an uncompiled forward."""
    with entered(_observers, observer):
        yield
