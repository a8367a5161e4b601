"""The Triton kernels of routing against the definition in fp64: means of blocks, and the selection."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, pool_blocks, select_blocks
from salad_compile.kernels.block_choice import BlockChoice
from salad_compile.kernels.launch import record_launches
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.routing import reference
from salad_compile.kernels.routing import triton as host
from tests.kernels.helpers import FORWARD_BAR, make_qkv, relative_l2
from tests.kernels.routing.selection import check_selection, make_mask, pooled

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# --- pooling ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """One draw of everything that `pool_blocks` takes."""

    tokens: int
    dtype: torch.dtype
    block: int = 64
    head_dim: int = 64
    layout: str = "bshd"
    batch: int = 2
    heads: int = 3
    masked: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        flags = "mask" if self.masked else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens}-{dtype}-{self.block}-d{self.head_dim}-{self.layout}-x{self.scale:g}-{flags}"


POOLS = [
    Pool(1, BF16),
    Pool(63, FP32, layout="bhsd"),
    Pool(64, FP16, 128, layout="fused"),
    Pool(65, BF16, masked=True, batch=1),
    Pool(113, FP32, 32, 24),
    Pool(203, BF16, 128, 128, "fused", masked=True),
    Pool(203, FP32, 64, 80, masked=True, batch=3, heads=2),
    Pool(203, FP16, 64, 1, scale=16.0),
    Pool(300, BF16, 256, 96, "bhsd", scale=4.0),
    Pool(300, BF16, 16, 16, masked=True, heads=1),
    Pool(1023, BF16, 128, 128, "fused", masked=True, batch=1, heads=2),
]


@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool(case: Pool, device: str) -> None:
    sizes = {"batch": case.batch, "heads": case.heads, "head_dim": case.head_dim}
    x, _, _ = make_qkv(case.tokens, case.layout, case.dtype, scale=case.scale, **sizes)
    mask = make_mask(case.tokens, case.block, case.batch) if case.masked else None
    expected = reference.pool_blocks(x.double(), case.block, mask)
    if mask is not None:
        x = x.masked_fill(~mask[:, None, :, None], float("nan"))  # what is masked must not be seen
    arguments = [None if t is None else t.to(device) for t in (x, mask)]
    means = pool_blocks(arguments[0], case.block, arguments[1])
    assert means.dtype == torch.float32
    assert means.is_contiguous()
    assert relative_l2(means.cpu(), expected) <= FORWARD_BAR[FP32]
    assert torch.equal(means.cpu() == 0, expected == 0)
    assert torch.equal(means, pool_blocks(arguments[0], case.block, arguments[1]))


def test_pool_does_not_overflow_in_16_bits(device: str) -> None:
    x = make_qkv(128, dtype=FP16)[0].abs() * 1000 + 30_000
    means = pool_blocks(x.to(device), 64).cpu()
    torch.testing.assert_close(means.double(), reference.pool_blocks(x.double(), 64), rtol=1e-5, atol=0)


def test_pool_of_expanded_and_of_transposed_memory(device: str) -> None:
    x = make_qkv(70, dtype=FP32, heads=1)[0]
    shared = x.to(device).expand(2, 3, 70, 16)
    expected = reference.pool_blocks(x.double().expand(2, 3, 70, 16), 32)
    assert relative_l2(pool_blocks(shared, 32).cpu(), expected) <= FORWARD_BAR[FP32]
    columns = x.to(device).transpose(2, 3).contiguous().transpose(2, 3)  # channels lie far apart
    expected = reference.pool_blocks(x.double(), 32)
    assert relative_l2(pool_blocks(columns, 32).cpu(), expected) <= FORWARD_BAR[FP32]
    mask = make_mask(70, 32, batch=1)
    masked = pool_blocks(columns, 32, mask.to(device).expand(2, 70))
    expected = reference.pool_blocks(x.double(), 32, mask.expand(2, 70))
    assert relative_l2(masked.cpu(), expected) <= FORWARD_BAR[FP32]


# --- selection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """One draw of everything that `select_blocks` takes."""

    tokens: int
    blocks: tuple[int, int]
    density: int
    sinks: tuple[int, int] = (0, 0)
    masked: bool = False
    batch: int = 1
    heads: int = 1

    def __str__(self) -> str:
        flags = "mask" if self.masked else ""
        sinks = "-".join(map(str, self.sinks))
        return f"{self.tokens}-{'x'.join(map(str, self.blocks))}-{self.density}-sinks{sinks}-{flags}"

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """pooled_query, pooled_key, key_mask, on the CPU."""
        query, key = pooled(self.tokens, *self.blocks, batch=self.batch, heads=self.heads, dtype=FP32)
        mask = make_mask(self.tokens, self.blocks[1], self.batch) if self.masked else None
        return query, key, mask


SELECTIONS = [
    Selection(1, (128, 64), 100),
    Selection(63, (64, 64), 0),
    Selection(65, (128, 64), 1000, heads=2),
    Selection(113, (8, 8), 0),
    Selection(203, (32, 8), 300, batch=2),
    Selection(203, (8, 16), 300),
    Selection(203, (16, 16), 999),
    Selection(1023, (128, 64), 400),
    Selection(1023, (256, 16), 100, masked=True, heads=2),
    Selection(203, (32, 8), 300, (163, 203)),
    Selection(113, (16, 16), 200, (0, 33)),
    Selection(113, (8, 16), 200, (50, 51)),
    Selection(113, (32, 16), 200, (37, 37)),
    Selection(113, (32, 16), 200, (0, 113)),
    Selection(113, (16, 8), 300, masked=True, batch=3),
    Selection(203, (32, 8), 300, (163, 203), masked=True, batch=2, heads=2),
    Selection(113, (16, 16), 700, (20, 40), masked=True, batch=3),
    Selection(113, (8, 16), 1000, (83, 113), masked=True),
]


def run(
    case: Selection,
    device: str,
    inputs: tuple[torch.Tensor | None, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, mask = (None if t is None else t.to(device) for t in inputs or case.inputs())
    assert query is not None
    assert key is not None
    return select_blocks(query, key, *case.blocks, case.density, *case.sinks, mask)


@pytest.mark.parametrize("case", SELECTIONS, ids=str)
def test_selection(case: Selection, device: str) -> None:
    query, key, mask = case.inputs()
    check_selection(query, key, case.blocks, case.density, run(case, device), case.sinks, mask)


@pytest.mark.parametrize("case", [SELECTIONS[9], SELECTIONS[14]], ids=str)
def test_rows_longer_than_the_registers(case: Selection, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(case, device)
    monkeypatch.setattr(host, "SELECT_TILE", 8)
    monkeypatch.setattr(host, "SELECT_TILES", 2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(case, device), whole, strict=True))


def test_a_row_of_thousands(device: str) -> None:
    case = Selection(4800, (800, 2), 400, (4700, 4800), heads=1)  # beyond the registers as they are
    query, key, _ = case.inputs()
    check_selection(query, key, case.blocks, case.density, run(case, device), case.sinks)


def test_heads_one_after_another(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Selection(49, (16, 8), 300, (41, 49), masked=True, batch=2, heads=3)
    whole = run(case, device)
    monkeypatch.setattr(host, "SCORES_AT_ONCE", 2 * 4 * 16)  # two heads: the second sequence begins within a group
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(case, device), whole, strict=True))


def test_ties_go_to_the_first_blocks(device: str) -> None:
    """Scores are a few whole numbers of either sign: the stable reference keeps the same ids."""
    case = Selection(8 * 40, (32, 8), 350, heads=2)
    generator = torch.Generator().manual_seed(3)
    query = torch.randint(-1, 2, (1, 2, 10, 2), generator=generator).float()
    key = torch.randint(-1, 2, (1, 2, 40, 2), generator=generator).float()
    expected = reference.select_blocks(query, key, BlockChoice(*case.blocks, case.density))
    selection = run(case, device, (query, key, None))
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(selection, expected, strict=True))


def test_equal_scores(device: str) -> None:
    zeros = [0.0, -0.0] * 6
    for scores in (zeros, zeros[::-1], [-1.0] * 12, [float("nan")] * 12, [float("-inf")] * 12):
        key = torch.tensor(scores, device=device).reshape(1, 1, 12, 1)
        lut, count = select_blocks(torch.ones(1, 1, 3, 1, device=device), key, 32, 8, 500)
        assert lut[0, 0].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 6, 7], [0, 1, 8, 9, 10, 11]]
        assert (count == 6).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e38])
def test_bad_scores_outrank_neither_forced_blocks_nor_masks(poison: float, device: str) -> None:
    query, key = (x.abs() + 0.1 for x in pooled(8 * 12, 8, 8, batch=1, heads=1, dtype=FP32))
    key[:, :, 3] = poison
    key[:, :, 7] = float("inf")
    mask = torch.ones(1, 8 * 12, dtype=torch.bool)
    mask[:, 8 * 7 : 8 * 8] = False
    arguments = (8, 8, 300, 8 * 11, 8 * 12)
    lut, count = (x.cpu() for x in select_blocks(query.to(device), key.to(device), *arguments, mask.to(device)))
    assert (count[:, :, :11] == 4).all()
    assert (count[:, :, 11] == ALL_BLOCKS).all()
    assert (lut[:, :, :11] != 7).all()
    assert (lut[:, :, :11, 3] == 11).all()
    assert all(i in lut[0, 0, i] for i in range(11) if i != 7)
    # 1e38 and inf are the best scores, NaN and -inf the worst
    assert ((lut[0, 0, 4:11] == 3).any(-1) == (poison > 0)).all()


def test_every_kind_of_number_has_its_rank(device: str) -> None:
    inf, nan = float("inf"), float("nan")
    # the first block is forced; of the others, the best come first here
    ranked = {5: inf, 9: 3e38, 1: 2.0, 7: 1e-30, 3: 0.0, 8: -1e-30, 2: -1e-3, 4: -3e38, 6: -inf, 11: -nan, 10: nan}
    key = torch.tensor([nan] + [ranked[place] for place in range(1, 12)]).reshape(1, 1, 12, 1).to(device)
    query = torch.ones(1, 1, 1, 1, device=device)
    for kept in range(1, 11):
        lut, _ = host.select_blocks(query, key, BlockChoice(8, 8, -(-1000 * kept // 12)))
        assert lut.flatten().tolist() == sorted([0, *list(ranked)[: kept - 1]])


def test_nothing_valid_selects_nothing(device: str) -> None:
    query, key = (x.to(device) for x in pooled(40, 8, 8, batch=1, dtype=FP32))
    lut, count = select_blocks(query, key, 8, 8, 400, 0, 0, torch.zeros(1, 40, dtype=torch.bool, device=device))
    assert (count == 0).all()
    assert (lut == 0).all()


def test_results_carry_no_gradient(device: str) -> None:
    x = make_qkv(65, dtype=FP32)[0].to(device).requires_grad_()
    assert not pool_blocks(x, 64).requires_grad
    query, key = (t.to(device).requires_grad_() for t in pooled(65, 64, 32, batch=1, heads=1, dtype=FP32))
    assert not any(t.requires_grad for t in select_blocks(query, key, 64, 32, 400))


def test_deterministic(device: str) -> None:
    case = SELECTIONS[15]
    first = run(case, device)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(case, device), first, strict=True))


def test_fp64_is_for_the_other_engine(device: str) -> None:
    query, key = (x.to(device) for x in pooled(40, 8, 8))
    with pytest.raises(UnsupportedKernelError, match="use_engine"):
        select_blocks(query, key, 8, 8, 400)
    with pytest.raises(UnsupportedKernelError, match="use_engine"):
        pool_blocks(query, 16)


# --- compilation ------------------------------------------------------------------------------------------------------


def test_a_new_length_compiles_no_new_kernel() -> None:
    def launches(tokens: int, density: int, sinks: tuple[int, int]) -> list[tuple[object, ...]]:
        x = torch.empty(1, tokens, 2, 64, dtype=BF16, device="meta").transpose(1, 2)
        mask = torch.empty(1, tokens, dtype=torch.bool, device="meta")
        with record_launches() as recorded:
            query, key = host.pool_blocks(x, 128, mask), host.pool_blocks(x, 64, mask)
            host.select_blocks(query, key, BlockChoice(128, 64, density, *sinks, mask))
        return [(launch.kernel, launch.constants, launch.options) for launch in recorded]

    assert len(launches(203, 100, (0, 0))) == 4
    assert launches(203, 100, (0, 0)) == launches(32_760, 300, (32_000, 32_760))


@pytest.mark.parametrize(("tokens", "masked"), [(70, False), (70, True), (600, True)])
def test_a_density_that_is_a_tensor(tokens: int, masked: bool, device: str) -> None:
    query, key = pooled(tokens, 64, 32, dtype=FP32, batch=1, heads=2)
    mask = make_mask(tokens, 32, 1) if masked else None
    on_device = [None if t is None else t.to(device) for t in (query, key, mask)]
    for sinks in ((0, 0), (tokens - 30, tokens)):
        for permille in (0, 100, 400):
            now = torch.tensor(permille, dtype=torch.int32)
            settings = (64, 32, 400, *sinks)
            lut, count = select_blocks(*on_device[:2], *settings, on_device[2], now.to(device))
            expected, expected_count = reference.select_blocks(
                query.double(), key.double(), BlockChoice(*settings, mask, now)
            )
            assert lut.shape == expected.shape
            assert torch.equal(count.cpu(), expected_count)
            narrow = select_blocks(*on_device[:2], 64, 32, permille, *sinks, on_device[2])[0].cpu()
            valid = torch.arange(narrow.shape[-1]) < count.cpu()[..., None]
            assert torch.equal(lut.cpu()[..., : narrow.shape[-1]].masked_fill(~valid, 0), narrow.masked_fill(~valid, 0))
