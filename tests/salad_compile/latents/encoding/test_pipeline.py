"""What each family's pipeline is given in training is what it makes itself, with its own functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.latents import LatentItem
from salad_compile.latents.encoding.pipeline import Encoded, PipelineEncoder
from salad_compile.latents.encoding.vae import decode_latent, statistics_of_config, vae_statistics
from salad_compile.training import TrainSettings
from salad_compile.training.families import family_of
from salad_compile.training.families.wan import require_conditions
from salad_compile.training.flow_matching import stack
from tests.salad_compile.latents.encoding import families, world

CAPTION = "a dog runs in the snow"
Make = Callable[[], Any]


@functools.cache
def pipeline(make: Make) -> Any:
    return families.build(make)


def pixels(frames: int = 9, height: int = 64, width: int = 96) -> Tensor:
    return torch.from_numpy(world.moving(frames, height, width)).permute(0, 3, 1, 2)


@functools.cache
def encoded(make: Make) -> Encoded:
    encoder = PipelineEncoder(pipeline(make))
    encoder.require_texts()
    return encoder.encode(pixels(), CAPTION)


def denoised_to(pipe: Any, latent: Tensor) -> Tensor:
    """What the pipeline hands its VAE for a denoised latent, from its own call with a single step that returns it."""
    found: list[Tensor] = []

    class Stop(Exception):
        pass

    def decode(latents: Tensor, *_: Any, **__: Any) -> None:
        found.append(latents)
        raise Stop

    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *_, **__: (latent[None],)
    patched, pipe.vae.decode = pipe.vae.decode, decode
    try:
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(Stop):
            pipe(prompt=CAPTION, height=64, width=96, num_frames=9, num_inference_steps=1, guidance_scale=1.0)
    finally:
        pipe.scheduler.step, pipe.vae.decode = step, patched
    return found[0]


@pytest.mark.parametrize("make", families.TEXT_TO_VIDEO, ids=lambda make: make.__name__)
def test_latents_are_what_the_pipeline_would_decode(make: Make) -> None:
    pipe, found = pipeline(make), encoded(make)
    raw = world.mode_of(pipe.vae, world.as_video(pixels()))
    latent = found.latent
    if make is families.ltx:
        latent = pipe._pack_latents(latent[None], 1, 1)[0]
    elif make is families.cogvideo:
        latent = latent.transpose(0, 1)
    given = denoised_to(pipe, latent)
    torch.testing.assert_close(given, raw, rtol=1e-4, atol=1e-4)
    assert found.latent.std() > 1e-3


@pytest.mark.parametrize("make", families.TEXT_TO_VIDEO, ids=lambda make: make.__name__)
def test_decoded_latents_are_the_frames_of_the_pipeline(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, latent = pipeline(make), encoded(make).latent
    given = latent
    if make is families.ltx:
        given = pipe._pack_latents(latent[None], 1, 1)[0]
    elif make is families.cogvideo:
        given = latent.transpose(0, 1)
    monkeypatch.setattr(pipe.scheduler, "step", lambda *_, **__: (given[None],))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 96, "num_frames": 9}
    frames = pipe(prompt=CAPTION, **size, num_inference_steps=1, guidance_scale=1.0, output_type="np").frames[0]
    found = decode_latent(pipe.vae, vae_statistics(pipe.vae), latent)
    assert found.shape == frames.shape
    assert (found.float() / 255 - torch.from_numpy(frames)).abs().max() <= 0.5 / 255 + 1e-3


def test_texts_are_those_of_the_pipeline() -> None:
    with torch.no_grad():
        for make in (families.wan_two_experts, families.cogvideo):
            embeds = pipeline(make).encode_prompt(CAPTION, do_classifier_free_guidance=False, max_sequence_length=226)
            text = encoded(make).text
            torch.testing.assert_close(text, embeds[0][0, : len(text)])
            assert len(text) == (226 if make is families.cogvideo else 7)  # the padding of T5 is no zeros
        embeds, mask = pipeline(families.ltx).encode_prompt(CAPTION, do_classifier_free_guidance=False)[:2]
        torch.testing.assert_close(encoded(families.ltx).text, embeds[0][mask[0].bool()])
        assert len(encoded(families.ltx).text) == 7 < mask.shape[1]
        embeds, pooled, mask = pipeline(families.hunyuan).encode_prompt(CAPTION)
        torch.testing.assert_close(encoded(families.hunyuan).text, embeds[0][mask[0].bool()])
        torch.testing.assert_close(encoded(families.hunyuan).extras["pooled_text"], pooled[0])
    assert not encoded(families.ltx).extras


@pytest.mark.parametrize("make", families.IMAGE_TO_VIDEO, ids=lambda make: make.__name__)
def test_the_first_frame_is_what_the_pipeline_makes_of_it(make: Make) -> None:
    pipe, found = pipeline(make), encoded(make)
    first = world.as_video(pixels()[:1])[:, :, 0]
    channels = found.latent.shape[0]
    with torch.no_grad():
        options = {"num_frames": 9, "height": 64, "width": 96, "dtype": torch.float32, "device": torch.device("cpu")}
        made = pipe.prepare_latents(first, 1, channels, generator=torch.Generator().manual_seed(0), **options)
    mine = found.extras["first_frame_latent"]
    if make in (families.wan_image, families.wan_image_without_features):
        assert mine.shape == found.latent.shape
        torch.testing.assert_close(mine, made[1][0, 4:], rtol=1e-4, atol=1e-4)
    else:
        assert mine.shape == (channels, 1, *found.latent.shape[2:])
        if make is not families.cogvideo_image:  # its VAE is not causal: group norm sees several frames
            torch.testing.assert_close(mine, found.latent[:, :1], rtol=1e-3, atol=1e-3)
    if make is families.wan_ti2v_image:
        torch.testing.assert_close(mine, made[1][0], rtol=1e-4, atol=1e-4)
    if make is families.wan_image:
        image = torch.from_numpy(world.moving(9, 64, 96)[0])
        with torch.no_grad():
            torch.testing.assert_close(found.extras["clip_feature"], pipe.encode_image(image)[0])
    else:
        assert "clip_feature" not in found.extras


def test_first_and_last_frame() -> None:
    """As the pipeline makes them, and a training step as its call."""
    pipe, found = pipeline(families.wan_first_and_last), encoded(families.wan_first_and_last)
    first, last = (world.as_video(pixels()[place : place + 1 or None])[:, :, 0] for place in (0, -1))
    images = [torch.from_numpy(world.moving(9, 64, 96)[place]) for place in (0, -1)]
    with torch.no_grad():
        made = pipe.prepare_latents(first, 1, 16, 64, 96, 9, torch.float32, torch.device("cpu"), last_image=last)[1]
        features = pipe.encode_image(images)
    torch.testing.assert_close(found.extras["latents_image"], made[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.extras["clip_feature"], features)
    assert sorted(found.extras) == ["clip_feature", "latents_image"]
    item = LatentItem("clip", found.latent, found.text, extras=found.extras)
    settings = TrainSettings(precision="fp32", text_dropout=0.0)
    family = family_of(pipe.transformer, settings)
    require_conditions(pipe.transformer, item)
    batch = stack([family.sample(item, 0, place) for place in range(2)])
    given = family.inputs(batch)
    assert given is not None
    assert torch.equal(given["encoder_hidden_states_image"], features.repeat(2, 1, 1))
    with torch.no_grad():
        assert family.predict(pipe.transformer, batch).shape == batch.latents.shape
    other = replace(item, extras={**item.extras, "clip_feature": features[0]})
    with pytest.raises(ConfigError, match="takes features of a first and of a last frame, and 'clip' has those of one"):
        require_conditions(pipe.transformer, other)
    with pytest.raises(ConfigError, match="takes a first and a last frame, and clips of one frame"):
        PipelineEncoder(pipe).encode(pixels()[:1], CAPTION)


@pytest.mark.parametrize(
    ("make", "image_tokens"),
    [(families.hunyuan_image, 288), (families.hunyuan_image_replacing, 144)],
    ids=["concatenated", "replaced"],
)
def test_hunyuan_gives_its_text_encoder_the_first_frame(make: Make, image_tokens: int) -> None:
    """And as many of its tokens as the pipeline does, which follows from the kind of its transformer."""
    pipe, found = pipeline(make), encoded(make)
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def forward(**given: Any) -> None:
        seen.update(given)
        raise Stop

    pipe.transformer.forward, before = forward, pipe.transformer.forward
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 1, "max_sequence_length": 256}
    try:
        with pytest.raises(Stop):
            pipe(Image.fromarray(world.moving(9, 64, 96)[0]), CAPTION, generator=torch.Generator(), **options)
    finally:
        pipe.transformer.forward = before
    texts, mask = seen["encoder_hidden_states"][0], seen["encoder_attention_mask"][0].bool()
    torch.testing.assert_close(found.text, texts[mask])
    assert image_tokens < len(found.text) < image_tokens + 20
    first, given = found.extras["first_frame_latent"], seen["hidden_states"][0]
    if make is families.hunyuan_image:
        torch.testing.assert_close(given[4:8], torch.cat([first, torch.zeros(4, 2, *first.shape[2:])], dim=1))
    else:
        torch.testing.assert_close(given[:, :1], first)


def test_cogvideo_scales_its_first_frame_as_its_pipeline_does() -> None:
    """The posterior is drawn from there, and its mode is taken here: with a variance of zero they are the same."""
    pipe = families.build(families.cogvideo_image)
    with torch.no_grad():
        pipe.vae.encoder.conv_out.conv.weight[4:] = 0
        pipe.vae.encoder.conv_out.conv.bias[4:] = -60
    first = world.as_video(pixels()[:1])[:, :, 0]
    for inverted in (False, True):
        pipe.vae.register_to_config(invert_scale_latents=inverted)
        mine = PipelineEncoder(pipe).encode(pixels(), CAPTION).extras["first_frame_latent"]
        options = {"num_frames": 9, "height": 64, "width": 96, "dtype": torch.float32, "device": torch.device("cpu")}
        with torch.no_grad():
            theirs = pipe.prepare_latents(first, 1, 4, generator=torch.Generator().manual_seed(0), **options)[1]
        torch.testing.assert_close(mine[:, 0], theirs[0, 0], rtol=1e-4, atol=1e-5)


def test_sizes_of_the_families() -> None:
    for make, expected in [
        (families.wan_two_experts, (16, 4)),
        (families.wan_ti2v, (32, 4)),
        (families.ltx, (32, 8)),
        (families.hunyuan, (16, 4)),
        (families.cogvideo, (16, 4)),
    ]:
        encoder = PipelineEncoder(pipeline(make))
        assert (encoder.multiple, encoder.temporal) == expected


def test_without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy")
    with pytest.raises(MissingPackageError, match=r'needs ftfy: pip install "salad-compile\[clips\]"'):
        PipelineEncoder(pipeline(families.wan_image)).require_texts()


def test_parts_that_are_missing_or_of_another_model() -> None:
    pipe = families.build(families.wan_image)
    pipe.image_encoder = None
    with pytest.raises(ConfigError, match="takes image features, and it has no image encoder"):
        PipelineEncoder(pipe)
    pipe.vae = None
    with pytest.raises(ConfigError, match="has no VAE: load the whole pipeline"):
        PipelineEncoder(pipe)
    assert statistics_of_config({"latent_channels": 4}) is None
    pipe = families.build(families.hunyuan)
    pipe.vae = world.wan_vae(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(
        ConfigError, match=r"is of class AutoencoderKLWan, and it takes one of class AutoencoderKLHunyuan"
    ):
        PipelineEncoder(pipe)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "WanVACETransformer3DModel"},
            r"takes control_hidden_states.*conditions of the first frame and the context of Wan's VACE only",
        ),
        ({"_class_name": "WanAnimateTransformer3DModel"}, "takes pose_hidden_states, face_pixel_values"),
        ({"in_channels": 52}, "takes 36 channels beside the 16 of the latents, which are no first frame of 16"),
    ],
)
def test_conditions_that_nobody_makes_are_refused(config: dict[str, Any], message: str) -> None:
    pipe = pipeline(families.wan_image)
    with pytest.raises(ConfigError, match=message):
        PipelineEncoder(pipe, {**dict(pipe.transformer.config), **config})


def test_a_vae_without_statistics() -> None:
    vae = world.wan_vae()
    vae.register_to_config(latents_mean=None)
    with pytest.raises(ConfigError, match="how its latents are normalised is not known"):
        vae_statistics(vae)
