"""Compensation beside every selection: what has to hold whichever blocks are chosen."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import salad_compile
from salad_compile.definition.attention import sparse_attention
from salad_compile.definition.pattern import BlockCall
from salad_compile.definition.patterns import find
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.token_layout import segments
from salad_compile.errors import AlreadyConvertedError
from tests import toys
from tests.salad_compile.definition.test_compensation import SETTINGS, TAIL, converted, distance, masked, without_branch

PATTERNS = ("topk", "mass8", "mass16", "error8", "error16")
BOUND = {"rtol": 1e-6, "atol": 1e-7}  # operands are fp64; log-weights and logarithms of counts are fp32
DENSE = AttentionSpec("topk", 300, 16, 16, "relu", linear_branch=False, compensation="tail", pool=32)


def call_of(seed: int, tokens: int, text: int = 0, dtype: torch.dtype = torch.float64) -> BlockCall:
    """Random operands, a mask in every other one, text behind the video, and a log-weight for each head."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 2, tokens, 8, generator=draw, dtype=dtype) for _ in range(3)]
    query, key, value = (tensor.requires_grad_() for tensor in tensors)
    mask = torch.rand(2, tokens, generator=draw) < 0.8 if seed % 2 else None
    where = segments("after" if text else "none", tokens, tokens - text)
    weight = torch.randn(2, generator=draw, dtype=dtype).requires_grad_()
    return BlockCall(query, key, value, where, mask, {"tail_weight": weight}, 0.4)


def ours(call: BlockCall, spec: AttentionSpec) -> Tensor:
    return sparse_attention(call.query, call.key, call.value, call.where, spec, call.scale, call.key_mask, call.branch)


def written_out(call: BlockCall, spec: AttentionSpec) -> Tensor:
    """One softmax over the selected keys and the means of the others' pools, row by row, in plain torch."""
    selected = find(spec.pattern).select(call, spec)
    batch, heads, tokens, _ = call.query.shape
    valid = torch.ones(batch, tokens, dtype=torch.bool) if call.key_mask is None else call.key_mask
    position = torch.arange(tokens)
    video = (position >= call.where.video_begin) & (position < call.where.video_end)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                block = i // spec.query_block
                count = int(selected.count[b, h, block])
                ids = selected.lut[b, h, block, :count] if count >= 0 else torch.arange(-(-tokens // spec.key_block))
                seen = torch.isin(position // spec.key_block, ids)
                keys, values = [call.key[b, h, seen & valid[b]]], [call.value[b, h, seen & valid[b]]]
                added = [torch.zeros(keys[0].shape[0], dtype=call.query.dtype)]
                for first in range(0, tokens, spec.pool):
                    inside = video & valid[b] & (position >= first) & (position < first + spec.pool)
                    left = int((inside & ~seen).sum())
                    if left:
                        keys.append(call.key[b, h, inside].mean(0, keepdim=True))
                        values.append(call.value[b, h, inside].mean(0, keepdim=True))
                        added.append((math.log(left) + call.branch["tail_weight"][h])[None])
                scores = torch.cat(keys) @ call.query[b, h, i] * call.scale + torch.cat(added)
                rows.append(torch.softmax(scores, 0) @ torch.cat(values))
    return torch.stack(rows).view(batch, heads, tokens, -1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("number", range(3))
def test_it_is_one_softmax_over_what_is_selected_and_means_of_the_rest(pattern: str, number: int) -> None:
    """Output and all gradients, also through the means, over random lengths, blocks, pools, masks and text."""
    draw = torch.Generator().manual_seed(100 * number + PATTERNS.index(pattern))

    def one_of(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    text, key_block = (one_of(0, 7), one_of(16, 32))
    spec = dataclasses.replace(DENSE, pattern=pattern, query_block=one_of(16, 32), key_block=key_block)
    spec = dataclasses.replace(spec, pool=key_block * one_of(1, 2), permille=one_of(0, 100, 200))
    call = call_of(number, one_of(97, 112, 121), text)
    inputs = (call.query, call.key, call.value, call.branch["tail_weight"])
    actual, expected = ours(call, spec), written_out(call, spec)
    torch.testing.assert_close(actual, expected, **BOUND)
    grad = torch.randn(expected.shape, generator=draw, dtype=expected.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **BOUND)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_left_out_and_pools_of_one_token_are_dense(pattern: str) -> None:
    """Nothing left out: to the bit what it is without compensation."""
    assert distance(without_branch(pattern=pattern, sparsity=0.0, **TAIL)) < 1e-5
    call = call_of(1, 90, dtype=torch.float32)
    everything = dataclasses.replace(DENSE, pattern=pattern, permille=1000)
    assert torch.equal(ours(call, everything), ours(call, dataclasses.replace(everything, compensation="none", pool=0)))
    for attend in (toys.positional, masked):
        model = without_branch(attend, pattern=pattern, compensation="tail", compensation_pool=1)
        model.salad.tail_weight.data.zero_()
        assert distance(model, attend) < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_text_and_masked_keys_are_in_no_pool(pattern: str) -> None:
    """Whatever text and masked keys hold, the pools, and how many tokens they stand for, stay as they are."""
    from salad_compile.definition.compensation import tail_of

    call, spec = call_of(1, 90, text=20), dataclasses.replace(DENSE, pattern=pattern)
    assert call.key_mask is not None
    none_of_it = ~call.key_mask | (torch.arange(90) >= 70)
    other = [torch.where(none_of_it[:, None, :, None], 50.0, t.detach()) for t in (call.key, call.value)]
    selected = find(pattern).select(call, spec)
    before, after = (tail_of(c, selected, spec) for c in (call, call._replace(key=other[0], value=other[1])))
    for mine, theirs in zip(before[:3], after[:3], strict=True):
        assert torch.equal(mine, theirs)
    stood_for = before.tokens.sum(-1)
    assert float(stood_for.max()) <= int((~none_of_it).sum(-1).max())
    assert float(stood_for.max()) > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_runs_are_the_same_to_the_bit(pattern: str) -> None:
    model, x = converted(pattern=pattern, **TAIL), toys.tokens(105)
    found = []
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 5
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_file_goes_into_no_model_of_another_configuration(pattern: str, tmp_path: Path) -> None:
    """Trained without compensation it loads as without; a model with it, or of another pattern, takes no such file."""
    model, x = converted(pattern=pattern), toys.tokens(105)
    file = salad_compile.save(model, tmp_path / "without.safetensors")
    torch.manual_seed(0)
    loaded = salad_compile.load(toys.SelfAttention(toys.positional), file)
    assert "tail_weight" not in dict(loaded.salad.named_parameters())
    assert torch.equal(loaded(x), model(x))
    for changes, said in ((TAIL, "compensation"), ({"pattern": "stswa"}, "pattern")):
        with pytest.raises(AlreadyConvertedError, match=said):
            salad_compile.load(converted(**{"pattern": pattern, **changes}), file)
    assert SETTINGS["compensation"] == "none"
