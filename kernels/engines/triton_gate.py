"""The calls that the gate compiles for the Triton engine: what their kinds of input are, and the arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..block_choice import BlockChoice
from ..layout import block_count
from ..linear_operands import Keys, Queries
from ..pools import Pools
from ..preparation import Preparation
from ..selection import Selection
from .call import Call
from .engine import GateCall

BATCH, HEADS, TOKENS = 2, 12, 32760  # Wan 1.3B at 480p; only its divisibility by 16 matters here
KEY_BLOCK = 64
POOL = 256
DENSITY_PERMILLE, KEPT = 100, 51
SCALE = 0.125
EPS = 1e-6
META = torch.device("meta")


def gate_calls(arch: int) -> Iterator[GateCall]:
    """See `Engine.gate_calls`."""
    yield from _prepare(arch)
    yield from _routing(arch)
    yield from _mass(arch)
    yield from _linear(arch)
    yield from _block_sparse(arch)
    yield from _tail(arch)


@dataclass(frozen=True)
class Case:
    """One kind of input."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    query_block: int = 128
    mask: bool = False
    feature_map: str = "relu"
    rotated: bool = False
    unaligned: bool = False  # rows begin at odd addresses, as those of a slice may

    def tensor(self) -> torch.Tensor:
        """(B, H, S, D) in (B, S, H, D) memory order, on meta."""
        extra = int(self.unaligned)
        memory = torch.empty((BATCH, TOKENS, HEADS, self.head_dim + extra), dtype=self.dtype, device=META)
        return memory[..., extra:].transpose(1, 2)

    def mask_tensor(self) -> torch.Tensor | None:
        """bool (B, S) or None."""
        return torch.empty((BATCH, TOKENS), dtype=torch.bool, device=META) if self.mask else None

    def rotated_tensor(self) -> torch.Tensor | None:
        """Like `tensor`, or None."""
        return self.tensor() if self.rotated else None


def _attention_cases(arch: int) -> Iterator[Case]:
    """Every dtype, head_dim, block size and option at least once, and what asks most of a GPU; most of it on Hopper.

    Aligned tiles may be read as boxes, others are read through pointers: kernels of their own. A mask costs registers;
    fp16 is compiled as bf16 is.
    """
    hardest = functools.partial(Case, mask=True, unaligned=True)
    for head_dim in (64, 128):
        yield Case(torch.bfloat16, head_dim, mask=True)
        yield hardest(torch.bfloat16, head_dim)
    yield Case(torch.bfloat16, 80, mask=True)
    yield hardest(torch.bfloat16, 96)
    yield hardest(torch.float32, 128)
    if arch == 90:
        yield Case(torch.bfloat16, 128)
        yield Case(torch.bfloat16, 128, unaligned=True)
        yield Case(torch.bfloat16, 64, query_block=64)
        yield Case(torch.bfloat16, 128, query_block=64, mask=True)
        yield hardest(torch.bfloat16, 128, query_block=64)
        yield hardest(torch.float16, 128)
        yield Case(torch.float32, 64, mask=True)


def _linear_cases(arch: int) -> Iterator[Case]:
    """As `_attention_cases`; what costs most here is a rotated key beside a mask."""
    full = functools.partial(Case, mask=True, rotated=True)
    yield Case(torch.bfloat16, 64)
    yield full(torch.bfloat16, 96)
    yield full(torch.bfloat16, 128)
    yield full(torch.float32, 128)
    yield Case(torch.bfloat16, 128, feature_map="softmax")
    if arch == 90:
        yield Case(torch.bfloat16, 128)
        yield Case(torch.bfloat16, 80, feature_map="elu")
        yield Case(torch.float16, 128)
        yield Case(torch.float32, 64)


def _routing(arch: int) -> Iterator[GateCall]:
    """Pooling of every kind of input, and selection, which sees fp32 only."""
    for case in _attention_cases(arch):
        call = Call("pool_blocks", META, case.dtype, head_dim=case.head_dim, key_block=case.query_block)
        yield GateCall(call, _name("pool_blocks", case), (case.tensor(), case.query_block, case.mask_tensor()))
    for case in (Case(torch.float32, mask=mask) for mask in (False, True)):
        pooled_query, pooled_key = (
            torch.empty((BATCH, HEADS, block_count(TOKENS, block), 128), device=META)
            for block in (case.query_block, KEY_BLOCK)
        )
        settings = (case.query_block, KEY_BLOCK, DENSITY_PERMILLE, 0, 512, case.mask_tensor())
        call = Call("select_blocks", META, case.dtype, masked=case.mask)
        for words, permille in (("", None), (" permille", torch.empty((), dtype=torch.int32, device=META))):
            yield GateCall(
                call, _name("select_blocks" + words, case), (pooled_query, pooled_key, BlockChoice(*settings, permille))
            )


