"""The tables of foreign models in docs/models.md: what the checks of tests/wild/test_wild.py found, by project.

`tests/wild/conftest.py` collects the outcomes when pytest is run with `--wild-table`, and calls :func:`write`. The
block stands between markers; `tools/support_table.py` writes the rest of the page and leaves it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tools.support_table import TABLE, shown_sites, table

BEGIN, END = "<!-- wild:begin -->", "<!-- wild:end -->"
COMMAND = 'make test-wild PYTEST_ARGS="--wild-table"'
CHECKS = {
    "sites": "sites",
    "grid": "grid",
    "sparsity_zero": "s = 0",
    "compiled": "compiled",
    "per_block": "per block",
    "saved": "saved",
}
_NODE = re.compile(r"tests/wild/test_wild\.py::test_(\w+)\[([^\]]+)\]")


@dataclass(frozen=True)
class Foreign:
    """A class of another project, and what the checks said of it: check -> "yes", or "no (reason)"."""

    name: str
    sites: tuple[str, ...]
    refused: str
    absent: str
    outcomes: Mapping[str, str]

    @property
    def right(self) -> bool:
        """Converted, and every check passed."""
        return not (self.refused or self.absent) and all(self.outcomes.get(check) == "yes" for check in CHECKS)

    @property
    def row(self) -> tuple[str, ...]:
        """Class, status, sites, note."""
        cls = f"`{self.name.rpartition('.')[2]}`"
        if self.refused or self.absent:
            return (cls, "refused" if self.refused else "not tried", "-", self.refused or self.absent)
        said = {heading: self.outcomes.get(check, "no") for check, heading in CHECKS.items()}
        passed = sum(answer == "yes" for answer in said.values())
        notes = [f"{heading}: {answer}" for heading, answer in said.items() if answer != "yes"]
        return (cls, f"{passed} of {len(CHECKS)}", shown_sites(self.sites), "; ".join(notes) or "-")


def cell_of(node_id: str) -> tuple[str, str] | None:
    """(class, check) of a test's node id, or None where it has no cell in the table."""
    match = _NODE.search(node_id)
    return (match[2], match[1]) if match and match[1] in CHECKS else None


def write(projects: Mapping[str, Iterable[Foreign]], versions: str) -> None:
    """Write the block of docs/models.md.

    Args:
        projects: project and version -> its classes.
        versions: what the checks ran on.
    """
    before, _, rest = TABLE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    TABLE.write_text(f"{before.rstrip()}\n\n{BEGIN}\n{_block(projects, versions)}\n{END}{after or chr(10)}")


def kept_block(text: str) -> str:
    """The block with its markers, as it stands in the page, or nothing."""
    found = re.search(rf"{re.escape(BEGIN)}.*{re.escape(END)}\n?", text, re.DOTALL)
    return f"\n{found[0]}" if found else ""


def _block(projects: Mapping[str, Iterable[Foreign]], versions: str) -> str:
    classes = [each for members in projects.values() for each in members]
    tried = [each for each in classes if not each.absent]
    refused = [each for each in tried if each.refused]
    right = [each for each in tried if each.right]
    head = ("family", "status", "sites", "note")
    tables = "\n\n".join(
        f"### {project}\n\n{table(head, [each.row for each in members])}" for project, members in projects.items()
    )
    return f"""## Models of other projects

<!-- Generated, do not edit: {COMMAND} -->

Video DiT classes that this project did not write, in the packages that their authors publish, found by rule
(`tests/wild/rule.py`) and checked by `make test-wild` on {versions}: tiny, with random weights, in fp32 on the CPU.
Of {len(classes)} classes {len(tried)} are tried here; of these {len(right)} are converted and right, {len(refused)}
refused with the reason given, and {len(tried) - len(right) - len(refused)} converted with checks that fail. The others
cannot be imported here or have no tiny configuration yet. The {len(CHECKS)} checks ({", ".join(CHECKS.values())}) hold
outputs, and where it is compiled all gradients, against those of the uncompiled model, at sparsity 0 against those of
the dense one. "grid" passes too where none can be told and the reason says so.

{tables}

To write this part again: `{COMMAND}`."""
