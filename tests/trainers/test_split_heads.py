"""One video over 2, 3, 4 and 8 processes, which divide the heads or not: output, gradients and sparsity of one."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import salad_compile
from salad_compile.errors import ConfigError
from salad_compile.kernels import measure_executions
from tests.support import randomise_branches, relative_error, run, seeded
from tests.trainers.processes import in_processes
from tests.trainers.test_context_parallel import EAGER, first, split, summed
from tests.trainers.tiny import CONFIG

# name -> what it changes of the configuration
CONVERSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pools": {"compensation": "tail", "compensation_pool": 8},
    "windows": {"pattern": "stswa"},
}
GRID = (4, 6, 6)


def model_and_inputs(heads: int, change: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A converted Wan of two blocks, and 144 tokens: five query blocks, the last one short."""
    from diffusers import WanTransformer3DModel

    with seeded(3):
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, in_channels=4,
            out_channels=4, freq_dim=16,
        ).eval()  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2]),
            "encoder_hidden_states": torch.randn(2, 5, 16),
            "timestep": torch.tensor([500.0, 20.0]),
            "return_dict": False,
        }
    config = dataclasses.replace(CONFIG, **change)
    model = salad_compile.convert(model, config, example_inputs=inputs, grid=GRID)
    randomise_branches(model)
    return model, inputs


def pairs_of(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The output, and how many token pairs were computed and how many there are."""
    with torch.no_grad(), measure_executions() as executions:
        out: Tensor = model(**inputs)[0]
    pairs = [sum(getattr(run, name) for run in executions) for name in ("computed_pairs", "total_pairs")]
    return out, torch.tensor(pairs)


def equals_one(rank: int, folder: Path, heads: int, names: tuple[str, ...]) -> None:
    world = dist.get_world_size()
    for name in names:
        model, inputs = model_and_inputs(heads, CONVERSIONS[name])
        expected = run(model, inputs, first)
        pairs = pairs_of(model, inputs)[1]
        split(model, ulysses_degree=world)
        salad_compile.parallelise(model)
        actual = run(model, inputs, first)
        # fp32: the processes add up sums over their tokens, and over their queries
        assert relative_error(actual.output, expected.output) < 1e-5, name
        gradients = summed(actual.gradients)
        assert gradients
        assert all(relative_error(gradients[key], expected.gradients[key]) < 1e-4 for key in gradients), name
        assert any("tail_weight" in key for key in gradients) == (name == "pools")
        if name == "plain":
            model.compile_repeated_blocks(**EAGER)
        out, own = pairs_of(model, inputs)
        assert relative_error(out, expected.output) < 1e-5, name
        if heads % world:
            with pytest.raises(ConfigError, match=f"its {heads} heads do not divide"):
                salad_compile.set_dense(model, True)
        dist.all_reduce(own)
        assert own.tolist() == pairs.tolist(), name  # every query block once


@pytest.mark.parametrize(
    ("world", "heads", "names"),
    [
        (2, 3, tuple(CONVERSIONS)),
        pytest.param(3, 2, ("plain", "pools"), marks=pytest.mark.all_cases),
        pytest.param(4, 6, tuple(CONVERSIONS), marks=pytest.mark.all_cases),
        pytest.param(4, 4, tuple(CONVERSIONS), marks=pytest.mark.all_cases),
        pytest.param(8, 12, ("plain",), marks=pytest.mark.all_cases),
        pytest.param(8, 8, ("plain",), marks=pytest.mark.all_cases),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_processes_equal_one(tmp_path: Path, world: int, heads: int, names: tuple[str, ...]) -> None:
    in_processes(world, functools.partial(equals_one, heads=heads, names=names), tmp_path)
