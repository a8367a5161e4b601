"""The small calls that run under compute-sanitizer launch every kernel that ships, as far as one sees without a GPU."""

from __future__ import annotations

from pathlib import Path

from salad_compile.kernels.capability import target_arch
from salad_compile.kernels.launch import record_launches
from tests.kernels.gpu.small_calls import CALLS

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def test_every_kernel_is_launched() -> None:
    with target_arch((9, 0)), record_launches() as launches:
        for call in CALLS.values():
            call("cpu")
    launched = {getattr(launch.kernel, "fn", launch.kernel).__name__ for launch in launches}
    shipped = {
        line.removeprefix("def ").partition("(")[0]
        for file in KERNELS.rglob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert launched == shipped
