"""Where a step of the fine-tuning on real videos spends its time: data, noise, forward and backward, optimizer, device.

    python examples/experiment/real_profile.py salad            random weights and clips: nothing needs to be there
    python examples/experiment/real_profile.py salad --tiny     in seconds on a CPU; its numbers mean nothing

Parts are measured with the device waited for after each, the whole step without; the device's own time is that of its
kernels, so the share of a step in which it is idle shows what the process makes it wait for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from arms import build
from model import VideoDiT
from real_arms import predict, real_arm_named, settings_for
from real_presets import REAL, TINY_REAL, RealPreset
from torch.profiler import ProfilerActivity, profile
from videos import COLOURS

from salad_compile.backend import salad
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.training.ahead import ahead
from salad_compile.training.families import family_of
from salad_compile.training.interrupts import StopRequest
from salad_compile.training.loop import Given, Run
from salad_compile.training.loop import prepare as prepare_run


class NoiseClips(LatentDataset):
    """Random clips, as many as steps take."""

    def __init__(self, preset: RealPreset, count: int) -> None:
        clip = preset.sizes.model.clip
        self.names = [f"clip {number}" for number in range(count)]
        self.shapes = [(COLOURS, clip.frames, clip.edge, clip.edge)] * count

    def __getitem__(self, index: int) -> LatentItem:
        """A clip of uniform noise, which costs about what reading a real one does."""
        drawing = torch.Generator().manual_seed(index)
        return LatentItem(self.names[index], torch.rand(self.shapes[index], generator=drawing), torch.zeros(1, 1))


class Parts:
    """Seconds of named parts, each with the device waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)

    def wait(self) -> None:
        """For the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds to a part."""
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] += time.perf_counter() - began


def make_run(arm: str, preset: RealPreset, device: torch.device, steps: int, folder: Path, workers: int) -> Run:
    """The product's trainer on one arm, with random weights; blocks are compiled."""
    torch.manual_seed(0)
    model = VideoDiT(preset.sizes.model)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    converted = build(real_arm_named(arm), model.to(device), preset.sizes, device, 0)
    for block in converted.blocks:  # type: ignore[union-attr]
        block.compile(backend=salad, dynamic=False)
    settings = settings_for(preset, steps, 0, workers)
    clips = NoiseClips(preset, settings.steps * settings.batch)
    given = Given(clips, None, family_of(converted, settings, predict))
    run = prepare_run(converted, given, settings, folder, found=None, config=None)
    run.engine.bare.train()
    return run


def measure(run: Run, steps: int) -> dict[str, float]:
    """Seconds of each part of a step, and of whole steps."""
    parts, stop = Parts(run.accelerator.device), StopRequest()
    loader = run.feed.micro_batches(0)
    taken = run.feed.accumulation
    for number in range(2):  # compiles, and fills what is kept
        with parts.of("first steps"):
            run.stepper.take(number, [run.stepper.draw(next(loader), number) for _ in range(taken)], stop)
    for number in range(2, 2 + steps):
        with parts.of("reading"):
            micro = [next(loader) for _ in range(taken)]
        with parts.of("noise"):
            drawn = [run.stepper.draw(one, number) for one in micro]
        with parts.of("copying"):
            samples = [run.stepper.on_device(one) for one in drawn]
        with parts.of("forward and backward"):
            run.stepper.match_flow(samples)
        with parts.of("optimizer"):
            run.engine.clip()
            run.engine.optimizer.step()
            run.engine.optimizer.zero_grad()
    drawn_ahead = (run.stepper.draw(micro, 2 + steps) for micro in loader)
    with ahead(drawn_ahead, run.accelerator.device) as made:
        for number in range(2 + steps, 2 + 2 * steps):
            with parts.of("whole step"):
                run.stepper.take(number, [next(made) for _ in range(taken)], stop)
    return {name: seconds / (2 if name == "first steps" else steps) for name, seconds in parts.seconds.items()}


def kernels(run: Run, first: int) -> tuple[float, str]:
    """Seconds of the device in one step, and a table of its kernels."""
    loader, stop = run.feed.micro_batches(first), StopRequest()
    drawn = [run.stepper.draw(next(loader), first) for _ in range(run.feed.accumulation)]
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run.stepper.take(first, drawn, stop)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profiler.key_averages()
    on_device = [e for e in events if e.device_type.name != "CPU" and not e.is_user_annotation]  # else counted twice
    busy = sum(event.self_device_time_total for event in on_device) / 1e6
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return busy, events.table(sort_by=order, row_limit=40, max_name_column_width=80)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=4, help="that are measured in each way")
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(
            options.arm,
            TINY_REAL if options.tiny else REAL,
            device,
            3 + 2 * options.steps,
            Path(folder),
            0 if options.tiny else options.workers,
        )
        found = measure(run, options.steps)
        print(json.dumps({name: round(seconds, 4) for name, seconds in found.items()}), flush=True)
        busy, table = kernels(run, 2 + 2 * options.steps)
        print(table)
        print(f"{options.arm}: the device is busy for {busy:.3f} s of a step of {found['whole step']:.3f} s")


if __name__ == "__main__":
    main()
