"""One optimizer step of a run: its micro-batches, losses and gradients; what is not finite changes nothing."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import torch

from salad_compile.common.logs import logger
from salad_compile.conversion.schedules import ramp_sparsity
from salad_compile.errors import TrainingError
from salad_compile.sites.branch import branches
from salad_compile.training.ahead import HOST
from salad_compile.training.distillation import SiteDistillation
from salad_compile.training.ema import MovingAverage
from salad_compile.training.engine import Engine
from salad_compile.training.families import Family
from salad_compile.training.feeding import Feed, Placed
from salad_compile.training.flow_matching import Noised, losses, stack
from salad_compile.training.interrupts import StopRequest
from salad_compile.training.preparation import DTYPES, mean_sparsity
from salad_compile.training.reference_states import target_of
from salad_compile.training.seeds import derive_seed


class Stepper:
    """Takes the steps of a run, on every process.

    Args:
        engine: model and optimizer. feed: the items of each step. family: what the model is called with.
        average: of the weights, which follows each step; None without one.
    """

    def __init__(self, engine: Engine, feed: Feed, family: Family, average: MovingAverage | None) -> None:
        self.engine, self.feed, self.family, self.average = engine, feed, family, average
        self.accelerator, self.settings = engine.accelerator, engine.settings
        self.known = branches(engine.bare)
        self.distillation = SiteDistillation(engine.bare, 1 / feed.accumulation)

    def take(self, step: int, drawn: list[Noised], stop: StopRequest) -> tuple[dict[str, Any], int]:
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
        """A micro-batch of :meth:`draw` where the model computes."""
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
