"""`salad-compile completion SHELL`: the script that completes commands, options and choices."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELP = """\
Prints a script that lets the shell complete commands, options and their choices. Where none of these fits, it completes
names of files.

example:
    salad-compile completion bash
    eval "$(salad-compile completion bash)"        a line for ~/.bashrc
    eval "$(salad-compile completion zsh)"         for ~/.zshrc, behind compinit
    salad-compile completion fish | source         for ~/.config/fish/config.fish
"""

# what is typed already -> the words that may follow, for shells whose `case` is that of sh
SH_TABLE = """\
    case "$command $previous" in
{choices}
    *) case "$command" in
{options}
        esac ;;
    esac
"""

BASH = """\
_salad_compile() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="" proposed="" each
    for each in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$each" in {commands}) command="$each"; break ;; esac
    done
{table}\
    # a bare word is a file, but for the names of commands
    [[ "$word" == -* ]] || proposed="$(printf '%s\\n' $proposed | grep -v '^-')"
    COMPREPLY=( $(compgen -W "$proposed" -- "$word") )
}}
complete -o default -F _salad_compile salad-compile
"""

ZSH = """\
_salad_compile() {{
    local word="$words[CURRENT]" previous="$words[CURRENT-1]" command="" proposed="" each
    for each in "${{(@)words[2,CURRENT-1]}}"; do
        case "$each" in {commands}) command="$each"; break ;; esac
    done
{table}\
    local -a fitting=(${{=proposed}})
    [[ "$word" == -* ]] || fitting=(${{fitting:#-*}})
    compadd -- $fitting || _files
}}
compdef _salad_compile salad-compile
"""

FISH = """\
function __salad_compile
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    set -l command ""
    set -l proposed
    for each in $before[2..-1]
        if contains -- $each {commands}
            set command $each
            break
        end
    end
    switch "$command $before[-1]"
{choices}
        case '*'
            switch "$command"
{options}
            end
    end
    string match -q -- '-*' "$word"; or set proposed (string match -v -- '-*' $proposed)
    set -l fitting (string match -- "$word*" $proposed)
    if set -q fitting[1]
        printf '%s\\n' $fitting
    else
        __fish_complete_path "$word"
    end
end
complete -c salad-compile -f -a '(__salad_compile)'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SHELL."""
    parser.add_argument("shell", choices=sorted(SHELLS), help="the shell that reads the script")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(SHELLS[arguments.shell](proposals()), end="")
    return 0


@dataclass(frozen=True)
class Proposals:
    """What may follow: the names of commands, words behind a command (or ""), and behind "command --option"."""

    commands: tuple[str, ...]
    options: dict[str, list[str]]
    choices: dict[str, list[str]]


def proposals() -> Proposals:
    """Of the parsers of all commands."""
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
    return Proposals(tuple(parsers), options, choices)


def bash(found: Proposals) -> str:
    """The script of bash."""
    return BASH.format(commands="|".join(found.commands), table=_sh_table(found))


def zsh(found: Proposals) -> str:
    """The script of zsh, whose own arrays are counted from 1 and hold what is typed."""
    return ZSH.format(commands="|".join(found.commands), table=_sh_table(found))


def _sh_table(found: Proposals) -> str:
    def lines(indent: str, words: dict[str, list[str]]) -> str:
        return "\n".join(f'{indent}"{what}") proposed="{" ".join(each)}" ;;' for what, each in words.items())

    return SH_TABLE.format(choices=lines("    ", found.choices), options=lines("        ", found.options))


def fish(found: Proposals) -> str:
    """The script of fish."""

    def lines(indent: str, words: dict[str, list[str]]) -> str:
        return "\n".join(
            f'{indent}case "{what}"\n{indent}    set proposed {" ".join(each)}' for what, each in words.items()
        )

    return FISH.format(
        commands=" ".join(found.commands),
        choices=lines("        ", found.choices),
        options=lines("                ", found.options),
    )


SHELLS: dict[str, Callable[[Proposals], str]] = {"bash": bash, "fish": fish, "zsh": zsh}


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
