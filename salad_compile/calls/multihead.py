"""`nn.MultiheadAttention`, whose input projection is a bare parameter and whose forward is one function.

Discovery runs each one taken apart: input projection, scaled_dot_product_attention, output projection. Converted ones
run so for good. The input projection is then a module without parameters, :class:`InProjection`, so that branches hang
hooks on it as on any fused Linear and no key of the state dict changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from salad_compile.calls.adapters import AttentionArguments, adapter_of

# Name of the submodule that a taken apart nn.MultiheadAttention has.
IN_PROJECTION = "in_projection"


class InProjection(nn.Module):
    """query, key and value of one nn.MultiheadAttention, with weights that stay parameters of that."""

    def __init__(self, owner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_features, self.out_features = owner.embed_dim, 3 * owner.embed_dim

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., C) -> (..., 3 C)."""
        return F.linear(x, weight, bias)


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, reason: str
) -> Tensor:
    """Scaled dot product attention, which discovery sees with the reason for which it stays dense, if any."""
    if has_torch_function((query, key, value)):
        operands = (query, key, value)
        result: Tensor = handle_torch_function(attend, operands, *operands, attn_mask, dropout_p, reason)
        return result
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p)


@adapter_of(attend)
def _attend(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, reason: str) -> AttentionArguments:
    return AttentionArguments(query, key, value, attn_mask, dropout_p, reason=reason)


@adapter_of(F.multi_head_attention_forward)
def _not_taken_apart(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> AttentionArguments:
    """A call outside of discovery and of converted modules, before its projections: known, so that it is reported."""
    reason = "nn.MultiheadAttention has its projections inside: convert the model, which takes it apart"
    return AttentionArguments(query, key, value, layout="HSD", output=0, reason=reason)


class TakenApart:
    """The forward of one nn.MultiheadAttention in three steps, on the instance.

    Args:
        module: keeps its parameters. discovering: whether calls that have to stay dense are taken apart, too; else they
            run as the module's class does it, and the eager twin and the passes miss the site.
    """

    def __init__(self, module: nn.MultiheadAttention, *, discovering: bool) -> None:
        self.module = module
        self.discovering = discovering

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention."""
        module = self.module
        reason = _dense_reason(module, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if reason and not self.discovering:
            return type(module).forward(
                module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        one, batched = query is key and key is value, query.dim() == 3
        query, key, value = (self._batch_first(tensor, batched) for tensor in (query, key, value))
        if one:
            projected = self._project(query)
            parts = projected.chunk(3, dim=-1)
        else:
            parts = tuple(self._project(x).chunk(3, dim=-1)[i] for i, x in enumerate((query, key, value)))
        query, key, value = (part.view(*part.shape[:2], module.num_heads, -1).transpose(1, 2) for part in parts)
        mask = None
        if key_padding_mask is not None and not reason:  # True where a key is padding
            mask = ~(key_padding_mask if batched else key_padding_mask[None])[:, None, None]
        dropout = module.dropout if module.training else 0.0
        if self.discovering:
            out = attend(query, key, value, mask, dropout, reason)
        else:
            out = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        result = module.out_proj(out.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:  # discovering: of this form, whatever the values
            shape = (out.shape[0], *(() if average_attn_weights else (out.shape[1],)), *out.shape[2:3], key.shape[2])
            weights = out.new_zeros(shape if batched else shape[1:])
        if not batched:
            return result[0], weights
        return result if module.batch_first else result.transpose(0, 1), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.module.batch_first else x.transpose(0, 1)

    def _project(self, x: Tensor) -> Tensor:
        module = self.module
        projected: Tensor = getattr(module, IN_PROJECTION)(x, module.in_proj_weight, module.in_proj_bias)
        return projected


def _dense_reason(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> str:
    if not (query is key and key is value):
        return "query, key and value of nn.MultiheadAttention are different tensors"
    if need_weights:
        return "it answers attention weights: call nn.MultiheadAttention with need_weights=False"
    if is_causal:
        return "it is causal"
    if attn_mask is not None:
        return "its attention mask is no key-padding mask"
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        return "its key-padding mask is not bool"
    if module.bias_k is not None or module.add_zero_attn:
        return "nn.MultiheadAttention adds keys of its own"
    return ""


def take_apart_for_discovery(model: nn.Module) -> None:
    """Let every nn.MultiheadAttention run in parts; the caller puts the attributes of all modules back."""
    for module in list(model.modules()):
        if _can_be_taken_apart(module) and IN_PROJECTION not in module._modules:
            _take_apart(module, discovering=True)


def take_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Let the nn.MultiheadAttention modules run in parts that have one of these projections, for good."""
    for name in names:
        owner = in_projection_owner(model, name)
        if owner is not None and IN_PROJECTION not in owner._modules:
            _take_apart(owner, discovering=False)


def in_projection_owner(model: nn.Module, name: str) -> nn.MultiheadAttention | None:
    """The module whose input projection `name` is, in parts already or not."""
    parent, _, leaf = name.rpartition(".")
    if leaf != IN_PROJECTION:
        return None
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return None
    return owner if isinstance(owner, nn.MultiheadAttention) else None


def projection(model: nn.Module, name: str) -> nn.Module:
    """The module `name`; of an nn.MultiheadAttention that is not in parts one that says its widths.

    Raises:
        AttributeError: there is none.
    """
    whole = in_projection_owner(model, name)
    return model.get_submodule(name) if whole is None or IN_PROJECTION in whole._modules else InProjection(whole)


def _can_be_taken_apart(module: nn.Module) -> bool:
    # a subclass may compute something else; an instance whose forward is its own is somebody else's already
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None  # else key or value has another width
        and "forward" not in module.__dict__
    )


def _take_apart(module: nn.Module, *, discovering: bool) -> None:
    assert isinstance(module, nn.MultiheadAttention)
    module.add_module(IN_PROJECTION, InProjection(module))
    module.forward = TakenApart(module, discovering=discovering)  # type: ignore[method-assign]
