"""Whether a pipeline's parts are of one model, and whether its transformer takes only what encoding makes."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from salad_compile.errors import ConfigError

# of arguments of a transformer's forward: what it is given beside noisy latents, texts and the first frame
_OTHER = re.compile(r"control_(hidden|video)|pose_|face_|camera|reference|(^|_)ref_|id_cond|id_vit|audio_hidden")


def require_own_vae(pipeline: Any) -> None:
    """Whether the VAE is of a class that the pipeline names for it.

    Raises:
        ConfigError: it is not.
    """
    try:
        named = typing.get_type_hints(type(pipeline).__init__).get("vae")
    except (NameError, TypeError):
        return  # of a pipeline that names classes which are not there
    classes = tuple(each for each in (typing.get_args(named) or (named,)) if inspect.isclass(each))
    if classes and not isinstance(pipeline.vae, classes):
        wanted = " or ".join(each.__name__ for each in classes)
        raise ConfigError(
            f"the VAE of {type(pipeline).__name__} is of class {type(pipeline.vae).__name__}, and it takes one of "
            f"class {wanted}: it is the VAE of another model."
        )


def require_known_conditions(pipeline: str, config: Mapping[str, Any], *, but: Sequence[str] = ()) -> None:
    """Whether the transformer takes nothing beside latents, texts, first and last frame, by its forward.

    Args:
        but: arguments of it, by how they begin, that are made nevertheless.

    Raises:
        ConfigError: it takes a control video, a reference, a pose, sound or the like, which no clip of a folder has.
    """
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        return
    names = list(inspect.signature(cls.forward).parameters)
    others = [name for name in names if _OTHER.search(name) and not any(name.startswith(known) for known in but)]
    if others:
        raise ConfigError(
            f"{cls.__name__} of {pipeline} takes {', '.join(others)}, and encoding makes latents, texts, conditions "
            "of the first frame and the context of Wan's VACE only: make the data with another trainer, or with "
            "write_latents."
        )


def require_known_channels(
    pipeline: str, config: Mapping[str, Any], channels: int, temporal: int, *, takes_image: bool
) -> None:
    """Whether the channels beside the noisy ones are a first frame, alone or with a mask of it.

    Args:
        channels: of the latents. temporal: frames of a latent, for each of which Wan's mask has a channel.

    Raises:
        ConfigError: they are something else.
    """
    more = (config.get("in_channels") or channels) - channels
    if takes_image and more not in (0, channels, channels + 1, channels + temporal):
        raise ConfigError(
            f"the transformer of {pipeline} takes {more} channels beside the {channels} of the latents, which are no "
            f"first frame of {channels} with or without its mask: encoding does not know how they are made."
        )
