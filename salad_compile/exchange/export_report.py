"""The report of an export: what was written, why the rest was not, and the rounding error of merging."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salad_compile.common.reports import Report, Row
from salad_compile.conversion.merge import MergedProjection


@dataclass(frozen=True)
class ExportedFormat:
    """One format of one component.

    component: of a pipeline, "" for a model. set_path: the folder of the component's set in the export. path: of the
    file or folder in the export, "" where nothing was written; then `reason` says why. tensors, bytes: how much.
    merged: each projection of a merged checkpoint with what the cast lost.
    """

    component: str
    format: str
    set_path: str = ""
    path: str = ""
    tensors: int = 0
    bytes: int = 0
    reason: str = ""
    merged: tuple[MergedProjection, ...] = ()


@dataclass(frozen=True)
class SiteCastError:
    """The projection of a site at which the cast lost most: norm of the cast's error over the update's norm."""

    component: str
    site: str
    cast_error: float


@dataclass(frozen=True, repr=False)
class ExportReport(Report):
    """What :func:`salad_compile.export` did."""

    directory: Path
    formats: Sequence[ExportedFormat]
    cast_errors: Sequence[SiteCastError] = ()
    remarks: Sequence[str] = ()

    title = "exported"
    columns = ("component", "format", "where", "tensors", "MB", "not exported, because")

    @property
    def written(self) -> list[ExportedFormat]:
        """The formats that were written."""
        return [entry for entry in self.formats if entry.path]

    def rows(self) -> list[Row]:
        return [
            (
                entry.component or "(model)",
                entry.format,
                entry.path,
                str(entry.tensors) if entry.path else "",
                f"{entry.bytes / 1e6:,.1f}" if entry.path else "",
                entry.reason,
            )
            for entry in self.formats
        ]

    def notes(self) -> list[str]:
        lines = [f"in {self.directory}", *self.remarks]
        if self.cast_errors:
            worst = max(self.cast_errors, key=lambda error: error.cast_error)
            where = ".".join(part for part in (worst.component, worst.site) if part)
            lines.append(
                f"merging: rounding to the weights' dtype lost at most {worst.cast_error:.1e} of an update's norm, "
                f"at {where}."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "formats": [dataclasses.asdict(entry) for entry in self.formats],
            "cast_errors": [dataclasses.asdict(error) for error in self.cast_errors],
            "remarks": list(self.remarks),
        }
