"""Make the README's links and pictures absolute: package indexes show it without the repository around it.

    python tools/absolute_links.py https://example.org/salad_compile/blob/v0.1.0 [--pictures ADDRESS]

The address is that of the repository's files at one version. Pictures often have another one, of raw files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!\w+:|#)[^)\s]+)\)")


def make_absolute(text: str, address: str, pictures: str) -> str:
    """The text with every relative link below `address`, and every relative picture below `pictures`."""

    def replace(match: re.Match[str]) -> str:
        base = pictures if match["picture"] else address
        return f"{match['picture']}[{match['text']}]({base.rstrip('/')}/{match['target']})"

    return LINK.sub(replace, text)


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="where the files of this version are")
    parser.add_argument("--pictures", help="where its pictures are; the same by default")
    options = parser.parse_args(given)
    README.write_text(make_absolute(README.read_text(), options.address, options.pictures or options.address))
    return 0


if __name__ == "__main__":
    sys.exit(main())
