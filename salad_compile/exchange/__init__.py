"""Export to the formats that other tools read, names of parameters in other projects, and the Hugging Face Hub."""

from salad_compile.exchange.export_report import ExportReport as ExportReport
from salad_compile.exchange.exporting import FORMATS as FORMATS
from salad_compile.exchange.exporting import export as export
from salad_compile.exchange.hub import push_to_hub as push_to_hub
from salad_compile.exchange.naming import to_diffusers_names as to_diffusers_names
from salad_compile.exchange.naming import to_original_names as to_original_names
