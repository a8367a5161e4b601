"""Clips sampled while a model trains: one picture, dense above SALAD, from the same noise."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import salad_compile
from salad_compile.errors import ConfigError
from salad_compile.training import TrainSettings, estimate, train
from salad_compile.training.families import family_of
from salad_compile.training.samples import COLUMN_WIDTH, TITLE_HEIGHT, denoise, strip
from salad_compile.training.seeds import generator
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, base, converted, latents

RUN = dataclasses.replace(SETTINGS, steps=3, sample_every=2, sample_steps=2, sample_items=2)


def decode(latent: Tensor) -> Tensor:
    """Three channels as colours, each latent as one frame of 8 x 8 pixels."""
    return (latent[:3].permute(1, 2, 3, 0) * 40 + 128).clamp(0, 255).to(torch.uint8).cpu()


def rows(path: Path) -> tuple[Tensor, Tensor]:
    """The pictures of both clips."""
    with Image.open(path) as picture:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3)
    half = pixels.shape[0] // 2
    return pixels[TITLE_HEIGHT:half], pixels[half + TITLE_HEIGHT :]


def test_strips_at_chosen_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = converted(), converted()
    data = latents(tmp_path / "data")
    train(models[0], data, RUN, tmp_path / "run", decode=decode)
    found = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert found == [f"step-{step:08d}-{item}.png" for step in (0, 2, 3) for item in (0, 1)]
    clips = [rows(tmp_path / "run" / "samples" / name) for name in found]
    for first, *others in (clips[::2], clips[1::2]):
        assert all(torch.equal(first[0], dense) for dense, _ in others)
        assert not torch.equal(first[0], first[1])
        assert len({bytes(sparse.numpy().tobytes()) for _, sparse in (first, *others)}) == 3
    assert not torch.equal(clips[0][0], clips[1][0])
    assert f"step 2: dense beside SALAD in {tmp_path}/run/samples/step-00000002-1.png" in capsys.readouterr().err
    train(models[1], data, dataclasses.replace(RUN, sample_every=0), tmp_path / "without")
    trained, same = ({key: p for key, p in model.named_parameters() if p.requires_grad} for model in models)
    assert all(torch.equal(value, same[key]) for key, value in trained.items())  # samples change nothing


def test_dense_is_the_base_model_from_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sparsity 0 and before any training both rows are the base model's, whose steps are Euler's."""
    seen: list[Tensor] = []

    def keep(latent: Tensor) -> Tensor:
        seen.append(latent.clone())
        return decode(latent)

    settings = dataclasses.replace(RUN, steps=1, sample_items=1, sample_guidance=3.0, learning_rate=0.0)
    whole = dataclasses.replace(CONFIG, sparsity=0.0, lowest_sparsity=None)
    data = latents(tmp_path / "data")
    train(base(num_layers=1), data, settings, tmp_path / "run", decode=keep, config=whole)
    dense, sparse, _ = seen
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    model, item = base(num_layers=1), data[0]
    latent = torch.randn(item.latent.shape, generator=generator(0, "sample", 0))[None]
    text = torch.nn.functional.pad(item.text, (0, 0, 0, 8 - len(item.text)))[None]
    levels = [5 * u / (1 + 4 * u) for u in (1.0, 0.5, 0.0)]
    with torch.no_grad():
        for s, after in itertools.pairwise(levels):
            velocities = [model(latent, torch.tensor([1000 * s]), t, return_dict=False)[0] for t in (text, 0 * text)]
            latent = latent + (after - s) * (velocities[1] + 3.0 * (velocities[0] - velocities[1]))
    torch.testing.assert_close(dense, latent[0], rtol=1e-4, atol=1e-4)


def test_an_expert_samples_its_own_noise_alone(tmp_path: Path) -> None:
    asked: list[float] = []

    def forward(model: Any, noisy: Tensor, timesteps: Tensor, texts: Tensor) -> Tensor:
        asked.extend(timesteps.tolist())
        return noisy * 0

    model, item = converted(), latents(tmp_path / "data")[0]
    settings = dataclasses.replace(RUN, lowest_noise=0.6, highest_noise=0.9)
    family = family_of(model, settings, forward)
    here = SimpleNamespace(device=torch.device("cpu"))
    engine: Any = SimpleNamespace(settings=settings, bare=model, accelerator=here)
    found = denoise(engine, family, item, 0)
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == pytest.approx(900.0)
    assert 600 < asked[-1] < 900
    # a model that predicts no velocity leaves the item as it was noised
    noise = torch.randn(item.latent.shape, generator=generator(0, "sample", 0))
    torch.testing.assert_close(found, 0.1 * item.latent + 0.9 * noise)


def test_without_a_vae_it_is_one_sentence_before_anything(tmp_path: Path) -> None:
    for call in (train, estimate):
        with pytest.raises(ConfigError, match="sample_every needs the VAE"):
            call(converted(), latents(tmp_path / "data"), RUN, tmp_path / "run")  # type: ignore[operator]
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_samples(tmp_path: Path) -> None:
    found = estimate(converted(), latents(tmp_path / "data"), RUN, tmp_path / "run", decode=decode)
    assert found.sample_seconds > 0
    assert found.seconds > found.steps * found.step_seconds + found.sample_seconds
    assert not (tmp_path / "run").exists()


def test_a_strip_shows_frames_from_the_first_to_the_last() -> None:
    clip = torch.arange(13, dtype=torch.uint8)[:, None, None, None].expand(13, 4, 2 * COLUMN_WIDTH, 3).contiguous()
    picture = strip({"dense": clip, "SALAD": clip})
    assert picture.size == (6 * COLUMN_WIDTH, 2 * (2 + TITLE_HEIGHT))
    middle = [picture.getpixel((column * COLUMN_WIDTH + 5, TITLE_HEIGHT + 1)) for column in range(6)]
    assert middle == [(value,) * 3 for value in (0, 2, 5, 7, 10, 12)]


def test_settings_of_samples_may_change() -> None:
    assert {"sample_every", "sample_steps"} <= salad_compile.training.settings.MAY_CHANGE
    with pytest.raises(ConfigError, match="sample_steps must be"):
        TrainSettings(sample_steps=0)
