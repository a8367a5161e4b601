"""Files written by earlier code load and give the outputs of that time. How they were written: saved_files.py."""

from __future__ import annotations

import pytest

from tests.salad_compile.salad_files.saved_files import FILES, SAVED, base, load, output
from tests.support import relative_error

# Rounding differs between processors; a branch parameter changed by a tenth moves an output by 1e-4 or more.
BOUND = 1e-5


@pytest.mark.parametrize("name", SAVED)
def test_a_file_of_earlier_code_gives_the_same_output(name: str) -> None:
    _, actual, expected = load(name)
    assert relative_error(actual, expected) < BOUND
    assert relative_error(output(SAVED[name], base(SAVED[name])), expected) > 0.1  # the file is what makes the output


def test_every_file_has_its_case() -> None:
    assert {file.name.partition(".")[0] for file in FILES.iterdir()} == set(SAVED)
