"""`salad-compile doctor`: what will run where on this machine, and what will not."""

from __future__ import annotations

import argparse

from salad_compile.command_line.output import show

HELP = """\
Checks this machine: versions, and whether what is installed can be imported, compilers, devices and their kernels, the
backend's entry point, caches, and environment variables that change what runs. --run also computes a small attention on
every device. --clear-caches empties the caches of compiled and measured kernels and does nothing else. Exit code 1: a
fault was found, something will not work; warnings alone are 0.

example:
    salad-compile doctor
    salad-compile doctor --run --json
    salad-compile doctor --clear-caches
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--run, --clear-caches."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", action="store_true", help="also run a small attention on every device")
    what.add_argument("--clear-caches", action="store_true", help="empty the caches: the next run compiles anew")


def run(arguments: argparse.Namespace) -> int:
    """Print all findings; 1 if one is a fault."""
    from salad_compile.command_line.checkup import clear_caches, examine

    found = clear_caches() if arguments.clear_caches else examine(run=arguments.run)
    show(arguments, found)
    return 0 if found.healthy else 1
