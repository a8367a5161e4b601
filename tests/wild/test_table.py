"""The checked-in tables of other projects' models list the classes that are tried, and no other outcome."""

from __future__ import annotations

import pytest

from tests.wild import tables
from tools.support_table import TABLE
from tools.wild_table import BEGIN, COMMAND, END


def test_every_class_has_a_row(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--wild-table"):
        pytest.skip("this session writes the table anew")
    _, _, rest = TABLE.read_text().partition(BEGIN)
    block, _, _ = rest.partition(END)
    for name in (*tables.names(), *tables.not_tried()):
        assert f"| `{name.rpartition('.')[2]}` |" in block, f"run: {COMMAND}"
    for name in tables.names():
        refused = tables.case(name).refused
        assert not refused or refused in block, f"run: {COMMAND}"
