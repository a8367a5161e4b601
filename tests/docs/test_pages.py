"""Names, defaults and files in the documents exist."""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import re
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import salad_compile
from salad_compile import errors, kernels, latents, training
from salad_compile.latents.layouts import WRITABLE
from salad_compile.latents.opening import SOURCES
from salad_compile.training import TrainSettings
from tests.docs.test_snippets import PAGES, ROOT
from tools.absolute_links import long_description, make_absolute
from tools.docs_hooks import in_repository, mark_table, mend_links, readme_section

DOCS = ROOT / "docs"
OURS = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, errors.SaladError)}
EVIDENCE = (DOCS / "evidence.md").read_text(encoding="utf-8")
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, DOCS / "limitations.md"], ids=lambda page: page.stem)
def test_errors_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = {*OURS, *vars(kernels), *vars(builtins)}
    for name in set(re.findall(r"`(?:\w+\.)*([A-Z]\w*Error)\b", text)):
        assert name in known, f"{page.name} names {name}"
    for name in set(re.findall(r"\bsalad_compile\.(\w+)", text)) - {"safetensors"}:
        assert hasattr(salad_compile, name) or importlib.util.find_spec(f"salad_compile.{name}"), f"{page.name}: {name}"


def test_troubleshooting_has_every_error() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert [name for name in OURS if f"`{name}`" not in text and f"salad_compile.{name}" not in text] == []


def test_reference_has_every_public_name() -> None:
    for module in (salad_compile, latents, training, kernels):
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        assert names - set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)) <= {"salad_compile.latents.WAN_2_1"}


def test_reference_names_exist() -> None:
    """mkdocstrings fails too; this is quicker, and says so where there is no mkdocs."""
    for name in re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        if name != "salad_compile.errors":
            assert hasattr(importlib.import_module(module), attribute), name


def test_settings_of_the_training_are_all_there() -> None:
    text = (DOCS / "fine_tuning.md").read_text(encoding="utf-8").partition("### Settings")[2].partition("###")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))
    assert list(rows) == [field.name for field in dataclasses.fields(TrainSettings)]
    for name, default in rows.items():
        assert eval(default) == getattr(TrainSettings(), name), name


def test_layouts_of_latents_are_all_there() -> None:
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \| .+? \| (yes|no) \|", text, re.MULTILINE)
    assert [name for name, *_ in rows] == list(SOURCES)
    assert [name for name, _, written, _ in rows if written == "yes"] == [name for name in SOURCES if name in WRITABLE]
    for name, _, _, normalized in rows:
        assert (normalized == "yes") == SOURCES[name].normalized


def test_the_rooms_are_those_that_lint_holds() -> None:
    (contract,) = (
        contract
        for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
            "contracts"
        ]
        if contract["name"] == "rooms"
    )
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert "```text\n" + "\n".join(contract["layers"]) + "\n```" in text
    rooms = {room for layer in contract["layers"] for room in layer.split(" | ")}
    assert {room.strip("/") for room in re.findall(r"^\| `([\w/]+)` \|", text, re.MULTILINE)} == rooms


