"""Attention kernels of other projects and ours, as calls that the benchmarks time: how each package is called.

All take and return (B, H, S, D). A package that is missing or does not load raises ImportError, which becomes the row's
error. Nothing is imported before a row asks for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rival_inputs import BOTH, FORWARD, Blocks, Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from salad_compile.kernels import block_sparse_attention, use_engine

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[int], tuple[Tensor, ...]]  # the result, or the gradients of query, key and value
BF16_ERROR, FP8_ERROR = 2e-2, 1.5e-1  # relative, at most


def installed(module: str) -> Any:
    """The module. Raises ImportError if it is missing or does not load."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise
    except Exception as error:  # built for another torch, a missing library, a DSL that refuses the device
        raise ImportError(f"{module} does not load: {type(error).__name__}: {error}") from error


def first_installed(*modules: str) -> Any:
    """The first module that loads. Raises ImportError with all reasons if none does."""
    reasons = []
    for module in modules:
        try:
            return installed(module)
        except ImportError as error:
            reasons.append(str(error))
    raise ImportError("; ".join(reasons))


def has_backward(name: str) -> bool:
    """Whether a package of `DENSE` is there and trains; fa3-fwd has forwards alone."""
    try:
        installed({"FlashAttention-3": "flash_attn_interface", "FlashAttention-4": "flash_attn.cute.interface"}[name])
    except ImportError:
        return False
    return True


