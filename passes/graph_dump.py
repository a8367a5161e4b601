"""Graphs as text: in the log, and a file for each pass with `options={"dump_graphs": folder}`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import fx

from salad_compile.passes.context import graph_modules
from salad_compile.passes.report import PassReport


class ReadableGraph:
    """Prints a graph with its nested graphs when it is formatted, and not before."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    def __str__(self) -> str:
        return "\n".join(module.print_readable(print_output=False) for module in graph_modules(self.gm))


class GraphDump:
    """Writes a graph as Dynamo captured it, and after each pass that changed it, into a folder of its own.

    `<folder>/graph_<n>/0_captured.txt`, `1_<name of the first pass>.txt`, ..., `passes.txt`; n is the first free
    number, so that graphs, runs and processes do not overwrite each other.

    Args:
        folder: is made if it is missing; None writes nothing.
    """

    def __init__(self, folder: str | PathLike[str] | None, gm: fx.GraphModule) -> None:
        self.gm, self.text, self.step = gm, "", 0
        self.folder = None if folder is None else _make_free_folder(Path(folder))
        self.write("captured")

    def write(self, name: str) -> None:
        """The graph as it is now, if it changed."""
        if self.folder is not None:
            text = str(ReadableGraph(self.gm))
            if text != self.text:
                (self.folder / f"{self.step}_{name}.txt").write_text(text)
            self.text = text
        self.step += 1

    def finish(self, passes: Sequence[PassReport]) -> None:
        """The list of passes with times and counts."""
        if self.folder is not None:
            (self.folder / "passes.txt").write_text("".join(f"{report}\n" for report in passes))


def _make_free_folder(folder: Path) -> Path:
    for number in itertools.count():
        try:
            (folder / f"graph_{number}").mkdir(parents=True)
        except FileExistsError:
            continue
        return folder / f"graph_{number}"
    raise AssertionError("unreachable")
