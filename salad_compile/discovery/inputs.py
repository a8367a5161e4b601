"""Example inputs for discovery: made up from a model's signature and configuration, or the user's own, checked.

Discovery runs one forward on the meta device or under a `FakeTensorMode`: the inputs only have to have the right
shapes. What a parameter of `forward` means is read from its name (`RULES`, and `SPECIAL` for what only one architecture
takes); sizes come from `model.config` or else from attributes of the model. No class of any library is known here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salad_compile.common.signatures import signature_of
from salad_compile.errors import InputsError, did_you_mean

AUDIO_FRAMES = 126  # about five seconds, and no likely number of video or text tokens
IMAGE_TOKENS = 257  # of one image in a CLIP ViT-H/14 encoder


class _Unknown(Exception):
    """A rule lacks a size; the message names the configuration keys that could hold it."""


@dataclass(frozen=True)
class _Request:
    """The input of every rule: the model, the argument names of its forward, and the requested sizes."""

    model: nn.Module
    names: frozenset[str]
    device: torch.device
    dtype: torch.dtype
    latent_size: tuple[int, int, int]
    text_tokens: int

    def get(self, *keys: str) -> Any:
        """The value of the first of ``keys`` that the configuration, or else the model, has and that is not None."""
        config = getattr(self.model, "config", None)
        for key in keys:
            if isinstance(config, Mapping) and key in config:
                value = config[key]  # also a None: libraries that keep a config warn when it is read off the model
            else:
                value = getattr(config, key, None)
                value = getattr(self.model, key, None) if value is None else value
            if value is not None and not isinstance(value, nn.Module | Tensor):
                return value
        return None

    def size(self, *keys: str) -> int:
        """The same for a size; raises `_Unknown` when no key has one."""
        value = self.get(*keys)
        if not isinstance(value, int):
            raise _Unknown(f"the model's config has no {' or '.join(keys)}")
        return value

    def patch_conv(self) -> nn.Conv3d | None:
        """The first convolution that cuts a video into patches, if patches are cut by one."""
        convolutions = (module for module in self.model.modules() if isinstance(module, nn.Conv3d))
        return next((conv for conv in convolutions if conv.kernel_size == conv.stride), None)

    def patch(self) -> tuple[int, int, int]:
        """Patch size (t, h, w)."""
        size, conv = self.get("patch_size"), self.patch_conv()
        if isinstance(size, int):
            return (self.get("patch_size_t") or 1, size, size)
        if size is None:
            size = conv.kernel_size if conv is not None else ()
        t, h, w = (1, 1, 1, *size)[-3:]
        return (t, h, w)

    def latent(self) -> tuple[int, int, int]:
        """The latent size (T, H, W), cut to whole patches; some models have a fixed number of frames."""
        size = (self.get("video_length") or self.latent_size[0], *self.latent_size[1:])
        if self.get("use_learned_positional_embeddings"):  # one learned vector per token of the training resolution
            frames = (self.size("sample_frames") - 1) // self.size("temporal_compression_ratio") + 1
            size = (frames, self.size("sample_height"), self.size("sample_width"))
        t, h, w = (max(axis - axis % patch, patch) for axis, patch in zip(size, self.patch(), strict=True))
        return (t, h, w)

    def grid(self) -> tuple[int, int, int]:
        """The latent size in patches."""
        t, h, w = (axis // patch for axis, patch in zip(self.latent(), self.patch(), strict=True))
        return (t, h, w)

    def text(self) -> int:
        """Number of text tokens; models with positions for a fixed number of them take that."""
        tokens: int = self.get("max_text_seq_length") or self.text_tokens
        return tokens

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def arange(self, length: int) -> Tensor:
        return torch.arange(length, device=self.device)

    def time(self, *shape: int) -> Tensor:
        """Timesteps keep fp32 whatever the model's type, as schedulers hand them out."""
        return torch.full(shape, 500.0, device=self.device)


# ---------------------------------------------------------------- rules


def _is_packed(r: _Request) -> bool:
    """Whether video comes as (B, tokens, C): a forward that takes the grid as three numbers cannot see it otherwise."""
    return {"num_frames", "height", "width"} <= r.names


def _latents(r: _Request) -> Tensor:
    """(B, C, T, H, W), or the layout that the model's signature or configuration shows."""
    (t, h, w), conv = r.latent(), r.patch_conv()
    if r.get("in_visual_dim") is not None:  # patches cut by a Linear: channels last
        channels = r.size("in_visual_dim")
        return r.zeros(1, t, h, w, 2 * channels + 1 if r.get("visual_cond") else channels)
    keys = ("in_channels", "in_dim")
    channels = conv.in_channels if conv is not None and r.get(*keys) is None else r.size(*keys)
    if _is_packed(r):
        return r.zeros(1, math.prod(r.grid()), channels)
    if FRAMES_FIRST & r.names:
        return r.zeros(1, t, channels, h, w)
    return r.zeros(1, channels, t, h, w)


