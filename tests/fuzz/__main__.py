"""python -m tests.fuzz files | kills | races"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "files": "damaged files give the original result or an error of ours",
    "kills": "SIGKILL at random moments leaves nothing half written",
    "races": "threads and processes that save to and load from one path",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        importlib.import_module(f"tests.fuzz.{name}").add_arguments(commands.add_parser(name, help=text))
    arguments = parser.parse_args()
    return int(importlib.import_module(f"tests.fuzz.{arguments.command}").main(arguments))


if __name__ == "__main__":
    sys.exit(main())
