"""salad::select_by_mass against its definition in words, one pair of cells at a time."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, pool_blocks, select_blocks, select_by_mass
from salad_compile.kernels.block_choice import BlockChoice
from salad_compile.kernels.mass import reference
from salad_compile.kernels.mass import torch as plain

TOKENS, SCALE = 107, 0.3


def operands() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, TOKENS, 8, generator=generator, dtype=torch.float64).unbind(0)
    return query, 2 * key, value * (1 + torch.arange(TOKENS)[:, None] / TOKENS)


def a_mask() -> torch.Tensor:
    mask = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[0, :70] = False
    return mask


def scores_in_words(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    cell: int,
    blocks: tuple[int, int],
    mask: torch.Tensor,
) -> torch.Tensor:
    """(H, Mq, Mk) of one sample: loops over query cells, of each the softmax over means of valid keys."""

    def members(first: int, size: int) -> list[int]:
        return [j for j in range(first, min(first + size, TOKENS)) if mask[j]]

    heads, (query_block, key_block) = query.shape[0], blocks
    found = torch.zeros(heads, -(-TOKENS // query_block), -(-TOKENS // key_block), dtype=torch.float64)
    cells = {first: held for first in range(0, TOKENS, cell) if (held := members(first, cell))}
    for head in range(heads):
        for first, held in cells.items():
            mean = query[head, held].mean(0)
            weights = {
                at: len(keys) * float(torch.exp(SCALE * mean @ key[head, keys].mean(0))) for at, keys in cells.items()
            }
            total = sum(weights.values())
            for at, weight in weights.items():
                found[head, first // query_block, at // key_block] += len(held) * weight / total
        if value is None:
            continue
        for i in range(found.shape[1]):
            rows = members(i * query_block, query_block)
            for j in range(found.shape[2]):
                if not (rows and (keys := members(j * key_block, key_block))):
                    continue
                spread_k = key[head, keys].var(0, correction=0) @ query[head, rows].mean(0).square()
                found[head, i, j] *= (spread_k * value[head, keys].var(0, correction=0).sum()).sqrt()
    return found


@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_error", [False, True])
def test_scores_are_those_of_the_definition(
    blocks: tuple[int, int], masked: bool, by_error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = operands()
    mask = a_mask() if masked else None
    given = value if by_error else None
    seen: list[torch.Tensor] = []
    kept = plain.keep_best

    def look(scores: torch.Tensor, choice: BlockChoice) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(scores.clone())
        return kept(scores, choice)

    monkeypatch.setattr(plain, "keep_best", look)
    for at_once in (1, 1 << 25):  # a query block at a time, and all
        monkeypatch.setattr(plain, "_SCORES_AT_ONCE", at_once)
        select_by_mass(query, key, given, 8, SCALE, *blocks, 400, 0, 0, mask)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-12, atol=0)
    valid = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask
    for sample in range(2):
        tensors = (query[sample], key[sample], None if given is None else given[sample])
        expected = scores_in_words(*tensors, 8, blocks, valid[sample])
        torch.testing.assert_close(seen[1][sample], expected, rtol=1e-9, atol=1e-12)
    choice = BlockChoice(*blocks, 400, key_mask=mask)
    torch.testing.assert_close(seen[1], reference.scores_of(query, key, given, 8, SCALE, choice), rtol=1e-9, atol=1e-9)


def test_of_one_cell_a_block_the_order_is_that_of_means() -> None:
    query, key, _ = (x[:, :, :96] for x in operands())
    found = select_by_mass(query, key, None, 16, SCALE, 16, 16, 400, 20, 30)
    means = select_blocks(pool_blocks(query, 16), pool_blocks(key, 16), 16, 16, 400, 20, 30)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, means, strict=True))


def test_a_block_that_its_mean_tells_all_of_is_left_to_the_mean() -> None:
    """All keys and values of block 3 are alike: it holds most of the softmax, and a mean gets nothing of it wrong."""
    query, key, value = (x[:, :, :96].clone() for x in operands())
    query += 2
    key[:, :, 48:64], value[:, :, 48:64] = 2.0, 1.0
    chosen = {}
    for given in (None, value):
        lut, _ = select_by_mass(query, key, given, 8, 1.0, 16, 16, 400)
        chosen[given is None] = (lut == 3).any(-1)
    assert chosen[True].float().mean() > 0.9
    assert chosen[False].sum() == 4  # where it is the query block's own


def test_it_is_the_same_every_time_and_takes_no_gradient() -> None:
    query, key, value = (x.float().requires_grad_() for x in operands())
    first = select_by_mass(query, key, value, 8, SCALE, 32, 16, 300, 0, 0, a_mask())
    for _ in range(3):
        again = select_by_mass(query, key, value, 8, SCALE, 32, 16, 300, 0, 0, a_mask())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(x.requires_grad for x in first)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cell": 12}, "cell=12 must divide"),
        ({"cell": 0}, "cell=0 must divide"),
        ({"sink_end": 200}, "sink range"),
        ({"density_permille": 1200}, "density_permille"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, object], said: str) -> None:
    query, key, _ = operands()
    given = {"cell": 8, "scale": SCALE, "query_block": 32, "key_block": 16, "density_permille": 300}
    with pytest.raises(KernelArgumentError, match=said):
        select_by_mass(query, key, None, **{**given, **changes})  # type: ignore[arg-type]
