"""A dry run: a few steps of a training, and from them the hours, memory and disk that all of it takes here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from salad_compile.common.sharding import reshard
from salad_compile.common.wrappers import single_model
from salad_compile.config import SaladConfig
from salad_compile.latents import LatentDataset
from salad_compile.sites.branch import branches
from salad_compile.training.families import family_of
from salad_compile.training.feeding import Placed
from salad_compile.training.flow_matching import Forward, validation_sample
from salad_compile.training.interrupts import StopRequest
from salad_compile.training.loop import Run, prepare
from salad_compile.training.outcome import duration
from salad_compile.training.preparation import DTYPES
from salad_compile.training.records import peak_memory
from salad_compile.training.reference_states import as_base
from salad_compile.training.settings import TrainSettings

MEASURED_STEPS = 3  # of each size, of which the first compiles
MEASURED_SIZES = 3
COUNTED_STEPS = 1000  # of which the sizes are counted

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """What a whole run takes on this machine.

    Attributes:
        steps, batch: of the run. step_seconds: of one step, the mean over the sizes of the data.
        compile_seconds: beyond that, once. validation_seconds, checkpoint_seconds: in all.
        peak_memory: bytes, of the device, or of the process on the CPU. memory: that there is.
        disk: bytes of all that the run writes. free: bytes that are free where it writes.
    """

    steps: int
    batch: int
    step_seconds: float
    compile_seconds: float
    validation_seconds: float
    checkpoint_seconds: float
    peak_memory: int
    memory: int
    disk: int
    free: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_seconds + self.compile_seconds + self.validation_seconds + self.checkpoint_seconds

    def sentence(self) -> str:
        """Three lines: time, memory, disk."""
        parts = {
            "to compile": self.compile_seconds,
            "of validation": self.validation_seconds,
            "for checkpoints": self.checkpoint_seconds,
        }
        named = ", ".join(f"{duration(seconds)} {what}" for what, seconds in parts.items() if seconds)
        disk = f"{_size(self.disk)} on the disk, where {_size(self.free)} are free"
        return "\n".join(
            [
                f"{self.steps:,} steps of {self.batch} samples take {duration(self.seconds)}: "
                f"{self.step_seconds:.3g} s a step{', ' if named else ''}{named}",
                f"peak memory {_size(self.peak_memory)} of {_size(self.memory)}",
                disk if self.disk <= self.free else f"{disk}: too little",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {**dataclasses.asdict(self), "seconds": self.seconds, "hours": self.seconds / 3600}


def estimate(
    model: nn.Module,
    latents: LatentDataset,
    settings: TrainSettings,
    directory: str | os.PathLike[str],
    *,
    validation: LatentDataset | None = None,
    config: SaladConfig | Mapping[str, Any] | None = None,
    forward: Forward | None = None,
) -> Estimate:
    """Take three steps, one validation forward and one checkpoint, and tell what a whole run would take.

    Arguments and errors are those of :func:`salad_compile.training.train`; every process calls it. Branches are
    afterwards as they were; the model is prepared for training, as train() leaves it. Nothing stays on the disk. Of
    data with several sizes up to three are measured, the largest among them, and the others are interpolated.
    """
    bare = single_model(model, "train")
    wanted = dataclasses.replace(settings, trackers=(), steps=max(settings.steps, COUNTED_STEPS))
    run = prepare(
        bare,
        latents,
        wanted,
        Path(directory),
        validation=validation,
        found=None,
        config=config,
        family=family_of(bare, wanted, forward),
    )
    parameters = run.engine.parameters
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    run.engine.bare.train()
    step_seconds, first = _steps(run, settings)
    validation_seconds = 0.0 if validation is None else _validation(run, settings, validation)
    checkpoint_seconds, disk, free = _checkpoints(run, settings, Path(directory))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    device = run.accelerator.device
    return Estimate(
        settings.steps,
        settings.batch,
        step_seconds,
        first,
        validation_seconds,
        checkpoint_seconds,
        peak_memory(device),
        _memory(device),
        disk,
        free,
    )


def _steps(run: Run, settings: TrainSettings) -> tuple[float, float]:
    """Seconds of one step, the mean over the whole run; and what first steps take beyond theirs."""
    distilled = min(settings.distillation_steps, settings.steps)
    stages = {0: distilled, distilled: settings.steps - distilled}  # first step -> number of steps
    total = first = 0.0
    with StopRequest() as stop:
        for start, count in stages.items():
            if count:
                mean, extra = _stage(run, start, stop)
                total, first = total + count * mean, first + extra
    return total / settings.steps, first


def _stage(run: Run, start: int, stop: StopRequest) -> tuple[float, float]:
    """As :func:`_steps`, of one stage of the run. start: its first step."""
    warmup = run.settings.sparsity_warmup
    number = start if start < run.settings.distillation_steps else max(start, warmup + 1)  # sparse as in the end
    sizes = _sizes(run)
    seconds: dict[int, float] = {}
    extra = 0.0
    for shape in _to_measure(sizes):
        step = next(step for step in range(start, start + COUNTED_STEPS) if _shape(run, step) == shape)
        times = []
        for _ in range(MEASURED_STEPS):
            began = _clock(run)
            batches = _micro_batches(run, step)
            if run.settings.workers:  # other processes read ahead
                began = _clock(run)
            run.take_step(number, batches, stop)
            times.append(_clock(run) - began)
        seconds[_elements(shape)] = min(times[1:])
        extra += max(times[0] - min(times[1:]), 0.0)
    total = sum(sizes.values())
    return sum(count * _between(seconds, _elements(shape)) for shape, count in sizes.items()) / total, extra


def _sizes(run: Run) -> Counter[Shape]:
    """How often each shape comes."""
    return Counter(_shape(run, step) for step in range(COUNTED_STEPS))  # of the first steps


def _shape(run: Run, step: int) -> Shape:
    return tuple(run.feed.latents.shapes[run.feed.batches.at(step)[0]])


def _to_measure(sizes: Counter[Shape]) -> list[Shape]:
    """The most frequent one, the largest and the smallest; the largest first, which takes the memory."""
    wanted = {sizes.most_common(1)[0][0], max(sizes, key=_elements), min(sizes, key=_elements)}
    return sorted(wanted, key=_elements, reverse=True)[:MEASURED_SIZES]


def _elements(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _between(known: Mapping[int, float], wanted: int) -> float:
    """Linear between the two known neighbours."""
    if wanted in known:
        return known[wanted]
    low = max(size for size in known if size < wanted)
    high = min(size for size in known if size > wanted)
    return known[low] + (known[high] - known[low]) * (wanted - low) / (high - low)


def _micro_batches(run: Run, step: int) -> list[list[Placed]]:
    """The items of one step, read in this process."""
    indices = run.feed.batches.at(step)
    return [
        [(place, run.feed.latents[indices[place]]) for place in places] for places in run.feed.places(run.feed.rank)
    ]


def _validation(run: Run, settings: TrainSettings, latents: LatentDataset) -> float:
    """Seconds of all validations: those between steps and the last, and the three before the first step."""
    world = int(run.accelerator.num_processes)
    forwards = -(-len(latents) * settings.validation_points // world)
    every = settings.validation_every
    later = -(-settings.steps // every) if every else 1
    run.engine.bare.eval()
    sparse = _forward_seconds(run, settings, latents)
    with as_base(branches(run.engine.bare).values()):
        dense = _forward_seconds(run, settings, latents)
    run.engine.bare.train()
    return forwards * ((later + 2) * sparse + dense)


@torch.no_grad()
def _forward_seconds(run: Run, settings: TrainSettings, latents: LatentDataset) -> float:
    sample = validation_sample(latents[0], settings, 0, 0, run.family.add_noise)
    sample = sample.to(run.accelerator.device, DTYPES[settings.precision])
    seconds = 0.0
    for _ in range(2):  # the first one compiles
        began = _clock(run)
        run.family.predict(run.engine.wrapped, sample)
        seconds = _clock(run) - began
    reshard(run.engine.bare)
    return seconds


def _checkpoints(run: Run, settings: TrainSettings, directory: Path) -> tuple[float, int, int]:
    """Seconds of all checkpoints, the bytes that a run leaves at most, and those that are free."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())
    writer = run.writer
    with _shared_folder(run, there) as folder:
        writer.directory = folder
        began = _clock(run)
        path = writer.write(0)
        seconds = _clock(run) - began
        run.accelerator.wait_for_everyone()
        sizes = [file.stat().st_size for file in sorted(path.glob("*.safetensors"))]  # the branches, the optimizer
        run.accelerator.wait_for_everyone()
    writer.directory = directory
    results = sizes[0] * (2 if settings.ema_decay else 1)
    kept = min(settings.keep_last, -(-settings.steps // settings.checkpoint_every)) + 1  # one more while it is written
    count = -(-settings.steps // settings.checkpoint_every)
    return count * seconds, kept * sum(sizes) + results, shutil.disk_usage(there).free


@contextlib.contextmanager
def _shared_folder(run: Run, parent: Path) -> Iterator[Path]:
    """A folder that all processes see, and which the first one removes."""
    from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

    main = run.accelerator.is_main_process
    made = [tempfile.mkdtemp(prefix=".salad-dry-run-", dir=parent) if main else ""]
    (name,) = broadcast_object_list(made)
    try:
        yield Path(name)
    finally:
        if main:
            shutil.rmtree(name, ignore_errors=True)


def _clock(run: Run) -> float:
    if run.accelerator.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _memory(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
