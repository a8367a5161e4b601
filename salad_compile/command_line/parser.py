"""The parser of every command: for a word that it does not know it names the nearest that it does."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from salad_compile.errors import did_you_mean, nearest


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says `Did you mean '--sparsity'?`, also for commands and choices."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but words left over are an error here, where the command's own options are known."""
        self._given = list(args or ())
        parsed, left = super().parse_known_args(args, namespace)
        if left:
            self._given = left
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return parsed, left

    def error(self, message: str) -> NoReturn:
        """Usage and message on stderr, exit code 2; of options that do not exist, the nearest."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        hint = did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2])) if choice else self._hint_at_options()
        super().error(f"{message}.{hint}" if hint else message)

    def _hint_at_options(self) -> str:
        valid = re.findall(r"(?<=[\[\s])--([\w-]+)", self.format_usage())
        given = [word.split("=")[0][2:] for word in self._given if word.startswith("--")]
        near = {word: nearest(word, valid) for word in given if word not in (*valid, "help")}
        return "".join(f" There is no --{word}; did you mean '--{name}'?" for word, name in near.items() if name)
