"""The Triton kernels of selection by mass against the definition in fp64: the scores, and what is selected of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, select_by_mass, use_engine
from salad_compile.kernels.block_choice import BlockChoice
from salad_compile.kernels.capability import target_arch
from salad_compile.kernels.launch import interpreting, record_launches
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.mass import reference
from salad_compile.kernels.mass import triton as host
from salad_compile.kernels.routing import triton as routing_host
from salad_compile.kernels.routing.reference import pool_blocks
from salad_compile.kernels.routing.torch import keep_best
from tests.kernels.helpers import FORWARD_BAR, make_qkv, relative_l2
from tests.kernels.routing.selection import make_mask

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One draw of everything that `select_by_mass` takes."""

    tokens: int
    dtype: torch.dtype
    blocks: tuple[int, int] = (128, 64)
    cell: int = 16
    head_dim: int = 64
    by_error: bool = True
    layout: str = "bshd"
    batch: int = 2
    heads: int = 2
    masked: bool = False
    sinks: tuple[int, int] = (0, 0)
    density: int = 300
    size: float = 1.0

    def __str__(self) -> str:
        flags = "-".join(word for word, on in (("error", self.by_error), ("mask", self.masked)) if on)
        blocks, dtype = "x".join(map(str, self.blocks)), str(self.dtype).removeprefix("torch.")
        return f"{self.tokens}-{dtype}-{blocks}-c{self.cell}-d{self.head_dim}-{self.layout}-x{self.size:g}-{flags}"

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.head_dim**-0.5

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """query, key, value, on the CPU, of which blocks differ in size and values in spread."""
        sizes = {"batch": self.batch, "heads": self.heads, "head_dim": self.head_dim}
        query, key, value = make_qkv(self.tokens, self.layout, torch.float64, **sizes)
        runs = torch.arange(self.tokens)[:, None] // self.cell
        key = key + torch.sin(runs * (1 + torch.arange(self.head_dim)))  # cells whose means say something
        query = query + torch.cos(runs * (1 + torch.arange(self.head_dim)))
        value = value * (1 + runs % 5)
        return tuple(x.to(self.dtype) for x in (query * self.size, key * self.size, value))

    def mask(self) -> torch.Tensor | None:
        """The key mask, on the CPU."""
        return make_mask(self.tokens, self.blocks[1], self.batch) if self.masked else None


CASES = [
    Case(203, BF16),
    Case(333, BF16, by_error=False, size=2.0),
    Case(300, FP16, (64, 64), 8, 40, masked=True, size=3.0),
    Case(203, FP32, (32, 16), 16, 24, masked=True, layout="fused"),
    Case(130, FP32, (16, 32), 8, by_error=False, head_dim=16, layout="bhsd", sinks=(100, 130)),
    Case(90, BF16, (16, 16), 16, masked=True, sinks=(80, 90), batch=1),
    pytest.param(Case(150, BF16, (256, 16), 8, 128, heads=1, batch=1), marks=pytest.mark.all_cases),
    Case(31, FP16, (64, 32), 32, by_error=False, masked=True),
    *(
        pytest.param(Case(tokens, dtype, blocks, cell, 128, by_error, "fused", masked=tokens % 2 == 1, size=size))
        for tokens, blocks in ((4097, (128, 64)), (3001, (64, 64)), (1030, (16, 16)))
        for cell in (8, 16)
        for dtype, by_error, size in ((BF16, True, 1.0), (FP16, False, 3.0), (FP32, True, 1.0))
        if not interpreting()
    ),
]


