"""Attention nodes of a graph -> AttentionCall: normalised arguments, and what is to become of each call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from salad_compile.calls import flex_attention as flex  # register their nodes
from salad_compile.calls import multihead  # register their nodes
from salad_compile.calls.adapters import AttentionArguments, bind, default_scale, dense_reason, is_attention, mask_kind
from salad_compile.calls.softmax_products import ManualAttention
from salad_compile.config import AttentionSpec, BackendOptions
from salad_compile.passes.provenance import (
    erase_dead,
    example_value,
    find_tag,
    is_dead,
    mark_of,
    module_path,
    projection_inputs,
)
from salad_compile.sites.markers import DENSE, SITES, TAGS

_REGISTERED = (flex, multihead)

CONVERTED, TRAINING_FREE, LEFT_DENSE = "salad", "block-sparse", "dense"
CROSS_ATTENTION, LEFT_BY_CONVERSION = "cross-attention", "the conversion left it dense"


@dataclass(frozen=True)
class AttentionCall:
    """One attention node, what becomes of it (`status`), and why it stays dense if it does (`reason`).

    tag: of its query projection. site: the entry marker of the tag's owner. sample: which sample of the batch this call
    is about, in models that attend to one after another.
    """

    node: fx.Node
    arguments: AttentionArguments
    tag: fx.Node | None
    status: str
    reason: str
    site: fx.Node | None = None
    sample: int | None = None

    @property
    def result(self) -> torch.Tensor:
        """What the call answers as attention, as it was recorded."""
        value = example_value(self.node)
        if self.arguments.output is not None:
            assert isinstance(value, (tuple, list))
            value = value[self.arguments.output]
        assert isinstance(value, torch.Tensor), f"{self.node} has no recorded tensor"
        return value

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: inside autocast, query, key and value may have others."""
        return self.result.dtype

    @property
    def shapes(self) -> list[tuple[Any, ...]]:
        """(B, H, S, D) of query, key and value; symbolic."""
        return _shapes(self.arguments)

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        if self.arguments.scale is not None:
            return float(self.arguments.scale)
        return default_scale(int(self.shapes[0][-1]))

    @property
    def mask_kind(self) -> str:
        """What :func:`salad_compile.calls.adapters.mask_kind` says of its mask."""
        return _mask_kind(self.arguments)

    @property
    def module(self) -> str:
        """Where the call is, for messages."""
        return module_path(self.node)

    @property
    def shape(self) -> str:
        """(batch, heads, queries, head_dim) as text; symbolic sizes print as symbols."""
        return str(self.shapes[0])

    @property
    def lost(self) -> bool:
        """Whether this is a converted site whose call can no longer become SALAD."""
        return self.status == LEFT_DENSE and self.tag is not None and self.tag.args[4] != DENSE

    def replace_with(self, value: fx.Node) -> None:
        """Let every user of the attention's result read `value`, and erase the node.

        Where the node answers several tensors only its attention may be in use: nothing else of it is computed.
        """
        if self.arguments.output is None:
            self.node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
            value.meta.update(self.node.meta)
        else:
            for user in list(self.node.users):
                if user.target is not operator.getitem or user.args[1] != self.arguments.output:
                    erase_dead(user)
                    continue
                user.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
                value.meta.update(user.meta)
                user.graph.erase_node(user)
        self.node.graph.erase_node(self.node)


def find_attention(graph: fx.Graph, options: BackendOptions) -> list[AttentionCall]:
    """All attention calls of one graph, in order. Nothing is rewritten yet.

    Operands of products that lie unusually get permuted copies; nothing reads those of calls that stay dense.
    """
    calls: list[AttentionCall] = []
    by_hand = ManualAttention({}, _rank, _permute)
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        if node.op == "call_function" and is_attention(node.target):
            arguments = bind(node.target, node.args, node.kwargs, lambda operand: _tensor(operand).dim())
        else:
            with graph.inserting_before(node):
                found = by_hand.bind(node.target, node.args, node.kwargs)
            if found is None:
                by_hand.note(node.target, node.args, node.kwargs, node)
                continue
            arguments = found
        calls.append(_classify(node, arguments, options, calls))
    return calls


def _rank(value: Any) -> int:
    example = example_value(value) if isinstance(value, fx.Node) else None
    return example.dim() if isinstance(example, torch.Tensor) else 0


def _permute(node: fx.Node, axes: tuple[int, ...]) -> fx.Node:
    permuted = node.graph.call_method("permute", (node, axes))
    permuted.meta["example_value"] = _tensor(node).permute(axes)
    return permuted


