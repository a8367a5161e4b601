"""Compiled and distributed, on two processes: DDP and FSDP2 per block, DDP around a whole model, with buckets that cut.

DDP splits the graph of a whole model where its buckets of gradients end, after Dynamo and before the backend. A cut
between a query projection and its attention call must not go unnoticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from salad_compile.backend.dynamo import record_graphs
from salad_compile.errors import SiteLostError
from tests.end_to_end.test_compile_matrix import AOT, EAGER, Video, converted, video
from tests.end_to_end.train_life import forkserver
from tests.support import Result, differentiable, relative_error, run

WORLD = 2
EXACT, NAMED = "exact", "an error that names the mend"
SMALL_BUCKETS = (0.0005, 0.001)  # MB; the trainable parameters of a block take 0.002


def ddp_per_block(model: Video) -> nn.Module:
    compile_blocks(model)
    return DistributedDataParallel(model)


def fsdp_per_block(model: Video) -> nn.Module:
    compile_blocks(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fsdp_whole(model: Video) -> nn.Module:
    model = fsdp_per_block(model)
    for block in model.blocks:
        block._compiled_call_impl = None
    model.compile(**EAGER)
    return model


def ddp_whole(bucket: float = 25) -> Callable[[Video], nn.Module]:
    def build(model: Video) -> nn.Module:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=bucket)
        wrapped.compile(**EAGER)
        return wrapped

    return build


def compile_blocks(model: Video) -> None:
    for block in model.blocks:
        block.compile(**AOT)


WAYS: dict[str, tuple[Callable[[Video], nn.Module], dict[str, Any]]] = {
    "DDP, per block": (ddp_per_block, {}),
    "FSDP2, per block": (fsdp_per_block, {}),
    "FSDP2, whole": (fsdp_whole, {}),
    "DDP, whole, one bucket": (ddp_whole(), {}),
    "DDP, whole, buckets that cut, optimize_ddp=False": (ddp_whole(SMALL_BUCKETS[0]), {"optimize_ddp": False}),
    **{f"DDP, whole, buckets of {size} MB": (ddp_whole(size), {}) for size in SMALL_BUCKETS},
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1  # torch's 1 MiB would hold the whole model
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=600)
    )
    try:
        model = converted()
        inputs = [differentiable(video(3, 5, 7)), differentiable(video(3, 7, 5))]  # each process has its own
        alone = [run(model, each) for each in inputs]
        mean = {name: (alone[0].gradients[name] + alone[1].gradients[name]) / 2 for name in alone[0].gradients}
        expected = Result(alone[rank].output, mean)
        outcomes = {}
        for name, (build, config) in WAYS.items():
            torch._dynamo.reset()
            with torch._dynamo.config.patch(config), record_graphs() as graphs:
                outcome = try_out(build(converted()), inputs[rank], expected)
            outcomes[name] = (outcome, len([graph for graph in graphs if graph.calls]))
        Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    finally:
        dist.destroy_process_group()


def try_out(model: nn.Module, inputs: dict[str, Any], expected: Result) -> str:
    try:
        actual = run(model, inputs)
    except BackendCompilerFailed as error:
        named = isinstance(error.inner_exception, SiteLostError) and "optimize_ddp = False" in str(error)
        return NAMED if named and "per block" in str(error) else f"{type(error.inner_exception)}: {error}"
    error = relative_error(actual.output, expected.output)
    if error > 1e-6:
        return f"outputs differ by {error:.1e}"
    gradients = {name.removeprefix("module."): gradient for name, gradient in actual.gradients.items()}
    if gradients.keys() != expected.gradients.keys():
        return f"gradients of other parameters: {gradients.keys() ^ expected.gradients.keys()}"
    for name, gradient in gradients.items():
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if (error := relative_error(whole, expected.gradients[name])) > 1e-4:
            return f"gradients of {name} differ by {error:.1e}"
    return EXACT


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, int]]]:
    """Of each process: way -> outcome, and graphs with attention."""
    folder = tmp_path_factory.mktemp("processes")
    forkserver()
    mp.start_processes(worker, args=(str(folder),), nprocs=WORLD, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("way", WAYS)
def test_exact_or_an_error_that_names_the_mend(way: str, outcomes: list[dict[str, tuple[str, int]]]) -> None:
    found = [of_process[way][0] for of_process in outcomes]
    assert found[0] == found[1]
    assert found[0] in (EXACT, NAMED) if "buckets of" in way else found[0] == EXACT


def test_some_buckets_cut_a_graph_apart(outcomes: list[dict[str, tuple[str, int]]]) -> None:
    cut = [outcomes[0][way] for way in WAYS if "buckets of" in way]
    assert any(outcome == NAMED or graphs > 1 for outcome, graphs in cut), "the test above is vacuous"
