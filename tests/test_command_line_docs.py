"""docs/command_line.md says what the parsers say."""

from __future__ import annotations

from salad_compile.command_line import COMMANDS
from tools.command_line_docs import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/command_line_docs.py"


def test_the_page_has_every_command_and_its_arguments() -> None:
    """What it reads of argparse is private: if that moved, tables would be empty."""
    sections = page().split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == list(COMMANDS)
    for section in sections:
        assert "```\nsalad-compile " in section
        assert "| argument | meaning |" in section
    assert "| `--sparsity SPARSITY` | share of attention that is left out, 0.9 |" in sections[0]
    assert "### latents convert" in page()
