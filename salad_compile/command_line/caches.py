"""What is kept between processes, for `salad-compile doctor`: where, how large, and how to be rid of it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cache:
    """A folder of compiled or measured things. entries: what the names in it look like that belong to the cache."""

    name: str
    place: Path
    entries: str

    def size(self) -> int:
        """Bytes of all files; 0 where there is no folder."""
        total = 0
        for folder, _, files in os.walk(self.place):
            for file in files:
                path = Path(folder) / file
                total += path.lstat().st_size if path.exists() else 0  # other processes write to caches meanwhile
        return total

    def clear(self) -> tuple[int, list[str]]:
        """Delete what belongs to the cache. Returns the bytes that are gone, and the names that were left.

        The folder may be one that the user named, with other things in it.
        """
        before = self.size()
        for entry in self._entries():
            if not re.fullmatch(self.entries, entry.name):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        return before - self.size(), sorted(entry.name for entry in self._entries())

    def _entries(self) -> list[Path]:
        return list(self.place.iterdir()) if self.place.is_dir() else []


def caches() -> Iterator[Cache]:
    """Ours, Inductor's and Triton's."""
    # private (torch 2.11 and 2.13; test_doctor.py): where Inductor keeps what it compiled
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from salad_compile.kernels.tuning import cache_file

    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    yield Cache("tuned kernels", cache_file().parent, re.escape(cache_file().name))
    # sources by the first letters of their hashes, and what is named for its content
    inductor = r"[0-9a-z]{2}|tmp\w{8}|fxgraph|aotautograd|triton|locks|autotune|precompiled_headers|[a-z0-9]{52}"
    yield Cache("Inductor's cache", Path(cache_dir()), inductor)
    yield Cache("Triton's cache", triton, r"[A-Z0-9]{52}")
