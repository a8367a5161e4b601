"""Wan's VACE: a control video, its mask and references, as its pipeline makes them and as its transformer gets them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import salad_compile
from salad_compile.errors import ConfigError
from salad_compile.latents import LatentItem, open_latents
from salad_compile.latents.conditions import reference_frames
from salad_compile.latents.encoding.companions import Beside
from salad_compile.latents.encoding.pipeline import Encoded, PipelineEncoder
from salad_compile.training import TrainSettings, train
from salad_compile.training.families import family_of
from salad_compile.training.families.wan import WanVACE
from salad_compile.training.flow_matching import losses, stack
from tests.salad_compile.latents.encoding import families, world

pytest.importorskip("av")
CAPTION = "a dog runs in the snow"
SETTINGS = TrainSettings(precision="fp32", text_dropout=0.0)
SIZE = {"height": 32, "width": 48, "num_frames": 5}


@functools.cache
def pipeline() -> Any:
    return families.build(families.wan_vace)


def pixels(seed: int) -> Tensor:
    return torch.from_numpy(world.moving(5, 32, 48, seed=seed)).permute(0, 3, 1, 2)


def shaped(seed: int) -> Tensor:
    """A mask of a moving square with gray edges: (5, 3, 32, 48)."""
    mask = torch.zeros(5, 3, 32, 48, dtype=torch.uint8)
    for number in range(5):
        mask[number, :, 5 + 2 * number : 20, 4:30] = 255
        mask[number, :, 4 + 2 * number, 4:30] = 100 + seed
    return mask


def as_images(video: Tensor) -> list[Any]:
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]


BESIDE = {
    "everything": Beside(pixels(1), shaped(0), (pixels(2)[0, :, :24, :], pixels(3)[0, :, :, :26])),
    "a control alone": Beside(pixels(1)),
    "nothing": Beside(),
    "a reference alone": Beside(references=(pixels(2)[0],)),
}


def call_of(beside: Beside) -> dict[str, Any]:
    """What the pipeline's own call gives its transformer."""
    pipe, seen = pipeline(), dict[str, Any]()

    class Stop(Exception):
        pass

    def forward(**given: Any) -> None:
        seen.update(given)
        raise Stop

    given: dict[str, Any] = {}
    if beside.references:
        given["reference_images"] = [as_images(image[None])[0] for image in beside.references]
    given |= {} if beside.control is None else {"video": as_images(beside.control)}
    given |= {} if beside.mask is None else {"mask": as_images(beside.mask)}
    pipe.transformer.forward, before = forward, pipe.transformer.forward
    pipe.set_progress_bar_config(disable=True)
    try:
        with pytest.raises(Stop):
            pipe(prompt=CAPTION, **given, **SIZE, num_inference_steps=1, guidance_scale=1.0)
    finally:
        pipe.transformer.forward = before
    return seen


def encoded(beside: Beside) -> Encoded:
    return PipelineEncoder(pipeline()).encode(pixels(0), CAPTION, beside)


@pytest.mark.parametrize("name", BESIDE)
def test_a_training_step_is_as_the_call_of_the_pipeline(name: str) -> None:
    beside = BESIDE[name]
    seen, found = call_of(beside), encoded(beside)
    context = found.extras["vace_context"]
    torch.testing.assert_close(context, seen["control_hidden_states"][0], rtol=1e-4, atol=1e-4)
    assert found.latent.shape[1:] == context.shape[1:] == seen["hidden_states"].shape[2:]
    item = LatentItem("clip", found.latent, found.text, extras=found.extras)
    assert reference_frames(item) == len(beside.references)

    family = family_of(pipeline().transformer, SETTINGS)
    assert isinstance(family, WanVACE)
    batch = stack([family.sample(item, 0, 0)])
    noisy = dataclasses.replace(batch, latents=seen["hidden_states"], timesteps=seen["timestep"].float())
    given = family.inputs(noisy)
    torch.testing.assert_close(given["encoder_hidden_states"], seen["encoder_hidden_states"], rtol=1e-4, atol=1e-4)
    given["control_hidden_states"] = seen["control_hidden_states"]
    with torch.no_grad():
        expected = pipeline().transformer(**{**seen, "return_dict": False})[0]
        torch.testing.assert_close(family.predict(pipeline().transformer, noisy), expected, rtol=1e-3, atol=1e-3)
        assert losses(family.predict(pipeline().transformer, batch), batch.target).isfinite().all()
        other = dataclasses.replace(noisy, conditions={"vace_context": context[None] + 1})
        assert not torch.allclose(family.predict(pipeline().transformer, other), expected, rtol=1e-2, atol=1e-2)


