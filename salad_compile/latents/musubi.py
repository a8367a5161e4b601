"""Reads and writes the caches of musubi-tuner for Wan.

Seen in kohya-ss/musubi-tuner: dataset/cache_io.py at 07f78ab, dataset/image_video_dataset.py at 0061e6e.

    <name>_<pos>-<frames>_<WWWW>x<HHHH>_wan.safetensors   latents_{F}x{H}x{W}_{dtype}  [C, F, H, W], normalised
                                                          latents_image_{F}x{H}x{W}_{dtype}  [4 + C, F, H, W],
                                                          latents_control_..., clip_{dtype}, f_indices_...
    <name>_wan_te.safetensors                             varlen_t5_{dtype}            [L, D], without padding

`_<pos>-<frames>` is there for clips of videos and not for images; all clips of a video share one text. Metadata:
architecture, width, height, frame_count (latents), caption1 (text), format_version.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from salad_compile.common.files import name_failures
from salad_compile.common.inside import require_inside
from salad_compile.common.tensor_files import open_safetensors, require_digest
from salad_compile.latents.item import CLIP_FEATURE, CONTROL, FRAME_INDICES, LATENTS_IMAGE, LatentItem, Shape
from salad_compile.latents.source import Entry, LatentSource, as_latent_shape, unique_names
from salad_compile.latents.statistics import WAN_2_1
from salad_compile.latents.storing import file_stem, save_tensors

_FILE = re.compile(r"(?P<name>.+)_\d{4,}x\d{4,}_wan\.safetensors")
_CLIP = re.compile(r"(?P<video>.+)_\d+-\d+(-\d+)?")
_LATENT_KEY = re.compile(r"latents_(\d+)x(\d+)x(\d+)_\w+")
_TEXT_KEY = "varlen_t5_"
_EXTRA_KEYS = (
    (re.compile(r"latents_image_\d+x\d+x\d+_\w+"), LATENTS_IMAGE),
    (re.compile(r"latents_control_\d+x\d+x\d+_\w+"), CONTROL),
    (re.compile(r"clip_\w+"), CLIP_FEATURE),
    (re.compile(r"f_indices(_\w+)?"), FRAME_INDICES),
)
_FORMAT_VERSION = "1.0.1"
_NAME = "salad_name"  # our own metadata, which musubi-tuner does not look at: the name before it became a file name
_FPS = "salad_fps"
# Wan's VAE: 8 pixels per latent in height and width, 4 frames per latent after the first
_PIXELS, _FRAMES = 8, 4


class MusubiSource(LatentSource):
    """All `*_wan.safetensors` of a directory, in the order of their names. Headers of both files are read at once."""

    layout = "musubi"
    normalized = True

    def __init__(self, path: Path) -> None:
        self.statistics = WAN_2_1
        self._files = [(file, _text_file(file)) for file in _latent_files(path)]
        heads = [_head(*pair) for pair in self._files]
        names = unique_names([name for name, _, _ in heads], [file.name for file, _ in self._files])
        self.entries = [Entry(name, shape, problem) for name, (_, shape, problem) in zip(names, heads, strict=True)]
        self.left_out = _left_out([file for file, _ in self._files[:1]])

    @classmethod
    def matches(cls, path: Path) -> bool:
        return path.is_dir() and bool(_latent_files(path))

    def load(self, index: int) -> LatentItem:
        name, (latent_file, text_file) = self.entries[index].name, self._files[index]
        with open_safetensors(latent_file) as content:
            latent = _as_written(content, _latent_key(content))
            extras = _extras(content)
            fps = (content.metadata() or {}).get(_FPS)
        with open_safetensors(text_file) as content:
            text = _as_written(content, _text_key(content))
            caption = (content.metadata() or {}).get("caption1", "")
        return LatentItem(name, latent, text, caption, float(fps) if fps else None, extras)


class MusubiWriter:
    """Writes item by item; the file of the latent comes last, so that it says that both are there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with name_failures(directory):
            directory.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, shape: Shape) -> bool:
        """Whether an interrupted run wrote this item."""
        return self._latent_file(name, shape).exists()

    def write(self, item: LatentItem) -> None:
        """Write both files of an item. The size is that of Wan's VAE."""
        _, frames, height, width = item.latent.shape
        common = {"architecture": "wan", "format_version": _FORMAT_VERSION}
        text, kind = item.text.detach().cpu(), str(item.text.dtype).removeprefix("torch.")
        save_tensors(
            self.directory / f"{file_stem(item.name)}_wan_te.safetensors",
            {f"{_TEXT_KEY}{kind}": text},
            {**common, "caption1": item.caption},
        )
        size = {"width": str(width * _PIXELS), "height": str(height * _PIXELS), "frame_count": str(_pixels(frames))}
        ours = {_NAME: item.name, **({} if item.fps is None else {_FPS: repr(item.fps)})}
        save_tensors(
            self._latent_file(item.name, (len(item.latent), frames, height, width)),
            {f"latents_{frames}x{height}x{width}_float32": item.latent.detach().cpu().float()},
            {**common, **size, **ours},
        )

    def _latent_file(self, name: str, shape: Shape) -> Path:
        _, frames, height, width = shape
        size = f"{width * _PIXELS:04d}x{height * _PIXELS:04d}"
        return self.directory / f"{file_stem(name)}_00000-{_pixels(frames):03d}_{size}_wan.safetensors"


