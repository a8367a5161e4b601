"""model + inputs -> attention sites: what one forward under the probe showed, as kinds, sizes, owners and reasons.

No Dynamo, and no knowledge of any model class.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

# Private; see probe.py.
from torch._subclasses.fake_tensor import is_fake

from salad_compile.calls.adapters import dense_reason, is_padding, mask_kind
from salad_compile.calls.kinds import kind_among
from salad_compile.calls.packed_samples import different_lengths
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.channels import spans_of_roles
from salad_compile.discovery.probe import Call, Probe, Projection
from salad_compile.discovery.probe_forward import run_probe
from salad_compile.discovery.row_order import gate_rows, nodes_of
from salad_compile.discovery.segments import Layout, layout_of, video_inputs
from salad_compile.discovery.shared_modules import reject_shared, runs_fault
from salad_compile.grid.rule import GridRule, GridSource, read_grid
from salad_compile.grid.search import find_grid_rule


@dataclass(frozen=True)
class Discovery:
    """The attention calls and the grid rule that one forward showed.

    Attributes:
        sites: all attention calls, in execution order.
        grid: how to read the video's token grid from the arguments of the forward, or None. grid_reason: why not.
    """

    sites: list[AttentionSite]
    grid: GridSource | None
    grid_reason: str


def discover(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    min_tokens: int,
    grid: Any = None,
    replay_position: bool = False,
) -> Discovery:
    """All attention calls of one forward; the model is left as it was.

    Args:
        model: any module. example_inputs: tuple of positional or dict of keyword inputs; None synthesises them.
        min_tokens: self-attention over fewer tokens is not eligible.
        grid: (T, H, W) tokens of the video, or a callable that gives them from the forward's arguments by name.
        replay_position: whether to see if position encodings can be replayed.

    Raises:
        InputsError: no inputs were given and none can be synthesised, or they do not fit the forward.
        ProbeError: the model's forward failed. GridMismatchError: `grid` does not fit the tokens of any site.
    """
    probe = run_probe(model, example_inputs, replay_position=replay_position)
    video = video_inputs(probe.inputs)
    sites = _merge_invocations([_site_of(call, probe, video, min_tokens) for call in probe.calls])
    rule, reason = _grid_rule(model, probe, sites, grid)
    if rule is not None:
        tokens = _tokens(rule, probe)
        sites = [dataclasses.replace(site, on_grid=site.video_tokens == tokens) for site in sites]
    sites = [_require_text_count(site) for site in sites]
    return Discovery(reject_shared(sites), rule, reason)


_ROLES = ("query", "key", "value")


def _site_of(call: Call, probe: Probe, video: set[str], min_tokens: int) -> AttentionSite:
    query, key, value = call.shapes
    kind = _kind(call)
    layout = layout_of(call, probe, video) if kind in ("self", "joint", "mixed") else Layout()
    if kind == "self" and layout.text != "none":
        kind = "joint"
    names = _projection_names(call, layout)
    owner = _owner_of(call, [name for group in names for name in group])
    mask = _mask_kind(call.arguments.attn_mask)
    gate_axes, row_reason = gate_rows(call, layout, probe)
    reason = _ineligible(call, probe, kind, layout, mask, row_reason, min_tokens)
    reason = reason or runs_fault(call, owner, names[0], probe)
    attn_mask = call.arguments.attn_mask
    ranked = len(query) == 4 and len(key) == 4
    out, text_out = _outs(call, layout)
    return AttentionSite(
        name=owner,
        kind=kind,
        query=names[0],
        key=names[1],
        value=names[2],
        out=out,
        text_out=text_out,
        batch=query[0] if ranked else 1,
        heads=query[1] if ranked else 1,
        key_heads=key[1] if ranked else 1,
        query_tokens=query[-2],
        key_tokens=key[-2],
        head_dim=query[-1],
        value_dim=value[-1],
        text=layout.text,
        text_tokens=layout.text_tokens,
        text_argument=(layout.arguments or {}).get(owner),
        on_grid=False,
        mask=tuple(attn_mask.shape) if isinstance(attn_mask, Tensor) else None,
        mask_kind=mask,
        causal=bool(call.arguments.is_causal),
        call_index=_call_index(call, owner, probe.calls),
        call=kind_among(call.kind, (other.kind for other in probe.calls if _is_inside(other, owner))),
        invocations=1,
        eligible=not reason,
        reason=reason,
        position_fault=call.position_fault,
        channels=spans_of_roles([getattr(call.arguments, r) for r in _ROLES], layout.streams, probe.channels),
        gate_axes=gate_axes,
    )


def _projection_names(call: Call, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Names of the projections of query, key and value, the video's before the text's."""
    if layout.streams:
        return tuple(tuple(p.name for p in stream if p is not None) for stream in layout.streams)
    return tuple(tuple(dict.fromkeys(p.name for p in made)) for made in call.made_by)


def _outs(call: Call, layout: Layout) -> tuple[str | None, str | None]:
    """The output projections of the video and, with two streams, of the text, distinguished by their number of rows."""
    if not layout.streams or layout.streams[0][1] is None:
        return (call.outs[0].name if call.outs else None), None
    rows = [stream.gate_input.shape[:-1].numel() for stream in layout.streams[0] if stream is not None]
    video, text = (next((out.name for out in call.outs if out.rows == count), None) for count in rows)
    return video, text if text != video else None


def _mask_kind(mask: Any) -> str:
    """What :func:`mask_kind` says; a square mask is "padding" if its values say so."""
    kind = mask_kind(mask)
    if kind != "square":
        return kind
    if mask.device.type == "meta" or is_fake(mask):
        return "unread"
    return "padding" if is_padding(mask) else "square"


