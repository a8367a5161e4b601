"""What holds for all operators alike: opcheck, compilation, light import."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from salad_compile.kernels import (
    block_sparse_attention,
    kept_blocks,
    linear_output,
    linear_state,
    pool_blocks,
    select_blocks,
)
from salad_compile.kernels.layout import ALL_BLOCKS
from tests.kernels.helpers import make_qkv, make_selection

OPS = torch.ops.salad


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    query, key, value = make_qkv(203, "fused", torch.float32, grad=True)
    plain = [x.detach() for x in (query, key, value)]
    selection = make_selection(query, key, 64, 32)
    attention = (*selection, 64, 32, 0.25)
    out, lse = block_sparse_attention(*plain, *attention)
    grad = torch.randn_like(out)
    state, key_sum = linear_state(*plain[1:], "relu")
    pooled = pool_blocks(plain[0], 64), pool_blocks(plain[1], 32)
    mask = torch.rand(2, 203) < 0.7
    mask[0, :70] = False
    with_text = selection[1].clone()
    with_text[:, :, -1] = ALL_BLOCKS
    text = (selection[0], with_text, *attention[2:], mask)
    turned = [x.detach().relu().requires_grad_() for x in (query, key)]
    leaves = state.clone().requires_grad_(), key_sum.clone().requires_grad_()
    return {
        "pool": (OPS.pool_blocks, (query, 64)),
        "pool_bf16": (OPS.pool_blocks, (plain[0].bfloat16(), 64)),
        "pool_mask": (OPS.pool_blocks, (query, 64, mask)),
        "select_sinks": (OPS.select_blocks, (*pooled, 64, 32, 300, 170, 203)),
        "select_sinks_mask": (OPS.select_blocks, (*pooled, 64, 32, 300, 170, 203, mask)),
        "select": (OPS.select_blocks, (*pooled, 64, 32, 300)),
        "select_by_mass": (OPS.select_by_mass, (query, key, None, 8, 0.3, 64, 32, 300, 170, 203, mask)),
        "select_by_error": (OPS.select_by_mass, (*(x.bfloat16() for x in plain), 8, 0.3, 64, 32, 300)),
        "attention": (OPS.block_sparse_attention, (query, key, value, *attention)),
        "attention_text_mask": (OPS.block_sparse_attention, (query, key, value, *text)),
        "attention_bf16": (OPS.block_sparse_attention, (*(x.bfloat16() for x in plain), *attention)),
        "attention_backward": (OPS.block_sparse_attention_backward, (grad, *plain, out, lse, *attention)),
        "state": (OPS.linear_state, (key, value, "relu")),
        "state_backward": (OPS.linear_state_backward, (state, key_sum, *plain[1:], "elu")),
        "state_masked": (OPS.linear_state, (key, value, "elu", mask)),
        "state_rotated": (OPS.linear_state, (key, value, "relu", mask, turned[1])),
        "state_rotated_backward": (OPS.linear_state_backward, (state, key_sum, *plain[1:], "relu", mask, plain[1])),
        "output_rotated": (OPS.linear_output, (query, *leaves, "relu", 1e-6, turned[0])),
        "output_rotated_backward": (
            OPS.linear_output_backward,
            (grad, plain[0], state, key_sum, "elu", 1e-6, plain[0]),
        ),
        "output": (OPS.linear_output, (query, *leaves, "softmax", 1e-6)),
        "output_bf16": (OPS.linear_output, (plain[0].bfloat16(), state, key_sum, "relu", 1e-6)),
        "output_backward": (OPS.linear_output_backward, (grad, plain[0], state, key_sum, "relu", 1e-6)),
    }


SAMPLES = samples()


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    operator, arguments = SAMPLES[name]
    torch.library.opcheck(operator.default, arguments, atol=1e-4, rtol=1e-4)


def operator_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Everything SALAD puts in the place of one attention call, without projection and gate."""
    lut, count = select_blocks(pool_blocks(query.detach(), 64), pool_blocks(key.detach(), 32), 64, 32, 300)
    sparse, _ = block_sparse_attention(query, key, value, lut, count, 64, 32, 0.25)
    return sparse + 0.5 * linear_output(query, *linear_state(key, value, "relu"), "relu", 1e-6)


@torch._inductor.config.patch(force_disable_caches=True)
def test_one_dynamic_compilation_serves_two_lengths() -> None:
    # A graph out of Inductor's cache (seen in torch 2.13) also guards on what its backward specialised, here on the
    # branch that kept_blocks took: the second length, which takes another, would compile again. Not so without a cache.
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(operator_forward, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (203, 458):
        qkv = make_qkv(tokens, dtype=torch.float32, batch=1, heads=2, grad=True)
        out, expected = compiled(*qkv), operator_forward(*qkv)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_fake_lut_width_is_the_real_one() -> None:
    for tokens in (1, 64, 203, 1023):
        key_blocks = -(-tokens // 32)
        pooled = torch.randn(1, 1, -(-tokens // 64), 8), torch.randn(1, 1, key_blocks, 8)
        lut, _ = select_blocks(*pooled, 64, 32, 300)
        meta, _ = select_blocks(*(x.to("meta") for x in pooled), 64, 32, 300)
        assert lut.shape == meta.shape
        assert lut.shape[-1] == kept_blocks(key_blocks, 64, 32, 300)


def test_import_is_light() -> None:
    code = (
        "import sys, salad_compile.kernels;"
        "heavy = [m for m in ('triton', 'torch._inductor', 'diffusers') if m in sys.modules];"
        "ours = [m for m in sys.modules if m.startswith('salad_compile.passes')];"
        "sys.exit(str(heavy + ours) if heavy + ours else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
