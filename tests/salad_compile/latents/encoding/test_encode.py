"""From videos to data: what is in it, what is skipped, what a later run does."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from salad_compile.common import files
from salad_compile.errors import ConfigError, LatentItemError, LatentLayoutError
from salad_compile.latents import WAN_2_1, open_latents
from salad_compile.latents.encoding import encode as module
from salad_compile.latents.encoding.decoding import read_frames
from salad_compile.latents.encoding.finding import find_clips
from salad_compile.latents.encoding.pipeline import PipelineEncoder
from tests.salad_compile.latents.encoding import world

pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.write_clips(tmp_path_factory.mktemp("clips"))


def test_an_item_is_what_the_pipeline_makes_of_its_clip(folder: Path, tmp_path: Path) -> None:
    report = world.encode(folder, tmp_path / "data")
    assert (report.written, report.kept, report.skipped) == (3, 0, ())
    data = open_latents(tmp_path / "data")
    assert data.names == ["birds/one", "cat", "dog"]
    assert data.statistics == WAN_2_1
    pipe, clip = world.wan(), find_clips(folder).clips[1]
    pixels = read_frames(clip, world.SIZE, 16).pixels
    latents = world.mode_of(pipe.vae, world.as_video(pixels))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (WAN_2_1.mean, WAN_2_1.std))
    torch.testing.assert_close(data[1].latent, ((latents - mean) / std)[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        text = pipe.encode_prompt("a cat walks on the grass", None, False, max_sequence_length=512)[0]
    assert text.shape[1] == 512
    length = len(data[1].text)
    assert torch.equal(data[1].text, text[0, :length])
    assert not text[0, length:].any()
    assert (data[1].caption, data[1].fps) == ("a cat walks on the grass", 8.0)
    info = json.loads((tmp_path / "data" / "info.json").read_text())
    assert (info["encoded"]["pipeline"], info["encoded"]["frames"]) == ("WanPipeline", [5])


def test_a_later_run_encodes_what_is_new_or_changed(tmp_path: Path) -> None:
    clips, data = world.write_clips(tmp_path / "clips"), tmp_path / "data"
    world.encode(clips, data)
    before = {item.name: item for item in open_latents(data)}
    world.write_clips(clips, ["new.mp4"])
    (clips / "cat.txt").write_text("a dog sleeps")
    (clips / "dog.mp4").unlink()
    report = world.encode(clips, data)
    assert (report.written, report.kept) == (2, 1)
    after = open_latents(data)
    assert after.names == ["birds/one", "cat", "new"]
    assert after[1].caption == "a dog sleeps"
    assert not torch.equal(after[1].text[:2], before["cat"].text[:2])
    assert torch.equal(after[1].latent, before["cat"].latent)
    with pytest.raises(ConfigError, match=r"encoded with height 32, and not 64: write to another directory"):
        world.encode(clips, data, size=replace(world.SIZE, height=64))
    with pytest.raises(ConfigError, match=r"encoded with vae .AutoencoderKLWan \w+., and not .AutoencoderKLWan"):
        world.encode(clips, data, world.wan(seed=1))


def encode_and_be_killed(clips: Path, data: Path) -> None:
    """Encode, and stop for good while the second clip is written."""
    flush, flushed = files.flush_to_disk, list[Path]()

    def killing(path: Path) -> None:
        flushed.extend([path] * path.name.endswith(".safetensors"))
        if len(flushed) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    files.flush_to_disk = killing
    world.encode(clips, data)


def test_a_kill_loses_the_clip_at_hand(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    world.wan()
    killed = multiprocessing.get_context("fork").Process(target=encode_and_be_killed, args=(folder, data))
    killed.start()
    killed.join(timeout=120)
    assert killed.exitcode == -signal.SIGKILL
    with pytest.raises(LatentLayoutError, match=r"was never finished: .*Run what wrote it again"):
        open_latents(data)
    (first,) = [file for file in data.rglob("items/*.safetensors") if not file.name.startswith(".")]
    time = first.stat().st_mtime_ns
    report = world.encode(folder, data)
    assert (report.written, report.kept, first.stat().st_mtime_ns) == (2, 1, time)
    assert len(open_latents(data)) == 3
    assert not list(data.rglob("*.partial"))


def test_clips_that_cannot_be_encoded_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips = world.write_clips(tmp_path / "clips")
    world.write_clips(clips, ["short.mp4"], frames=3)
    (clips / "broken.mp4").write_bytes(b"no video" * 100)
    (clips / "broken.txt").write_text("a cat")
    (clips / "dog.txt").write_text(" \n")
    (clips / "cat.txt").write_text("a cat walks on the grass " * 100)
    report = world.encode(clips, tmp_path / "data")
    reasons = {problem.name: problem.reason for problem in report.skipped}
    assert reasons == {
        "dog": "its caption dog.txt is empty",
        "short": "it has 3 frames, 5 are asked for",
        "broken": "it cannot be decoded: Invalid data found when processing input",
    }
    assert open_latents(tmp_path / "data").names == ["birds/one", "cat"]
    assert all(f"skipped: {name}" in caplog.text for name in reasons)
    assert "1 caption too long for the text encoder of WanPipeline, and the end is cut off: cat first" in caplog.text


def test_without_a_clip_nothing_is_left_and_other_settings_may_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, data = world.write_clips(tmp_path / "clips"), tmp_path / "data"
    with pytest.raises(LatentItemError, match=r"no clip of .* could be encoded"):
        world.encode(clips, data, size=replace(world.SIZE, frames=(101,)), validation_share=0.4)
    assert not data.exists()

    data.mkdir()  # by somebody else: it stays
    with monkeypatch.context() as patch:
        patch.setattr(PipelineEncoder, "encode", lambda *_: raise_(torch.OutOfMemoryError("none left")))
        with pytest.raises(ConfigError, match=r"memory runs out at .*: choose fewer frames"):
            world.encode(clips, data)
    assert not list(data.iterdir())

    with monkeypatch.context() as patch:  # killed: it cannot clean up
        patch.setattr(module, "_leave_no_traces", lambda goal: None)
        patch.setattr(PipelineEncoder, "encode", lambda *_: raise_(SystemExit()))
        with pytest.raises(SystemExit):
            world.encode(clips, data)
    assert (data / "salad_encoding.json").exists()
    assert world.encode(clips, data, size=replace(world.SIZE, frames=(1,))).written == 3


def raise_(error: BaseException) -> None:
    raise error


def test_a_part_is_held_out_and_stays_there(tmp_path: Path) -> None:
    names = [f"clip{number}.mp4" for number in range(4)]
    clips, data = world.write_clips(tmp_path / "clips", names), tmp_path / "data"
    report = world.encode(clips, data, validation_share=0.3)
    assert report.validation == data / "validation"
    assert (report.written, report.held_out) == (4, 1)
    training, held_out = open_latents(data).names, open_latents(data / "validation").names
    assert sorted(training + held_out) == [f"clip{number}" for number in range(4)]
    world.write_clips(clips, [f"more{number}.mp4" for number in range(3)])
    world.encode(clips, data, validation_share=0.3)
    assert set(training) <= set(open_latents(data).names)
    later = open_latents(data / "validation").names
    assert set(held_out) <= set(later)
    assert len(later) == 2
    with pytest.raises(ConfigError, match=r"validation_share 0.3, and not 0.5"):
        world.encode(clips, data, validation_share=0.5)


def test_directories_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty, and no earlier encoding"):
        world.encode(folder, tmp_path / "full")
    with pytest.raises(ConfigError, match="must not contain each other"):
        world.encode(folder, folder / "data")
    with pytest.raises(ConfigError, match=r"the validation share is in \[0, 1\)"):
        world.encode(folder, tmp_path / "data", validation_share=1.0)
    assert not (tmp_path / "data").exists()


def test_memory_that_runs_out_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module.PipelineEncoder, "encode", encode)
    with pytest.raises(ConfigError, match=r"memory runs out at birds/one.*choose fewer frames"):
        world.encode(folder, tmp_path / "data")
