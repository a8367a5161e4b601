"""Use of the package that type checkers must refuse: `make lint` runs mypy over it, and nothing runs it.

Strict mypy fails at an "ignore" that ignores nothing, so each line fails when its mistake is no longer seen.
"""

from __future__ import annotations

import torch.nn as nn

import salad_compile
from salad_compile.analysis.diagnosis import Diagnosis
from salad_compile.training import TrainSettings


def mistakes(model: nn.Module, diagnosis: Diagnosis) -> None:
    salad_compile.convertt(model)  # type: ignore[attr-defined]
    salad_compile.training.trainn(model)  # type: ignore[attr-defined]
    salad_compile.SaladConfig(compensation="none", sparsty=0.9)  # type: ignore[call-arg]
    salad_compile.SaladConfig(compensation="none", gate="tokens")  # type: ignore[arg-type]
    salad_compile.SaladConfig(compensation="none", feature_map="rellu")  # type: ignore[arg-type]
    salad_compile.SaladConfig(compensation="none", rope_placement="rotate")  # type: ignore[arg-type]
    salad_compile.SaladConfig(compensation="none", lora_targets=("to_q",))  # type: ignore[arg-type]
    salad_compile.calibrate_heads(model, {}, measure="recal")  # type: ignore[arg-type]
    salad_compile.latents.open_latents("data", on_error="skipped")  # type: ignore[arg-type]
    salad_compile.latents.open_latents("data", layout="mussubi")  # type: ignore[arg-type]
    salad_compile.latents.convert_latents("data", "new", to="ltx")  # type: ignore[arg-type]
    TrainSettings(compile="block")  # type: ignore[arg-type]
    TrainSettings(trackers=("wandb",))  # type: ignore[arg-type]
    diagnosis.by("heads")  # type: ignore[arg-type]


def right(model: nn.Module) -> nn.Module:
    config = salad_compile.SaladConfig(
        compensation="none", gate="head", feature_map="elu", lora_targets=("query", "out"), pattern="stswa"
    )
    return salad_compile.convert(model, config)
