"""SALAD for any traced video DiT: block-sparse plus gated linear attention, spliced in by graph passes.

    model = salad_compile.convert(model)                 # before fine-tuning: gate, projection and LoRA on every site
    model = torch.compile(model, backend="salad")        # converted or not
    salad_compile.save(model, "salad.safetensors")       # and salad_compile.load(model, "salad.safetensors")

Importing this package is light: everything is loaded on first use; Triton and Inductor only when something is
compiled, and diffusers never.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from salad_compile.common.lazy import lazy_names
from salad_compile.common.version import __version__ as __version__

if TYPE_CHECKING:
    from salad_compile import errors as errors
    from salad_compile import kernels as kernels
    from salad_compile import latents as latents
    from salad_compile import training as training
    from salad_compile.analysis.calibration import calibrate as calibrate
    from salad_compile.analysis.calibration import calibrate_heads as calibrate_heads
    from salad_compile.analysis.diagnosis import diagnose as diagnose
    from salad_compile.analysis.dropping import drop_branches as drop_branches
    from salad_compile.analysis.inspection import explain as explain
    from salad_compile.analysis.inspection import summary as summary
    from salad_compile.analysis.pictures import save_pictures as save_pictures
    from salad_compile.backend.exported_programs import package_exported as package_exported
    from salad_compile.backend.exported_programs import rewrite_exported as rewrite_exported
    from salad_compile.backend.pipelines import compile_pipeline as compile_pipeline
    from salad_compile.calls.adapters import AttentionArguments as AttentionArguments
    from salad_compile.calls.adapters import attention_adapter as attention_adapter
    from salad_compile.config import SaladConfig as SaladConfig
    from salad_compile.conversion.context_parallel import parallelise as parallelise
    from salad_compile.conversion.convert import convert as convert
    from salad_compile.conversion.convert import plan as plan
    from salad_compile.conversion.merge import merge_lora as merge_lora
    from salad_compile.conversion.schedules import DenseSteps as DenseSteps
    from salad_compile.conversion.schedules import dense as dense
    from salad_compile.conversion.schedules import ramp_sparsity as ramp_sparsity
    from salad_compile.conversion.schedules import set_dense as set_dense
    from salad_compile.conversion.schedules import set_sparsity as set_sparsity
    from salad_compile.conversion.trainability import set_trainable as set_trainable
    from salad_compile.errors import *  # noqa: F403
    from salad_compile.exchange.export_directory import export as export
    from salad_compile.exchange.hub import push_to_hub as push_to_hub
    from salad_compile.salad_files.salad_file import load as load
    from salad_compile.salad_files.salad_file import save as save
    from salad_compile.sites.token_grid import token_grid as token_grid

_HOMES = {
    "analysis.calibration": ("calibrate", "calibrate_heads"),
    "analysis.diagnosis": ("diagnose",),
    "analysis.dropping": ("drop_branches",),
    "analysis.inspection": ("explain", "summary"),
    "analysis.pictures": ("save_pictures",),
    "backend.exported_programs": ("package_exported", "rewrite_exported"),
    "backend.pipelines": ("compile_pipeline",),
    "calls.adapters": ("AttentionArguments", "attention_adapter"),
    "config": ("SaladConfig",),
    "conversion.context_parallel": ("parallelise",),
    "conversion.convert": ("convert", "plan"),
    "conversion.merge": ("merge_lora",),
    "conversion.schedules": ("DenseSteps", "dense", "ramp_sparsity", "set_dense", "set_sparsity"),
    "conversion.trainability": ("set_trainable",),
    "exchange.export_directory": ("export",),
    "exchange.hub": ("push_to_hub",),
    "salad_files.salad_file": ("load", "save"),
    "sites.token_grid": ("token_grid",),
}

if not TYPE_CHECKING:
    _get, _names, __all__ = lazy_names(__name__, _HOMES, ("errors", "kernels", "latents", "training"))

    def __getattr__(name):
        if name.endswith("Error"):
            errors = importlib.import_module(".errors", __name__)
            if hasattr(errors, name):
                return getattr(errors, name)
        return _get(name)

    def __dir__():
        return [*_names(), "__version__"]
