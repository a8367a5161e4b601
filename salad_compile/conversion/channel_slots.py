"""Which channels of a projection's output belong to which role of a site."""

from __future__ import annotations

from collections.abc import Sequence

from salad_compile.errors import UnknownProjectionError
from salad_compile.sites.record import SiteRecord

Slots = tuple[tuple[str, int], ...]
"""Role and number of channels of each part of an output, in their order; "" is a part of something else."""


def channel_slots(record: SiteRecord, roles: Sequence[str], out_features: int) -> Slots:
    """How the output of the projection that serves `roles` divides.

    Raises:
        UnknownProjectionError: the projection does not have the channels that the attention call reads.
    """
    if roles[0] in ("out", "text_out"):
        return ((roles[0], out_features),)
    if all(role in record.channels for role in roles):
        return _as_seen(record, roles, out_features)
    widths = {role: record.head_widths()[role] for role in roles}
    if sum(widths.values()) == out_features:
        return tuple(widths.items())
    # keys and values whose heads the model itself repeats, before the call
    shared = [role for role in roles if not role.endswith("query")]
    rest = out_features - sum(widths[role] for role in roles if role not in shared)
    whole = sum(widths[role] for role in shared)
    if shared and rest > 0 and whole % rest == 0 and all(widths[role] * rest % whole == 0 for role in shared):
        return tuple((role, widths[role] * rest // whole if role in shared else widths[role]) for role in roles)
    raise UnknownProjectionError(
        f"{record.projections()[roles[0]]!r} has {out_features} output channels, but {', '.join(roles)} of "
        f"{record.owner!r} are {' + '.join(str(width) for width in widths.values())}, and which of them they are "
        "cannot be told."
    )


def _as_seen(record: SiteRecord, roles: Sequence[str], out_features: int) -> Slots:
    """Each role where discovery saw it, and what lies between and behind."""
    slots: list[tuple[str, int]] = []
    at = 0
    for role in sorted(roles, key=lambda role: record.channels[role]):
        first, end = record.channels[role]
        if not at <= first < end <= out_features:
            raise UnknownProjectionError(
                f"{', '.join(roles)} of {record.owner!r} overlap in the {out_features} output channels of "
                f"{record.projections()[roles[0]]!r}, or lie behind them."
            )
        slots += [("", first - at)] if first > at else []
        slots.append((role, end - first))
        at = end
    return tuple([*slots, ("", out_features - at)] if at < out_features else slots)
