"""Our own format: written, appended to, read lazily, and every way in which it can be damaged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from salad_compile.errors import LatentItemError, LatentLayoutError
from salad_compile.latents import WAN_2_1, LatentItem, LatentStatistics, open_latents, write_latents
from tests.salad_compile.latents.data import make_item, make_items, same


def test_round_trip_is_exact(tmp_path: Path) -> None:
    items = [
        *make_items(3),
        replace(make_item(3, (16, 1, 2, 2)), name="with/slash and ümlaut", caption="two\nlines\u2028three", fps=None),
        replace(make_item(4), text=make_item(4).text.bfloat16()),
    ]
    assert write_latents(items, tmp_path / "data", statistics=WAN_2_1) == tmp_path / "data"
    latents = open_latents(tmp_path / "data")
    assert (latents.layout, latents.normalized, latents.statistics) == ("salad", True, WAN_2_1)
    assert latents.names == [item.name for item in items]
    assert latents.shapes == [tuple(item.latent.shape) for item in items]
    assert len(latents) == 5
    assert all(same(item, read) for item, read in zip(items, latents, strict=True))
    again = pickle.loads(pickle.dumps(latents))
    assert same(again[3], items[3])


def test_appending_keeps_what_is_there(tmp_path: Path) -> None:
    items = make_items(4)
    write_latents(items[:2], tmp_path)
    write_latents(iter(items[2:]), tmp_path)
    assert all(same(item, read) for item, read in zip(items, open_latents(tmp_path, sample=0), strict=True))
    with pytest.raises(LatentItemError, match="clip1: an item of this name"):
        write_latents(items[1:2], tmp_path)
    with pytest.raises(LatentLayoutError, match="other statistics"):
        write_latents([make_item(9)], tmp_path, statistics=WAN_2_1)
    assert len(open_latents(tmp_path, sample=0)) == 4


def test_an_interrupted_first_write_says_so_and_can_be_repeated(tmp_path: Path) -> None:
    items = make_items(3)

    def breaking() -> Iterator[LatentItem]:
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_latents(breaking(), tmp_path)
    with pytest.raises(LatentLayoutError, match="never finished"):
        open_latents(tmp_path)
    write_latents(items, tmp_path)
    assert open_latents(tmp_path, sample=0).names == ["clip0", "clip1", "clip2"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.full((16, 1, 2, 2), float("nan"))}, "latent holds NaN"),
        ({"text": torch.full((2, 8), float("inf"))}, "text holds NaN or infinity"),
        ({"latent": torch.ones(16, 2, 2)}, "needs \\(C, T, H, W\\)"),
        ({"latent": torch.ones(16, 1, 2, 2, dtype=torch.int32)}, "int32"),
        ({"text": torch.ones(0, 8)}, "one token"),
        ({"latent": torch.full((16, 1, 2, 2), 1e300, dtype=torch.float64)}, "latent holds NaN or infinity"),
        ({"latent": torch.ones(16, 1, 2, 2, device="meta")}, "a tensor without values"),
        ({"text": numpy.ones((1, 8))}, "'text' is a ndarray"),
        ({"extras": {"clip_feature": [1.0]}}, "'clip_feature' is a list"),
        ({"caption": None}, "its caption is None"),
        ({"caption": "a cat \ud83d"}, "its caption is 'a cat"),
        ({"fps": float("nan")}, "its fps is nan"),
        ({"fps": "16"}, "its fps is '16'"),
    ],
)
def test_unfit_items_are_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(LatentItemError, match=f"clip0: .*{message}"):
        write_latents([replace(make_item(0), **change)], tmp_path)
    assert not list((tmp_path / "items").iterdir())


@pytest.mark.parametrize("item", [3, "clip0", replace(make_item(0), name=3), replace(make_item(0), name="\ud83d")])
def test_what_is_no_item_spoils_no_dataset(tmp_path: Path, item: Any) -> None:
    write_latents(make_items(2), tmp_path)
    with pytest.raises(LatentItemError, match=r"is no LatentItem|is no name of an item"):
        write_latents([make_item(2), item], tmp_path)
    assert open_latents(tmp_path, sample=0).names == ["clip0", "clip1"]
    write_latents([], tmp_path / "none")
    with pytest.raises(LatentItemError, match="there is no item"):
        open_latents(tmp_path / "none")


def test_formats_of_8_bits_are_read_as_float32(tmp_path: Path) -> None:
    item = make_item(0)
    kept = item.latent.to(torch.float8_e4m3fn)
    write_latents([replace(item, latent=kept)], tmp_path)
    assert torch.equal(open_latents(tmp_path, sample=0)[0].latent, kept.float())


def item_file(directory: Path, name: str) -> Path:
    return directory / "items" / f"{name}.safetensors"


def test_truncated_and_missing_files_are_seen_before_reading(tmp_path: Path) -> None:
    write_latents(make_items(4), tmp_path)
    damaged = item_file(tmp_path, "clip1")
    damaged.write_bytes(damaged.read_bytes()[:-10])
    item_file(tmp_path, "clip3").unlink()
    with pytest.raises(LatentItemError, match=r"2 damaged items: clip1: .*bytes.*clip3: .*missing.*on_error='skip'"):
        open_latents(tmp_path)
    assert open_latents(tmp_path, on_error="skip", sample=0).names == ["clip0", "clip2"]


def test_a_flipped_header_is_seen_on_reading(tmp_path: Path) -> None:
    write_latents(make_items(2), tmp_path)
    damaged = item_file(tmp_path, "clip1")
    content = bytearray(damaged.read_bytes())
    content[10] ^= 0xFF
    damaged.write_bytes(content)
    with pytest.raises(LatentItemError, match="clip1: "):
        open_latents(tmp_path, sample=0)[1]


def edit_info(directory: Path, **changes: object) -> None:
    file = directory / "info.json"
    values = json.loads(file.read_text())
    values.pop("digest", None)  # as of a dataset of before
    file.write_text(json.dumps({**values, **changes}))


def test_versions_and_damaged_indexes(tmp_path: Path) -> None:
    write_latents(make_items(2), tmp_path, statistics=LatentStatistics((0.0,) * 16, (2.0,) * 16))
    edit_info(tmp_path, format_version=2)
    with pytest.raises(LatentLayoutError, match=r"version 2; this release reads .* version 1"):
        open_latents(tmp_path)
    edit_info(tmp_path, format_version=1, statistics={"mean": [0.0]})
    with pytest.raises(LatentLayoutError, match=r"info.json is not readable"):
        open_latents(tmp_path)
    edit_info(tmp_path, statistics=None)
    index = tmp_path / "items.jsonl"
    index.write_text(index.read_text() + '{"name": "clip2"}\n')
    with pytest.raises(LatentLayoutError, match="line 3"):
        open_latents(tmp_path)
    index.write_text(index.read_text().splitlines()[0][:20])
    with pytest.raises(LatentLayoutError, match="line 1"):
        open_latents(tmp_path)
