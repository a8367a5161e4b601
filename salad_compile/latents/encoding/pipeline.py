"""PipelineEncoder: what a diffusers pipeline makes of a clip and its caption before its transformer sees them.

Texts come from the pipeline's own `encode_prompt`, latents from its VAE, and the first frame of image-to-video
pipelines goes through both as they do it. Nothing here depends on the class of a pipeline: what differs is read from
signatures and from how many channels the transformer takes beside those of the VAE.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.latents.encoding.companions import Beside
from salad_compile.latents.encoding.fitting import (
    require_known_channels,
    require_known_conditions,
    require_own_vae,
)
from salad_compile.latents.encoding.vace import encode_context, require_vace_channels, takes_vace
from salad_compile.latents.encoding.vae import compression, encode_video, latent_channels, vae_statistics
from salad_compile.latents.item import CLIP_FEATURE, FIRST_FRAME, LATENTS_IMAGE, POOLED_TEXT, VACE_CONTEXT
from salad_compile.latents.source import strip_padding
from salad_compile.latents.statistics import LatentStatistics

_TEXT_WIDTH = ("text_dim", "caption_channels", "text_embed_dim")  # of the configurations of transformers
_INTERLEAVE = {"latent_concat": 2, "token_replace": 4}  # one of so many tokens of HunyuanVideo's image is kept


@dataclass(frozen=True)
class Encoded:
    """latent: (C, T, H, W) float32, normalised. text: (L, D). extras: by name, see `salad_compile.latents.item`."""

    latent: Tensor
    text: Tensor
    extras: Mapping[str, Tensor]


class PipelineEncoder:
    """The VAE and text encoders of a pipeline.

    Attributes:
        statistics: of the VAE.
        multiple: pixels of one token in height and width. temporal: frames of one latent after the first.
        time_patch: latents of one token in time.
        takes_context: whether the pipeline is given a control video, a mask and references, as VACE's is.
        takes_image: whether the pipeline is given an image. takes_last_image: and the last frame as well.
    """

    def __init__(self, pipeline: Any, transformer: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            pipeline: of diffusers, with a VAE and text encoders; its transformer is not needed.
            transformer: the configuration of its transformer; None: that of `pipeline.transformer`.

        Raises:
            ConfigError: a part is missing, or VAE and transformer are not of one model.
        """
        module = getattr(pipeline, "transformer", None)
        named = {} if module is None else {"_class_name": type(module).__name__, **module.config}
        config = transformer or named
        self.name = type(pipeline).__name__
        for part, there in (("VAE", "vae"), ("text encoder", "text_encoder"), ("tokenizer", "tokenizer")):
            if getattr(pipeline, there, None) is None:
                raise ConfigError(f"{self.name} has no {part}: load the whole pipeline, from its directory.")
        if not hasattr(pipeline, "encode_prompt"):
            raise ConfigError(f"{self.name} has no encode_prompt: it cannot be asked for its texts.")
        self.pipeline, self.config = pipeline, config
        require_own_vae(pipeline)
        self.takes_context = takes_vace(pipeline, config)
        require_known_conditions(self.name, config, but=("control_hidden_states",) if self.takes_context else ())
        self.statistics: LatentStatistics = vae_statistics(pipeline.vae)
        self.temporal, spatial = compression(pipeline)
        self.time_patch, patch = _patches(config)
        self.multiple = spatial * patch
        self.takes_last_image = bool(config.get("pos_embed_seq_len"))  # Wan's: positions of the features of both
        self.takes_image = "image" in inspect.signature(pipeline.__call__).parameters
        self._require_one_model()

    def _require_one_model(self) -> None:
        """Raises ConfigError: the transformer is for latents or conditions that this pipeline does not make."""
        channels = latent_channels(self.pipeline.vae)
        stated = {self.config.get("in_channels"), self.config.get("out_channels")} - {None}
        if stated and channels not in stated:
            raise ConfigError(
                f"the VAE of {self.name} has {channels} latent channels, and its transformer takes "
                f"{self.config.get('in_channels')} and predicts {self.config.get('out_channels')}: it is the VAE of "
                "another model."
            )
        require_known_channels(self.name, self.config, channels, self.temporal, takes_image=self.takes_image)
        if self.takes_context:
            require_vace_channels(self.name, self.config, channels, int(self.pipeline.vae_scale_factor_spatial))
        self._padded = self.takes_image and self.config.get("in_channels") == 2 * channels + self.temporal
        if self.takes_image and self.config.get("image_dim") and getattr(self.pipeline, "image_encoder", None) is None:
            raise ConfigError(f"the transformer of {self.name} takes image features, and it has no image encoder.")

    def require_texts(self) -> None:
        """Encode one text, to see whether it is as wide as the transformer expects.

        Raises:
            ConfigError: it is not.
        """
        width = next((self.config[name] for name in _TEXT_WIDTH if self.config.get(name)), None)
        if width is None:
            return
        found = self._encode_text("a clip", self._blank() if self.takes_image else None)[0].shape[1]
        if found != width:
            raise ConfigError(
                f"the text encoder of {self.name} has width {found}, and its transformer takes {width}: it is the text "
                "encoder of another model."
            )

    def encode(self, pixels: Tensor, caption: str, beside: Beside | None = None) -> Encoded:
        """One clip, (F, 3, H, W) uint8, its caption, and what lies beside it.

        The latents of references, if there are any, come before those of the clip.
        """
        video = pixels.permute(1, 0, 2, 3)[None].float() / 127.5 - 1
        latent = self.statistics.normalize(encode_video(self.pipeline.vae, video))
        image = _as_image(pixels[0]) if self.takes_image else None
        text, extras = self._encode_text(caption, image)
        if self.takes_last_image and len(pixels) == 1:
            raise ConfigError(f"{self.name} takes a first and a last frame, and clips of one frame are asked for.")
        if image is not None:
            extras |= self._encode_image(video, [image, _as_image(pixels[-1])] if self.takes_last_image else image)
        if self.takes_context:
            extras[VACE_CONTEXT], references = encode_context(self.pipeline, video, beside or Beside())
            latent = torch.cat([references, latent], dim=1)
        return Encoded(latent, text, extras)

    def tokens_beyond(self, caption: str) -> int:
        """How many tokens of a caption the pipeline cuts off, because its text encoder takes no more."""
        limit = inspect.signature(self.pipeline.__call__).parameters.get("max_sequence_length")
        if limit is None or not isinstance(limit.default, int):
            return 0
        return max(0, len(self.pipeline.tokenizer(caption, verbose=False)["input_ids"]) - limit.default)

    def _encode_text(self, caption: str, image: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(L, D) without padding, and one vector of the whole text where the pipeline makes one."""
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        usual = inspect.signature(self.pipeline.__call__).parameters
        options = {
            "do_classifier_free_guidance": False,
            "num_videos_per_prompt": 1,
            "device": self.pipeline.text_encoder.device,
            "image": image,
        }
        # which of them, HunyuanVideo's call decides by the kind of its transformer
        options["image_embed_interleave"] = _INTERLEAVE.get(str(self.config.get("image_condition_type")), 1)
        if "max_sequence_length" in usual:  # encode_prompt's own default is another one, in Wan's pipelines
            options["max_sequence_length"] = usual["max_sequence_length"].default
        given = {name: value for name, value in options.items() if name in known}
        try:
            with torch.no_grad():
                found = self.pipeline.encode_prompt(prompt=caption, **given)
        except NameError as error:  # some pipelines of diffusers use ftfy without looking whether it is there
            raise MissingPackageError(f'{self.name} needs ftfy: pip install "salad-compile[clips]"') from error
        tensors = [value for value in found if isinstance(value, Tensor)]
        text = tensors[0]
        mask = next((t for t in tensors[1:] if t.shape == text.shape[:2] and _is_mask(t)), None)
        pooled = next((t for t in tensors[1:] if t.ndim == 2 and t is not mask), None)
        rows = strip_padding(text[0]) if mask is None else text[0][mask[0].bool()]
        rows = rows.cpu() if rows.dtype == torch.bfloat16 else rows.float().cpu()
        return rows, {} if pooled is None else {POOLED_TEXT: pooled[0].float().cpu()}

    def _encode_image(self, video: Tensor, image: Any) -> dict[str, Tensor]:
        """The first frame, or first and last, as the pipeline gives them to its transformer.

        Where the transformer takes the channels of a whole video and of a mask beside its own, empty frames follow the
        first one through the VAE; elsewhere it goes through alone.
        """
        first = video[:, :, :1]
        if self._padded:
            last = video[:, :, -1:] if self.takes_last_image else video[:, :, :0]
            between = video.shape[2] - 1 - last.shape[2]
            first = torch.cat([first, first.new_zeros(*first.shape[:2], between, *first.shape[3:]), last], dim=2)
        latent = encode_video(self.pipeline.vae, first)
        if self.pipeline.vae.config.get("invert_scale_latents"):  # CogVideoX 1.5 was trained on these divided
            latent = (latent.double() / self.pipeline.vae.config.scaling_factor).float()
        else:
            latent = self.statistics.normalize(latent)
        found = {LATENTS_IMAGE: self._with_mask(latent)} if self.takes_last_image else {FIRST_FRAME: latent}
        if getattr(self.pipeline, "image_encoder", None) is not None:
            with torch.no_grad():
                feature = self.pipeline.encode_image(image, self.pipeline.image_encoder.device)
            found[CLIP_FEATURE] = (feature if self.takes_last_image else feature[0]).float().cpu()
        return found

    def _with_mask(self, latent: Tensor) -> Tensor:
        """Behind a mask with a channel for each frame of a latent: 1 for the whole first latent, and the last frame."""
        mask = torch.zeros(self.temporal, *latent.shape[1:])
        mask[:, 0] = 1
        mask[-1, -1] = 1
        return torch.cat([mask, latent])

    def _blank(self) -> Any:
        return _as_image(torch.zeros(3, self.multiple, self.multiple, dtype=torch.uint8))


def _patches(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latents of one token in time, and in height and width, from the configuration of a transformer."""
    patch = config.get("patch_size")
    if isinstance(patch, (list, tuple)):
        return int(patch[0]), max(int(patch[-2]), int(patch[-1]))
    return int(config.get("patch_size_t") or 1), int(patch or 1)


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def _as_image(pixels: Tensor) -> Any:
    """(3, H, W) uint8 as an image of PIL."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
