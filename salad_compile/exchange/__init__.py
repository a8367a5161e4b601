"""Export to the formats that other tools read, names of parameters in other projects, and the Hugging Face Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salad_compile.common.lazy import lazy_names

if TYPE_CHECKING:
    from salad_compile.exchange.export_directory import export as export
    from salad_compile.exchange.export_format import ExportFormat as ExportFormat
    from salad_compile.exchange.export_report import ExportReport as ExportReport
    from salad_compile.exchange.formats import FORMATS as FORMATS
    from salad_compile.exchange.formats import register_format as register_format
    from salad_compile.exchange.hub import push_to_hub as push_to_hub
    from salad_compile.salad_files.naming import to_diffusers_names as to_diffusers_names
    from salad_compile.salad_files.naming import to_original_names as to_original_names

_HOMES = {
    "export_directory": ("export",),
    "export_format": ("ExportFormat",),
    "export_report": ("ExportReport",),
    "formats": ("FORMATS", "register_format"),
    "hub": ("push_to_hub",),
    ".salad_files.naming": ("to_diffusers_names", "to_original_names"),
}

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)
