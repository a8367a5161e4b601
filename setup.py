"""Everything is in pyproject.toml, but what a package index shows: README.md with links that lead somewhere there."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tools.absolute_links import readme

setup(long_description=readme(), long_description_content_type="text/markdown")
