"""A strip: one row of frames for each video, with its title above."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageDraw

TITLE = 16  # pixels above a row


def save_strip(rows: Mapping[str, Any], file: Path, most: int = 6) -> None:
    """Write at most so many frames of each video, evenly spread. rows: title -> (F, H, W, 3) uint8, of one size."""
    strips = [numpy.concatenate(_spread(video, most), axis=1) for video in rows.values()]
    height, width = strips[0].shape[:2]
    picture = Image.new("RGB", (width, (height + TITLE) * len(strips)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, strip) in enumerate(zip(rows, strips, strict=True)):
        draw.text((4, number * (height + TITLE) + 2), title, fill="black")
        picture.paste(Image.fromarray(strip), (0, number * (height + TITLE) + TITLE))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def _spread(video: Any, most: int) -> list[Any]:
    places = numpy.linspace(0, len(video) - 1, min(most, len(video))).round().astype(int)
    return [video[place] for place in places]
