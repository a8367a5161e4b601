"""What runs beside SALAD on a GPU alone: CUDA graphs, weights of bitsandbytes, SageAttention.

    PYTHONPATH=$PWD python -m pytest -q tests/composition/test_gpu.py --composition-outcomes rows.json

The rows go to benchmarks/results as composition_checks_<device>.json, where `tools/composition_gpu.py` reads them.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.sites.branch import branches
from tests.composition.bits_and_bytes import DENSE_LOSS, bits_and_bytes
from tests.models.zoo import from_diffusers, randomise
from tests.support import randomise_branches, relative_error, seeded
from tests.trainers.processes import WORLD, in_two_processes

DEVICE, DTYPE = "cuda", torch.bfloat16
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = salad_compile.SaladConfig(compensation="none", sparsity=0.75, lowest_sparsity=0.5, lora_rank=4, min_tokens=512)
GRAPHS = {"mode": "reduce-overhead"}
OPTION = {"options": {"inductor": {"triton.cudagraphs": True}}}
STEPS, DENSE, CHANGED = 6, 2, 4  # of a loop: its steps, those that are dense, and the one with another sparsity
SAME = 2.0**-8  # two compilations in bf16 of the same sums
ERROR_OF_BF16 = 0.03  # of the whole model, compiled beside uncompiled


# --- a model ----------------------------------------------------------------------------------------------------------


@functools.cache
def _base() -> nn.Module:
    widths = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 2, "text_dim": 64}
    more = {"in_channels": 16, "out_channels": 16, "freq_dim": 64, "rope_max_seq_len": 64}
    with seeded(0):
        return randomise(from_diffusers("WanTransformer3DModel", widths | more), 0).eval().to(DEVICE, DTYPE)


def base() -> Any:
    """A Wan of two blocks, 1,280 tokens and two heads of 64: ten blocks of queries, twenty of keys."""
    return copy.deepcopy(_base())


def inputs(step: int) -> dict[str, Any]:
    """Of a step of a loop: new tensors each time, with new numbers in them."""
    draw = torch.Generator().manual_seed(step)
    return {
        "hidden_states": torch.randn(1, 16, 5, 32, 32, generator=draw).to(DEVICE, DTYPE),
        "timestep": torch.tensor([900.0 - 100 * step], device=DEVICE),
        "encoder_hidden_states": torch.randn(1, 24, 64, generator=draw).to(DEVICE, DTYPE),
        "return_dict": False,
    }


def convert(model: Any) -> Any:
    """With branches that contribute."""
    salad_compile.convert(model, CONFIG, example_inputs=inputs(0))
    randomise_branches(model)
    return model


def forward(model: Callable[..., Any], step: int = 0) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs(step))[0]
    return out


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def replays() -> Iterator[list[int]]:
    """Grows by one with each replay of a CUDA graph."""
    replay, seen = torch.cuda.CUDAGraph.replay, []

    def count(graph: Any) -> None:
        seen.append(1)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", count):
        yield seen


def loop(model: nn.Module, compiled: Callable[..., Any], *, marked: bool = False) -> list[Tensor]:
    """Outputs of the steps of a loop: dense ones first, then SALAD, in the end at another sparsity."""
    dense_steps = salad_compile.DenseSteps(model, steps=DENSE)
    outputs = []
    for step in range(STEPS):
        dense_steps.before(step, 0.0)
        salad_compile.set_sparsity(model, 0.75 if step < CHANGED else 0.5)
        if marked:
            torch.compiler.cudagraph_mark_step_begin()
        outputs.append(forward(compiled, step).clone())  # the next replay writes over it
    return outputs


def compile_model(model: Any, whole: bool, how: dict[str, Any]) -> Callable[..., Any]:
    """As users do; what to call."""
    torch._dynamo.reset()
    if whole:
        compiled: Callable[..., Any] = torch.compile(model, backend="salad", **how)
        return compiled
    salad_compile.compile_pipeline(model, **how)
    return model  # type: ignore[no-any-return]


@functools.cache
def without_graphs(whole: bool) -> list[Tensor]:
    """The same loop; and its steps differ by more than any tolerance here, so that none can pass for another."""
    model = convert(base())
    outputs = loop(model, compile_model(model, whole, {}))
    salad_compile.set_sparsity(model, 0.75)
    assert relative_error(outputs[CHANGED], forward(model, CHANGED)) > 4 * SAME, "the sparsity does something"
    for before, after in itertools.pairwise(outputs):
        assert relative_error(after, before) > 16 * SAME
    return outputs


def check_loops(model: Any, compiled: Callable[..., Any], whole: bool, *, marked: bool = False) -> None:
    """A loop in which graphs are recorded, and one of replays alone."""
    for _ in range(2):
        for mine, expected in zip(loop(model, compiled, marked=marked), without_graphs(whole), strict=True):
            assert relative_error(mine, expected) < SAME


@pytest.mark.parametrize("how", [GRAPHS, OPTION], ids=["mode", "option"])
def test_cuda_graphs_of_the_whole_model(how: dict[str, Any], replays: list[int]) -> None:
    expected = without_graphs(True)
    model = convert(base())
    compiled = compile_model(model, True, how)
    check_loops(model, compiled, True)
    replays.clear()
    loop(model, compiled)
    assert len(replays) >= STEPS, f"{len(replays)} graphs were replayed in {STEPS} steps"
    kept = [forward(compiled, step) for step in (CHANGED, CHANGED)]
    assert relative_error(kept[-1], expected[CHANGED]) < SAME


@pytest.mark.parametrize("how", [GRAPHS, OPTION], ids=["mode", "option"])
def test_cuda_graphs_block_by_block(how: dict[str, Any], replays: list[int]) -> None:
    """With a mark before each forward, as torch asks for where one graph's output is the next one's input."""
    without_graphs(False)
    model = convert(base())
    compiled = compile_model(model, False, how)
    check_loops(model, compiled, False, marked=True)
    replays.clear()
    loop(model, compiled, marked=True)
    assert len(replays) >= STEPS * len(model.blocks), f"{len(replays)} graphs were replayed in {STEPS} steps"


def test_cuda_graphs_block_by_block_without_marks_are_right_or_an_error() -> None:
    without_graphs(False)
    model = convert(base())
    compiled = compile_model(model, False, GRAPHS)
    try:
        check_loops(model, compiled, False)
    except RuntimeError as error:
        assert "overwritten by a subsequent run" in str(error), error  # noqa: PT017


# --- weights of bitsandbytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DENSE_LOSS)
def test_bitsandbytes_on_a_gpu(kind: str) -> None:
    model = bits_and_bytes(base(), kind, DTYPE)
    dense = relative_error(forward(model), forward(base()))
    assert ERROR_OF_BF16 / 8 < dense < DENSE_LOSS[kind], dense
    expected = forward(convert(base()))
    convert(model)
    uncompiled = forward(model)
    assert relative_error(uncompiled, expected) < 2 * DENSE_LOSS[kind]
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="salad", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (0, 1):
            assert relative_error(forward(model, step), expected) < 2 * DENSE_LOSS[kind] or step
        assert relative_error(forward(model), uncompiled) < ERROR_OF_BF16


# --- two GPUs ---------------------------------------------------------------------------------------------------------


def equals_one_gpu(rank: int, folder: Path) -> None:
    from diffusers import ContextParallelConfig

    model = convert(base())
    expected = forward(model)
    with salad_compile.dense(model):
        assert relative_error(forward(model), expected) > 2 * ERROR_OF_BF16, "SALAD does something"
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
    salad_compile.parallelise(model)
    assert relative_error(forward(model), expected) < ERROR_OF_BF16
    model.compile_repeated_blocks(backend="salad")
    for step in (0, 1, 0):
        out = forward(model, step)
        assert (relative_error(out, expected) < ERROR_OF_BF16) == (step == 0)


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
def test_context_parallelism_over_two_gpus(tmp_path: Path) -> None:
    in_two_processes(equals_one_gpu, tmp_path, "nccl")


# --- SageAttention ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention over 1,280 tokens or cross-attention to a text, two heads of 64, by a function that is given."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(128, 128) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 64)) for part in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(self.attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Two of them, each on a function of its own."""

    def __init__(self, own: Callable[..., Tensor], cross: Callable[..., Tensor]) -> None:
        super().__init__()
        self.own, self.cross = Attention(own), Attention(cross)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.own(x, x)
        return x + self.cross(x, text)  # type: ignore[no-any-return]


