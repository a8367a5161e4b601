"""Recipe: FSDP2, two processes: whole and sharded checkpoints, and the same SALAD file as one process.

`tests/end_to_end/test_distributed.py` compares outputs and gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import salad_compile
from tests.trainers.processes import in_two_processes
from tests.trainers.tiny import converted


def sharded(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def worker(rank: int, folder: Path) -> None:
    model = sharded(converted())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    salad_compile.save(model, folder / "sharded.safetensors")  # every process calls it, the first writes

    # torch's own checkpoints: of shards, each process writes its own ...
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "shards")
    other = sharded(converted(seed=5))
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / "shards")
    set_model_state_dict(other, state)
    salad_compile.save(other, folder / "from_shards.safetensors")

    # ... and whole, on the first process
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    dist.barrier()

    # a SALAD file into a sharded model
    third = sharded(converted(seed=6))
    salad_compile.load(third, folder / "sharded.safetensors")
    salad_compile.save(third, folder / "reloaded.safetensors")


def test_fsdp2_saves_what_one_process_saves(tmp_path: Path) -> None:
    in_two_processes(worker, tmp_path)
    model = converted()
    expected = load_file(salad_compile.save(model, tmp_path / "alone.safetensors"))
    for name in ("sharded", "from_shards", "reloaded"):
        saved = load_file(tmp_path / f"{name}.safetensors")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in expected), name
    whole, state = torch.load(tmp_path / "whole.pt"), model.state_dict()
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[key], state[key]) for key in state)
