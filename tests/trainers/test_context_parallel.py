"""Recipe: one video over two processes, by diffusers' context parallelism. Same output and gradients as one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import salad_compile
from salad_compile.definition import attention
from salad_compile.definition.patterns.topk import TopK
from salad_compile.errors import ConfigError, NotConvertedError, SiteLostError
from salad_compile.sites.branch import branches
from tests.support import randomise_branches, relative_error, run
from tests.trainers.processes import WORLD, in_two_processes
from tests.trainers.tiny import CONFIG, INPUTS, base, converted, output

CALL = {**INPUTS, "return_dict": False}  # diffusers' hook at the root takes a tensor or a tuple of them
AOT: dict[str, Any] = {"backend": "salad", "options": {"lowering": "aot_eager"}}
IN_ONE_PIECE = "exchanged in one piece"
EAGER: dict[str, Any] = {"backend": "salad", "options": {"lowering": "eager"}}


def first(outputs: tuple[Tensor]) -> Tensor:
    return outputs[0]


def split(model: Any, **settings: Any) -> Any:
    """diffusers' part. It counts accelerators, and there are none here (torch 2.13, diffusers 0.42.1)."""
    from diffusers import ContextParallelConfig

    dist.barrier()  # each call makes process groups, and gloo resets connections of a process that is far ahead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        model.enable_parallelism(config=ContextParallelConfig(**(settings or {"ulysses_degree": WORLD})))
    return model


def variants() -> dict[str, Any]:
    """Position encoding replayed, and not; a dense layer, which stays diffusers' business; weights of heads."""
    changes: dict[str, dict[str, Any]] = {
        "a dense layer": {"rope_placement": "rotate-then-map", "dense_layers": 1},
        "tail": {"compensation": "tail", "compensation_pool": 8},
    }
    others = {name: dataclasses.replace(CONFIG, **change) for name, change in changes.items()}
    found = {
        name: salad_compile.convert(base(), config, example_inputs=dict(INPUTS)) for name, config in others.items()
    }
    for model in found.values():
        randomise_branches(model)
    return {"auto": converted(), IN_ONE_PIECE: converted(), **found}


def summed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return {name: gradient for name, gradient in gradients.items() if ".salad." in name}


def equals_one_process(rank: int, folder: Path) -> None:
    for name, model in variants().items():
        with pytest.MonkeyPatch.context() as patch:
            if name == IN_ONE_PIECE:  # as over NCCL
                patch.setattr(attention, "OVERLAPPING_BACKENDS", set())
            one_variant_equals_one_process(name, model)


def one_variant_equals_one_process(name: str, model: Any) -> None:
    expected = run(model, CALL, first)
    split(model)
    with pytest.raises(SiteLostError, match="parallelise"):  # never silently wrong
        output(model)
    salad_compile.parallelise(model)
    actual = run(model, CALL, first)
    # one process sums over its tokens, two add their sums: fp32 in another order
    assert relative_error(actual.output, expected.output) < 1e-5, name
    gradients = summed(actual.gradients)
    assert gradients
    assert all(relative_error(gradients[key], expected.gradients[key]) < 1e-4 for key in gradients), name
    if name != "a dense layer":
        model.compile_repeated_blocks(**(AOT if name == "auto" else EAGER))
        assert relative_error(output(model), expected.output) < 1e-5
    if name == "auto":
        gradients = summed(run(model, CALL, first).gradients)
        assert all(relative_error(gradients[key], expected.gradients[key]) < 1e-4 for key in gradients)
    if name == "auto":
        dense_for_a_while(model)
        with pytest.raises(ConfigError, match="processes"):
            salad_compile.diagnose(model, dict(INPUTS))


def dense_for_a_while(model: Any) -> None:
    """Dense steps are diffusers' exchange again; compiled graphs tell the two apart."""
    alone = converted()
    with salad_compile.dense(alone):
        expected = output(alone)
    before = output(model)
    assert relative_error(expected, before) > 1e-3
    for compiled in (True, False):
        stance = "default" if compiled else "force_eager"
        with torch.compiler.set_stance(stance), salad_compile.dense(model):
            assert relative_error(output(model), expected) < 1e-5
    assert torch.equal(output(model), before)


def refuses(rank: int, folder: Path) -> None:
    with pytest.raises(NotConvertedError):
        salad_compile.parallelise(split(base()))
    with pytest.raises(ConfigError, match="enable_parallelism"):
        salad_compile.parallelise(converted())
    with pytest.raises(ConfigError, match="ring"):
        salad_compile.parallelise(split(converted(), ring_degree=WORLD))
    dense = split(converted())
    salad_compile.set_dense(dense, True)
    for branch in branches(dense).values():
        branch.record = dataclasses.replace(branch.record, heads=3)
    with pytest.raises(ConfigError, match="3 heads do not divide by 2 processes, and its attention is dense"):
        salad_compile.parallelise(dense)
    changes = [
        ({"text": "after"}, {}, "text and video"),
        ({"square_mask": True}, {}, "mask"),
    ]
    for record, config, complaint in changes:
        model = split(converted())
        branch = next(iter(branches(model).values()))
        branch.record = dataclasses.replace(branch.record, **record)
        branch.config = dataclasses.replace(branch.config, **config)
        branch.spec = branch.spec_of_site().encode()
        with pytest.raises(ConfigError, match=complaint):
            salad_compile.parallelise(model)
        assert not branch.group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TopK, "crosses_processes", False)
        model = split(converted())
        with pytest.raises(ConfigError, match=r"'topk', and only .*'stswa'"):
            salad_compile.parallelise(model)
    shared = split(converted())
    shared.blocks[1].attn2.set_processor(shared.blocks[0].attn1.processor)
    with pytest.raises(ConfigError, match="shares"):
        salad_compile.parallelise(shared)


def both(rank: int, folder: Path) -> None:
    equals_one_process(rank, folder)
    refuses(rank, folder)


def test_two_processes_equal_one_and_say_what_they_cannot_do(tmp_path: Path) -> None:
    in_two_processes(both, tmp_path)
