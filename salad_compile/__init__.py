"""SALAD for any traced video DiT: block-sparse plus gated linear attention, spliced in by graph passes.

    model = salad_compile.convert(model)                 # before fine-tuning: gate, projection and LoRA on every site
    model = torch.compile(model, backend="salad")        # converted or not
    salad_compile.save(model, "salad.safetensors")       # and salad_compile.load(model, "salad.safetensors")

Importing this package is light: everything is loaded on first use; Triton and Inductor only when something is
compiled, and diffusers never.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .lazy import lazy_names

if TYPE_CHECKING:
    from .attention_call import AttentionArguments as AttentionArguments
    from .attention_call import attention_adapter as attention_adapter
    from .calibration import calibrate as calibrate
    from .calibration import calibrate_heads as calibrate_heads
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .config import SaladConfig as SaladConfig
    from .context_parallel import parallelise as parallelise
    from .conversion import convert as convert
    from .conversion import plan as plan
    from .diagnosis import diagnose as diagnose
    from .dropping import drop_branches as drop_branches
    from .errors import *  # noqa: F403
    from .exchange.exporting import export as export
    from .exchange.hub import push_to_hub as push_to_hub
    from .exporting import package_exported as package_exported
    from .exporting import rewrite_exported as rewrite_exported
    from .inspection import explain as explain
    from .inspection import summary as summary
    from .merge import merge_lora as merge_lora
    from .pictures import save_pictures as save_pictures
    from .pipelines import compile_pipeline as compile_pipeline
    from .schedules import DenseSteps as DenseSteps
    from .schedules import dense as dense
    from .schedules import ramp_sparsity as ramp_sparsity
    from .schedules import set_dense as set_dense
    from .schedules import set_sparsity as set_sparsity
    from .trainability import set_trainable as set_trainable

__version__ = "0.1.0"

_HOMES = {
    "AttentionArguments": "attention_call",
    "DenseSteps": "schedules",
    "attention_adapter": "attention_call",
    "SaladConfig": "config",
    "calibrate": "calibration",
    "calibrate_heads": "calibration",
    "compile_pipeline": "pipelines",
    "convert": "conversion",
    "dense": "schedules",
    "diagnose": "diagnosis",
    "drop_branches": "dropping",
    "explain": "inspection",
    "export": "exchange.exporting",
    "load": "checkpoint",
    "merge_lora": "merge",
    "package_exported": "exporting",
    "parallelise": "context_parallel",
    "plan": "conversion",
    "push_to_hub": "exchange.hub",
    "ramp_sparsity": "schedules",
    "rewrite_exported": "exporting",
    "save": "checkpoint",
    "save_pictures": "pictures",
    "set_dense": "schedules",
    "set_sparsity": "schedules",
    "set_trainable": "trainability",
    "summary": "inspection",
}

__all__ = [
    "AttentionArguments",
    "DenseSteps",
    "SaladConfig",
    "attention_adapter",
    "calibrate",
    "calibrate_heads",
    "compile_pipeline",
    "convert",
    "dense",
    "diagnose",
    "drop_branches",
    "explain",
    "export",
    "load",
    "merge_lora",
    "package_exported",
    "parallelise",
    "plan",
    "push_to_hub",
    "ramp_sparsity",
    "rewrite_exported",
    "save",
    "save_pictures",
    "set_dense",
    "set_sparsity",
    "set_trainable",
    "summary",
]


_get, __dir__ = lazy_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name.endswith("Error"):
        errors = importlib.import_module(".errors", __name__)
        if hasattr(errors, name):
            return getattr(errors, name)
    return _get(name)
