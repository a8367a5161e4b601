"""Hooks of mkdocs: what the pages of docs/ use from elsewhere in the repository.

Pages are read on the site and in the repository. A link that leaves docs/ leads to a file of the repository; on the
site only its text stays, and a picture is copied. A file that does not exist is an error in either case, like any
broken link (`mkdocs build --strict`).
"""

from __future__ import annotations

import logging
import posixpath
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "build" / "docs_package"
# <!-- README: What you get --> becomes the section under that heading
INCLUDE = re.compile(r"<!-- README: (?P<heading>.+?) -->")
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:|#)[^)\s]+)\)")
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
CELL = re.compile(r"<(t[hd])([^>]*)>(.*?)</t[hd]>", re.DOTALL)
# of a phone, pixels: its width within margins, a letter of a table, the room beside the words of a cell
NARROW, PIXELS_OF_A_LETTER, PADDING = 366, 7, 21
MANY_COLUMNS = 7

logger = logging.getLogger("mkdocs.hooks.salad_compile")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package for mkdocstrings, which reads files and imports nothing.

    On start-up, because its own on_config skips a path that does not exist. A copy, in which passes/ and kernels/ are
    folders, because griffe (2.4) takes a symbolic link for the folder that it leads to, and that one has no parent.
    """
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "salad_compile", PACKAGE / "salad_compile", ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Any, config: Any) -> Any:
    """Copy the pictures that pages show and that lie outside docs/."""
    from mkdocs.structure.files import File

    for page in files.documentation_pages():
        for match in LINK.finditer(page.content_string):
            target = in_repository(match["target"], page.src_uri)
            if match["picture"] and target is not None and (ROOT / target).is_file():
                where = File.generated(config, f"repository/{target}", abs_src_path=str(ROOT / target))
                if where.src_uri not in files.src_uris:
                    files.append(where)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Insert sections of the README, and mend links that leave docs/."""
    source = page.file.src_uri
    return INCLUDE.sub(lambda match: readme_section(match["heading"]), mend_links(markdown, source))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Tell the style sheet which tables are too wide for a phone, and what the heading of each cell is."""
    return TABLE.sub(lambda match: mark_table(match[0]), html)


def mark_table(table: str) -> str:
    """A table of HTML with `data-label` in its cells if a phone has to show it as a list (docs/site/wide.css)."""
    rows = [CELL.findall(row) for row in table.split("<tr>")[1:]]
    labels = [_words(cell) for _, _, cell in rows[0]]
    longest = [max(map(len, " ".join(_words(cell) for cell in column).split()), default=0) for column in _columns(rows)]
    many = " data-columns=many" if len(labels) >= MANY_COLUMNS else ""
    if PIXELS_OF_A_LETTER * sum(longest) + PADDING * len(labels) <= NARROW:
        return table.replace("<table>", f"<table{many}>", 1)
    body = table.split("<tr>")
    for number, cells in enumerate(rows[1:], 2):
        named = zip(["", *labels[1:]], cells, strict=True)  # the first cell is the heading of its block
        parts = [_cell(label, each, cell) for label, (_, each, cell) in named]
        body[number] = "\n".join(["", *parts, body[number].rpartition("</td>")[2].lstrip("\n")])
    return "<tr>".join(body).replace("<table>", f"<table{many} data-stack>", 1)


def _cell(label: str, attributes: str, cell: str) -> str:
    named = f" data-label={quoteattr(label)}" if label and cell not in ("", "-") else ""
    return f"<td{attributes}{named}>{cell}</td>"


def _columns(rows: list[list[tuple[str, str, str]]]) -> list[list[str]]:
    return [[cells[number][2] for cells in rows] for number in range(len(rows[0]))]


def _words(cell: str) -> str:
    """The text of a cell of HTML."""
    return unescape(re.sub(r"<[^>]+>", "", cell)).strip()


def readme_section(heading: str) -> str:
    """The section of README.md under a heading, with links as seen from docs/.

    Raises:
        ValueError: no such heading.
    """
    sections = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections[1:]:
        title, _, text = section.partition("\n")
        if title.strip() == heading:
            return mend_links(text.strip(), "../README.md")
    raise ValueError(f"README.md has no heading {heading!r}")


def mend_links(markdown: str, source: str) -> str:
    """Rewrite the links of a page `source`, seen from docs/, for the site."""

    def replace(match: re.Match[str]) -> str:
        path, _, anchor = match["target"].partition("#")
        target = in_repository(path, source)
        if target is None:  # within docs/: mkdocs checks it
            if not source.startswith("../"):
                return match[0]
            inside = posixpath.relpath(posixpath.join("docs", posixpath.dirname(source), path), "docs")
            return f"{match['picture']}[{match['text']}]({inside}{'#' + anchor if anchor else ''})"
        if not (ROOT / target).exists():
            logger.warning("%s links to %s, which is not in the repository", source, target)
        if match["picture"]:
            return f"![{match['text']}](repository/{target})"
        return match["text"] if match["text"] != posixpath.basename(target) else f"`{match['text']}`"

    return LINK.sub(replace, markdown)


def in_repository(target: str, source: str) -> str | None:
    """The path in the repository of a link's target, or None if it is in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target.partition("#")[0]))
    return None if path == "docs" or path.startswith("docs/") else path
