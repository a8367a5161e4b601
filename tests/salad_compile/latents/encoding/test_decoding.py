"""Frames of real files: formats, rates, sizes, damage."""

from __future__ import annotations

import contextlib
import os
import random
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from salad_compile.errors import LatentItemError, MissingPackageError
from salad_compile.latents.encoding.decoding import read_frames
from salad_compile.latents.encoding.finding import Clip
from salad_compile.latents.encoding.sizes import ClipSize
from tests.salad_compile.latents.encoding import world

pytest.importorskip("av")
PLAIN = ClipSize((9,), 40, 64)


def read(path: Path, size: ClipSize) -> torch.Tensor:
    return read_frames(Clip("clip", path, ""), size, 16).pixels


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_every_format_gives_the_frames_that_were_written(tmp_path: Path, name: str) -> None:
    source = world.moving(9)
    frames = read_frames(Clip("clip", world.write_video(tmp_path / name, source), ""), PLAIN, 16)
    assert frames.fps == pytest.approx(8.0, rel=0.05)  # a gif counts in hundredths of a second
    difference = frames.pixels.float() - torch.from_numpy(source).permute(0, 3, 1, 2)
    assert difference.abs().mean() < (22 if name == "a.gif" else 6)  # a gif of 256 fixed colours
    # the square is where it was, so that no frame stands for another
    assert frames.pixels[3, :, 8:12, 8:12].float().mean() > 240
    assert frames.pixels[3, 2, 30:, 20:].float().mean() < 90


def test_images_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    source = world.moving(11)
    folder = world.write_images(tmp_path / "clip", source)
    found = read(folder, replace(PLAIN, frames=(11,)))
    assert torch.equal(found, torch.from_numpy(source).permute(0, 3, 1, 2))
    assert read_frames(Clip("clip", folder, ""), PLAIN, 16).fps is None
    assert read_frames(Clip("clip", folder, ""), replace(PLAIN, fps=12.0), 16).fps == 12.0
    Image.fromarray(source[2, :16]).save(folder / "frame2.png")
    with pytest.raises(LatentItemError, match=r"clip: its images have several sizes: frame2.png is \d+ x 16, and the"):
        read(folder, PLAIN)
    (folder / "frame2.png").write_bytes(b"\x89PNG")
    with pytest.raises(LatentItemError, match=r"clip: frame2.png cannot be decoded"):
        read(folder, PLAIN)


@pytest.mark.parametrize(("fps", "expected"), [(4.0, [0, 2, 4, 6, 8]), (16.0, [0, 0, 1, 1, 2]), (6.0, [0, 1, 2, 4, 5])])
def test_another_rate_takes_what_is_shown_at_its_times(tmp_path: Path, fps: float, expected: list[int]) -> None:
    file = world.write_video(tmp_path / "a.mp4", world.moving(9))
    every = read(file, PLAIN)
    assert torch.equal(read(file, replace(PLAIN, frames=(5,), fps=fps)), every[expected])


def test_scaled_to_cover_and_cut_at_the_middle(tmp_path: Path) -> None:
    source = world.moving(1, 40, 80)
    folder = world.write_images(tmp_path / "clip", source)
    cut = read(folder, ClipSize((1,), 40, 40))
    assert torch.equal(cut, torch.from_numpy(source[:, :, 20:60]).permute(0, 3, 1, 2))
    small = read(folder, ClipSize((1,), 20, 32))
    assert small.shape == (1, 3, 20, 32)
    red = small[0, 0, -1].float()  # a gradient from left to right: its ends are cut off alike
    assert red[0] == pytest.approx(255 * 8 / 80, abs=6)
    assert red[-1] == pytest.approx(255 * 71 / 80, abs=6)
    buckets = ClipSize((1,), 64, 64, buckets=True)
    assert read(folder, buckets).shape == (1, 3, 48, 80)


def test_the_longest_length_that_a_clip_has(tmp_path: Path) -> None:
    file = world.write_video(tmp_path / "a.mp4", world.moving(9))
    assert len(read(file, replace(PLAIN, frames=(5, 1, 13)))) == 5
    with pytest.raises(LatentItemError, match="clip: it has 5 frames at 4 frames per second, 9 are asked for"):
        read(file, replace(PLAIN, fps=4.0))


