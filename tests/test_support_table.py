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


def test_full_tables_are_current() -> None:
    text = TABLE.read_text()
    rows = [*read_rows(text, 0), *read_rows(text, 2)]
    assert sorted(map(_form, rows)) == sorted(CASES), STALE
    for row in rows:
        assert list(row) == list(support_table.HEAD), STALE
        case = CASES[_form(row)]
        assert row["sites"] == _sites(_form(row)), STALE
        assert row["note"] == (case.note or "-"), STALE
        passed, of, failed = re.fullmatch(r"(\d+) of (\d+)(.*)", row["status"]).groups()  # type: ignore[union-attr]
        assert int(of) == len(COLUMNS), STALE
        assert len(re.findall(r"; [\w= ]+: no \(.+?\)", failed)) == int(of) - int(passed), "a no without a reason"
    for heading in HEADINGS:
        assert f"- **{heading}** (" in text, STALE


def test_what_stays_dense_is_listed() -> None:
    rows = read_rows(TABLE.read_text(), number=1)
    assert all(list(row) == list(support_table.DENSE_HEAD) for row in rows), STALE
    listed = sorted((_form(row), row["reason"]) for row in rows if row["tested"] == "yes")
    assert listed == sorted((name, dense.reason) for name, dense in DENSE.items()), STALE
    listed = sorted(row["reason"] for row in rows if row["tested"] == "no")
    assert listed == sorted(WITHOUT_CASE.values()), STALE


def test_the_readme_names_the_models_of_diffusers() -> None:
    block = " ".join(read_readme_block().split())
    for row in read_rows(TABLE.read_text(), 0):
        name = row["family"].partition(":")[0]
        assert re.search(rf"\b{name}\b", block), STALE
        assert "handwritten" not in name, "the models of the tests have a table of their own"
    named = re.search(r"checks passed: (.+?)\.", block)
    assert named
    assert len(named[1].split(", ")) == len(set(named[1].split(", "))), STALE
    assert "handwritten" not in block


def test_a_check_that_failed_is_told() -> None:
    models = [
        support_table.Model("One", "`OneTransformer3DModel` (diffusers)", ("blocks.0.attn1",), ""),
        support_table.Model("Two", "`TwoTransformer3DModel` (diffusers)", ("blocks.0.attn1",), ""),
        support_table.Model("own", "`OwnDiT` (tests)", ("blocks.0.attn1",), ""),
    ]
    outcomes = {(model.name, test): "yes" for model in models for test in COLUMNS}
    outcomes["Two", "test_saved_and_loaded"] = "no (its file is too large)"
    assert support_table.status(models[1], outcomes) == "7 of 8; saved: no (its file is too large)"
    short = support_table.short(models, outcomes, [])
    assert "all 8 checks passed: One." in short
    assert "With some checks failed: Two." in short


def test_forms_of_a_family_stand_beside_each_other() -> None:
    models = [
        support_table.Model(name, f"`{cls}Transformer3DModel` (diffusers)", (), "")
        for name, cls in (("One", "One"), ("Two", "Two"), ("OneRope", "One"))
    ]
    rows = support_table.by_family((support_table.family(model),) for model in models)
    assert rows == [("One",), ("One: OneRope",), ("Two",)]


def _form(row: dict[str, str]) -> str:
    """The case of the zoo that a row is of."""
    return row["family"].rpartition(": ")[2]


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
