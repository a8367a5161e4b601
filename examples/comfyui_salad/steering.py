"""What a converted diffusion model does before each forward: it takes its settings from the call.

ComfyUI hands the options of a MODEL to every forward, with the noise level of the step. Settings that travel with them
hold for the clone that has them and for no other, though both may use the same module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import salad_compile
from salad_compile.errors import ConfigError, SiteLostError
from salad_compile.sites.branch import SaladBranch, branches

from . import rotation

KEY = "salad"  # in ComfyUI's transformer_options
_SITES = "salad_sites"  # attributes of the diffusion model
_SPARSITY = "salad_sparsity"
_ROTATES = "salad_rotates"  # while its forward runs


@dataclass(frozen=True)
class Settings:
    """sparsity: 0 for that of the file. dense_first_steps: of each sampler. dense: all steps."""

    sparsity: float = 0.0
    dense_first_steps: int = 0
    dense: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For options that ComfyUI copies."""
        return dataclasses.asdict(self)

    def check(self, model: nn.Module) -> None:
        """Raises ConfigError if `model` cannot be set so."""
        if self.dense_first_steps < 0:
            raise ConfigError(f"dense_first_steps must not be negative, got {self.dense_first_steps}.")
        if self.sparsity:
            setattr(model, _SPARSITY, None)  # the next forward sets its own
            salad_compile.set_sparsity(model, self.sparsity)


def steer(model: nn.Module) -> None:
    """Let a converted model follow the settings of each call."""
    setattr(model, _SITES, len(branches(model)))
    setattr(model, _SPARSITY, None)
    setattr(model, _ROTATES, False)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, always_call=True)


@torch.compiler.disable
def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    known = list(branches(model).values())
    if len(known) != getattr(model, _SITES):
        raise SiteLostError(
            f"{getattr(model, _SITES)} attention layers were converted and {len(known)} are there: another node has "
            "replaced blocks of the model; take it out, or put the SALAD nodes after it."
        )
    options = kwargs.get("transformer_options") or {}
    settings = Settings(**options.get(KEY, {}))
    place(known, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device)
    _set_sparsity(model, known, settings.sparsity)
    is_dense = settings.dense or (settings.dense_first_steps > 0 and step_of(options) < settings.dense_first_steps)
    salad_compile.set_dense(model, is_dense)
    if not getattr(model, _ROTATES):  # still set if a forward was interrupted
        rotation.enter(model)
        setattr(model, _ROTATES, True)


@torch.compiler.disable
def _after_forward(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Also after a forward, or a hook before it, that raised."""
    if getattr(model, _ROTATES):
        rotation.leave(model)
        setattr(model, _ROTATES, False)


def place(known: list[SaladBranch], device: torch.device) -> None:
    """Have the branches where the video is. ComfyUI casts its own layers' weights there at each use, and not these."""
    for branch in known:
        if any(tensor.device != device for tensor in (*branch.parameters(), *branch.buffers())):
            branch.to(device)


def _set_sparsity(model: nn.Module, known: list[SaladBranch], sparsity: float) -> None:
    if known[0].config.lowest_sparsity is None or getattr(model, _SPARSITY) == sparsity:
        return
    if sparsity:
        salad_compile.set_sparsity(model, sparsity)
    else:
        salad_compile.ramp_sparsity(model, 1.0)  # each site's own
    setattr(model, _SPARSITY, sparsity)


def step_of(options: Mapping[str, Any]) -> int:
    """Which step of its sampler a call belongs to, from 0; calls at levels between two steps belong to the first.

    Raises:
        ConfigError: the sampler does not say.
    """
    level, schedule = options.get("sigmas"), options.get("sample_sigmas")
    if level is None or schedule is None:
        raise ConfigError(
            "this sampler does not tell its steps, so none of them can be dense: set dense_first_steps to 0."
        )
    reached = schedule.float().cpu() >= float(level.max()) * (1 - 1e-4)
    return max(int(reached.sum()) - 1, 0)
