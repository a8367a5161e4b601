"""find_clips: the videos of a folder, files and folders of images, with their captions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from salad_compile.common.paths import as_path
from salad_compile.errors import ConfigError, LatentLayoutError
from salad_compile.latents.dataset import summary_of
from salad_compile.latents.encoding.captions import Captions, read_captions
from salad_compile.latents.encoding.companions import is_companion, split_companions
from salad_compile.latents.source import Problem, unique_names

VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".m4v")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Clip:
    """One video.

    Attributes:
        path: a file, or a folder of images. name: its path within the folder, without suffix.
        beside: files of conditions by their role, see :mod:`salad_compile.latents.encoding.companions`.
    """

    name: str
    path: Path
    caption: str
    beside: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)

    @property
    def images(self) -> list[Path]:
        """Of a folder of images, in the order of the numbers in their names."""
        return images_in(self.path) if self.path.is_dir() else []

    @property
    def origin(self) -> str:
        """What changes when the clip or its caption does."""
        files = self.images or [self.path]
        for paths in self.beside.values():
            files = files + [file for path in paths for file in (images_in(path) if path.is_dir() else [path])]
        stats = [(file.name, file.stat()) for file in files]
        return repr((self.caption, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]))


@dataclass(frozen=True)
class Clips:
    """The clips of a folder. left_out: those without a caption, and what a table lists and is not there."""

    folder: Path
    clips: tuple[Clip, ...]
    left_out: tuple[Problem, ...]


def find_clips(
    folder: str | os.PathLike[str],
    *,
    captions: str | os.PathLike[str] | None = None,
    file_column: str | None = None,
    caption_column: str | None = None,
) -> Clips:
    """Every video below a folder, with its caption, in the order of names. Nothing is decoded.

    Args:
        folder: holds videos (:data:`VIDEOS`), or folders of images, one for each clip.
        captions: a table, `.csv` or `.jsonl`; None: one of the usual names in the folder, if there is one. What no
            table lists has its caption in a `.txt` of its name beside it.
        file_column, caption_column: of the table; None: the usual names.

    Raises:
        LatentLayoutError: no such folder, or no clip in it, or none with a caption.
        ConfigError: the table cannot be used.
    """
    root = as_path(folder)
    if not root.is_dir():
        raise LatentLayoutError(f"{root} is {'a file' if root.exists() else 'not there'}: name a folder of videos.")
    paths, beside = split_companions(_clip_paths(root), _images_below(root))
    paths = sorted(paths, key=lambda path: _natural(path.relative_to(root).as_posix()))
    if not paths:
        raise LatentLayoutError(f"{root} holds no video ({', '.join(VIDEOS)}){_instead(root)}.")
    table = read_captions(
        root, None if captions is None else as_path(captions), file_column=file_column, caption_column=caption_column
    )
    places = [path.relative_to(root) for path in paths]
    plain = [(place if (root / place).is_dir() else place.with_suffix("")).as_posix() for place in places]
    found, left_out = [], []
    for path, name in zip(paths, unique_names(plain, [place.as_posix() for place in places]), strict=True):
        text, problem = table.of(path, root)
        problem = _of_no_use(path, name) or problem
        if problem:
            left_out.append(Problem(os.fsencode(name).decode(errors="backslashreplace"), problem))
        else:
            found.append(Clip(name, path, text, beside.get(path, {})))
    left_out += _listed_in_vain(root, table, paths)
    if not found:
        raise LatentLayoutError(
            f"none of the {len(paths)} clips in {root} has a caption ({left_out[0]}): put a .txt beside each, or "
            "name a table of captions."
            if all("caption" in problem.reason for problem in left_out)
            else f"no clip in {root} can be used: {summary_of(left_out)}"
        )
    return Clips(root, tuple(found), tuple(left_out))


def _of_no_use(path: Path, name: str) -> str | None:
    """Why there cannot be a clip in this place; None if there can."""
    if not path.is_dir() and not path.is_file():
        return "it leads nowhere" if path.is_symlink() else "it is neither a file nor a folder"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8: give it another one"
    return None


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, in the order of the numbers in their names."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith(".")]
    return sorted(files, key=lambda file: _natural(file.name))


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder that is not hidden, with the names in it, behind links too."""
    for place, folders, names in os.walk(root, followlinks=True):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(here / name)]
        yield here, names


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    return folder.is_symlink() and folder.resolve() in {parent.resolve() for parent in folder.absolute().parents}


def _clip_paths(root: Path) -> Iterator[Path]:
    for here, names in _folders(root):
        videos = [here / name for name in names if Path(name).suffix.lower() in VIDEOS and not name.startswith(".")]
        yield from videos
        if here != root and not videos and any(not is_companion(image) for image in images_in(here)):
            yield here


def _images_below(root: Path) -> list[Path]:
    """Single images that may lie beside a clip."""
    every = (here / name for here, names in _folders(root) for name in names)
    return sorted(p for p in every if p.suffix.lower() in IMAGES and is_companion(p) and p.is_file())


def _natural(name: str) -> list[tuple[int, str]]:
    """An order in which frame9 comes before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _listed_in_vain(root: Path, table: Captions, paths: Sequence[Path]) -> list[Problem]:
    """What a table lists and no clip has for its caption, so that nothing is left out in silence."""
    used = {table.key_of(path, root) for path in paths}
    listed = [place for place in table.texts if place not in used]
    return [Problem(place, f"{table.table} lists it, and {_why(root, place)}") for place in listed]


def _why(root: Path, place: str) -> str:
    if Path(place).is_absolute() or ".." in Path(place).parts:
        return f"it is not below {root}"
    if any((root / f"{place}{suffix}").exists() for suffix in VIDEOS):
        return "another row names the same clip"
    return "it is no clip" if (root / place).exists() else "it is not there"


def _instead(root: Path) -> str:
    images = len(images_in(root))
    if images:
        return f", but {images} images: put those of each clip into a folder of its own"
    others = sum(1 for file in root.rglob("*") if file.is_file())
    return f" and no folder of images; it has {others} other files" if others else ": it is empty"


def require_apart(output: Path, folder: Path) -> None:
    """Raises ConfigError: the output is the folder of clips, or below it, or around it."""
    here, there = output.resolve(), folder.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConfigError(f"clips {folder} and output {output} must not contain each other.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file.")
