"""train(): fine-tune the branches of a converted model on precomputed latents, exactly resumable."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from salad_compile.common.files import name_failures, write_at_once
from salad_compile.common.locks import hold
from salad_compile.common.logs import logger
from salad_compile.common.schema import stamp
from salad_compile.common.wrappers import single_model
from salad_compile.config import SaladConfig
from salad_compile.conversion.schedules import ramp_sparsity
from salad_compile.errors import ResumeError, TrainingError
from salad_compile.latents import LatentDataset
from salad_compile.salad_files.location import FILE_NAME
from salad_compile.salad_files.runs import SUMMARY_FILE, Checkpoint, checkpoint_name, complete_checkpoints
from salad_compile.salad_files.salad_file import save
from salad_compile.sites.branch import branches
from salad_compile.training.ahead import HOST, ahead
from salad_compile.training.checkpoints import (
    CheckpointWriter,
    Fingerprint,
    as_begun,
    digest_of_items,
    newest_checkpoint,
    require_same,
)
from salad_compile.training.distillation import SiteDistillation
from salad_compile.training.ema import MovingAverage
from salad_compile.training.engine import Engine, make_accelerator
from salad_compile.training.families import Family, family_of
from salad_compile.training.feeding import Feed, Placed, name_dead_readers
from salad_compile.training.flow_matching import Forward, Noised, losses, stack
from salad_compile.training.interrupts import StopRequest
from salad_compile.training.outcome import TrainResult, outcome_of
from salad_compile.training.preparation import DTYPES, make_trainable, mean_sparsity, require_converted
from salad_compile.training.records import EMA_FILE_NAME, Records, flat, read_log, require_trackers, set_aside
from salad_compile.training.reference_states import target_of
from salad_compile.training.samples import Decode, SampleStrips, require_decode
from salad_compile.training.seeds import derive_seed
from salad_compile.training.settings import TrainSettings
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
        ConfigError: settings, model and engine do not fit each other. NotConvertedError: no branch and no `config`.
        ResumeError: the directory holds a run with other settings, model or data, any run without `resume`, or one that
            is finished, or has checkpoints, and none that is complete.
        TrainingError: a loss that is not finite, or a checkpoint that cannot be written. What was written stays.
        MissingPackageError: accelerate or a tracker is not installed.
    """
    bare, target = single_model(model, "train"), Path(directory)
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
        self.known = branches(engine.bare)
        decay = self.settings.ema_decay
        self.average = MovingAverage(engine.parameters, decay) if decay else None
        optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # torch's own inside accelerate's
        main = bool(self.accelerator.is_main_process)
        self.writer = CheckpointWriter(
            directory, engine.bare, optimizer, self.average, self.settings, fingerprint, main
        )
        self.distillation = SiteDistillation(engine.bare, 1 / feed.accumulation)

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
                records.samples(0, self.strips.write(0))
            with self._drawn(first) as drawn:
                while step < self.settings.steps and not stopped:
                    values, stopped = self.take_step(step, [next(drawn) for _ in range(self.feed.accumulation)], stop)
                    step += 1
                    records.step(values)
                    self._after(step, records, stopped)
            if step == self.settings.steps:
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
        drawn = (self.draw(micro, first + n // self.feed.accumulation) for n, micro in enumerate(loader))
        del loader
        if not self.settings.workers:
            yield drawn
            return
        with ahead(drawn, self.accelerator.device) as made:
            yield made

    # --- one step ----------------------------------------------------------------------------------------------------

    def take_step(self, step: int, drawn: list[Noised], stop: StopRequest) -> tuple[dict[str, Any], int]:
        """Step number `step`, counted from 0: its line of the log, and the number of a signal that came, or 0.

        Args:
            drawn: of :meth:`draw`, one for each micro-batch.
        """
        settings = self.settings
        # for what a model draws itself (dropout)
        torch.manual_seed(derive_seed(settings.seed, "model", step, self.accelerator.process_index))
        if settings.sparsity_warmup and step <= settings.sparsity_warmup:
            ramp_sparsity(self.engine.bare, step / settings.sparsity_warmup)
        rate = self.engine.set_learning_rate(step)
        distils = step < settings.distillation_steps
        if not distils:
            self.engine.checkpoint_activations()
        samples = [self.on_device(batch) for batch in drawn]
        own = self._distil(samples) if distils else self.match_flow(samples)
        each, stopped = self._gather(own, stop)
        norm = self.engine.clip()
        finite = bool(each.isfinite().all()) and math.isfinite(norm)
        if not finite:
            self._not_finite(step, each, norm)
        else:
            self.engine.optimizer.step()
        self.engine.optimizer.zero_grad()
        if self.average is not None and finite:
            self.average.step()
        values = {
            "step": step + 1,
            "loss": float(each.double().mean()) if finite else None,
            "learning_rate": rate,
            "gradient_norm": norm if finite else None,
            "sparsity": round(mean_sparsity(self.known), 6),
            "stage": "distillation" if distils else "flow matching",
        }
        return values, stopped

    def draw(self, micro: list[Placed], step: int) -> Noised:
        """A micro-batch with its noise, on the host, in the dtype of the model."""
        batch = stack([self.family.sample(item, step, place) for place, item in micro])
        return batch.to(HOST, DTYPES[self.settings.precision])

    def on_device(self, batch: Noised) -> Noised:
        return batch.to(self.accelerator.device, DTYPES[self.settings.precision])

    def match_flow(self, samples: list[Noised]) -> torch.Tensor:
        """Gradients of the mean over the global batch; the losses of this process's samples."""
        found, predict = [], partial(self.family.predict, self.engine.wrapped)
        for number, batch in enumerate(samples):
            last = number == len(samples) - 1
            target = target_of(batch, self.settings.teacher, self.known.values(), predict)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.engine.wrapped):
                each = losses(predict(batch), target, batch.given, batch.weights)
                self.accelerator.backward(each.mean() / len(samples))
            found.append(each.detach())
        return torch.cat(found)

    def _distil(self, samples: list[Noised]) -> torch.Tensor:
        """As :meth:`match_flow`, of the sites' own errors."""
        found = []
        # what is compiled runs as it was: the hooks that compare are not there when it is traced
        with self.distillation.watching(), torch.compiler.set_stance("force_eager"):
            for batch in samples:
                self.distillation.errors.clear()
                self.family.predict(self.engine.bare, batch)
                found.append(self.distillation.losses())
        self.engine.set_gradients(self.distillation.take_gradients())
        return torch.cat(found)

    def _gather(self, own: torch.Tensor, stop: StopRequest) -> tuple[torch.Tensor, int]:
        """The losses of the global batch by place, (batch,), on the CPU; and the signal that any process got, or 0."""
        sent = torch.cat([own, own.new_tensor([float(stop.number)])])
        rows = self.accelerator.gather(sent[None]).cpu()
        each = torch.empty(self.settings.batch)
        for rank, row in enumerate(rows):
            each[[place for places in self.feed.places(rank) for place in places]] = row[:-1]
        return each, int(rows[:, -1].max())

    def _not_finite(self, step: int, each: torch.Tensor, norm: float) -> None:
        names = self.feed.names(step)
        bad = [name for name, loss in zip(names, each.tolist(), strict=True) if not math.isfinite(loss)]
        said = f"the loss of {', '.join(bad)}" if bad else f"the gradient (its norm is {norm}) of {', '.join(names)}"
        text = f"step {step + 1}: {said} is not finite"
        if self.settings.on_non_finite == "raise":
            raise TrainingError(
                f"{text}. Nothing was changed by this step, and the checkpoints are as they were. Look at these items; "
                'on_non_finite="skip" leaves such steps out.'
            )
        logger.warning("%s: the step is left out", text)

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
        measured = first_losses(self.engine, self.validation, self.family, now=now)
        records.first(step, {"validation_data": data, **measured})

    def _after(self, step: int, records: Records, stopped: int) -> None:
        settings = self.settings
        last = step == settings.steps
        due = settings.validation_every and step % settings.validation_every == 0
        if self.validation is not None and (due or last):
            records.validation(step, validation_loss(self.engine, self.validation, self.family))
        if self.strips is not None and (last or step % settings.sample_every == 0):
            records.samples(step, self.strips.write(step))
        if last or stopped or step % settings.checkpoint_every == 0:
            records.sync()
            self._checkpoint(step)

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
                save(self.engine.bare, self.directory / EMA_FILE_NAME)
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
