"""What of a model goes into one kernel, that it computes the same there, and what stays with the compiler and why."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

# Private: a GPU that need not be there (torch 2.11 and 2.13).
from torch._subclasses.fake_tensor import FakeTensorMode

import salad_compile
from salad_compile.calls.adapters import AttentionArguments
from salad_compile.passes import prepare_operands
from salad_compile.passes.attention_call import CONVERTED, AttentionCall
from tests import toys
from tests.passes import rotary_styles as styles
from tests.passes.emitted import emitted_graph
from tests.passes.test_replay_position import CONFIG, inputs_of
from tests.support import Recorder, assert_same, randomise_branches, relative_error, run


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class WanForm(styles.InPlace):
    """A norm over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(toys.WIDTH, eps=1e-6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return super().place(self.norm(x), angle)


class HeadForm(styles.Halves):
    """A norm of each head, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(styles.HEAD_DIM, eps=1e-5)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return super().place(self.norm(x.unflatten(-1, (-1, styles.HEAD_DIM))).flatten(-2), angle)


class FirstOfHeads(styles.Halves):
    """A norm of each head, behind the change of its axes."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        heads = F.rms_norm(styles.heads_of(x), (styles.HEAD_DIM,), None, 1e-3)
        return super().place(heads.transpose(1, 2).flatten(2), angle)


class WrittenOut(WanForm):
    """The same norm of single operations, as models write it."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return styles.InPlace.place(self, rows.to(x.dtype) * self.norm.weight, angle)


class Squared(styles.Halves):
    """In fp32 with products, no weight, and in the other order."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        rows = styles.heads_of(x).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(1e-3 + (rows * rows).mean(dim=-1, keepdim=True))
        return super().place((scale * rows).type_as(x).flatten(2), angle)


class Fused(styles.StackedFlat):
    """One projection of query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(toys.WIDTH, 3 * toys.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        angle = styles.angles(x.shape[1], x.dtype)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = self.attend(self.place(q, angle), self.place(k, angle), styles.heads_of(v))
        return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Moved(styles.Halves):
    """Both halves before the samples, by another name of the move."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        one, two = styles.heads_of(x).unflatten(-1, (2, -1)).movedim(-2, 0)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([one * cos - two * sin, two * cos + one * sin]).moveaxis([0, 1], [-2, 0]).flatten(-2)


ON = {"prepare_operands": True}
PREPARED = (
    *(
        WanForm,
        HeadForm,
        FirstOfHeads,
        WrittenOut,
        Squared,
        Fused,
        Moved,
        styles.InPlace,
        styles.StackedFlat,
        styles.Halves,
        styles.Complex,
    ),
    *(styles.Partial, styles.Matrices, styles.Normed),
)
LEFT = {
    styles.Split: "addcmul writes into a value that is also read",
    styles.Products: "it is not known what einsum does to its channels",
    styles.Overwritten: "it is scaled, or overwritten",
    styles.Scaled: "it is scaled, or overwritten",
    styles.Repeated: "its rows are no samples, tokens, heads and channels",
    styles.Learned: "other channels are turned than the first ones of each head",
    styles.Single: "it is scaled, or overwritten",
    styles.SingleCat: "position is applied to some of its tokens alone",
    styles.Dual: "position is not in one stream of it alone",
}


def converted(style: type[styles.Rotary], dtype: torch.dtype, **changes: Any) -> styles.Rotary:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, sparsity=0.6, **changes)
    model = salad_compile.convert(style().to(dtype), config, example_inputs=inputs_of(style, dtype))
    randomise_branches(model)
    return model


def compiled(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Recorder]:
    recorder = Recorder({"lowering": "eager", "prepare_operands": True, **options})
    with torch.no_grad():
        return torch.compile(model, backend=recorder, fullgraph=True)(**inputs), recorder


# the others compute the same by other operations
ALWAYS = {
    WanForm,
    HeadForm,
    Fused,
    Moved,
    styles.Complex,
    styles.Partial,
    styles.Matrices,
    styles.Scaled,
    styles.SingleCat,
}


def some(found: Iterable[type[styles.Rotary]]) -> list[Any]:
    """One of each kind; the rest only with --all-cases."""
    return [pytest.param(style, marks=() if style in ALWAYS else pytest.mark.all_cases) for style in found]


@pytest.mark.parametrize("feature_map", ["relu", pytest.param("softmax", marks=pytest.mark.all_cases)])
@pytest.mark.parametrize("style", some(PREPARED))
def test_one_operator_computes_what_the_model_does(style: type[styles.Rotary], feature_map: str) -> None:
    model, inputs = converted(style, torch.float64, feature_map=feature_map), inputs_of(style)
    with torch.no_grad():
        expected = model(**inputs)
    actual, recorder = compiled(model, inputs)
    assert recorder.after["salad.prepare_operand"] == 2
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("style", some(LEFT))
def test_what_is_not_known_is_left_with_its_reason(
    style: type[styles.Rotary], caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = converted(style, torch.float64), inputs_of(style)
    with torch.no_grad():
        expected = model(**inputs)
    with caplog.at_level(logging.INFO, "salad_compile"):
        actual, recorder = compiled(model, inputs)
    assert recorder.after["salad.prepare_operand"] == 0
    assert relative_error(actual, expected) < 1e-12
    assert f"its query and key are left to the compiler: {LEFT[style]}" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.all_cases)])
