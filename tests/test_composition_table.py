"""docs/composition.md says what its tests found, and nothing that no test has tried."""

from __future__ import annotations

import ast

import pytest

from tools import composition
from tools.composition import CELLS, PAGE, REQUIREMENTS, ROOT
from tools.support_table import UnusableError, read_rows

STALE = f"run: {composition.COMMAND}"


def test_the_page_has_a_row_for_each_cell() -> None:
    text = PAGE.read_text()
    rows = read_rows(text)
    assert [(row["beside SALAD"], row["how"]) for row in rows] == [(cell.beside, cell.how) for cell in CELLS], STALE
    for row, cell in zip(rows, CELLS, strict=True):
        assert (f"\n{row['test']}. `{cell.test}`\n" in text) if cell.test else row["test"] == "-", STALE
        answers = ("yes" if cell.works else "no, an error", "not run here: ") if cell.test else ("not tried",)
        assert row["works"].startswith(answers), STALE
    assert composition.packages() in text, STALE


@pytest.mark.parametrize("test", [cell.test for cell in CELLS if cell.test])
def test_each_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_outcomes_become_answers() -> None:
    outcomes: dict[str, str] = {}
    for outcome in ("yes", "no (needs a GPU)", "yes"):
        composition.add_outcome(outcomes, "a", outcome)
    assert composition.Cell("x", "how", "a").answer(outcomes) == "not run here: needs a GPU"
    composition.add_outcome(outcomes, "a", "no")
    composition.add_outcome(outcomes, "a", "yes")
    assert outcomes["a"] == "no"
    assert composition.Cell("x", "how", "b").answer({"b": "yes"}) == "yes"
    assert composition.Cell("x", "how", "b", works=False).answer({"b": "yes"}) == "no, an error"
    assert composition.cell_of(f"{CELLS[0].test}[x-y]") == CELLS[0].test
    assert composition.cell_of("tests/other.py::test_other") is None


@pytest.mark.parametrize(("ran", "message"), [(False, "were not run"), (True, "failed")])
def test_an_incomplete_or_failed_run_writes_nothing(ran: bool, message: str) -> None:
    before = PAGE.read_text()
    outcomes = {cell.test: "no" for cell in CELLS if cell.test} if ran else {}
    with pytest.raises(UnusableError, match=message):
        composition.write(outcomes, "")
    assert PAGE.read_text() == before


def test_requirements_have_versions() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