def version_of(distribution: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(distribution) if distribution else None
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- dense


def cudnn() -> Attend:
    """PyTorch's attention through cuDNN."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value)

    return attend


def _of_bshd(attention: Callable[..., Any]) -> Attend:
    """A function of (B, S, H, D) that returns the result, or the result and more."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        dense: Tensor = out[0] if isinstance(out, tuple | list) else out
        return dense.transpose(1, 2)

    return attend


def flash_attention_3() -> Attend:
    """Dense attention of FlashAttention-3, from its own package or from fa3-fwd, which has the forward only."""
    return _of_bshd(first_installed("flash_attn_interface", "fa3_fwd_interface").flash_attn_func)


def flash_attention_4() -> Attend:
    """Dense attention of flash-attn-4."""
    return _of_bshd(installed("flash_attn.cute.interface").flash_attn_func)


DENSE: dict[str, Callable[[], Attend]] = {
    "cuDNN": cudnn,
    "FlashAttention-3": flash_attention_3,
    "FlashAttention-4": flash_attention_4,
}


# ---------------------------------------------------------------- block-sparse


def sla(lut: Tensor, query_block: int, key_block: int, tokens: int) -> Attend:
    """The sparse part of thu-ml/SLA, for contiguous tensors; all lists are as long as `lut` is wide."""
    attention = installed("sparse_linear_attention.kernel")._attention
    blocks, slots = -(-tokens // key_block), lut.shape[-1]
    chosen = torch.zeros(*lut.shape[:3], blocks, dtype=torch.int8, device=lut.device).scatter_(-1, lut.long(), 1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention.apply(query, key, value, chosen, lut, slots, query_block, key_block)
        return out

    return attend


def fastvideo(lut: Tensor, count: Tensor, tokens: int) -> Attend:
    """FastVideo's Triton kernels, 64 x 64 blocks, for contiguous tensors that are padded to whole blocks."""
    attention = installed("fastvideo_kernel.block_sparse_attn").block_sparse_attn_triton
    sizes = torch.full((-(-tokens // 64),), 64, dtype=torch.int32, device=lut.device)
    sizes[-1] -= -tokens % 64

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention(query, key, value, lut, count, sizes)[0]
        return out

    return attend


def _whole_lists(lut: Tensor, count: Tensor) -> Tensor:
    """`lut`, for kernels that know no counts. Raises ValueError if a list is shorter than it is wide."""
    if not bool((count == lut.shape[-1]).all()):
        raise ValueError("this kernel takes lists of one length only")
    return lut


def _flash_lists(lut: Tensor, count: Tensor, blocks: Blocks) -> Any:
    """Lists as flash-attn-4 takes them: all blocks whole, none masked inside."""
    kind = installed("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    none, nothing = torch.zeros_like(count), torch.zeros_like(lut)
    return kind(none, nothing, count, lut, block_size=blocks)


def _inverted(lut: Tensor, count: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Ascending ids of the query blocks that attend to each key block, (B, H, Mk, Mq), and how many they are."""
    listed = torch.arange(lut.shape[-1], device=lut.device) < count[..., None]
    chosen = torch.zeros(*lut.shape[:3], key_blocks + 1, dtype=torch.bool, device=lut.device)
    chosen.scatter_(-1, lut.long().masked_fill(~listed, key_blocks), True)
    by_key = chosen[..., :key_blocks].transpose(-1, -2)
    order = by_key.int().argsort(dim=-1, descending=True, stable=True)
    return order.int().contiguous(), by_key.sum(-1, dtype=torch.int32).contiguous()


# ---------------------------------------------------------------- the rows


def _dense(name: str, step: str) -> Callable[[Inputs], Run]:
    return lambda inputs: _attending(inputs, lambda _: DENSE[name](), step)


def _attending(inputs: Inputs, attend_for: Callable[[int], Attend], step: str) -> Run:
    """The forward, or forward and backward through autograd, of what `attend_for` makes for each set."""
    attends = [attend_for(number) for number in range(len(inputs.sets))]

    def forward(number: int) -> tuple[Tensor, ...]:
        return (attends[number % len(attends)](*inputs.of(number)),)

    def both(number: int) -> tuple[Tensor, ...]:
        leaves = inputs.leaves(number)
        return torch.autograd.grad(attends[number % len(attends)](*leaves), leaves, inputs.grad_out)

    return forward if step == FORWARD else both


def _ours(engine: str, blocks: Blocks, step: str) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        def attend_for(number: int) -> Attend:
            lut, count = inputs.selection(blocks, number)

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                scale = query.shape[-1] ** -0.5
                out: Tensor = block_sparse_attention(query, key, value, lut, count, *blocks, scale)[0]
                return out

            return attend

        run = _attending(inputs, attend_for, step)

        def asked(number: int) -> tuple[Tensor, ...]:
            with use_engine(engine):
                return run(number)

        return asked

    return build


def _flash_sparse(blocks: Blocks, step: str) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        attention = installed("flash_attn.cute.interface").flash_attn_func

        def attend_for(number: int) -> Attend:
            lut, count = inputs.selection(blocks, number)
            lists: dict[str, Any] = {"block_sparse_tensors": _flash_lists(lut, count, blocks)}
            if step == BOTH:  # made before the timing starts, to its advantage
                inverted = _inverted(lut, count, -(-inputs.shape.tokens // blocks[1]))
                lists["block_sparse_tensors_bwd"] = _flash_lists(*inverted, blocks)
            return _of_bshd(lambda query, key, value: attention(query, key, value, **lists))

        return _attending(inputs, attend_for, step)

    return build


def _frontend(block: int, step: str, *, fp8: bool = False) -> Callable[[Inputs], Run]:
    """cuDNN-frontend's block-sparse attention; fp8 takes bf16 and quantises in the call."""

    def build(inputs: Inputs) -> Run:
        attention = installed("cudnn.block_sparse_attention").BSA
        name = "block_sparse_attention_fp8_forward" if fp8 else "block_sparse_attention_forward"
        forward = getattr(attention, name)
        lists = [_whole_lists(*selection) for selection in inputs.selections((block, block))]

        def run(number: int) -> tuple[Tensor, ...]:
            lut, tensors = lists[number % len(lists)], inputs.of(number)
            made = forward(*tensors, lut, sparse_block_size=block)
            if step == FORWARD:
                return (made["o_tensor"],)
            saved = (inputs.grad_out, *tensors, made["o_tensor"], made["lse_tensor"], lut)
            gradients = attention.block_sparse_attention_backward(*saved, sparse_block_size=block)
            return tuple(gradients[f"d{tensor}_tensor"] for tensor in "qkv")

        return run

    return build


def _sla(blocks: Blocks, step: str) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        def attend_for(number: int) -> Attend:
            return sla(_whole_lists(*inputs.selection(blocks, number)), *blocks, inputs.shape.tokens)

        return _attending(inputs, attend_for, step)

    return build


def _fastvideo(step: str) -> Callable[[Inputs], Run]:
    def build(inputs: Inputs) -> Run:
        if inputs.shape.tokens % 64:
            raise ValueError("this kernel takes whole blocks of 64 tokens only")

        def attend_for(number: int) -> Attend:
            return fastvideo(*inputs.selection((64, 64), number), inputs.shape.tokens)

        return _attending(inputs, attend_for, step)

    return build


def _matmul(inputs: Inputs) -> Run:
    size = 8192 if inputs.device.type == "cuda" else 64
    square = torch.randn(size, size, device=inputs.device, dtype=inputs.dtype)
    return lambda _: (square @ square,)


@dataclass(frozen=True)
class Kernel:
    """One row.

    Attributes:
        name: of the row, beside `step`.
        kind: "dense", "rival", "salad" (ours), or "ceiling".
        step: the pass.
        process: rows of one name share a process, and what it compiled.
        distribution: the package whose version the row gives, "" for none.
        blocks: None for dense attention.
        build: makes the call, and may compile.
        contiguous: the memory order that it wants, see `Inputs`.
        tolerance: the largest relative error.
    """

    name: str
    kind: str
    step: str
    process: str
    distribution: str
    blocks: Blocks | None
    build: Callable[[Inputs], Run]
    contiguous: bool = False
    tolerance: float = BF16_ERROR

    @property
    def row(self) -> str:
        """What `--only` is compared with."""
        return self.name if self.kind == "ceiling" else f"{self.name} {self.step}"


def kernels() -> Iterator[Kernel]:
    """All rows, ours and the most important rivals first."""
    yield Kernel("matmul 8192", "ceiling", FORWARD, "cuDNN", "", None, _matmul)
    for step in (FORWARD, BOTH):
        for engine, blocks in (("gluon", (128, 64)), ("gluon", (64, 64)), ("triton", (128, 64)), ("triton", (64, 64))):
            name = f"ours {engine} {blocks[0]}x{blocks[1]}"
            yield Kernel(name, "salad", step, "ours", "", blocks, _ours(engine, blocks, step))
        yield from _rivals(step)
    engine_row = ("ours flash 128x128", "salad", FORWARD, "flash-attn-4 sparse", "flash-attn-4", (128, 128))
    yield Kernel(*engine_row, _ours("flash", (128, 128), FORWARD))


def _rivals(step: str) -> Iterator[Kernel]:
    flash = ("rival", step, "flash-attn-4 sparse", "flash-attn-4", (128, 128))
    yield Kernel("FlashAttention-4 block-sparse 128x128", *flash, _flash_sparse((128, 128), step))
    for block in (128, 64):
        about = ("rival", step, f"cuDNN-frontend {block}", "nvidia-cudnn-frontend", (block, block))
        name = f"cuDNN-frontend BSA {block}x{block}"
        yield Kernel(name, *about, _frontend(block, step), contiguous=True)
        if step == FORWARD:
            about = ("rival", step, "cuDNN-frontend fp8", "nvidia-cudnn-frontend", (block, block))
            fp8 = _frontend(block, step, fp8=True)
            yield Kernel(f"cuDNN-frontend BSA fp8 {block}x{block}", *about, fp8, contiguous=True, tolerance=FP8_ERROR)
    about = ("rival", step, "FastVideo", "fastvideo-kernel", (64, 64))
    yield Kernel("FastVideo Triton 64x64", *about, _fastvideo(step), contiguous=True)
    about = ("rival", step, "SLA", "", (128, 64))
    yield Kernel("thu-ml/SLA 128x64", *about, _sla((128, 64), step), contiguous=True)
    packages = {"cuDNN": "torch", "FlashAttention-3": "fa3-fwd", "FlashAttention-4": "flash-attn-4"}
    for name, package in packages.items():
        yield Kernel(f"dense {name}", "dense", step, name, package, None, _dense(name, step))
