"""Printing of commands: reports on stdout, as JSON, for a terminal or for a pipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from salad_compile.common.printable import printable

if TYPE_CHECKING:
    from salad_compile.common.reports import Report


def show(arguments: argparse.Namespace, report: Report, **more: Any) -> None:
    """Print a report: in colour and as wide as the terminal if stdout is one, plain text otherwise.

    Args:
        more: further entries of the JSON.
    """
    if arguments.json:
        show_json({**report.to_dict(), **more})
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
    else:
        print(report.to_text())


def tell(arguments: argparse.Namespace, text: str, values: Mapping[str, Any]) -> None:
    """Print a sentence, or its values as JSON."""
    if arguments.json:
        show_json(values)
    else:
        print(printable(text))


def show_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(values, indent=2))
