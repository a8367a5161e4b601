"""The support table: what the tests of tests/models/test_zoo.py found, as docs/models.md and the names in README.md.

`tests/conftest.py` collects the outcomes when pytest is run with `--support-table`, and calls :func:`write`.
`tests/test_support_table.py` holds the checked-in tables against the zoo and against `COLUMNS`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, TABLE = ROOT / "README.md", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
TESTS = "tests/models/test_zoo.py"
COMMAND = 'make test PYTEST_ARGS="tests/models --support-table"'

# Test function -> (column heading, what a "yes" means). Every test there that takes a `case` has a column.
COLUMNS = {
    "test_discovery_finds_exactly_the_video_self_attention": (
        "sites",
        "`plan` finds exactly the video's self-attention with its projections and its text, and nothing else",
    ),
    "test_sparsity_zero_equals_dense": ("s = 0", "converted at sparsity 0, the model computes what the dense one does"),
    "test_zero_projection_equals_pure_sparse": (
        "proj = 0",
        "freshly converted, it computes what its block-sparse attention alone does",
    ),
    "test_eager_equals_compiled": (
        "compiled",
        "the whole model through Dynamo and the passes: output and all gradients as uncompiled; every site counted as "
        "it ran",
    ),
    "test_eager_equals_compiled_per_block": (
        "per block",
        "each block through Dynamo and the passes: output and gradients as uncompiled, every block with its own "
        "parameters",
    ),
    "test_gradient_checkpointing": (
        "checkpointing",
        "the blocks under non-reentrant activation checkpointing, uncompiled and compiled",
    ),
    "test_second_resolution_costs_at_most_one_compile": (
        "resolutions",
        "two video sizes through one compiled model: right results, and at most one more compilation",
    ),
    "test_saved_and_loaded": ("saved", "saved, loaded into a new base model: bitwise the same output"),
}

# The test that a case without a site says why.
DENSE_TEST = "test_what_cannot_be_converted_says_why"

_HEADINGS = [heading for heading, _ in COLUMNS.values()]
_NODE = re.compile(rf"{re.escape(TESTS)}::(\w+)\[([^\]]+)\]")


@dataclass(frozen=True)
class Model:
    """What the table says about a case of the zoo, outcomes apart."""

    name: str
    class_name: str
    sites: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class DenseModel:
    """What the second table says about a case that stays dense, or a class without a case."""

    name: str
    class_name: str
    reason: str
    tested: bool


class UnusableError(Exception):
    """The outcomes make no table: not all tests of all cases were run, or some failed without a given reason."""


def cell_of(node_id: str) -> tuple[str, str] | None:
    """(case, test) of a test's node id, or None where it has no cell in the table."""
    match = _NODE.search(node_id)
    if match is None or match[1] not in (*COLUMNS, DENSE_TEST):
        return None
    return match[2], match[1]


def write(
    models: Iterable[Model],
    outcomes: Mapping[tuple[str, str], str],
    versions: str,
    dense: Iterable[DenseModel] = (),
) -> None:
    """Write docs/models.md and the block of README.md.

    Args:
        models: the zoo, in order.
        outcomes: (case, test) -> "yes", "no (reason)", or "no" for a failure.
        versions: what the tests ran on.
        dense: what stays dense, in order.

    Raises:
        UnusableError: an outcome is missing, or a "no" has no reason; nothing is written.
    """
    models, dense = list(models), list(dense)
    cells = [(model.name, test) for model in models for test in COLUMNS]
    cells += [(model.name, DENSE_TEST) for model in dense if model.tested]
    for what, unusable in (
        ("were not run", [cell for cell in cells if cell not in outcomes]),
        ("failed", [cell for cell in cells if outcomes.get(cell) == "no"]),
    ):
        if unusable:
            names = ", ".join(f"{test}[{model}]" for model, test in unusable[:3])
            raise UnusableError(f"{len(unusable)} of {len(cells)} tests {what}: {names}")
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{short(models, outcomes, dense)}\n{END}{after}")
    from tools.wild_table import kept_block  # imports this module

    TABLE.write_text(_full(models, outcomes, versions, dense) + kept_block(TABLE.read_text()))


