"""What counts as an attention call, and its arguments in one form.

diffusers' dispatcher passes keyword arguments, older processors mix positionals and keywords: they are bound once,
here, for tensors (discovery, eager twin) and graph nodes (passes) alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# The same object as torch._C._nn.scaled_dot_product_attention, which is the target in Dynamo's graphs (torch 2.11 and
# 2.13; tests/salad_compile/test_attention_call.py fails when it changes); graphs of torch.export hold the overload.
ATTENTION_FUNCTIONS = frozenset({F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default})

_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_ORDER = ("query", "key", "value", *_DEFAULTS)


@dataclass(frozen=True)
class AttentionArguments:
    """The eight arguments of scaled_dot_product_attention: tensors, or the nodes that stand for them."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any
    dropout_p: Any
    is_causal: Any
    scale: Any
    enable_gqa: Any

    @classmethod
    def bind(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionArguments:
        """From any mix of positional and keyword arguments."""
        return cls(**{**_DEFAULTS, **dict(zip(_ORDER, args, strict=False)), **kwargs})


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim), what scaled_dot_product_attention takes when no scale is given."""
    return 1 / math.sqrt(head_dim)


def dense_reason(
    call: AttentionArguments, query_shape: Sequence[Any], key_shape: Sequence[Any], value_shape: Sequence[Any]
) -> str:
    """Why a self-attention call has to stay dense whatever the model is, or the empty string (method.md 4.4).

    Shapes may be symbolic; only what does not add guards is asked of them: ranks and head counts.
    """
    if len(query_shape) != 4 or len(key_shape) != 4 or len(value_shape) != 4:
        return f"the query has {len(query_shape)} dimensions, not (batch, heads, tokens, head_dim)"
    if call.attn_mask is not None:
        return "it has an attention mask"
    if call.is_causal:
        return "it is causal"
    if call.dropout_p:
        return f"it applies dropout (p={call.dropout_p})"
    if call.enable_gqa or query_shape[1] != key_shape[1]:
        return "key and value have fewer heads than the query (grouped queries)"
    if query_shape[3] != key_shape[3]:
        return "query and key have different head dimensions"
    return ""
