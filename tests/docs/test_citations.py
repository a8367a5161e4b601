"""What comments, docstrings and documents cite is there."""

from __future__ import annotations

import pytest

from tests.docs.citations import (
    NOT_OURS,
    SPECIFICATION,
    Passage,
    comments_of,
    docstrings_of,
    missing,
    paragraphs,
    passages,
    sections,
)


def test_every_citation_resolves() -> None:
    faults = [f"{passage.file}:{passage.line}: {fault}" for passage in passages() for fault in missing(passage)]
    assert not faults, "\n".join(faults)


def test_the_specification_has_its_sections() -> None:
    expected = [str(number) for number in range(1, 13)] + [f"4.{number}" for number in range(1, 7)]
    assert sorted(sections()) == sorted(expected)
    assert sections()["4.2"] == 6
    assert sections()["12"] == 7


@pytest.mark.parametrize("name", NOT_OURS)
def test_exceptions_are_needed(name: str) -> None:
    assert any(name in passage.text for passage in passages())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see specification 4.9", "specification 4.9 is no section"),
        ("see specification 4.2 and 13", "specification 13 is no section"),
        ("of specification 4.2, step 7", "specification 4.2 has no step 7"),
        ("of specification 4.1, step 1", "specification 4.1 has no step 1"),
        ("as method.md section 4.2 says", "method.md section 4.2: only the specification has numbered sections"),
        ("as in the method 4.2", "method 4.2: only the specification has numbered sections"),
        ("targets.md, 5", "targets.md, 5: only the specification has numbered sections"),
        ("see docs/gone.md", "docs/gone.md does not exist"),
        ("see gone.py", "gone.py does not exist"),
        ("see `grid/gone.py`", "grid/gone.py does not exist"),
        ("as kernels/gone_*.py do", "kernels/gone_*.py does not exist"),
        ("the folder tests/gone", "tests/gone does not exist"),
        ("rows in benchmarks/results/gone.json", "benchmarks/results/gone.json does not exist"),
        ("tests/docs/test_pages.py::test_gone", "tests/docs/test_pages.py::test_gone is no test"),
        ("and `::test_gone`", "::test_gone is no test"),
        (":func:`salad_compile.gone`", "salad_compile.gone does not exist"),
        ("in salad_compile.grid.gone", "salad_compile.grid.gone does not exist"),
        (":class:`salad_compile.config.SaladConfig.gone`", "salad_compile.config.SaladConfig.gone does not exist"),
        ("of arXiv 2613.16515", "2613.16515 is not an arXiv id"),
        ("of arXiv 2601.1651", "2601.1651 is not an arXiv id"),
    ],
)
def test_a_citation_of_nothing_is_seen(text: str, fault: str) -> None:
    assert fault in missing(Passage("salad_compile/config.py", 1, text))


@pytest.mark.parametrize(
    "text",
    [
        "Specification 4.2, step 6, and specification 5 and 12",
        "see README.md, docs/kernels.md, test_citations.py and tests/docs",
        "kernels/block_sparse/triton_*.py, benchmarks/results/attention_<gpu>.json",
        "python benchmarks/tiles.py --output benchmarks/results/new.json",
        "Seen in kohya-ss/musubi-tuner: dataset/cache_io.py at 07f78ab",
        "tests/docs/test_citations.py::test_every_citation_resolves",
        ":class:`salad_compile.config.SaladConfig` and :func:`~salad_compile.convert`",
        "everything here is salad_compile.NAME, as salad_compile.grid is.",
        "arXiv 2601.16515, arXiv 2509.24695.",
    ],
)
def test_a_citation_of_something_is_not(text: str) -> None:
    assert missing(Passage("salad_compile/config.py", 1, text)) == []


def test_sections_within_the_specification() -> None:
    assert missing(Passage(SPECIFICATION, 1, "see section 4.7")) == ["section 4.7 does not exist"]


def test_where_passages_are_found() -> None:
    source = '"""One\ntwo.\n\nThree."""\nx = 1  # four\n# five\n# six\ny = "# seven"\n# eight\n'
    assert [passage.text for passage in docstrings_of(source, "a.py")] == ["One two.", "Three."]
    found = [(passage.line, passage.text) for passage in comments_of(source, "a.py")]
    assert found == [(5, "four five six"), (9, "eight")]
    assert [(p.line, p.text) for p in paragraphs("# A\n\nb\nc\n", "a.md", 1)] == [(1, "A"), (3, "b c")]
