"""A dry run: a few steps of a training, and from them the hours, memory and disk that all of it takes here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from salad_compile.common.files import name_failures
from salad_compile.common.locks import hold
from salad_compile.common.paths import as_directory, nearest_directory
from salad_compile.common.wrappers import single_model
from salad_compile.config import SaladConfig
from salad_compile.latents import LatentDataset
from salad_compile.salad_files.runs import complete_checkpoints
from salad_compile.training.checkpoints import as_begun
from salad_compile.training.families import family_of
from salad_compile.training.flow_matching import Forward
from salad_compile.training.loop import Given, Run, prepare
from salad_compile.training.outcome import duration
from salad_compile.training.preparation import require_kinds
from salad_compile.training.records import peak_memory
from salad_compile.training.rehearsal import COUNTED_STEPS, Rehearsal, clock
from salad_compile.training.samples import Decode
from salad_compile.training.settings import TrainSettings

_FOLDER = ".salad-dry-run-"  # how its name begins


@dataclass(frozen=True)
class Estimate:
    """What a whole run takes on this machine.

    Attributes:
        steps, batch: of the run. step_seconds: of one step, the mean over the sizes of the data.
        compile_seconds: beyond that, once: a run that follows finds in its caches what was compiled for this estimate.
        validation_seconds, checkpoint_seconds, sample_seconds: in all.
        peak_memory: bytes, of the device, or of the process on the CPU. memory: that there is.
        disk: bytes of all that the run writes. free: bytes that are free where it writes.
    """

    steps: int
    batch: int
    step_seconds: float
    compile_seconds: float
    validation_seconds: float
    checkpoint_seconds: float
    sample_seconds: float
    peak_memory: int
    memory: int
    disk: int
    free: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        more = self.compile_seconds + self.validation_seconds + self.checkpoint_seconds + self.sample_seconds
        return self.steps * self.step_seconds + more

    def sentence(self) -> str:
        """Three lines: time, memory, disk."""
        parts = {
            "to compile": self.compile_seconds,
            "of validation": self.validation_seconds,
            "for checkpoints": self.checkpoint_seconds,
            "for samples": self.sample_seconds,
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


def sum_of(estimates: Iterable[Estimate]) -> Estimate:
    """Of runs of one recipe, one after the other: their times and disks together, and the largest of their memories."""
    all_of = list(estimates)
    first = all_of[0]
    steps = sum(one.steps for one in all_of)
    times = ("compile_seconds", "validation_seconds", "checkpoint_seconds", "sample_seconds")
    return dataclasses.replace(
        first,
        steps=steps,
        step_seconds=sum(one.steps * one.step_seconds for one in all_of) / steps,
        **{name: sum(getattr(one, name) for one in all_of) for name in times},
        peak_memory=max(one.peak_memory for one in all_of),
        disk=sum(one.disk for one in all_of),
        free=min(one.free for one in all_of),
    )


def estimate(
    model: nn.Module,
    latents: LatentDataset,
    settings: TrainSettings,
    directory: str | os.PathLike[str],
    *,
    validation: LatentDataset | None = None,
    config: SaladConfig | Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    decode: Decode | None = None,
) -> Estimate:
    """Take three steps, one validation forward and one checkpoint, and tell what a whole run would take.

    Arguments and errors are those of :func:`salad_compile.training.train`; every process calls it. Of a run that the
    directory holds already, settings of the conversion that are not given are those that it began with. Branches are
    afterwards as they were; the model is prepared for training, as train() leaves it. Nothing stays on the disk. Of
    data with several sizes up to three are measured, the largest among them, and the others are interpolated.
    """
    bare, target = single_model(model, "train"), as_directory(directory)
    require_kinds(settings, latents, validation, forward)
    wanted = dataclasses.replace(settings, trackers=(), steps=max(settings.steps, COUNTED_STEPS))
    given = Given(latents, validation, family_of(bare, wanted, forward), decode)
    begun = complete_checkpoints(target)
    run = prepare(bare, given, wanted, target, found=None, config=as_begun(config, begun[-1] if begun else None))
    parameters = run.engine.parameters
    keep = torch.clone if run.accelerator.is_fsdp2 else _on_the_host  # so that the peak is that of the run
    before = {name: keep(parameter.detach()) for name, parameter in parameters.items()}
    run.engine.bare.train()
    with _put_back(parameters, before), contextlib.closing(Rehearsal(run, settings)) as rehearsal:
        step_seconds = rehearsal.step_seconds()
        validation_seconds = 0.0 if validation is None else rehearsal.validation_seconds(validation)
        sample_seconds = rehearsal.sample_seconds()
        checkpoint_seconds, disk, free = _checkpoints(run, settings, target)
        first = rehearsal.first_seconds + rehearsal.compile_seconds()
    device = run.accelerator.device
    return Estimate(
        settings.steps,
        settings.batch,
        step_seconds,
        first,
        validation_seconds,
        checkpoint_seconds,
        sample_seconds,
        peak_memory(device),
        _memory(device),
        disk,
        free,
    )


@contextlib.contextmanager
def _put_back(parameters: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Afterwards, whatever happened within, the parameters have the values of before."""
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def _on_the_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", copy=True)


def _checkpoints(run: Run, settings: TrainSettings, directory: Path) -> tuple[float, int, int]:
    """Seconds of all checkpoints, the bytes that a run leaves at most, and those that are free."""
    there, writer = nearest_directory(directory), run.writer
    writer.directory = there
    writer.require_room()
    with _shared_folder(run, there) as folder:
        writer.directory = folder
        began = clock(run.accelerator.device)
        path = writer.write(0)
        seconds = clock(run.accelerator.device) - began
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
    """A folder that all processes see, and which the first one removes, with those of dry runs that were killed."""
    from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

    main = run.accelerator.is_main_process
    for left in parent.glob(f"{_FOLDER}*") if main else ():
        with contextlib.suppress(OSError), hold(left, seconds=0) as alone:  # another dry run holds its own
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    with name_failures(parent):
        made = [tempfile.mkdtemp(prefix=_FOLDER, dir=parent) if main else ""]
    (name,) = broadcast_object_list(made)
    try:
        with hold(Path(name)) if main else contextlib.nullcontext():
            yield Path(name)
    finally:
        if main:
            shutil.rmtree(name, ignore_errors=True)


def _memory(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"
