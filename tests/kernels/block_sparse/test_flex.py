"""The FlexAttention engine, as far as a CPU runs it: the forward, uncompiled."""

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, block_sparse_attention, use_engine
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.layout import ALL_BLOCKS
from tests.kernels.helpers import make_qkv, make_selection


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition(masked: bool) -> None:
    query, key, value = make_qkv(203, dtype=torch.float32)
    key_mask = torch.rand(2, 203) < 0.7 if masked else None
    lut, count = make_selection(query, key, 64, 64)
    count = count.clone()
    count[:, 0, 1], count[:, 1, 2] = 0, ALL_BLOCKS
    arguments = (query, key, value, lut, count, 64, 64, 0.25, key_mask)
    with use_engine("flex"):
        out, lse = block_sparse_attention(*arguments)
    expected, expected_lse = reference.block_sparse_attention(*arguments)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)


def test_backward_says_what_to_do() -> None:
    qkv = make_qkv(65, dtype=torch.float32, grad=True)
    selection = make_selection(qkv[0], qkv[1], 64, 64)
    with use_engine("flex"):
        out, _ = block_sparse_attention(*qkv, *selection, 64, 64, 0.25)
        with pytest.raises(UnsupportedKernelError, match=r"no backward.*use_engine\('torch'\)"):
            out.sum().backward()
