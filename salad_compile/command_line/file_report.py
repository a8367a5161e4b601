"""The header of a SALAD file as a report."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salad_compile.common.reports import Report, Row, plural
from salad_compile.config import SaladConfig
from salad_compile.salad_files.header import HEADER_KEY, Header
from salad_compile.salad_files.salad_file import open_file
from salad_compile.sites.branch import BRANCH_NAME
from salad_compile.sites.record import SiteRecord


@dataclass(frozen=True, repr=False)
class FileReport(Report):
    """The header of one file, and names, shapes and dtypes of its tensors.

    sizes: parameters and buffers of each site, by its name. dtypes: numbers of the file, by their dtype.
    """

    file: Path
    format_version: int
    header: Header
    sizes: Mapping[str, int]
    dtypes: Mapping[str, int]
    tensors: int
    file_bytes: int

    title = "sites of the file"
    columns = ("site", "tokens", "heads x dim", "text", "pattern", "sparsity", "linear branch", "numbers")

    def rows(self) -> list[Row]:
        return [self._row(site) for site in self.header.sites]

    def _row(self, site: SiteRecord) -> Row:
        own = self.header.config.of_site(site.owner)
        linear = own.linear_branch and not site.dropped
        return (
            site.owner or "(model)",
            str(site.tokens),
            f"{site.heads} x {site.head_dim}",
            f"{site.text_tokens} {site.text}" if site.text_tokens else "",
            own.pattern,
            f"{own.sparsity:.3f}",
            "yes" if linear else "dropped" if site.dropped else "no",
            f"{self.sizes.get(site.owner, 0):,}",
        )

    def notes(self) -> list[str]:
        header = self.header
        versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
        numbers = ", ".join(f"{count:,} {dtype}" for dtype, count in self.dtypes.items())
        notes = [
            f"{self.file}: format {self.format_version}, {self.file_bytes:,} bytes, written by {versions}",
            f"base: {header.base_class}, structure {header.base_digest[:12]}",
            f"{plural(len(header.sites), 'site')}, {plural(self.tensors, 'tensor')}, {numbers}",
            f"token grid: {header.grid or 'not known, flat order'}",
            f"settings that are not the defaults: {changed_settings(header.config) or 'none'}",
        ]
        if header.merged_weights:
            notes.append("LoRA was merged into the base: the file fits only the merged base model")
        return notes

    def to_dict(self) -> dict[str, Any]:
        header = self.header
        return {
            "file": str(self.file),
            "file_bytes": self.file_bytes,
            "format_version": self.format_version,
            "versions": dict(header.versions),
            "base_class": header.base_class,
            "base_digest": header.base_digest,
            "config": header.config.to_dict(),
            "grid": None if header.grid is None else header.grid.to_dict(),
            "merged": bool(header.merged_weights),
            "tensors": self.tensors,
            "dtypes": dict(self.dtypes),
            "sites": [{**site.to_dict(), "numbers": self.sizes.get(site.owner, 0)} for site in header.sites],
        }


def read_file_report(path: str | os.PathLike[str]) -> FileReport:
    """Read the header of a file, a directory's salad.safetensors or a Hub repository's.

    Raises:
        CheckpointError, FileNotFoundError: see :func:`salad_compile.load`.
    """
    with open_file(path) as (file, content, header):
        version = int(json.loads(content.metadata()[HEADER_KEY])["format_version"])
        sizes: Counter[str] = Counter()
        dtypes: Counter[str] = Counter()
        keys = list(content.keys())
        for key in keys:
            part = content.get_slice(key)
            count = math.prod(part.get_shape())
            sizes[key.rpartition(f"{BRANCH_NAME}.")[0].removesuffix(".")] += count
            dtypes[part.get_dtype()] += count
    return FileReport(file, version, header, dict(sizes), dict(dtypes), len(keys), file.stat().st_size)


def changed_settings(config: SaladConfig) -> str:
    """`name=value` of every field that is not the default."""
    ours, defaults = config.to_dict(), SaladConfig().to_dict()
    return ", ".join(f"{name}={value!r}" for name, value in ours.items() if value != defaults[name])
