"""Each family is called in training as its pipeline calls it: the same arguments, prediction and target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from salad_compile.config import SaladConfig
from salad_compile.errors import ConfigError
from salad_compile.latents import LatentItem, open_latents, write_latents
from salad_compile.training import TrainSettings, train
from salad_compile.training.families import family_of
from salad_compile.training.flow_matching import Noised, losses, training_sample
from tests.models.registry import ALL_CASES
from tests.models.zoo import WAN, from_diffusers, randomise
from tests.support import seeded

SETTINGS = TrainSettings(
    steps=1,
    batch=2,
    text_tokens=8,
    guidance=6.0,
    precision="fp32",
    compile="none",
    gradient_checkpointing=False,
    workers=0,
    text_dropout=0.0,
)
IMAGE_WAN = WAN | {"in_channels": 4 + 4 + 4, "image_dim": 8, "added_kv_proj_dim": 24}
FAMILIES = ("Wan", "Wan image", "LTXVideo", "HunyuanVideo", "CogVideoX", "CogVideoXRope")


def settings_of(name: str) -> TrainSettings:
    return dataclasses.replace(SETTINGS, text_tokens=17) if name.startswith("CogVideoX") else SETTINGS


def model_of(name: str) -> Any:
    if name == "Wan image":
        with seeded(2):
            return randomise(from_diffusers("WanTransformer3DModel", IMAGE_WAN), 2).eval()
    with seeded(2):
        return randomise(ALL_CASES[name].build(), 2).eval()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_width(model: Any) -> int:
    names = ("text_dim", "caption_channels", "text_embed_dim")
    return next(int(model.config[name]) for name in names if name in model.config)


def item_of(model: Any, name: str, number: int = 0, frames: int = 3) -> LatentItem:
    channels = 4 if name == "Wan image" else model.config.in_channels
    shape = (channels, frames, 4 if name == "LTXVideo" else 8, 6 if name == "LTXVideo" else 12)
    extras = {}
    if name == "Wan image":
        extras = {"first_frame_latent": draw(*shape, seed=7), "clip_feature": draw(257, 8, seed=8)}
    if name == "HunyuanVideo":
        extras = {"pooled_text": draw(model.config.pooled_projection_dim, seed=9)}
    text = draw(model.config.get("max_text_seq_length") or 5, text_width(model), seed=number)
    return LatentItem(f"clip{number}", draw(*shape, seed=number), text, fps=24.0, extras=extras)


def pipeline_of(name: str, model: Any) -> Any:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"text_encoder": None, "tokenizer": None, "vae": None, "transformer": model}
    if name.startswith("Wan"):
        kind: Any = diffusers.WanImageToVideoPipeline if "image" in name else diffusers.WanPipeline
        more = {"image_encoder": None, "image_processor": None} if "image" in name else {}
        return kind(**parts, scheduler=flow, **more)
    if name == "LTXVideo":
        return diffusers.LTXPipeline(**parts, scheduler=flow)
    if name == "HunyuanVideo":
        return diffusers.HunyuanVideoPipeline(**parts, text_encoder_2=None, tokenizer_2=None, scheduler=flow)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )
    return diffusers.CogVideoXPipeline(**parts, scheduler=scheduler)


class Stop(Exception):
    pass


class EncoderOf(torch.nn.Module):
    """A VAE that encodes everything as the latent that it is given."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent

    def encode(self, video: Tensor) -> Any:
        assert video[:, :, 1:].eq(0).all()
        return SimpleNamespace(latents=self.latent)


