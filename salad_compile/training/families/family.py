"""What a family of models says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.logs import logger
from salad_compile.errors import ConfigError
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.latents.item import CONTROL, FIRST_FRAME, FRAME_INDICES
from salad_compile.training.flow_matching import (
    Forward,
    Noised,
    flow_noise,
    predict,
    training_sample,
    validation_sample,
)
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

    @property
    def given_share(self) -> float:
        """Of the samples, how many have their first frame given, in the place of a noisy one."""
        return self.settings.first_frame_conditioning_p

    def sample(self, item: LatentItem, step: int, place: int) -> Noised:
        """As :func:`salad_compile.training.flow_matching.training_sample`."""
        return training_sample(item, self.settings, step, place, self.add_noise, self.given_share)

    def validation_sample(self, item: LatentItem, index: int, point: int) -> Noised:
        """As :func:`salad_compile.training.flow_matching.validation_sample`."""
        return validation_sample(item, self.settings, index, point, self.add_noise, self.given_share)

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

    text_width: ClassVar[str] = ""  # of the configuration: what says how wide texts are
    takes_first_frame: ClassVar[bool] = False  # in the place of a noisy one, with a timestep of its own

    def check(self, latents: LatentDataset) -> None:
        """Before anything is converted.

        Raises:
            ConfigError: the items lack a condition that the model takes, or have it in another size; or the settings
                give a first frame to a model that takes none.
        """
        if self.settings.first_frame_conditioning_p and not self.takes_first_frame:
            raise ConfigError(
                "first_frame_conditioning_p is for models that take a first frame in the place of a noisy one, at "
                f"timestep 0 (Wan2.2-TI2V, LTX-Video): leave it out for {self.name}."
            )
        if self.given_share and min(shape[1] for shape in latents.shapes) < 2:
            raise ConfigError("some latents have one frame: where the first one is given, nothing is left to predict.")

    @property
    def most_text(self) -> tuple[int, str]:
        """The longest text that a sample may have, in tokens, and what helps where one is longer."""
        return self.settings.text_tokens, "set text_tokens to at least that"

    def require_sizes(self, latents: LatentDataset, item: LatentItem) -> None:
        """Whether latents and texts have the sizes that the model takes, as far as headers and one item of them say.

        Raises:
            ConfigError: they have not, and the forward would fail at the first item that has not.
        """
        self._require_text(latents, item)
        channels, taken = latents.shapes[0][0], getattr(self.config, "in_channels", None)
        if taken is not None and channels > taken:
            raise ConfigError(
                f"the latents have {channels} channels, and {self.name} takes {taken}: they are of the VAE of another "
                "model."
            )
        patch = getattr(self.config, "patch_size", None) or 1
        rows, columns = (patch, patch) if isinstance(patch, int) else patch[-2:]
        for name, (_, _, height, width) in zip(latents.names, latents.shapes, strict=True):
            if height % rows or width % columns:
                raise ConfigError(
                    f"the latent of {name!r} is {height} x {width}, and {self.name} cuts it into patches of {rows} x "
                    f"{columns}, which do not divide it: encode clips at another size."
                )

    def _require_text(self, latents: LatentDataset, item: LatentItem) -> None:
        most, helps = self.most_text
        for name, length in zip(latents.names, getattr(latents, "text_lengths", ()), strict=False):
            if (length or 0) > most:
                raise ConfigError(f"the text of {name!r} has {length} tokens, and at most {most} are taken: {helps}.")
        width, found = getattr(self.config, self.text_width, None), item.text.shape[1]
        if width is not None and found != width:
            raise ConfigError(
                f"the text of {item.name!r} is {found} wide, and {self.name} takes texts of {width}: it is of "
                "the text encoder of another model."
            )

    def require_used(self, item: LatentItem) -> None:
        """Whether the model is given what the items carry; a control video that it is not given is said.

        Raises:
            ConfigError: they say at which places in time their frames are.
        """
        if FRAME_INDICES in item.extras:
            raise ConfigError(
                f"{item.name!r} has {FRAME_INDICES}, places in time of its frames, which {self.name} is not given "
                "here: pass train(..., forward=f), whose fifth parameter gets them."
            )
        if CONTROL in item.extras:
            logger.warning(
                "the items have %s, which %s is not given: a forward of your own gets it", CONTROL, self.name
            )

    def unpack(self, output: Tensor, batch: Noised) -> Tensor:
        """The prediction, (B, C, T, H, W), of what the forward returned first."""
        return output

    def predict(self, model: nn.Module, batch: Noised) -> Tensor:
        """One forward."""
        output: tuple[Tensor, ...] = model(**(self.inputs(batch) or {}), return_dict=False)
        return self.unpack(output[0], batch)

    def require_channels(self, batch: Noised, made: int | None = None) -> None:
        """Raises ConfigError: the model takes conditions beside the latents, which this family does not make.

        Args:
            made: channels of what it is given; None: of the latents.
        """
        channels, taken = made or batch.latents.shape[1], getattr(self.config, "in_channels", None)
        if taken is not None and taken != channels:
            raise ConfigError(
                f"{self.name} takes {taken} channels, and the latents have {channels}: such models need a forward= of "
                "their own."
            )

    def padded_first_frame(self, batch: Noised) -> Tensor:
        """(B, C, T, H, W): the first frame that the items carry, and empty ones behind it.

        Raises:
            ConfigError: they carry none.
        """
        image = torch.zeros_like(batch.latents)
        image[:, :, :1] = self.require(batch, FIRST_FRAME)
        return image

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

    def require_used(self, item: LatentItem) -> None:
        """It gets all of them."""

    def require_sizes(self, latents: LatentDataset, item: LatentItem) -> None:
        """It may make anything of them."""

    def predict(self, model: nn.Module, batch: Noised) -> Tensor:
        return predict(self.forward, model, batch)


def text_mask(batch: Noised, dtype: torch.dtype) -> Tensor:
    """(B, L): 1 at the tokens of the text, 0 behind them."""
    places = torch.arange(batch.texts.shape[1], device=batch.texts.device)
    return (places < batch.lengths.to(places.device)[:, None]).to(dtype)


def token_timesteps(batch: Noised, patch: tuple[int, int, int]) -> Tensor:
    """(B, tokens): the sample's timestep, 0 for the tokens of a first frame that is given.

    Args:
        patch: frames, rows and columns of one token.
    """
    frames, height, width = (-(-size // step) for size, step in zip(batch.latents.shape[2:], patch, strict=True))
    found = batch.timesteps[:, None, None].expand(-1, frames, height * width).clone()
    if len(batch.given):
        found[:, 0].masked_fill_(batch.given[:, None], 0)
    return found.flatten(1)