def _classify(
    node: fx.Node, arguments: AttentionArguments, options: BackendOptions, before: Sequence[AttentionCall]
) -> AttentionCall:
    tag = find_tag(arguments.query)
    if tag is None or tag.args[4] == DENSE:
        reason = LEFT_BY_CONVERSION if tag is not None else _dense_reason(arguments, options)
        reason = reason or _other_results(node, arguments)
        return AttentionCall(node, arguments, tag, LEFT_DENSE if reason else TRAINING_FREE, reason)
    spec = AttentionSpec.decode(str(tag.args[4]))
    shapes, kind = _shapes(arguments), _mask_kind(arguments)
    # a mask, causality, ... that was not there at conversion
    reason = dense_reason(arguments, shapes, kind, square_is_padding=spec.square_mask)
    site = _site_of(tag)
    reason = reason or _other_results(node, arguments) or _without_text(spec, tag, site)
    sample = _sample(shapes[0], tag, before)
    return AttentionCall(node, arguments, tag, LEFT_DENSE if reason else CONVERTED, reason, site, sample)


def _site_of(tag: fx.Node) -> fx.Node | None:
    """The entry marker of the owner of a tag: both mention its mark."""
    sites = (node for node in tag.graph.nodes if node.target in SITES)
    return next((site for site in sites if mark_of(site) is mark_of(tag)), None)


def _without_text(spec: AttentionSpec, tag: fx.Node, site: fx.Node | None) -> str:
    known = tag.args[3] is not None or (site is not None and len(site.args) > 1 and site.args[1] is not None)
    return "" if known or not spec.single else "nothing in this graph tells how much of it is text"


def _sample(query_shape: Sequence[Any], tag: fx.Node, before: Sequence[AttentionCall]) -> int | None:
    """Which sample a call is about that sees one, while its projection saw several."""
    gate_input = _tensor(tag.args[1])
    several = gate_input.dim() == 3 and isinstance(gate_input.shape[0], int) and gate_input.shape[0] > 1
    if not several or not isinstance(query_shape[0], int) or query_shape[0] != 1:
        return None
    return sum(call.tag is tag for call in before)


def _other_results(node: fx.Node, arguments: AttentionArguments) -> str:
    """Why a call with several results cannot be replaced: more than the attention is read."""
    if arguments.output is None:
        return ""
    for user in node.users:
        if (user.target is not operator.getitem or user.args[1] != arguments.output) and not is_dead(user):
            return "other results of the call than the attention are read"
    return ""


def _shapes(arguments: AttentionArguments) -> list[tuple[Any, ...]]:
    samples = 1 if arguments.batch is None else _tensor(arguments.batch).shape[0] - 1
    operands = (arguments.query, arguments.key, arguments.value)
    return [arguments.shape(_tensor(operand).shape, samples) for operand in operands]


def _mask_kind(arguments: AttentionArguments) -> str:
    mask = arguments.attn_mask
    return mask_kind(None if mask is None else _tensor(mask))


def _dense_reason(arguments: AttentionArguments, options: BackendOptions) -> str:
    """Why an attention call of a model that was never converted stays dense, or the empty string."""
    if arguments.reason:
        return arguments.reason
    operands = (arguments.query, arguments.key, arguments.value)
    if not all(
        isinstance(operand, fx.Node) and isinstance(example_value(operand), torch.Tensor) for operand in operands
    ):
        return "its operands are no tensors of this graph"
    inputs = [projection_inputs(operand) for operand in operands]
    if any(len(sources) != 1 for sources in inputs):
        return "query, key and value do not each come from one projection in this graph"
    if not inputs[0] == inputs[1] == inputs[2]:
        return CROSS_ATTENTION
    if arguments.dropout_p:
        return f"it applies dropout (p={arguments.dropout_p})"
    shapes = _shapes(arguments)
    return dense_reason(arguments, shapes, _mask_kind(arguments)) or _token_reason(shapes, options.min_tokens)


def _token_reason(shapes: Sequence[Sequence[Any]], min_tokens: int) -> str:
    queries, keys = shapes[0][2], shapes[1][2]
    if not statically_known_true(queries == keys):
        return f"{queries} queries but {keys} keys"
    try:
        # on a symbolic length this adds a guard: the graph is compiled once for each side of the threshold
        enough = bool(queries >= min_tokens)
    except Exception:  # an unbacked length, in whichever way this release says so
        return "its length is known at run time only"
    return "" if enough else f"{queries} tokens, fewer than min_tokens={min_tokens}"


def _tensor(node: Any) -> torch.Tensor:
    value = example_value(node)
    assert isinstance(value, torch.Tensor), f"{node} has no recorded tensor"
    return value


def has_converted_tags(graph: fx.Graph) -> bool:
    """Whether a graph belongs to a converted model."""
    return any(node.target in TAGS and node.args[4] != DENSE for node in graph.nodes)
