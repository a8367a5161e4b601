"""Packages of others in a folder of their own: `pip install --no-deps --target`, nothing of it in the environment."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path


def missing(requirements: Path, site: Path) -> list[str]:
    """The lines of a requirements file that the folder does not hold in their version."""
    wanted = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    there = {f"{_plain(each.name)}=={each.version}" for each in distributions(path=[str(site)])}
    return [line for line in wanted if f"{_plain(line.partition('==')[0])}=={line.partition('==')[2]}" not in there]


def install(requirements: Path, site: Path) -> list[str]:
    """Install what is missing; what still is in the end, of which pip has said why."""
    names = missing(requirements, site)
    if names:
        print(f"installing {', '.join(names)} into {site}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), "--upgrade"]
        subprocess.run([*command, *names], check=False)
    return missing(requirements, site)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
