"""`salad-compile latents encode`, from the folder of a pipeline on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from salad_compile.command_line import main
from salad_compile.command_line.pipeline_source import statistics_of
from salad_compile.errors import ModelSourceError
from salad_compile.latents import WAN_2_1, open_latents
from salad_compile.latents.encoding.vae import vae_statistics
from tests.salad_compile.latents.encoding import families, world

pytest.importorskip("av")
SIZE = ("--frames", "5", "--height", "32", "--width", "48", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encode")
    world.wan().save_pretrained(place / "wan")
    (place / "wan" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()  # it is not needed
    world.write_clips(place / "clips")
    return place


def run(place: Path, *more: object, clips: object = None, model: object = None) -> int:
    fixed = ["latents", "encode", clips or place / "clips", "--model", model or place / "wan", *SIZE]
    return main([str(word) for word in (*fixed, *more)])


def test_from_clips_to_data(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips").mkdir()
    shutil.copytree(place / "clips", tmp_path / "clips", dirs_exist_ok=True)
    (tmp_path / "clips" / "none.mp4").write_bytes(b"")
    data = tmp_path / "data"
    assert run(place, "--output", data, "--validation-share", 0.3, "--fps", 4, clips=tmp_path / "clips") == 0
    said = capsys.readouterr()
    assert said.out == (
        f"{data}: 3 clips encoded; 1 of them held out in {data}/validation; 1 skipped\n"
        "  none: it has no caption: there is no none.txt beside it\n"
    )
    assert said.err.startswith("salad-compile: WARNING: skipped: none: it has no caption")
    item = open_latents(data)[0]
    assert (tuple(item.latent.shape), item.text.dtype, item.fps) == ((16, 2, 4, 6), torch.bfloat16, 4.0)
    again = ("--output", data, "--validation-share", 0.3, "--fps", 4, "--json", "-q")
    assert run(place, *again, clips=tmp_path / "clips") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["written"], found["kept"], found["held_out"]) == (0, 3, 1)
    assert list(found["skipped"]) == ["none"]


def test_mistakes_are_one_sentence_and_leave_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"

    def said(**options: object) -> str:
        assert run(place, "--output", data, **options) == 2
        assert not data.exists()
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text.removeprefix("salad-compile: error: ")

    (tmp_path / "empty").mkdir()
    assert said(clips=tmp_path / "empty").startswith(f"{tmp_path}/empty holds no video (.mp4, ")
    assert "has no model_index.json" in said(model=tmp_path / "empty")
    assert said(model="no/such/place").startswith("no pipeline at 'no/such/place'")
    other = tmp_path / "other"
    shutil.copytree(place / "wan", other)

    def change(file: str, **values: object) -> None:
        whole = json.loads((place / "wan" / file).read_text())
        (other / file).write_text(json.dumps({**whole, **values}))

    change("transformer/config.json", in_channels=48, out_channels=48)
    assert "has 16 latent channels, and its transformer takes 48 and predicts 48: it is the VAE of another" in said(
        model=other
    )
    change("transformer/config.json", text_dim=4096)
    assert "has width 16, and its transformer takes 4096: it is the text encoder of another" in said(model=other)
    change("transformer/config.json")
    change("vae/config.json", latents_mean=[0.0] * 8)
    assert "the VAE has 16 channels, and its statistics 8 and 16" in said(model=other)
    change("vae/config.json")
    change("model_index.json", text_encoder=["os", "system"])
    assert "takes 'text_encoder' from 'os'" in said(model=other)
    change("model_index.json", _class_name="AutoModel")
    assert "which is not a pipeline of diffusers" in said(model=other)
    change("model_index.json", text_encoder=[None, None])
    assert "has no text_encoder: encoding needs it" in said(model=other)
    change("model_index.json")
    (other / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "cannot be read" in said(model=other)


def test_the_statistics_of_the_models_vae(place: Path, tmp_path: Path) -> None:
    """In the configuration, or among the weights; from the pipeline, from its transformer, from the VAE alone."""
    assert statistics_of(place / "wan") == WAN_2_1
    assert statistics_of(place / "wan" / "transformer") == WAN_2_1
    assert statistics_of(place / "wan" / "vae") == WAN_2_1
    assert statistics_of(place / "clips") is None
    assert statistics_of("owner/name") is None
    ltx = families.build(families.ltx)
    ltx.vae.save_pretrained(tmp_path / "vae")
    found = statistics_of(tmp_path / "vae")
    assert found is not None
    assert found.is_close(vae_statistics(ltx.vae))
    assert found.std[0] == pytest.approx(float(ltx.vae.latents_std[0]) / 1.5)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelSourceError, match="is not a complete safetensors file"):
        statistics_of(tmp_path / "vae")
