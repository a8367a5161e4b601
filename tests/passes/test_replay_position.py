"""map-then-rotate: the model's own position encoding on phi(query) and phi(key), in every way that models write one."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import salad_compile
from salad_compile.backend.exported_programs import rewrite_exported
from salad_compile.definition.linear_branch import LINEAR_EPS
from salad_compile.errors import NoEligibleSiteError, PositionReplayError
from salad_compile.kernels.linear.feature_maps import find_feature_map
from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.sites.eager_mode import running
from tests import toys
from tests.kernels.helpers import quadratic_attention
from tests.passes import rotary_styles as styles
from tests.support import Recorder, assert_same, check_rewrite, count_ops, randomise_branches, relative_error, run

# everything is kept: softmax attention is dense, and what remains is the linear branch
CONFIG = salad_compile.SaladConfig(
    compensation="none",
    sparsity=0.0,
    query_block=16,
    key_block=16,
    lora_rank=2,
    min_tokens=64,
    rope_placement="map-then-rotate",
    train_base=True,
)
STYLES = [
    *(styles.InPlace, styles.StackedFlat, styles.Halves, styles.Complex, styles.Partial, styles.Matrices, styles.Split),
    *(
        styles.Products,
        styles.Normed,
        styles.Modulated,
        styles.Overwritten,
        styles.Scaled,
        styles.Repeated,
        styles.Grouped,
    ),
    *(styles.Learned, styles.Single, styles.SingleCat, styles.Dual),
]
UNDETERMINED = {
    styles.Added: "add adds something else to it",
    styles.NormedAfter: "not known to be linear",
    styles.NormedParts: "not known to be linear",
    styles.Fused: "turn, on its way to attention, is not known to be linear",
    styles.FusedInPlace: "turn_in_place, on its way to attention, is not known to be linear",
}
# refused before position is looked at, with either placement
UNKNOWN_ROWS = {
    styles.Registers: "come from no one row of its query projection",
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs_of(style: type[styles.Rotary], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = {"x": toys.tokens(70, dtype=dtype)}
    return (
        {**inputs, "text": toys.tokens(styles.TEXT, dtype=dtype)}
        if issubclass(style, (styles.Single, styles.Dual))
        else inputs
    )


def converted(style: type[styles.Rotary], dtype: torch.dtype = torch.float64, **changes: Any) -> styles.Rotary:
    config = dataclasses.replace(CONFIG, **changes)
    torch.manual_seed(0)
    model = salad_compile.convert(style().to(dtype), config, example_inputs=inputs_of(style, dtype))
    randomise_branches(model)
    return model


def by_hand(model: styles.Rotary, x: Tensor, **text: Tensor) -> Tensor:
    """What the model should compute at sparsity 0, from its parameters and `rotated`."""
    branch = model.salad
    assert isinstance(branch, SaladBranch)
    phi, _ = find_feature_map(branch.config.feature_map)
    q, k, v = model.before(x, **text)
    scale = styles.HEAD_DIM**-0.5
    weights = (model.rotated(q) @ model.rotated(k).transpose(-1, -2) * scale).softmax(-1)
    rotated = (model.rotated(phi(q)), model.rotated(phi(k)))
    linear = quadratic_attention(q, k, v, branch.config.feature_map, LINEAR_EPS, None, *rotated)
    assert branch.gate_bias is not None
    gate = torch.sigmoid(x @ branch.gate_weight + branch.gate_bias).unsqueeze(-1)
    video = model.video_rows(linear.transpose(1, 2).flatten(2), x.shape[1])
    update = gate * nn.functional.linear(video, branch.proj_weight, branch.proj_bias)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return model.finish(model.with_update(out, update), x.shape[1])


# graphs that write in place, have complex numbers or two streams are split into forward and backward too
AOT = (styles.InPlace, styles.Complex, styles.Overwritten, styles.Dual)


@pytest.mark.parametrize("style", STYLES)
def test_the_models_own_rotation_is_applied_to_the_features(style: type[styles.Rotary]) -> None:
    model, inputs = converted(style), inputs_of(style)
    expected = run(lambda **given: by_hand(model, **given), inputs, parameters=model)
    actual = run(model, inputs)
    assert_same(actual, expected, bound=1e-11, gradient_bound=1e-9)
    recorder = check_rewrite(model, inputs, sites=1, lowering="aot_eager" if style in AOT else "eager")
    assert recorder.after["salad.linear_state"] == recorder.after["salad.linear_output"] == 1
    assert recorder.after["salad.projected"] == 0
    other = converted(style, rope_placement="rotate-then-map")
    assert relative_error(run(other, inputs, gradients=False).output, expected.output) > 1e-3, (
        "the placement is vacuous"
    )


MAPS = {styles.InPlace: "elu", styles.StackedFlat: "softmax", styles.Overwritten: "softmax", styles.Dual: "elu"}


# each way of writing with one map: what replays a rotation does not look at the map
@pytest.mark.parametrize(
    ("style", "feature_map"),
    [
        pytest.param(style, name, marks=() if name == chosen else pytest.mark.all_cases)
        for style, chosen in MAPS.items()
        for name in ("elu", "softmax")
    ],
)
def test_every_feature_map(style: type[styles.Rotary], feature_map: str) -> None:
    model, inputs = converted(style, feature_map=feature_map), inputs_of(style)
    expected = run(lambda **given: by_hand(model, **given), inputs, parameters=model)
    assert_same(run(model, inputs), expected, bound=1e-11, gradient_bound=1e-9)
    check_rewrite(model, inputs, sites=1)


# tests/models takes blocks of Wan through Inductor, with a replayed encoding; what comes before it is held above
@pytest.mark.all_cases
@pytest.mark.parametrize("style", [styles.InPlace, styles.Single])
def test_through_inductor(style: type[styles.Rotary]) -> None:
    model, inputs = converted(style, torch.float32, sparsity=0.6), inputs_of(style, torch.float32)
    expected = run(model, inputs)
    compiled = torch.compile(model, backend="salad", fullgraph=True)
    assert_same(run(compiled, inputs, parameters=model), expected)


@pytest.mark.parametrize("style", [styles.Plain, styles.NoTurn])
def test_without_a_turn_the_two_placements_are_one(style: type[styles.Rotary]) -> None:
    model, inputs = converted(style, sparsity=0.6), inputs_of(style)
    other = converted(style, sparsity=0.6, rope_placement="rotate-then-map")
    assert_same(run(model, inputs), run(other, inputs), bound=1e-12, gradient_bound=1e-10)
    recorder = check_rewrite(model, inputs, sites=1)
    assert recorder.after["relu"] == (0 if style is styles.Plain else 2)  # with nothing to replay, no features


def test_large_values() -> None:
    """The numerators may be negative, so the result is not bounded by the values (specification 5)."""
    model = converted(styles.InPlace)
    x = toys.tokens(70, dtype=torch.float64) * 1e3
    expected = run(lambda **given: by_hand(model, **given), {"x": x}, parameters=model)
    assert_same(run(model, {"x": x}), expected, bound=1e-11, gradient_bound=1e-8)


@pytest.mark.parametrize("style", UNDETERMINED)
def test_what_cannot_be_told_is_an_error_that_says_the_mend(style: type[styles.Rotary]) -> None:
    model = toys.Stack(style().double())
    names = list(model.state_dict())
    with pytest.raises(PositionReplayError, match=UNDETERMINED[style]):
        salad_compile.convert(model, CONFIG, example_inputs=inputs_of(style))
    assert list(model.state_dict()) == names
    # what conversion did not see
    config = dataclasses.replace(CONFIG, rope_placement="rotate-then-map")
    salad_compile.convert(model, config, example_inputs=inputs_of(style))
    branch = model.layers[0].salad
    branch.spec, branch.maps_before_position = CONFIG.spec.encode(), True
    with pytest.raises(PositionReplayError) as uncompiled:
        model(**inputs_of(style))
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager", "strict": False})
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(**inputs_of(style))
    assert isinstance(caught.value.inner_exception, PositionReplayError)
    for message in (str(uncompiled.value), str(caught.value.inner_exception)):
        assert UNDETERMINED[style] in message
        assert "'layers.0'" in message
        assert 'rope_placement="rotate-then-map"' in message


def test_a_write_that_no_function_shows_is_an_error() -> None:
    model = converted(styles.Unseen, rope_placement="rotate-then-map").requires_grad_(False)
    model.salad.spec, model.salad.maps_before_position = CONFIG.spec.encode(), True
    with pytest.raises(PositionReplayError, match="something writes into it"):
        model(**inputs_of(styles.Unseen))


def test_in_inference_mode() -> None:
    model = converted(styles.Single, torch.float32)
    inputs = inputs_of(styles.Single, torch.float32)
    expected = run(model, inputs, gradients=False)
    with torch.inference_mode():
        assert relative_error(model(**inputs), expected.output) < 1e-6


@pytest.mark.parametrize("style", [styles.Products, styles.Precise])
def test_in_autocast_the_encoding_runs_as_the_model_ran_it(style: type[styles.Rotary]) -> None:
    model = converted(style, torch.float32)
    x = toys.tokens(70)
    compiled = torch.compile(model, backend=Recorder({"lowering": "aot_eager"}), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), compiled(x)
    assert expected.dtype == actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < 1e-2
    assert relative_error(actual, model(x)) < 3e-2


@pytest.mark.parametrize("style", [styles.InPlace, pytest.param(styles.Complex, marks=pytest.mark.all_cases)])
def test_under_activation_checkpointing_and_with_another_length(style: type[styles.Rotary]) -> None:
    model = toys.Stack(style(), recompute=True)
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    recorder = check_rewrite(model, {"x": toys.tokens()}, sites=1)
    assert recorder.after["salad.linear_state"] == 1
    compiled = torch.compile(model, backend="salad", fullgraph=True, dynamic=True, options={"lowering": "aot_eager"})
    for count in (70, 133):
        inputs = {"x": toys.tokens(count)}
        assert_same(run(compiled, inputs, parameters=model), run(model, inputs))


def test_where_position_cannot_be_told_auto_leaves_it_where_it_is(tmp_path: Path) -> None:
    style, other = next(iter(UNDETERMINED)), styles.InPlace
    config = dataclasses.replace(CONFIG, rope_placement="auto")
    model, x = toys.Stack(style(), other()).double(), toys.tokens(70).double()
    noted = str(salad_compile.plan(model, (x,), config=config))
    assert "1 site would rotate before the feature map, layers.0 first: " in noted
    salad_compile.convert(model, config, example_inputs=(x,))
    randomise_branches(model)
    specs = [branch.decoded_spec().rope_placement for branch in branches(model).values()]
    assert specs == ["rotate-then-map", "map-then-rotate"]
    assert "Rotated before the feature map: 1 site, layers.0 first" in str(salad_compile.summary(model))
    assert [site.rotated_first for site in salad_compile.summary(model).sites] == [True, False]
    by_choice = dataclasses.replace(config, rope_placement="rotate-then-map")
    assert "would rotate" not in str(salad_compile.plan(toys.Stack(style()).double(), (x,), config=by_choice))
    expected = run(model, {"x": x}, gradients=False)
    recorder = check_rewrite(model, {"x": x}, sites=2)
    assert recorder.after["salad.linear_state"] == 2
    assert recorder.after["relu"] == 2  # the features of one site
    salad_compile.save(model, tmp_path / "salad.safetensors")
    again = toys.Stack(style(), other()).double()
    again.load_state_dict({name: value for name, value in model.state_dict().items() if ".salad." not in name})
    salad_compile.load(again, tmp_path / "salad.safetensors")
    assert torch.equal(run(again, {"x": x}, gradients=False).output, expected.output)


STRICT = {styles.InPlace: True, styles.Split: False, styles.Complex: False, styles.Overwritten: True}


# each way of writing through one way of tracing
@pytest.mark.parametrize(
    ("style", "strict"),
    [
        pytest.param(style, strict, marks=() if strict == chosen else pytest.mark.all_cases)
        for style, chosen in STRICT.items()
        for strict in (True, False)
    ],
)
def test_exported(style: type[styles.Rotary], strict: bool) -> None:
    model = toys.Stack(style()).eval()
    x = toys.tokens(70)
    salad_compile.convert(model, CONFIG, example_inputs=(x,))
    randomise_branches(model)
    program = torch.export.export(model, (x,), strict=strict)
    rewritten = rewrite_exported(program)
    assert relative_error(rewritten.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("style", UNKNOWN_ROWS)
@pytest.mark.parametrize("placement", ["map-then-rotate", "rotate-then-map"])
def test_rows_that_nobody_can_follow_are_refused(style: type[styles.Rotary], placement: str) -> None:
    model = toys.Stack(style().double())
    names = list(model.state_dict())
    config = dataclasses.replace(CONFIG, rope_placement=placement)
    with pytest.raises(NoEligibleSiteError, match=r"(?s)" + UNKNOWN_ROWS[style].replace(" ", r"\s+")):
        salad_compile.convert(model, config, example_inputs=inputs_of(style))
    assert list(model.state_dict()) == names


def test_an_exported_region_of_another_precision_is_followed() -> None:
    """torch.export makes a nested graph of it; the position encoding lies within."""
    model = toys.Stack(styles.Precise()).eval()
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    rewritten = rewrite_exported(torch.export.export(model, (toys.tokens(),)))
    assert count_ops(rewritten.graph_module)["salad.linear_state"] == 1
    assert relative_error(rewritten.module()(toys.tokens()), model(toys.tokens())) < 1e-6


def test_a_graph_break_leaves_the_module_uncompiled_and_the_same() -> None:
    class Broken(styles.InPlace):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().attend(q, k, v)

    model = converted(Broken, torch.float32)
    expected = run(model, {"x": toys.tokens()})
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    assert_same(run(compiled, {"x": toys.tokens()}, parameters=model), expected)


def test_the_eager_twin_keeps_nothing_of_a_forward() -> None:
    model = converted(styles.InPlace, torch.float32)
    kept: list[weakref.ref[Tensor]] = []
    model.q.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    with torch.no_grad():
        model(toys.tokens())
    gc.collect()
    assert len(kept) == 1
    assert kept[0]() is None
    assert running(model.salad) is None
