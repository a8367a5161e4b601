"""The trainer on two processes: DDP and FSDP2 through accelerate end where one process ends."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from salad_compile.training import read_log, train
from salad_compile.training.engine import Engine
from tests.end_to_end.train_life import forkserver
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, base, latents
from tests.support import relative_error
from tests.trainers.processes import free_port

WORLD = 2
# Sums over the batch are taken in another order: fp32, 24 bits, over some steps of AdamW, which divides by the root of
# squared gradients and so passes the error of small ones on whole.
BOUND = 1e-4
RUN = dataclasses.replace(
    SETTINGS,
    steps=4,
    batch=4,
    micro_batch=1,
    sparsity_warmup=3,
    distillation_steps=2,
    checkpoint_every=1,
    keep_last=4,
    ema_decay=0.5,
)
FAST = {"gradient_checkpointing": True, "compile": "blocks", "compile_options": {"lowering": "eager"}}
RUNS = {
    "ddp": RUN,
    "fsdp2": RUN,
    "ddp, compiled": dataclasses.replace(RUN, **FAST),
    "fsdp2, compiled": dataclasses.replace(RUN, **FAST),
    "fsdp2, whole": dataclasses.replace(RUN, validation_every=1),  # the root holds everything
}


def worker(rank: int, folder: str, name: str, kind: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    if kind.startswith("fsdp2"):
        configure_fsdp2(whole=kind.endswith("whole"))
    run(Path(folder), name, kind)


def configure_fsdp2(whole: bool) -> None:
    """What `accelerate launch --use_fsdp --fsdp_version 2` sets, cpu_ram_efficient_loading among it."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP" if whole else "TRANSFORMER_BASED_WRAP"}
    os.environ |= {"FSDP_RESHARD_AFTER_FORWARD": "true"}
    from accelerate import DistributedType, PartialState

    # accelerate offers FSDP for accelerators alone; what follows does not ask again
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU
    prepare = Engine.prepare.__func__  # type: ignore[attr-defined]

    def checked(cls: type[Engine], *args: object) -> Engine:
        engine: Engine = prepare(cls, *args)
        assert engine.accelerator.is_fsdp2
        assert all(isinstance(parameter, DTensor) for parameter in engine.bare.parameters())
        assert type(engine.bare.blocks[0]).__name__.startswith("FSDP") is not whole  # type: ignore[index]
        return engine

    Engine.prepare = classmethod(checked)  # type: ignore[assignment,method-assign]


def run(root: Path, name: str, kind: str) -> None:
    held_out = latents(root / "held-out", 3, prefix="held", seed=9)
    train(base(), latents(root / "latents"), RUNS[kind], root / name, config=CONFIG, validation=held_out)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("ddp", "fsdp2") else pytest.param(kind, marks=pytest.mark.all_cases) for kind in RUNS],
)
def test_two_processes_train_as_one(tmp_path: Path, kind: str) -> None:
    run(tmp_path, "alone", kind)
    two_processes(tmp_path, kind, kind)
    assert_same_runs(tmp_path / kind, tmp_path / "alone")
    # one process goes on from a checkpoint of two
    remove_checkpoints(tmp_path / kind, after=3)
    run(tmp_path, kind, kind)
    assert_same_runs(tmp_path / kind, tmp_path / "alone")
    # and two from one of one, within the distillation
    shutil.copytree(tmp_path / "alone", tmp_path / "again")
    remove_checkpoints(tmp_path / "again", after=1)
    two_processes(tmp_path, "again", kind)
    assert_same_runs(tmp_path / "again", tmp_path / "alone")


def remove_checkpoints(run: Path, after: int) -> None:
    found = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in found] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
    for path in found[after:]:
        shutil.rmtree(path)


def two_processes(root: Path, name: str, kind: str) -> None:
    forkserver()
    mp.start_processes(worker, args=(str(root), name, kind, free_port()), nprocs=WORLD, start_method="forkserver")


def assert_same_runs(actual: Path, wanted: Path) -> None:
    ours, theirs = read_log(actual), read_log(wanted)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    stages = [line["stage"] for line in ours if "stage" in line]
    assert stages == ["distillation"] * 2 + ["flow matching"] * 2
    for line, expected in zip(ours, theirs, strict=True):
        assert line.keys() == expected.keys()
        for name in (name for name in expected if name == "gradient_norm" or name.endswith("loss")):
            assert line[name] == pytest.approx(expected[name], rel=BOUND)
    files = sorted(path.name for path in wanted.glob("*.safetensors"))
    assert files
    for file in files:
        trained, expected = load_file(actual / file), load_file(wanted / file)
        assert trained.keys() == expected.keys()
        for name, tensor in expected.items():
            assert relative_error(trained[name], tensor) < BOUND, name
