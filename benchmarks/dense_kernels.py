"""Which dense attention is fastest on a shape, and a Wan model that runs on it, compiled too.

PyTorch's own kernels are chosen by `sdpa_kernel`. Those of FlashAttention-3 and -4 are wrapped in one operator, which
graphs keep as it is, and which takes the place of self-attention in diffusers' Wan. Cross-attention, a few percent of a
step, stays on the faster of PyTorch's own on both sides of a comparison.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from common import Clock
from rival_kernels import first_installed, installed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PACKAGES = ("FlashAttention-3", "FlashAttention-4")
TIMINGS = 5


@torch.library.custom_op("salad_benchmark::dense_attention", mutates_args=())
def dense_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Attention of (B, S, H, D) by one of `PACKAGES`; and its lse (B, H, S), for FlashAttention-4's backward."""
    tensors = [x.detach().contiguous() for x in (query, key, value)]
    with torch.no_grad():
        if kernel == "FlashAttention-4":
            out, lse = installed("flash_attn.cute.interface").flash_attn_func(*tensors, return_lse=True)
            return out, lse
        made = first_installed("flash_attn_interface", "fa3_fwd_interface").flash_attn_func(*tensors)
    return (made[0] if isinstance(made, tuple | list) else made), query.new_empty(0, dtype=torch.float32)


@dense_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    shape = (batch, heads, tokens) if kernel == "FlashAttention-4" else (0,)
    return query.new_empty((batch, tokens, heads, value.shape[-1])), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("salad_benchmark::dense_attention_backward", mutates_args=())
def dense_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by FlashAttention-4."""
    tensors = [x.detach().contiguous() for x in (query, key, value, out, grad_out)]
    scale = query.shape[-1] ** -0.5
    # private (flash-attn-4 4.0.0b36): its public function is one for autograd, which an operator cannot call
    backward = installed("flash_attn.cute.interface")._flash_attn_bwd
    query_gradient, key_gradient, value_gradient = backward(*tensors, lse, scale)
    return query_gradient, key_gradient, value_gradient


@dense_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.kernel != "FlashAttention-4":
        raise NotImplementedError(f"{ctx.kernel} is timed in forwards alone")
    return (*dense_attention_backward(grad_out, *ctx.saved_tensors), None)


dense_attention.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------- the fastest


def time_dense(shape: tuple[int, ...], device: torch.device, clock: Clock, *, training: bool) -> dict[str, float]:
    """Milliseconds of one call of each dense kernel that takes (B, S, H, D), under load; empty on a CPU.

    Args:
        training: forward and backward. FlashAttention-3, whose package here has no backward, is left out then.
    """
    if device.type != "cuda":
        return {}
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=training) for _ in range(3)]
    grad_out = torch.randn(shape, device=device, dtype=torch.bfloat16)
    times = {}
    for name in ("cuDNN", "flash", *(PACKAGES[1:] if training else PACKAGES)):

        def call(name: str = name) -> object:
            out = attend(*tensors, name)
            return torch.autograd.grad(out, tensors, grad_out) if training else out

        try:
            call()
            times[name] = statistics.median(clock.under_load(call, 1.0) for _ in range(TIMINGS))
        except Exception as error:  # a kernel that is not there, or that fails, is not the fastest
            print(f"  dense attention by {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return {name: round(ms, 4) for name, ms in times.items()}


def attend(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Attention of (B, S, H, D) by a kernel of `SDPA` or `PACKAGES`."""
    if kernel in PACKAGES:
        out: Tensor = torch.ops.salad_benchmark.dense_attention(query, key, value, kernel)[0]
        return out
    with sdpa_kernel(SDPA[kernel]):
        transposed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return transposed.transpose(1, 2)


def fastest(times: dict[str, float]) -> str:
    """The kernel that dense self-attention runs on; "" for PyTorch's choice if nothing was timed."""
    return min(times, key=times.__getitem__) if times else ""


def preferring(times: dict[str, float]) -> contextlib.AbstractContextManager[Any]:
    """Prefer the fastest of PyTorch's kernels, then the others; PyTorch's choice if nothing was timed."""
    known = [name for name in sorted(times, key=times.__getitem__) if name in SDPA]
    if not known:
        return contextlib.nullcontext()
    order = [*known, *(name for name in SDPA if name not in known)]
    return sdpa_kernel([*(SDPA[name] for name in order), SDPBackend.MATH], set_priority=True)


@contextlib.contextmanager
def self_attention_on(kernel: str) -> Iterator[None]:
    """While active, self-attention of diffusers' Wan runs on one of `PACKAGES`; nothing changes for other kernels."""
    if kernel not in PACKAGES:
        yield
        return
    from diffusers.models.transformers import transformer_wan

    with mock.patch.object(transformer_wan, "dispatch_attention_fn", _dispatch_for(kernel)):
        yield


@functools.cache  # the same function every time: another one would have Dynamo compile again
def _dispatch_for(kernel: str) -> Callable[..., Tensor]:
    from diffusers.models.transformers import transformer_wan

    usual: Callable[..., Tensor] = transformer_wan.dispatch_attention_fn

    def dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is None and query.shape[1] == key.shape[1]:
            return attend(query, key, value, kernel)
        return usual(query, key, value, attn_mask=attn_mask, **options)

    return dispatch
