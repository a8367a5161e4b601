"""The attention functions of flash_attn and its family, known by name as soon as somebody has imported them.

Nothing is imported here: only what `sys.modules` holds counts. Their signatures differ between versions, so arguments
are read by name; an argument that is not known to leave the result alone, and is given, makes the call stay dense.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/discovery/test_discover.py fails when it moves.
from torch._subclasses.fake_tensor import is_fake

from salad_compile.calls.adapters import Adapter, AttentionArguments, Layout, in_place_of, register_adapter
from salad_compile.calls.python_functions import KnownFunction, Unpack, keep_whole_in_graphs, know, known

_FLASH = (
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
)
_SAGE = (
    "sageattn",
    "sageattn_varlen",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn3_blackwell",
)
_FAMILY: dict[str, tuple[str, ...]] = {
    "flash_attn": _FLASH,
    "flash_attn.flash_attn_interface": _FLASH,
    "flash_attn.cute": _FLASH,
    "flash_attn.cute.interface": _FLASH,
    "flash_attn_interface": _FLASH,
    "flash_attn_3.flash_attn_interface": _FLASH,
    "sageattention": _SAGE,
    "sageattention.core": _SAGE,
    "sageattn3": _SAGE,
    "sageattn3.api": _SAGE,
    "xformers.ops": ("memory_efficient_attention",),
    "xformers.ops.fmha": ("memory_efficient_attention",),
    "torch.nn.attention.varlen": ("varlen_attn",),
}

_ROLES: dict[str, tuple[str, ...]] = {
    "query": ("q", "query"),
    "key": ("k", "key"),
    "value": ("v", "value"),
    "scale": ("softmax_scale", "sm_scale", "scale"),
    "is_causal": ("causal", "is_causal"),
    "dropout_p": ("dropout_p", "p"),
    "batch": ("cu_seqlens_q", "cu_seq_q"),
    "key_batch": ("cu_seqlens_k", "cu_seq_k"),
}
# What leaves the result as it is, but for rounding.
_HARMLESS = frozenset(
    (
        "deterministic",
        "num_splits",
        "pack_gqa",
        "sm_margin",
        "max_seqlen_q",
        "max_seqlen_k",
        "max_q",
        "max_k",
        "min_seqlen_k",
        "enable_gqa",
        "op",
        "tensor_layout",
        "return_attn_probs",
        "return_lse",
        "return_aux",
        "qk_quant_gran",
        "pv_accum_dtype",
        "quantization_backend",
        "smooth_k",
        "smooth_v",
        "per_block_mean",
        "scheduler_metadata",
        "disable_scheduler_metadata",
        "kwargs",
    )
)
_WHOLE_WINDOW = ((-1, -1), (None, None))


def find_family(*, in_graphs: bool = False) -> None:
    """Know the functions of the family that are imported by now. in_graphs: by Dynamo, too, which is then loaded."""
    global _latest
    modules = list(map(sys.modules.get, _MODULES))
    if not in_graphs and _latest is not None and _latest == (modules, _functions_of(modules)):
        return  # nothing came since the latest forward
    for function in list(_imported()):
        if function not in _seen:
            entry = know(function)
            _seen.add(entry.function)
            _register(entry)
    operator = getattr(sys.modules.get(_DISPATCH), "_wrapped_flash_attn_3", None)
    if isinstance(operator, torch._library.custom_ops.CustomOpDef) and operator not in _seen:
        _seen.add(operator)
        register_adapter(operator, _flash_attn_3_of_diffusers)
    if in_graphs:
        keep_whole_in_graphs()
    _latest = modules, _functions_of(modules)


def run_or_stand_in(target: Any, arguments: AttentionArguments, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call that discovery sees. Of a Python function on tensors without memory only the shape of the result.

    Kernels refuse such tensors, or whatever they were not made for: the CPU, or float32.
    """
    query = arguments.query
    if known(target) is None or not (query.device.type == "meta" or is_fake(query)):
        return target(*args, **kwargs)
    out = query.new_zeros((*query.shape[:-1], arguments.value.shape[-1]))
    return in_place_of(target, arguments, out)


_DISPATCH = "diffusers.models.attention_dispatch"
_MODULES = (*_FAMILY, _DISPATCH)

_seen: set[Any] = set()
_latest: tuple[list[Any], list[Any]] | None = None  # modules and functions that were there


def _functions_of(modules: Sequence[Any]) -> list[Any]:
    """What may be functions of the family, in these of `_MODULES`."""
    *family, dispatch = modules
    found = [
        getattr(module, name, None)
        for module, names in zip(family, _FAMILY.values(), strict=True)
        if module is not None
        for name in names
    ]
    kernels = getattr(dispatch, "_HUB_KERNELS_REGISTRY", {}).values()
    return [*found, *[getattr(kernel, "kernel_fn", None) for kernel in kernels]]


def _imported() -> Iterator[types.FunctionType]:
    for module, names in _FAMILY.items():
        there = sys.modules.get(module)
        for name in names if there is not None else ():
            function = getattr(there, name, None)
            if isinstance(function, types.FunctionType):
                yield function
    dispatch = sys.modules.get(_DISPATCH)
    for kernel in getattr(dispatch, "_HUB_KERNELS_REGISTRY", {}).values():  # loaded from the Hub by diffusers
        function = getattr(kernel, "kernel_fn", None)
        if function is not None and isinstance(function, types.FunctionType):
            yield function


