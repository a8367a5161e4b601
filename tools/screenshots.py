"""Look at the built site in headless Chromium: pictures of every page, and what a browser can measure of them.

    make docs
    python tools/screenshots.py                      build/screenshots/<page>_<width>.png; exit status 1 on a fault
    python tools/screenshots.py index.html --no-pictures     measure one page only

At each width: no code block or table is cut or scrolls sideways, no page is wider than the window, every picture loads;
and the search of the pages as opened from disk finds something. Pictures show the rest: look at them.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE, OUTPUT = ROOT / "build" / "site", ROOT / "build" / "screenshots"
WIDTHS = (1400, 400)
TALLEST = 16_000  # pixels of a picture
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUERY = "sparsity"

# A page of ours that opens the others in a frame of the right width, one after the other, and measures them.
CHECK = """<!doctype html><body><script>
const frame = document.createElement("iframe");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const open = (url) => new Promise((done) => {{ frame.onload = done; frame.src = url; }});
async function search(page) {{
  const field = page.querySelector("[data-md-component=search-query]");
  if (!field) return null;
  page.querySelector("#__search").checked = true;
  page.querySelector("#__search").dispatchEvent(new Event("change"));
  field.focus();
  field.value = {query};
  for (const name of ["focus", "input", "keyup"]) field.dispatchEvent(new Event(name));
  for (let round = 0; round < 100; round++) {{
    await wait(50);
    const found = page.querySelectorAll(".md-search-result__item").length;
    if (found) return found;
  }}
  return 0;
}}
async function main() {{
  frame.style.cssText = "width: {width}px; height: 900px; border: 0";
  document.body.append(frame);
  const seen = {{}};
  for (const url of {urls}) {{
    await open(url);
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach((each) => {{ each.open = true; }});
    await wait(50);
    seen[url] = {{
      cut: [...page.querySelectorAll("pre, pre > code")]
        .filter((each) => each.scrollWidth > each.clientWidth + 1)
        .map((each) => each.textContent.trim().slice(0, 60)),
      scrolling: [...page.querySelectorAll("table")]
        .filter((each) => each.closest(".md-typeset__scrollwrap, body").scrollWidth
          > each.closest(".md-typeset__scrollwrap, body").clientWidth + 1)
        .map((each) => each.textContent.trim().replace(/\\s+/g, " ").slice(0, 60)),
      width: page.documentElement.scrollWidth,
      height: page.documentElement.scrollHeight,
      missing: [...page.images].filter((each) => !each.naturalWidth).map((each) => each.getAttribute("src")),
    }};
  }}
  const first = {urls}[0];
  await open(first);
  await wait(300);
  seen[first].found = await search(frame.contentDocument);
  frame.remove();
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
}}
main();
</script></body>"""

# One page in a frame as tall as all of it, moved up by what other pictures show.
PART = """<!doctype html><body style="margin: 0; overflow: hidden">
<iframe src="{url}" style="border: 0; width: {width}px; height: {height}px; margin-top: -{top}px"></iframe></body>"""


class NoBrowserError(Exception):
    """Chromium is not installed."""


def browser() -> str:
    """The command of the first Chromium that is installed.

    Raises:
        NoBrowserError: none is.
    """
    for name in BROWSERS:
        if shutil.which(name):
            return name
    raise NoBrowserError(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")


def run(*arguments: str) -> str:
    """What headless Chromium prints. The flags let a root of a container run it, and pages of disk read each other."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
    done = subprocess.run([browser(), *flags, *arguments], capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def measure(pages: Sequence[Path], width: int) -> dict[str, dict[str, Any]]:
    """Page -> what CHECK saw: cut blocks, width and height of the page, missing pictures, and results of a search.

    The search runs on the first page alone (`found`; None where a page has no search).
    """
    urls = [page.resolve().as_uri() for page in pages]
    with TemporaryDirectory() as folder:
        check = Path(folder) / "check.html"
        check.write_text(CHECK.format(query=json.dumps(QUERY), width=width, urls=json.dumps(urls)))
        budget = 15_000 + 1500 * len(pages)
        dom = run(f"--virtual-time-budget={budget}", "--window-size=1600,1000", "--dump-dom", check.as_uri())
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    if found is None:
        raise RuntimeError(f"the pages did not load in {budget} ms of the browser's time")
    seen = json.loads(html.unescape(found[1]))
    return {page.name: seen[url] for page, url in zip(pages, urls, strict=True)}


def faults(seen: dict[str, dict[str, Any]], width: int) -> list[str]:
    """What is wrong, one line each."""
    found = []
    for page, facts in seen.items():
        found += [f"{page} at {width}: a code block is cut: {text!r}" for text in facts["cut"]]
        found += [f"{page} at {width}: a table scrolls sideways: {text!r}" for text in facts["scrolling"]]
        found += [f"{page} at {width}: {name} does not load" for name in facts["missing"]]
        if facts["width"] > width:
            found.append(f"{page} at {width}: the page is {facts['width']} wide")
        if facts.get("found") == 0:
            found.append(f"{page} at {width}: the search for {QUERY!r} finds nothing")
    return found


def take(page: Path, width: int, height: int, output: Path) -> list[Path]:
    """Pictures of a whole page, one below the other where it is taller than a browser draws: `<page>_<width>_2.png`."""
    output.mkdir(parents=True, exist_ok=True)
    taken = []
    with TemporaryDirectory() as folder:
        for number, top in enumerate(range(0, height, TALLEST)):
            shown = Path(folder) / "part.html"
            shown.write_text(PART.format(url=page.resolve().as_uri(), width=width, height=height, top=top))
            target = output / f"{page.stem}_{width}{f'_{number + 1}' if number else ''}.png"
            run(f"--window-size={width},{min(height - top, TALLEST)}", f"--screenshot={target}", shown.as_uri())
            taken.append(target)
    return taken


def _others() -> list[Path]:
    """All pages but the first; 404.html is for servers and has links from their root."""
    return [page for page in sorted(SITE.glob("*.html")) if page.name not in ("404.html", "index.html")]


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="file names in build/site; all by default")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="measure only")
    options = parser.parse_args(given)
    pages = [SITE / name for name in options.pages] or [SITE / "index.html", *_others()]
    found = []
    for width in options.widths:
        seen = measure(pages, width)
        found += faults(seen, width)
        for page in pages if options.pictures else ():
            print(*take(page, width, seen[page.name]["height"], OUTPUT))
    print("\n".join(found) or f"nothing is cut, missing or too wide on {len(pages)} pages")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
