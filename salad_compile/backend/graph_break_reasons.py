"""Where Dynamo broke a graph, and why, in the words of a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from salad_compile.passes.context import graph_modules

_MOST = 3
_TORCH = str(Path(torch.__file__).parent)


class Break(NamedTuple):
    """One graph break. where: file and line of the user's code, or the empty string."""

    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.reason} at {self.where}" if self.where else self.reason


def breaks_around(gm: fx.GraphModule) -> list[Break]:
    """The breaks that ended a graph or came inside of the functions that it is of, most recent last.

    Args:
        gm: as the backend got it.
    """
    # Private. Every break so far with its stack, and of a graph that which ended it. Seen in torch 2.11 and 2.13;
    # tests/salad_compile/backend/test_announcements.py fails when they move.
    own = getattr(gm, "compile_subgraph_reason", None)
    known = list(getattr(torch._dynamo.output_graph, "graph_break_reasons", ()))
    functions = _functions_of(gm)
    around = [each for each in known if functions & {_function(frame) for frame in each.user_stack} - {None}]
    if own is not None and own.graph_break:
        around.append(own)
    return list(dict.fromkeys(_told(each) for each in around))[-_MOST:]


def _told(reason: Any) -> Break:
    lines = str(reason.reason).strip().splitlines()
    frame = reason.user_stack[-1] if reason.user_stack else None
    return Break(lines[0] if lines else "", f"{frame.filename}:{frame.lineno}" if frame is not None else "")


def _functions_of(gm: fx.GraphModule) -> set[tuple[str, str] | None]:
    """(file, name) of the functions that the nodes of a graph stand in."""
    found: set[tuple[str, str] | None] = set()
    for module in graph_modules(gm):
        for node in module.graph.nodes:
            lines = (node.stack_trace or "").splitlines()
            found.update(_of_line(line.strip()) for line in lines if line.lstrip().startswith('File "'))
    return found - {None}


def _of_line(line: str) -> tuple[str, str] | None:
    """Of `File "model.py", line 12, in forward`."""
    file, _, rest = line.removeprefix('File "').partition('"')
    return _outside_torch(file, rest.rpartition(" in ")[2])


def _function(frame: Any) -> tuple[str, str] | None:
    return _outside_torch(frame.filename, frame.name)


def _outside_torch(file: str, name: str) -> tuple[str, str] | None:
    """Containers of torch run everybody's modules."""
    return None if of_torch(file) else (file, name.removeprefix("torch_dynamo_resume_in_").partition("_at_")[0])


def of_torch(file: str) -> bool:
    """Whether a file of code is one of torch's own."""
    return file.startswith(_TORCH)
