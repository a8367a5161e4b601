"""`salad-compile inspect FILE`: what a SALAD file says about itself."""

from __future__ import annotations

import argparse

from salad_compile.command_line.output import show

HELP = """\
Shows what a file of salad_compile.save holds: the base it belongs to, its settings, its sites, sizes and versions.
Reads the header alone, no tensor and no model.

example:
    salad-compile inspect salad.safetensors
    salad-compile inspect run/ --json
    salad-compile inspect owner/repository
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE."""
    parser.add_argument(
        "file", metavar="FILE", help="a file, a directory with salad.safetensors, or a Hub repository (owner/name)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the header."""
    from salad_compile.command_line.file_report import read_file_report

    show(arguments, read_file_report(arguments.file))
    return 0
