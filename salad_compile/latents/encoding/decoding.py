"""read_frames: the frames of a clip at a rate and size, decoded by PyAV, or from a folder of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.reports import plural
from salad_compile.errors import LatentItemError, MissingPackageError
from salad_compile.latents.encoding.companions import Beside, only, read_image
from salad_compile.latents.encoding.finding import IMAGES, Clip
from salad_compile.latents.encoding.sizes import ClipSize, longest
from salad_compile.latents.source import item_error

_EARLY = 1e-3  # of a frame's duration: times are rounded to the time base of their file

_MOST_PIXELS = 2**27  # of a frame; a damaged file may ask for more than there is memory
_LIMITS = {"max_pixels": str(_MOST_PIXELS)}


@dataclass(frozen=True)
class Frames:
    """pixels: (frames, 3, height, width) uint8. fps: of them, or None where nothing says it."""

    pixels: Tensor
    fps: float | None


@dataclass(frozen=True)
class _Picture:
    """A decoded frame: its time in seconds, (H, W, 3) uint8, and the width of a pixel over its height."""

    time: float
    pixels: Tensor
    aspect: float = 1.0


def require_av() -> None:
    """Raises MissingPackageError."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingPackageError('videos are decoded by PyAV: pip install "salad-compile[clips]"') from error


def read_frames(clip: Clip, size: ClipSize, multiple: int) -> Frames:
    """The first frames of a clip, scaled to cover the size and cut at its middle.

    A frame of the result is the one that is shown at its time, so that other rates drop or repeat frames.

    Args:
        multiple: of pixels, for buckets.

    Raises:
        LatentItemError: the clip cannot be decoded, or is too short. MissingPackageError: PyAV is not installed.
    """
    rate, pictures = _open(clip, size.fps)
    found: list[Tensor] = []
    choice: tuple[int, int] | None = None
    try:
        for picture in _at_rate(pictures, size.fps):
            height, width = picture.pixels.shape[:2]
            choice = choice or size.choose(height, width * picture.aspect, multiple)
            if math.prod(_covering(picture, *choice)) > _MOST_PIXELS:
                shape = f"{width} x {height} pixels, each {picture.aspect:g} times as wide as high"
                raise item_error(clip.name, f"it cannot be cut to this size: it says that it has {shape}")
            found.append(_cover(picture, *choice))
            if len(found) == max(size.frames):
                break
    except LatentItemError:
        if longest(size.frames, len(found)) is None:
            raise
    count = longest(size.frames, len(found))
    if count is None:
        at = f" at {size.fps:g} frames per second" if size.fps else ""
        raise item_error(clip.name, f"it has {plural(len(found), 'frame')}{at}, {min(size.frames)} are asked for")
    return Frames(torch.stack(found[:count]), size.fps or rate)


def read_beside(clip: Clip, frames: Frames, size: ClipSize) -> Beside:
    """The control video, mask and references beside a clip, at its size and rate.

    Raises:
        LatentItemError: one cannot be decoded, or is shorter than the clip.
    """
    count, _, height, width = frames.pixels.shape
    own = ClipSize((count,), height, width, size.fps)
    found: dict[str, Tensor | None] = {}
    for role in ("control", "mask"):
        path = only(clip.name, role, clip.beside.get(role, ()))
        if path is None or path.is_dir() or path.suffix.lower() not in IMAGES:
            place = None if path is None else Clip(f"{clip.name}, its {role}", path, "")
            found[role] = None if place is None else read_frames(place, own, 1).pixels
        else:
            picture = _Picture(0.0, read_image(clip.name, path).permute(1, 2, 0))
            found[role] = _cover(picture, height, width)[None].expand(count, -1, -1, -1)
    references = tuple(read_image(clip.name, path) for path in clip.beside.get("reference", ()))
    return Beside(found["control"], found["mask"], references)


def _open(clip: Clip, fps: float | None) -> tuple[float | None, Iterator[_Picture]]:
    """Frames per second as recorded, and the pictures."""
    if clip.path.is_dir():
        return None, _read_images(clip, fps)
    require_av()
    import av

    try:
        container: Any = av.open(str(clip.path), options=_LIMITS)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise item_error(clip.name, f"it cannot be decoded: {_reason(error)}") from error
    if not container.streams.video:
        container.close()
        raise item_error(clip.name, "it cannot be decoded: it has no video")
    stream = container.streams.video[0]
    if getattr(stream, "codec_context", None) is None:
        container.close()
        raise item_error(clip.name, "it cannot be decoded: FFmpeg has no decoder for it")
    stream.codec_context.options = _LIMITS
    stream.thread_type = "AUTO"
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None, _decode(clip, container, stream, float(rate) if rate else None)


def _decode(clip: Clip, container: Any, stream: Any, rate: float | None) -> Iterator[_Picture]:
    """Raises LatentItemError, at the place where the file is damaged."""
    import av

    with container:
        try:
            for number, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:  # FFmpeg fills what is missing with a guess, and says so here alone
                    raise item_error(clip.name, f"it cannot be decoded: its frame {number + 1} is damaged")
                time = frame.time if frame.time is not None else number / (rate or 1.0)
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                aspect = float(_pixel_aspect(stream))
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                if turns:
                    pixels, aspect = torch.rot90(pixels, turns, (0, 1)), 1 / aspect if turns % 2 else aspect
                yield _Picture(time, pixels, aspect)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise item_error(clip.name, f"it cannot be decoded: {_reason(error)}") from error


def _pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel over its height; 1 where the file says nothing of use."""
    ratio = stream.sample_aspect_ratio
    return Fraction(ratio) if ratio and ratio > 0 else Fraction(1)


def _read_images(clip: Clip, fps: float | None) -> Iterator[_Picture]:
    """The images of a folder; their rate is the one asked for. Raises LatentItemError."""
    size = None
    for number, file in enumerate(clip.images):
        pixels = read_image(clip.name, file).permute(1, 2, 0)
        size = size or pixels.shape
        if pixels.shape != size:
            there, first = (f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, size))
            raise item_error(clip.name, f"its images have several sizes: {file.name} is {there}, and the first {first}")
        yield _Picture(number / (fps or 1.0), pixels)


def _at_rate(pictures: Iterator[_Picture], fps: float | None) -> Iterator[_Picture]:
    """One picture for each 1/fps seconds from the first one on: the last that is not later. None: all as they come."""
    if fps is None:
        yield from pictures
        return
    shown, start, number = None, 0.0, 0
    for picture in pictures:
        if shown is None:
            shown, start = picture, picture.time
            continue
        while start + number / fps < picture.time - _EARLY / fps:
            yield shown
            number += 1
        shown = picture
    if shown is not None and start + number / fps <= shown.time + _EARLY / fps:
        yield shown


def _covering(picture: _Picture, height: int, width: int) -> tuple[int, int]:
    """The size to scale to, with pixels made square, to cover another."""
    rows, columns = picture.pixels.shape[0], picture.pixels.shape[1] * picture.aspect
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def _cover(picture: _Picture, height: int, width: int) -> Tensor:
    """(3, height, width) uint8: scaled to cover, and cut at the middle."""
    pixels = picture.pixels.permute(2, 0, 1)
    target = _covering(picture, height, width)
    if target != tuple(pixels.shape[1:]):
        scaled = torch.nn.functional.interpolate(
            pixels[None].float(), target, mode="bicubic", antialias=True, align_corners=False
        )[0]
        pixels = scaled.round().clamp(0, 255).to(torch.uint8)
    top, left = (target[0] - height) // 2, (target[1] - width) // 2
    return pixels[:, top : top + height, left : left + width].contiguous()


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
