"""Attention nodes of a graph -> AttentionCall: normalised arguments, and what is to become of each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..attention_call import ATTENTION_FUNCTIONS, AttentionArguments, default_scale, dense_reason
from ..config import BackendOptions
from ..tag import DENSE, TAGS
from .provenance import example_value, find_tag, module_path, projection_inputs

CONVERTED, TRAINING_FREE, LEFT_DENSE = "salad", "block-sparse", "dense"


@dataclass(frozen=True)
class AttentionCall:
    """One attention node, what becomes of it (`status`), and why it stays dense if it does (`reason`)."""

    node: fx.Node
    arguments: AttentionArguments
    tag: fx.Node | None
    status: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: inside autocast, query, key and value may have others."""
        return _tensor(self.node).dtype

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        if self.arguments.scale is not None:
            return float(self.arguments.scale)
        return default_scale(int(_tensor(self.arguments.query).shape[-1]))

    @property
    def module(self) -> str:
        """Where the call is, for messages."""
        return module_path(self.node)

    @property
    def shape(self) -> str:
        """(batch, heads, queries, head_dim) as text; symbolic sizes print as symbols."""
        return str(tuple(_tensor(self.arguments.query).shape))

    @property
    def lost(self) -> bool:
        """Whether this is a converted site whose call can no longer become SALAD."""
        return self.status == LEFT_DENSE and self.tag is not None and self.tag.args[4] != DENSE

    def replace_with(self, value: fx.Node) -> None:
        """Let every user of the attention node read `value`, which takes over its meta data, and erase the node."""
        self.node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
        value.meta.update(self.node.meta)
        self.node.graph.erase_node(self.node)


def find_attention(graph: fx.Graph, options: BackendOptions) -> list[AttentionCall]:
    """All attention calls of one graph, in order. Analysis only: nothing is rewritten yet."""
    return [_classify(node, options) for node in graph.nodes if node.target in ATTENTION_FUNCTIONS]


def _classify(node: fx.Node, options: BackendOptions) -> AttentionCall:
    arguments = AttentionArguments.bind(node.args, node.kwargs)
    tag = find_tag(arguments.query)
    if tag is not None and tag.args[4] != DENSE:
        shapes = [_tensor(operand).shape for operand in (arguments.query, arguments.key, arguments.value)]
        reason = dense_reason(arguments, *shapes)  # a mask, dropout, ... that was not there at conversion
        return AttentionCall(node, arguments, tag, LEFT_DENSE if reason else CONVERTED, reason)
    reason = "the conversion left it dense" if tag is not None else _dense_reason(arguments, options)
    return AttentionCall(node, arguments, tag, LEFT_DENSE if reason else TRAINING_FREE, reason)


def _dense_reason(arguments: AttentionArguments, options: BackendOptions) -> str:
    """Why an attention call of a model that was never converted stays dense, or the empty string."""
    operands = (arguments.query, arguments.key, arguments.value)
    if not all(
        isinstance(operand, fx.Node) and isinstance(example_value(operand), torch.Tensor) for operand in operands
    ):
        return "its operands are no tensors of this graph"
    inputs = [projection_inputs(operand) for operand in operands]
    if any(len(sources) != 1 for sources in inputs):
        return "query, key and value do not each come from one projection in this graph"
    if not inputs[0] == inputs[1] == inputs[2]:
        return "cross-attention"
    shapes = [_tensor(operand).shape for operand in operands]
    return dense_reason(arguments, *shapes) or _token_reason(shapes, options.min_tokens)


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
