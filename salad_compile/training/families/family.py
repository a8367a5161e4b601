"""What a family of models says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentDataset
from salad_compile.training.flow_matching import Forward, Noised, flow_noise, predict
from salad_compile.training.settings import TrainSettings


class Family(ABC):
    """How a model's inputs are made of a noisy sample, and its prediction of the output.

    Attributes:
        needed: arguments of the forward by which the family is known. known: others that it gives.
    """

    needed: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.model, self.config = model, cast(Any, getattr(model, "config", None))
        self.settings, self.name = settings, type(model).__name__

    def add_noise(self, clean: Tensor, noise: Tensor, s: float) -> tuple[Tensor, float, Tensor]:
        """Noisy latents, the timestep, and what the model is to predict; here flow matching."""
        return flow_noise(clean, noise, s)

    def step(self, noisy: Tensor, prediction: Tensor, s: float, after: float) -> Tensor:
        """Noisy latents at noise level `after`, from those at `s` and the model's prediction; here Euler's method."""
        return noisy + (after - s) * prediction

    @abstractmethod
    def inputs(self, batch: Noised) -> dict[str, Any] | None:
        """Keyword arguments of the forward; None if nobody knows them.

        Raises:
            ConfigError: the items lack a condition that the model takes.
        """

    def check(self, latents: LatentDataset) -> None:  # noqa: B027 (most families have nothing to check)
        """Before anything is converted.

        Raises:
            ConfigError: the items lack a condition that the model takes, or have it in another size.
        """

    def unpack(self, output: Tensor, batch: Noised) -> Tensor:
        """The prediction, (B, C, T, H, W), of what the forward returned first."""
        return output

    def predict(self, model: nn.Module, batch: Noised) -> Tensor:
        """One forward."""
        output: tuple[Tensor, ...] = model(**(self.inputs(batch) or {}), return_dict=False)
        return self.unpack(output[0], batch)

    def require_channels(self, batch: Noised) -> None:
        """Raises ConfigError: the model takes conditions beside the latents, which this family does not make."""
        channels, taken = batch.latents.shape[1], getattr(self.config, "in_channels", None)
        if taken is not None and taken != channels:
            raise ConfigError(
                f"{self.name} takes {taken} channels, and the latents have {channels}: such models need a forward= of "
                "their own."
            )

    def require(self, batch: Noised, name: str) -> Tensor:
        """A condition that the items carry.

        Raises:
            ConfigError: they do not.
        """
        if name not in batch.conditions:
            there = f"only {', '.join(batch.conditions)}" if batch.conditions else "no conditions at all"
            raise ConfigError(
                f"{self.name} takes {name!r} beside latents and text, and the items carry {there}: encode them with "
                "the model's own pipeline (salad-compile latents encode)."
            )
        return batch.conditions[name]


class OwnForward(Family):
    """A forward of the user's, which predicts the velocity."""

    def __init__(self, model: nn.Module, settings: TrainSettings, forward: Forward) -> None:
        super().__init__(model, settings)
        self.forward = forward

    def inputs(self, batch: Noised) -> None:
        return None

    def predict(self, model: nn.Module, batch: Noised) -> Tensor:
        return predict(self.forward, model, batch)


def text_mask(batch: Noised, dtype: torch.dtype) -> Tensor:
    """(B, L): 1 at the tokens of the text, 0 behind them."""
    places = torch.arange(batch.texts.shape[1], device=batch.texts.device)
    return (places < batch.lengths[:, None]).to(dtype)
