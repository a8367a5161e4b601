"""Pre-training of the dense model on real videos, by time: stage after stage, the later ones with longer clips.

The clips and the noise of step n are a function of (stage, n). How many steps there are, and with them the learning
rate, depends on the clock. A checkpoint keeps the time that was used: a run that was killed goes on with what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flow import flow_losses
from model import ModelSize, VideoDiT
from real_presets import RealPreset, Stage
from real_videos import Films
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train import Training

from salad_compile.common.files import write_at_once

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_CHECKPOINTS = 60.0
SHARD = 12 * 2**20  # bytes of one file of weights
Clock = Callable[[], float]


class TimedTraining(Training):
    """A training whose learning rate follows the share of its time that is used; a checkpoint keeps it."""

    def __init__(self, model: torch.nn.Module, stage: Stage, number: int, preset: RealPreset) -> None:
        recipe = dataclasses.replace(
            preset.sizes.dense, batch=stage.batch, rate=stage.rate, warm_up=stage.warm_up, seed=number
        )
        super().__init__(model, recipe)
        self.stage, self.used = stage, 0.0  # share of the stage's time

    def rate(self) -> float:
        """The learning rate of this step."""
        warm = min(1.0, (self.step + 1) / self.stage.warm_up)
        fall = 0.5 * (1 + math.cos(math.pi * min(self.used, 1.0))) if self.stage.falls else 1.0
        return self.stage.rate * warm * fall

    def state(self) -> dict[str, Any]:
        """As of any training, with the share of the time."""
        return {**super().state(), "used": self.used}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        super().restore(state)
        self.used = state["used"]


def batch_of(films: Films, stage: Stage, seed: int, step: int, device: torch.device) -> tuple[Tensor, ...]:
    """Clips, labels, noise and noise levels of a step, shapes as in :func:`flow.flow_losses`."""
    clips = films.batch("train", seed, step * stage.batch, stage.batch, stage.clip)
    generator = torch.Generator(device).manual_seed(seed * 10_000_000 + step)
    noise = torch.randn(clips.shape, generator=generator, device=device)
    level = torch.rand(stage.batch, generator=generator, device=device)
    level = (level + torch.arange(stage.batch, device=device)) / stage.batch  # evenly spread
    return clips, torch.zeros(stage.batch, dtype=torch.int64, device=device), noise, level


def pretrain(
    films: Films,
    preset: RealPreset,
    seconds: float,
    folder: Path,
    device: torch.device,
    *,
    compiled: bool,
    clock: Clock = time.perf_counter,
) -> VideoDiT:
    """Train all stages within `seconds`, compilation included; go on from what `folder` holds.

    Returns:
        The model at the size of the last stage, in fp32.
    """
    weights: dict[str, Tensor] | None = None
    torch.manual_seed(preset.sizes.dense.seed)
    for number, stage in enumerate(preset.stages):
        model = VideoDiT(dataclasses.replace(preset.sizes.model, clip=stage.clip))
        if weights is not None:
            model.load_state_dict(weights)
        model.to(device)
        checkpoint, done = folder / f"stage{number}.pt", folder / f"stage{number}"
        if done.exists():
            model.load_state_dict(load_dense(done, model.size).state_dict())
        else:
            if compiled:
                for block in model.blocks:
                    block.compile(dynamic=False)
            training = TimedTraining(model, stage, number, preset)
            with attention_of(model.size, stage.batch, device):
                _train_stage(training, model, films, seconds * stage.share, checkpoint, device, clock)
            save_dense(model, done)
            checkpoint.unlink(missing_ok=True)
            torch._dynamo.reset()
        weights = model.state_dict()
    return model


def _train_stage(
    training: TimedTraining,
    model: VideoDiT,
    films: Films,
    seconds: float,
    checkpoint: Path,
    device: torch.device,
    clock: Clock,
) -> None:
    title = f"{math.prod(model.size.grid):,} tokens"
    if checkpoint.exists():
        training.load(checkpoint)
        print(f"{title}: continuing at step {training.step}, {training.used:.0%} of the time used", flush=True)
    first, before = training.step, training.used
    start = line_at = kept_at = clock()
    pending: list[Tensor] = []
    while training.used < 1:
        clips, labels, noise, level = batch_of(films, training.stage, training.recipe.seed, training.step, device)
        loss = flow_losses(model, clips, labels, noise, level).mean()
        training.advance(loss)
        pending.append(loss.detach())
        if len(pending) % 4 == 0 or device.type == "cpu":
            pending[-1].item()  # or the queue would run ahead of the clock
        now = clock()
        training.used = before + (now - start) / seconds
        if now - line_at > SECONDS_BETWEEN_LINES or training.used >= 1:
            mean, pace = float(torch.stack(pending).mean()), (training.step - first) / max(now - start, 1e-9)
            print(
                f"{title}: step {training.step}, {training.used:.0%} of the time, loss {mean:.4f}, {pace:.2f} steps/s",
                flush=True,
            )
            pending, line_at = [], now
        if now - kept_at > SECONDS_BETWEEN_CHECKPOINTS and training.used < 1:
            training.save(checkpoint)
            kept_at = clock()


# ---------------------------------------------------------------- the fastest dense attention


@contextlib.contextmanager
def attention_of(size: ModelSize, batch: int, device: torch.device) -> Iterator[None]:
    """Within it, dense attention is that of torch's backends which is fastest forward and backward at this size."""
    if device.type != "cuda":
        yield
        return
    shape = (batch, size.heads, math.prod(size.grid), size.width // size.heads)
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            found[backend] = _seconds_of(backend, shape, device)
        except RuntimeError as error:
            print(f"{backend.name}: {str(error).splitlines()[0]}", flush=True)
    said = ", ".join(f"{backend.name} {1000 * taken:.1f} ms" for backend, taken in found.items())
    print(f"attention of {shape}, forward and backward: {said}", flush=True)
    with sdpa_kernel(min(found, key=lambda backend: found[backend])) if found else contextlib.nullcontext():
        yield


def _seconds_of(backend: SDPBackend, shape: tuple[int, ...], device: torch.device) -> float:
    """Of a forward and backward pass, on operands that lie in memory as those of the model do."""
    batch, heads, tokens, head_dim = shape

    def rows() -> Tensor:
        return torch.randn(batch, tokens, heads, head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2)

    query, key = (rows().contiguous().requires_grad_() for _ in range(2))
    value, gradient = rows().requires_grad_(), rows()
    with sdpa_kernel(backend):
        for number in range(4):
            if number == 1:  # the first call plans
                torch.cuda.synchronize(device)
                start = time.perf_counter()
            F.scaled_dot_product_attention(query, key, value).backward(gradient)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / 3


# ---------------------------------------------------------------- files of weights


def save_dense(model: VideoDiT, folder: Path) -> None:
    """Write the weights in fp16 into files of at most SHARD bytes, or one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        shards[-1][name] = tensor.half().contiguous().cpu()
        if sum(t.numel() * 2 for t in shards[-1].values()) > SHARD - 2**20:
            shards.append({})
    for number, shard in enumerate(shard for shard in shards if shard):
        with write_at_once(folder / f"dense-{number}.safetensors") as temporary:
            save_file(shard, temporary)


def load_dense(folder: Path, size: ModelSize) -> VideoDiT:
    """The model in fp32 on the CPU; its weights are those of the files, which are fp16.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(folder.glob("dense-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no weights: run `python examples/experiment/real.py pretrain` first.")
    model = VideoDiT(size)
    model.load_state_dict({name: t.float() for file in files for name, t in load_file(file).items()})
    return model
