"""The engine "flash" without a GPU and without its package: what it takes, and how our lists become those it takes.

`tests/kernels/gpu/test_flash.py` runs it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, capability
from salad_compile.kernels.block_sparse import flash, reference
from salad_compile.kernels.engines import Call, choose, engines, find, flash_attention, registry, use_engine
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import make_qkv, make_selection

CUDA = torch.device("cuda", 0)


class Lists(NamedTuple):
    """As flash_attn.cute.block_sparsity.BlockSparseTensorsTorch, as far as we use it."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    block_sparse_tensors: Lists | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As flash_attn_func, (B, S, H, D), by the definition. Knows no ALL_BLOCKS, and refuses what its kernel trusts."""
    lists = block_sparse_tensors
    assert not torch.is_grad_enabled()
    assert softmax_scale is not None
    assert softmax_scale > 0
    assert lists is not None
    assert lists.full_block_cnt is not None
    assert lists.full_block_idx is not None
    assert lists.block_size is not None
    assert not lists.mask_block_cnt.any()
    key_blocks = -(-k.shape[1] // lists.block_size[1])
    for counts, blocks in ((lists.mask_block_cnt, lists.mask_block_idx), (lists.full_block_cnt, lists.full_block_idx)):
        assert counts.dtype == blocks.dtype == torch.int32
        assert counts.is_contiguous()
        assert blocks.is_contiguous()
        assert blocks.shape == (*counts.shape, key_blocks)
        assert bool(((counts >= 0) & (counts <= key_blocks)).all())
        assert bool(((blocks >= 0) & (blocks < key_blocks)).all())
    selection = Selection(lists.full_block_idx, lists.full_block_cnt, *lists.block_size, softmax_scale)
    out, lse = reference.block_sparse_attention(*(x.transpose(1, 2) for x in (q, k, v)), selection)
    return out.transpose(1, 2).contiguous(), lse


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (9, 0))
    forget()
    yield
    forget()


def forget() -> None:
    """What is kept of one package must not reach the next test."""
    for function in (flash_attention.why_missing, flash_attention.interface, flash_attention._warn_never_run):
        function.cache_clear()
    registry._forget_choices()


def install(monkeypatch: pytest.MonkeyPatch, function: Any = attention, lists: Any = Lists) -> None:
    """A fake package."""
    modules = {
        "flash_attn.cute.interface": SimpleNamespace(flash_attn_func=function),
        "flash_attn.cute.block_sparsity": SimpleNamespace(BlockSparseTensorsTorch=lists),
    }
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: modules.get(name) or real(name, *rest))
    monkeypatch.setattr(flash_attention.importlib.metadata, "version", lambda _: "4.0.0b36")


def call(**changes: Any) -> Call:
    facts = {"operator": "block_sparse_attention", "device": CUDA, "dtype": torch.bfloat16, "head_dim": 128}
    sizes = {"value_dim": 128, "query_block": 128, "key_block": 128}
    return Call(**(facts | sizes | changes))


# ---------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16, "head_dim": 64, "value_dim": 64}, None),
        ({"query_block": 64, "key_block": 64}, None),
        ({"query_block": 256, "head_dim": 80}, None),
        ({"device": torch.device("cpu")}, "on cpu, and it needs a GPU"),
        ({"dtype": torch.float32}, "bfloat16 and float16, and not torch.float32"),
        ({"head_dim": 100}, "from 8 to 128 in steps of 8, and not 100 and 128"),
        ({"value_dim": 20}, "in steps of 8, and not 128 and 20"),
        ({"masked": True}, "it takes no key mask"),
        (
            {"query_block": 32},
            "query blocks of 64 or 128 or 256 tokens and key blocks of 64 or 128, .* 32 and 128",
        ),
        ({"key_block": 256}, "and not 128 and 256"),
    ],
)
def test_what_it_takes_is_served_when_asked_for(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    assert choose(call(**changes)).name != "flash", "ours come first"
    with use_engine("flash"):
        if reason is None:
            assert choose(call(**changes)).name == "flash"
        else:
            with pytest.raises(UnsupportedKernelError, match=f"'flash' was asked for.*{reason}"):
                choose(call(**changes))


def test_it_stands_behind_ours_and_leaves_the_backward_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert [engine.name for engine in engines()] == ["gluon", "triton", "flash", "torch"]
    with use_engine("flash"):
        assert choose(call(operator="block_sparse_attention_backward")).name == "triton"


@pytest.mark.parametrize("arch", [(8, 0), (8, 9), (12, 0)])
def test_other_gpus_are_refused(arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: arch)
    assert find("flash").supports(call()) == (
        f"it is for compute capabilities 9.0 and 10.x, and cuda:0 has {arch[0]}.{arch[1]}"
    )


def test_on_blackwell_it_has_to_be_asked_for_and_says_that_we_never_ran_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (10, 0))
    wide = {"query_block": 256}
    said = find("flash").supports(call(**wide))
    assert said == "on Blackwell it was never run by us, so it has to be asked for: use_engine('flash')"
    assert choose(call(**wide)).name == "triton"
    with use_engine("flash"):
        asked = call(**wide)
        assert choose(asked).name == "flash"
        with pytest.raises(UnsupportedKernelError, match="query blocks of 256 tokens and key blocks of 128 or 256"):
            choose(call())
    monkeypatch.setattr(flash, "block_sparse_attention", lambda: "ran")
    with pytest.warns(UserWarning, match="never ran it there"):
        assert find("flash").run(asked) == "ran"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find("flash").run(asked)  # once is enough


