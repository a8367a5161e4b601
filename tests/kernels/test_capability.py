"""What the Triton kernels take, and what the errors say about the rest."""

from __future__ import annotations

import re

import pytest
import torch

from salad_compile.kernels import capability
from salad_compile.kernels.capability import arch_of, padded_head_dim, target_arch, why_unsupported

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)


@pytest.mark.parametrize(("head_dim", "width"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (128, 128)])
def test_padded_head_dim(head_dim: int, width: int) -> None:
    assert padded_head_dim(head_dim) == width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_takes_what_ships(dtype: torch.dtype) -> None:
    assert why_unsupported(CPU, dtype) is None
    assert why_unsupported(CPU, dtype, (1, 80, 128, None), (128, 64, None)) is None


@pytest.mark.parametrize(
    ("dtype", "head_dims", "blocks", "words"),
    [
        (torch.float64, (64,), (), ("torch.float64", "bfloat16, float16, float32")),
        (torch.bfloat16, (64, 129), (), ("head_dim 129", "from 1 to 128")),
        (torch.bfloat16, (0,), (), ("head_dim 0",)),
        (torch.bfloat16, (64,), (64, 48), ("blocks of 48 tokens", "16, 32, 64, 128, 256")),
    ],
)
def test_reasons_name_what_was_asked_for_and_what_there_is(
    dtype: torch.dtype, head_dims: tuple[int, ...], blocks: tuple[int, ...], words: tuple[str, ...]
) -> None:
    reason = why_unsupported(CPU, dtype, head_dims, blocks)
    for word in (*words, "use_engine('torch')"):
        assert word in str(reason)


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    reason = why_unsupported(CUDA, torch.bfloat16, (64,))
    assert re.match(r"Old GPU has compute capability 7\.5.* 8\.0 or newer.*'torch'", str(reason))
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (8, 0))
    assert why_unsupported(CUDA, torch.bfloat16, (64,)) is None


@pytest.mark.parametrize("device", [CPU, META])
def test_target_arch_stands_in_where_there_is_no_gpu(device: torch.device) -> None:
    assert arch_of(device) == (9, 0)
    with target_arch((8, 0)):
        assert arch_of(device) == (8, 0)
        with target_arch((10, 0)):
            assert arch_of(device) == (10, 0)
        assert arch_of(device) == (8, 0)
    assert arch_of(device) == (9, 0)


def test_target_arch_does_not_hide_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (8, 9))
    with target_arch((10, 0)):
        assert arch_of(CUDA) == (8, 9)
