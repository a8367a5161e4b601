"""The rows on real videos: what each changes, its fine-tuning by `salad_compile.training`, and what is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn as nn
from arms import Arm, UnknownArmError, build, config_of
from flow import HELD_OUT_SEED, Triples, held_out_loss, psnr, sample, ssim
from real_presets import RealPreset
from real_train import attention_of, load_dense
from real_videos import Films, Part
from torch import Tensor
from videos import COLOURS

import salad_compile
from salad_compile.backend import salad
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.salad_files.runs import SUMMARY_FILE
from salad_compile.training import TrainSettings, train
from salad_compile.training.loop import EMA_FILE_NAME

TUNE_SEED = 4_000_037
UNTRAINED, TUNED, LONGER = "Untrained", "Fine-tuned", "Fine-tuned for longer"
_MAP = {"rope_placement": "map-then-rotate"}  # the default of SaladConfig
_TAIL: dict[str, Any] = {**_MAP, "compensation": "tail", "compensation_pool": 256}
_LORA: dict[str, Any] = {**_MAP, "linear_branch": False}
_ERROR: dict[str, Any] = {**_TAIL, "pattern": "error8"}

# In this order: the most important first. Query blocks of 128 tokens and key blocks of 64, unless "64" is in the name.
# A fine-tuned arm has a row at an early step, at which all are compared, and some have one at the last step, under
# another name.
REAL_ARMS = (
    Arm("dense", "as pre-trained", UNTRAINED, kind="dense", trained=False),
    Arm("sparse-only", "converted", UNTRAINED, settings=_MAP, query_blocks=2, trained=False),
    Arm("tail-only", "and means of 256 tokens", UNTRAINED, settings=_TAIL, query_blocks=2, trained=False),
    Arm("sparse-only-64", "query blocks of 64", UNTRAINED, settings=_MAP, trained=False),
    Arm("tail-only-64", "query blocks of 64, means of 256", UNTRAINED, settings=_TAIL, trained=False),
    Arm("salad-tail", "SALAD and means of 256 tokens", TUNED, settings=_TAIL, query_blocks=2),
    Arm("sparse-lora", "LoRA, no linear branch", TUNED, settings=_LORA, query_blocks=2),
    Arm("salad", "SALAD", TUNED, settings=_MAP, query_blocks=2),
    Arm("tail-lora", "LoRA and means, no linear branch", TUNED, settings={**_TAIL, **_LORA}, query_blocks=2),
    Arm("salad-tail-64", "as salad-tail, query blocks of 64", TUNED, settings=_TAIL),
    Arm("salad-64", "as salad, query blocks of 64", TUNED, settings=_MAP),
    Arm("error-only", "tail-only, blocks by what means get wrong", UNTRAINED, "salad", _ERROR, 2, trained=False),
    Arm("error-only-64", "the same, query blocks of 64", UNTRAINED, settings=_ERROR, trained=False),
    Arm("salad-error-64", "salad-tail-64, blocks by what means get wrong", TUNED, settings=_ERROR),
    Arm("salad-error-64-taught", "the same, taught by the dense model", TUNED, settings=_ERROR, teacher=1.0),
    Arm("salad-tail-64-taught", "salad-tail-64, taught", TUNED, settings=_TAIL, teacher=1.0),
    Arm("tail-lora-64-taught", "LoRA and means, taught", TUNED, settings={**_TAIL, **_LORA}, teacher=1.0),
    Arm("dense-lora", "LoRA, nothing left out", TUNED, settings={**_LORA, "sparsity": 0.0}, query_blocks=2),
    *(
        Arm(f"{name}-long", f"{name}, as long as the time allowed", LONGER, settings=settings, trained=False, of=name)
        for name, settings in (
            ("salad-tail-64", _TAIL),
            ("salad-error-64", _ERROR),
            ("salad-tail-64-taught", _TAIL),
            ("salad-error-64-taught", _ERROR),
            ("tail-lora-64-taught", {**_TAIL, **_LORA}),
            ("dense-lora", {**_LORA, "sparsity": 0.0}),
        )
    ),
)


def real_arm_named(name: str) -> Arm:
    """Raises UnknownArmError."""
    for arm in REAL_ARMS:
        if arm.name == name:
            return arm
    raise UnknownArmError(f"no arm {name!r}. There are: {', '.join(arm.name for arm in REAL_ARMS)}.")


@dataclass(frozen=True)
class Place:
    """Device, sizes and files of a run.

    Attributes:
        films: the file of films. base: folder of the dense weights. kept: folder of checkpoints and tuned branches.
        rows: file of the results. workers: processes that read clips, for each fine-tuning.
    """

    device: torch.device
    preset: RealPreset
    films: Path
    base: Path
    kept: Path
    rows: Path
    compiled: bool
    workers: int

    def folder_of(self, arm: Arm, seed: int) -> Path:
        """Where the trainer of an arm keeps its files."""
        return self.kept / f"{arm.name}-{seed}"


# ---------------------------------------------------------------- fine-tuning


class RealClips(LatentDataset):
    """As many random clips of the training part as one arm may see; the same for every arm."""

    def __init__(self, films: Films, preset: RealPreset) -> None:
        self.films, self.size = films, preset.sizes.model.clip
        count = preset.sizes.tune.steps * preset.sizes.tune.batch
        self.names = [f"clip {number}" for number in range(count)]
        self.shapes = [(COLOURS, self.size.frames, self.size.edge, self.size.edge)] * count

    def __getitem__(self, index: int) -> LatentItem:
        """The clip in place of a latent, and its label, 0, in place of a text."""
        clip = self.films.clip("train", TUNE_SEED, index, self.size)
        return LatentItem(self.names[index], clip, torch.zeros(1, 1))


def predict(model: nn.Module, latents: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
    """The velocity as the product's trainer asks for it: (B, 3, T, S, S), timesteps in [0, 1000], labels as texts."""
    with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=latents.device.type == "cuda"):
        out: Tensor = model(latents, timesteps / 1000, texts[:, 0, 0].long())
    return out


