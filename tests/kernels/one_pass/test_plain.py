"""Which kernels a call launches: those of the plain case on Hopper, or the general ones. Nothing runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salad_compile.kernels import inspect
from salad_compile.kernels.aot import specialise
from salad_compile.kernels.capability import target_arch
from salad_compile.kernels.dispatch import interpreting
from salad_compile.kernels.launch import Launch, record_launches
from salad_compile.kernels.one_pass import cuda

BF16 = torch.bfloat16
PLAIN, GENERAL = ["plain_keys_kernel", "plain_queries_kernel"], ["keys_kernel", "queries_kernel"]


def made(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """(B, H, S, D) on meta, in (B, S, H, D) memory order."""
    batch, heads, tokens, channels = shape
    return torch.empty((batch, tokens, heads, channels), dtype=dtype, device="meta").transpose(1, 2)


def launches(
    x: torch.Tensor,
    value: torch.Tensor | None = None,
    *,
    block: int = 64,
    feature_map: str = "relu",
    order: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    rotated: torch.Tensor | None = None,
    arch: tuple[int, int] = (9, 0),
) -> list[Launch]:
    """What one call of each operator launches, except the sum of the splits."""
    value = x if value is None else value
    state = torch.empty((*x.shape[:2], x.shape[-1], value.shape[-1]), device="meta")
    rest: tuple[Any, ...] = (mask, rotated)
    with target_arch(arch), record_launches() as recorded:
        cuda.pool_and_summarise(x, value, order, block, feature_map, *rest)
        cuda.pool_and_read(x, state, state[..., 0].contiguous(), order, block, feature_map, 1e-6, *rest)
    return [launch for launch in recorded if launch.kernel.__name__ != "reduce_kernel"]


def names(recorded: list[Launch]) -> list[str]:
    return [launch.kernel.__name__ for launch in recorded]


@pytest.mark.parametrize(
    "x",
    [
        made(1, 2, 1, 128),
        made(2, 3, 203, 64),
        made(2, 3, 203, 128).contiguous(),
        made(2, 3, 203, 136)[..., 8:],  # 16 bytes
        made(2, 9, 203, 128)[:, 3:6],  # of query, key and value in one tensor
        made(1, 1, 203, 128).as_strided((1, 1, 203, 128), (7, 5, 128, 1)),  # strides without a meaning
    ],
    ids=["one-token", "d64", "bhsd", "slice-of-channels", "slice-of-heads", "one-head"],
)
def test_the_plain_case(x: torch.Tensor) -> None:
    assert names(launches(x)) == PLAIN
    assert names(launches(x, block=256)) == PLAIN
    assert names(launches(x, block=32)) == GENERAL


@pytest.mark.parametrize(
    "x",
    [
        made(2, 3, 203, 129)[..., 1:],
        made(2, 3, 203, 132)[..., :128],
        made(2, 3, 203, 96),
        made(2, 1, 203, 128).expand(2, 3, 203, 128),
        made(2, 3, 128, 203).transpose(2, 3),
        made(2, 3, 203, 128, dtype=torch.float16),
    ],
    ids=["odd-addresses", "odd-strides", "d96", "stride-0", "channels-apart", "fp16"],
)
def test_inputs_that_are_read_through_pointers(x: torch.Tensor) -> None:
    assert names(launches(x)) == GENERAL


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "elu"},
        {"order": torch.empty(203, dtype=torch.int32, device="meta")},
        {"mask": torch.empty((2, 203), dtype=torch.bool, device="meta")},
        {"rotated": made(2, 3, 203, 128)},
        {"value": made(2, 3, 203, 64)},
        {"arch": (8, 0)},
        {"arch": (10, 0)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_general_kernels(options: dict[str, Any]) -> None:
    assert names(launches(made(2, 3, 203, 128), **options)) == GENERAL


compiling = pytest.mark.skipif(interpreting(), reason="nothing can be compiled in a process that interprets")


@compiling
def test_length_batch_and_heads_compile_nothing_new() -> None:
    first, *others = (
        [specialise(launch, 90).identity for launch in launches(made(*shape, 128))]
        for shape in ((1, 12, 32760), (1, 1, 1), (3, 16, 1023), (2, 40, 75600))
    )
    assert all(other == first for other in others)


@compiling
def test_the_gate_compiles_both_families_for_hopper() -> None:
    seen = {job.source.kernel.__name__ for job in inspect.record_jobs([90])}
    assert seen.issuperset(PLAIN + GENERAL)