def test_a_package_that_is_missing_broken_or_other_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("flash").supports(call()) == (
        "the package flash-attn-4 is not installed: pip install 'flash-attn-4>=4.0.0b36' (extra `flash`)"
    )
    flash_attention.why_missing.cache_clear()
    monkeypatch.setattr(flash_attention.importlib.metadata, "version", lambda _: "4.0.0b36")

    def broken(name: str) -> None:
        raise OSError("libcute.so: undefined symbol")

    with monkeypatch.context() as patch:
        patch.setattr(flash_attention.importlib, "import_module", broken)
        assert find("flash").supports(call()) == (
            "flash-attn-4 4.0.0b36 is installed and does not load: OSError: libcute.so: undefined symbol"
        )
    flash_attention.why_missing.cache_clear()
    install(monkeypatch, function=lambda q, k, v, softmax_scale: q)
    said = find("flash").supports(call())
    assert said is not None
    assert said.endswith("its interface is not that of 4.0.0b36: no block_sparse_tensors, return_lse")


def test_nothing_of_it_is_imported_before_a_call_needs_it() -> None:
    script = (
        "import sys, salad_compile.kernels as kernels; from salad_compile.kernels import engines; "
        "assert 'flash' in [engine.name for engine in engines.engines()]; "
        "assert not [name for name in sys.modules if name.split('.')[0] in ('flash_attn', 'cutlass')]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# ---------------------------------------------------------------- our lists in its words


def run(monkeypatch: pytest.MonkeyPatch, selection: Selection, qkv: Any) -> tuple[torch.Tensor, torch.Tensor]:
    install(monkeypatch)
    monkeypatch.setattr(flash, "check_selection", lambda *arguments: None)  # a Triton kernel
    return flash.block_sparse_attention(*qkv, selection)


@pytest.mark.parametrize(("query_block", "key_block"), [(128, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("tokens", [64, 113, 515])
def test_same_as_the_definition(tokens: int, query_block: int, key_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = make_qkv(tokens, "fused")
    lut, count = make_selection(query, key, query_block, key_block)
    count = count.clone()
    count[0, :, -1] = ALL_BLOCKS
    count[1, 0, 0] = 0
    for scale in (0.25, -0.25):
        selection = Selection(lut, count, query_block, key_block, scale)
        out, lse = run(monkeypatch, selection, (query, key, value))
        wanted, wanted_lse = reference.block_sparse_attention(query, key, value, selection)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(lse, wanted_lse)
        assert out.transpose(1, 2).is_contiguous(), "the layout that the operator promises"
    assert bool((out[1, 0, :query_block] == 0).all())


def test_lists_that_are_wrong_are_brought_into_their_bounds() -> None:
    lut = torch.tensor([[[[-7, 99, 2], [0, 1, 2]]]], dtype=torch.int32)
    count = torch.tensor([[[9, -5]]], dtype=torch.int32)
    blocks, counts = flash.whole_blocks(lut, count, 5)
    assert blocks.tolist() == [[[[0, 4, 2, 3, 4], [0, 1, 2, 3, 4]]]]
    assert counts.tolist() == [[[3, 0]]]


def test_lists_wider_than_there_are_blocks_are_cut() -> None:
    lut = torch.tensor([[[[0, 1, 2**30]]]], dtype=torch.int32)
    blocks, counts = flash.whole_blocks(lut, torch.tensor([[[2]]], dtype=torch.int32), 2)
    assert (blocks.tolist(), counts.tolist()) == ([[[[0, 1]]]], [[[2]]])


def test_a_call_without_tokens_or_heads_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.zeros(3, 2, 0, 128, 16).unbind(0)
    selection = Selection(*torch.zeros(2, 2, 0, 1, 1, dtype=torch.int32).unbind(0), 128, 128, 1.0)
    selection = selection._replace(count=selection.count[..., 0])
    out, lse = run(monkeypatch, selection, qkv)
    assert out.shape == (2, 0, 128, 16)
    assert lse.shape == (2, 0, 128)
