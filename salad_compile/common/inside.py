"""Files of a directory that somebody else made: a name in an index, or a link, must not lead out of it."""

from __future__ import annotations

from pathlib import Path


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a directory, for names that stand in another file.

    Raises:
        ValueError: see :func:`require_inside`, or the name is none.
    """
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file")
    return require_inside(directory, directory / name)


def require_inside(directory: Path, file: Path) -> Path:
    """`file`, if it lies in the directory once `..` and links are followed. It need not exist.

    The Hub's cache counts as one directory: its snapshots are links to the blobs beside them.

    Raises:
        ValueError: it lies elsewhere.
    """
    root = _root(directory.resolve())
    try:
        found = file.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links; RuntimeError until Python 3.12
        raise ValueError(f"{file.name} is a link that cannot be followed: {error}") from error
    if not found.is_relative_to(root):
        raise ValueError(
            f"{file.name} leads out of {directory}, to {found}: nothing is read from there. Copy the file, or name the "
            "directory that it lies in"
        )
    return file


def _root(directory: Path) -> Path:
    """The directory, or the repository in the Hub's cache of which it is a snapshot or a part of one."""
    for folder in (directory, *directory.parents):
        if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
            return folder.parent.parent
    return directory