def test_items_without_their_context_are_refused() -> None:
    found = encoded(BESIDE["nothing"])
    family = family_of(pipeline().transformer, SETTINGS)
    for extras, said in (({}, "takes 'vace_context' beside"), ({"vace_context": torch.zeros(6, 2, 4, 6)}, "have 6")):
        item = LatentItem("clip", found.latent, found.text, extras=extras)
        with pytest.raises(ConfigError, match=said):
            family.inputs(stack([family.sample(item, 0, 0)]))
    pipe = families.build(families.wan_vace)
    pipe.transformer.register_to_config(vace_in_channels=6)
    with pytest.raises(ConfigError, match=r"takes 6 channels of a control video .* its pipeline makes 96"):
        PipelineEncoder(pipe)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = world.write_clips(tmp_path / "clips", ["cat.mp4", "dog.mp4", "dog.control.mp4", "bird.mask.mp4"])
    world.write_video(folder / "cat.control.webm", world.moving(9, seed=5))
    Image.new("L", (64, 48), 255).save(folder / "cat.mask.png")
    Image.new("RGB", (30, 50), "red").save(folder / "cat.reference.png")
    world.write_images(folder / "dog.mask", world.moving(9, seed=7))
    return folder


def test_from_files_beside_the_clips_to_a_training(clips: Path, tmp_path: Path) -> None:
    report = world.encode(clips, tmp_path / "data", pipeline())
    assert (report.written, [str(problem) for problem in report.skipped]) == (3, [])
    data = open_latents(tmp_path / "data")
    assert data.names == ["bird.mask", "cat", "dog"]  # a mask of no clip is a clip
    assert [reference_frames(item) for item in data] == [0, 1, 0]
    assert [item.latent.shape[1] for item in data] == [2, 3, 2]
    size = data[2].extras["vace_context"].shape[-2:]
    assert torch.equal(data[0].extras["vace_context"][32:], torch.ones(64, 2, *size))  # without a mask all is new
    dog = data[2].extras["vace_context"]
    assert dog[32:].unique().numel() > 2

    model = families.build(families.wan_vace).transformer
    shown = []

    def decode(latent: Tensor) -> Tensor:
        shown.append(tuple(latent.shape[1:]))
        return torch.zeros(5, 32, 48, 3, dtype=torch.uint8)

    settings = dataclasses.replace(
        SETTINGS,
        **{"steps": 1, "batch": 1, "compile": "none", "workers": 0, "gradient_checkpointing": False},
        **{"sample_every": 1, "sample_steps": 1, "sample_items": 2},
    )
    config = salad_compile.SaladConfig(compensation="none", min_tokens=1, query_block=16, key_block=16, sparsity=0.5)
    assert train(model, data, settings, tmp_path / "run", config=config, decode=decode).finished
    assert set(shown) == {(2, *size)}  # without the reference


def test_files_beside_clips_are_looked_at_again_and_named(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world.encode(clips, tmp_path / "data", pipeline())
    Image.new("L", (64, 48), 0).save(clips / "cat.mask.png")
    world.write_video(clips / "dog.control.mp4", world.moving(3))
    (clips / "bird.mask.control.mp4").write_bytes(b"no video" * 50)
    report = world.encode(clips, tmp_path / "data", pipeline())
    assert (report.written, report.kept) == (1, 0)
    assert {problem.name: problem.reason for problem in report.skipped} == {
        "bird.mask": "its control: it cannot be decoded: Invalid data found when processing input",
        "dog": "its control: it has 3 frames, 5 are asked for",
    }
    Image.new("L", (64, 48), 0).save(clips / "cat.mask.jpg")
    report = world.encode(clips, tmp_path / "other", families.build(families.wan_two_experts))
    assert report.written == 3
    assert "control of bird.mask and others beside clips are left out: WanPipeline takes none" in caplog.text
    with pytest.raises(salad_compile.SaladError, match=r"several files of mask: cat\.mask\.jpg, cat\.mask\.png"):
        world.encode(clips, tmp_path / "third", pipeline())