def test_damaged_files(tmp_path: Path) -> None:
    whole = world.write_video(tmp_path / "a.mp4", world.moving(30, 96, 96))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("cut.mp4", "empty.mp4"):
        with pytest.raises(LatentItemError, match=r"^clip: it cannot be decoded: "):
            read(tmp_path / name, PLAIN)


def test_no_damage_of_a_file_ends_the_encoding(tmp_path: Path) -> None:
    """PyAV has errors of its own, and a file may ask for a decoder or for a size that nobody has."""
    whole = world.write_video(tmp_path / "a.mp4", world.moving(9)).read_bytes()
    sizes = [found.start() for found in re.finditer(re.escape(struct.pack(">2H", 64, 40)), whole)]
    wide = bytearray(whole)
    for place in sizes:
        wide[place : place + 4] = struct.pack(">2H", 65535, 65535)
    damaged = {
        "codec": whole.replace(b"avc1", b"????"),
        "size": bytes(wide).replace(b"avc1", b"png "),
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(LatentItemError, match=r"^clip: it cannot be decoded: "):
            read(tmp_path / f"{name}.mp4", PLAIN)
    draw = random.Random(0)
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(4):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "b.mp4").write_bytes(content)
        with contextlib.suppress(LatentItemError):
            read(tmp_path / "b.mp4", PLAIN)


def test_what_ffmpeg_guessed_is_no_frame_of_a_clip(tmp_path: Path) -> None:
    """Damage in the middle of a file: frames that FFmpeg marks as guessed were taken for those of the clip."""
    av = pytest.importorskip("av")
    whole = world.write_video(tmp_path / "a.mp4", world.moving(40, 96, 96)).read_bytes()
    refused, damaged = 0, tmp_path / "b.mp4"
    for seed in range(30):
        draw, content = random.Random(seed), bytearray(whole)
        start = draw.randrange(len(content) // 3, 2 * len(content) // 3)
        content[start : start + 20] = draw.randbytes(20)
        damaged.write_bytes(content)
        marked: list[bool] = []
        with contextlib.suppress(av.error.FFmpegError), av.open(str(damaged)) as container:
            marked += (frame.is_corrupt for frame in container.decode(video=0))
        if any(marked):
            refused += 1
            with pytest.raises(LatentItemError, match=f"its frame {marked.index(True) + 1} is damaged"):
                read(damaged, ClipSize((len(marked),), 96, 96))
    assert refused


def test_pixels_of_no_shape_are_not_scaled(tmp_path: Path) -> None:
    folder = world.write_images(tmp_path / "clip", world.moving(1, 2, 4000))
    assert read(folder, ClipSize((1,), 40, 64)).shape == (1, 3, 40, 64)
    with pytest.raises(
        LatentItemError, match="clip: it cannot be cut to this size: it says that it has 4000 x 2 pixels"
    ):
        read(folder, ClipSize((1,), 480, 832))


def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path) -> None:
    folder = world.write_images(tmp_path / "clip", world.moving(1))
    os.mkfifo(folder / "frame1.png")
    with pytest.raises(LatentItemError, match=r"^clip: frame1\.png cannot be decoded: it is a device, a pipe"):
        read(folder, ClipSize((2,), 40, 64))


def test_images_are_as_a_viewer_shows_them(tmp_path: Path) -> None:
    """Phones write photographs lying, with a note of how to turn them; 16 bits of gray have no end at 255."""
    (tmp_path / "turned").mkdir()
    picture = numpy.zeros((32, 48, 3), numpy.uint8)
    picture[:16, :16] = 255
    note = Image.Exif()
    note[0x0112] = 6  # to be turned clockwise
    Image.fromarray(picture).save(tmp_path / "turned" / "0.png", exif=note)
    found = read(tmp_path / "turned", ClipSize((1,), 48, 32))
    assert torch.equal(found[0], torch.from_numpy(numpy.rot90(picture, -1).copy()).permute(2, 0, 1))
    (tmp_path / "deep").mkdir()
    gray = numpy.arange(40 * 64, dtype=numpy.uint16).reshape(40, 64) * 25
    Image.fromarray(gray).save(tmp_path / "deep" / "0.png")
    assert torch.equal(
        read(tmp_path / "deep", ClipSize((1,), 40, 64))[0, 1], torch.from_numpy((gray >> 8).astype("u1"))
    )


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r'pip install "salad-compile\[clips\]"'):
        read(tmp_path / "a.mp4", PLAIN)