def _mass(arch: int) -> Iterator[GateCall]:
    """Selection by mass and by error: what is shipped as patterns in the usual blocks, and the largest of each kind."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for case, key_block, cell, by_error in (
        (Case(bf16), KEY_BLOCK, 16, True),
        (Case(bf16), KEY_BLOCK, 8, True),
        (Case(bf16), KEY_BLOCK, 8, False),
        (Case(bf16, query_block=64), KEY_BLOCK, 16, True),
        (Case(bf16, query_block=64, mask=True), KEY_BLOCK, 8, True),
        (Case(bf16, query_block=16), 16, 16, True),
        (Case(bf16, query_block=16), 16, 8, True),
        (Case(bf16, 64, mask=True), KEY_BLOCK, 16, True),
        (Case(fp16, 80, query_block=256, mask=True, unaligned=True), 256, 8, True),
        (Case(fp32, mask=True), KEY_BLOCK, 8, True),
        (Case(fp32, 64), KEY_BLOCK, 16, False),
    ):
        x = case.tensor()
        choice = BlockChoice(case.query_block, key_block, DENSITY_PERMILLE, 0, 512, case.mask_tensor())
        call = Call(
            "select_by_mass",
            META,
            case.dtype,
            head_dim=case.head_dim,
            value_dim=case.head_dim if by_error else None,
            query_block=case.query_block,
            key_block=key_block,
            cell=cell,
            masked=case.mask,
        )
        name = _name(f"select_by_{'error' if by_error else 'mass'}{cell} keys{key_block}", case)
        yield GateCall(call, name, (x, x, x if by_error else None, cell, SCALE, choice))


def _linear(arch: int) -> Iterator[GateCall]:
    """State and output, forward and backward."""
    for case in _linear_cases(arch):
        x, mask, rotated, phi = case.tensor(), case.mask_tensor(), case.rotated_tensor(), case.feature_map
        state = torch.empty((BATCH, HEADS, case.head_dim, case.head_dim), device=META)
        key_sum = torch.empty((BATCH, HEADS, case.head_dim), device=META)
        keys, queries = Keys(x, x, phi, mask, rotated), Queries(x, state, key_sum, phi, EPS, rotated)
        for operator, arguments in {
            "linear_state": (keys,),
            "linear_state_backward": (state, key_sum, keys),
            "linear_output": (queries,),
            "linear_output_backward": (x, queries),
        }.items():
            call = Call(operator, META, case.dtype, head_dim=case.head_dim, value_dim=case.head_dim, feature_map=phi)
            yield GateCall(call, _name(operator.removeprefix("linear_"), case), arguments)


def _prepare(arch: int) -> Iterator[GateCall]:
    """The forms of models: norms over all heads and over one, pairs in both ways, tables of both sizes and counts."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for case, heads, pairs, norm, over, tables, block in (
        (Case(bf16), 12, "interleaved", "rms", "width", (2, 1, fp32), 0),  # Wan
        (Case(bf16), 12, "interleaved", "rms", "width", (2, 1, fp32), 128),
        (Case(bf16), 40, "interleaved", "rms", "width", (2, 1, fp32), 64),
        (Case(bf16, unaligned=True), 40, "interleaved", "layer", "width", (2, 1, fp32), 128),
        (Case(bf16, 64), 32, "interleaved", "rms", "width", (4, 32, bf16), 64),  # LTX
        (Case(bf16), 24, "interleaved", "rms", "head", (4, 1, fp32), 128),  # HunyuanVideo
        (Case(fp16, 64, feature_map="softmax"), 48, "halves", "layer", "head", (2, 1, fp32), 128),  # CogVideoX
        (Case(bf16, 96, feature_map="elu"), 16, "halves", "rms", "width", (2, 1, torch.float64), 64),
        (Case(fp32), 32, "interleaved", "rms", "width", (2, 1, fp32), 128),
        (Case(fp32, 64), 32, "interleaved", "rms", "width", (4, 32, fp32), 128),
        (Case(bf16, feature_map=""), 24, "halves", "none", "head", (2, 1, fp32), 128),
    ):
        channels = case.head_dim * (heads if over == "width" else 1)
        memory = torch.empty((BATCH, TOKENS, heads, 3 * case.head_dim + case.unaligned), dtype=case.dtype, device=META)
        x = memory[..., case.unaligned : case.unaligned + case.head_dim].transpose(1, 2)
        count, table_heads, dtype = tables
        table = torch.empty((1, table_heads, TOKENS, case.head_dim), dtype=dtype, device=META)[..., ::2]
        weight = None if norm == "none" else torch.empty((channels,), dtype=case.dtype, device=META)
        order = torch.empty((TOKENS,), dtype=torch.int32, device=META)
        settings = (pairs, norm, over, EPS, case.feature_map, block)
        bias = weight if norm == "layer" else None
        arguments = (x, Preparation((table,) * count, *settings, weight, bias, order, order))
        call = Call("prepare_operand", META, case.dtype, head_dim=case.head_dim)
        words = f"{pairs} {norm}-{over} {heads} heads, {count} tables, means of {block}"
        yield GateCall(call, _name(f"prepare_operand {words}", case), arguments)