def _tokens(source: GridSource, probe: Probe) -> int:
    return math.prod(int(size) for size in read_grid(source, probe.inputs))


def _grid_rule(model: nn.Module, probe: Probe, sites: list[AttentionSite], grid: Any) -> tuple[GridSource | None, str]:
    """The rule that fits the largest eligible site."""
    eligible = [site for site in sites if site.eligible]
    if not eligible:
        return None, "no site is eligible"
    tokens = max(site.video_tokens for site in eligible)
    if grid is not None:
        source = grid if callable(grid) else GridRule.fixed(grid)
        read_grid(source, probe.inputs, tokens)
        return source, ""
    found = find_grid_rule(
        probe.inputs,
        tokens,
        patch_size=_configured(model, "patch_size", "patch_spatial", "spatial_patch_size"),
        patch_size_t=_configured(model, "patch_size_t", "patch_temporal", "temporal_patch_size"),
        conv_grids=probe.convolved,
        channel_axes=probe.axes.channels,
    )
    return found.rule, found.reason


def _configured(model: nn.Module, *names: str) -> Any:
    """The first of these that the model's configuration or, without one, the model itself has."""
    config = getattr(model, "config", None)
    config = model if config is None else config
    values = (config.get(name) if isinstance(config, dict) else getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _require_text_count(site: AttentionSite) -> AttentionSite:
    """A single stream must know at run time how much of it is text: from its owner's arguments, or from the grid."""
    single = site.text in ("before", "after") and len(site.query) == 1
    if not site.eligible or not single or site.text_argument is not None or site.on_grid:
        return site
    reason = (
        f"{site.text_tokens} of its tokens are text, but neither an argument of {site.name or 'the model'!r} nor the "
        "token grid says how many in other calls: pass grid="
    )
    return dataclasses.replace(site, eligible=False, reason=reason)


def _owner_of(call: Call, projections: list[str]) -> str:
    """The innermost running module that contains all projections; helper modules may be shared between owners."""
    for frame in reversed(call.stack):
        if all(not frame.name or projection.startswith(f"{frame.name}.") for projection in projections):
            return frame.name
    return ""


def _is_inside(call: Call, owner: str) -> bool:
    return any(frame.name == owner for frame in call.stack)


def _call_index(call: Call, owner: str, calls: list[Call]) -> int:
    """How many attention calls the same forward of `owner` made before this one.

    Calls for one sample after another, which read the same projections, have one number: that of the first.
    """
    frame = next((entry for entry in reversed(call.stack) if entry.name == owner), None)
    earlier = itertools.takewhile(lambda other: other is not call, calls)
    return sum(frame in other.stack and nodes_of(call) != nodes_of(other) for other in earlier)


def _kind(call: Call) -> str:
    query, key, value = (_origins(made) for made in call.made_by)
    if not (query and key and value):
        return "unresolved"
    if query == key == value:
        return "self" if len(query) == 1 else "joint"
    return "mixed" if query & key else "cross"


def _origins(made: list[Projection]) -> set[Any]:
    return {_origin(projection.gate_input) for projection in made}


# Autograd nodes that change how a value is laid out or stored, and not what it is.
_LAYOUT_NODES = (
    "View",
    "Reshape",
    "Permute",
    "Transpose",
    "ToCopy",
    "Clone",
    "Alias",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "TBackward",
)


def _origin(tensor: Tensor) -> Any:
    """What identifies a projection's input: two views or casts of one value are the same input."""
    node = tensor.grad_fn
    if node is None:
        return id(tensor)
    while any(part in type(node).__name__ for part in _LAYOUT_NODES):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1:
            break
        node = parents[0]
    return node


def _ineligible(
    call: Call, probe: Probe, kind: str, layout: Layout, mask: str, row_reason: str, min_tokens: int
) -> str:
    """Why a call is not converted, or the empty string."""
    query, key, _ = call.shapes
    if kind == "cross":
        return _cross_reason(call, probe)
    if kind == "unresolved":
        return "query, key or value come from no Linear module"
    square = "square" if mask in ("padding", "unread") else mask
    if dense := dense_reason(call.arguments, call.shapes, square, square_is_padding=mask == "padding"):
        unread = ", as far as fake tensors show" if mask == "unread" else ""
        return dense + unread
    packed = call.arguments
    if reason := different_lengths(packed.batch, packed.key_batch, len(packed.query), len(packed.key)):
        return reason
    if row_reason or layout.reason:
        return row_reason or layout.reason
    tokens = query[2]
    if layout.text != "prefix" and key[2] != tokens:
        return f"{tokens} queries but {key[2]} keys"
    return f"{tokens} tokens, fewer than min_tokens={min_tokens}" if tokens < min_tokens else ""


def _cross_reason(call: Call, probe: Probe) -> str:
    """Attention to other tokens is cross-attention; to the same ones it is self-attention in an unknown form."""
    of_query, of_key = (
        {name for made in group for name in probe.labels.names_of(made.labels)} for group in call.made_by[:2]
    )
    if of_query != of_key or call.shapes[0][2] != call.shapes[1][2]:
        return "cross-attention stays dense"
    return (
        "its query, key and value are not projections of one value (of other parts of the tokens, or of something "
        "computed between): taken for cross-attention, which stays dense"
    )


def _merge_invocations(sites: list[AttentionSite]) -> list[AttentionSite]:
    """One site per module and call, however often the forward reached it; the one with the most tokens counts."""
    merged: dict[tuple[str, int, str], AttentionSite] = {}
    for site in sites:
        key = (site.name, site.call_index, site.kind)
        known = merged.get(key)
        if known is None:
            merged[key] = site
        else:
            larger = max(known, site, key=lambda s: s.query_tokens)
            merged[key] = dataclasses.replace(larger, invocations=known.invocations + 1)
    return list(merged.values())