def run(case: Case, device: str, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = (x.to(device) for x in case.inputs())
    mask = case.mask()
    given = {
        "sink_begin": case.sinks[0],
        "sink_end": case.sinks[1],
        "key_mask": None if mask is None else mask.to(device),
    }
    settings = (case.cell, case.scale, *case.blocks, case.density)
    return select_by_mass(query, key, value if case.by_error else None, *settings, **(given | changes))  # type: ignore[arg-type]


def scores_and_selection(
    case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(B, H, Mq, Mk) of the kernels, and what is selected."""
    seen: list[torch.Tensor] = []

    def keep_best(
        fill: Callable[[slice, torch.Tensor], None],
        like: torch.Tensor,
        shape: tuple[int, int, int, int],
        choice: BlockChoice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def look(heads: slice, scores: torch.Tensor) -> None:
            fill(heads, scores)
            seen.append(scores[:, :, : shape[3]].cpu())

        return routing_host.keep_best(look, like, shape, choice)

    monkeypatch.setattr(host, "keep_best", keep_best)
    selection = run(case, device)
    scores = torch.cat(seen)
    return scores.unflatten(0, (case.batch, case.heads)), selection


def of_rounding(case: Case, query: torch.Tensor, key: torch.Tensor) -> float:
    """The most that rounding can change of a score, as a share of it.

    A mean of 16-bit inputs is rounded to 11 bits, each entry by up to 2 ** -12 of itself. So the exponent of a pair of
    cells is off by up to 2 ** -11 of scale * sum |q| |k|, and the logarithm of the denominator by as much. Variances
    are rounded likewise, and add 2 ** -11. fp32 has 2 ** -20 for all sums.
    """
    of_product = 2**-20 if case.dtype == FP32 else 2**-11
    query, key = (pool_blocks(x, case.cell, case.mask()).abs() for x in (query, key))
    return math.expm1(2 * of_product * case.scale * float((query @ key.mT).max())) + of_product


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (x.double() for x in case.inputs())
    mask = case.mask()
    choice = BlockChoice(*case.blocks, case.density, *case.sinks, mask)
    expected = reference.scores_of(query, key, value if case.by_error else None, case.cell, case.scale, choice)
    scores, (lut, count) = scores_and_selection(case, device, monkeypatch)
    share = of_rounding(case, query, key)
    assert ((scores - expected).abs() <= share * expected + 1e-30).all()
    # The errors of single entries cancel: a score is off by far less than it could be.
    assert relative_l2(scores, expected) <= (FORWARD_BAR[FP32] if case.dtype == FP32 else FORWARD_BAR[FP16])

    wanted, wanted_count = keep_best(expected.clone(), choice)
    assert torch.equal(count.cpu(), wanted_count)
    # What is chosen is what the definition chooses, but where scores differ by less than rounding.
    blocks = expected.shape[3]
    ours, theirs = (chosen_of(ids.cpu(), wanted_count, blocks) for ids in (lut, wanted))
    taken, left = (expected.masked_fill(~x, fill) for x, fill in ((ours & ~theirs, math.inf), (theirs & ~ours, 0.0)))
    assert (taken.amin(-1) >= left.amax(-1) * (1 - share) ** 2 - 1e-30).all()


def chosen_of(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> torch.Tensor:
    """bool (B, H, Mq, Mk), True where a block is listed; all of them in a row of text."""
    valid = torch.arange(lut.shape[-1]) < count[..., None]
    chosen = torch.zeros(*lut.shape[:3], key_blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(valid, lut, key_blocks).long(), True)
    return chosen[..., :-1] | (count == ALL_BLOCKS)[..., None]


def test_the_whole_selection_is_exact_where_scores_are_far_apart(device: str) -> None:
    """Every head prefers blocks in an order of its own, each by more than rounding: the same lists, id for id."""
    tokens, blocks, heads = 16 * 10, 10, 2
    order = torch.stack([torch.randperm(blocks, generator=torch.Generator().manual_seed(i)) for i in range(heads)])
    key = torch.zeros(1, heads, tokens, 16)
    key[..., 0] = (order * 0.5).repeat_interleave(16, dim=1)
    query = torch.ones(1, heads, tokens, 16)
    for permille in (300, 600):
        given = (16, 1.0, 16, 16, permille)
        lut, count = select_by_mass(query.to(device), key.to(device), None, *given)
        with use_engine("torch"):
            expected = select_by_mass(query, key, None, *given)
        assert torch.equal(lut.cpu(), expected[0])
        assert torch.equal(count.cpu(), expected[1])


def test_heads_one_after_another(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(40, FP32, (16, 16), 8, head_dim=16, masked=True, heads=3, sinks=(35, 40))
    whole = run(case, device)
    monkeypatch.setattr(routing_host, "SCORES_AT_ONCE", 2 * 3 * 16)  # two heads: a sequence begins within a group
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(case, device), whole, strict=True))


@pytest.mark.skipif(not interpreting(), reason="a GPU has the settings of its own generation")
def test_settings_of_other_gpus(device: str) -> None:
    case = Case(130, BF16, head_dim=16, batch=1, heads=1)
    ours = run(case, device)
    with target_arch((8, 0)):
        others = run(case, device)
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("by_error", [False, True])
def test_values_of_another_width_a_density_that_is_a_tensor_and_transposed_memory(by_error: bool, device: str) -> None:
    case = Case(100, FP32, (32, 16), 8, head_dim=24, heads=1)
    query, key, value = case.inputs()
    value = torch.cat([value, 3 * value[..., :9]], dim=-1)
    key = key.transpose(2, 3).contiguous().transpose(2, 3)  # channels lie far apart
    permille = torch.tensor(250, dtype=torch.int32)
    given = (8, case.scale, 32, 16, 400, 0, 0, None)
    tensors = query, key, value if by_error else None
    on_device = (None if x is None else x.to(device) for x in tensors)
    lut, count = select_by_mass(*on_device, *given, permille.to(device))  # type: ignore[arg-type]
    with use_engine("torch"):
        expected = select_by_mass(*tensors, *given, permille)  # type: ignore[arg-type]
    assert torch.equal(count.cpu(), expected[1])
    valid = torch.arange(lut.shape[-1]) < count.cpu()[..., None]
    assert torch.equal(lut.cpu().masked_fill(~valid, 0), expected[0].masked_fill(~valid, 0))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_numbers_leave_the_forced_blocks(poison: float, device: str) -> None:
    case = Case(80, BF16, (16, 16), 8, head_dim=16, heads=1, batch=2)
    query, key, value = case.inputs()
    clean, _ = select_by_mass(*(x.to(device) for x in (query, key, value)), 8, case.scale, 16, 16, 400)
    key[0, :, 20] = poison
    lut, count = select_by_mass(*(x.to(device) for x in (query, key, value)), 8, case.scale, 16, 16, 400)
    assert all(block in lut[0, 0, block] for block in range(5))
    assert (count == 2).all()
    assert torch.equal(lut[1], clean[1])


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_numbers_beyond_the_range_of_16_bits(size: float, device: str) -> None:
    """bf16 holds them, and the rows of products are fp16: with a scale that brings scores back nothing changes."""
    case = Case(64, BF16, (16, 16), 8, head_dim=16, by_error=False, batch=1)
    query, key, _ = (x.to(device) for x in case.inputs())
    exact = 2.0 ** round(math.log2(size))
    expected = select_by_mass(query, key, None, 8, case.scale, 16, 16, 400)
    found = select_by_mass(query * exact, key, None, 8, case.scale / exact, 16, 16, 400)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_deterministic_and_without_a_gradient(device: str) -> None:
    case = Case(150, BF16, batch=1)
    query, key, value = (x.to(device).requires_grad_() for x in case.inputs())
    given = (case.cell, case.scale, *case.blocks, case.density)
    first, second = (select_by_mass(query, key, value, *given) for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert not any(x.requires_grad for x in first)


def test_what_there_is_no_kernel_for(device: str) -> None:
    case = Case(64, FP32, (16, 16), head_dim=16)
    query, key, value = (x.to(device) for x in case.inputs())
    with pytest.raises(UnsupportedKernelError, match=r"cells of 4 tokens; there are 8, 16, 32.*use_engine"):
        select_by_mass(query, key, value, 4, 1.0, 16, 16, 400)
    with pytest.raises(UnsupportedKernelError, match=r"float64.*use_engine"):
        select_by_mass(query.double(), key.double(), None, 8, 1.0, 16, 16, 400)


def test_a_new_length_compiles_no_new_kernel() -> None:
    def launches(tokens: int, density: int, sinks: tuple[int, int]) -> list[tuple[object, ...]]:
        x = torch.empty(1, tokens, 2, 64, dtype=BF16, device="meta").transpose(1, 2)
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta")
        with record_launches() as recorded:
            host.select_by_mass(x, x, x, 16, 0.1, BlockChoice(128, 64, density, *sinks, mask))
        return [(launch.kernel, launch.constants, launch.options) for launch in recorded]

    # value, query, key, denominators, valid blocks, masses, selection
    assert len(launches(203, 100, (0, 0))) == 7
    assert launches(203, 100, (0, 0)) == launches(32_760, 300, (32_000, 32_760))
