"""The training loop of every arm: AdamW, an average of the weights, a progress line, and a checkpoint to resume from.

The data of step n is a function of (seed, n): a run that was killed and resumed ends with the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from flow import Model, flow_losses
from torch import Tensor
from videos import ClipSize, draw

from salad_compile.common.files import write_at_once

FRESH_SEED, FIXED_SEED = 1_000_003, 3_000_017
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_CHECKPOINTS = 60.0


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    Attributes:
        steps, batch: of clips.
        rate: the highest learning rate, after `warm_up` steps; then a cosine to zero.
        clips: number of fixed clips, shuffled again in every pass; None draws new ones in every step.
        average: decay of the running mean of the weights, 0 for none.
        teacher: share of the target that is what the dense model predicts.
    """

    steps: int
    batch: int
    rate: float
    warm_up: int
    seed: int = 0
    clips: int | None = None
    average: float = 0.0
    weight_decay: float = 0.01
    largest_gradient: float = 1.0
    teacher: float = 0.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


class Batches:
    """The data of each step: clips, labels, noise and noise level, shapes as in :func:`flow.flow_losses`.

    Nothing here waits for the device.
    """

    def __init__(self, recipe: Recipe, size: ClipSize, device: torch.device) -> None:
        self.recipe, self.size, self.device = recipe, size, device
        self.order = None if recipe.clips is None else self._shuffle(recipe.clips).to(device)

    def _shuffle(self, clips: int) -> Tensor:
        """int64 (steps * batch or more,): pass after pass over the fixed clips."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        passes = -(-self.recipe.steps * self.recipe.batch // clips)
        return torch.cat([torch.randperm(clips, generator=generator) for _ in range(passes)])

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        recipe, device = self.recipe, self.device
        first, last = step * recipe.batch, (step + 1) * recipe.batch
        if self.order is None:
            clips = draw(FRESH_SEED, torch.arange(first, last, device=device), self.size)
        else:
            clips = draw(FIXED_SEED, self.order[first:last], self.size)
        generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_000 + step)
        noise = torch.randn(clips.video.shape, generator=generator, device=device)
        # evenly spread levels, so that every step has both low and high noise
        level = torch.rand(recipe.batch, generator=generator, device=device)
        level = (level + torch.arange(recipe.batch, device=device)) / recipe.batch
        return clips.video, clips.labels, noise, level


class Training:
    """A model in training: everything that a checkpoint holds."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("the model has no trainable parameter")
        device = next(iter(self.trained.values())).device
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=recipe.rate, weight_decay=recipe.weight_decay, fused=device.type == "cuda"
        )
        self.mean = {name: p.detach().clone() for name, p in self.trained.items()} if recipe.average else {}
        self.step = 0

    def rate(self) -> float:
        """The learning rate of this step."""
        return self.recipe.rate_at(self.step)

    def advance(self, loss: Tensor) -> None:
        """One step of the optimiser, and of the running mean."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.largest_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.mean:
            decay = min(self.recipe.average, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.mean.values()), list(self.trained.values()), 1 - decay)

    @torch.no_grad()
    def use_mean(self) -> None:
        """Replace the weights by their running mean."""
        for name, value in self.mean.items():
            self.trained[name].copy_(value)

    def save(self, path: Path) -> None:
        """Write a temporary file and rename it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_at_once(path) as temporary:
            torch.save({"recipe": vars(self.recipe), **self.state()}, temporary)

    def state(self) -> dict[str, Any]:
        """Weights, running mean, optimiser and step."""
        state = {"step": self.step, "mean": self.mean, "optimizer": self.optimizer.state_dict()}
        return {**state, "trained": {name: p.detach() for name, p in self.trained.items()}}

    def load(self, path: Path) -> None:
        """Continue where :meth:`save` left off.

        Raises:
            ValueError: the file belongs to another recipe or another model.
        """
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["recipe"] != vars(self.recipe):
            raise ValueError(f"{path} was written with another recipe: {state['recipe']}. Remove it to start anew.")
        if set(state["trained"]) != set(self.trained):
            raise ValueError(f"{path} holds other parameters than this model trains. Remove it to start anew.")
        self.restore(state)

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        for name, value in state["trained"].items():
            self.trained[name].copy_(value)
        for name, value in state["mean"].items():
            self.mean[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def train(
    training: Training,
    model: Model,
    size: ClipSize,
    device: torch.device,
    *,
    title: str,
    checkpoint: Path | None = None,
    log: Path | None = None,
    on_checkpoint: Callable[[], None] = lambda: None,
    stop_after: int | None = None,
    teacher: Model | None = None,
) -> float:
    """Train to the end of the recipe.

    Args:
        model: the callable, compiled or not; its parameters are those of `training`.
        checkpoint: file of the state, written during the run; an existing one is continued. log: JSON lines.
        stop_after: number of steps after which to return, as if the run had been killed.
        teacher: the dense model, if the recipe has a share for it.

    Returns:
        The mean loss over the last tenth of the steps of this call.
    """
    recipe = training.recipe
    if checkpoint is not None and checkpoint.exists():
        training.load(checkpoint)
        print(f"{title}: continuing at step {training.step}", flush=True)
    batches = Batches(recipe, size, device)
    first, losses, pending = training.step, [], []
    start = line_at = kept_at = time.perf_counter()
    end = recipe.steps if stop_after is None else min(recipe.steps, first + stop_after)
    while training.step < end:
        loss = flow_losses(model, *batches[training.step], teacher, recipe.teacher).mean()
        training.advance(loss)
        pending.append(loss.detach())
        now = time.perf_counter()
        if now - line_at > SECONDS_BETWEEN_LINES or training.step == end:
            recent = torch.stack(pending).tolist()  # waits for the device: not in every step
            losses += recent
            pending, line_at = [], now
            pace = (training.step - first) / max(time.perf_counter() - start, 1e-9)
            _report(title, training, sum(recent) / len(recent), pace, log)
        if checkpoint is not None and now - kept_at > SECONDS_BETWEEN_CHECKPOINTS:
            training.save(checkpoint)
            on_checkpoint()
            kept_at = time.perf_counter()
    if checkpoint is not None:
        training.save(checkpoint)
    last = losses[-max(len(losses) // 10, 1) :]
    return sum(last) / len(last) if last else math.nan


def _report(title: str, training: Training, loss: float, pace: float, log: Path | None) -> None:
    recipe = training.recipe
    left = (recipe.steps - training.step) / max(pace, 1e-9)
    print(
        f"{title}: step {training.step}/{recipe.steps}  loss {loss:.4f}  {pace:.2f} it/s  {left:.0f} s left", flush=True
    )
    if log is not None:
        with log.open("a") as file:
            file.write(json.dumps({"title": title, "step": training.step, "loss": loss, "pace": pace}) + "\n")
