"""Files beside a clip that a model takes as conditions: a control video, a mask of it, reference images.

    cat.mp4    cat.txt    cat.control.mp4    cat.mask.png    cat.reference.png    cat.reference-2.png

A control or mask is a video, a folder of images, or one image, which stands for all frames. A mask is white where the
model is to make something new, and black where it keeps the control video.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from salad_compile.common.paths import require_regular
from salad_compile.latents.source import item_error

ROLES = ("control", "mask", "reference")
_COMPANION = re.compile(r"(?P<stem>.+)\.(?P<role>control|mask|reference)(-\d+)?")


@dataclass(frozen=True)
class Beside:
    """What lies beside a clip, decoded.

    Attributes:
        control: (F, 3, H, W) uint8, of the size of the clip. mask: likewise, gray. references: (3, h, w) uint8, of
            sizes of their own.
    """

    control: Tensor | None = None
    mask: Tensor | None = None
    references: tuple[Tensor, ...] = field(default=())


def stem_of(path: Path) -> str:
    """The name of a clip without its suffix; a folder has none."""
    return path.name if path.is_dir() else path.stem


def is_companion(path: Path) -> bool:
    """By its name."""
    return _COMPANION.fullmatch(stem_of(path)) is not None


def split_companions(
    paths: Iterable[Path], images: Iterable[Path]
) -> tuple[list[Path], Mapping[Path, Mapping[str, tuple[Path, ...]]]]:
    """Clips, and by clip and role what lies beside it. What lies beside no clip of its name is a clip itself.

    Args:
        paths: of videos and folders of images. images: single ones.
    """
    every = list(paths)
    clips = {(path.parent, stem_of(path)): path for path in every}
    found: dict[Path, dict[str, tuple[Path, ...]]] = {}
    taken = set()
    for path in [*every, *images]:
        match = _COMPANION.fullmatch(stem_of(path))
        clip = clips.get((path.parent, match["stem"])) if match else None
        if match and clip is not None:
            roles = found.setdefault(clip, {})
            roles[match["role"]] = (*roles.get(match["role"], ()), path)
            taken.add(path)
    return [path for path in every if path not in taken], found


def only(name: str, role: str, paths: tuple[Path, ...]) -> Path | None:
    """The one file of a role. Raises LatentItemError: there are several."""
    if len(paths) > 1:
        raise item_error(name, f"it has several files of {role}: {', '.join(path.name for path in paths)}")
    return paths[0] if paths else None


def read_image(name: str, path: Path) -> Tensor:
    """(3, H, W) uint8, as a viewer shows it: turned as its file says, and 16 bits rounded down to 8.

    Raises:
        LatentItemError: it cannot be decoded.
    """
    import numpy
    from PIL import Image, ImageOps

    try:
        require_regular(path)
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):  # 16 bits of gray, which `convert` would cut off at 255
                gray = (numpy.asarray(turned).clip(0, 65535) >> 8).astype(numpy.uint8)
                turned = Image.fromarray(gray)
            return torch.from_numpy(numpy.array(turned.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        raise item_error(name, f"{path.name} cannot be decoded: {reason}") from error