def short(models: list[Model], outcomes: Mapping[tuple[str, str], str], dense: list[DenseModel]) -> str:
    """What the README says: diffusers' models by name, without the models that the tests write themselves."""
    right = [model for model in models if all(outcomes[model.name, test] == "yes" for test in COLUMNS)]
    partly = [model for model in models if model not in right and _is_foreign(model)]
    names = dict.fromkeys(stem(model.class_name) for model in right if _is_foreign(model))
    left = dict.fromkeys(stem(model.class_name) for model in dense if model.tested)
    lines = [f"Converted, with all {len(COLUMNS)} checks passed: {', '.join(names)}."]
    lines += [f"With some checks failed: {', '.join(stem(model.class_name) for model in partly)}."] if partly else []
    lines += [f"Left dense in at least one of their forms, and told so: {', '.join(left)}."]
    return "\n".join(textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False) for line in lines)


def _is_foreign(model: Model | DenseModel) -> bool:
    return not model.class_name.endswith("(tests)")


def stem(class_name: str) -> str:
    """`Wan` of "`WanTransformer3DModel` (diffusers)"."""
    return re.sub(r"(Transformer(3DModel)?)?` .*", "", class_name).strip("`")


def status(model: Model, outcomes: Mapping[tuple[str, str], str]) -> str:
    """`8 of 8`, or how many and which not, with the reasons."""
    failed = [
        f"{COLUMNS[test][0]}: {outcomes[model.name, test]}" for test in COLUMNS if outcomes[model.name, test] != "yes"
    ]
    return "; ".join([f"{len(COLUMNS) - len(failed)} of {len(COLUMNS)}", *failed])


HEAD = ("family", "status", "sites", "note")
DENSE_HEAD = ("family", "tested", "reason")


def _full(models: list[Model], outcomes: Mapping[tuple[str, str], str], versions: str, dense: list[DenseModel]) -> str:
    def rows(members: Iterable[Model]) -> list[tuple[str, ...]]:
        return by_family((family(m), status(m, outcomes), shown_sites(m.sites), m.note or "-") for m in members)

    left = by_family((family(m), "yes" if m.tested else "no", m.reason) for m in dense)
    meanings = "\n".join(f"- **{heading}** (`{test}`): {text}." for test, (heading, text) in COLUMNS.items())
    return f"""# Supported models

<!-- Generated, do not edit: {COMMAND} -->

Written from the outcomes of `{TESTS}` on {versions}.
Each model is built tiny, with random weights, in fp32 on the CPU: the tables show that the mechanics are right on this
architecture. They say nothing about speed, about trained weights or about the quality of videos. What they do not
list may work or not; `salad_compile.plan(model)` tells which sites it finds, and an error tells when one is lost.

## Models of diffusers

A family is a class, such as `WanTransformer3DModel`; after a colon stands the form of it that is tested.

{table(HEAD, rows(filter(_is_foreign, models)))}

{len(COLUMNS)} checks are made of each. They are

{meanings}

## What stays dense

Cases and classes that are not converted. "Tested" (`{DENSE_TEST}`): `convert` refuses the model with that reason and
leaves it as it was. Classes of diffusers that make video are found by rule (`tests/models/registry.py`): a new one
fails `tests/models/test_registry.py` until it is in one of the tables.

{table(DENSE_HEAD, left)}

## Ways to write attention

Models that the tests write themselves, one for each way in which code calls attention. The same checks.

{table(HEAD, rows(model for model in models if not _is_foreign(model)))}

To write this file and the names in README.md again: `{COMMAND}`.
"""


def family(model: Model | DenseModel) -> str:
    """`Wan`; with the form that was tested, `CogVideoX: CogVideoXRope`, where it has another name."""
    if not _is_foreign(model):
        return model.name
    name = stem(model.class_name)
    return name if model.name in ("-", name) else f"{name}: {model.name}"


def by_family(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows with those of a family beside each other, otherwise in their order."""
    families: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        families.setdefault(row[0].partition(":")[0], []).append(row)
    return [row for members in families.values() for row in members]


def shown_sites(sites: Iterable[str]) -> str:
    """`blocks.*.attn1`: sites that differ in a number only are one."""
    return ", ".join(dict.fromkeys(f"`{re.sub(r'(?<=[.])[0-9]+(?=[.]|$)', '*', site)}`" for site in sites))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Of Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- reading, for the test -------------------------------------------------------------------------------------------


def read_rows(text: str, number: int = 0) -> list[dict[str, str]]:
    """The rows of a table in a text, the first if not told otherwise, as heading -> cell."""
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in tables[number].splitlines()]
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]


def read_readme_block() -> str:
    """What stands between the markers of README.md."""
    _, _, rest = README.read_text().partition(BEGIN)
    block, _, _ = rest.partition(END)
    return block
