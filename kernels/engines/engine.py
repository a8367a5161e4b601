"""What an engine is, and where the implementations of the engines that ship stand."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, Protocol

from .call import Call

# Operator -> its folder. Each engine has a module of its own name there, with a function of the operator's name.
FOLDERS = {
    "prepare_operand": "prepare",
    "pool_blocks": "routing",
    "select_blocks": "routing",
    "select_by_mass": "mass",
    "block_sparse_attention": "block_sparse",
    "block_sparse_attention_backward": "block_sparse",
    "count_tail": "tail",
    "tail_means": "tail",
    "take_rows_with_means": "tail",
    "attend_with_tail": "tail",
    "attend_with_tail_backward": "tail",
    "linear_state": "linear",
    "linear_state_backward": "linear",
    "linear_output": "linear",
    "linear_output_backward": "linear",
}


class GateCall(NamedTuple):
    """A call that the gate (kernels/inspect.py) records to compile what it launches.

    Attributes:
        call: what `Engine.supports` is asked first.
        name: in words, for reports and for `--filter`.
        arguments: of `Engine.run`; tensors on meta.
    """

    call: Call
    name: str
    arguments: tuple[Any, ...]


class Engine(Protocol):
    """One way to compute some of the operators.

    Attributes:
        name: what `use_engine` takes and `Execution.engine` reports.
        operators: those that it offers. A request for an engine leaves other operators on their usual engine.
    """

    @property
    def name(self) -> str: ...

    @property
    def operators(self) -> Collection[str]: ...

    def supports(self, call: Call) -> str | None:
        """None if this engine computes such calls, else the reason why not, as a clause.

        Must depend on `call`, and on whether kernels are interpreted or recorded, alone: the answer is kept. An engine
        that is only to be used when asked for looks at `call.requested`.
        """
        ...

    def run(self, call: Call, *arguments: Any) -> Any:
        """Compute a call that it supports.

        Args:
            arguments: those of the function of the operator's name in the operator's reference.py, in their order; of
                backward operators see the folder's torch.py.

        Returns:
            what that function returns.
        """
        ...

    def gate_calls(self, arch: int) -> Iterable[GateCall]:
        """The calls that together launch every kernel that ships for a compute capability (90 for 9.0)."""
        ...


def implementation(operator: str, engine: str) -> Any:
    """The function that computes an operator. Imported on first use: Triton takes a second."""
    return getattr(_module(operator, engine), operator)


@functools.cache  # importing what is imported takes as long as a small operation
def _module(operator: str, engine: str) -> Any:
    return importlib.import_module(f"...{FOLDERS[operator]}.{engine}", __name__)
