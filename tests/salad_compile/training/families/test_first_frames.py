"""Image-to-video models are trained on what their own pipelines give them for the same clip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents import LatentItem, open_latents, write_latents
from salad_compile.training import TrainSettings, train
from salad_compile.training.families import family_of
from salad_compile.training.flow_matching import losses
from tests.models.zoo import from_diffusers, randomise
from tests.salad_compile.latents.encoding import families
from tests.salad_compile.training.first_frame import encoded, given_by, prepare
from tests.salad_compile.training.tiny import CONFIG
from tests.salad_compile.training.tiny import SETTINGS as TINY

SETTINGS = replace(TINY, steps=2, batch=2, text_dropout=0.0, text_tokens=32, first_frame_conditioning_p=1.0)
Make = Callable[[], Any]
CHANNELS = {families.cogvideo_image}  # the first frame is further channels: no word of the settings


def settings_of(make: Make, pipe: Any) -> TrainSettings:
    usual = 128 if make is families.ltx_image else SETTINGS.text_tokens  # its texts depend on their padding
    length = {"text_tokens": pipe.transformer.config.get("max_text_seq_length") or usual}
    return replace(SETTINGS, **length, first_frame_conditioning_p=0.0 if make in CHANNELS else 1.0)


@functools.cache
def pipeline(make: Make) -> Any:
    pipe = families.build(make)
    if make is families.ltx_image:
        pipe.vae.register_to_config(scaling_factor=1.0)  # as the real one: this pipeline encodes without it
    return prepare(pipe)


@functools.cache
def item(make: Make, seed: int = 0) -> LatentItem:
    return encoded(pipeline(make), seed, 25.0)


def unpacked(make: Make, hidden: Tensor, item: LatentItem) -> Tensor:
    """The noisy latents, (1, C, T, H, W), in what the pipeline gave."""
    if make is families.ltx_image:
        return hidden.transpose(1, 2).reshape(1, *item.latent.shape)
    if make in CHANNELS:
        return hidden.transpose(1, 2)[:, : item.latent.shape[0]]
    return hidden


@pytest.mark.parametrize(
    "make", [families.wan_ti2v_image, families.ltx_image, families.cogvideo_image], ids=lambda make: make.__name__
)
def test_the_transformer_is_given_what_its_pipeline_gives_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some pipelines draw their first frame from the posterior: here they take its mode, as encoding does."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe, clip = pipeline(make), item(make)
    settings = settings_of(make, pipe)
    theirs = given_by(pipe, settings.text_tokens)
    family = family_of(pipe.transformer, settings)
    sample = family.sample(clip, 0, 0)
    noisy = unpacked(make, theirs["hidden_states"], clip)
    if make not in CHANNELS:
        torch.testing.assert_close(sample.latents[:, :, :1], noisy[:, :, :1], rtol=1e-3, atol=1e-3)
    batch = replace(sample, latents=noisy, timesteps=theirs["timestep"].float().max()[None])
    ours = family.inputs(batch)
    assert ours is not None
    masked = {"encoder_attention_mask", "encoder_hidden_states"} if make is families.ltx_image else set()
    for name, value in ours.items():  # behind the mask theirs is what the text encoder makes of padding
        if isinstance(value, Tensor) and name not in masked:
            torch.testing.assert_close(value, theirs[name].to(value.dtype), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        found = family.predict(pipe.transformer, batch)
        raw = family.unpack(pipe.transformer(**theirs)[0], batch)
    torch.testing.assert_close(found, raw, rtol=1e-3, atol=1e-3)
    rest = slice(0 if make in CHANNELS else 1, None)  # of a first frame that is given nothing is to be predicted
    error = (raw - batch.target).square()[:, :, rest].mean()
    torch.testing.assert_close(losses(found, batch.target, batch.given)[0], error, rtol=1e-3, atol=1e-3)


def test_shares_of_first_frames() -> None:
    """Samples without one are those of text to video, but for timesteps that are told token by token."""
    make = families.wan_ti2v_image
    clip, model = item(make), pipeline(make).transformer
    half, none = (family_of(model, replace(SETTINGS, first_frame_conditioning_p=share)) for share in (0.5, 0.0))
    given = [half.sample(clip, step, 0) for step in range(40)]
    share = sum(bool(sample.given.any()) for sample in given) / len(given)
    assert 0.25 < share < 0.75
    plain = next(step for step, sample in enumerate(given) if not sample.given.any())
    with torch.no_grad():
        both = [family.predict(model, family.sample(clip, plain, 0)) for family in (half, none)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert [bool(half.validation_sample(clip, n, 0).given) for n in range(9)] == [
        bool(half.validation_sample(clip, n, 0).given) for n in range(9)
    ]


def test_a_run_with_first_frames(tmp_path: Path) -> None:
    make = families.wan_ti2v_image
    write_latents([item(make, seed) for seed in range(2)], tmp_path / "data")
    data, seen = open_latents(tmp_path / "data", sample=0), []

    def decode(latent: Tensor) -> Tensor:
        seen.append(latent)
        return torch.zeros(3, 4, 4, 3, dtype=torch.uint8)

    settings = replace(SETTINGS, sample_every=2, sample_steps=2, first_frame_conditioning_p=1.0)
    config = {**CONFIG.to_dict(), "min_tokens": 12}
    model = families.build(make).transformer
    result = train(model, data, settings, tmp_path / "run", validation=data, config=config, decode=decode)
    assert result.outcome.gap_closed is None or result.finished
    for latent in seen:  # sampled clips begin with the frame that is given
        torch.testing.assert_close(latent[:, 0], data[0].latent[:, 0])
        assert not torch.allclose(latent[:, 1], data[0].latent[:, 1])


@pytest.mark.parametrize("condition", ["latent_concat", "token_replace"])
def test_hunyuan_video(condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.salad_compile.training.families.test_families import EncoderOf, draw, item_of, model_of

    text = model_of("HunyuanVideo")
    clip, channels = item_of(text, "HunyuanVideo"), text.config.in_channels
    taken = 2 * channels + 1 if condition == "latent_concat" else channels
    changes = {"in_channels": taken, "out_channels": channels, "image_condition_type": condition}
    model: Any = randomise(from_diffusers("HunyuanVideoTransformer3DModel", {**text.config, **changes}), 2).eval()
    first = draw(channels, 1, *clip.latent.shape[2:], seed=5)
    clip = replace(clip, latent=torch.cat([first, clip.latent[:, 1:]], dim=1))
    clip = replace(clip, extras={**clip.extras, "first_frame_latent": first})
    parts = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    make: Any = diffusers.HunyuanVideoImageToVideoPipeline
    pipe = make(**parts, vae=None, image_processor=None, transformer=model, scheduler=None)
    vae = EncoderOf(first[None])
    monkeypatch.setattr(pipe, "vae", vae)
    monkeypatch.setattr(pipe, "vae_scaling_factor", 1.0)
    monkeypatch.setattr(pipe, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0))
    size = {"height": clip.latent.shape[2] * 8, "width": clip.latent.shape[3] * 8}
    blank = torch.zeros(1, 3, size["height"], size["width"])
    monkeypatch.setattr(pipe.video_processor, "preprocess", lambda *_, **__: blank)
    text_tokens = torch.zeros(1, 8, clip.text.shape[1])
    text_tokens[0, : len(clip.text)] = clip.text
    mask = (torch.arange(8) < len(clip.text))[None].to(torch.int64)
    pooled = clip.extras["pooled_text"][None]
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_, **__: (text_tokens, pooled, mask))
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    frames = {"num_frames": 4 * (clip.latent.shape[1] - 1) + 1, "num_inference_steps": 1}
    pipe(
        image=None, prompt="a cat", latents=draw(1, *clip.latent.shape, seed=3), **size, **frames, output_type="latent"
    )
    theirs = calls[0]
    settings = replace(SETTINGS, text_tokens=8, guidance=6.0, first_frame_conditioning_p=0.0)
    family = family_of(model, settings)
    sample = family.sample(clip, 0, 0)
    noisy = theirs["hidden_states"][:, :channels]
    assert bool(sample.given.any()) == (condition == "token_replace")
    if sample.given.any():
        torch.testing.assert_close(sample.latents[:, :, 0], noisy[:, :, 0])
    batch = replace(sample, latents=noisy, timesteps=theirs["timestep"].float())
    with torch.no_grad():
        found = family.predict(model, batch)
        raw = model(**{**theirs, "guidance": torch.tensor([6000.0]) if "guidance" in theirs else None})[0]
    torch.testing.assert_close(found, raw, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    cogvideo = families.cogvideo_image
    settings = settings_of(cogvideo, pipeline(cogvideo))
    model, clip = pipeline(cogvideo).transformer, item(cogvideo)
    bare = replace(clip, extras={})
    with pytest.raises(ConfigError, match="takes 'first_frame_latent' beside latents and text"):
        family_of(model, settings).inputs(family_of(model, settings).sample(bare, 0, 0))
    other = replace(clip, extras={"first_frame_latent": torch.zeros(3, 1, 2, 2)})
    with pytest.raises(LatentItemError, match=r"clip0: its first_frame_latent is \(3, 1, 2, 2\), and the latent"):
        family_of(model, settings).sample(other, 0, 0)
    write_latents([clip], tmp_path / "data")
    data = open_latents(tmp_path / "data", sample=0)
    with pytest.raises(ConfigError, match="leave it out for CogVideoXTransformer3DModel"):
        family_of(model, replace(settings, first_frame_conditioning_p=0.5)).check(data)
    ti2v = families.wan_ti2v_image
    write_latents([replace(item(ti2v), latent=item(ti2v).latent[:, :1], extras={})], tmp_path / "images")
    images = open_latents(tmp_path / "images", sample=0)
    with pytest.raises(ConfigError, match="nothing is left to predict"):
        family_of(pipeline(ti2v).transformer, SETTINGS).check(images)
