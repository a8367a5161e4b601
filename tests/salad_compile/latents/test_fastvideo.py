"""FastVideo's Parquet files: what the trainer would make of them, lazily, and every way in which a row can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from salad_compile.errors import ConfigError, LatentItemError, LatentLayoutError
from salad_compile.latents import WAN_2_1, LatentItem, LatentStatistics, collate, open_latents, write_latents
from salad_compile.latents.fastvideo import FastVideoSource
from salad_compile.latents.statistics import HUNYUAN_VIDEO
from tests.salad_compile.latents.data import (
    fastvideo_row,
    make_item,
    make_items,
    stored_tensor,
    write_fastvideo,
    write_parquet,
)


def test_reads_what_the_trainer_would(tmp_path: Path) -> None:
    items = make_items(5)
    latents = open_latents(write_fastvideo(tmp_path, items))
    assert (latents.layout, latents.normalized, latents.statistics) == ("fastvideo", False, WAN_2_1)
    assert latents.names == ["clip0", "clip2", "clip4", "clip1", "clip3"]  # by file, then by row
    for name, read in zip(latents.names, latents, strict=True):
        item = items[int(name[-1])]
        assert torch.equal(read.latent, WAN_2_1.normalize(WAN_2_1.denormalize(item.latent)))
        assert torch.allclose(read.latent, item.latent, atol=1e-6)  # values up to 4, two roundings to float32
        assert torch.equal(read.text, item.text)  # no padding
        assert (read.caption, read.fps) == (item.caption, 16.0)


def test_as_stored_when_the_user_says_that_it_is_normalised(tmp_path: Path) -> None:
    item = make_item(0)
    write_parquet(tmp_path / "data.parquet", [{**fastvideo_row(item), **stored_tensor("vae_latent", item.latent)}])
    assert torch.equal(open_latents(tmp_path / "data.parquet", normalized=True)[0].latent, item.latent)


def test_rows_are_found_in_any_order_and_in_other_processes(tmp_path: Path) -> None:
    items = make_items(7)
    write_parquet(tmp_path / "data.parquet", [fastvideo_row(item) for item in items], row_group_size=3)
    write_parquet(tmp_path / ".other.parquet.00.partial" / "other.parquet", [fastvideo_row(items[0])])  # being written
    latents = open_latents(tmp_path, sample=0)
    assert len(latents) == 7
    for index in (0, 1, 2, 5, 4, 4, 6, 0, 3):
        assert torch.equal(latents[index].text, items[index].text)
    assert torch.equal(pickle.loads(pickle.dumps(latents))[5].text, items[5].text)


def test_reading_in_order_goes_through_a_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import salad_compile.latents.fastvideo as module

    opened: list[int] = []

    class Counting(module._Cursor):
        def __init__(self, file: Path, group: int) -> None:
            opened.append(group)
            super().__init__(file, group)

    monkeypatch.setattr(module, "_Cursor", Counting)
    write_parquet(tmp_path / "data.parquet", [fastvideo_row(item) for item in make_items(6)], row_group_size=3)
    latents = open_latents(tmp_path, sample=0)
    assert not opened
    assert len(list(latents)) == 6
    assert opened == [0, 1]
    assert [latents[index].name for index in (0, 1)] == ["clip0", "clip1"]
    assert opened == [0, 1, 0]
    monkeypatch.setattr(module.os, "getpid", lambda: -1)  # as in a process that was forked now
    assert latents[2].name == "clip2"
    assert opened == [0, 1, 0, 0]


def test_text_with_a_mask_a_batch_dimension_or_another_dtype(tmp_path: Path) -> None:
    item = make_item(0, length=5)
    full = torch.randn(12, 8)  # padded by something else than zeros, as the mask says
    full[:5] = item.text
    mask = torch.tensor([1] * 5 + [0] * 7)
    half = item.text.bfloat16()
    rows: list[dict[str, Any]] = [
        {**stored_tensor("text_embedding", full), **stored_tensor("text_attention_mask", mask, "int64")},
        {**stored_tensor("text_embedding", item.text[None], "torch.float32")},
        {**stored_tensor("text_embedding", half, "bfloat16")},
        {**stored_tensor("text_embedding", item.text, "bfloat16")},  # float32 in truth, which the trainer reads
    ]
    write_parquet(
        tmp_path / "data.parquet", [{**fastvideo_row(item), **row, "id": f"{i}"} for i, row in enumerate(rows)]
    )
    read = [item.text for item in open_latents(tmp_path, sample=0)]
    assert all(
        torch.equal(text, expected) for text, expected in zip(read, [item.text] * 2 + [half, item.text], strict=True)
    )


def test_images_and_names_that_occur_twice(tmp_path: Path) -> None:
    item = make_item(0)
    image = {**fastvideo_row(item), **stored_tensor("vae_latent", torch.randn(16, 4, 6)), "id": ""}
    write_parquet(tmp_path / "data.parquet", [fastvideo_row(item), fastvideo_row(item), image])
    latents = open_latents(tmp_path, sample=0)
    assert latents.names == ["clip0 (data.parquet, row 0)", "clip0 (data.parquet, row 1)", "data.parquet, row 2"]
    assert latents.shapes[2] == latents[2].latent.shape == (16, 1, 4, 6)


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "bytes": ({"vae_latent_bytes": b"\0" * 100}, "vae_latent has 100 bytes, shape .* needs 3072"),
    "dtype": ({"vae_latent_dtype": "complex64"}, "vae_latent_dtype is 'complex64'"),
    "integers": (
        stored_tensor("vae_latent", torch.ones(16, 2, 4, 6, dtype=torch.int64), "int64"),
        "latent is torch.int64",
    ),
    "nan": (stored_tensor("vae_latent", torch.full((16, 2, 4, 6), float("nan"))), "latent holds NaN"),
    "no text": ({"text_embedding_bytes": b""}, "text_embedding is empty"),
    "empty text": (stored_tensor("text_embedding", torch.zeros(12, 8)), r"text has shape \(0, 8\)"),
    "text with three axes": (
        stored_tensor("text_embedding", torch.ones(2, 12, 8)),
        r"text_embedding has shape \[2, 12, 8\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_named_when_they_are_read(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    rows = [fastvideo_row(item) for item in make_items(3)]
    rows[1].update(change)
    latents = open_latents(write_parquet(tmp_path / "data.parquet", rows), sample=0)
    with pytest.raises(LatentItemError, match=f"clip1: .*{message}"):
        latents[1]
    assert latents[2].name == "clip2"
    skipping = open_latents(tmp_path / "data.parquet", on_error="skip", sample=0)
    assert [item.name for item in skipping] == ["clip0", "clip2", "clip2"]


def test_damage_that_headers_show(tmp_path: Path) -> None:
    rows = [fastvideo_row(item) for item in make_items(4)]
    rows[1].update(stored_tensor("vae_latent", torch.ones(12, 2, 4, 6)))
    rows[2]["vae_latent_shape"] = [16, 4]
    write_parquet(tmp_path / "a.parquet", rows)
    write_parquet(tmp_path / "b.parquet", rows)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(
        LatentItemError, match=r"3 damaged items: clip1: it has 12 channels.*clip2: .*\[16, 4\].*b.parquet"
    ):
        open_latents(tmp_path)
    assert open_latents(tmp_path, on_error="skip", sample=0).names == ["clip0", "clip3"]


def test_other_parquet_files_and_other_channels(tmp_path: Path) -> None:
    row = fastvideo_row(make_item(0))
    write_parquet(tmp_path / "text" / "data.parquet", [{k: v for k, v in row.items() if not k.startswith("vae")}])
    with pytest.raises(
        LatentLayoutError, match="without vae_latent_bytes, vae_latent_shape, vae_latent_dtype; it has id"
    ):
        open_latents(tmp_path / "text")
    few = {**row, **stored_tensor("vae_latent", torch.randn(4, 2, 4, 6))}
    write_parquet(tmp_path / "few.parquet", [few])
    with pytest.raises(ConfigError, match=r"4 channels are: pass statistics="):
        open_latents(tmp_path / "few.parquet")
    statistics = LatentStatistics((0.0,) * 4, (2.0,) * 4)
    assert open_latents(tmp_path / "few.parquet", statistics=statistics, sample=0)[0].latent.shape == (4, 2, 4, 6)
    with pytest.raises(ConfigError, match="4 channels, the statistics 16"):
        open_latents(tmp_path / "few.parquet", statistics=WAN_2_1)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from salad_compile.errors import MissingPackageError

    write_parquet(tmp_path / "data.parquet", [fastvideo_row(make_item(0))])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r'pip install "salad-compile\[train\]"'):
        FastVideoSource(tmp_path)


def test_workers_of_a_dataloader_read_the_same(tmp_path: Path) -> None:
    items = make_items(8)
    write_parquet(tmp_path / "data.parquet", [fastvideo_row(item) for item in items])
    latents = open_latents(tmp_path)
    latents[0]  # leaves a file open in this process, right before what the workers ask for
    loader = DataLoader(latents, batch_size=1, sampler=range(1, 8), num_workers=2, collate_fn=collate)
    for _ in range(2):
        for item, batch in zip(items[1:], loader, strict=True):
            assert batch.names == (item.name,)
            assert torch.equal(batch.text[0], item.text)


def of_hunyuan(folder: Path) -> list[LatentItem]:
    """Rows of HunyuanVideo, which has 16 channels as Wan has."""
    items = make_items(4, shape=(16, 3, 12, 10))
    rows = [fastvideo_row(item) for item in items]
    for row, item in zip(rows, items, strict=True):
        row.update(stored_tensor("vae_latent", HUNYUAN_VIDEO.denormalize(item.latent)))
    write_parquet(folder / "a.parquet", rows)
    return items


def test_sixteen_channels_of_another_vae(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = of_hunyuan(tmp_path)
    open_latents(tmp_path)
    assert "nearer to hunyuanvideo" in caplog.text
    assert "than to the statistics of wan2.1" in caplog.text
    caplog.clear()
    for options in ({"vae": HUNYUAN_VIDEO}, {"statistics": HUNYUAN_VIDEO}):
        data = open_latents(tmp_path, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(data[2].latent, items[2].latent)
    assert not caplog.text
    with pytest.raises(ConfigError, match=r"of another model: .* those of hunyuanvideo .*the model has .*wan2.1"):
        open_latents(tmp_path, vae=WAN_2_1)
    with pytest.raises(ConfigError, match="have 16 channels, and those of the model's VAE 48"):
        open_latents(tmp_path, vae=LatentStatistics((0.0,) * 48, (1.0,) * 48))
    ours = write_latents(items, tmp_path / "ours", statistics=WAN_2_1)
    with pytest.raises(ConfigError, match=r"go with the statistics of wan2.1, and the VAE of the model with .*hunyuan"):
        open_latents(ours, vae=HUNYUAN_VIDEO)


def test_the_pair_of_the_workflow_and_conditions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first frame is stored normalised there, and the latent is not."""
    items = make_items(4)
    frame, feature = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, 3)
    more = {**stored_tensor("first_frame_latent", frame), **stored_tensor("clip_feature", feature)}
    for name, some in (("training_dataset", items[:3]), ("validation_dataset", items[3:])):
        rows = [{**fastvideo_row(item), **more, **stored_tensor("pil_image", frame)} for item in some]
        write_parquet(tmp_path / name / "worker_0" / "data_chunk_0.parquet", rows)
    data = open_latents(tmp_path)
    assert data.names == ["clip0", "clip1", "clip2"]
    assert "not read: pil_image, validation_dataset/, which is a dataset of its own" in caplog.text
    assert torch.equal(data[0].extras["first_frame_latent"], frame[0])
    assert torch.equal(data[0].extras["clip_feature"], feature[0])
    assert open_latents(tmp_path / "validation_dataset").names == ["clip3"]
