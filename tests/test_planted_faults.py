"""The faults that tools/plant_faults.py plants still stand somewhere in the product; the tool itself takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.plant_faults import PRODUCT
from tools.planted_faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
PRODUCT_TEXTS = [path.read_text(encoding="utf-8") for name in PRODUCT for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_code_of_a_fault_is_found(fault: Fault) -> None:
    assert any(found in text for found, _ in fault.edits for text in PRODUCT_TEXTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_tests(fault: Fault) -> None:
    assert any(path.name.startswith("test_") for pattern in fault.tests for path in ROOT.glob(pattern))
