"""`salad-compile completion SHELL`: the script that completes commands, options and choices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

HELP = """\
Prints a script that lets the shell complete commands, options and their choices. Where none of these fits, it completes
names of files.

example:
    salad-compile completion bash
    eval "$(salad-compile completion bash)"        a line for ~/.bashrc
    eval "$(salad-compile completion zsh)"         for ~/.zshrc, behind compinit
"""

SHELLS = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}

SCRIPT = """\
_salad_compile() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="" words="" each
    for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$each" in {commands}) command="$each"; break ;; esac
    done
    case "$command $previous" in
{choices}
    *) case "$command" in
{options}
        esac
        # a bare word is a file, but for the names of commands
        [[ "$word" == -* ]] || words="$(printf '%s\\n' $words | grep -v '^-')" ;;
    esac
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -F _salad_compile salad-compile
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHELL."""
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell that reads the script")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(SHELLS[arguments.shell] + script(), end="")
    return 0


def script() -> str:
    """The function of the shell, from the parsers of all commands."""
    from salad_compile.command_line import COMMANDS, build_parser

    parsers = dict(_commands(build_parser(*COMMANDS)))
    options = {"": [*parsers, "--help", "--version"]}
    choices = {}
    for name, parser in parsers.items():
        options[name] = []
        for action in _actions(parser):
            flags = [flag for flag in action.option_strings if flag.startswith("--")]
            options[name] += [flag for flag in flags if flag not in options[name]]
            values = [str(value) for value in action.choices or ()]
            if flags and values:
                choices.update({f"{name} {flag}": values for flag in flags})
            elif values:  # commands of a command, and names in a place of their own
                options[name] += values
    return SCRIPT.format(
        commands="|".join(parsers),
        choices="\n".join(f'    "{what}") words="{" ".join(values)}" ;;' for what, values in choices.items()),
        options="\n".join(f'        "{name}") words="{" ".join(words)}" ;;' for name, words in options.items()),
    )


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Name and parser of each command.

    Argparse has no other way to ask (Python 3.11 to 3.13; test_completion.py).
    """
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Its arguments and those of its own commands."""
    yield from parser._actions
    for _, inner in _commands(parser):
        yield from _actions(inner)
