"""model + inputs -> attention sites: what one forward under the probe showed, as kinds, sizes, owners and reasons.

No Dynamo, and no knowledge of any model class.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from .attention_call import dense_reason
from .branch import SiteRecord
from .probe import Call, Probe, run_probe


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a model's forward.

    Attributes:
        name: the module whose forward contains both the projections and the call ("" is the model itself).
        kind: "self", "cross", "joint" (two streams concatenated), "mixed" (key and value see more than the query) or
            "unresolved" (some of query, key, value come from no Linear).
        query, key, value, out: names of the projections; several for joint attention, equal for a fused one.
        batch, heads, query_tokens, key_tokens, head_dim, value_dim: sizes in the example forward.
        mask: shape of the attention mask, or None. causal: whether the call is causal.
        call_index: the call's number within one forward of `name`.
        invocations: how often the example forward came by.
        eligible: whether `convert` converts it. reason: if not, why.
    """

    name: str
    kind: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    out: str | None
    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    head_dim: int
    value_dim: int
    mask: tuple[int, ...] | None
    causal: bool
    call_index: int
    invocations: int
    eligible: bool
    reason: str

    def record(self) -> SiteRecord:
        """What conversion keeps of an eligible site."""
        return SiteRecord(
            owner=self.name,
            query=self.query[0],
            key=self.key[0],
            value=self.value[0],
            out=self.out,
            heads=self.heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            batch=self.batch,
            tokens=self.query_tokens,
            call_index=self.call_index,
        )


def discover(model: nn.Module, example_inputs: Any = None, *, min_tokens: int) -> list[AttentionSite]:
    """All attention calls of one forward, in execution order; the model is left as it was.

    Args:
        model: any module. example_inputs: tuple of positional or dict of keyword inputs; None synthesises them.
        min_tokens: self-attention over fewer tokens is not eligible.

    Raises:
        InputsError: no inputs were given and none can be synthesised, or they do not fit the forward.
        ProbeError: the model's forward failed.
    """
    probe = run_probe(model, example_inputs)
    sites = _merge_invocations([_site_of(call, probe, min_tokens) for call in probe.calls])
    return _reject_shared_owners(sites)


def _site_of(call: Call, probe: Probe, min_tokens: int) -> AttentionSite:
    query, key, value = call.shapes
    names = tuple(tuple(dict.fromkeys(p.name for p in made)) for made in call.made_by)
    owner = _owner_of(call, [name for group in names for name in group])
    kind = _kind(call)
    reason = _ineligible(call, kind, probe.input_tokens, min_tokens)
    mask = call.arguments.attn_mask
    ranked = len(query) == 4 and len(key) == 4
    return AttentionSite(
        name=owner,
        kind=kind,
        query=names[0],
        key=names[1],
        value=names[2],
        out=call.out,
        batch=query[0] if ranked else 1,
        heads=query[1] if ranked else 1,
        query_tokens=query[-2],
        key_tokens=key[-2],
        head_dim=query[-1],
        value_dim=value[-1],
        mask=tuple(mask.shape) if isinstance(mask, Tensor) else None,
        causal=bool(call.arguments.is_causal),
        call_index=_call_index(call, owner, probe.calls),
        invocations=1,
        eligible=not reason,
        reason=reason,
    )


def _owner_of(call: Call, projections: list[str]) -> str:
    """The innermost running module that contains all projections; helper modules may be shared between owners."""
    for name, _ in reversed(call.stack):
        if all(not name or projection.startswith(f"{name}.") for projection in projections):
            return name
    return ""


def _call_index(call: Call, owner: str, calls: list[Call]) -> int:
    """How many attention calls the same forward of `owner` made before this one."""
    frame = next((entry for entry in reversed(call.stack) if entry[0] == owner), None)
    earlier = itertools.takewhile(lambda other: other is not call, calls)
    return sum(frame in other.stack for other in earlier)


def _kind(call: Call) -> str:
    query, key, value = ({_origin(p.gate_input) for p in made} for made in call.made_by)
    if not (query and key and value):
        return "unresolved"
    if query == key == value:
        return "self" if len(query) == 1 else "joint"
    return "mixed" if query & key else "cross"


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


def _ineligible(call: Call, kind: str, input_tokens: Mapping[str, int], min_tokens: int) -> str:
    """Why a call is not converted, or the empty string."""
    query, key, value = call.shapes
    reasons = {
        "cross": "cross-attention stays dense",
        "joint": "joint attention over two streams is not supported yet",
        "mixed": "key and value come from other tokens than the query",
        "unresolved": "query, key or value come from no Linear module",
    }
    if kind in reasons:
        return reasons[kind]
    if dense := dense_reason(call.arguments, query, key, value):
        return dense
    if any(len(made) != 1 for made in call.made_by):
        return "query, key or value are made by several projections"
    gate_input = call.made_by[0][0].gate_input
    tokens = query[2]
    if key[2] != tokens:
        return f"{tokens} queries but {key[2]} keys"
    if gate_input.shape[-2] != tokens or gate_input.shape[:-2].numel() != query[0]:
        return f"the query projection sees {tuple(gate_input.shape[:-1])} tokens, the attention ({query[0]}, {tokens})"
    for name, count in input_tokens.items():
        if tokens == count:
            return f"its {tokens} tokens are those of the input {name!r}, not of the video"
    return f"{tokens} tokens, fewer than min_tokens={min_tokens}" if tokens < min_tokens else ""


def _merge_invocations(sites: list[AttentionSite]) -> list[AttentionSite]:
    """One site per module and call, however often the forward came by; the largest token count speaks for it."""
    merged: dict[tuple[str, int], AttentionSite] = {}
    for site in sites:
        key = (site.name, site.call_index)
        known = merged.get(key)
        if known is None:
            merged[key] = site
        else:
            larger = max(known, site, key=lambda s: s.query_tokens)
            merged[key] = dataclasses.replace(larger, invocations=known.invocations + 1)
    return list(merged.values())


def _reject_shared_owners(sites: list[AttentionSite]) -> list[AttentionSite]:
    counts: dict[str, int] = {}
    for site in sites:
        counts[site.name] = counts.get(site.name, 0) + site.eligible
    return [
        dataclasses.replace(
            site,
            eligible=False,
            reason=f"{counts[site.name]} self-attention calls share the forward of {site.name or 'the model'!r}: "
            "put each into a module of its own",
        )
        if site.eligible and counts[site.name] > 1
        else site
        for site in sites
    ]