def _register(entry: KnownFunction) -> None:
    name = entry.real.__name__
    if "packed" in name:
        whole = "flash_attn_varlen_func" if "varlen" in name else "flash_attn_func"
        function = entry.real.__globals__.get(whole)
        if isinstance(function, types.FunctionType):
            entry.unpacked = know(function)
            entry.unpack = _unpacking(entry.signature, entry.unpacked.signature)
        return
    # flash-attn-4, and 3 before it could be asked
    parameters = entry.signature.parameters
    several = "pack_gqa" in parameters and "return_attn_probs" not in parameters
    entry.real.answers_several = lambda kwargs: several  # type: ignore[attr-defined]
    register_adapter(entry.function, _adapter(entry, always_several=several))


def _adapter(entry: KnownFunction, *, always_several: bool) -> Adapter:
    """Reads the arguments of a function of the family. always_several: it answers the log-sum-exp whoever asks."""

    def read(*args: Any, **kwargs: Any) -> AttentionArguments:
        bound = entry.signature.bind(*args, **kwargs)
        defaults = {name: parameter.default for name, parameter in entry.signature.parameters.items()}
        given = dict(bound.arguments)
        given.update(given.pop("kwargs", {}))
        roles = {
            role: given.get(name)
            for role, names in _ROLES.items()
            for name in names
            if name in entry.signature.parameters
        }
        several = 0 if always_several or _asks_for_several(given) else None
        batch, key_batch = roles.pop("batch", None), roles.pop("key_batch", None)
        packed = batch is not None
        layout: Layout = "SHD" if packed else "BSHD"
        if "tensor_layout" in defaults or entry.real.__name__ == "sageattn3_blackwell":
            layout = "BSHD" if given.get("tensor_layout", "HND") == "NHD" else "BHSD"
        return AttentionArguments(
            roles["query"],
            roles["key"],
            roles["value"],
            dropout_p=roles.get("dropout_p") or 0.0,
            is_causal=bool(roles.get("is_causal")),
            scale=roles.get("scale"),
            enable_gqa=True,
            layout=layout,
            batch=batch,
            key_batch=key_batch if packed and key_batch is not batch else None,
            output=several,
            results=None if several is None else _results(given, defaults),
            reason=_reason(given, defaults),
        )

    read.of_family = True  # type: ignore[attr-defined]
    return read


def _flash_attn_3_of_diffusers(
    q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: Any = False, *rest: Any, **more: Any
) -> AttentionArguments:
    """The operator that diffusers has for FlashAttention-3; its backend gives no more than this."""
    given = any(value is not None for value in rest) or any(name not in _HARMLESS for name in more)
    reason = "it is called with arguments of FlashAttention-3 that change its result" if given else ""
    return AttentionArguments(
        q, k, v, scale=softmax_scale, is_causal=causal, layout="BSHD", output=0, results=2, reason=reason
    )


def _asks_for_several(given: Mapping[str, Any]) -> bool:
    aux = given.get("return_aux")
    return bool(given.get("return_attn_probs") or given.get("return_lse") or getattr(aux, "lse", False))


def _results(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> int:
    """flash_attn 2, which knows dropout, answers the dropped weights as well."""
    return 3 if given.get("return_attn_probs") and "dropout_p" in defaults else 2


def _reason(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Which argument makes a call something else than softmax attention over all tokens, or the empty string."""
    known = {name for names in _ROLES.values() for name in names} | _HARMLESS
    for name, value in given.items():
        if name in known or value is None or value is False or value is defaults.get(name):
            continue
        if name == "window_size" and tuple(value) in _WHOLE_WINDOW:
            continue
        if isinstance(value, (int, float)) and value in (0, defaults.get(name)):
            continue
        shown = f"={value!r}" if isinstance(value, (int, float, str, tuple)) else ""
        return f"it is called with {name}{shown}"
    return ""


def _unpacking(packed: inspect.Signature, whole: inspect.Signature) -> Unpack:
    """From the arguments of a packed function to those of the one that takes three tensors."""

    def unpack(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(packed.bind(*args, **kwargs).arguments)
        if "qkv" in given:
            tensors = _thirds(given.pop("qkv"), given.pop("num_heads_q", None))
        else:
            tensors = (given.pop("q"), *given.pop("kv").unbind(-3))
        lengths, longest = given.pop("cu_seqlens", None), given.pop("max_seqlen", None)
        if lengths is not None:
            given.update(cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=longest, max_seqlen_k=longest)
        return tensors, {name: value for name, value in given.items() if name in whole.parameters}

    return unpack


def _thirds(qkv: Tensor, heads: int | None) -> tuple[Tensor, ...]:
    """query, key and value of (..., 3, H, D), or of (..., H + 2 K, D) with H query heads."""
    if heads is None:
        return tuple(qkv.unbind(-3))
    keys = (qkv.shape[-2] - heads) // 2
    return tuple(torch.split(qkv, [heads, keys, keys], dim=-2))
