"""encode_clips: clips through a pipeline's encoders into our own format, resumable, with a part held out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from salad_compile.common.logs import logger
from salad_compile.common.paths import as_directory
from salad_compile.common.progress import ProgressBar
from salad_compile.common.reports import plural
from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents.dataset import summary_of
from salad_compile.latents.encoding.decoding import read_beside, read_frames, require_av
from salad_compile.latents.encoding.finding import Clip, Clips, require_apart
from salad_compile.latents.encoding.pipeline import PipelineEncoder
from salad_compile.latents.encoding.sizes import ClipSize
from salad_compile.latents.item import LatentItem
from salad_compile.latents.native import FOLDER, INDEX, INFO, NativeWriter
from salad_compile.latents.source import Problem
from salad_compile.latents.storing import save_text, writing_in

PLAN = "salad_encoding.json"
_SOME_WEIGHTS = 4096  # of a tensor
VALIDATION = "validation"  # the folder of the part that is held out, within the output


@dataclass(frozen=True)
class EncodingReport:
    """What encode_clips did.

    Attributes:
        path: the new dataset. validation: the part that was held out, or None.
        written: clips encoded now. kept: those that an earlier run had encoded. held_out: of both, in `validation`.
        skipped: clips that were left out, with the reason.
    """

    path: Path
    validation: Path | None
    written: int
    kept: int
    held_out: int
    skipped: tuple[Problem, ...]


def encode_clips(
    clips: Clips,
    encoder: PipelineEncoder,
    output: str | os.PathLike[str],
    *,
    size: ClipSize | None = None,
    validation_share: float = 0.0,
    progress: bool = True,
) -> EncodingReport:
    """Write a dataset of normalised latents and texts. Run again, it goes on where it stopped.

    A clip is one file, which appears as a whole, so a kill loses the clip at hand. Clips that were added, changed or
    given another caption are encoded by the next run; those that were removed leave the dataset.

    Args:
        clips: of :func:`find_clips`. encoder: of the pipeline that is to be trained.
        output: a directory: new, empty, or of an earlier run with the same settings.
        validation_share: part of the clips, at least one, for `output/validation`; which, follows from their names.
        progress: show it.

    Raises:
        ConfigError: settings that do not fit the model or the earlier run; or memory runs out.
        LatentItemError: no clip can be encoded. MissingPackageError: PyAV is not installed.
        WriteError: for example, the disk is full. Clips that were written stay, for the next run; without any, nothing
            is left.
    """
    size, goal = size or ClipSize(), as_directory(output)
    if not 0 <= validation_share < 1:
        raise ConfigError(f"the validation share is in [0, 1), got {validation_share}.")
    if validation_share and len(clips.clips) < 2:
        raise ConfigError("a part can be held out of two clips or more, and there is one.")
    size.require_fit(encoder.multiple, encoder.temporal, encoder.time_patch)
    require_apart(goal, clips.folder)
    if any(not clip.path.is_dir() for clip in clips.clips):
        require_av()
    encoder.require_texts()
    new = not goal.exists()
    with writing_in(goal):
        plan = _plan(encoder, size, validation_share)
        try:
            _claim(goal, plan)
            encoding = _Encoding(clips, encoder, goal, size, plan)
            return encoding.run(_held_out(clips.clips, goal, validation_share), progress)
        except BaseException:
            _leave_no_traces(goal)
            if new:
                with contextlib.suppress(OSError):  # it is not empty
                    goal.rmdir()
            raise


class _Encoding:
    """One run over all clips."""

    def __init__(
        self, clips: Clips, encoder: PipelineEncoder, goal: Path, size: ClipSize, plan: dict[str, Any]
    ) -> None:
        self.clips, self.encoder, self.goal, self.size, self.plan = clips, encoder, goal, size, plan
        self.skipped = list(clips.left_out)
        self.cut: list[str] = []  # clips whose caption is longer than what the text encoder takes

    def run(self, held_out: set[str], progress: bool) -> EncodingReport:
        for problem in self.skipped:
            logger.warning("skipped: %s", problem)
        with_more = next((clip for clip in self.clips.clips if clip.beside), None)
        if with_more is not None and not self.encoder.takes_context:
            logger.warning(
                "%s of %s and others beside clips are left out: %s takes none",
                *(next(iter(with_more.beside)), with_more.name, self.encoder.name),
            )
        training = self._writer(self.goal)
        validation = self._writer(self.goal / VALIDATION) if held_out else None
        written = kept = outside = 0
        with ProgressBar(self.goal.name, len(self.clips.clips), shown=progress) as bar:
            for clip in self.clips.clips:
                writer = validation if validation is not None and clip.name in held_out else training
                done = self._clip(clip, writer)
                written, kept = written + (done == "written"), kept + (done == "kept")
                outside += writer is validation and done != "skipped"
                bar.advance(note=f"{len(self.skipped)} skipped" if self.skipped else None)
        if self.cut:
            logger.warning(
                "%s too long for the text encoder of %s, and the end is cut off: %s first",
                *(plural(len(self.cut), "caption"), self.encoder.name, self.cut[0]),
            )
        if not written + kept - outside:
            raise LatentItemError(f"no clip of {self.clips.folder} could be encoded. {summary_of(self.skipped)}")
        if validation is not None:
            validation.finish()
        training.finish()
        place = None if validation is None else validation.directory
        return EncodingReport(self.goal, place, written, kept, outside, tuple(self.skipped))

    def _writer(self, directory: Path) -> NativeWriter:
        encoded = {name: value for name, value in self.plan.items() if name != "statistics"}  # info.json has them
        return NativeWriter(directory, self.encoder.statistics, encoded=encoded)

    def _clip(self, clip: Clip, writer: NativeWriter) -> str:
        """Encode a clip, unless an earlier run did: "written", "kept" or "skipped"."""
        try:
            origin = clip.origin
            if writer.keep(clip.name, origin):
                return "kept"
            frames = read_frames(clip, self.size, self.encoder.multiple)
            beside = read_beside(clip, frames, self.size) if self.encoder.takes_context else None
            found = self.encoder.encode(frames.pixels, clip.caption, beside)
            item = LatentItem(clip.name, found.latent, found.text, clip.caption, frames.fps, found.extras)
            writer.write(item, origin)
            if self.encoder.tokens_beyond(clip.caption):
                self.cut.append(clip.name)
        except (LatentItemError, FileNotFoundError) as error:
            problem = Problem(clip.name, str(error).removeprefix(clip.name).lstrip(":, "))
            self.skipped.append(problem)
            logger.warning("skipped: %s", problem)
            return "skipped"
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"memory runs out at {clip.name}, {tuple(frames.pixels.shape)}: choose fewer frames or a smaller size, "
                "or let the VAE work in tiles (--tiling)."
            ) from error
        logger.info("%s: latent %s, text %s", clip.name, tuple(item.latent.shape), tuple(item.text.shape))
        return "written"


def _held_out(clips: Sequence[Clip], goal: Path, share: float) -> set[str]:
    """Names of the clips for validation.

    Those that an earlier run has held out stay there, and those that it has trained on stay in training: what is left
    is filled up in the order of the digests of their names.
    """
    if not share:
        return set()
    place = {
        clip.name: folder
        for folder in (VALIDATION, "")
        for clip in clips
        if NativeWriter.file_of(goal / folder, clip.name).exists()
    }
    count = min(max(1, round(share * len(clips))), len(clips) - 1)
    found = {name for name, folder in place.items() if folder == VALIDATION}
    others = (clip.name for clip in clips if clip.name not in place)
    free = sorted(others, key=lambda name: hashlib.sha256(name.encode()).digest())
    return found | set(free[: max(0, count - len(found))])


def _plan(encoder: PipelineEncoder, size: ClipSize, share: float) -> dict[str, Any]:
    """Everything that must be equal for a run to go on."""
    pipeline = encoder.pipeline
    encoders = [name for name in ("vae", "text_encoder", "text_encoder_2", "image_encoder") if hasattr(pipeline, name)]
    return {
        "pipeline": encoder.name,
        **{name: _digest_of(getattr(pipeline, name)) for name in encoders if getattr(pipeline, name) is not None},
        **json.loads(json.dumps(asdict(size))),
        "validation_share": share,
        "statistics": encoder.statistics.to_dict(),
    }


def _digest_of(module: Any) -> str:
    """Class, and a digest of the configuration and of some weights: enough to tell two models apart."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    kept = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    weights = list(module.parameters())
    for tensor in (weights[0], weights[len(weights) // 2], weights[-1]):
        some = tensor.detach().flatten()[:_SOME_WEIGHTS].cpu()
        digest.update(f"{len(weights)} {some.dtype}".encode() + some.view(torch.uint8).numpy().tobytes())
    return f"{type(module).__name__} {digest.hexdigest()[:16]}"


def _claim(goal: Path, plan: dict[str, Any]) -> None:
    """Leave a note of these settings in an empty directory, or find the one of an earlier run.

    Raises:
        ConfigError: the directory holds something else, or data of other settings.
    """
    note = goal / PLAN
    _leave_no_traces(goal)
    if not note.exists():
        if any(not file.name.startswith(".") for file in goal.iterdir()):
            raise ConfigError(f"{goal} is not empty, and no earlier encoding was made there.")
        save_text(note, json.dumps(plan, indent=1))
        return
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
        different = [name for name in {**before, **plan} if before.get(name) != plan.get(name)]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{note} cannot be read ({error}): write to another directory, or delete it.") from error
    if different:
        said = "; ".join(f"{name} {_short(before.get(name))}, and not {_short(plan.get(name))}" for name in different)
        raise ConfigError(f"{goal} holds clips that were encoded with {said}: write to another directory.")


def _leave_no_traces(goal: Path) -> None:
    """Of an encoding that ended before its first clip: other settings may follow it."""
    places = (goal, goal / VALIDATION)
    if not (goal / PLAN).exists() or any((place / INDEX).exists() or any(_items(place)) for place in places):
        return
    for place in reversed(places):
        for file in (place / INFO, place / PLAN):
            file.unlink(missing_ok=True)
        for folder in (place / FOLDER, *([place] if place != goal else [])):
            with contextlib.suppress(OSError):  # it is not there, or holds something else
                folder.rmdir()


def _items(place: Path) -> Iterator[Path]:
    return (place / FOLDER).glob("*.safetensors")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