def _pixels(frames: int) -> int:
    return (frames - 1) * _FRAMES + 1


def _latent_files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*_wan.safetensors") if _FILE.fullmatch(file.name))


def _text_file(latent: Path) -> Path:
    """Of the video for a clip, else of the image; an image may be called like a clip."""
    match = _FILE.fullmatch(latent.name)
    assert match is not None
    name = match["name"]
    clip = _CLIP.fullmatch(name)
    of_video = latent.with_name(f"{clip['video'] if clip else name}_wan_te.safetensors")
    of_image = latent.with_name(f"{name}_wan_te.safetensors")
    return of_image if of_image.exists() and not of_video.exists() else of_video


def _head(latent_file: Path, text_file: Path) -> tuple[str, Shape | None, str | None]:
    """Name, shape and problem of an item."""
    match = _FILE.fullmatch(latent_file.name)
    assert match is not None
    name: str = match["name"]
    shape: Shape | None = None
    try:
        for file in (latent_file, text_file):
            require_inside(latent_file.parent, file)
        with open_safetensors(latent_file) as content:
            name = (content.metadata() or {}).get(_NAME, name)
            key = _latent_key(content)
            sizes = content.get_slice(key).get_shape()
            shape = as_latent_shape(sizes) if len(sizes) == 4 else None
            if shape is None or key.split("_")[1] != "x".join(map(str, shape[1:])):
                return name, shape, f"{key} has shape {sizes}"
        if not text_file.exists():
            return name, shape, f"its text is missing: no {text_file.name}"
        with open_safetensors(text_file) as content:
            key = _text_key(content)
            sizes = content.get_slice(key).get_shape()
            if len(sizes) != 2 or not sizes[0]:
                return name, shape, f"{key} has shape {sizes}, it needs (length, width) and one token"
    except Exception as error:  # whatever a damaged file makes safetensors raise
        return name, shape, str(error)
    return name, shape, None


def _extra_of(key: str) -> str | None:
    """The name of an extra in our items for a tensor of a cache."""
    return next((name for pattern, name in _EXTRA_KEYS if pattern.fullmatch(key)), None)


def _extras(content: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key in content.keys():  # noqa: SIM118
        extra = _extra_of(key)
        if extra is not None:
            tensor = content.get_tensor(key)
            found[extra] = tensor[0] if extra == CLIP_FEATURE and tensor.ndim == 3 else tensor
    return found


def _left_out(files: list[Path]) -> tuple[str, ...]:
    """Tensors of a cache that no item has; all caches of a run have the same."""
    for file in files:
        try:
            with open_safetensors(file) as content:
                keys = sorted(content.keys())
        except ValueError:
            continue  # its entry says so
        return tuple(key for key in keys if not _extra_of(key) and not _LATENT_KEY.fullmatch(key))
    return ()


def _as_written(content: Any, key: str) -> Tensor:
    """The tensor, compared with the digest that files of ours have. Raises ValueError.

    Musubi-tuner writes metadata into every cache: one without has lost them, and may have lost its digest.
    """
    tensor: Tensor = content.get_tensor(key)
    if "architecture" not in (content.metadata() or {}):
        raise ValueError("its metadata do not say for which architecture it is, as those of every cache do")
    require_digest(content.metadata(), {key: tensor})
    return tensor


def _latent_key(content: Any) -> str:
    return _only([key for key in content.keys() if _LATENT_KEY.fullmatch(key)], "latents_FxHxW_dtype", content)  # noqa: SIM118


def _text_key(content: Any) -> str:
    return _only([key for key in content.keys() if key.startswith(_TEXT_KEY)], f"{_TEXT_KEY}dtype", content)  # noqa: SIM118


def _only(keys: list[str], wanted: str, content: Any) -> str:
    if len(keys) != 1:
        raise ValueError(f"it needs one tensor {wanted}, there are {', '.join(sorted(content.keys())) or 'none'}")
    return keys[0]
