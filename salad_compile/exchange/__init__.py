"""Export to the formats that other tools read, names of parameters in other projects, and the Hugging Face Hub."""

from .export_report import ExportReport as ExportReport
from .exporting import FORMATS as FORMATS
from .exporting import export as export
from .hub import push_to_hub as push_to_hub
from .naming import to_diffusers_names as to_diffusers_names
from .naming import to_original_names as to_original_names
