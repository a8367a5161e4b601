"""Conversions: values come through, interrupted runs go on, and damaged items are named."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from salad_compile.common import files
from salad_compile.errors import ConfigError, LatentItemError, WriteError
from salad_compile.latents import (
    WAN_2_1,
    LatentItem,
    convert_latents,
    converting,
    open_latents,
    write_latents,
)
from salad_compile.latents.layouts import Writable
from tests.salad_compile.latents.data import (
    fastvideo_row,
    make_item,
    make_items,
    same,
    stored_tensor,
    write_fastvideo,
    write_finetrainers,
    write_musubi,
    write_parquet,
)
from tests.salad_compile.latents.test_opening import spoil


@pytest.mark.parametrize("write", [write_fastvideo, write_musubi, write_finetrainers])
def test_into_our_own_is_what_reading_gives(tmp_path: Path, write: Callable[[Path, list[LatentItem]], Path]) -> None:
    source = open_latents(write(tmp_path / "source", make_items(5)))
    report = convert_latents(tmp_path / "source", tmp_path / "goal", progress=False)
    goal = open_latents(tmp_path / "goal")
    assert (report.path, report.written, report.kept, report.skipped) == (tmp_path / "goal", 5, 0, ())
    assert all(same(one, other) for one, other in zip(source, goal, strict=True))
    assert (goal.layout, goal.statistics) == ("salad", WAN_2_1)


def odd_items() -> list[LatentItem]:
    return [
        *make_items(3),
        replace(make_item(3, (16, 1, 2, 2)), name="with/slash", caption="zwei\nZeilen", fps=None),
        replace(make_item(4), name="clip0_00000-005"),  # as musubi-tuner calls clips of clip0
    ]


def test_to_musubi_and_back_is_exact(tmp_path: Path) -> None:
    items = odd_items()
    items[1] = replace(items[1], text=items[1].text.bfloat16())
    write_latents(items, tmp_path / "a", statistics=WAN_2_1)
    convert_latents(tmp_path / "a", tmp_path / "b", to="musubi", progress=False)
    assert not list((tmp_path / "b").glob("*.jsonl"))
    convert_latents(tmp_path / "b", tmp_path / "c", progress=False)
    there = {item.name: item for item in open_latents(tmp_path / "c", sample=0)}
    assert len(there) == len(items)
    assert all(same(item, there[item.name]) for item in items)


def test_to_fastvideo_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "_ROWS_PER_FILE", 2)
    items = odd_items()
    write_latents(items, tmp_path / "a", statistics=WAN_2_1)
    convert_latents(tmp_path / "a", tmp_path / "b", to="fastvideo", progress=False)
    files = sorted((tmp_path / "b").rglob("*.parquet"))
    assert [file.relative_to(tmp_path / "b").as_posix() for file in files] == [
        f"combined_parquet_dataset/worker_0/data_chunk_{number:06d}.parquet" for number in range(3)
    ]
    row = pyarrow.parquet.read_table(files[0]).to_pylist()[1]
    ours = stored_tensor("vae_latent", WAN_2_1.denormalize(items[1].latent))
    assert {key: row[key] for key in ours} == ours
    assert set(fastvideo_row(items[1])) == set(row)
    convert_latents(tmp_path / "b", tmp_path / "c", progress=False)
    back = list(open_latents(tmp_path / "c", sample=0))
    for item, read in zip(items, back, strict=True):
        assert same(read, replace(item, latent=read.latent))
        assert torch.equal(read.latent, WAN_2_1.normalize(WAN_2_1.denormalize(item.latent)))


def test_chunks_past_ten_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "_ROWS_PER_FILE", 1)
    write_latents(make_items(12), tmp_path / "a", statistics=WAN_2_1)
    convert_latents(tmp_path / "a", tmp_path / "b", to="fastvideo", progress=False)
    assert open_latents(tmp_path / "b", sample=0).names == [f"clip{number}" for number in range(12)]


@pytest.mark.parametrize("to", ["salad", "musubi", "fastvideo"])
def test_items_that_were_made_anew_are_not_taken_for_those_of_before(tmp_path: Path, to: Writable) -> None:
    """Of the same names and shapes, as after captions were mended and encoded again."""
    source, goal = tmp_path / "source", tmp_path / "goal"
    write_musubi(source, make_items(2))
    convert_latents(source, goal, to=to, progress=False)
    assert convert_latents(source, goal, to=to, progress=False).kept == 2
    write_musubi(source, [replace(item, text=item.text + 1) for item in make_items(2)])
    with pytest.raises(ConfigError, match=r"holds another conversion.*files that have changed since"):
        convert_latents(source, goal, to=to, progress=False)


def test_a_conversion_that_an_earlier_release_began_goes_on(tmp_path: Path) -> None:
    write_musubi(tmp_path / "source", make_items(2))
    convert_latents(tmp_path / "source", tmp_path / "goal", progress=False)
    note = tmp_path / "goal" / converting.PLAN
    plan = json.loads(note.read_text())
    del plan["files_sha256"]
    note.write_text(json.dumps(plan, indent=1))
    assert convert_latents(tmp_path / "source", tmp_path / "goal", progress=False).kept == 2


def run_and_be_killed(source: Path, goal: Path, to: str, file: int) -> None:
    """Convert, and stop for good when the `file`-th file is on the disk and does not have its name yet."""
    flushed: list[Path] = []
    flush = files.flush_to_disk

    def killing(path: Path) -> None:
        flushed.extend([path] * path.parent.name.endswith(".partial"))
        if len(flushed) == file:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    files.flush_to_disk = killing
    convert_latents(source, goal, to=to, progress=False)


# Files are, in order: the plan; info.json (salad); one per item (salad), two (musubi), one per two items (fastvideo).
@pytest.mark.parametrize(("to", "file"), [("salad", 7), ("musubi", 11), ("fastvideo", 4)])
def test_goes_on_after_a_kill(tmp_path: Path, to: str, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "_ROWS_PER_FILE", 2)
    write_musubi(tmp_path / "source", make_items(7))
    killed = multiprocessing.get_context("fork").Process(
        target=run_and_be_killed, args=(tmp_path / "source", tmp_path / "goal", to, file)
    )
    killed.start()
    killed.join(timeout=600)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "goal").rglob("*.partial"))) == 1
    there = [file for file in (tmp_path / "goal").rglob("[!.]*") if file.is_file() and "clip4" not in file.name]
    there = [file for file in there if not file.parent.name.endswith(".partial")]
    finished = {file: file.stat().st_mtime_ns for file in there}
    report = convert_latents(tmp_path / "source", tmp_path / "goal", to=to, progress=False)
    assert (report.written, report.kept) == (3, 4)
    assert not list((tmp_path / "goal").rglob("*.partial"))
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())
    convert_latents(tmp_path / "source", tmp_path / "once", to=to, progress=False)
    one, other = (open_latents(tmp_path / name, sample=0) for name in ("goal", "once"))
    assert one.names == other.names
    assert len(one) == 7
    assert all(same(left, right) for left, right in zip(one, other, strict=True))
    again = convert_latents(tmp_path / "source", tmp_path / "goal", to=to, progress=False)
    assert (again.written, again.kept) == (0, 7)


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    write_musubi(tmp_path / "source", make_items(3))
    save = safetensors.torch.save_file
    calls: list[Path] = []

    def full(tensors: Any, file: Path, metadata: Any = None) -> None:
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, file, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(WriteError, match=r"clip1_00000-005.safetensors could not be written.*No space left"):
        convert_latents(tmp_path / "source", tmp_path / "goal", progress=False)
    assert len(list((tmp_path / "goal" / "items").iterdir())) == 1
    assert convert_latents(tmp_path / "source", tmp_path / "goal", progress=False).kept == 1


def test_damaged_items_stop_it_or_are_left_out(tmp_path: Path) -> None:
    write_latents(make_items(5), tmp_path / "a", statistics=WAN_2_1)
    spoil(tmp_path / "a", "clip1")
    (tmp_path / "a" / "items" / "clip3.safetensors").unlink()
    with pytest.raises(LatentItemError, match="clip3"):
        convert_latents(tmp_path / "a", tmp_path / "b", progress=False)
    for to in ("salad", "musubi", "fastvideo"):
        report = convert_latents(tmp_path / "a", tmp_path / to, to=to, on_error="skip", progress=False)
        assert report.written == 3
        assert {problem.name for problem in report.skipped} == {"clip1", "clip3"}
        assert str(report.skipped[1]) == "clip1: the latent holds NaN or infinity"
        assert open_latents(tmp_path / to, sample=0).names == ["clip0", "clip2", "clip4"]
    spoil(tmp_path / "salad", "clip0")
    write_parquet(tmp_path / "p" / "x.parquet", [{**fastvideo_row(make_item(0)), "vae_latent_bytes": b"1"}])
    with pytest.raises(LatentItemError, match="no good item"):
        convert_latents(tmp_path / "p", tmp_path / "q", on_error="skip", progress=False)


def test_destinations_that_are_refused(tmp_path: Path) -> None:
    source = write_latents(make_items(2), tmp_path / "source")
    with pytest.raises(ConfigError, match=r"got 'muusubi'. Did you mean 'musubi'"):
        convert_latents(source, tmp_path / "goal", to="muusubi")
    with pytest.raises(ConfigError, match="pass statistics="):
        convert_latents(source, tmp_path / "goal", to="fastvideo")
    for near in (source, source / "below", tmp_path):
        with pytest.raises(ConfigError, match="must not contain each other"):
            convert_latents(source, near)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        convert_latents(source, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        convert_latents(source, tmp_path / "full")
    with pytest.raises(WriteError, match="could not be written"):
        convert_latents(source, tmp_path / "file" / "below")
    assert not (tmp_path / "goal").exists()
    convert_latents(source, tmp_path / "goal", progress=False)
    write_latents([make_item(2)], source)
    with pytest.raises(ConfigError, match="holds another conversion"):
        convert_latents(source, tmp_path / "goal")


def test_conditions_are_kept_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extras = {"clip_feature": torch.randn(5, 3), "f_indices": torch.tensor([0, 2])}
    write_latents([replace(item, extras=extras) for item in make_items(2)], tmp_path / "ours", statistics=WAN_2_1)
    convert_latents(tmp_path / "ours", tmp_path / "again", progress=False)
    assert not caplog.text
    found = open_latents(tmp_path / "again")[1].extras
    assert all(torch.equal(found[name], tensor) for name, tensor in extras.items())
    convert_latents(tmp_path / "ours", tmp_path / "musubi", to="musubi", progress=False)
    assert "layout musubi has no place for it: clip_feature, f_indices" in caplog.text
