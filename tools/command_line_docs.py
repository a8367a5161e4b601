"""docs/command_line.md, written from the parsers of `salad-compile`, so that it says what they say.

    python tools/command_line_docs.py            # writes it
    python tools/command_line_docs.py --check    # exit code 1 if it is out of date

Not `format_help`: its layout differs between releases of Python. `_action_groups`, `_group_actions` and
`_SubParsersAction` are private parts of argparse, seen in Python 3.11 to 3.13; tests/test_command_line_docs.py fails
when they move.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from salad_compile.command_line import COMMANDS, COMMON, build_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "command_line.md"

HEAD = """\
# Command line

Written by `python tools/command_line_docs.py` from the parsers; `salad-compile COMMAND --help` says the same.

| command | what it does |
| --- | --- |
{commands}

A model is a directory that diffusers' `save_pretrained` wrote, a pipeline's directory, a `config.json`, a class of your
own (`module:Class` or `file.py:Class`, found from the working directory), or the id of a Hub repository. Results go to
stdout, everything else to stderr: warnings always, progress only on a terminal. Tables in pipes
have no colour. `SALAD FILE` means a file, a directory with `salad.safetensors`, or a Hub repository.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | a negative result: nothing can be converted, `doctor` found a fault, items are damaged |
| 2 | wrong usage or input: one line on stderr says what is wrong and how to fix it |
| 3 | an unexpected error, with its traceback |
| 130 | interrupted |
| 141 | the reader of the pipe went away |

Every command takes:

| option | meaning |
| --- | --- |
{common}
"""


def page() -> str:
    """The whole page."""
    commands = "\n".join(f"| [`{name}`](#{name}) | {line} |" for name, line in COMMANDS.items())
    common = "\n".join(f"| `{option}` | {text} |" for option, text in COMMON.items())
    sections = [HEAD.format(commands=commands, common=common)]
    parsers = _nested(build_parser(*COMMANDS))
    sections += [_section(name, parsers[name]) for name in COMMANDS]
    return "\n".join(sections)


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    text, _, examples = (parser.description or "").partition("\nexample:\n")
    lines = [f"## {name}", "", text.strip()]
    if examples:
        commands = [line.removeprefix("    ") for line in examples.rstrip().splitlines()]
        lines += ["", "```", *commands, "```"]
    lines += _tables(parser)
    for action, nested in _nested(parser).items():
        lines += ["", f"### {name} {action}", "", (nested.description or "").strip(), *_tables(nested)]
    return "\n".join([*lines, ""])


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of arguments that has any of its own."""
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if _is_own(action)]
        if not rows:
            continue
        title = group.title or ""
        if title not in ("options", "positional arguments"):
            about = f": {group.description}" if group.description else ""
            yield from ("", f"**{title}**{about}")
        yield from ("", "| argument | meaning |", "| --- | --- |", *rows)


def _is_own(action: argparse.Action) -> bool:
    of_all = set(action.option_strings) & {"--help", *COMMON}
    return not of_all and not isinstance(action, argparse._SubParsersAction)


def _row(action: argparse.Action) -> str:
    names = action.option_strings or [_value_name(action)]
    value = f" {_value_name(action)}" if action.option_strings and action.nargs != 0 else ""
    required = " (required)" if action.option_strings and action.required else ""
    meaning = (action.help or "") % {"default": action.default, "choices": action.choices}
    return f"| `{_cell(', '.join(names) + value)}` | {_cell(meaning)}{required} |"


def _value_name(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _nested(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands, by name."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
