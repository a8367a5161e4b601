"""`salad-compile doctor`: what will run where on this machine, and what will not."""

from __future__ import annotations

import argparse

from salad_compile.command_line.output import show

HELP = """\
Checks this machine: versions, compilers, devices and their kernels, the backend's entry point, caches, and environment
variables that change what runs. --run also computes a small attention on every device. Exit code 1: a fault was found,
something will not work; warnings alone are 0.

example:
    salad-compile doctor
    salad-compile doctor --run --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--run."""
    parser.add_argument("--run", action="store_true", help="also run a small attention on every device")


def run(arguments: argparse.Namespace) -> int:
    """Print all findings; 1 if one is a fault."""
    from salad_compile.command_line.checkup import examine

    found = examine(run=arguments.run)
    show(arguments, found)
    return 0 if found.healthy else 1
