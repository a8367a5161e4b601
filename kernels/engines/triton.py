"""The engine "triton": our Triton kernels for NVIDIA GPUs from Ampere on. Interpreted on the CPU, in tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..capability import CELL_SIZES, OTHERWISE, why_unsupported
from ..launch import interpreting, recording
from .call import Call
from .engine import FOLDERS, GateCall, implementation


class TritonEngine:
    """Triton kernels; `capability` says for what."""

    name = "triton"
    operators = frozenset(FOLDERS)

    def supports(self, call: Call) -> str | None:
        """See `Engine`."""
        interpreted = interpreting() and call.requested == self.name
        if call.device.type != "cuda" and not interpreted and not recording():
            return (
                f"the tensors are on {call.device}: move them to CUDA, or set TRITON_INTERPRET=1 before Triton is "
                "imported to interpret the kernels, slowly"
            )
        if call.cell is not None and call.cell not in CELL_SIZES:
            sizes = ", ".join(map(str, CELL_SIZES))
            return f"no Triton kernel for cells of {call.cell} tokens; there are {sizes}. {OTHERWISE}"
        return why_unsupported(
            call.device,
            call.dtype,
            head_dims=(call.head_dim, call.value_dim),
            blocks=(call.query_block, call.key_block),
        )

    def run(self, call: Call, *arguments: Any) -> Any:
        """See `Engine`."""
        return implementation(call.operator, self.name)(*arguments)

    def gate_calls(self, arch: int) -> Iterator[GateCall]:
        """Every dtype, head_dim, block size and option at least once, and what asks most of a GPU."""
        from .triton_gate import gate_calls

        return gate_calls(arch)
