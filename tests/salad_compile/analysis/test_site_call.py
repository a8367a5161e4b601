"""What observers see and compute, held against full softmax matrices in fp64; and forwards that are run for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.analysis.forwards import converted_branches, forward_inputs, run_observed
from salad_compile.analysis.site_call import SiteCall, Sparse, observe
from salad_compile.conversion.schedules import dense, set_dense, set_sparsity
from salad_compile.definition.attention import salad_of
from salad_compile.definition.token_layout import reordering, reordering_in_place
from salad_compile.errors import ConfigError, InputsError, NotConvertedError, PatternError
from tests import support, toys
from tests.models.registry import ALL_CASES
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY, relative_error


def converted(name: str = "Wan", **changes: Any) -> nn.Module:
    """A case of the zoo with branches that all contribute."""
    return support.converted(ALL_CASES[name], **changes)


def inputs_of(name: str = "Wan", resolution: int = 0) -> dict[str, Any]:
    return ALL_CASES[name].inputs(resolution)


def calls_of(model: nn.Module, inputs: Any) -> list[SiteCall]:
    seen: list[SiteCall] = []
    run_observed(model, forward_inputs(model, inputs), lambda number, call: seen.append(call), "test")
    return seen


def positions(call: SiteCall, head: int, temporal_heads: Tensor | None) -> Tensor:
    """int64 (S,): the position of each token in the order of the blocks of this head."""
    order, side, tokens = call.given.order, call.given.side, call.given.key.shape[2]
    if order is None:
        return torch.arange(tokens)
    if temporal_heads is None:
        return reordering(order, side, tokens).inverse.long()
    return reordering_in_place(order, side, tokens).inverse.long() if temporal_heads[head] else torch.arange(tokens)


def computed_pairs(call: SiteCall, sparse: Sparse, temporal_heads: Tensor | None = None) -> Tensor:
    """bool (B, H, S, S): which pairs of tokens the listed blocks hold, one query at a time."""
    batch, heads, tokens, _ = call.given.query.shape
    pairs = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        at = positions(call, head, temporal_heads)
        key_blocks = at // call.spec.key_block
        for b in range(batch):
            for token in range(tokens):
                row = int(at[token]) // call.spec.query_block
                count = int(sparse.count[b, head, row])
                listed = sparse.lut[b, head, row, :count]
                pairs[b, head, token] = True if count == -1 else torch.isin(key_blocks, listed.long())
    return pairs


def softmax_matrix(call: SiteCall) -> Tensor:
    """fp64 (B, H, S, S): the dense attention weights."""
    scores = call.given.query.double() @ call.given.key.double().transpose(2, 3) * call.scale
    if call.given.key_mask is not None:
        scores = scores.masked_fill(~call.given.key_mask[:, None, None], float("-inf"))
    return scores.softmax(dim=-1)


CALLS = [("Wan", {}), ("Wan", {"pattern": "stswa"}), ("CogVideoX", {}), ("HunyuanVideo", {}), ("Cosmos3Omni", {})]


@pytest.mark.parametrize(("name", "changes"), CALLS, ids=["topk", "stswa", "joint", "masked", "prefix"])
def test_outputs_and_recall_equal_full_matrices(name: str, changes: dict[str, Any]) -> None:
    call = calls_of(converted(name, **changes), inputs_of(name))[-1]
    temporal = call.given.branch.get("temporal_heads")
    value, weights, rows = call.given.value.double(), softmax_matrix(call), call.rows()
    dense, sparse = call.dense(), call.sparse()
    kept = weights * computed_pairs(call, sparse, temporal)
    mass = kept.sum(dim=-1)
    for actual, expected in ((dense.out, weights @ value), (sparse.out, kept @ value / mass[..., None])):
        assert relative_error(actual.transpose(1, 2)[rows], expected.transpose(1, 2)[rows]) < 1e-5
    recall = (sparse.lse - dense.lse).exp().transpose(1, 2)[rows]
    torch.testing.assert_close(recall.double(), mass.transpose(1, 2)[rows], atol=1e-5, rtol=1e-5)
    assert 0.1 < recall.mean() < 0.9
    assert (recall <= 1 + 1e-5).all()


def test_rows_are_the_video_s_without_what_a_mask_hides() -> None:
    for name, side, video in (
        ("CogVideoX", "before", 154),
        ("HunyuanVideo", "after", 154),
        ("Cosmos3Omni", "before", 154),
    ):
        call = calls_of(converted(name), inputs_of(name))[0]
        assert call.given.side == side
        tokens = call.given.key.shape[2]
        where = torch.arange(tokens) >= tokens - video if side == "before" else torch.arange(tokens) < video
        assert torch.equal(call.rows(), where.expand(call.given.key.shape[0], -1))
        assert tokens > video
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, -3:] = False
    masked = dataclasses.replace(call, given=call.given._replace(key_mask=mask))
    assert int(masked.rows().sum()) == video - 3


@pytest.mark.parametrize(("gate", "scaling"), [("token", "v1"), ("head", "v2")])
def test_the_update_is_the_linear_branch_by_hand(gate: str, scaling: str) -> None:
    model = converted(gate=gate, scaling=scaling, rope_placement="rotate-then-map")
    call = calls_of(model, inputs_of())[0]
    query, key, value = (t.double().relu() if i < 2 else t.double() for i, t in enumerate(call.given[:3]))
    state, total = key.transpose(2, 3) @ value, key.sum(dim=2, keepdim=True)
    linear = query @ state / (query @ total.transpose(2, 3) + 1e-6)
    branch, seen = call.branch, call.gate()
    assert seen is not None
    if scaling == "v2":
        linear = linear * branch.head_scale.detach().double()[:, None, None]
    flat = linear.transpose(1, 2).flatten(2)
    flat = F.linear(flat, branch.proj_weight.detach().double(), branch.proj_bias.detach().double())
    expected = seen.double().unsqueeze(-1) * flat.view(*flat.shape[:2], 2, -1)
    if scaling == "v2":
        expected = expected * branch.layer_scale.detach().double()
    update = call.update()
    assert update is not None
    assert relative_error(update, expected.transpose(1, 2)) < 1e-5
    assert seen.shape == (1, 154, 2 if gate == "head" else 1)


@pytest.mark.parametrize(("name", "changes"), CALLS[:4], ids=["topk", "stswa", "joint", "masked"])
def test_sparse_and_update_add_up_to_what_the_site_computes(name: str, changes: dict[str, Any]) -> None:
    for call in calls_of(converted(name, **changes), inputs_of(name)):
        update = call.update()
        assert update is not None
        with torch.no_grad():
            whole = salad_of(call.given, call.spec, call.scale)
        assert relative_error(call.sparse().out + update, whole) < 1e-6
        assert relative_error(call.sparse().out, whole) > 1e-2


def test_other_sparsities_patterns_and_orders_of_a_site() -> None:
    model = converted(lowest_sparsity=0.0)
    call = calls_of(model, inputs_of())[0]
    full = call.dense()
    assert relative_error(call.sparse(0.0).out, full.out) < 1e-6
    errors = [relative_error(call.sparse(sparsity).out, full.out) for sparsity in (0.3, 0.6, 0.9)]
    assert errors == sorted(errors)
    assert torch.equal(call.sparse(0.7).out, call.sparse().out)
    set_sparsity(model, 0.3)
    assert torch.equal(calls_of(model, inputs_of())[0].sparse().out, call.sparse(0.3).out)
    windowed = calls_of(converted(pattern="stswa"), inputs_of())[0]  # the first site: the same queries reach it
    assert torch.equal(call.sparse(0.7, pattern="stswa").out, windowed.sparse().out)
    assert torch.equal(windowed.sparse(pattern="topk").out, call.sparse(0.7).out)
    heads = torch.tensor([True, True])
    through_time, mixed = windowed.sparse(tensors={"temporal_heads": heads}).out, windowed.sparse().out
    assert torch.equal(through_time[:, 1], mixed[:, 1])
    assert relative_error(through_time[:, 0], mixed[:, 0]) > 1e-2


def test_windows_need_a_grid() -> None:
    model = salad_compile.convert(toys.Stack(toys.SelfAttention()), TINY, example_inputs=(toys.tokens(100),))
    call = calls_of(model, (toys.tokens(100),))[0]
    with pytest.raises(PatternError, match="token grid"):
        call.sparse(pattern="stswa")


def test_observers_nest_and_leave() -> None:
    model, first, second = converted(), [], []
    with observe(first.append), torch.no_grad():
        model(**inputs_of())
        with observe(second.append):
            model(**inputs_of())
    model(**inputs_of())
    assert (len(first), len(second)) == (4, 2)


def test_a_run_leaves_no_trace_and_takes_no_notice_of_modes() -> None:
    model = converted().train()
    model.blocks[0].eval()
    before = fingerprint(model)
    modes = [module.training for module in model.modules()]
    with dense(model):
        calls = calls_of(model, inputs_of())
        assert all(call.branch.switch.dense for call in calls)
    assert len(calls) == 2
    assert not calls[0].branch.switch.dense
    assert [module.training for module in model.modules()] == modes
    assert_unchanged(model, before)
    with pytest.raises(InputsError):
        calls_of(model, {**inputs_of(), "timestep": None})
    assert [module.training for module in model.modules()] == modes


def test_compiled_models_are_run_uncompiled() -> None:
    model = converted()
    expected = [call.dense().out for call in calls_of(model, inputs_of())]
    torch._dynamo.reset()
    model.blocks[0].compile(backend="salad", options={"lowering": "eager"})
    model.blocks[1] = torch.compile(model.blocks[1], backend="salad", options={"lowering": "eager"})
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    with torch.no_grad():
        before = compiled(**inputs_of()).sample
    bare, branches = converted_branches(compiled, "test")
    assert bare is model
    assert len(branches) == 2
    calls = calls_of(bare, inputs_of())
    assert all(torch.equal(call.dense().out, out) for call, out in zip(calls, expected, strict=True))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(**inputs_of()).sample, before)


def test_inputs_in_every_form() -> None:
    model, inputs = converted(), inputs_of()
    positional = (inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    for one in (inputs, positional):
        assert len(forward_inputs(model, one)) == 1
    several = [inputs, positional]
    for many in (several, (inputs, inputs), iter(several), (each for each in several)):
        assert len(forward_inputs(model, many)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 4, 2, 14, 22), "cannot be a Tensor"),
        ("latents", "cannot be a str"),
        (None, "cannot be a NoneType"),
        ([], "no inputs"),
        ([torch.zeros(3)], "cannot be a Tensor"),
        ({"hidden_state": 1}, "hidden_states"),
    ],
)
def test_what_is_no_input_is_said_before_anything_runs(wrong: Any, message: str) -> None:
    with pytest.raises(InputsError, match=message):
        forward_inputs(ALL_CASES["Wan"].build(), wrong)


@pytest.mark.parametrize("shape", [(1, 4, 14, 22), (1, 5, 2, 14, 22), (0,)])
def test_wrong_shapes_are_input_errors_and_the_model_stays(shape: tuple[int, ...]) -> None:
    model = converted()
    before = fingerprint(model)
    with pytest.raises(InputsError, match="inputs number 1") as caught:
        calls_of(model, [inputs_of(), {**inputs_of(), "hidden_states": torch.zeros(shape)}])
    assert caught.value.__cause__ is not None
    assert_unchanged(model, before)


def test_errors_of_a_callback_are_its_own() -> None:
    def fail(number: int, call: SiteCall) -> None:
        raise ValueError("of the callback")

    model = converted()
    with pytest.raises(ValueError, match="of the callback") as caught:
        run_observed(model, forward_inputs(model, inputs_of()), fail, "test")
    assert not isinstance(caught.value, InputsError)
    set_dense(model, False)


def test_sites_that_do_not_run_are_named() -> None:
    model = converted()
    model.blocks = model.blocks[:1]
    model.spare = ALL_CASES["Wan"].build()
    model.spare.blocks[1] = converted().blocks[1]
    with pytest.raises(InputsError, match=r"without its converted sites blocks\.1\.attn1"):
        calls_of(model, inputs_of())


def test_what_is_not_converted() -> None:
    with pytest.raises(NotConvertedError, match="convert"):
        converted_branches(ALL_CASES["Wan"].build(), "test")

    class Pipeline:
        transformer = ALL_CASES["Wan"].build()

    with pytest.raises(ConfigError, match=r"pipe\.transformer"):
        converted_branches(Pipeline(), "test")
