"""Packages of ours with the names and signatures of flash_attn and its family, which no CPU can run.

Each public function is a Python function over a `torch.autograd.Function` over custom operators, as the real ones are;
flash-attn-4's has kernels that cannot be traced instead, and sageattention's has no gradients.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).contiguous(), scores.logsumexp(-1)


@torch.library.custom_op("stub_flash::forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, scale)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("stub_flash::backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).softmax(-1)
    dp = torch.einsum("bqhd,bkhd->bhqk", grad, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    grads = (("bhqk,bkhd->bqhd", ds, k), ("bhqk,bqhd->bkhd", ds, q), ("bhqk,bqhd->bkhd", p, grad))
    dq, dk, dv = (torch.einsum(*each).contiguous() for each in grads)
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


class FlashAttnFunc(torch.autograd.Function):
    """Over operators, padded to multiples of eight as flash_attn 2 does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        width = q.shape[-1]
        if width % 8:
            q, k, v = (torch.nn.functional.pad(x, [0, 8 - width % 8]) for x in (q, k, v))
        out, lse = torch.ops.stub_flash.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.width = scale, width
        ctx.mark_non_differentiable(lse)
        return out[..., :width], lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        padding = ctx.saved_tensors[0].shape[-1] - ctx.width
        grad = torch.nn.functional.pad(grad, [0, padding]) if padding else grad
        grads = torch.ops.stub_flash.backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale)
        return (*(x[..., : ctx.width] for x in grads), None)


class UntraceableFunc(torch.autograd.Function):
    """Over kernels behind plain Python, which read the memory of their tensors: flash-attn-4."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor | None]:
        for x in (q, k, v):
            x.data_ptr()
            if type(x) not in (Tensor, torch.nn.Parameter):
                raise RuntimeError("from_dlpack of no memory")
        ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
        ctx.save_for_backward(q, k, v)
        return _forward(q, k, v, ctx.scale)[0], None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        return (*_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None)


def _by_sample(
    function: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None
) -> Tensor:
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    parts = []
    for i in range(len(ends_q) - 1):
        one, two = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        if ends_q[i + 1] > ends_q[i]:
            parts.append(function.apply(q[one][None], k[two][None], v[two][None], scale)[0][0])
    return torch.cat(parts)


def flash_attn_2() -> dict[str, types.ModuleType]:
    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        out, lse = FlashAttnFunc.apply(q, k, v, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        return FlashAttnFunc.apply(*qkv.detach().unbind(2), softmax_scale)[0]

    def flash_attn_kvpacked_func(
        q,
        kv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        return FlashAttnFunc.apply(q, *kv.detach().unbind(2), softmax_scale)[0]

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        return _by_sample(FlashAttnFunc, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    def flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        return _by_sample(FlashAttnFunc, *qkv.detach().unbind(1), cu_seqlens, cu_seqlens, softmax_scale)

    return _package(
        "flash_attn",
        "flash_attn.flash_attn_interface",
        flash_attn_func,
        flash_attn_qkvpacked_func,
        flash_attn_kvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
    )


def flash_attn_3() -> dict[str, types.ModuleType]:
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = FlashAttnFunc.apply(q, k, v, softmax_scale)
        return (out, lse) if return_attn_probs else out

    return _package("flash_attn_interface", "", flash_attn_func)


def flash_attn_4() -> dict[str, types.ModuleType]:
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        mask_mod=None,
        return_lse=False,
    ):
        return UntraceableFunc.apply(q, k, v, softmax_scale)

    return _package("flash_attn.cute", "flash_attn.cute.interface", flash_attn_func)


def sageattention() -> dict[str, types.ModuleType]:
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
        if tensor_layout == "HND":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = FlashAttnFunc.apply(q, k, v, sm_scale)[0]
        return out.transpose(1, 2) if tensor_layout == "HND" else out

    return _package("sageattention", "sageattention.core", sageattn)


def xformers() -> dict[str, types.ModuleType]:
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        return FlashAttnFunc.apply(query, key, value, scale)[0]

    return _package("xformers.ops", "xformers.ops.fmha", memory_efficient_attention)


def _package(name: str, inner: str, *functions: Any) -> dict[str, types.ModuleType]:
    module = types.ModuleType(name)
    own = {"FlashAttnFunc": FlashAttnFunc, "UntraceableFunc": UntraceableFunc, "_by_sample": _by_sample}
    module.__dict__.update(__builtins__=builtins, **own)
    for function in functions:
        keyword_only = function.__kwdefaults__
        # the functions of a package find each other by name; those here are closures of one function
        function = types.FunctionType(
            function.__code__, module.__dict__, function.__name__, function.__defaults__, function.__closure__
        )
        function.__module__, function.__qualname__ = inner or name, function.__name__
        function.__kwdefaults__ = keyword_only
        setattr(module, function.__name__, function)
    return {name: module, **({inner: module} if inner else {})}


@contextlib.contextmanager
def imported(modules: dict[str, types.ModuleType]) -> Iterator[types.ModuleType]:
    """Meanwhile these modules count as imported; gives the first."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield next(iter(modules.values()))
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
