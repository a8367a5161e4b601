"""No tensor of the engine grows with S x S."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salad_compile.kernels.block_sparse import torch as engine
from salad_compile.kernels.selection import Selection


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that any result inside it really stores (an expanded view stores few)."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("tokens", [2048, 16384])
@pytest.mark.parametrize("permille", [50, 1000])
def test_largest_tensor_is_linear_in_tokens(tokens: int, permille: int) -> None:
    if tokens == 16384 and permille == 1000:
        tokens = 8192  # 16 times the work for the same statement
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = torch.randn(4, 1, 1, tokens, 8, generator=generator).unbind(0)
    key_blocks = tokens // 64
    kept = max(1, key_blocks * permille // 1000)
    lut = torch.arange(kept, dtype=torch.int32).expand(1, 1, key_blocks, kept)
    selection = Selection(lut, torch.full((1, 1, key_blocks), kept, dtype=torch.int32), 64, 64, 0.35)
    with LargestTensor() as largest:
        out, lse = engine.block_sparse_attention(query, key, value, selection)
        engine.block_sparse_attention_backward(grad, query, key, value, out, lse, selection)
    assert largest.nbytes >= tokens * 8 * 4
    # one chunk, or one query block against all keys where that is more than a chunk
    assert largest.nbytes <= max(4 << 20, 64 * tokens * 4)
    if tokens > 2048:
        assert largest.nbytes < tokens * tokens * 4 // 16
