"""train(): fine-tune the branches of a converted model on precomputed latents, exactly resumable."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from salad_compile.common.files import name_failures, write_at_once
from salad_compile.common.locks import hold
from salad_compile.common.logs import logger
from salad_compile.common.paths import as_directory
from salad_compile.common.schema import stamp
from salad_compile.common.wrappers import single_model
from salad_compile.config import SaladConfig
from salad_compile.errors import ResumeError, TrainingError
from salad_compile.latents import LatentDataset
from salad_compile.salad_files.location import FILE_NAME
from salad_compile.salad_files.runs import SUMMARY_FILE, Checkpoint, checkpoint_name, complete_checkpoints
from salad_compile.salad_files.salad_file import save
from salad_compile.training.ahead import ahead
from salad_compile.training.checkpoints import (
    CheckpointWriter,
    Fingerprint,
    as_begun,
    digest_of_items,
    newest_checkpoint,
    require_same,
)
from salad_compile.training.ema import MovingAverage
from salad_compile.training.engine import Engine, make_accelerator
from salad_compile.training.families import Family, family_of
from salad_compile.training.feeding import Feed, name_dead_readers
from salad_compile.training.flow_matching import Forward, Noised
from salad_compile.training.interrupts import StopRequest
from salad_compile.training.outcome import TrainResult, outcome_of
from salad_compile.training.preparation import make_trainable, require_alike, require_converted, require_kinds
from salad_compile.training.records import EMA_FILE_NAME, Records, flat, read_log, require_trackers, set_aside
from salad_compile.training.samples import Decode, SampleStrips, require_decode
from salad_compile.training.settings import TrainSettings
from salad_compile.training.step import Stepper
from salad_compile.training.validation import first_losses, validation_loss

WAIT_SECONDS = 15.0  # for another run in the directory: processes that read ahead outlive a killed one for some seconds


def train(
    model: nn.Module,
    latents: LatentDataset,
    settings: TrainSettings,
    directory: str | os.PathLike[str],
    *,
    validation: LatentDataset | None = None,
    resume: bool = True,
    config: SaladConfig | Mapping[str, Any] | None = None,
    forward: Forward | None = None,
    decode: Decode | None = None,
) -> TrainResult:
    """Fine-tune a converted model in place. Under `accelerate launch` or torchrun every process calls it.

    The directory gets `log.jsonl`, `checkpoints/`, and in the end `salad.safetensors` and `training.json`; all
    processes must see it. Afterwards branches are fp32, and the base is frozen and in the precision of the settings.

    Args:
        model: converted, or with `config` to be converted; not wrapped.
        latents, validation: of :func:`salad_compile.latents.open_latents`.
        resume: from the newest complete checkpoint in the directory. False: the directory must hold no run.
        config: converts a model that is not converted, with the largest latent as example. Of a dictionary of fields,
            those that are missing are as the run in the directory began, else the defaults.
        forward: f(model, latents, timesteps, texts) -> predicted velocity, for models of no family that is known here:
            Wan, LTX-Video, HunyuanVideo and CogVideoX. A fifth parameter gets conditions of the data, by name.
        decode: of the VAE, for `sample_every`: a normalised latent (C, T, H, W) -> frames (F, height, width, 3) uint8.

    Raises:
        ConfigError: an argument is of the wrong kind, or settings, model and engine do not fit each other.
        NotConvertedError: no branch and no `config`.
        ResumeError: the directory holds another run, any run without `resume`, or one that would be lost.
        TrainingError: a loss that is not finite, or a checkpoint that cannot be written. What was written stays.
        MissingPackageError: accelerate or a tracker is not installed.
    """
    bare, target = single_model(model, "train"), as_directory(directory)
    require_kinds(settings, latents, validation, forward)
    family = family_of(bare, settings, forward)
    require_trackers(settings.trackers)
    found = newest_checkpoint(target, resume)
    given = Given(latents, validation, family, decode)
    run = prepare(bare, given, settings, target, found=found, config=config)
    with StopRequest() as stop:
        return run.run(found, stop)


@dataclass(frozen=True)
class Given:
    """What a run is given beside model and settings; as of :func:`train`."""

    latents: LatentDataset
    validation: LatentDataset | None
    family: Family
    decode: Decode | None = None


def prepare(
    bare: nn.Module,
    given: Given,
    settings: TrainSettings,
    directory: Path,
    *,
    found: Checkpoint | None,
    config: SaladConfig | Mapping[str, Any] | None,
) -> Run:
    """Model, data and engine of a run, which writes nothing yet; arguments and errors as of :func:`train`.

    Args:
        found: the checkpoint that the run is to go on from.
    """
    require_decode(settings, given.decode)
    accelerator = make_accelerator(settings, directory)
    feed = Feed(given.latents, settings, accelerator.process_index, accelerator.num_processes)
    if given.validation is not None:
        require_alike(given.validation, given.latents, given.family)
    require_converted(bare, given.latents, settings, as_begun(config, found), given.family)
    make_trainable(bare, settings.precision)
    fingerprint = Fingerprint.of(bare, given.latents)
    if found is not None:
        require_same(found, settings, fingerprint)
    return Run(Engine.prepare(accelerator, bare, settings), feed, given, directory, fingerprint)


class Run:
    """One run from its first or from a later step to its end."""

    def __init__(self, engine: Engine, feed: Feed, given: Given, directory: Path, fingerprint: Fingerprint) -> None:
        self.engine, self.feed, self.family = engine, feed, given.family
        self.accelerator, self.settings = engine.accelerator, engine.settings
        self.directory, self.validation = directory, given.validation
        shown = given.validation or given.latents
        strips = self.settings.sample_every
        self.strips = SampleStrips(engine, given.family, shown, given.decode, directory) if strips else None
        decay = self.settings.ema_decay
        self.average = MovingAverage(engine.parameters, decay) if decay else None
        self.stepper = Stepper(engine, feed, given.family, self.average)
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's own inside accelerate's
        main = bool(self.accelerator.is_main_process)
        self.writer = CheckpointWriter(
            directory, engine.bare, optimizer, self.average, self.settings, fingerprint, main
        )

    def run(self, found: Checkpoint | None, stop: StopRequest) -> TrainResult:
        self.accelerator.wait_for_everyone()  # every process has looked for checkpoints before the first is written
        with self._alone(found), name_dead_readers():
            return self._run(found, stop)

    @contextlib.contextmanager
    def _alone(self, found: Checkpoint | None) -> Iterator[None]:
        """Hold the directory against other runs.

        Raises:
            WriteError: it cannot be made, or another run writes there. ResumeError: another went on meanwhile.
        """
        if not self.accelerator.is_main_process:
            yield
            return
        folder = self.writer.folder
        with name_failures(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder, seconds=WAIT_SECONDS):
                newest = complete_checkpoints(self.directory)[-1:]
                if [c.step for c in newest] != ([] if found is None else [found.step]):
                    raise ResumeError(
                        f"another run in {self.directory} has just ended: start again to go on from there."
                    )
                yield

    def _run(self, found: Checkpoint | None, stop: StopRequest) -> TrainResult:
        first = self._start(found)
        self.engine.bare.train()
        records = Records(self.accelerator, self.directory, first, self.settings)
        step, stopped = first, 0
        try:
            self._measure_first(first, records)
            if self.strips is not None and first == 0:
                records.samples(0, self.strips.write(0, records.telling("samples")))
            with self._drawn(first) as drawn:
                while step < self.settings.steps and not stopped:
                    micro = [next(drawn) for _ in range(self.feed.accumulation)]
                    values, stopped = self.stepper.take(step, micro, stop)
                    step += 1
                    records.step(values)
                    self._after(step, records, stopped)
            if step == self.settings.steps:
                self._require_progress()
                records.result(step)
        finally:
            records.close()
        return self._end(step, stopped)

    def _start(self, found: Checkpoint | None) -> int:
        main = self.accelerator.is_main_process
        if main:
            self.writer.remove_leftovers()
            self.writer.require_room()
        if self.settings.trackers:
            self.accelerator.init_trackers("trackers", config=flat(self.settings))
        if found is None:
            return 0
        self.writer.read(found)
        logger.info("resuming from %s", found.path)
        if main and found.step < self.settings.steps:
            set_aside(self.directory, found.step)
        return found.step

    @contextlib.contextmanager
    def _drawn(self, first: int) -> Iterator[Iterator[Noised]]:
        """The micro-batches from step `first` on, on the host: made in a thread where items are read ahead."""
        loader = self.feed.micro_batches(first)  # here: its processes are forks of this thread's
        drawn = (self.stepper.draw(micro, first + n // self.feed.accumulation) for n, micro in enumerate(loader))
        del loader
        if not self.settings.workers:
            yield drawn
            return
        with ahead(drawn, self.accelerator.device) as made:
            yield made

    # --- between steps -----------------------------------------------------------------------------------------------

    def _measure_first(self, step: int, records: Records) -> None:
        """The losses that later ones are compared with, unless the run that goes on has measured them on this data."""
        if self.validation is None:
            return
        data = digest_of_items(self.validation)
        known = [line for line in read_log(self.directory) if line["step"] <= step and line.get("validation_data")]
        if known and known[-1]["validation_data"] == data:
            records.compare(known[-1])
            return
        if known:
            logger.warning("the validation data is not what it was: first losses are measured again, at step %d", step)
        now = step in (0, self.settings.steps) or bool(known)
        measured = first_losses(self.engine, self.validation, self.family, now=now, telling=records.telling)
        records.first(step, {"validation_data": data, **measured})

    def _after(self, step: int, records: Records, stopped: int) -> None:
        settings = self.settings
        last = step == settings.steps
        due = settings.validation_every and step % settings.validation_every == 0
        if self.validation is not None and (due or last):
            tell = records.telling("validation")
            records.validation(step, validation_loss(self.engine, self.validation, self.family, tell))
        if self.strips is not None and (last or step % settings.sample_every == 0):
            records.samples(step, self.strips.write(step, records.telling("samples")))
        if last or stopped or step % settings.checkpoint_every == 0:
            records.sync()
            self._checkpoint(step)

    def _require_progress(self) -> None:
        """Raises TrainingError where every step was left out: the branches are what they were at the beginning."""
        losses = [line["loss"] for line in read_log(self.directory) if "loss" in line]
        if losses and all(loss is None for loss in losses):
            raise TrainingError(
                f"nothing was trained: no loss of the {len(losses)} steps was finite, or no gradient, and "
                'on_non_finite="skip" left all of them out. on_non_finite="raise" names the items of the first one; '
                "where all items fail, look at the learning rate and at the model in this precision."
            )

    def _checkpoint(self, step: int) -> None:
        """All processes fail together, so that none waits for one that is gone."""
        failure = None
        try:
            self.writer.write(step)
        except TrainingError as error:
            failure = error
        failed = torch.tensor([float(failure is not None)], device=self.accelerator.device)
        if bool(self.accelerator.gather(failed).any()):
            raise failure or TrainingError(f"another process could not write the checkpoint of step {step}")

    def _end(self, step: int, stopped: int) -> TrainResult:
        finished = step == self.settings.steps
        file = None
        if finished:
            file = save(self.engine.bare, self.directory / FILE_NAME)
            if self.average is not None:
                self.average.swap()
                try:
                    save(self.engine.bare, self.directory / EMA_FILE_NAME)
                finally:
                    self.average.swap()
        self.accelerator.wait_for_everyone()
        log = read_log(self.directory)
        loss = next((line["loss"] for line in reversed(log) if "loss" in line), None)
        newest, outcome = self.writer.folder / checkpoint_name(step), outcome_of(log)
        checkpoint = newest if newest.is_dir() else None
        signal = 0 if finished else stopped
        result = TrainResult(finished, step, loss, outcome.now, file, outcome, checkpoint, signal)
        if finished and self.accelerator.is_main_process:
            self._summarise(result)
        self.accelerator.wait_for_everyone()  # afterwards all processes may read what is written
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return result

    def _summarise(self, result: TrainResult) -> None:
        summary = {
            "steps": result.step,
            "loss": result.loss,
            "validation_loss": result.validation_loss,
            "items": len(self.feed.latents),
            "processes": self.accelerator.num_processes,
            "outcome": result.outcome.to_dict(),
            "settings": self.settings.to_dict(),
        }
        with write_at_once(self.directory / SUMMARY_FILE) as temporary:
            temporary.write_text(json.dumps(stamp(summary), indent=1))
