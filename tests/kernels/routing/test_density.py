"""How many key blocks are kept."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from salad_compile.kernels import KernelArgumentError, kept_blocks
from salad_compile.kernels.routing.density import list_width


@pytest.mark.parametrize(
    ("tokens", "query_block", "key_block", "kept", "of"),
    [(32_760, 128, 64, 51, 512), (75_600, 128, 64, 118, 1_182), (8_192, 128, 128, 6, 64)],
)
def test_numbers_of_the_specification(tokens: int, query_block: int, key_block: int, kept: int, of: int) -> None:
    key_blocks = -(-tokens // key_block)
    assert key_blocks == of
    assert kept_blocks(key_blocks, query_block, key_block, 100) == kept


@pytest.mark.parametrize(
    ("key_blocks", "query_block", "key_block", "density", "kept"),
    [
        (10, 64, 64, 100, 1),  # (1 - 0.9) * 10 is below 1 in floats
        (10, 64, 64, 99, 1),  # the self block is never dropped
        (10, 128, 64, 0, 2),  # both key blocks under the query block
        (1, 128, 64, 0, 1),  # there is only one
        (10, 64, 128, 0, 1),
        (7, 64, 64, 1000, 7),
        (7, 64, 64, 999, 6),
    ],
)
def test_edges(key_blocks: int, query_block: int, key_block: int, density: int, kept: int) -> None:
    assert kept_blocks(key_blocks, query_block, key_block, density) == kept


@pytest.mark.parametrize("arguments", [(96, 64, 100), (0, 64, 100), (64, -1, 100), (64, 64, -1), (64, 64, 1001)])
def test_rejects(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(KernelArgumentError):
        kept_blocks(10, *arguments)


@pytest.mark.parametrize(
    ("sinks", "width"),
    [
        ((0, 0), 2),
        ((37, 37), 2),  # empty, though inside a block
        ((37, 38), 3),
        ((60, 70), 4),
        ((64, 128), 3),
        ((1216, 1280), 3),
        ((0, 1280), 20),
    ],
)
def test_sinks_widen_the_list(sinks: tuple[int, int], width: int) -> None:
    assert list_width(20, 64, 64, 100, *sinks) == width


def test_symbolic_sizes_add_no_guard() -> None:
    env, tensor = ShapeEnv(), torch.empty(512, 2)
    symbolic = FakeTensorMode(shape_env=env, static_shapes=False).from_tensor(tensor).shape[0]
    before = len(env.guards)
    kept = kept_blocks(symbolic, 128, 64, 100)
    width = list_width(symbolic, 128, 64, 100, 64 * symbolic - 200, 64 * symbolic)
    assert isinstance(kept, torch.SymInt)
    assert isinstance(width, torch.SymInt)
    assert len(env.guards) == before
    assert kept.node.hint == 51
    assert width.node.hint == 51 + 4
