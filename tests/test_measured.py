"""No number in the README's "Measured" block that is not in benchmarks/results/."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_block_is_what_the_raw_rows_say() -> None:
    spec = importlib.util.spec_from_file_location("measured", ROOT / "tools" / "measured.py")
    assert spec is not None
    assert spec.loader is not None
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    assert measured.render() in (ROOT / "README.md").read_text(), "run: python tools/measured.py"