def settings_for(preset: RealPreset, steps: int, seed: int, workers: int, teacher: float = 0.0) -> TrainSettings:
    """The recipe of every fine-tuned arm, up to step `steps`."""
    tune = preset.sizes.tune
    return TrainSettings(
        steps=steps,
        batch=tune.batch,
        micro_batch=preset.micro_batch,
        learning_rate=tune.rate,
        warmup_steps=tune.warm_up,
        betas=(0.9, 0.99),
        flow_shift=1.0,
        text_dropout=0.0,
        text_tokens=1,
        teacher=teacher,
        ema_decay=preset.ema,
        precision="fp32",  # with autocast to bf16, as in the pre-training
        gradient_checkpointing=False,
        compile="none",  # the blocks are compiled already
        seed=seed,
        checkpoint_every=preset.sizes.tune.steps + 1,
        keep_last=1,
        workers=workers,
    )


@dataclass(frozen=True)
class Tuned:
    """Where a fine-tuning stood after a chunk.

    Attributes:
        seconds: since its begin, compilation included. loss: of the last step. file: the running mean of the branches.
    """

    steps: int
    seconds: float
    loss: float | None
    file: Path


RECORD = "tuned.jsonl"


def tune(
    model: nn.Module,
    films: Films,
    preset: RealPreset,
    folder: Path,
    seed: int,
    *,
    seconds: float,
    workers: int,
    steps: int | None = None,
    teacher: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Fine-tune with the product's trainer, chunk after chunk, each of which goes on where the last one ended.

    Ends at the end of the recipe or after `steps` steps, or before the chunk that would not end within `seconds`. Every
    chunk leaves a file of the branches, so that arms which came to different steps can be compared at the same one.

    Returns:
        The step at which it ended.
    """
    clips, start = RealClips(films, preset), clock()
    done, pace, last = 0, 0.0, min(preset.sizes.tune.steps, steps or preset.sizes.tune.steps)
    while done < last:
        begun = clock()
        sizes = [size * preset.chunk for size in (9, 3, 1)]  # few long ones, since each starts the readers anew
        sizes = [size for size in sizes if done >= preset.compared or done + size <= preset.compared] or sizes[-1:]
        fitting = [size for size in sizes if not done or begun - start + size * pace <= seconds]
        if not fitting:
            break
        to = min(done + fitting[0], last)
        result = train(model, clips, settings_for(preset, to, seed, workers, teacher), folder, forward=predict)
        pace = (clock() - begun) / (to - done)
        done = result.step
        (folder / SUMMARY_FILE).unlink(missing_ok=True)  # or the next chunk would set this one's files aside
        file = folder / f"ema-{done:06}.safetensors"
        if not file.exists() and (folder / EMA_FILE_NAME).exists():
            shutil.copy(folder / EMA_FILE_NAME, file)
            line = {"steps": done, "seconds": round(clock() - start, 1), "loss": result.loss}
            with (folder / RECORD).open("a") as record:
                record.write(json.dumps(line) + "\n")
    return done


def tunings(folder: Path) -> dict[int, Tuned]:
    """Step -> what is known of a fine-tuning there; empty if there is none."""
    lines = (folder / RECORD).read_text().splitlines() if (folder / RECORD).exists() else []
    found = [json.loads(line) for line in lines]
    return {one["steps"]: Tuned(**one, file=folder / f"ema-{one['steps']:06}.safetensors") for one in found}


def common_step(arms: Sequence[Arm], place: Place, seed: int) -> int | None:
    """The last step, at most that at which arms are compared, that all of those that were fine-tuned have a file of."""
    steps = [set(tunings(place.folder_of(arm, seed))) for arm in arms if arm.trained]
    shared = set.intersection(*(own for own in steps if own)) if any(steps) else set()
    return max((step for step in shared if step <= place.preset.compared), default=None)


# ---------------------------------------------------------------- measuring


def held_out(films: Films, part: Part, preset: RealPreset, device: torch.device) -> Triples:
    """Half of the held-out clips, with fixed noise and evenly spread levels; the noise is drawn on the CPU."""
    count, size = preset.sizes.held_out // 2, preset.sizes.model.clip
    clips = films.batch(part, HELD_OUT_SEED, 0, count, size).to(device)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    order = torch.randperm(count, generator=generator)
    noise = torch.randn(clips.shape, generator=generator)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    return Triples(clips, labels, noise.to(device), ((order + 0.5) / count).to(device))


def difference_error(clips: Tensor, reference: Tensor) -> float:
    """Mean absolute difference of the differences between frames; pixels of [-1, 1]. What flickers is high."""
    ours, theirs = (clip.clamp(-1, 1).diff(dim=2) for clip in (clips, reference))
    return float((ours - theirs).abs().double().mean())


class Judge:
    """Measures models with the same clips and noises; holds what the dense model makes of them."""

    def __init__(self, films: Films, dense: nn.Module, preset: RealPreset, device: torch.device) -> None:
        self.preset, self.parameters = preset, sum(p.numel() for p in dense.parameters())
        self.parts = {part: held_out(films, part, preset, device) for part in ("later", "other")}
        self.reference = self.clips(dense)

    def clips(self, model: nn.Module) -> dict[str, Tensor]:
        """ "samples" from noise, and "restored" from "noised": held-out clips; fp32 (samples, 3, T, S, S)."""
        preset = self.preset
        half = -(-preset.sizes.samples // 2)
        pick = [torch.cat([t[:half] for t in tensors]) for tensors in zip(*self.parts.values(), strict=True)]
        original, labels, noise, _ = pick
        noised = original + preset.restored_level * (noise - original)
        return {
            "samples": sample(model, noise, labels, preset.sizes.sampler_steps),
            "restored": sample(model, noised, labels, preset.restored_steps, preset.restored_level),
            "original": original,
            "noised": noised,
        }

    def measure(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The columns of a row, and the clips that were compared with the dense model's."""
        batch, columns = self.preset.sizes.evaluation_batch, {}
        for part, triples in self.parts.items():
            columns[f"loss_{part}"], columns[f"levels_{part}"] = held_out_loss(model, triples, batch)
        found = self.clips(model)
        for kind in ("samples", "restored"):
            ours, dense = found[kind], self.reference[kind]
            columns |= {f"psnr_{kind}": psnr(ours, dense), f"ssim_{kind}": ssim(ours, dense)}
            columns[f"difference_{kind}"] = difference_error(ours, dense)
        columns["psnr_original"] = psnr(found["restored"], found["original"])
        columns["held_out_loss"] = (columns["loss_later"] + columns["loss_other"]) / 2
        columns["held_out_by_level"] = [
            (a + b) / 2 for a, b in zip(columns["levels_later"], columns["levels_other"], strict=True)
        ]
        return columns, found


# ---------------------------------------------------------------- one row


def make(arm: Arm, place: Place, seed: int) -> nn.Module:
    """The arm's model on its device, converted, before any training."""
    sizes = place.preset.sizes
    return build(arm, load_dense(place.base, sizes.model).to(place.device), sizes, place.device, seed)


def tune_arm(arm: Arm, films: Films, place: Place, seed: int, seconds: float, most: int | None = None) -> None:
    """Convert, compile and fine-tune one arm.

    Args:
        films: on the CPU, where the trainer's processes read clips. most: steps, if not those of the recipe.
    """
    model = make(arm, place, seed)
    if place.compiled:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend=salad, dynamic=False)  # not by its name, which only an installation makes known
    folder = place.folder_of(arm, seed)
    left: dict[str, Any] = {"seconds": seconds, "workers": place.workers, "steps": most}
    size = place.preset.sizes.model
    with attention_of(size, place.preset.micro_batch, place.device) if arm.teacher else contextlib.nullcontext():
        steps = tune(model, films, place.preset, folder, seed, teacher=arm.teacher, **left)
    print(f"{arm.name} {seed}: fine-tuned for {steps} steps", flush=True)


