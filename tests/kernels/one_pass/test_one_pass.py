"""Both operators against what routing and linear attention define, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salad_compile.kernels import (
    KernelArgumentError,
    linear_output,
    linear_state,
    pool_and_read,
    pool_and_summarise,
    pool_blocks,
)
from salad_compile.kernels.one_pass import reference
from tests.kernels.helpers import LENGTHS, make_order, make_qkv, relative_l2

EPS = 1e-6
MAPS = ("relu", "elu", "softmax")


def make_mask(tokens: int) -> torch.Tensor:
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[:, -1] = True
    return mask


class operators:
    pool_and_summarise, pool_and_read = staticmethod(pool_and_summarise), staticmethod(pool_and_read)


class parts:
    """What the two are made of."""

    @staticmethod
    def pool_and_summarise(
        key: Any, value: Any, order: Any, block: int, feature_map: str, key_mask: Any = None, rotated: Any = None
    ) -> Any:
        return pool_blocks(key, order, block, key_mask), *linear_state(key, value, feature_map, key_mask, rotated)

    @staticmethod
    def pool_and_read(
        query: Any, state: Any, key_sum: Any, order: Any, block: int, phi: str, eps: float, mask: Any, rotated: Any
    ) -> Any:
        return pool_blocks(query, order, block, mask), linear_output(query, state, key_sum, phi, eps, rotated)


def run(
    module: Any, tokens: int, feature_map: str, *, ordered: bool, masked: bool, rotated: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Both means and the output; then the gradients of everything, through one random gradient of the output."""
    leaves = [*make_qkv(tokens, grad=True), *make_qkv(tokens, seed=1, grad=True)[:2]]
    order = make_order(tokens) if ordered else None
    mask = make_mask(tokens) if masked else None
    turned = leaves[3:] if rotated else [None, None]
    pooled_key, *state = module.pool_and_summarise(leaves[1], leaves[2], order, 32, feature_map, mask, turned[1])
    pooled_query, out = module.pool_and_read(leaves[0], *state, order, 64, feature_map, EPS, mask, turned[0])
    assert not pooled_key.requires_grad
    assert not pooled_query.requires_grad
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=out.dtype)
    grads = torch.autograd.grad(out, leaves if rotated else leaves[:3], grad)
    return [pooled_key, pooled_query, out], list(grads)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_equals_the_reference_and_its_parts(feature_map: str, tokens: int) -> None:
    kinds = {"ordered": tokens % 2 == 1, "masked": tokens > 64, "rotated": tokens in (63, 203)}
    results, grads = run(operators, tokens, feature_map, **kinds)
    for module, bar in ((reference, 1e-12), (parts, 0.0)):
        expected, expected_grads = run(module, tokens, feature_map, **kinds)
        for ours, theirs in zip(results + grads, expected + expected_grads, strict=True):
            assert relative_l2(ours, theirs) <= bar or (ours - theirs).norm() < 1e-12


@pytest.mark.parametrize("rotated", [False, True])
def test_gradcheck(rotated: bool) -> None:
    leaves = [*make_qkv(35, grad=True), *make_qkv(35, seed=1, grad=True)[:2]]
    order, mask = make_order(35), make_mask(35)

    def both(*x: torch.Tensor) -> torch.Tensor:
        turned = x[3:] if rotated else (None, None)
        _, *state = pool_and_summarise(x[1], x[2], order, 16, "elu", mask, turned[1])
        return pool_and_read(x[0], *state, order, 32, "elu", EPS, mask, turned[0])[1]

    assert torch.autograd.gradcheck(both, leaves if rotated else leaves[:3], fast_mode=True)


def test_gradients_reach_the_sums_alone() -> None:
    _, key, value = make_qkv(50, grad=True)
    _, state, key_sum = pool_and_summarise(key, value, None, 16, "relu")
    (grad,) = torch.autograd.grad(key_sum.sum(), key, retain_graph=True)
    assert torch.equal(grad, (key > 0).double())
    (grad,) = torch.autograd.grad(state.sum(), value)
    assert relative_l2(grad, key.relu().sum(-1, keepdim=True).expand_as(grad)) < 1e-12


def test_wrong_arguments_are_named() -> None:
    query, key, value = make_qkv(40)
    _, state, key_sum = pool_and_summarise(key, value, None, 16, "relu")
    with pytest.raises(KernelArgumentError, match="block"):
        pool_and_summarise(key, value, None, 0, "relu")
    with pytest.raises(KernelArgumentError, match="order"):
        pool_and_summarise(key, value, make_order(41), 16, "relu")
    with pytest.raises(KernelArgumentError, match="unknown feature_map"):
        pool_and_summarise(key, value, None, 16, "gelu")
    with pytest.raises(KernelArgumentError, match="key_mask"):
        pool_and_read(query, state, key_sum, None, 16, "relu", EPS, torch.ones(2, 39, dtype=torch.bool))
    with pytest.raises(KernelArgumentError, match="state"):
        pool_and_read(query, state[:1], key_sum, None, 16, "relu", EPS)
    with pytest.raises(KernelArgumentError, match="eps"):
        pool_and_read(query, state, key_sum, None, 16, "relu", 0.0)
