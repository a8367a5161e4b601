"""Every way in which a model is compiled, on a converted one: outputs and gradients are those of its eager twin.

Each way goes as far as it makes a difference: most end with Dynamo and our passes, some with AOTAutograd, the modes
with Inductor, which takes ten times as long. The zoo (tests/models) holds Inductor against real models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.backend.dynamo import record_graphs
from salad_compile.passes.report import GraphReport
from tests import support, toys
from tests.models.zoo import CASES
from tests.support import assert_same, randomise_branches, relative_error, run, seeded

ROOT = Path(__file__).parents[2]
Compiled = Callable[..., Any]
WIDTH = toys.WIDTH
EAGER: dict[str, Any] = {"backend": "salad", "options": {"lowering": "eager"}}
AOT: dict[str, Any] = {"backend": "salad", "options": {"lowering": "aot_eager"}}
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=48
)


class Block(nn.Module):
    """Self-attention with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = toys.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attn(x)
        return out


class Video(nn.Module):
    """The least that has a patch convolution, which shows the grid of tokens, and repeated blocks."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.reentrant: bool | None = None  # activation checkpointing, and which

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, T, 2 * H, 2 * W) -> (B, T * H * W, 4)."""
        tokens = self.patch(x).flatten(2).transpose(1, 2).contiguous()
        for block in self.blocks:
            tokens = block(tokens) if self.reentrant is None else self.recomputed(block, tokens)
        out: Tensor = self.head(tokens)
        return out

    def recomputed(self, block: nn.Module, tokens: Tensor) -> Any:
        return checkpoint(block, tokens, use_reentrant=self.reentrant)


def video(frames: int = 3, height: int = 5, width: int = 7) -> dict[str, Tensor]:
    """Inputs for that many tokens along time, height and width."""
    generator = torch.Generator().manual_seed(frames + 100 * height + 10_000 * width)
    return {"x": torch.randn(1, 4, frames, 2 * height, 2 * width, generator=generator)}


def converted(blocks: int = 2) -> Video:
    with seeded(0):
        model = salad_compile.convert(Video(blocks), CONFIG, example_inputs=video())
    assert model.blocks[0].attn.salad.grid is not None, "no token order: less than a real model has"
    randomise_branches(model)
    return model


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(
    compile_it: Callable[[Video], Compiled], model: Video | None = None, inputs: dict[str, Tensor] | None = None
) -> list[GraphReport]:
    """Compile a model and hold it against its eager twin. All that Dynamo handed over became SALAD."""
    model, inputs = model or converted(), inputs or video()
    expected = run(model, inputs)
    with record_graphs() as graphs:
        actual = run(compile_it(model), inputs, parameters=model)
    assert_same(actual, expected)
    assert not any(graph.lost or graph.count("dense") for graph in graphs)
    return graphs


def sites(graphs: list[GraphReport]) -> list[int]:
    """How many calls of each graph became SALAD, without graphs that have no attention."""
    return [graph.count("salad") for graph in graphs if graph.calls]


# ---------------------------------------------------------------- what is compiled


def test_whole_model() -> None:
    assert sites(check(lambda model: torch.compile(model, **AOT))) == [2]


def test_whole_model_fullgraph() -> None:
    graphs = check(lambda model: torch.compile(model, fullgraph=True, **EAGER))
    assert len(graphs) == 1


def test_module_compile() -> None:
    def compile_it(model: Video) -> Compiled:
        model.compile(fullgraph=True, **EAGER)
        return model

    assert sites(check(compile_it)) == [2]


def test_blocks_share_one_graph() -> None:
    def compile_it(model: Video) -> Compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, **EAGER)
        return model

    # the input of the first block needs no gradient, that of all others does
    assert sites(check(compile_it, converted(blocks=3))) == [1, 1]


def test_compile_repeated_blocks() -> None:
    case = CASES["Wan"]
    model: Any = support.converted(case)
    expected = run(model, case.inputs(0), case.output)
    model.compile_repeated_blocks(fullgraph=True, **EAGER)
    with record_graphs() as graphs:
        actual = run(model, case.inputs(0), case.output)
    assert_same(actual, expected)
    assert sites(graphs) == [1, 1]


