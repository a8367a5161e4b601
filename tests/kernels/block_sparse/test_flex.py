"""The definition and the plain-torch engine against FlexAttention."""

import pytest
import torch

from salad_compile.kernels import block_sparse_attention
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.selection import Selection
from tests.kernels.block_sparse.flex_oracle import attend_with_flex
from tests.kernels.helpers import make_qkv, make_selection


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_agrees(masked: bool) -> None:
    qkv = make_qkv(203, dtype=torch.float32)
    lut, count = make_selection(*qkv[:2], 64, 64)
    count = count.clone()
    count[:, 0, 1], count[:, 1, 2] = 0, ALL_BLOCKS
    key_mask = torch.rand(2, 203, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    selection = Selection(lut, count, 64, 64, 0.25, key_mask)
    flex_out, flex_lse = attend_with_flex(*qkv, selection)
    definition, operator = reference.block_sparse_attention(*qkv, selection), block_sparse_attention(*qkv, *selection)
    for out, lse in (definition, operator):
        torch.testing.assert_close(out, flex_out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, flex_lse, rtol=1e-4, atol=1e-5)
