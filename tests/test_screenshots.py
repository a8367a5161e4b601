"""The site as a browser sees it: what the check finds, and what it must not let pass. Needs Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import screenshots

LONG = "x" * 300
SEARCH = """<input type="checkbox" id="__search"><input data-md-component="search-query">
<ol><li class="result">{}</li></ol>"""


@pytest.fixture(autouse=True)
def _with_a_browser() -> None:
    try:
        screenshots.browser()
    except screenshots.NoBrowserError as error:
        pytest.skip(str(error))


def page(folder: Path, name: str, body: str, style: str = "") -> Path:
    path = folder / name
    path.write_text(f"<!doctype html><style>{style}</style><body>{body}</body>")
    return path


def test_what_is_cut_missing_or_too_wide_is_found(tmp_path: Path) -> None:
    wrapping = "pre { white-space: pre-wrap; overflow-wrap: anywhere }"
    pages = [
        page(tmp_path, "silent.html", SEARCH.format("")),  # the search is tried on the first
        page(tmp_path, "right.html", f"<pre><code>{LONG}</code></pre>", wrapping),
        page(tmp_path, "cut.html", f"<details><pre>{LONG}</pre></details>", "pre { overflow: auto }"),
        page(tmp_path, "wide.html", '<div style="width: 900px">x</div>'),
        page(tmp_path, "missing.html", '<img src="gone.png">'),
        page(
            tmp_path, "table.html", f'<div class="md-typeset__scrollwrap" style="overflow: auto"><table><tr><td>{LONG}'
        ),
    ]
    found = screenshots.faults(screenshots.measure(pages, 400), 400)
    assert [line.partition(" at 400: ")[0] for line in found] == [
        "silent.html",
        "cut.html",
        "wide.html",
        "missing.html",
        "table.html",
    ]
    for line, part in zip(found, ("finds nothing", "is cut", "is 9", "gone.png", "table scrolls"), strict=True):
        assert part in line


def test_a_picture_of_a_page(tmp_path: Path) -> None:
    tall = page(tmp_path, "one.html", "words")
    taken = screenshots.take(tall, 400, screenshots.TALLEST + 300, tmp_path / "pictures")
    assert [each.name for each in taken] == ["one_400.png", "one_400_2.png"]
    assert all(each.read_bytes().startswith(b"\x89PNG") for each in taken)
