"""What the Triton kernels take, and what the errors say about the rest."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, capability
from salad_compile.kernels.capability import arch_of, padded_head_dim, require_supported, target_arch

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)


@pytest.mark.parametrize(("head_dim", "width"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (128, 128)])
def test_padded_head_dim(head_dim: int, width: int) -> None:
    assert padded_head_dim(head_dim) == width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_takes_what_ships(dtype: torch.dtype) -> None:
    require_supported(CPU, dtype)
    require_supported(CPU, dtype, 1, 80, 128, query_block=128, key_block=64)


@pytest.mark.parametrize(
    ("dtype", "head_dims", "blocks", "words"),
    [
        (torch.float64, (64,), {}, ("torch.float64", "bfloat16, float16, float32")),
        (torch.bfloat16, (64, 129), {}, ("head_dim 129", "from 1 to 128")),
        (torch.bfloat16, (0,), {}, ("head_dim 0",)),
        (torch.bfloat16, (64,), {"query_block": 64, "key_block": 48}, ("key_block 48", "16, 32, 64, 128, 256")),
    ],
)
def test_errors_name_what_was_asked_for_and_what_there_is(
    dtype: torch.dtype, head_dims: tuple[int, ...], blocks: dict[str, int], words: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedKernelError) as error:
        require_supported(CPU, dtype, *head_dims, **blocks)
    for word in (*words, "use_engine('torch')"):
        assert word in str(error.value)


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(UnsupportedKernelError, match=r"Old GPU has compute capability 7\.5.* 8\.0 or newer.*'torch'"):
        require_supported(CUDA, torch.bfloat16, 64)
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (8, 0))
    require_supported(CUDA, torch.bfloat16, 64)


@pytest.mark.parametrize("device", [CPU, META])
def test_target_arch_answers_for_what_is_no_gpu(device: torch.device) -> None:
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
