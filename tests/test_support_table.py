"""The checked-in support tables list exactly the zoo's cases and checks: no capability without a test."""

from __future__ import annotations

import inspect
import re

import pytest

from tests.models import test_zoo
from tests.models.expectations import DENSE, converted_sites
from tests.models.kinds import CONVERTED as CASES
from tests.models.registry import WITHOUT_CASE
from tools import support_table
from tools.support_table import COLUMNS, COMMAND, TABLE, cell_of, read_readme_block, read_rows

HEADINGS = [heading for heading, _ in COLUMNS.values()]
STALE = f"run: {COMMAND}"


def test_every_test_of_a_case_has_a_column() -> None:
    functions = inspect.getmembers(test_zoo, inspect.isfunction)
    tests = {n for n, f in functions if n.startswith("test_") and "case" in inspect.signature(f).parameters}
    assert tests == set(COLUMNS)


def test_full_table_is_current() -> None:
    rows = read_rows(TABLE.read_text())
    assert [row["model"] for row in rows] == list(CASES), STALE
    for row in rows:
        assert list(row) == ["model", "class", *HEADINGS, "converted sites", "note"], STALE
        case = CASES[row["model"]]
        assert row["converted sites"] == _sites(row["model"]), STALE
        assert row["note"] == (case.note or "-"), STALE
        for heading in HEADINGS:
            assert re.fullmatch(r"yes|no \(.+\)", row[heading]), f"{row['model']}, {heading}: a no without a reason"


def test_what_stays_dense_is_listed() -> None:
    rows = read_rows(TABLE.read_text(), number=1)
    listed = [(row["model"], row["reason"]) for row in rows]
    expected = [(name, dense.reason) for name, dense in DENSE.items()]
    assert listed == [*expected, *(("-", reason) for reason in WITHOUT_CASE.values())], STALE


def test_readme_block_agrees_with_the_full_table() -> None:
    block = read_readme_block()
    full = {row["model"]: row for row in read_rows(TABLE.read_text())}
    rows = read_rows(block)
    assert all(f"{name}: {dense.reason}" in block for name, dense in DENSE.items()), STALE
    assert [row["model"] for row in rows] == list(CASES), STALE
    for row in rows:
        passed = sum(full[row["model"]][heading] == "yes" for heading in HEADINGS)
        assert row["checks passed"] == f"{passed} of {len(COLUMNS)}", STALE
        assert row["converted sites"] == _sites(row["model"]), STALE
    assert f"Checks: {', '.join(HEADINGS)}." in block, STALE


def _sites(name: str) -> str:
    return support_table.shown_sites(converted_sites(CASES[name]))


@pytest.mark.parametrize(
    ("node_id", "cell"),
    [
        ("tests/models/test_zoo.py::test_eager_equals_compiled[Wan]", ("Wan", "test_eager_equals_compiled")),
        ("tests/models/test_zoo.py::test_eager_equals_whole_model_through_inductor[Wan]", None),
        ("tests/kernels/test_operators.py::test_opcheck[pool]", None),
    ],
)
def test_cell_of(node_id: str, cell: tuple[str, str] | None) -> None:
    assert cell_of(node_id) == cell


@pytest.mark.parametrize(("ran", "message"), [(False, "were not run"), (True, "failed")])
def test_an_incomplete_or_failed_run_writes_nothing(ran: bool, message: str) -> None:
    before = TABLE.read_text(), support_table.README.read_text()
    model = support_table.Model("Wan", "`Wan`", ("blocks.0.attn1",), "")
    outcomes = {("Wan", test): "no" for test in COLUMNS} if ran else {}
    with pytest.raises(support_table.UnusableError, match=f"{len(COLUMNS)} of {len(COLUMNS)} tests {message}"):
        support_table.write([model], outcomes, "")
    assert (TABLE.read_text(), support_table.README.read_text()) == before
