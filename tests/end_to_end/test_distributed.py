"""FSDP2 on two processes: same outputs and gradients as one process, and the same files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import salad_compile
from tests import support
from tests.end_to_end.train_life import forkserver
from tests.models.zoo import CASES
from tests.support import randomise_branches, relative_error, run

CASE = CASES["Wan"]
WORLD = 2


def converted() -> Any:
    return support.converted(CASE)


def shard(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        expected = run(converted(), CASE.inputs(0), CASE.output)
        model = shard(converted())
        assert all(isinstance(p, DTensor) for p in model.parameters())
        actual = run(model, CASE.inputs(0), CASE.output)
        assert relative_error(actual.output, expected.output) < 1e-6
        assert actual.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            # both ranks see the same inputs, and FSDP averages
            assert relative_error(actual.gradients[name].full_tensor(), gradient) < 1e-4, name
        salad_compile.save(model, Path(folder) / "sharded.safetensors")
        dist.barrier()
        report = salad_compile.export(model, Path(folder) / "sharded", ("salad", "diffusers", "merged"))
        assert len(report.written) == 3  # on every rank
        with pytest.raises(salad_compile.WriteError, match="is a file"):  # on every rank
            salad_compile.export(model, Path(folder) / "sharded.safetensors")
        other = converted()
        randomise_branches(other, seed=5)
        salad_compile.load(shard(other), Path(folder) / "sharded.safetensors")
        reloaded = run(other, CASE.inputs(0), CASE.output, gradients=False)
        assert relative_error(reloaded.output, expected.output) < 1e-6
    finally:
        dist.destroy_process_group()


def test_fsdp2_equals_one_process_and_saves_the_same_file(tmp_path: Path) -> None:
    forkserver()
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=WORLD, start_method="forkserver")
    whole = salad_compile.save(converted(), tmp_path / "whole.safetensors")
    sharded, expected = load_file(tmp_path / "sharded.safetensors"), load_file(whole)
    assert sharded.keys() == expected.keys()
    assert all(torch.equal(sharded[name], expected[name]) for name in expected)
    salad_compile.load(CASE.build(), tmp_path / "sharded.safetensors")
    salad_compile.export(converted(), tmp_path / "whole", ("salad", "diffusers", "merged"))
    files = [file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        sharded, expected = load_file(tmp_path / "sharded" / file), load_file(tmp_path / "whole" / file)
        assert sharded.keys() == expected.keys()
        assert all(torch.equal(sharded[name], expected[name]) for name in expected), file
