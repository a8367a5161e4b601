"""A few steps and validations of a run, timed: what they take again and again, and what the first ones take beyond it.

What is compiled here is in the caches of Inductor and Triton when the run itself begins. So first calls are timed once
more, after everything compiled was forgotten: what they take then is what the run will wait.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from salad_compile.common.progress import ProgressBar
from salad_compile.common.sharding import reshard
from salad_compile.latents import LatentDataset
from salad_compile.sites.branch import branches
from salad_compile.training.feeding import Placed
from salad_compile.training.interrupts import StopRequest
from salad_compile.training.loop import Run
from salad_compile.training.preparation import DTYPES
from salad_compile.training.reference_states import as_base
from salad_compile.training.settings import TrainSettings

MEASURED_STEPS = 3  # of each size; the first compiles, and makes the optimizer's state
MOST_STEPS = 6  # where the others differ: other programs were in the way of one
ALIKE = 0.05
MEASURED_FORWARDS = 4  # of a validation, likewise
MEASURED_SIZES = 3
COUNTED_STEPS = 1000  # of which the sizes are counted

Shape = tuple[int, ...]


class Rehearsal:
    """Times parts of one run, which afterwards has other branches and the optimizer's state of some steps.

    Args:
        run: prepared for at least `COUNTED_STEPS` steps. settings: of the run, with its own number of steps.

    Attributes:
        first_seconds: what first calls took beyond later ones, of what is not compiled; and importing the compiler.
    """

    def __init__(self, run: Run, settings: TrainSettings) -> None:
        self.run, self.settings = run, settings
        self.first_seconds = 0.0
        self._compiled: list[Callable[[], object]] = []  # first calls of these compile
        if settings.compile != "none":
            self.first_seconds += _import_compiler()
        self._stop = StopRequest()  # not entered: nothing is there that an interruption could spoil
        main = bool(run.accelerator.is_main_process)
        self.bar = ProgressBar("dry run", MEASURED_STEPS, shown=main, every=1)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def step_seconds(self) -> float:
        """Of one step, the mean over the whole run."""
        total = 0.0
        for numbers, count in _stages(self.settings):
            if count:
                total += count * statistics.fmean(self._stage(number) for number in numbers)
        return total / self.settings.steps

    def validation_seconds(self, latents: LatentDataset) -> float:
        """Of all validations: those between steps and the last, and the three before the first step."""
        world = int(self.run.accelerator.num_processes)
        forwards = -(-len(latents) * self.settings.validation_points // world)
        every, steps = self.settings.validation_every, self.settings.steps
        later = -(-steps // every) if every else 1
        with as_base(branches(self.run.engine.bare).values()):
            dense = self._forward(latents, True)
        return forwards * ((later + 2) * self._forward(latents, False) + dense)

    def sample_seconds(self) -> float:
        """Of all sampled clips: the base model's once, SALAD's at the start, every so many steps and at the end."""
        strips, every, steps = self.run.strips, self.settings.sample_every, self.settings.steps
        if strips is None:
            return 0.0
        forwards = self.settings.sample_steps * (1 if self.settings.sample_guidance == 1.0 else 2)
        with as_base(branches(self.run.engine.bare).values()):
            dense = self._forward(strips.latents, True)
        sparse, latent = self._forward(strips.latents, False), strips.latents[0].latent
        decoding = self._time(lambda: strips.decode(latent.to(self.run.accelerator.device)))
        times = 1 + -(-steps // every)
        one = times * (forwards * sparse + decoding) + forwards * dense + decoding
        return len(strips.indices) * one

    def compile_seconds(self) -> float:
        """What the run will wait for compilation, which finds in the caches what was compiled here."""
        if not self._compiled:
            return 0.0
        torch.compiler.reset()
        total = 0.0
        for call in self._compiled:
            first, again = self._time(call), self._time(call)
            total += max(first - again, 0.0)
        return total

    def _stage(self, number: int) -> float:
        """Seconds of one step as step `number` is, the mean over the sizes of the data."""
        sizes = Counter(self._shape(step) for step in range(COUNTED_STEPS))
        return _mean(sizes, {shape: self._steps(number, shape) for shape in _to_measure(sizes)})

    def _steps(self, number: int, shape: Shape) -> float:
        step = next(step for step in range(COUNTED_STEPS) if self._shape(step) == shape)
        times: list[float] = []
        while len(times) < MEASURED_STEPS or (len(times) < MOST_STEPS and self._differ(times[1:])):
            read = self._clock()
            batches = [self.run.stepper.draw(micro, number) for micro in self._micro_batches(step)]
            began = self._clock() if self.settings.workers else read  # others read ahead, and a thread draws
            self.run.stepper.take(number, batches, self._stop)
            times.append(self._clock() - began)
            self.bar.advance(note=f"{times[-1]:.3g} s")
        # a GPU that begins to work is faster than one that is warm: the last one is like those that follow
        seconds = statistics.median(times[1:]) if self._differ(times[1:]) else times[-1]
        distils = number < self.settings.distillation_steps
        if self.settings.compile == "none" or distils:
            self.first_seconds += max(times[0] - seconds, 0.0)
        else:
            self._compiled.append(lambda: self._backward(self._micro_batches(step)[0], number))
        return seconds

    def _backward(self, micro: list[Placed], number: int) -> None:
        """Forward and backward of one micro-batch, and a step."""
        engine = self.run.engine
        engine.bare.train()
        stepper = self.run.stepper
        stepper.match_flow([stepper.on_device(stepper.draw(micro, number))])
        engine.optimizer.step()
        engine.optimizer.zero_grad()

    def _forward(self, latents: LatentDataset, dense: bool) -> float:
        """Seconds of one forward of a validation, the mean over its sizes."""
        sizes = Counter(map(tuple, latents.shapes))
        found = {}
        for shape in _to_measure(sizes):
            index = list(map(tuple, latents.shapes)).index(shape)
            call = partial(self._validate, latents, index)
            times = [self._time(call) for _ in range(MEASURED_FORWARDS)]
            found[shape] = statistics.median(times[1:])
            if self.settings.compile == "none":
                self.first_seconds += max(times[0] - found[shape], 0.0)
            else:
                self._compiled.append(partial(call, dense))
        return _mean(sizes, found)

    @torch.no_grad()
    def _validate(self, latents: LatentDataset, index: int, dense: bool = False) -> None:
        """One forward of a validation. dense: as the base model, where the branches are not so already."""
        run, model = self.run, self.run.engine.bare
        model.eval()
        sample = run.family.validation_sample(latents[index], index, 0)
        sample = sample.to(run.accelerator.device, DTYPES[self.settings.precision])
        with as_base(branches(model).values()) if dense else contextlib.nullcontext():
            run.family.predict(run.engine.wrapped, sample)
        reshard(model)
        model.train()

    def _micro_batches(self, step: int) -> list[list[Placed]]:
        """The items of one step, read in this process."""
        feed = self.run.feed
        indices = feed.batches.at(step)
        return [[(place, feed.latents[indices[place]]) for place in places] for places in feed.places(feed.rank)]

    def _shape(self, step: int) -> Shape:
        return tuple(self.run.feed.latents.shapes[self.run.feed.batches.at(step)[0]])

    def _differ(self, times: list[float]) -> bool:
        """Whether times are not alike, in any process: all of them take the same steps."""
        accelerator = self.run.accelerator
        found = torch.tensor([float(max(times) - min(times) > ALIKE * min(times))], device=accelerator.device)
        return bool(accelerator.gather(found).any())

    def _time(self, call: Callable[[], object]) -> float:
        began = self._clock()
        call()
        return self._clock() - began

    def _clock(self) -> float:
        return clock(self.run.accelerator.device)


def _import_compiler() -> float:
    """Seconds that it takes to import what torch imports when it first compiles, unless that is done already.

    `torch._inductor.compile_fx` is private (torch 2.11 and 2.13): tests/salad_compile/training/test_dry_run.py fails
    when it goes.
    """
    began = time.perf_counter()
    importlib.import_module("torch._inductor.compile_fx")
    return time.perf_counter() - began


def clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _stages(settings: TrainSettings) -> Iterator[tuple[tuple[int, ...], int]]:
    """Parts of a run in which steps take the same time, or change it evenly: steps to measure, and how many there are.

    While the sparsity grows, steps become shorter as it does: the mean of the first and the last is theirs.
    """
    steps, warmup = settings.steps, settings.sparsity_warmup
    distilled = min(settings.distillation_steps, steps)
    grows = min(max(warmup - distilled, 0), steps - distilled)
    yield (0,), distilled
    yield (distilled, distilled + grows), grows
    yield (max(distilled, warmup),), steps - distilled - grows


def _to_measure(sizes: Counter[Shape]) -> list[Shape]:
    """The most frequent one, the largest and the smallest; the largest first, which takes the memory."""
    wanted = {sizes.most_common(1)[0][0], max(sizes, key=_elements), min(sizes, key=_elements)}
    return sorted(wanted, key=_elements, reverse=True)[:MEASURED_SIZES]


def _elements(shape: Shape) -> int:
    return torch.Size(shape).numel()


def _mean(sizes: Counter[Shape], measured: Mapping[Shape, float]) -> float:
    """Over all sizes, as often as they come; linear between the measured ones."""
    known = {_elements(shape): seconds for shape, seconds in measured.items()}
    return sum(count * _between(known, _elements(shape)) for shape, count in sizes.items()) / sum(sizes.values())


def _between(known: Mapping[int, float], wanted: int) -> float:
    """Linear between the two known neighbours."""
    if wanted in known:
        return known[wanted]
    low = max(size for size in known if size < wanted)
    high = min(size for size in known if size > wanted)
    return known[low] + (known[high] - known[low]) * (wanted - low) / (high - low)