def net(own: Callable[..., Tensor], cross: Callable[..., Tensor], given: tuple[Tensor, ...]) -> nn.Module:
    """The network, converted; always the same weights."""
    with seeded(0):
        model = randomise(Net(own, cross), 1).eval().to(DEVICE, DTYPE)
    salad_compile.convert(model, CONFIG, example_inputs=given, grid=(5, 16, 16))
    randomise_branches(model)
    assert [branch.record.owner for branch in branches(model).values()] == ["own"]
    return model


def test_sage_attention_on_a_gpu() -> None:
    """Self-attention becomes SALAD, what stays dense runs on its kernels.

    These round to 8 bits, and version 1.0.6 does not mask the rest of a last block of 64 keys, so there is none here.
    Outputs are held against those of models that are written as ours has to run, on the same kernels, and where other
    kernels ran before them, against twice what the rounding alone does to the dense model.
    """
    package = pytest.importorskip("sageattention")
    probe = torch.randn(1, 2, 256, 64, device=DEVICE, dtype=DTYPE)
    try:
        package.sageattn(probe, probe.clone(), probe)
    except Exception as error:
        pytest.skip(f"sageattention itself does not run here: {type(error).__name__}")
    draw = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(1, length, 128, generator=draw).to(DEVICE, DTYPE) for length in (1280, 128))
    sage, sdpa = package.sageattn, F.scaled_dot_product_attention
    model = net(sage, sage, given)
    with torch.no_grad():
        expected = net(sdpa, sage, given)(*given)
        with salad_compile.dense(model):
            dense, exact = model(*given), net(sdpa, sdpa, given)
        with salad_compile.dense(exact):
            rounding = relative_error(dense, exact(*given))
        assert 1e-5 < rounding < ERROR_OF_BF16, "of two dense models"
        same = max(ERROR_OF_BF16, 2 * rounding)
        assert relative_error(dense, expected) > 2 * same, "SALAD does something"
        assert relative_error(model(*given), expected) < 4 * SAME, "the same kernels on nearly the same numbers"
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="salad")
        assert relative_error(compiled(*given), expected) < same
        with salad_compile.dense(model):
            assert relative_error(compiled(*given), dense) < same
