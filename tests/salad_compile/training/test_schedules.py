"""Shifts of a scheduler's configuration are those that the scheduler itself samples with."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from salad_compile.errors import ConfigError
from salad_compile.training.noise_levels import shift_level
from salad_compile.training.schedules import schedule_of

TOKENS = 21 * 16 * 24
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05}


def sigmas_of(scheduler: Any, tokens: int) -> torch.Tensor:
    """Noise levels of a pipeline's steps at u = 1, 3/4, 1/2, 1/4."""
    levels = np.linspace(1.0, 0.25, 4)
    if scheduler.config.get("use_dynamic_shifting"):
        mu = diffusers.pipelines.ltx.pipeline_ltx.calculate_shift(
            tokens,
            *(
                scheduler.config[name]
                for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            ),
        )
        scheduler.set_timesteps(sigmas=levels, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=levels)
    return scheduler.sigmas[:4]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type="linear"),
    ],
    ids=["HunyuanVideo", "LTX-Video", "linear"],
)
def test_levels_are_those_of_the_scheduler(scheduler: Any) -> None:
    found = schedule_of(dict(scheduler.config), TOKENS)
    levels = [shift_level(u, found["flow_shift"]) for u in (1.0, 0.75, 0.5, 0.25)]
    torch.testing.assert_close(torch.tensor(levels), sigmas_of(scheduler, TOKENS), rtol=0, atol=1e-4)


def test_wans_scheduler() -> None:
    make: Any = diffusers.UniPCMultistepScheduler
    wan = make(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert schedule_of(dict(wan.config), TOKENS) == {"flow_shift": 3.0}
    wan.set_timesteps(4)
    between = float(wan.sigmas[1])
    assert between == pytest.approx(shift_level(0.75, 3.0), abs=2e-3)
    assert schedule_of(dict(make().config), TOKENS) == {}  # it samples no flow
    assert schedule_of({}, TOKENS) == {}


def test_cogvideo_draws_its_timesteps_evenly() -> None:
    make: Any = diffusers.CogVideoXDDIMScheduler
    found = schedule_of(dict(make(snr_shift_scale=1.0).config), TOKENS)
    assert found == {"flow_shift": 1.0, "snr_shift_scale": 1.0}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"shift": "three"}, "shift is 'three'"),
        ({"shift": 0}, "shift is 0"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4096}, "are both 4096"),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 3.0, "max_shift": 0.1}, "above 0"),
    ],
)
def test_what_is_no_shift(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schedule_of(config, TOKENS)
