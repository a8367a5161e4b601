"""The Gluon engine without a GPU: what it takes, what it launches, and what the assembler makes of it.

`tests/kernels/gpu/test_gluon.py` runs it.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from salad_compile.kernels import capability
from salad_compile.kernels.aot import disassemble, specialise
from salad_compile.kernels.block_sparse import gluon
from salad_compile.kernels.engines import Call, choose, find, use_engine
from salad_compile.kernels.errors import UnsupportedKernelError
from salad_compile.kernels.launch import Launch, interpreting, record_launches
from salad_compile.kernels.layout import block_count
from salad_compile.kernels.sass import product_loops
from salad_compile.kernels.selection import Selection

META, CUDA = torch.device("meta"), torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton cannot interpret Gluon")


def call(**changes: Any) -> Call:
    facts = {"operator": "block_sparse_attention", "device": CUDA, "dtype": torch.bfloat16, "head_dim": 128}
    sizes = {"value_dim": 128, "query_block": 128, "key_block": 64}
    return Call(**(facts | sizes | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"head_dim": 64, "value_dim": 64, "query_block": 64}, None),
        ({"masked": True}, None),
        ({"device": torch.device("cpu")}, "on cpu, and it needs a GPU"),
        ({"dtype": torch.float16}, "bfloat16.*not torch.float16"),
        ({"dtype": torch.float32}, "bfloat16.*not torch.float32"),
        ({"head_dim": 80, "value_dim": 80}, "head_dims 64 and 128.*not 80 and 80"),
        ({"value_dim": 64}, "alike for values.*not 128 and 64"),
        ({"query_block": 256}, "query blocks of 64 and 128.*not 256 and 64"),
        ({"key_block": 128}, "key blocks of 64.*not 128 and 128"),
        ({"head_dim": 64, "value_dim": 64, "masked": True}, "the Triton kernel is faster"),
    ],
)
def test_what_it_does_not_take_stays_on_triton(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (9, 0))
    said = find("gluon").supports(call(**changes))
    if reason is None:
        assert said is None
        assert choose(call(**changes)).name == "gluon"
        return
    assert said is not None
    assert re.search(reason, said)
    assert choose(call(**changes)).name == ("torch" if "device" in changes else "triton")
    with use_engine("gluon"), pytest.raises(UnsupportedKernelError, match=f"'gluon' was asked for.*{reason}"):
        choose(call(**changes))


def test_the_backward_takes_masks_at_head_dim_64_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (9, 0))
    narrow = {"operator": "block_sparse_attention_backward", "head_dim": 64, "value_dim": 64, "masked": True}
    assert choose(call(**narrow)).name == "gluon"
    assert choose(call(**narrow | {"query_block": 256})).name == "triton"


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_keep_the_triton_kernel(arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: arch)
    assert choose(call()).name == "triton"
    assert find("gluon").supports(call()) == f"it is for compute capability 9.0, and cuda:0 has {arch[0]}.{arch[1]}"


def backward_launches(
    tokens: int = 1001, *, head_dim: int = 128, query_block: int = 128, **options: Any
) -> list[Launch]:
    """What the backward of one call launches."""
    batch, heads = options.get("batch", 2), options.get("heads", 3)
    x = torch.empty((batch, tokens, heads, head_dim), dtype=torch.bfloat16, device=META).transpose(1, 2)
    lut = torch.empty((batch, heads, block_count(tokens, query_block), 5), dtype=torch.int32, device=META)
    mask = torch.empty((batch, tokens), dtype=torch.bool, device=META) if options.get("masked") else None
    selection = Selection(lut, lut[..., 0], query_block, 64, options.get("scale", 0.125), mask)
    lse = torch.empty((batch, heads, tokens), device=META)
    with record_launches() as recorded:
        grads = gluon.block_sparse_attention_backward(x, x, x, x, x, lse, selection)
    assert [grad.shape for grad in grads] == [x.shape] * 3
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)
    return [launch for launch in recorded if "gluon" in launch.kernel.__name__]


def launches(tokens: int = 1001, *, head_dim: int = 128, query_block: int = 128, **options: Any) -> list[Launch]:
    """What one call launches."""
    batch, heads, kept = options.get("batch", 2), options.get("heads", 3), options.get("kept", 5)
    memory = torch.empty((batch, tokens, heads, head_dim + options.get("extra", 0)), dtype=torch.bfloat16, device=META)
    x = memory[..., :head_dim].transpose(1, 2)
    lut = torch.empty((batch, heads, block_count(tokens, query_block), kept), dtype=torch.int32, device=META)
    mask = torch.empty((batch, tokens), dtype=torch.bool, device=META) if options.get("masked") else None
    selection = Selection(lut, lut[..., 0], query_block, 64, options.get("scale", 0.125), mask)
    with record_launches() as recorded:
        out, lse = gluon.block_sparse_attention(x, x, x, selection)
    assert out.shape == x.shape
    assert out.transpose(1, 2).is_contiguous()
    assert (lse.shape, lse.dtype) == (x.shape[:3], torch.float32)
    return recorded


def names(recorded: list[Launch]) -> list[str]:
    return [launch.kernel.__name__ for launch in recorded]


def test_a_second_launch_repairs_and_a_mask_needs_none() -> None:
    plain, masked = launches(), launches(masked=True)
    assert names(plain) == ["check_selection_kernel", "gluon_forward_kernel", "gluon_forward_kernel"]
    first, second = (launch.constants["SETTINGS"] for launch in plain[1:])
    assert (first.fixed, first.repair) == (True, False)
    assert (second.fixed, second.repair) == (False, True)
    assert names(masked) == ["check_selection_kernel", "pack_mask_kernel", "gluon_forward_kernel"]
    only = masked[2].constants["SETTINGS"]
    assert (only.fixed, only.repair, only.masked) == (False, False, True)


def test_nothing_is_launched_for_no_token() -> None:
    assert names(launches(0)) == ["check_selection_kernel"]


def test_no_length_and_no_scale_is_part_of_a_build() -> None:
    builds = {
        specialise(launches(**sizes)[1], 90).identity
        for sizes in (
            {},
            {"tokens": 1},
            {"tokens": 4096, "batch": 1, "heads": 1, "kept": 16},
            {"tokens": 75_520, "heads": 40, "kept": 1, "scale": 16.0},
            {"scale": -1.0},
            {"scale": 0.0},
        )
    }
    assert len(builds) == 1


def test_no_length_and_no_scale_is_part_of_a_build_of_the_backward() -> None:
    calls: tuple[dict[str, Any], ...] = (
        {},
        {"tokens": 1},
        {"tokens": 4096, "batch": 1, "heads": 1},
        {"tokens": 75_520, "heads": 40, "scale": -16.0},
    )
    builds = [{specialise(launch, 90).identity for launch in backward_launches(**sizes)} for sizes in calls]
    assert len(builds[0]) == 2
    assert all(build == builds[0] for build in builds)


def test_rows_at_odd_addresses_are_copied() -> None:
    aligned, odd = (launches(extra=extra)[1].arguments[0] for extra in (8, 1))
    assert aligned.strides[2] == 3 * 136
    assert odd.strides == [3 * 1001 * 128, 1001 * 128, 128, 1]


# --- machine code -----------------------------------------------------------------------------------------------------


# the largest tiles, which have least room; spills and serialised products of all of them are the gate's
TILES = pytest.mark.parametrize(
    ("head_dim", "query_block"),
    [(128, 128), *(pytest.param(*tile, marks=pytest.mark.all_cases) for tile in ((128, 64), (64, 128)))],
)


@TILES
def test_the_assembler_keeps_the_order_of_a_step(head_dim: int, query_block: int) -> None:
    """Exponentials between the two waits for products, the wait for the next step behind most of them, no spills."""
    code = disassemble(specialise(launches(head_dim=head_dim, query_block=query_block)[1], 90))
    loops = product_loops(code)
    assert len(loops) == 2, "one loop for each group"
    for body in loops:
        assert not [line for line in body if re.search(r"\b(LDL|STL)\b", line)], "registers spill in the loop"
        scores, products = (i for i, line in enumerate(body) if "WARPGROUP.DEPBAR" in line)
        exponentials = [i for i, line in enumerate(body) if "MUFU.EX2" in line]
        assert len(exponentials) == 64 * find_step(head_dim, query_block) // 128
        assert all(scores < i < products for i in exponentials)
        waits = [i for i, line in enumerate(body) if "PHASECHK" in line]
        assert len(waits) == 2, "one wait that is over, one for the next step"
        assert sum(i < waits[1] for i in exponentials) > 0.9 * len(exponentials)
        assert sum("BAR.SYNC" in line for line in body) <= 3


@TILES
def test_the_assembler_keeps_the_products_of_the_backward_in_flight(head_dim: int, query_block: int) -> None:
    """No spills in the loops over steps, and exponentials and gradients of scores beside products that run."""
    query, key = backward_launches(head_dim=head_dim, query_block=query_block)
    ahead = query.constants["SETTINGS"].ahead
    query_waits = ["0x2", "0x1", "0x0"] if ahead else ["0x1", "0x0", "0x0"]
    for launch, expected in ((query, query_waits), (key, ["0x1", "0x1", "0x1"])):
        loops = product_loops(disassemble(specialise(launch, 90)))
        assert len(loops) == 2, "one loop for each group"
        for body in loops:
            assert not [line for line in body if re.search(r"\b(LDL|STL)\b", line)], "registers spill in the loop"
            found = [i for i, line in enumerate(body) if "WARPGROUP.DEPBAR" in line]
            assert [body[i].split()[-1] for i in found] == expected
            exponentials = [i for i, line in enumerate(body) if "MUFU.EX2" in line]
            assert len(exponentials) == 32
            # the first wait is for the scores alone
            assert all(i > found[0] for i in exponentials)


def find_step(head_dim: int, query_block: int) -> int:
    """Keys in a step."""
    settings = launches(head_dim=head_dim, query_block=query_block)[1].constants["SETTINGS"]
    return int(settings.step)