def test_in_16_bits_it_rounds_where_the_model_does(dtype: torch.dtype) -> None:
    """As close to the model in fp64 as the model itself: what it rounds more often than ours is one product."""
    model, inputs = converted(WanForm, dtype), inputs_of(WanForm, dtype)
    exact, wide = converted(WanForm, torch.float64), {"x": inputs["x"].double()}
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain, expected = model(**inputs), exact(**wide)
    actual, recorder = compiled(model, inputs)
    assert recorder.after["salad.prepare_operand"] == 2
    # blocks are chosen by means, and one that was rounded otherwise may choose another block
    assert relative_error(actual, expected) < 1.5 * relative_error(plain, expected) + 1e-3


@pytest.mark.parametrize("feature_map", ["relu", pytest.param("softmax", marks=pytest.mark.all_cases)])
@pytest.mark.parametrize("style", some(PREPARED))
def test_training_has_the_gradients_of_the_model(style: type[styles.Rotary], feature_map: str) -> None:
    model = converted(style, torch.float64, train_base=True, feature_map=feature_map)
    inputs = inputs_of(style)
    expected = run(model, inputs)
    recorder = Recorder({"lowering": "aot_eager", "prepare_operands": True})
    actual = run(torch.compile(model, backend=recorder), inputs, parameters=model)
    assert recorder.after["salad.prepare_operand"] == 2
    assert_same(actual, expected)


@pytest.mark.parametrize("asked", [False, "auto"])
def test_on_the_cpu_it_has_to_be_asked_for(asked: bool | str) -> None:
    model, inputs = converted(WanForm, torch.float64), inputs_of(WanForm)
    _, recorder = compiled(model, inputs, prepare_operands=asked)
    assert recorder.after["salad.prepare_operand"] == 0
    assert recorder.after["salad.linear_output"] == 1


@pytest.mark.parametrize(
    ("device", "trains", "faster"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_by_default_it_runs_on_a_gpu_in_inference(device: str, trains: bool, faster: bool) -> None:
    query = fx.Graph().placeholder("query")
    with FakeTensorMode():
        query.meta["example_value"] = torch.empty(1, 2, 64, 16, device=device, requires_grad=trains)
    arguments = AttentionArguments(query=query, key=query, value=query)
    call = AttentionCall(query, arguments, None, CONVERTED, "")
    assert prepare_operands._is_faster(call) == faster


NORMS = {
    WanForm: ["rms", "width", 1e-6, True],
    HeadForm: ["layer", "head", 1e-5, True],
    FirstOfHeads: ["rms", "head", 1e-3, False],
    WrittenOut: ["rms", "width", 1e-6, True],
    Squared: ["rms", "head", 1e-3, False],
    styles.Halves: ["none", "head", 0.0, False],
}


@pytest.mark.parametrize("style", NORMS)
def test_the_norm_is_in_the_kernel(style: type[styles.Rotary]) -> None:
    graph = emitted_graph(converted(style, torch.float32), *inputs_of(style, torch.float32).values(), **ON)
    calls = [node for node in graph.nodes if node.target is torch.ops.salad.prepare_operand.default]
    assert len(calls) == 2
    for call in calls:
        norm, over, eps, weight = call.args[3], call.args[4], call.args[5], call.args[8]
        assert [norm, over, eps, weight is not None] == NORMS[style]


class FourthPower(WrittenOut):
    """A norm that is none of ours."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return styles.InPlace.place(self, x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6), angle)


class OfAnother(WrittenOut):
    """Divided by the size of something else."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return styles.InPlace.place(self, x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6), angle)


@pytest.mark.parametrize("style", [FourthPower, OfAnother])
def test_another_norm_stays_before_the_kernel(style: type[styles.Rotary]) -> None:
    model, inputs = converted(style, torch.float64), inputs_of(style)
    with torch.no_grad():
        expected = model(**inputs)
    graph = emitted_graph(model, *inputs.values(), **ON)
    calls = [node for node in graph.nodes if node.target is torch.ops.salad.prepare_operand.default]
    assert [call.args[3] for call in calls] == ["none", "none"]
    torch._dynamo.reset()
    assert relative_error(compiled(model, inputs)[0], expected) < 1e-12


class ReadTwice(WanForm):
    """The normalised query goes somewhere else too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.last.mean()

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        self.last = self.norm(x)
        return styles.InPlace.place(self, self.last, angle)


class WrittenLater(WanForm):
    """The table changes before attention reads."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        out = super().place(x, angle)
        angle.mul_(2)
        return out


class Backwards(styles.Rotary):
    """Turned the other way round."""

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        return styles.turned(styles.heads_of(x), -angle)


def test_another_reader_keeps_the_models_own_operations(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = converted(ReadTwice, torch.float64), inputs_of(WanForm)
    with torch.no_grad():
        expected = model(**inputs)
    with caplog.at_level(logging.INFO, "salad_compile"):
        actual, recorder = compiled(model, inputs)
    assert recorder.after["salad.prepare_operand"] == 0
    assert "mean reads it as well" in caplog.text
    assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("style", [WrittenLater, Backwards])
def test_other_tables_are_right_all_the_same(style: type[styles.Rotary]) -> None:
    model, inputs = converted(style, torch.float64), inputs_of(style)
    with torch.no_grad():
        expected = model(**inputs)
    actual, _ = compiled(model, inputs)
    assert relative_error(actual, expected) < 1e-12


def test_lengths_may_be_symbols() -> None:
    model, inputs = converted(WanForm, torch.float64), inputs_of(WanForm)
    recorder = Recorder({"lowering": "eager", "prepare_operands": True})
    function = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    for tokens in (70, 97):
        inputs = {"x": toys.tokens(tokens, dtype=torch.float64)}
        with torch.no_grad():
            actual = function(**inputs)
            assert relative_error(actual, model(**inputs)) < 1e-12
    assert recorder.graphs == 1
    assert recorder.after["salad.prepare_operand"] == 2
