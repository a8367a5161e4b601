"""Who looks at the attention calls of converted sites: diagnosis, calibration, dropping, pictures.

Observers do not run in compiled graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from salad_compile.definition.operands import Operands
from salad_compile.definition.spec import AttentionSpec
from salad_compile.kernels.listening import listen
from salad_compile.sites.site import Site

# site, operands, what the site computes, factor of the scores
Observer = Callable[[Site, Operands, AttentionSpec, float], None]

_observers: list[Observer] = []


def is_observed() -> bool:
    """Whether any observer is active."""
    return bool(_observers)


def notify(site: Site, given: Operands, spec: AttentionSpec, scale: float) -> None:
    """Called by the eager twin for each attention call that it replaces, before it computes the call."""
    for observer in list(_observers):
        observer(site, given, spec, scale)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """While active, `observer` gets each call of a converted site in an uncompiled forward."""
    with listen(_observers, observer):
        yield
