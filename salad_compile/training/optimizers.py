"""The optimizer of a run: torch's AdamW, or torchao's with its moments in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.training.settings import TrainSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainSettings, *, sharded: bool) -> Any:
    """As the settings say.

    Args:
        sharded: by FSDP2.

    Raises:
        ConfigError: 8-bit moments of sharded parameters. MissingPackageError: torchao is not installed.
    """
    options = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)  # type: ignore[arg-type]
    if sharded:
        raise ConfigError(
            'optimizer="adamw8bit" was not tried under FSDP2, which divides the moments over processes: say "adamw".'
        )
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise MissingPackageError(
            'optimizer="adamw8bit" needs torchao, which is missing: pip install torchao, or say optimizer="adamw".'
        ) from error
    return AdamW8bit(list(parameters), **options)


def set_rate(optimizer: Any, rate: float) -> None:
    """The learning rate of all parameters. torchao's is a tensor, so that nothing is compiled again for another one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Moments of 0 in the optimizer's own form, which it makes in its first step: one that changes nothing."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    set_rate(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    set_rate(optimizer, rates[0])