def _text_width(r: _Request) -> tuple[str, ...]:
    """The configuration keys, one of which holds the width of the text encoder."""
    if r.get("use_crossattn_projection"):
        return ("crossattn_proj_in_channels",)
    if r.get("use_prompt_embeddings") is False:  # then text arrives projected already
        return ("cross_attention_dim",)
    return ("text_dim", "in_text_dim", "caption_channels", "text_embed_dim", "cross_attention_dim")


def _text(r: _Request) -> Tensor:
    """(B, L, width of the text encoder)."""
    return r.zeros(1, r.text(), r.size(*_text_width(r)))


def _audio_text(r: _Request) -> Tensor:
    projected = r.get("use_prompt_embeddings") is False
    return r.zeros(1, r.text(), r.size("audio_cross_attention_dim" if projected else "caption_channels"))


def _timestep(r: _Request) -> Tensor:
    """(B,), or (B, T) where two times span a flow per frame."""
    return r.time(1, r.latent()[0]) if "r_timestep" in r.names else r.time(1)


def _image_tokens(r: _Request) -> Tensor:
    """(images, tokens, width): one image, or the first and the last frame where positions are learned for both."""
    both = r.get("pos_embed_seq_len")
    return r.zeros(2 if both else 1, both // 2 if both else IMAGE_TOKENS, r.size("image_dim"))


def _rotary(r: _Request) -> tuple[Tensor, Tensor]:
    shape = (math.prod(r.grid()), r.size("attention_head_dim"))
    return r.zeros(*shape), r.zeros(*shape)


def _face_video(r: _Request) -> Tensor:
    """(B, 3, frames, size, size): two convolutions of stride 2 must leave one frame fewer than there are poses."""
    size = r.size("motion_encoder_size")
    return r.zeros(1, 3, 4 * max(r.latent()[0] - 2, 0) + 1, size, size)


def _always(_: _Request) -> bool:
    return True


def _never(_: _Request) -> bool:
    return False


def _with(*keys: str) -> Callable[[_Request], bool]:
    """Needed by models whose configuration sets one of ``keys``."""
    return lambda r: any(r.get(key) for key in keys)


@dataclass(frozen=True)
class _Rule:
    make: Callable[[_Request], Any]
    needed: Callable[[_Request], bool] = _never
    """Whether forward needs the parameter although it has a default."""


_LATENTS = _Rule(_latents, needed=_always)
_TEXT = _Rule(_text, needed=lambda r: r.get(*_text_width(r)) is not None)
_TIME = _Rule(_timestep, needed=_always)

FRAMES_FIRST = {"r_timestep", "timestep_cond"}
"""Parameters that only models with (B, T, C, H, W) latents take."""

LATENT_NAMES = ("hidden_states", "x", "latents", "sample")

RULES: dict[str, _Rule] = {
    **dict.fromkeys(LATENT_NAMES, _LATENTS),
    **dict.fromkeys(("encoder_hidden_states", "context", "text", "text_embeds"), _TEXT),
    **dict.fromkeys(("timestep", "timesteps", "t"), _TIME),
    "encoder_attention_mask": _Rule(lambda r: torch.ones(1, r.text(), device=r.device, dtype=torch.int64)),
    "encoder_hidden_states_image": _Rule(_image_tokens, needed=_with("image_dim")),
    "pooled_projections": _Rule(lambda r: r.zeros(1, r.size("pooled_projection_dim", "in_text_dim2"))),
    "guidance": _Rule(lambda r: r.time(1), needed=_with("guidance_embeds")),
    "num_frames": _Rule(lambda r: r.grid()[0], needed=_is_packed),
    "height": _Rule(lambda r: r.grid()[1], needed=_is_packed),
    "width": _Rule(lambda r: r.grid()[2], needed=_is_packed),
    "audio_hidden_states": _Rule(lambda r: r.zeros(1, AUDIO_FRAMES, r.size("audio_in_channels", "in_audio_dim"))),
    "audio_encoder_hidden_states": _Rule(_audio_text),
    "audio_num_frames": _Rule(lambda r: AUDIO_FRAMES, needed=_is_packed),
}

SPECIAL: dict[str, _Rule] = {
    # frame-wise flow maps
    "r_timestep": _TIME,
    # control video of another channel count than the latents
    "control_hidden_states": _Rule(
        lambda r: r.zeros(1, r.size("vace_in_channels"), *r.latent()), needed=_with("vace_in_channels")
    ),
    # character animation: poses for all frames but the reference, and a video of the face in pixels
    "pose_hidden_states": _Rule(
        lambda r: r.zeros(1, r.size("latent_channels"), r.latent()[0] - 1, *r.latent()[1:]),
        needed=_with("latent_channels"),
    ),
    "face_pixel_values": _Rule(_face_video, needed=_with("motion_encoder_size")),
    # noise levels that modulate the text, where they do
    "sigma": _Rule(lambda r: r.time(1), needed=_with("cross_attn_mod", "audio_cross_attn_mod")),
    # positions along each axis of the grid, and of the text
    "visual_rope_pos": _Rule(lambda r: tuple(r.arange(length) for length in r.grid())),
    "text_rope_pos": _Rule(lambda r: r.arange(r.text())),
    # a second time, of image-to-video models
    "ofs": _Rule(lambda r: r.time(1), needed=_with("ofs_embed_dim")),
    # cosines and sines of the video tokens
    "image_rotary_emb": _Rule(_rotary, needed=_with("use_rotary_positional_embeddings")),
    # the padding mask is one more latent channel
    "padding_mask": _Rule(lambda r: r.zeros(1, 1, *r.latent()[1:]), needed=_with("concat_padding_mask")),
    # identity of a face: one embedding, and features from several depths of an image encoder
    "id_cond": _Rule(lambda r: r.zeros(1, r.size("LFE_id_dim")), needed=_with("is_train_face")),
    "id_vit_hidden": _Rule(
        lambda r: [r.zeros(1, 577, r.size("LFE_vit_dim")) for _ in range(r.size("LFE_num_scale"))],
        needed=_with("is_train_face"),
    ),
}


# ---------------------------------------------------------------- interface


def synthesise_inputs(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    latent_size: tuple[int, int, int] = (21, 60, 104),
    text_tokens: int = 512,
) -> dict[str, Any]:
    """Keyword inputs for one forward of ``model`` with batch size 1.

    Args:
        model: read, never run.
        device: of all tensors; under a `FakeTensorMode` they are fake tensors of that device.
        dtype: of latents and embeddings; times are float32, masks and positions int64.
        latent_size: (T, H, W) of the latent video, cut to whole patches.
        text_tokens: length of the text, unless the model has a fixed one.

    Raises:
        InputsError: the meaning or size of a required parameter is not known; the message names them.
    """
    parameters = _named_parameters(model)
    request = _Request(model, frozenset(parameters), device, dtype, latent_size, text_tokens)
    inputs: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, parameter in parameters.items():
        rule = RULES.get(name) or SPECIAL.get(name)
        required = parameter.default is inspect.Parameter.empty
        if rule is None:
            if required:
                failures[name] = "no rule for this name"
        elif required or rule.needed(request):
            try:
                inputs[name] = rule.make(request)
            except _Unknown as error:
                failures[name] = str(error)
    if failures or not inputs.keys() & set(LATENT_NAMES):
        failures = failures or {"the latents": f"none of {', '.join(LATENT_NAMES)} is a parameter"}
        raise InputsError(_synthesis_message(model, failures))
    return inputs


def normalise_inputs(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``model(...)`` from the user's example inputs.

    Args:
        model: only its forward's signature is read.
        example_inputs: a tuple of positional inputs or a mapping of keyword inputs.

    Raises:
        InputsError: neither of the two, or they do not fit the signature; the message shows it and the nearest names.
    """
    signature = inspect.signature(model.forward)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        raise InputsError(
            "example_inputs must be a tuple of positional inputs, such as (latents, timestep), or a dict of keyword "
            f"inputs, not {type(example_inputs).__name__}. The model takes {_show_signature(model)}"
        )
    problems = _misfits(signature, kwargs) if kwargs else []
    if not problems:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            problems = [str(error)]
    if problems:
        raise InputsError(
            f"example_inputs do not fit the model: {'; '.join(problems)}. It takes {_show_signature(model)}"
        )
    return args, kwargs


def _misfits(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> list[str]:
    """All wrong and missing names at once, where `Signature.bind` stops at the first."""
    parameters = signature.parameters.values()
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in by_name if p.default is p.empty and p.name not in kwargs]
    names = [p.name for p in by_name]
    unknown = [name for name in kwargs if name not in names]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = []
    # A name that is given already cannot be what another one was meant to be.
    free = [name for name in names if name not in kwargs]
    problems = [f"unknown input {name!r}{did_you_mean(str(name), free).rstrip('?')}" for name in unknown]
    return problems + ([f"missing {', '.join(map(repr, missing))}"] if missing else [])


def _named_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of forward that can be passed by keyword."""
    parameters = signature_of(model.forward).parameters
    return {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _show_signature(model: nn.Module) -> str:
    """`Class.forward(a, b, c=None)`: the signature without annotations, which in libraries fill a screen."""
    signature = signature_of(model.forward)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    shown = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    return f"{type(model).__name__}.forward{shown}"


def _synthesis_message(model: nn.Module, failures: Mapping[str, str]) -> str:
    """What could not be made, why, and an `example_inputs` to fill in: required parameters and those that failed."""
    reasons = "; ".join(f"{name} ({reason})" for name, reason in failures.items())
    wanted = [
        name
        for name, parameter in _named_parameters(model).items()
        if parameter.default is parameter.empty or name in failures
    ]
    example = ", ".join(f'"{name}": ...' for name in wanted)
    return (
        f"cannot make up example inputs for this model: {reasons}. Pass some of the shapes that the model is used "
        f"with, their values do not matter: example_inputs={{{example}}}. The model takes {_show_signature(model)}"
    )
