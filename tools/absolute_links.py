"""What a package index shows of the README, which it shows without the repository around it.

    python tools/absolute_links.py            print it

setup.py hands it to every wheel and sdist. With an address of the repository in `[project.urls]` ("Source"), links and
pictures lead to its files at the tag of this version. Without one, links into the repository are their text alone and
pictures their description: nothing leads nowhere.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, PROJECT = ROOT / "README.md", ROOT / "pyproject.toml"
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:|#)[^)\s]+)\)")


def make_absolute(text: str, address: str, pictures: str) -> str:
    """The text with every relative link below `address`, and every relative picture below `pictures`."""

    def replace(match: re.Match[str]) -> str:
        base = pictures if match["picture"] else address
        return f"{match['picture']}[{match['text']}]({base.rstrip('/')}/{match['target']})"

    return LINK.sub(replace, text)


def drop_relative(text: str) -> str:
    """The text with every relative link as its words, and every relative picture as a line that says what it shows."""
    return LINK.sub(lambda match: f"*Picture: {match['text']}.*" if match["picture"] else match["text"], text)


def long_description(text: str, project: dict[str, Any]) -> str:
    """The README's text as an index shows it.

    Args:
        project: the table `[project]` of pyproject.toml.
    """
    source = project.get("urls", {}).get("Source", "").rstrip("/")
    if not source:
        return drop_relative(text)
    return make_absolute(text, f"{source}/blob/v{project['version']}", f"{source}/raw/v{project['version']}")


def readme() -> str:
    """The long description of this version."""
    return long_description(README.read_text(encoding="utf-8"), tomllib.loads(PROJECT.read_text())["project"])


if __name__ == "__main__":
    sys.stdout.write(readme())
