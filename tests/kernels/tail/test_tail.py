"""The tail: its definition against a softmax written out, the plain-torch engine against its definition."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, attend_with_tail, block_sparse_attention, tail_tokens
from tests.kernels.helpers import make_qkv, make_selection, relative_l2
from tests.kernels.tail.cases import Case, brute_force, error, means, run_both

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = (
    Case(203),
    Case(333, (128, 64), 256, layout="fused", scale=4.0),
    Case(320, (64, 128), 64, scale=16.0, dense_row=True),
    Case(203, (32, 64), 16, masked=True),
    Case(333, (64, 64), 128, masked=True, dense_row=True, text=40),
    Case(150, (64, 32), 1, permille=0),
)


@pytest.mark.parametrize("case", [Case(37, (16, 8), 16), Case(40, (8, 16), 4, scale=4.0)])
def test_the_definition_is_one_softmax_over_selected_tokens_and_pools(case: Case) -> None:
    ours, expected = brute_force(case)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case) -> None:
    for ours, expected in run_both(case, torch.float64):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    for ours, expected in run_both(case, torch.float32):
        assert error(ours, expected) < 1e-4


def test_16_bits() -> None:
    for ours, expected in run_both(Case(333, (128, 64), 64, head_dim=32), torch.bfloat16):
        assert error(ours, expected) < 2e-2


def attend_all(permille: int, pool: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(with a tail, dense), of one call."""
    query, key, value = make_qkv(203)
    lut, count = make_selection(query, key, 64, 64, permille)
    counted = tail_tokens(lut, count, 203, 64, pool, 0, 203)
    ones = torch.ones(2, 203, dtype=torch.float64)
    pools = means(key, pool, ones), means(value, pool, ones)
    out, _ = attend_with_tail(query, key, value, *pools, counted, None, lut, count, 64, 64, 0.25)
    return out, torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.25)


def test_pools_of_one_token_and_no_sparsity_are_dense() -> None:
    torch.testing.assert_close(*attend_all(300, 1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(*attend_all(1000, 64), rtol=1e-11, atol=1e-12)
    out, dense = attend_all(300, 64)
    assert relative_l2(out, dense) > 1e-3


def test_without_any_pool_it_is_block_sparse_attention() -> None:
    query, key, value = make_qkv(203, dtype=torch.float32)
    lut, count = make_selection(query, key, 64, 64, 300)
    pools = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16)
    nothing = torch.zeros(2, 3, 4, 4)
    out, lse = attend_with_tail(query, key, value, *pools, nothing, None, lut, count, 64, 64, 0.25)
    expected, expected_lse = block_sparse_attention(query, key, value, lut, count, 64, 64, 0.25)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_a_query_without_keys_and_pools_is_zero() -> None:
    query, key, value = (x.requires_grad_() for x in make_qkv(128))
    lut, count = make_selection(query, key, 64, 64, 500)
    count = count.clone()
    count[0, 0, 0] = 0
    pools = [x.detach()[:, :, :2].clone().requires_grad_() for x in (key, value)]
    counted = torch.zeros(2, 3, 2, 2)
    out, lse = attend_with_tail(query, key, value, *pools, counted, None, lut, count, 64, 64, 0.25)
    assert (out[0, 0, :64] == 0).all()
    assert (lse[0, 0, :64] == float("-inf")).all()
    for grad in torch.autograd.grad(out.sum(), [query, key, value, *pools]):
        assert torch.isfinite(grad).all()


def test_wrong_arguments_are_refused() -> None:
    query, key, value = make_qkv(203, dtype=torch.float32)
    lut, count = make_selection(query, key, 64, 64, 300)
    with pytest.raises(KernelArgumentError, match="must divide"):
        tail_tokens(lut, count, 203, 64, 48, 0, 203)
    with pytest.raises(KernelArgumentError, match="within 203 tokens"):
        tail_tokens(lut, count, 203, 64, 64, 0, 204)
    good = {
        "pooled_key": torch.zeros(2, 3, 4, 16),
        "pooled_value": torch.zeros(2, 3, 4, 16),
        "pool_tokens": torch.zeros(2, 3, 4, 4),
        "log_weight": torch.zeros(3),
    }
    attend_with_tail(query, key, value, *good.values(), lut, count, 64, 64, 0.25)
    for name, bad in {
        "pooled_key": torch.zeros(2, 3, 4, 8),
        "pooled_value": torch.zeros(2, 3, 5, 16),
        "pool_tokens": torch.zeros(2, 3, 3, 4),
        "log_weight": torch.zeros(4),
    }.items():
        with pytest.raises(KernelArgumentError, match=name):
            attend_with_tail(query, key, value, *(good | {name: bad}).values(), lut, count, 64, 64, 0.25)


def test_operator_passes_torchs_own_checks() -> None:
    query, key, value = make_qkv(130, dtype=torch.float32, grad=True)
    lut, count = make_selection(query, key, 64, 64, 300)
    pools = torch.randn(2, 3, 3, 16, requires_grad=True), torch.randn(2, 3, 3, 16, requires_grad=True)
    counted = tail_tokens(lut, count, 130, 64, 64, 0, 130)
    weight = torch.zeros(3, requires_grad=True)
    given = (query, key, value, *pools, counted, weight, lut, count, 64, 64, 0.25)
    torch.library.opcheck(
        torch.ops.salad.attend_with_tail.default, given, test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(torch.ops.salad.tail_tokens.default, (lut, count, 130, 64, 64, 0, 130))
