"""The header of a SALAD file: what its tensors mean, as JSON in the metadata of a safetensors file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from salad_compile.common.schema import HeaderFields, VersionFields, decode, fields_of
from salad_compile.config import SaladConfig
from salad_compile.errors import CorruptFileError, FormatVersionError, SaladError
from salad_compile.grid.rule import GridRule
from salad_compile.sites.record import SiteRecord

FORMAT_VERSION = 5
# Version 4 calls the low-rank updates otherwise: definition/branch_tensors.py
READABLE_VERSIONS = (4, FORMAT_VERSION)
HEADER_KEY = "salad_config"
CHECKED = "sha256"


@dataclass(frozen=True)
class Header:
    """Everything in a SALAD file but its tensors.

    versions: of the packages that wrote it. merged_weights: after merge_lora, the checksum of each site's projections,
    because the file then fits that base alone; else empty. grid: how to read the video's token grid, None if that is
    not known, or a function of the user, which no file can hold. checked: the kind of the digest that the metadata has
    of this header and of the tensors; None in older files.
    """

    config: SaladConfig
    base_class: str
    base_digest: str
    sites: tuple[SiteRecord, ...]
    dense_projections: tuple[str, ...]
    versions: Mapping[str, str]
    merged_weights: tuple[float, ...] = ()
    grid: GridRule | None = None
    checked: str | None = CHECKED

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
                "checked": self.checked,
            }
        )

    @classmethod
    def from_json(cls, text: str, path: Path) -> Header:
        """The header in a file's metadata; every field is checked before anything is made of it.

        Raises:
            FormatVersionError: of another release. CorruptFileError: a field is missing, wrong or out of range.
        """
        what = f"{path}: the header"
        known = decode(VersionFields, text, what, CorruptFileError)
        if known.format_version not in READABLE_VERSIONS:
            raise FormatVersionError(
                f"{path} has format version {known.format_version}, this release of salad_compile reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}. It was written by {known.versions}: use that release."
            )
        values = fields_of(decode(HeaderFields, text, what, CorruptFileError))
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
                checked=values["checked"],
            )._require_consistency()
        except SaladError as error:
            raise CorruptFileError(f"{what} is damaged: {error}") from error

    def _require_consistency(self) -> Header:
        """Raises CorruptFileError where fields contradict each other."""
        owners = Counter(site.owner for site in self.sites)
        if len(owners) < len(self.sites):
            raise CorruptFileError(f"two sites belong to {owners.most_common(1)[0][0]!r}")
        if self.merged_weights and len(self.merged_weights) != len(self.sites):
            raise CorruptFileError(f"{len(self.merged_weights)} merged_weights of {len(self.sites)} sites")
        for site in self.sites:
            if site.heads % (site.key_heads or site.heads):
                raise CorruptFileError(f"{site.owner!r} has {site.heads} heads for {site.key_heads} of the key")
        return self
