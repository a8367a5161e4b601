"""The command line: `salad-compile COMMAND`, one module for each command.

A command is a module of this package with

    HELP: str                          what it does, and an example
    add_arguments(parser) -> None      its own arguments; --json, --debug are added to all of them here
    run(arguments) -> int              its work; the exit code

Modules are imported when their command is asked for, and import torch when they run: `--help` is quick.

Exit codes: 0 done; 1 a negative result (nothing to convert, a fault found); 2 wrong usage or input; 3 an unexpected
error, with its traceback; 130 interrupted (143, 129: by SIGTERM, SIGHUP); 141 the reader of a pipe went away, as with
other tools.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from salad_compile.command_line.failures import own_error, sentence_of
from salad_compile.command_line.logging_setup import logs_on_stderr
from salad_compile.command_line.parser import Parser
from salad_compile.common.progress import quiet
from salad_compile.common.version import __version__
from salad_compile.errors import ConfigError, MissingPackageError

OK, NO, WRONG, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 130, 141

PROGRAM = "salad-compile"
COMMON = {
    "--json": "the result as JSON on stdout, and nothing else there",
    "--debug": "errors with their traceback",
    "--verbose": "what is going on, on stderr; also -v",
    "--quiet": "no progress, and nothing on stderr but warnings and errors; also -q",
}
SHORT = {"-v": "--verbose", "-q": "--quiet"}

COMMANDS = {
    "plan": "which attention calls of a model can be converted, and why not the others",
    "convert": "write the file of a freshly converted model",
    "train": "fine-tune a converted model on precomputed latents",
    "inspect": "what a SALAD file holds; reads its header alone",
    "export": "write a fine-tuned model in the formats of other programs",
    "latents": "make latents of a folder of videos, look at latents, convert their layout",
    "bench": "time one denoising step, dense and SALAD in turns",
    "viz": "draw what a converted model attends to",
    "doctor": "versions, devices and caches: what will run where, and what will not",
    "completion": "the script that completes commands and options in a shell",
}

DESCRIPTION = """\
SALAD for video diffusion transformers: block-sparse plus gated linear attention, without changing model code.
"""

EPILOG = """\
example:
    salad-compile plan Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    salad-compile plan --help

exit codes: 0 done; 1 a negative result; 2 wrong usage or input; 3 an unexpected error; 130 interrupted;
143 ended by SIGTERM
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Nothing is raised: errors go to stderr and into the exit code.

    Args:
        argv: the arguments without the program's name. None: those of the process.
    """
    given = [SHORT.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    _make_printable()
    try:
        code = _run(given)
        sys.stdout.flush()  # a closed pipe shows here, and not at the interpreter's end
        return code
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return PIPE_CLOSED
    except Exception as error:
        return _report_error(error, debug="--debug" in given)


def _make_printable() -> None:
    """Let no result be lost in its printing: streams that are closed, or whose encoding lacks a sign (LANG=C)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start, `>&-`
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115 (it is open until the end)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _run(given: list[str]) -> int:
    _require_words(given)
    parser = build_parser(_command_in(given))
    try:
        arguments = parser.parse_args([word for word in given if word not in COMMON])
    except SystemExit as error:  # argparse: 0 after --help, 2 after a wrong argument, which it reported
        return error.code if isinstance(error.code, int) else WRONG
    if arguments.command is None:
        parser.print_help()
        return WRONG
    for option in COMMON:  # wherever they stand, behind the commands of a command too
        setattr(arguments, option.removeprefix("--"), option in given)
    with logs_on_stderr(verbose=arguments.verbose, silent=arguments.quiet), quiet(arguments.quiet):
        return int(command_module(arguments.command).run(arguments))


def _require_words(given: Sequence[str]) -> None:
    """Raises ConfigError for an empty one, which would be taken for the directory that the shell is in."""
    for before, word in zip(["the first word", *given], given, strict=False):
        if not word or (word.startswith("--") and word.find("=") == len(word) - 1):
            raise ConfigError(f"what {word or before} is given is empty: is a variable of the shell unset?")


def build_parser(*commands: str | None) -> argparse.ArgumentParser:
    """The parser of everything, with the arguments of `commands` filled in; the others have their name and line."""
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, line in COMMANDS.items():
        module = command_module(name) if name in commands else None
        command = subparsers.add_parser(
            name,
            help=line,
            description=None if module is None else module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            conflict_handler="resolve",  # a command may say more about an option of all
        )
        _add_common(command)
        if module is not None:
            module.add_arguments(command)
    return parser


def command_module(name: str) -> ModuleType:
    """The module of a command.

    Raises:
        MissingPackageError: it is not part of this installation.
    """
    full = f"{__name__}.{name}"
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
        raise MissingPackageError(
            f"this installation has no command {name!r} ({full} is missing): install salad-compile anew."
        ) from error


def _add_common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of all commands")
    for option, text in COMMON.items():
        group.add_argument(option, action="store_true", help=text)


def _command_in(argv: Sequence[str]) -> str | None:
    """The command, before anything is parsed: options in front of it take no values."""
    first = next((word for word in argv if not word.startswith("-")), None)
    return first if first in COMMANDS else None


def _report_error(error: Exception, *, debug: bool) -> int:
    """Print what went wrong; returns the exit code."""
    said = sentence_of(error)
    if debug or said is None:
        traceback.print_exception(error)
    if said is None:
        print(f"{PROGRAM}: unexpected error: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    print(f"{PROGRAM}: error: {said}", file=sys.stderr)
    return NO if type(own_error(error)).__name__ in ("NoEligibleSiteError", "NoAttentionError") else WRONG


def _drop_output() -> None:
    """Let the interpreter's last flush of stdout go nowhere."""
    import contextlib
    import io
    import os

    with contextlib.suppress(OSError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
