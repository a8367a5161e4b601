"""Functions of other packages that Dynamo keeps as one node, which hides what they do.

Torch registers the functions of einops before 0.8.2 so (`allow_in_graph`): a node that is called `rearrange` may move
values or mix them, and `einops.einsum` hides the products of attention that is written by hand.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator

from torch import fx

from salad_compile.errors import PositionReplayError, SiteLostError

_PACKAGE = "einops"


def hint_at_whole_functions(graphs: Iterable[fx.Graph]) -> str:
    """Which functions of einops these graphs call as one node, and the mend; the empty string if none."""
    targets = (node.target for graph in graphs for node in graph.nodes if node.op == "call_function")
    functions = (each for each in targets if isinstance(each, types.FunctionType))
    names = sorted({each.__name__ for each in functions if each.__module__.partition(".")[0] == _PACKAGE})
    if not names:
        return ""
    return (
        f" Dynamo keeps {', '.join(f'einops.{name}' for name in names)} as one node, which hides what it does: "
        "install einops 0.8.2 or later, which it traces through."
    )


@contextlib.contextmanager
def blame_whole_functions(graphs: Iterable[fx.Graph]) -> Iterator[None]:
    """Errors about what graphs do not show name these functions."""
    hint = hint_at_whole_functions(graphs)
    try:
        yield
    except (PositionReplayError, SiteLostError) as error:
        if not hint:
            raise
        raise type(error)(f"{error}{hint}") from error
