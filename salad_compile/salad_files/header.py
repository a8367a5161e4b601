"""The header of a SALAD file: what its tensors mean, as JSON in the metadata of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from salad_compile.config import SaladConfig
from salad_compile.errors import CorruptFileError, FormatVersionError, SaladError
from salad_compile.grid.rule import GridRule
from salad_compile.sites.record import SiteRecord

FORMAT_VERSION = 5
# Version 4 calls the low-rank updates otherwise: definition/branch_tensors.py
READABLE_VERSIONS = (4, FORMAT_VERSION)
HEADER_KEY = "salad_config"


@dataclass(frozen=True)
class Header:
    """Everything in a SALAD file but its tensors.

    versions: of the packages that wrote it. merged_weights: after merge_lora, the checksum of each site's projections,
    because the file then fits that base alone; else empty. grid: how to read the video's token grid, None if that is
    not known, or a function of the user, which no file can hold.
    """

    config: SaladConfig
    base_class: str
    base_digest: str
    sites: tuple[SiteRecord, ...]
    dense_projections: tuple[str, ...]
    versions: Mapping[str, str]
    merged_weights: tuple[float, ...] = ()
    grid: GridRule | None = None

    def to_json(self) -> str:
        """The text stored under `salad_config` in the file's metadata."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "versions": dict(self.versions),
                "config": self.config.to_dict(),
                "base_class": self.base_class,
                "base_digest": self.base_digest,
                "sites": [site.to_dict() for site in self.sites],
                "dense_projections": list(self.dense_projections),
                "merged_weights": list(self.merged_weights),
                "grid": None if self.grid is None else self.grid.to_dict(),
            }
        )

    @classmethod
    def from_json(cls, text: str, path: Path) -> Header:
        """Raises FormatVersionError or CorruptFileError."""
        try:
            values = json.loads(text)
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{path}: the header is not readable: {error!r}") from error
        if version not in READABLE_VERSIONS:
            raise FormatVersionError(
                f"{path} has format version {version}, this release of salad_compile reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}. "
                f"It was written by {values.get('versions')}: use that release."
            )
        try:
            return cls(
                config=SaladConfig.from_dict(values["config"]),
                base_class=values["base_class"],
                base_digest=values["base_digest"],
                sites=tuple(SiteRecord.from_dict(site) for site in values["sites"]),
                dense_projections=tuple(values["dense_projections"]),
                versions=values["versions"],
                merged_weights=tuple(values["merged_weights"]),
                grid=None if values["grid"] is None else GridRule.from_dict(values["grid"]),
            )
        except (KeyError, TypeError, SaladError) as error:
            raise CorruptFileError(f"{path}: the header is damaged: {error!r}") from error
