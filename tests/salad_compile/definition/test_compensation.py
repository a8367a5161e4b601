"""Pools for what sparsity leaves out, in whole models: uncompiled, compiled, saved, with text, masks and windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.definition.compensation import tail_of
from salad_compile.definition.pattern import BlockCall, SelectedBlocks
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.token_layout import segments
from salad_compile.errors import ConfigError
from tests import toys
from tests.passes import rotary_styles as styles

SETTINGS = {
    "compensation": "none",
    "sparsity": 0.7,
    "query_block": 16,
    "key_block": 16,
    "lora_rank": 2,
    "min_tokens": 64,
}
TAIL = {"compensation": "tail", "compensation_pool": 32}


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (torch.arange(k.shape[-2]) < k.shape[-2] - 9).expand(k.shape[0], 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def converted(attend: Any = toys.positional, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = salad_compile.convert(
        toys.SelfAttention(attend), {**SETTINGS, **settings}, example_inputs=(toys.tokens(105),), grid=(3, 5, 7)
    )
    for name, parameter in model.named_parameters():
        if ".salad." in f".{name}" and "tail_weight" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def distance(model: torch.nn.Module, attend: Any = toys.positional) -> float:
    """Of the output to that of dense attention; the low-rank updates and the branch are left out of both."""
    torch.manual_seed(0)
    dense = toys.SelfAttention(attend)
    x = toys.tokens(105)
    expected = dense(x)
    return float((model(x) - expected).norm() / expected.norm())


def without_branch(attend: Any = toys.positional, **settings: Any) -> torch.nn.Module:
    return converted(attend, linear_branch=False, lora_rank=0, **settings)


@pytest.mark.parametrize("pattern", ["topk", "stswa"])
def test_it_brings_the_result_nearer_to_dense(pattern: str) -> None:
    assert distance(without_branch(pattern=pattern, **TAIL)) < 0.8 * distance(without_branch(pattern=pattern))


def test_pools_of_one_token_are_dense() -> None:
    for attend in (toys.positional, masked):
        model = without_branch(attend, compensation="tail", compensation_pool=1)
        model.salad.tail_weight.data.zero_()
        assert distance(model, attend) < 1e-5
    assert distance(without_branch(sparsity=0.0, **TAIL)) < 1e-5


@pytest.mark.parametrize(
    ("attend", "pattern"),
    [(toys.positional, "topk"), (masked, "topk"), (toys.positional, "mass16"), (masked, "error8")],
)
def test_compiled_equals_uncompiled(attend: Any, pattern: str) -> None:
    model, x = converted(attend, pattern=pattern, **TAIL), toys.tokens(105)
    out = model(x)
    out.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert float(grads["salad.tail_weight"].abs().min()) > 0
    model.zero_grad()
    again = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})(x)
    again.square().sum().backward()
    torch.testing.assert_close(again, out)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_text_is_in_no_pool() -> None:
    """Keys of text are always attended to: with other text pools stay as they are, and nothing is counted twice."""
    torch.manual_seed(0)
    inputs = (toys.tokens(105), toys.tokens(styles.TEXT))
    dense = styles.Single()
    expected = dense(*inputs)
    settings = {**SETTINGS, "linear_branch": False, "lora_rank": 0, "compensation": "tail", "compensation_pool": 1}
    model = salad_compile.convert(dense, settings, example_inputs=inputs)
    for name, parameter in model.named_parameters():
        if name.endswith("tail_weight"):
            parameter.data.zero_()
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_files_hold_it_and_older_ones_mean_none(tmp_path: Path) -> None:
    model, x = converted(**TAIL), toys.tokens(105)
    salad_compile.save(model, tmp_path / "tail.safetensors")
    torch.manual_seed(0)
    loaded = salad_compile.load(toys.SelfAttention(toys.positional), tmp_path / "tail.safetensors")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.salad.config.compensation == "tail"


def test_a_model_that_was_never_converted() -> None:
    x = toys.tokens(105)
    torch.manual_seed(0)
    model = toys.SelfAttention(toys.positional)
    expected = model(x)
    options = {"sparsity": 0.7, "query_block": 16, "key_block": 16, "min_tokens": 64, "lowering": "aot_eager"}
    found = []
    for more in ({"compensation": "none"}, TAIL):
        torch._dynamo.reset()
        out = torch.compile(model, backend="salad", options={**options, **more})(x)
        found.append(float((out - expected).norm() / expected.norm()))
    assert found[1] < 0.8 * found[0]


def test_what_it_costs_is_counted() -> None:
    from salad_compile.conversion.cost import site_cost

    without, with_pools = (site_cost(converted(**more).salad) for more in ({}, TAIL))
    assert with_pools.sparse - without.sparse == 2 * 2 * 105 * 4 * without.dense // (105 * 105 * 2 * 2)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="compensation"):
        salad_compile.SaladConfig(compensation="tails")
    for pool in (0, 48, 2.0):
        with pytest.raises(ConfigError, match="compensation_pool"):
            salad_compile.SaladConfig(compensation="tail", compensation_pool=pool)  # type: ignore[arg-type]


def test_means_are_of_valid_keys_of_the_video() -> None:
    """Pool 2 is short, and half of pool 1 is text: neither text nor masked keys are in a mean."""
    key, value = torch.randn(2, 1, 1, 40, 8).unbind(0)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 3] = False
    spec = AttentionSpec("topk", 300, 16, 16, "relu", compensation="tail", pool=16)
    where = segments("after", 40, 24)
    lut, count = torch.zeros(1, 1, 3, 1, dtype=torch.int32), torch.zeros(1, 1, 3, dtype=torch.int32)
    tail = tail_of(BlockCall(key, key, value, where, mask, {}, 1.0), SelectedBlocks(lut, count), spec)
    video = [j for j in range(16) if j != 3], list(range(16, 24))
    for pool, members in enumerate(video):
        torch.testing.assert_close(tail.key[0, 0, pool], key[0, 0, members].mean(0))
        torch.testing.assert_close(tail.value[0, 0, pool], value[0, 0, members].mean(0))
    assert (tail.key[0, 0, 2] == 0).all()
    assert tail.tokens[0, 0, 0].tolist() == [15, 8, 0]
