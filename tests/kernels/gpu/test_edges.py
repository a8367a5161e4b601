"""Operators at the edge, on the Triton kernels: the checks of tests/kernels/edges.py."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels.launch import interpreting
from tests.kernels import edges


# whatever is read of a NaN or of an infinity stays one; interpreted, two of four are enough
@pytest.mark.parametrize("bad", edges.BAD[:2] if interpreting() else edges.BAD)
def test_what_is_masked_never_arrives(bad: float, device: str) -> None:
    edges.check_attention(bad, device, torch.float16)
    edges.check_pooling_and_state(bad, device, torch.float16)


@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_fp16_sums_do_not_overflow(feature_map: str, device: str) -> None:
    edges.check_fp16_state(device, feature_map)


@pytest.mark.skipif(not interpreting(), reason="takes 5 GB for each of key and value, of which a CPU touches little")
def test_offsets_beyond_32_bits(device: str) -> None:
    edges.check_far_strides(device, torch.float16)


def test_block_sizes_of_the_readme(device: str) -> None:
    edges.check_block_sizes(device)
