"""The arithmetic of docs/specification.md: tables and numbers that follow from formulas in the same section."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import pytest

from salad_compile.config import SaladConfig
from salad_compile.kernels import kept_blocks
from salad_compile.kernels.windows.reach import reach_in_tokens
from tests.docs.citations import ROOT, SPECIFICATION

WAN = {"1.3B": (1536, 30, 1_418_996_800), "14B": (5120, 40, 14_288_491_584)}  # D, layers, parameters
SIZES = ((1536, 8960, 32_760), (1536, 8960, 75_600), (5120, 13_824, 75_600))  # D, F, N of the columns of section 10


@lru_cache
def text() -> str:
    return (ROOT / SPECIFICATION).read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of all rows of tables under a heading."""
    section = re.split(rf"^#+ {re.escape(heading)}", text(), flags=re.MULTILINE)[1]
    section = re.split(r"^## ", section, flags=re.MULTILINE)[0]
    return [
        [cell.strip(" *") for cell in line.strip("| ").split(" | ")] for line in section.splitlines() if "|" in line
    ]


def test_slots_of_padded_cubes() -> None:
    table = rows("4.1 ")
    tiles = [tuple(map(int, re.findall(r"\d+", cell)[:3])) for cell in table[0][1:7]]
    assert len(tiles) == 6
    for row in table[2:4]:
        grid = [int(edge) for edge in re.findall(r"\d+", row[0])[:3]]
        for tile, cell in zip(tiles, row[1:7], strict=True):
            slots = 64 * math.prod(math.ceil(size / edge) for size, edge in zip(grid, tile, strict=True))
            assert f"{slots / math.prod(grid):.3f}" == cell, (grid, tile)


@pytest.mark.parametrize(
    ("tokens", "block", "sentence"),
    [
        (32_760, 64, "keeps 51 of 512 key blocks at N = 32,760"),
        (75_600, 64, "118 of 1,182 at 75,600"),
        (8_192, 128, "6 of 64 blocks of 128 at 8,192"),
    ],
)
def test_kept_blocks(tokens: int, block: int, sentence: str) -> None:
    assert sentence in " ".join(text().split())
    kept, blocks = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+(?= of |\b)", sentence)[:2])
    assert math.ceil(tokens / block) == blocks
    assert kept_blocks(blocks, 128, block, SaladConfig(compensation="none", sparsity=0.9).spec.permille) == kept


def test_the_reach_of_a_window() -> None:
    assert "w = 1,681 tokens at N = 32,760: 1.08 latent frames" in " ".join(text().split())
    reach = reach_in_tokens(32_760, 100)
    assert reach == 1_681
    assert f"{reach / (30 * 52):.2f}" == "1.08"
    assert reach // 21 == 80


def test_parameters_that_are_added() -> None:
    table = {row[0].partition(":")[0]: row[1:] for row in rows("6. ") if len(row) == 3}
    added = {
        "D x D": lambda d: d * d,
        "D x D, bias": lambda d: d * d + d,
        "D x D, bias, gate per token (D + 1)": lambda d: d * d + d + d + 1,
        "D x D, bias, gate per head": lambda d: d * d + d + (d + 1) * d // 128,
        "LoRA with r = 64 on query, key, value, out": lambda d: 4 * 2 * d * 64,
    }
    for name, count in added.items():
        small, large = table[name]
        width, layers, parameters = WAN["1.3B"]
        total = layers * count(width)
        assert small == f"{total:,} = {total / parameters:.3%}".replace("%", " %"), name
        width, layers, parameters = WAN["14B"]
        assert large == f"{layers * count(width) / parameters:.3%}".replace("%", " %"), name


def close(cell: str, flops: float) -> bool:
    """Whether a cell, "6.594 T" or "659 G (10 %)", is this number in as many digits as it has."""
    number, unit = re.match(r"([\d.,]+) ([GT])", cell).groups()  # type: ignore[union-attr]
    digits = len(number.partition(".")[2])
    value = flops / {"G": 1e9, "T": 1e12}[unit]
    return abs(float(number.replace(",", "")) - value) <= 0.51 * 10**-digits


def test_flops() -> None:
    table = {row[0]: row[2:] for row in rows("10. ") if len(row) == 5}
    d = 128
    formulas = {
        "full self-attention": lambda D, F, N: 4 * N**2 * D,
        "sparse, at 0.9": lambda D, F, N: 0.4 * N**2 * D,
        "linear state and readout": lambda D, F, N: 4 * N * d * D,
        "Proj": lambda D, F, N: 2 * N * D**2,
        "pooling and block scores, 128 x 64": (
            lambda D, F, N: 2 * N * D + 2 * math.ceil(N / 128) * math.ceil(N / 64) * D
        ),
        "gate": lambda D, F, N: 2 * N * D,
        "LoRA, r = 64, not merged": lambda D, F, N: 16 * N * D * 64,
        "projections of q, k, v, out": lambda D, F, N: 8 * N * D**2,
        "cross-attention": lambda D, F, N: 4 * N * D**2 + 4 * 512 * D * (D + N),
        "feed-forward": lambda D, F, N: 4 * N * D * F,
    }
    for name, formula in formulas.items():
        for cell, (width, hidden, tokens) in zip(table[name], SIZES, strict=True):
            assert close(cell, formula(width, hidden, tokens)), (name, cell, formula(width, hidden, tokens))