def test_a_compiled_block_inside_a_compiled_model() -> None:
    def compile_it(model: Video) -> Compiled:
        model.blocks[0].compile(**EAGER)
        model.blocks[1] = torch.compile(model.blocks[1], **EAGER)
        return torch.compile(model, **EAGER)

    assert sum(sites(check(compile_it))) == 2


def test_a_block_that_is_left_out_runs_as_its_eager_twin() -> None:
    def compile_it(model: Video) -> Compiled:
        model.blocks[0].forward = torch.compiler.disable(model.blocks[0].forward)
        return torch.compile(model, **EAGER)

    assert sites(check(compile_it)) == [1]


def test_an_attention_module_that_is_left_out_runs_as_its_eager_twin() -> None:
    def compile_it(model: Video) -> Compiled:
        model.blocks[0].attn.forward = torch.compiler.disable(model.blocks[0].attn.forward)
        return torch.compile(model, **EAGER)

    assert sites(check(compile_it)) == [1]


# ---------------------------------------------------------------- modes


# test_modes_and_inductor_options_reach_inductor (tests/salad_compile/backend/test_dynamo.py) holds that each mode turns
# on what it should, and tests/models and test_caches.py take models through it: on a CPU the code is much the same
@pytest.mark.all_cases
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    graphs = check(lambda model: torch.compile(model, backend="salad", mode=mode), converted(blocks=2))
    assert sites(graphs) == [2]


# ---------------------------------------------------------------- shapes


def test_dynamic() -> None:
    model = converted(blocks=1)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, **AOT)
    for size in [(3, 5, 7), (2, 6, 9)]:
        assert_same(run(compiled, video(*size), parameters=model), run(model, video(*size)))


@pytest.mark.parametrize("per_block", [False, True], ids=["whole", "per_block"])
def test_eight_more_resolutions_recompile_nothing(per_block: bool) -> None:
    model = converted()
    compiled: Compiled = model if per_block else torch.compile(model, fullgraph=True, **EAGER)
    if per_block:
        for block in model.blocks:
            block.compile(fullgraph=True, **EAGER)
    resolutions = [(3, 5, 7), (4, 6, 9)]
    more = [(2, 5, 8), (5, 5, 8), (3, 9, 7), (4, 4, 6), (7, 3, 5), (2, 6, 10), (6, 8, 3), (9, 4, 5)]
    twin = converted()
    for number, size in enumerate(resolutions + more):
        with torch._dynamo.config.patch(error_on_recompile=number >= len(resolutions)), torch.no_grad():
            assert relative_error(compiled(**video(*size)), twin(**video(*size))) < 1e-5, size


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("per_block", [False, True], ids=["whole", "per_block"])
def test_gradient_checkpointing(reentrant: bool, per_block: bool) -> None:
    inputs = video()
    inputs["x"].requires_grad_()  # without it reentrant checkpointing has no gradients, compiled or not
    model = converted()
    expected = run(model, inputs)
    model.reentrant = reentrant
    assert_same(run(model, inputs), expected, bound=0, gradient_bound=1e-6)

    def compile_it(model: Video) -> Compiled:
        if not per_block:
            return torch.compile(model, **AOT)
        for block in model.blocks:
            block.compile(**AOT)
        return model

    graphs = check(compile_it, model, inputs)
    # reentrant checkpointing runs a block without gradients first: another graph
    assert sites(graphs) == ([1] if per_block and not reentrant else [1, 1] if per_block else [2])


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where: str) -> None:
    model, inputs = converted(), video()

    def cast(call: Compiled) -> Compiled:
        def under_autocast(x: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return call(x)

        return under_autocast

    expected = run(cast(model), inputs, lambda out: out.float(), parameters=model)
    outside = where == "outside"
    compiled = cast(torch.compile(model, **AOT)) if outside else torch.compile(cast(model), fullgraph=True, **AOT)
    actual = run(compiled, inputs, lambda out: out.float(), parameters=model)
    assert relative_error(expected.output, run(model, inputs).output) > 1e-4, "autocast changes nothing"
    assert_same(actual, expected, bound=1e-3, gradient_bound=1e-2)
