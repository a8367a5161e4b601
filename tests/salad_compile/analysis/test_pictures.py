"""Pictures: every file there and readable, what they show is what was computed, the page needs nothing else."""

from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.analysis import pictures
from salad_compile.analysis.pictures import save_pictures
from salad_compile.errors import InputsError, MissingPackageError, NotConvertedError
from tests import toys
from tests.models.registry import ALL_CASES
from tests.salad_compile.analysis.test_site_call import (
    CALLS,
    calls_of,
    computed_pairs,
    converted,
    inputs_of,
    positions,
)
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects tags and the images that are inlined."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "src":
                assert value is not None
                kind, _, data = value.partition(",")
                assert kind == "data:image/png;base64"
                self.images.append(base64.b64decode(data))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def size(png: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(BytesIO(png)) as image:
        image.load()
        width, height = image.size
    return width, height


@pytest.mark.parametrize(("name", "changes"), CALLS[:4], ids=["topk", "stswa", "joint", "masked"])
def test_every_file_is_there_and_the_page_holds_them_all(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = converted(name, **changes)
    before = fingerprint(model)
    page = save_pictures(model, [inputs_of(name), inputs_of(name, 1)], tmp_path / "new" / "folder")
    assert_unchanged(model, before)
    sites = ALL_CASES[name].sites
    files = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    assert files.keys() == {"index.html", "recall.png", "gate.png", *(f"masks_{site}.png" for site in sites)}
    images = [content for file, content in files.items() if file.endswith(".png")]
    assert all(content.startswith(PNG) and min(size(content)) > 100 for content in images)
    read = Page(page.read_text())
    assert not read.open
    assert sorted(read.images) == sorted(images)
    text = page.read_text()
    assert not re.search(r"https?:|<script|<link|@import", text)
    assert all(site in text for site in sites)
    assert {"table", "details", "figure"} <= set(read.tags)


@pytest.mark.parametrize(("name", "changes"), CALLS, ids=["topk", "stswa", "joint", "masked", "prefix"])
def test_masks_are_the_pairs_that_are_computed(name: str, changes: dict[str, Any]) -> None:
    call = calls_of(converted(name, **changes), inputs_of(name))[0]
    temporal = call.given.branch.get("temporal_heads")
    view, pairs = pictures._view(call), computed_pairs(call, call.sparse(), temporal)[0]
    for head in range(pairs.shape[0]):
        at = positions(call, head, temporal)
        blocks = view.mask[head][at // call.spec.query_block][:, at // call.spec.key_block]
        assert torch.equal(blocks, pairs[head])
    assert view.labels == (() if temporal is None else ("in space", "through time"))
    gate = call.gate()
    assert gate is not None
    assert view.gate is not None
    torch.testing.assert_close(view.gate, gate[0, :, 0])


def test_frames_show_the_gate_where_it_is() -> None:
    call = calls_of(converted(gate="head"), inputs_of())[0]
    view, gate = pictures._view(call), call.gate()
    assert gate is not None
    frames = pictures._frames(view, view.gate)
    assert [label for label, _ in frames] == ["frame 0", "frame 1"]
    torch.testing.assert_close(frames[1][1][3, 5], gate[0, 77 + 3 * 11 + 5].mean())
    long = pictures._SiteView(view.mask, torch.rand(21), (21, 1, 1), None, "none")
    assert [label for label, _ in pictures._frames(long, long.gate)][::7] == ["frame 0", "frame 20"]


def test_the_page_says_what_it_shows(tmp_path: Path) -> None:
    model = converted(lowest_sparsity=0.5)
    salad_compile.set_sparsity(model, {"*": 0.5})
    text = save_pictures(model, inputs_of(), tmp_path, about="run <1>, real inputs").read_text()
    call = calls_of(model, inputs_of())[0]
    left_out = 1 - float(pictures._view(call).mask.float().mean())
    assert "<p>run &lt;1&gt;, real inputs</p>" in text
    assert f"Sparsity asked for: 0.5. Blocks that these inputs leave out: {left_out:.1%} on average" in text


def test_gates_of_two_models_have_the_same_colours() -> None:
    """A scale from the lowest to the highest value would show noise around 0.5 as a pattern."""
    view = pictures._SiteView(torch.zeros(1, 1, 1), torch.full((21,), 0.5), (21, 1, 1), None, "none")
    figure = pictures._gate_figure({"site": view})
    limits = {image.get_clim() for axes in figure.axes for image in axes.get_images()}
    assert limits == {(0.0, 1.0)}


def test_without_a_grid_and_without_gates(tmp_path: Path) -> None:
    model = salad_compile.convert(toys.Stack(toys.SelfAttention()), TINY, example_inputs=(toys.tokens(100),))
    page = save_pictures(model, (toys.tokens(100),), tmp_path / "flat")
    assert {path.name for path in page.parent.iterdir()} == {
        "index.html",
        "recall.png",
        "gate.png",
        "masks_layers.0.png",
    }
    page = save_pictures(converted(gate="none"), inputs_of(), tmp_path / "no_gate")
    assert not (page.parent / "gate.png").exists()
    root = toys.SelfAttention()
    salad_compile.convert(root, TINY, example_inputs=(toys.tokens(100),))
    assert (save_pictures(root, (toys.tokens(100),), tmp_path / "root").parent / "masks_model.png").exists()


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    model = converted()
    first, second = (save_pictures(model, inputs_of(), tmp_path / name) for name in ("one", "two"))
    for path in first.parent.iterdir():
        assert path.read_bytes() == (second.parent / path.name).read_bytes()


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    page = save_pictures(model, inputs_of(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        save_pictures(model, inputs_of(resolution=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert page.exists()


def test_bad_input_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConvertedError):
        save_pictures(ALL_CASES["Wan"].build(), inputs_of(), tmp_path / "x")
    with pytest.raises(InputsError):
        save_pictures(converted(), {**inputs_of(), "hidden_states": torch.zeros(2)}, tmp_path / "x")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"salad-compile\[pictures\]"):
        save_pictures(converted(), inputs_of(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
