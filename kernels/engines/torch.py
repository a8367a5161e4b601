"""The engine "torch": plain torch operators, tuned for the CPU, right on any device and in fp64 too."""

from __future__ import annotations

from typing import Any

from .call import Call
from .engine import FOLDERS, GateCall, implementation


class TorchEngine:
    """Plain torch operators. On a GPU only when asked for."""

    name = "torch"
    operators = frozenset(FOLDERS)

    def supports(self, call: Call) -> str | None:
        """See `Engine`."""
        if call.device.type == "cuda" and call.requested != self.name:
            return f"on a GPU it is slow, so it has to be asked for: salad_compile.kernels.use_engine({self.name!r})"
        return None

    def run(self, call: Call, *arguments: Any) -> Any:
        """See `Engine`."""
        function = implementation(call.operator, self.name)
        return function(*arguments) if call.wants_lse else function(*arguments, wants_lse=False)

    def gate_calls(self, arch: int) -> tuple[GateCall, ...]:
        """It ships no kernel."""
        return ()