def _block_sparse(arch: int) -> Iterator[GateCall]:
    """Attention over selected blocks, forward and backward."""
    for case in _attention_cases(arch):
        x, query_blocks = case.tensor(), block_count(TOKENS, case.query_block)
        lut = torch.empty((BATCH, HEADS, query_blocks, KEPT), dtype=torch.int32, device=META)
        selection = Selection(lut, lut[..., 0], case.query_block, KEY_BLOCK, SCALE, case.mask_tensor())
        lse = torch.empty((BATCH, HEADS, TOKENS), device=META)
        for operator, name, arguments in (
            ("block_sparse_attention", "forward", (x, x, x, selection)),
            ("block_sparse_attention_backward", "backward", (x, x, x, x, x, lse, selection)),
        ):
            call = Call(
                operator,
                META,
                case.dtype,
                head_dim=case.head_dim,
                value_dim=case.head_dim,
                query_block=case.query_block,
                key_block=KEY_BLOCK,
                masked=case.mask,
            )
            yield GateCall(call, _name(name, case), arguments)


def _tail(arch: int) -> Iterator[GateCall]:
    """Pools in the same softmax: counting, forward and backward."""
    lut = torch.empty((BATCH, HEADS, block_count(TOKENS, 128), KEPT), dtype=torch.int32, device=META)
    for pool, mask in ((POOL, None), (POOL, Case(mask=True).mask_tensor()), (KEY_BLOCK // 4, None)):
        call = Call("count_tail", META, torch.float32, key_block=KEY_BLOCK, masked=mask is not None)
        name = f"count_tail {pool} of {KEY_BLOCK}" + " mask" * call.masked
        yield GateCall(call, name, (lut, lut[..., 0], TOKENS, KEY_BLOCK, pool, 0, TOKENS, mask))
    yield from _pool_means(arch)
    for case in _attention_cases(arch):
        x, query_blocks = case.tensor(), block_count(TOKENS, case.query_block)
        lut = torch.empty((BATCH, HEADS, query_blocks, KEPT), dtype=torch.int32, device=META)
        selection = Selection(lut, lut[..., 0], case.query_block, KEY_BLOCK, SCALE, case.mask_tensor())
        pools = torch.empty((BATCH, HEADS, block_count(TOKENS, POOL), case.head_dim), dtype=case.dtype, device=META)
        counted = torch.empty((BATCH, HEADS, query_blocks, pools.shape[2]), device=META)
        lse = torch.empty((BATCH, HEADS, TOKENS), device=META)
        settings = (Pools(pools, pools, counted, None), selection)
        for operator, arguments in (
            ("attend_with_tail", (x, x, x, *settings)),
            ("attend_with_tail_backward", (x, x, x, x, x, lse, *settings)),
        ):
            call = Call(
                operator,
                META,
                case.dtype,
                head_dim=case.head_dim,
                value_dim=case.head_dim,
                query_block=case.query_block,
                key_block=KEY_BLOCK,
                masked=case.mask,
            )
            yield GateCall(call, _name(operator, case), arguments)


def _pool_means(arch: int) -> Iterator[GateCall]:
    """Means of rows, of rows that are moved, and of means of blocks."""
    order = torch.empty((TOKENS,), dtype=torch.int32, device=META)
    for case in _attention_cases(arch):
        x, mask = case.tensor(), case.mask_tensor()
        blocks = torch.empty((BATCH, HEADS, block_count(TOKENS, KEY_BLOCK), case.head_dim), device=META)
        settings = (x, POOL, 0, TOKENS, mask)
        for operator, words, arguments in (
            ("tail_means", "", (*settings, None, 0)),
            ("tail_means", " known", (*settings, blocks, KEY_BLOCK)),
            ("take_rows_with_means", "", (x, order, order, POOL, 0, TOKENS)),
        ):
            call = Call(operator, META, case.dtype, head_dim=case.head_dim, masked=case.mask)
            yield GateCall(call, _name(operator + words, case), arguments)


def _name(function: str, case: Case) -> str:
    options = [name for name in ("mask", "rotated", "unaligned") if getattr(case, name)]
    if case.feature_map != "relu":
        options.append(case.feature_map)
    dtype = str(case.dtype).removeprefix("torch.")
    return " ".join([function, dtype, f"d{case.head_dim}", f"{case.query_block}x{KEY_BLOCK}", *options])
