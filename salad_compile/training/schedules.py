"""The noise schedule that a base model is sampled with, as its scheduler's configuration states it, as settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from salad_compile.errors import ConfigError

# of diffusers' calculate_shift, where a scheduler does not say them
_DYNAMIC = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
_PREDICTS_FLOW = "flow_prediction"


def schedule_of(scheduler: Mapping[str, Any], tokens: int) -> dict[str, float]:
    """Fields of :class:`salad_compile.training.TrainSettings` of a scheduler's configuration; {} if it states none.

    Schedulers of flow matching state a shift, under one of two names; some let it grow with the number of tokens.
    CogVideoX draws timesteps evenly, on a schedule of its own.

    Args:
        scheduler: `scheduler_config.json` of a pipeline, or `pipeline.scheduler.config`.
        tokens: of the largest latent: frames times rows times columns.

    Raises:
        ConfigError: what it states is not a shift.
    """
    name = str(scheduler.get("_class_name", ""))
    if name.startswith("CogVideoX") or "snr_shift_scale" in scheduler:
        return {"flow_shift": 1.0, "snr_shift_scale": _positive(scheduler, "snr_shift_scale", 3.0)}
    if scheduler.get("use_dynamic_shifting"):
        return {"flow_shift": _dynamic_shift(scheduler, tokens)}
    if "shift" in scheduler:
        return {"flow_shift": _positive(scheduler, "shift", 1.0)}
    flows = scheduler.get("use_flow_sigmas") or scheduler.get("prediction_type") == _PREDICTS_FLOW
    return {"flow_shift": _positive(scheduler, "flow_shift", 1.0)} if flows and "flow_shift" in scheduler else {}


def _dynamic_shift(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift for so many tokens: between two lengths linear in its logarithm, or as it is, and beyond them too."""
    first, last, low, high = (_positive(scheduler, name, default) for name, default in _DYNAMIC.items())
    if first == last:
        raise ConfigError(f"the scheduler's base_image_seq_len and max_image_seq_len are both {first:g}.")
    found = low + (high - low) * (tokens - first) / (last - first)
    shift = math.exp(min(found, 100.0)) if scheduler.get("time_shift_type", "exponential") == "exponential" else found
    if not 0 < shift < math.inf:
        raise ConfigError(f"the scheduler's shift for {tokens:,} tokens is {shift:g}: it must be above 0.")
    return shift


def _positive(scheduler: Mapping[str, Any], name: str, default: float) -> float:
    value = scheduler.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"the scheduler's {name} is {value!r}, and no number above 0.")
    return float(value)
