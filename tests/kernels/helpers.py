"""Inputs and distances that the kernel tests share."""

import pytest
import torch

from salad_compile.kernels.block_choice import BlockChoice
from salad_compile.kernels.checks import accumulation_dtype, valid_or_zero
from salad_compile.kernels.linear.feature_maps import find_feature_map
from salad_compile.kernels.routing import reference as routing

LENGTHS = (1, 63, 64, 65, 113, 203, 1023)
BLOCKS = ((64, 64), (128, 64), (128, 128), (64, 128))
LAYOUTS = ("bhsd", "bshd", "fused")
FORWARD_BAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

# Scale and dtype: the largest scores, which round most, in every dtype, and each smaller scale once.
_ROUND_LESS = [(1.0, torch.float32), (1.0, torch.float16), (4.0, torch.float32), (4.0, torch.bfloat16)]
ACCURACY = pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((16.0, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((1.0, torch.bfloat16), (4.0, torch.float16)),
        *(pytest.param(*case, marks=pytest.mark.all_cases) for case in _ROUND_LESS),
    ],
)


def make_qkv(
    tokens: int,
    layout: str = "bshd",
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 16,
    scale: float = 1.0,
    seed: int = 0,
    grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key, value (B, H, S, D) in one of three memory layouts; query and key are multiplied by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    fused[:, :, :2] *= scale
    fused = fused.to(dtype)
    query, key, value = (fused[:, :, i].transpose(1, 2) for i in range(3))
    if layout == "bshd":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    elif layout == "bhsd":
        query, key, value = (x.contiguous() for x in (query, key, value))
    if grad:
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
    return query, key, value


def make_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    query_block: int,
    key_block: int,
    density_permille: int = 400,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lut and count of the reference's selection on these inputs."""
    query, key = query.detach().double(), key.detach().double()
    return routing.select_blocks(
        routing.pool_blocks(query, query_block),
        routing.pool_blocks(key, key_block),
        BlockChoice(query_block, key_block, density_permille),
    )


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in fp64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Cosine of the angle between two tensors in fp64."""
    actual, expected = actual.detach().double().flatten(), expected.detach().double().flatten()
    return float(actual @ expected / (actual.norm() * expected.norm()))


def quadratic_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: str,
    eps: float,
    key_mask: torch.Tensor | None = None,
    rotated_query: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear attention written with all S x S weights: what `linear_state` and `linear_output` must add up to."""
    phi, _ = find_feature_map(feature_map)
    dtype = accumulation_dtype(query.dtype)
    features = phi(query.to(dtype)), valid_or_zero(phi(key.to(dtype)), key_mask)
    weights = features[0] @ features[1].transpose(-1, -2)
    numerators = weights
    if rotated_query is not None and rotated_key is not None:
        numerators = rotated_query.to(dtype) @ valid_or_zero(rotated_key.to(dtype), key_mask).transpose(-1, -2)
    return ((numerators @ value.to(dtype)) / (weights.sum(dim=-1, keepdim=True) + eps)).to(query.dtype)