def judge_arm(arm: Arm, judge: Judge, place: Place, seed: int, step: int | None) -> dict[str, Tensor]:
    """Measure one arm, fine-tuned ones as they were at `step`, or in the end; append the row. Returns the clips.

    Raises:
        FileNotFoundError: it is to be fine-tuned, and was not.
    """
    start = time.perf_counter()
    model, tuned = make(arm, place, seed), None
    whose = real_arm_named(arm.of) if arm.of else arm
    if whose.trained:
        known = tunings(place.folder_of(whose, seed))
        tuned = known.get(max(known, default=0) if arm.of else step or 0)
        if tuned is None:
            raise FileNotFoundError(f"{whose.name} was not fine-tuned: run `real.py tune {whose.name}` first.")
        salad_compile.load(model, tuned.file)
    columns, clips = judge.measure(model)
    sizes = place.preset.sizes
    settings = {
        "tune": dataclasses.asdict(sizes.tune) | {"steps": tuned.steps if tuned else 0, "teacher": whose.teacher},
        "rank": sizes.rank,
        "trained": whose.trained,
        "model": dataclasses.asdict(sizes.model),
    }
    if arm.kind == "salad":
        settings["config"] = config_of(arm, sizes).to_dict()
    row = {
        "arm": arm.name,
        "seed": seed,
        **columns,
        "training_loss": tuned.loss if tuned else None,
        "training_seconds": tuned.seconds if tuned else 0.0,
        "tokens": math.prod(sizes.model.grid),
        "parameters": judge.parameters,
        "seconds": round(time.perf_counter() - start, 1),
        "settings": settings,
        **results.about_this_run(place.device),
    }
    results.append(place.rows, row)
    print(f"{arm.name} {seed}: held-out loss {row['held_out_loss']:.5f}, {row['seconds']} s", flush=True)
    return clips