def test_the_picture_needs_nothing_from_elsewhere() -> None:
    text = (DOCS / "pictures" / "way_through.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert set(re.findall(r"https?://[^\"]+", text)) == {"http://www.w3.org/2000/svg"}


# --- the hooks of mkdocs ----------------------------------------------------------------------------------------------


def test_links_that_leave_the_documents() -> None:
    assert in_repository("method.md#x", "index.md") is None
    assert in_repository("../README.md", "index.md") == "README.md"
    assert mend_links("see [kernels](kernels.md#floors)", "index.md") == "see [kernels](kernels.md#floors)"
    assert mend_links("[README.md](../README.md)", "index.md") == "`README.md`"
    assert mend_links("[the script](../tools/measured.py)", "index.md") == "the script"
    picture = "../benchmarks/results/attention_h100_length.png"
    assert mend_links(f"![x]({picture})", "kernels.md") == f"![x](repository/{picture.removeprefix('../')})"
    assert mend_links("[web](https://example.org/a.md)", "index.md") == "[web](https://example.org/a.md)"


def test_a_link_to_a_file_that_is_gone_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Which `mkdocs build --strict` counts."""
    mend_links("[gone](../gone.py)", "index.md")
    assert "gone.py, which is not in the repository" in caplog.text


def test_a_table_that_is_too_wide_for_a_phone_has_its_headings_in_its_cells() -> None:
    def table(*rows: str) -> str:
        cells = [[f"<t{'d' if number else 'h'}>{cell}</t{'d' if number else 'h'}>" for cell in row.split("|")]
                 for number, row in enumerate(rows)]  # fmt: skip
        head, *body = ["<tr>\n" + "\n".join(row) + "\n</tr>\n" for row in cells]
        return f"<table>\n<thead>\n{head}</thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>"

    small = table("a|b", "one|two")
    assert mark_table(small) == small
    words = "<code>single_transformer_blocks</code>"
    wide = mark_table(table(f"name|A &amp; B||{words}", f"x|{words}|1||"[:-1], "y|z|2|3"))
    assert wide.startswith("<table data-stack>")
    assert f'<td data-label="A &amp; B">{words}</td>' in wide
    assert "<td>x</td>" in wide, "the heading of its block"
    assert "<td>1</td>" in wide, "no heading"
    assert "<td></td>" in wide, "empty: hidden"
    assert '<td data-label="single_transformer_blocks">3</td>' in wide
    assert wide.count("<td") == wide.count("</td>") == 8
    assert " data-columns=many" in mark_table(table("|".join("abcdefg"), "|".join("1234567")))


def test_sections_of_the_readme_are_taken_over() -> None:
    text = readme_section("What you get")
    assert "| **dense / SALAD** (measured) |" in text
    assert "](docs/" not in text
    assert "](speed.md)" in text
    assert "<!-- README: What you get -->" in (DOCS / "index.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no heading"):
        readme_section("No such heading")


def test_the_readme_is_short_and_its_numbers_of_quality_are_those_of_the_evidence() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 150
    text = " ".join(readme.split())
    said = re.search(r"at 90 % sparsity fine-tuning closes (\d+) to (\d+) % of the gap", text)
    small, _, real = EVIDENCE.partition("<!-- experiment:end -->")
    closed = re.findall(r"^\| `(salad|rope-16-long)` .* \| ([\d.]+)% \| [\d.]+% \|", small, re.MULTILINE)
    assert said
    assert [(name, round(float(share))) for name, share in closed] == [
        ("salad", int(said[1])),
        ("rope-16-long", int(said[2])),
    ]
    said = re.search(r"and (\d+) % with compensation and blocks chosen for it", text)
    (share,) = re.findall(r"^\| `tail-error-16` \| .*? \| ([\d.]+)% \|", small, re.MULTILINE)
    assert said
    assert round(float(share)) == int(said[1])
    said = re.search(r"of real videos, where a short one closes (\d+) %, and (\d+) % with compensation", text)
    closed = re.findall(r"^\| `(salad|salad-tail)` \|.*? \| ([\d.]+)% \|", real, re.MULTILINE)
    assert said
    assert {name: round(float(share)) for name, share in closed} == {"salad": int(said[1]), "salad-tail": int(said[2])}


def test_an_index_gets_links_that_lead_somewhere() -> None:
    """Of a version whose repository has an address; each has its twin in this tree."""
    text = make_absolute(
        "[a](docs/a.md#b) ![p](docs/p.png) [w](https://w.org/x) [h](#here)", "https://r.org/v1/", "https://raw.org"
    )
    assert text == (
        "[a](https://r.org/v1/docs/a.md#b) ![p](https://raw.org/docs/p.png) [w](https://w.org/x) [h](#here)"
    )
    project = {"version": "1.2", "urls": {"Source": "https://r.org/us/"}}
    shown = long_description((ROOT / "README.md").read_text(encoding="utf-8"), project)
    targets = re.findall(r"\]\((.+?)\)", shown)
    assert len(targets) > 20
    for target in targets:
        path = re.sub(r"^https://r.org/us/(blob|raw)/v1.2/", "", target)
        assert path.startswith("https://") or (ROOT / path.partition("#")[0]).exists(), target
        assert target.startswith("https://"), target
    assert "](https://r.org/us/raw/v1.2/docs/pictures/experiment.png)" in shown


def test_an_index_gets_no_links_into_a_repository_without_an_address() -> None:
    shown = long_description("[a](docs/a.md#b), ![two clips](docs/p.png), [w](https://w.org/x)", {"version": "1"})
    assert shown == "a, *Picture: two clips.*, [w](https://w.org/x)"
    readme = long_description((ROOT / "README.md").read_text(encoding="utf-8"), {"version": "1"})
    assert all(target.startswith("https://") for target in re.findall(r"\]\((.+?)\)", readme))
    assert "salad-compile plan" in readme


def test_docstrings_as_mkdocstrings_reads_them() -> None:
    plain = pytest.importorskip("tools.docs_docstrings", reason="griffe comes with the extra docs").plain
    before = (
        "See :func:`load`.\n\nRaises:\n    AError: a. BError, CError: b\n        and c.\n    Whatever is raised, x."
    )
    after = "See `load`.\n\nRaises:\n    AError: a.\n    BError, CError: b and c.\n\nWhatever is raised, x.\n"
    assert plain(before) == after
    assert plain(":class:`salad_compile.config.BackendOptions`") == "`config.BackendOptions`"
    assert plain("Nothing of this kind.\n\nReturns:\n    x.") == "Nothing of this kind.\n\nReturns:\n    x."