def pipelines_call(name: str, model: Any, item: LatentItem, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the transformer in the first step of the pipeline."""
    pipe, seen = pipeline_of(name, model), {}
    pipe.set_progress_bar_config(disable=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        raise Stop

    frames, height, width = item.latent.shape[1:]
    stride, per_frame = (32, 8) if name == "LTXVideo" else (8, 4)
    size = {"height": height * stride, "width": width * stride, "num_frames": (frames - 1) * per_frame + 1}
    text = torch.zeros(1, 8, item.text.shape[1])
    text[0, : len(item.text)] = item.text[:8]
    given: dict[str, Any] = {"prompt_embeds": text, "latents": item.latent[None], "num_inference_steps": 2}
    mask = (torch.arange(8) < len(item.text))[None].to(torch.int64)
    if name == "LTXVideo":
        given |= {"latents": item.latent.flatten(1).T[None], "frame_rate": 24, "guidance_scale": 1.0}
        given |= {"prompt_attention_mask": mask}
    elif name == "HunyuanVideo":
        given |= {"pooled_prompt_embeds": item.extras["pooled_text"][None], "prompt_attention_mask": mask}
        given |= {"guidance_scale": 6.0}
    elif name.startswith("CogVideoX"):
        given |= {"latents": item.latent[None].transpose(1, 2), "prompt_embeds": item.text[None], "guidance_scale": 1.0}
    else:
        given |= {"guidance_scale": 1.0}
    if name == "Wan image":
        pipe.vae = EncoderOf(item.extras["first_frame_latent"][None])
        blank = torch.zeros(1, 3, size["height"], size["width"])
        monkeypatch.setattr(pipe.video_processor, "preprocess", lambda *args, **kwargs: blank)
        given |= {"image": None, "image_embeds": item.extras["clip_feature"][None]}
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(Stop):
        pipe(**given, **size, output_type="latent")
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_are_those_of_the_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    item = item_of(model, name)
    theirs = pipelines_call(name, model, item, monkeypatch)
    sample = training_sample(item, settings_of(name), 0, 0)
    at = float(theirs["timestep"].flatten()[0])
    batch: Noised = dataclasses.replace(sample, latents=item.latent[None], timesteps=torch.tensor([at]))
    family = family_of(model, SETTINGS)
    ours = family.inputs(batch)
    assert ours is not None
    theirs = {k: v for k, v in theirs.items() if k not in ("return_dict", "attention_kwargs") and v is not None}
    assert ours.keys() - {"image_rotary_emb"} == theirs.keys() - {"image_rotary_emb"}
    for key, value in theirs.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(ours[key].to(value.dtype), value)
        elif key == "image_rotary_emb":
            assert all(torch.equal(a, b) for a, b in zip(ours[key], value, strict=True))
        else:
            assert ours[key] == value, key
    with torch.no_grad():
        predicted = family.predict(model, batch)
        raw = model(**theirs, return_dict=False)[0]
    assert predicted.shape == batch.target.shape
    torch.testing.assert_close(predicted.flatten().sort().values, raw.flatten().sort().values)
    assert losses(predicted, batch.target).isfinite().all()


@pytest.mark.parametrize("name", ["Wan", "CogVideoX"])
def test_a_step_of_the_scheduler_with_the_target_leads_to_the_clean_latents(name: str) -> None:
    """Noise, timestep and prediction type are those of the pipeline's scheduler."""
    model = model_of(name)
    item = item_of(model, name)
    family = family_of(model, SETTINGS)
    scheduler = pipeline_of(name, model).scheduler
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[1]
    if name == "Wan":
        s = float(scheduler.sigmas[1])
        scheduler.sigmas[2:] = 0
    else:
        s = (float(timestep) + 0.5) / 1000
    clean, noise = item.latent.double(), draw(*item.latent.shape, seed=4).double()
    noisy, at, target = family.add_noise(clean, noise, s)
    assert at == pytest.approx(float(timestep), abs=1e-3)
    out = scheduler.step(target, timestep, noisy)
    found = out.prev_sample if name == "Wan" else out.pred_original_sample
    torch.testing.assert_close(found.double(), clean, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["Wan", "CogVideoX"])
def test_a_step_of_sampling_is_that_of_the_scheduler(name: str) -> None:
    model = model_of(name)
    family = family_of(model, SETTINGS)
    scheduler = pipeline_of(name, model).scheduler
    scheduler.set_timesteps(4)
    noisy, predicted = draw(1, 4, 3, 8, 12, seed=1), draw(1, 4, 3, 8, 12, seed=2)
    for number, timestep in enumerate(scheduler.timesteps):
        last = number == 3
        if name == "Wan":
            s, after = (float(scheduler.sigmas[n]) for n in (number, number + 1))
        else:
            s, after = (float(timestep) + 0.5) / 1000, (float(timestep) - 250 + 0.5) / 1000
        expected = scheduler.step(predicted, timestep, noisy).prev_sample
        found = family.step(noisy, predicted, s, 0.0 if last else after)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 if last and name != "Wan" else 1e-5)


@pytest.mark.parametrize("name", ["Wan image", "LTXVideo", "HunyuanVideo", "CogVideoXRope"])
def test_every_family_trains(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    write_latents((item_of(model, name, number) for number in range(2)), tmp_path / "data")
    config = SaladConfig(compensation="none", sparsity=0.5, query_block=16, key_block=16, lora_rank=2, min_tokens=24)
    data = open_latents(tmp_path / "data")
    result = train(model, data, settings_of(name), tmp_path / "run", validation=data, config=config)
    assert result.finished
    assert result.outcome.dense != result.outcome.untrained


def test_what_an_item_lacks_is_named(tmp_path: Path) -> None:
    for name, lacking in (("HunyuanVideo", "pooled_text"),):
        model = model_of(name)
        item = dataclasses.replace(item_of(model, name), extras={})
        with pytest.raises(ConfigError, match=f"takes '{lacking}' beside latents and text"):
            family_of(model, SETTINGS).inputs(training_sample(item, SETTINGS, 0, 0))
    image = from_diffusers("HunyuanVideoTransformer3DModel", dict(model_of("HunyuanVideo").config) | {"in_channels": 9})
    with pytest.raises(ConfigError, match="takes 9 channels, and the latents have"):
        family_of(image, SETTINGS).inputs(training_sample(item_of(model, "HunyuanVideo"), SETTINGS, 0, 0))
