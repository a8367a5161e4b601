"""Which layout a path has, what is said about damaged items, and what is substituted for them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from salad_compile.errors import ConfigError, LatentItemError, LatentLayoutError
from salad_compile.latents import WAN_2_1, LatentItem, open_latents, write_latents
from salad_compile.latents.layouts import LAYOUTS, WRITABLE, Readable, Writable
from tests.salad_compile.latents.data import (
    SHAPE,
    make_item,
    make_items,
    same,
    write_fastvideo,
    write_finetrainers,
    write_musubi,
)

Writer = Callable[[Path, list[LatentItem]], Path]
WRITERS: dict[str, Writer] = {
    "salad": lambda path, items: write_latents(items, path),
    "fastvideo": write_fastvideo,
    "musubi": write_musubi,
    "finetrainers": write_finetrainers,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_layout_is_found_or_asked_for(tmp_path: Path, layout: str) -> None:
    WRITERS[layout](tmp_path, make_items(2))
    assert open_latents(tmp_path).layout == layout
    assert open_latents(str(tmp_path), layout=layout).layout == layout
    other = next(name for name in WRITERS if name != layout)
    with pytest.raises(LatentLayoutError, match=f"layout={other!r} was asked for"):
        open_latents(tmp_path, layout=other)


def test_unknown_layouts_say_what_was_seen(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_latents(tmp_path / "nowhere")
    with pytest.raises(
        LatentLayoutError, match=r"is empty. Supported: salad .*; fastvideo .*; musubi .*; finetrainers"
    ):
        open_latents(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(
        LatentLayoutError,
        match=r"it holds 1 x \.mp4, the first 'a.mp4': videos, of which `salad-compile latents encode`",
    ):
        open_latents(tmp_path)
    with pytest.raises(LatentLayoutError, match=r"a single file of kind \.mp4"):
        open_latents(tmp_path / "a.mp4")
    with pytest.raises(ConfigError, match=r"got 'musubi-tuner'. Did you mean 'musubi'"):
        open_latents(tmp_path, layout="musubi-tuner")
    write_latents([make_item(0)], tmp_path)
    with pytest.raises(ConfigError, match="got 'ignore'"):
        open_latents(tmp_path, on_error="ignore")
    write_musubi(tmp_path, [make_item(0)])
    with pytest.raises(LatentLayoutError, match=r"more than one layout \(salad, musubi\): pass layout="):
        open_latents(tmp_path)


def spoil(directory: Path, name: str) -> None:
    """NaN in the middle of a file of ours: nothing but reading it shows that."""
    file = directory / "items" / f"{name}.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    tensors["latent"][3, 0, 1, 1] = float("nan")
    save_file(tensors, file, metadata=metadata)


def test_what_only_reading_shows_is_replaced_by_the_next_of_the_same_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = (16, 1, 2, 3)
    items = [make_item(n, small if n in (2, 4) else SHAPE) for n in range(6)]
    write_latents(items, tmp_path)
    for name in ("clip1", "clip4", "clip5"):
        spoil(tmp_path, name)
    with pytest.raises(LatentItemError, match=r"3 damaged items: clip1: the latent holds NaN.*clip4.*clip5"):
        open_latents(tmp_path)
    latents = open_latents(tmp_path, on_error="skip")
    expected = [0, 3, 2, 3, 2, 0]  # of the same shape, and round the end
    with caplog.at_level(logging.WARNING, "salad_compile"):
        for _ in range(2):
            assert all(same(item, items[index]) for item, index in zip(latents, expected, strict=True))
    assert [item.latent.shape for item in latents] == [torch.Size(shape) for shape in latents.shapes]
    said = [record.getMessage() for record in caplog.records if "takes its place" in record.getMessage()]
    assert len(said) == 3
    assert said[0].startswith("damaged: clip1: the latent holds NaN or infinity. clip3 takes its place")
    assert latents[5].name == "clip0"
    again = open_latents(tmp_path, on_error="skip", sample=0)
    assert [again[index].name for index in reversed(range(6))] == [items[index].name for index in reversed(expected)]


def test_no_good_item_at_all(tmp_path: Path) -> None:
    write_latents([make_item(0), make_item(1, (16, 1, 2, 3))], tmp_path)
    spoil(tmp_path, "clip0")
    with pytest.raises(LatentItemError, match="no other item of shape"):
        open_latents(tmp_path, on_error="skip")[0]
    for file in (tmp_path / "items").iterdir():
        file.unlink()
    with pytest.raises(LatentItemError, match=r"none of 2 items is good\. 2 damaged items"):
        open_latents(tmp_path, on_error="skip")


def test_left_out_items_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = [replace(item, latent=item.latent[: 12 if n == 1 else 16]) for n, item in enumerate(make_items(4))]
    write_latents(items, tmp_path)
    with caplog.at_level(logging.WARNING, "salad_compile"):
        latents = open_latents(tmp_path, on_error="skip")
    assert [record.getMessage() for record in caplog.records] == [
        "1 damaged item: clip1: it has 12 channels, most items have 16. They are left out."
    ]
    assert latents.names == ["clip0", "clip2", "clip3"]
    with pytest.raises(IndexError):
        latents[3]


@pytest.mark.parametrize(
    ("layout", "normalized", "message"),
    [
        ("salad", None, None),
        ("fastvideo", None, None),
        ("finetrainers", None, None),
        ("musubi", False, "normalised twice (pass normalized=True)"),
        ("fastvideo", True, "not normalised (pass normalized=False)"),
    ],
)
def test_wrong_normalisation_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str, normalized: bool | None, message: str | None
) -> None:
    WRITERS[layout](tmp_path, make_items(8, shape=(16, 4, 16, 16)))
    with caplog.at_level(logging.WARNING, "salad_compile"):
        open_latents(tmp_path, normalized=normalized)
        open_latents(tmp_path, normalized=normalized, sample=0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


def test_statistics_of_the_user_win(tmp_path: Path) -> None:
    item = make_item(0)
    write_fastvideo(tmp_path, [item], files=1)
    half = replace(WAN_2_1, std=tuple(2 * value for value in WAN_2_1.std))
    read = open_latents(tmp_path, statistics=half, sample=0)[0]
    assert torch.allclose(read.latent, item.latent / 2, atol=1e-6)  # values up to 4, two roundings to float32


def test_importing_the_package_is_light() -> None:
    code = "import sys, salad_compile.latents, salad_compile.command_line.latents; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_know_the_layouts() -> None:
    assert get_args(Readable) == tuple(LAYOUTS)
    assert get_args(Writable) == WRITABLE
