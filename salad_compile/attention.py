"""The definition of SALAD attention (arXiv 2601.16515), once, for tensors and for `fx.Proxy` objects alike.

Nothing here branches on shapes or on values, so that the same lines run eagerly and splice themselves into a graph.
The heavy parts are operators of `salad_compile.kernels`; everything else is plain ATen, which Inductor fuses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels as _kernels  # registers torch.ops.salad.*
from .config import AttentionSpec

__all__ = ["BranchTensors", "linear_attention", "salad_attention", "sparse_and_linear_attention", "sparse_attention"]

# Added to the normaliser of the linear branch, in fp32 (method.md section 5, our choice).
LINEAR_EPS = 1e-6

assert _kernels  # imported for its effect


class BranchTensors(NamedTuple):
    """Parameters of one site's linear branch. C is the width of the layer's input, D = heads * value head_dim.

    Shapes: gate_weight (C,), gate_bias (1,), proj_weight (D, D), proj_bias (D,). Any floating dtype: they are cast
    to the activations' dtype where they are used, so fp32 masters under 16-bit activations work without autocast.
    """

    gate_weight: Tensor
    gate_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor | None, spec: AttentionSpec, scale: float
) -> Tensor:
    """Top-K routed block-sparse softmax attention (method.md section 4).

    Args:
        query, key, value: (B, H, S, head_dim), any strides, one floating dtype.
        order: int32 (S,), the token order whose consecutive runs are the blocks; None is the native order.
        spec: block sizes and density.
        scale: factor of the scores, as in the attention call that is replaced.

    Returns:
        (B, H, S, value head_dim) in the dtype of query. No gradient flows through the selection.
    """
    pooled_query = torch.ops.salad.pool_blocks.default(query.detach(), order, spec.query_block)
    pooled_key = torch.ops.salad.pool_blocks.default(key.detach(), order, spec.key_block)
    return _attend_selected(query, key, value, pooled_query, pooled_key, order, spec, scale)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """Bidirectional linear attention over all tokens, rotate-then-map (method.md section 5).

    Args:
        query, key, value: (B, H, S, head_dim) as they reach softmax attention, after the position encoding.

    Returns:
        (B, H, S, value head_dim): phi(q) KV / (phi(q) z + eps), in the dtype of query.
    """
    state = torch.ops.salad.linear_state.default(key, value, spec.feature_map)
    out: Tensor = torch.ops.salad.linear_output.default(query, state[0], state[1], spec.feature_map, LINEAR_EPS)
    return out


def sparse_and_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor | None, spec: AttentionSpec, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`sparse_attention` and :func:`linear_attention`, reading each tensor once for the means and the sums.

    Args: see :func:`sparse_attention`.

    Returns:
        Both results, (B, H, S, value head_dim) in the dtype of query.
    """
    keys = torch.ops.salad.pool_and_summarise.default(key, value, order, spec.key_block, spec.feature_map)
    queries = torch.ops.salad.pool_and_read.default(
        query, keys[1], keys[2], order, spec.query_block, spec.feature_map, LINEAR_EPS
    )
    return _attend_selected(query, key, value, queries[0], keys[0], order, spec, scale), queries[1]


def _attend_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_query: Tensor,
    pooled_key: Tensor,
    order: Tensor | None,
    spec: AttentionSpec,
    scale: float,
) -> Tensor:
    """Softmax attention over the key blocks that the means of the blocks select."""
    selected = torch.ops.salad.select_blocks.default(
        pooled_query, pooled_key, spec.query_block, spec.key_block, spec.permille
    )
    attended = torch.ops.salad.block_sparse_attention.default(
        query, key, value, selected[0], selected[1], order, spec.query_block, spec.key_block, scale
    )
    out: Tensor = attended[0]
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _gate(gate_input: Tensor, branch: BranchTensors, dtype: torch.dtype) -> Tensor:
    """sigmoid(x w_g + b_g), one number per token, (B, S, 1); the sigmoid is taken in `dtype` (method.md section 1)."""
    logits = torch.matmul(gate_input, branch.gate_weight.to(gate_input.dtype)).unsqueeze(-1)
    return torch.sigmoid((logits + branch.gate_bias.to(gate_input.dtype)).to(dtype))


def salad_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate_input: Tensor,
    branch: BranchTensors,
    order: Tensor | None,
    spec: AttentionSpec,
    *,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """O' = O_sparse + sigmoid(x w_g + b_g) * Proj(O_linear), before the output projection (method.md section 2, v1).

    Args:
        query, key, value: (B, H, S, head_dim), exactly what reaches scaled_dot_product_attention.
        gate_input: x, the input of the query projection, (B, S, C), or (S, C) when B is 1.
        branch: gate and projection of the site.
        order, spec, scale: see :func:`sparse_attention`.
        dtype: dtype of the attention result that is replaced. Inside autocast query, key and value may differ from it,
            and operators of torch.library are not autocast.

    Returns:
        (B, H, S, value head_dim) in `dtype`.
    """
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    sparse, linear = sparse_and_linear_attention(query, key, value, order, spec, scale)
    linear = linear.transpose(1, 2)  # (B, S, H, head_dim)
    gate = _gate(gate_input, branch, torch.promote_types(dtype, torch.float32)).to(dtype)
    update = gate * _linear(linear.flatten(2), branch.proj_weight, branch.proj_bias)
    # under autocast F.linear may answer in 16 bits whatever it was given
    return sparse + update.to(dtype).view_as(linear).transpose(1, 2)
