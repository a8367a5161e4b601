"""salad::select_blocks against its definition, and its invariants (specification 4.2 and 12)."""

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, kept_blocks, select_blocks
from tests.kernels.helpers import BLOCKS, LENGTHS
from tests.kernels.routing.selection import check_selection, pooled

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("density", [0, 300, 1000])
def test_equals_reference(tokens: int, blocks: tuple[int, int], density: int) -> None:
    query, key = pooled(tokens, *blocks)
    selection = select_blocks(query, key, *blocks, density)
    check_selection(query, key, blocks, density, selection)
    assert (selection[1] == kept_blocks(key.shape[2], *blocks, density)).all()


@pytest.mark.parametrize("blocks", [*BLOCKS, (32, 128), (256, 64)])
@pytest.mark.parametrize("tokens", [1, 65, 203, 1023])
def test_ascending_unique_and_forced(tokens: int, blocks: tuple[int, int]) -> None:
    query, key = pooled(tokens, *blocks)
    lut, _ = select_blocks(query, key, *blocks, 200)
    assert (lut.diff(dim=-1) > 0).all()
    assert 0 <= lut.min() <= lut.max() < key.shape[2]
    chosen = torch.zeros(*lut.shape[:3], key.shape[2], dtype=torch.bool).scatter_(-1, lut.long(), True)
    for i in range(query.shape[2]):
        first, last = i * blocks[0] // blocks[1], min((i + 1) * blocks[0], tokens) - 1
        assert chosen[:, :, i, first : last // blocks[1] + 1].all()


def test_full_density_selects_everything() -> None:
    query, key = pooled(1023, 128, 64)
    lut, _ = select_blocks(query, key, 128, 64, 1000)
    assert torch.equal(lut, torch.arange(16, dtype=torch.int32).expand_as(lut))


def test_keeps_the_best_scores() -> None:
    query, key = pooled(64 * 20, 64, 64)
    lut, _ = select_blocks(query, key, 64, 64, 300)
    scores = query @ key.transpose(-1, -2)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lut.long(), True)
    own = torch.eye(20, dtype=torch.bool)
    worst_kept = scores.masked_fill(~chosen | own, float("inf")).amin(-1)
    best_left = scores.masked_fill(chosen, float("-inf")).amax(-1)
    assert (worst_kept >= best_left).all()


def test_invariant_under_a_shift_of_all_keys() -> None:
    query, key = pooled(1023, 64, 64)
    lut, _ = select_blocks(query, key, 64, 64, 300)
    shifted, _ = select_blocks(query, key - key.mean(dim=2, keepdim=True), 64, 64, 300)
    assert torch.equal(lut, shifted)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_forced_blocks_survive_bad_scores(poison: float) -> None:
    query, key = pooled(64 * 12, 64, 64)
    query, key = query.float(), key.float()
    key[:, :, 3] = poison
    lut, _ = select_blocks(query, key, 64, 64, 0)
    assert torch.equal(lut[..., 0], torch.arange(12, dtype=torch.int32).expand(2, 3, 12))


def test_deterministic_on_ties() -> None:
    query, key = torch.ones(1, 2, 40, 8), torch.ones(1, 2, 40, 8)
    first, _ = select_blocks(query, key, 64, 64, 250)
    assert all(torch.equal(first, select_blocks(query, key, 64, 64, 250)[0]) for _ in range(5))


def test_results_carry_no_gradient() -> None:
    query, key = (x.requires_grad_() for x in pooled(203, 64, 64))
    assert not any(x.requires_grad for x in select_blocks(query, key, 64, 64, 500))


@pytest.mark.parametrize(
    ("query", "key", "settings", "message"),
    [
        (torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), (96, 64, 100), "divide"),
        (torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), (64, 64, 1200), "density"),
        (torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 9), (64, 64, 100), "differ only in blocks"),
        (torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8).double(), (64, 64, 100), "dtype"),
        (torch.randn(1, 1, 4, 8).half(), torch.randn(1, 1, 4, 8).half(), (64, 64, 100), "float32 or float64"),
        (torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), (128, 64, 100), "same sequence"),
    ],
)
def test_rejects(query: torch.Tensor, key: torch.Tensor, settings: tuple[int, int, int], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        select_blocks(query, key, *settings)
