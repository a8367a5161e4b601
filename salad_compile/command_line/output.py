"""What commands print: reports on stdout, as JSON, for a terminal or for a pipe; progress on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salad_compile.common.reports import Report


def show(arguments: argparse.Namespace, report: Report, **more: Any) -> None:
    """A report: in colour and as wide as the terminal if stdout is one, plain text otherwise.

    Args:
        more: what the JSON says beside the report.
    """
    if arguments.json:
        show_json({**report.to_dict(), **more})
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        print(report.to_text())


def tell(arguments: argparse.Namespace, text: str, values: Mapping[str, Any]) -> None:
    """A sentence, or what it says as JSON."""
    if arguments.json:
        show_json(values)
    else:
        print(text)


def show_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(values, indent=2))


def plural(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
